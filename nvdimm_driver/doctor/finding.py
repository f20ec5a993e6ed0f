"""What a check of the host has found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nvdimm_driver.errors import NvdimmError


class Result(StrEnum):
    """As virt-host-validate has them; a NOTE is neither good nor bad."""

    PASS = "PASS"
    NOTE = "NOTE"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :ivar check: what.
    :ivar message: how it is.
    :ivar hint: what to do about it; may be empty.
    """

    check: str
    result: Result
    message: str
    hint: str = ""


def passed(check: str, message: str) -> Finding:
    """It is as it should be."""
    return Finding(check, Result.PASS, message)


def noted(check: str, message: str, hint: str = "") -> Finding:
    """Good to know."""
    return Finding(check, Result.NOTE, message, hint)


def warned(check: str, message: str, hint: str = "") -> Finding:
    """It works, with less than could be had, or may not work."""
    return Finding(check, Result.WARN, message, hint)


def failed(check: str, message: str, hint: str = "") -> Finding:
    """Domains with NVDIMMs cannot be had like this."""
    return Finding(check, Result.FAIL, message, hint)


def could_not(check: str, error: NvdimmError | OSError) -> Finding:
    """What was tried failed with this error."""
    if isinstance(error, NvdimmError):
        return failed(check, error.message, error.hint)
    return failed(check, str(error), "run as root" if isinstance(error, PermissionError) else "")
