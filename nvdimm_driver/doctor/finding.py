# SPDX-License-Identifier: Apache-2.0
"""The finding of a check of the host."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nvdimm_driver.errors import NvdimmError, hint_of


class Result(StrEnum):
    """The result of a check, named as by virt-host-validate; a NOTE is neither good nor bad."""

    PASS = "PASS"
    NOTE = "NOTE"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """The finding of one check.

    :ivar check: name of the check.
    :ivar message: the state of what was checked.
    :ivar hint: what to do about it; may be empty.
    """

    check: str
    result: Result
    message: str
    hint: str = ""


def passed(check: str, message: str) -> Finding:
    """Return a PASS: it is as it should be."""
    return Finding(check, Result.PASS, message)


def noted(check: str, message: str, hint: str = "") -> Finding:
    """Return a NOTE: it is good to know."""
    return Finding(check, Result.NOTE, message, hint)


def warned(check: str, message: str, hint: str = "") -> Finding:
    """Return a WARN: it works, but not as well as it could, or it may fail later."""
    return Finding(check, Result.WARN, message, hint)


def failed(check: str, message: str, hint: str = "") -> Finding:
    """Return a FAIL: domains with NVDIMMs cannot work like this."""
    return Finding(check, Result.FAIL, message, hint)


def could_not(check: str, error: NvdimmError | OSError) -> Finding:
    """Return a FAIL for a check that could not be done because of this error."""
    if isinstance(error, NvdimmError):
        return failed(check, error.message, error.hint)
    return failed(check, str(error), hint_of(error))
