# SPDX-License-Identifier: Apache-2.0
"""The identity of what is at a path, and the check that it is the backing that was provisioned."""

from __future__ import annotations

from dataclasses import replace

from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import BackingIdentity
from nvdimm_driver.sizes import human


def check_identity(path: str, found: BackingIdentity, expected: BackingIdentity | None) -> None:
    """Refuse a backing that is not the expected one.

    :raises BackingError: naming each field that differs, with both values.
    """
    if found != expected:
        raise BackingError(
            f"{path} is not the backing that was provisioned: {describe_differences(found, expected)}",
            hint="'nvdimmctl check' says where it is, and how to go on",
        )


def check_same_bytes(path: str, found: BackingIdentity, expected: BackingIdentity) -> None:
    """Refuse a backing that is not the expected one, whatever its size is now.

    :raises BackingError: as :func:`check_identity` does.
    """
    check_identity(path, found, replace(expected, size=found.size))


def check_none_outside(path: str, found: BackingIdentity | None, had: BackingIdentity | None, hint: str = "") -> None:
    """Refuse a device that has not all the bytes that were provisioned: a partition that was made smaller leaves some.

    What a file that was truncated has lost reads as zeros, whoever gets the blocks.

    :param hint: what can be done beside making the device as large as it was.
    :raises BackingError: when some are outside.
    """
    if had is not None and found is not None and not had.inode and not found.covers(had):
        raise BackingError(
            f"{path}: {describe_differences(found, had)}: bytes of the domain are outside of it, and have to be "
            "overwritten before another domain may have them",
            hint=f"make it as it was{hint}",
        )


def describe_differences(found: BackingIdentity, expected: BackingIdentity | None) -> str:
    """Return each field that differs, with both values, for people: ``its inode is 15, it was 12``."""
    if expected is None:
        return "no backing was provisioned"
    fields = (
        ("kind", found.kind, expected.kind),
        ("namespace", found.device, expected.device),
        ("offset in the namespace", *_two_sizes(found.start, expected.start)),
        ("inode", found.inode, expected.inode),
        ("inode generation", found.generation, expected.generation),
        ("size", *_two_sizes(found.size, expected.size)),
    )
    return "; ".join(f"its {name} is {now}, it was {before}" for name, now, before in fields if now != before)


def _two_sizes(one: int, other: int) -> tuple[str, str]:
    """Return two sizes for people: in binary units, or in bytes where they would round to the same."""
    if one != other and human(one).replace(".00", "") == human(other).replace(".00", ""):
        return f"{one} bytes", f"{other} bytes"
    return human(one), human(other)
