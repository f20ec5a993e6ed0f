# SPDX-License-Identifier: Apache-2.0
"""Check of a redefinition: it takes no bytes from the guest of an NVDIMM that the domain keeps.

An NVDIMM that is left out of the definition is given up as a whole, on purpose; its bytes stay as they are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from nvdimm_driver.backing.inventory import bad_parts
from nvdimm_driver.errors import BackingError, RefusedError, UnsupportedError
from nvdimm_driver.lifecycle.saved_guest import backings_of, domain_of, has_had
from nvdimm_driver.model import MIB, Allocation, BackingIdentity, DomainSpec, Extent, NvdimmSpec, Record, Run
from nvdimm_driver.plugins import Backing, ByteRange, backing_of, exists
from nvdimm_driver.sizes import human
from nvdimm_driver.state.ownership import identity_at

_CHUNK = MIB
_LABELS = "its label area"
_HINT = (
    "keep size, label and alignsize; to change them all the same, save the bytes with 'nvdimmctl export', and define "
    "the domain with a copy of its own (guide: Changing the size)"
)


def check_kept(
    domain: DomainSpec,
    before: Record | None,
    last: Run | None,
    backings: Sequence[Backing],
    bad: Sequence[tuple[int, int]],
    moved: Container[str] = (),
) -> None:
    """Check that a redefinition keeps each NVDIMM's size, and all of its bytes that are in use, for what they are.

    A byte is in use if it is not 0: one that the guest has written, or one of its labels. An NVDIMM may always be as
    the domain's last guest had it, if nothing has written it since: what a definition has made of it, no guest knows.

    :param before: the domain as the ledger knows it.
    :param last: the domain's last run.
    :param bad: known bad ranges of persistent memory, as (SPA, bytes). They are not read, and count as in use.
    :param moved: paths of NVDIMMs whose labels move to a new end (:mod:`.growth`).
    :raises RefusedError: when an NVDIMM gets smaller, or bytes in use come to be label area, data or neither.
    """
    off = before is not None and before.start is None
    for item, spec, identity in kept_nvdimms(domain, before, backings):
        backing = backing_of(backings, spec.path)
        if last is None or not has_had(last, spec, identity, backing.written_at(spec.path) if off else None):
            _check_one(replace(item.spec, path=spec.path), spec, backing, bad, moves=spec.path in moved)


def may_read(domain: DomainSpec, before: Record | None, backings: Sequence[Backing]) -> bool:
    """Return True when :func:`check_kept` may read bytes, as many as the redefinition gives up: that can take hours."""
    return any(True for item, spec, _ in kept_nvdimms(domain, before, backings) for _ in _given_up(item.spec, spec))


def kept_nvdimms(
    domain: DomainSpec, before: Record | None, backings: Sequence[Backing]
) -> Iterator[tuple[Allocation, NvdimmSpec, BackingIdentity]]:
    """Yield each NVDIMM that the domain keeps: as it was, as it is to be, and the identity of its backing."""
    items = [item for item in (() if before is None else before.allocations) if item.identity is not None]
    for spec in domain.nvdimms if items else ():
        identity = identity_at(backings, spec.path)
        if identity is None and any(item.spec.path == spec.path for item in items) and exists(spec.path):
            identity = backing_of(backings, spec.path).identify(spec.path)  # which says why it cannot be looked at
        for item in items:
            if identity is not None and item.identity is not None and _place(identity) == _place(item.identity):
                yield item, spec, identity


def check_started(
    domain: DomainSpec, record: Record | None, begun: Run | None, identities: Mapping[str, BackingIdentity | None]
) -> None:
    """Check that a redefinition takes no part of an NVDIMM from a guest that runs or starts: it may write to all of it.

    What is 0 now need not be 0 at its next start, and a definition is not compared with the bytes again then.

    :param record: the domain as the ledger knows it.
    :param begun: the run of its start, if the ledger has one.
    :param identities: of what is at the domain's paths; None where nothing is.
    :raises RefusedError: when a part of one would come to be label area, data or neither.
    """
    if record is None or record.start is None:
        return
    for old, had in _started_with(record, begun):
        for new in domain.nvdimms:
            identity = identities[new.path]
            if identity is None or had is None or _place(identity) != _place(had):
                continue
            for what, start, end in _given_up(old, new):
                raise RefusedError(
                    f"{new.path}: domain {record.name} runs, and its guest may write to {what}, {human(end - start)} "
                    f"at {start:#x}, which would be something else with {_shape(new)}",
                    hint="keep size, label and alignsize, or shut the domain down first",
                )


def still_mapped(
    domain: DomainSpec, kept: Sequence[Allocation], started: Iterable[tuple[Record, Run | None]]
) -> list[NvdimmSpec]:
    """Return the NVDIMMs of guests that run or start, but for those that their domains have when one is defined.

    :param domain: the one that is defined.
    :param kept: NVDIMMs that it keeps besides.
    :param started: domains with a start, each with the run of its start, if the ledger has one.
    """
    wanted, found = {spec.path for spec in (*domain.nvdimms, *(item.spec for item in kept))}, []
    for record, begun in started:
        claimed = wanted if record.uuid == domain.uuid else {item.spec.path for item in record.claims}
        found += [spec for spec, _ in _started_with(record, begun) if spec.path not in claimed]
    return found


def _started_with(record: Record, begun: Run | None) -> list[tuple[NvdimmSpec, BackingIdentity | None]]:
    """Return what the guest of a domain's start has: each NVDIMM, and the identity of its backing."""
    started = None if begun is None else domain_of(begun, record.uuid)
    if begun is None or started is None:  # an earlier version has begun it, or it is not prepared yet
        return [(item.spec, item.identity) for item in record.started]
    found = dict(backings_of(begun))
    return [(spec, found[spec.path]) for spec in started.nvdimms]


