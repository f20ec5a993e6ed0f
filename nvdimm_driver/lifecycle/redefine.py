# SPDX-License-Identifier: Apache-2.0
"""Check of a redefinition: it takes no bytes from the guest of an NVDIMM that the domain keeps.

An NVDIMM that is left out of the definition is given up as a whole, on purpose; its bytes stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from nvdimm_driver.backing.inventory import bad_parts
from nvdimm_driver.errors import BackingError, RefusedError, UnsupportedError
from nvdimm_driver.model import MIB, Allocation, BackingIdentity, DomainSpec, Location, NvdimmSpec, Record
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.sizes import human

_CHUNK = MIB
_HINT = (
    "keep size, label and alignsize; to change them all the same, save the bytes with 'nvdimmctl export', give "
    "the NVDIMM up with 'nvdimmctl release --slot', and then define the domain"
)


def check_kept(
    domain: DomainSpec, before: Record | None, backings: Sequence[Backing], bad: Sequence[tuple[int, int]]
) -> None:
    """Check that a redefinition keeps each NVDIMM's size, and all of its bytes that are in use, for what they are.

    A byte is in use if it is not 0: one that the guest has written, or one of its labels.

    :param before: the domain as the ledger knows it.
    :param bad: known bad ranges of persistent memory, as (SPA, bytes). They are not read, and count as in use.
    :raises RefusedError: when an NVDIMM gets smaller, or bytes in use come to be label area, data or neither.
    """
    for item in () if before is None else before.allocations:
        for spec in domain.nvdimms:
            if spec.path == item.spec.path:
                _check_one(item, spec, backing_of(backings, spec.path), bad)


def _check_one(item: Allocation, new: NvdimmSpec, backing: Backing, bad: Sequence[tuple[int, int]]) -> None:
    old = item.spec
    location = _same(item, backing)
    if location is None:
        return
    if new.size < old.size:
        raise RefusedError(
            f"{old.path}: has {human(old.size)} and would have {human(new.size)}: the guest would lose its end",
            hint=_HINT,
        )
    for what, start, end in _given_up(old, new):
        broken = any(first < end and start < first + size for first, size in bad_parts(location.extents, bad))
        if broken or _in_use(backing, old, start, end):
            raise RefusedError(
                f"{old.path}: {what}, {human(end - start)} at {start:#x}, is in use, and would be something else with "
                f"a size of {human(new.size)} and a label area of {human(new.label_size)}",
                hint=_HINT,
            )


def _same(item: Allocation, backing: Backing) -> Location | None:
    """Return where an NVDIMM is; None when its backing is not the one that was provisioned, or is not fit."""
    with suppress(BackingError):
        location = backing.locate(item.spec)
        if item.identity is not None and _place(location.identity) == _place(item.identity):
            return location
    return None


def _place(identity: BackingIdentity) -> tuple[str, int, int, int]:
    """Return what tells a backing from others, even after it was enlarged."""
    return identity.device, identity.start, identity.inode, identity.generation


def _given_up(old: NvdimmSpec, new: NvdimmSpec) -> Iterator[tuple[str, int, int]]:
    """Return the parts of an NVDIMM that are no longer for the same: what each is, its first byte, and its end."""
    if new.visible_size < old.visible_size:
        yield "the end of the guest's data", new.visible_size, old.visible_size
    if old.label_size and (new.size, new.label_size) != (old.size, old.label_size):
        yield "its label area", old.size - old.label_size, old.size


def _in_use(backing: Backing, spec: NvdimmSpec, start: int, end: int) -> bool:
    try:
        with backing.open_bytes(spec) as content:
            return any(map(any, _chunks(content, start, end)))
    except UnsupportedError:
        return True  # the host cannot read it


def _chunks(content: ByteRange, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, _CHUNK):
        yield content.read(at, min(_CHUNK, end - at))
