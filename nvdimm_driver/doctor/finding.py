# SPDX-License-Identifier: Apache-2.0
"""Findings of the checks of a host."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nvdimm_driver.errors import NvdimmError


class Result(StrEnum):
    """The results of virt-host-validate; a NOTE is neither good nor bad."""

    PASS = "PASS"
    NOTE = "NOTE"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One finding.

    :ivar check: what.
    :ivar message: how it is.
    :ivar hint: what to do about it; may be empty.
    """

    check: str
    result: Result
    message: str
    hint: str = ""


def passed(check: str, message: str) -> Finding:
    """Return a finding for something that is as it should be."""
    return Finding(check, Result.PASS, message)


def noted(check: str, message: str, hint: str = "") -> Finding:
    """Return a finding that is neither good nor bad."""
    return Finding(check, Result.NOTE, message, hint)


def warned(check: str, message: str, hint: str = "") -> Finding:
    """Return a finding for something that works with limits, or may fail."""
    return Finding(check, Result.WARN, message, hint)


def failed(check: str, message: str, hint: str = "") -> Finding:
    """Return a finding for something that keeps domains with NVDIMMs from working."""
    return Finding(check, Result.FAIL, message, hint)


def could_not(check: str, error: NvdimmError | OSError) -> Finding:
    """Return a finding for a check that failed with this error."""
    if isinstance(error, NvdimmError):
        return failed(check, error.message, error.hint)
    return failed(check, str(error), "run as root" if isinstance(error, PermissionError) else "")
