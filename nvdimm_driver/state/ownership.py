# SPDX-License-Identifier: Apache-2.0
"""Ownership of backings: no two domains may have the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nvdimm_driver.errors import BackingError, InUseError
from nvdimm_driver.model import Allocation, BackingIdentity, DomainSpec, Record, Surveyed
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.state import owner_marks
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.owner_marks import Mark


def check_paths(ledger: Ledger, domain: DomainSpec) -> None:
    """Check that no other domain has one of the domain's paths, or the same path in other words without having bytes.

    :func:`check_bytes` finds other words for what has bytes.

    :raises InUseError: when one has, or runs with the path even if it was redefined without it since.
    """
    wanted = {path: spec.path for spec in domain.nvdimms for path in (spec.path, os.path.realpath(spec.path))}
    for record in ledger.domains():
        if record.uuid == domain.uuid:
            continue
        unfinished = {os.path.realpath(item.spec.path) for item in record.allocations if not item.ready}
        for path in wanted.keys() & (_paths(record) | unfinished):
            raise _owned(wanted[path], record)


def check_bytes(ledger: Ledger, uuid: str, identities: Mapping[str, BackingIdentity]) -> None:
    """Check that no other domain has the same bytes under another path (a bind mount, a second device node).

    :param uuid: of the domain.
    :param identities: of the domain's backings, by path.
    :raises InUseError: when one has.
    """
    for path, identity in identities.items():
        for record in _sharing(ledger, identity):
            if record.uuid != uuid:
                raise _owned(path, record)


def owners(ledger: Ledger, path: str, identity: BackingIdentity | None) -> tuple[Record, ...]:
    """Return the domains that have the path, run with it, or have bytes of that identity under any path.

    :param identity: of the backing; None when it cannot be determined.
    """
    real = os.path.realpath(path)
    found = {record.uuid: record for record in ledger.domains() if real in map(os.path.realpath, _paths(record))}
    if identity is not None:
        found.update({record.uuid: record for record in _sharing(ledger, identity)})
    return tuple(found.values())


def others(ledger: Ledger, record: Record, path: str, identity: BackingIdentity | None) -> list[Record]:
    """Return the :func:`owners` that are not this domain."""
    return [each for each in owners(ledger, path, identity) if each.uuid != record.uuid]


def check_free(ledger: Ledger, path: str, identity: BackingIdentity | None) -> None:
    """Check that no domain has or runs with the path, or has bytes of that identity.

    :raises InUseError: when one does.
    """
    for record in owners(ledger, path, identity):
        raise _owned(path, record)


def check_marks(ledger: Ledger, backings: Sequence[Backing], uuid: str, paths: Iterable[str]) -> None:
    """Check that no file is, by its mark or because it is frozen, that of a domain which the ledger does not know.

    A ledger that was lost, rebuilt or restored from a backup knows less than the files.

    :param uuid: of the domain that is to have the files; empty for none.
    :raises InUseError: when one is.
    """
    for path in paths:
        for file in filter(None, (_inspect(backing, path) for backing in backings if backing.handles(path))):
            mark = None if file.owner is None else owner_marks.unpack(path, file.owner)
            if mark is not None and mark.uuid == uuid:
                continue
            if mark is not None and not _has_elsewhere(ledger, mark, file.path):
                raise InUseError(
                    f"{path} has the mark of domain {mark.name} ({mark.uuid}), and the ledger does not know that",
                    hint="'nvdimmctl check --repair' writes it into the ledger; if that domain is gone for good, "
                    f"'nvdimmctl release {mark.name}' then frees the file",
                )
            if file.frozen and not any(file.path in _frozen(record) for record in ledger.started_domains()):
                raise InUseError(
                    f"{path} is immutable for a guest that the ledger does not know", hint="see 'nvdimmctl check'"
                )


def _inspect(backing: Backing, path: str) -> Surveyed | None:
    try:
        return backing.inspect(path)
    except BackingError:
        return None  # no file that a domain could have


def _has_elsewhere(ledger: Ledger, mark: Mark, path: str) -> bool:
    """Return True if the NVDIMM that a mark names is another file: the marked one is a copy."""
    record = ledger.find_domain(mark.uuid)
    items = record.allocations if record else ()
    return any(item.spec.slot == mark.spec.slot and os.path.realpath(item.spec.path) != path for item in items)


def _frozen(record: Record) -> set[str]:
    return set(map(os.path.realpath, record.start.paths)) if record.start else set()


def check_off(record: Record, hint: str = "shut it down first") -> None:
    """Check that a domain is neither running nor starting.

    :raises InUseError: with that hint, when it is.
    """
    if record.start is not None:
        raise InUseError(f"domain {record.name} is running or starting", hint=hint)


def _paths(record: Record) -> set[str]:
    paths = {item.spec.path for item in record.allocations}
    return paths if record.start is None else paths.union(record.start.paths)


def _sharing(ledger: Ledger, identity: BackingIdentity) -> Iterator[Record]:
    for record in ledger.domains():
        if any(item.identity is not None and item.identity.shares_bytes(identity) for item in record.allocations):
            yield record


def _owned(path: str, record: Record) -> InUseError:
    return InUseError(
        f"{path} belongs to domain {record.name} ({record.uuid})",
        hint=f"if that domain is gone for good, 'nvdimmctl release {record.name}' frees the path; it keeps the data, "
        "unless the pool has wipe_on_release",
    )


def mark(ledger: Ledger, backings: Sequence[Backing], record: Record | None, before: Record | None) -> None:
    """Record the owner on a domain's backings, and remove the record from those that it no longer has."""
    kept = record.allocations if record else ()
    for item in kept:
        if record:
            backing_of(backings, item.spec.path).mark(item.spec.path, owner_marks.pack(record, item))
    paths = {item.spec.path for item in kept}
    unmark(ledger, backings, [item for item in (before.allocations if before else ()) if item.spec.path not in paths])


def unmark(ledger: Ledger, backings: Sequence[Backing], items: Sequence[Allocation]) -> None:
    """Remove the owner's record from backings that no domain has any more, by any name."""
    if not items:
        return
    owned = {os.path.realpath(each.spec.path) for record in ledger.domains() for each in record.allocations}
    for item in items:
        if os.path.realpath(item.spec.path) in owned:
            continue
        for backing in backings:
            if backing.handles(item.spec.path):
                backing.mark(item.spec.path, None)


def give_up(ledger: Ledger, backings: Sequence[Backing], record: Record) -> None:
    """Give up a domain's claim to its backings.

    :raises InUseError: while it runs.
    """
    check_off(record)
    ledger.forget(record.uuid, kind="forgotten")
    unmark(ledger, backings, record.allocations)