def _check_one(
    old: NvdimmSpec, new: NvdimmSpec, backing: Backing, bad: Sequence[tuple[int, int]], *, moves: bool
) -> None:
    """Check a new definition of an NVDIMM.

    :param old: the NVDIMM as it was, at its path of now.
    :param moves: its labels move to its new end.
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
        if moves and what == _LABELS:
            continue
        if has_bad_blocks(extents, bad, start, end) or in_use(backing, old, start, end):
            raise RefusedError(
                f"{old.path}: {what}, {human(end - start)} at {start:#x}, is in use, and would be something else with "
                f"{_shape(new)}",
                hint=_HINT,
            )


def _shape(spec: NvdimmSpec) -> str:
    """Return what decides which byte of an NVDIMM is what."""
    alignsize = human(spec.alignsize) if spec.alignsize else "none"
    return f"a size of {human(spec.size)}, a label area of {human(spec.label_size)} and an alignsize of {alignsize}"


def _place(identity: BackingIdentity) -> tuple[str, int, int, int]:
    """Return what tells a backing from others, even after it was enlarged."""
    return identity.device, identity.start, identity.inode, identity.generation


def _given_up(old: NvdimmSpec, new: NvdimmSpec) -> Iterator[tuple[str, int, int]]:
    """Return the parts of an NVDIMM that are no longer for the same: what each is, its first byte, and its end."""
    if new.visible_size < old.visible_size:
        yield "the end of the guest's data", new.visible_size, old.visible_size
    if old.label_size and (new.size, new.label_size) != (old.size, old.label_size):
        yield _LABELS, old.size - old.label_size, old.size


def has_bad_blocks(extents: Sequence[Extent], bad: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    """Return True when a part of an NVDIMM has bad blocks: a read of device-dax would end the process.

    :param extents: those of the NVDIMM.
    :param bad: as for :func:`check_kept`.
    """
    return any(first < end and start < first + size for first, size in bad_parts(extents, bad))


def in_use(backing: Backing, spec: NvdimmSpec, start: int, end: int) -> bool:
    """Return True when a byte of a part of an NVDIMM is not 0, or nobody can read it."""
    try:
        with backing.open_bytes(spec) as content:
            zeros = bytes(_CHUNK)
            return any(chunk != zeros[: len(chunk)] for chunk in _chunks(content, start, end))
    except UnsupportedError:
        return True  # the host cannot read it


def _chunks(content: ByteRange, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, _CHUNK):
        yield content.read(at, min(_CHUNK, end - at))
