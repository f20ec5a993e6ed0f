# SPDX-License-Identifier: Apache-2.0
"""Check of a redefinition: it takes no bytes from the guest of an NVDIMM that the domain keeps.

An NVDIMM that is left out of the definition is given up as a whole, on purpose; its bytes stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from nvdimm_driver.backing.inventory import bad_parts
from nvdimm_driver.errors import BackingError, RefusedError, UnsupportedError
from nvdimm_driver.lifecycle.saved_guest import has_had
from nvdimm_driver.model import MIB, BackingIdentity, DomainSpec, NvdimmSpec, Record, Run
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.sizes import human
from nvdimm_driver.state.ownership import identity_at

_CHUNK = MIB
_HINT = (
    "keep size, label and alignsize; to change them all the same, save the bytes with 'nvdimmctl export', give "
    "the NVDIMM up with 'nvdimmctl release --slot', and then define the domain"
)


def check_kept(
    domain: DomainSpec,
    before: Record | None,
    last: Run | None,
    backings: Sequence[Backing],
    bad: Sequence[tuple[int, int]],
) -> None:
    """Check that a redefinition keeps each NVDIMM's size, and all of its bytes that are in use, for what they are.

    A byte is in use if it is not 0: one that the guest has written, or one of its labels. An NVDIMM may always be as
    the domain's last guest had it: what a definition has made of it since, no guest knows.

    :param before: the domain as the ledger knows it.
    :param last: the domain's last run.
    :param bad: known bad ranges of persistent memory, as (SPA, bytes). They are not read, and count as in use.
    :raises RefusedError: when an NVDIMM gets smaller, or bytes in use come to be label area, data or neither.
    """
    items = [item for item in (() if before is None else before.allocations) if item.identity is not None]
    for spec in domain.nvdimms if items else ():
        identity = identity_at(backings, spec.path)
        for item in items:
            if identity is None or item.identity is None or _place(identity) != _place(item.identity):
                continue
            if last is None or not has_had(last, spec, identity):
                _check_one(replace(item.spec, path=spec.path), spec, backing_of(backings, spec.path), bad)


def _check_one(old: NvdimmSpec, new: NvdimmSpec, backing: Backing, bad: Sequence[tuple[int, int]]) -> None:
    """Check a new definition of an NVDIMM.

    :param old: the NVDIMM as it was, at its path of now.
    """
    if new.size < old.size:
        raise RefusedError(
            f"{old.path}: has {human(old.size)} and would have {human(new.size)}: the guest would lose its end",
            hint=_HINT,
        )
    try:
        extents = backing.locate(old).extents
    except BackingError:
        return  # it is not fit, and the plan will say why
    for what, start, end in _given_up(old, new):
        broken = any(first < end and start < first + size for first, size in bad_parts(extents, bad))
        if broken or _in_use(backing, old, start, end):
            raise RefusedError(
                f"{old.path}: {what}, {human(end - start)} at {start:#x}, is in use, and would be something else with "
                f"a size of {human(new.size)} and a label area of {human(new.label_size)}",
                hint=_HINT,
            )


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
