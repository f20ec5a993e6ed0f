# SPDX-License-Identifier: Apache-2.0
"""Ownership of backings: no two domains may have the same bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress

from nvdimm_driver.errors import BackingError, InUseError, LedgerError, TurnedError
from nvdimm_driver.model import PAGE, Allocation, BackingIdentity, DomainSpec, NvdimmSpec, Record, Surveyed
from nvdimm_driver.plugins import Backing, backing_named, backing_of, exists
from nvdimm_driver.shell import repair_of
from nvdimm_driver.sizes import human
from nvdimm_driver.state import owner_marks
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.owner_marks import Mark
from nvdimm_driver.state.start_steps import ABANDONED_SECONDS, seconds_since_boot
from nvdimm_driver.state.words import release_of

LOG = logging.getLogger(__name__)


def identity_at(backings: Sequence[Backing], path: str) -> BackingIdentity | None:
    """Return the identity of the backing at a path; None when there is none that a domain can have."""
    try:
        return backing_of(backings, path).identify(path)
    except BackingError:
        return None


def held(backings: Sequence[Backing], record: Record | None) -> set[str]:
    """Return the domain's paths at which the bytes are that were provisioned for it: no other domain can have them."""
    return {
        item.spec.path
        for item in (record.allocations if record else ())
        if item.identity and has_bytes([item], identity_at(backings, item.spec.path))
    }


def check_paths(ledger: Ledger, domain: DomainSpec, held: Container[str] = ()) -> None:
    """Check that no other domain has one of the domain's paths, or the same path in other words without having bytes.

    :func:`check_bytes` finds other words for what has bytes.

    :param held: paths that the domain has already, by :func:`held`.
    :raises InUseError: when one has, or runs with the path even if it was redefined without it since.
    """
    for path in (spec.path for spec in domain.nvdimms if spec.path not in held):
        for record in ledger.claimants(path):
            if record.uuid != domain.uuid and _has(record, path, None):
                raise _owned(path, record)


def check_bytes(
    ledger: Ledger, uuid: str, identities: Mapping[str, BackingIdentity], before: Sequence[Allocation] = ()
) -> None:
    """Check that no other domain has the same bytes under another path (a bind mount, a second device node).

    :param uuid: of the domain.
    :param identities: of the domain's backings, by path.
    :param before: the domain's NVDIMMs until now.
    :raises InUseError: when one has.
    """
    for path, identity in identities.items():
        for record in _others(ledger, uuid, before, path, identity):
            raise _owned(path, record, identity)


def owners(ledger: Ledger, path: str, identity: BackingIdentity | None) -> tuple[Record, ...]:
    """Return the domains that have what is at a path, or run with it.

    :param identity: of the backing; None when it cannot be determined.
    """
    return tuple(record for record in ledger.claimants(path, identity) if _has(record, path, identity))


def others(ledger: Ledger, record: Record, path: str, identity: BackingIdentity | None) -> list[Record]:
    """Return the :func:`owners` that are not this domain.

    A domain that has what was provisioned for it is the owner, whatever others claim by name.
    """
    return _others(ledger, record.uuid, record.allocations, path, identity)


def owners_of_bytes(ledger: Ledger, record: Record, identity: BackingIdentity | None) -> list[Record]:
    """Return the domains that are not this one, and were provisioned with bytes of that identity."""
    found = [] if identity is None else ledger.claimants("", identity)
    return [each for each in found if each.uuid != record.uuid and has_bytes(each.allocations, identity)]


def runs_with(record: Record, path: str, identity: BackingIdentity | None) -> bool:
    """Return True when a domain's start has what is at a path."""
    paths = _frozen(record)
    return path in paths or has_bytes([item for item in record.allocations if item.spec.path in paths], identity)


class Running:
    """The domains of some records that have a start, for many questions about who has a file.

    :func:`runs_with` decides; this finds the few domains that it has to look at.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._started = [record for record in records if record.start]
        self._found: dict[object, list[Record]] = {}
        for record in self._started:
            keys = {*_frozen(record), *(_key(item.identity) for item in record.started if item.identity)}
            for key in keys:
                self._found.setdefault(key, []).append(record)

    def __bool__(self) -> bool:
        return bool(self._started)

    def of(self, path: str, identity: BackingIdentity | None) -> list[Record]:
        """Return the domains whose start has what is at a path."""
        if identity is not None and not identity.inode:
            found = self._started
        else:
            keys = [path] if identity is None else [path, _key(identity), (identity.device, 0)]
            found = list({record.uuid: record for key in keys for record in self._found.get(key, ())}.values())
        return [record for record in found if runs_with(record, path, identity)]


def _key(identity: BackingIdentity) -> tuple[str, int]:
    """Return what two files have in common if they share bytes; 0 instead of the inode stands for a whole device."""
    return identity.device, identity.inode


def find_other(record: Record, item: Allocation, identity: BackingIdentity | None) -> Allocation | None:
    """Return another NVDIMM of a domain that was provisioned with the file or device of that identity, if any."""
    others = [each for each in record.allocations if each.spec.slot != item.spec.slot and has_bytes([each], identity)]
    inode = identity.inode if identity else 0  # 0 is a device, which shares bytes with each file on it, too
    return next((each for each in others if each.identity and each.identity.inode == inode), None)


def find_own(record: Record, item: Allocation, found: BackingIdentity | None) -> Allocation | None:
    """Return the other NVDIMM of a domain that is in the place of one, if one is.

    :param found: the identity of what is at the path of that one.
    """
    return None if has_bytes([item], found) else find_other(record, item, found)


def check_free(ledger: Ledger, path: str, identity: BackingIdentity | None) -> None:
    """Check that no domain has or runs with the path, or has bytes of that identity.

    :raises InUseError: when one does.
    """
    for record in owners(ledger, path, identity):
        raise _owned(path, record, identity)


def check_marks(
    ledger: Ledger, backings: Sequence[Backing], uuid: str, claims: Mapping[str, BackingIdentity | None]
) -> None:
    """Check that no backing is, by its mark or because it is frozen, another domain's, which the ledger may not know.

    A ledger that was lost, rebuilt or restored from a backup knows less than the marks. Those of a device's parts, and
    of what it is a part of, count, too.

    :param uuid: of the domain that is to have the files; empty for none.
    :param claims: the identity of what was opened or located at each path; None for whatever is there.
    :raises InUseError: when one is.
    :raises BackingError: when one cannot be read, or is not the one with that identity: who owns the folder can
        exchange names.
    """
    for path, identity in claims.items():
        try:
            files = _files_and_parts(backings, path, identity)
        except BackingError:
            if identity is not None:
                check_marks(ledger, backings, uuid, {path: None})  # the mark of what is there says more
            raise
        for file in files:
            mark = None if file.owner is None else owner_marks.unpack(path, file.owner)
            if mark is not None and mark.uuid == uuid:
                continue
            if mark is not None:
                _check_mark(ledger, backings, mark, path, file)
            _check_frozen(ledger, path, file)


def find_own_marks(ledger: Ledger, backings: Sequence[Backing], domain: DomainSpec) -> dict[str, Mark]:
    """Return, by path, the marks by which files are the domain's, and which the ledger does not know.

    It was lost, or comes from a backup, and knows an earlier state of the NVDIMM.
    """
    record = None if domain.uuid is None else ledger.find_domain(domain.uuid)
    items = record.allocations if record else ()
    known = {item.spec.path for item in items} | (_frozen(record) if record else set())
    found = {}
    for path in (spec.path for spec in domain.nvdimms):
        had = next((each.identity for each in items if each.spec.path == path), None)
        for file in _files_of(backings, path, had):
            mark = readable_mark(file)
            item = next((each for each in items if has_bytes([each], file.identity)), None)
            if mark is None or mark.uuid != domain.uuid or mark.is_copied(file.identity):
                continue
            if later_mark(record, item, file) if record and item else path not in known:
                found[path] = mark
    return found


def later_mark(record: Record, item: Allocation, file: Surveyed) -> Mark | None:
    """Return the mark of an NVDIMM's own file if it says something else than the ledger, and is later.

    While the ledger has a start, a frozen file's mark is of its time, and nothing is later.
    """
    mark = readable_mark(file)
    if mark is None or (file.frozen and record.start is not None) or not has_bytes([item], file.identity):
        return None
    is_its = mark.uuid == record.uuid and mark.is_original(file.identity) and mark.is_later(item)
    return mark if is_its and not owner_marks.is_current(file.owner, record, item) else None


def check_own_marks(ledger: Ledger, backings: Sequence[Backing], domain: DomainSpec) -> None:
    """Check that the domain wants what is its own by :func:`find_own_marks` in that slot, and with the same sizes.

    A define would write over the mark.

    :raises InUseError: when it wants it otherwise.
    """
    marks = find_own_marks(ledger, backings, domain)
    for spec in domain.nvdimms:
        had = marks[spec.path].spec if spec.path in marks else None
        if had and _appearance(had) != _appearance(spec):
            raise InUseError(
                f"{spec.path}: by its mark, it is the domain's NVDIMM in slot {had.own_slot}, of {human(had.size)} "
                f"({human(had.visible_size)} for data, label area {human(had.label_size)}), and the ledger does not "
                "know that",
                hint=f"write it into the ledger first: {repair_of(spec.path)}",
            )


def _appearance(spec: NvdimmSpec) -> tuple[int, ...]:
    """Return what a guest knows an NVDIMM by, apart from its base."""
    return spec.own_slot, spec.size, spec.visible_size, spec.label_size


def _check_frozen(ledger: Ledger, path: str, file: Surveyed) -> None:
    """Check that the ledger knows for which guest a file is frozen.

    :raises InUseError: when it does not.
    """
    if file.frozen and not any(file.path in _frozen(record) for record in ledger.claimants(file.path)):
        raise InUseError(f"{path} is immutable for a guest that the ledger does not know", hint="see 'nvdimmctl check'")


def _files(backings: Sequence[Backing], path: str, identity: BackingIdentity | None = None) -> list[Surveyed]:
    """Return the file at a path as its backing sees it; nothing when there is none that a domain could have.

    :param identity: that it has to have; None for whatever is there.
    :raises BackingError: when it cannot be read, or has another identity.
    """
    if identity is not None:
        return [*filter(None, [backing_named(backings, identity.kind).inspect(path, identity)])]
    return [*filter(None, (backing.inspect(path) for backing in backings if backing.handles(path)))]


def _files_and_parts(backings: Sequence[Backing], path: str, identity: BackingIdentity | None = None) -> list[Surveyed]:
    """Do what :func:`_files` does; add other devices with a mark that a device there shares bytes with."""
    files = _files(backings, path, identity)
    return [*files, *(part for file in files for part in _parts(backings, path, identity or file.identity))]


def _parts(backings: Sequence[Backing], path: str, identity: BackingIdentity | None) -> Iterable[Surveyed]:
    if identity is None or identity.inode:
        return ()
    return backing_named(backings, identity.kind).inspect_parts(path, identity)


def _files_of(backings: Sequence[Backing], path: str, identity: BackingIdentity | None) -> list[Surveyed]:
    """Do what :func:`_files` does, with or without that identity: a lease on a file that has it is waited for."""
    if identity is not None:
        with suppress(BackingError):
            return _files(backings, path, identity)
    return _files(backings, path)


def _files_left(backings: Sequence[Backing], path: str) -> list[Surveyed]:
    """Do what :func:`_files` does; nothing is left at a path that has become a symbolic link in one of its parts."""
    with suppress(TurnedError):
        return _files(backings, path)
    return []


def moved_back(path: str) -> str:
    """Return how a file is moved back to its path by hand, so that what is there now is not overwritten."""
    if not exists(path):
        return f"move it back to {path}"
    return (
        f"first move what is at {path} now to a free name in its folder, from which 'nvdimmctl check --repair' moves "
        f"it to where it belongs; then move this one back to {path}"
    )


def _check_mark(ledger: Ledger, backings: Sequence[Backing], mark: Mark, path: str, file: Surveyed) -> None:
    """Check that the NVDIMM that a file's mark names is another file with that mark, and the marked one a copy of it.

    What was provisioned for a domain is no copy, though the domain has another file in its place now: it was moved.

    :param path: of the file, as it was given.
    :param file: what is there.
    :raises InUseError: when it is not.
    """
    record = ledger.find_domain(mark.uuid)
    items = [item for item in (record.allocations if record else ()) if item.spec.slot == mark.spec.slot]
    if record and any(item.spec.path == file.path for item in items):
        raise _owned(path, record, file.identity)
    moved = bool(items) and mark.is_original(file.identity)
    if not moved and any(is_marked_for(backings, item.spec.path, mark.uuid, mark.spec.slot) for item in items):
        return
    if record and file.is_device and has_bytes(items, file.identity):
        raise _owned(path, record, file.identity)  # by its name of now, or a part of it
    is_part = file.is_device and file.identity != identity_at(backings, path)
    what = f"a part of {path}, or what it is a part of," if is_part else path
    if moved and has_bytes(items, file.identity):
        raise InUseError(
            f"{path} has the mark of domain {mark.name} ({mark.uuid}), and is its {items[0].spec.path}",
            hint=f"{moved_back(items[0].spec.path)}; if whole file systems are mounted in each other's places, mount "
            "each where it was",
        )
    if moved:
        hint = f"it has {items[0].spec.path} in its place; to let it have both: {repair_of(path)}"
    elif mark.is_copied(file.identity):
        hint = (
            "it is a copy of that domain's file; if it is to be another's, take the mark from it: "
            + owner_marks.unmark_command(path)
        )
    else:
        hint = (
            f"if it is a device, or a pool has the file, write it into the ledger: {repair_of(path)}; if that domain "
            f"is gone for good, then free it: {release_of(mark.uuid, mark.spec.slot)}; in a pool with wipe_on_release, "
            "that overwrites it: copy it elsewhere first, if its bytes are needed"
        )
    raise InUseError(
        f"{what} has the mark of domain {mark.name} ({mark.uuid}), and the ledger does not know that", hint=hint
    )


def find_anothers_mark(
    ledger: Ledger, backings: Sequence[Backing], uuid: str, path: str, identity: BackingIdentity | None = None
) -> Mark | None:
    """Return the mark by which what is at a path is another domain's, as :func:`anothers_mark` does.

    :param identity: that the file has to have; None for whatever is there.
    :raises BackingError: when it cannot be read, or has another identity.
    """
    marks = (anothers_mark(ledger, backings, uuid, file) for file in _files_and_parts(backings, path, identity))
    return next(filter(None, marks), None)


def anothers_mark(ledger: Ledger, backings: Sequence[Backing], uuid: str, file: Surveyed) -> Mark | None:
    """Return the mark by which a file is another domain's than that one; None for a copy of what that one has.

    The ledger may be older than the mark: it came from a backup.
    """
    mark = readable_mark(file)
    if mark is not None and mark.uuid != uuid:
        try:
            _check_mark(ledger, backings, mark, file.path, file)
        except InUseError:
            return mark
    return None


def is_frozen_for_another(backings: Sequence[Backing], uuid: str, path: str) -> bool:
    """Return True when a file is frozen for another domain than that one: it keeps the mark of that time while it is.

    The ledger may not know it: it came from a backup.
    """
    for file in _files_left(backings, path):
        mark = readable_mark(file)
        if file.frozen and mark and mark.uuid != uuid and not mark.is_copied(file.identity):
            return True
    return False


def readable_mark(file: Surveyed) -> Mark | None:
    """Return the mark of a file; None without one that can be read."""
    with suppress(LedgerError):  # it cannot be read: 'nvdimmctl check' removes it
        return None if file.owner is None else owner_marks.unpack(file.path, file.owner)
    return None


def _frozen(record: Record) -> set[str]:
    return set(record.start.paths) if record.start else set()


def check_off(record: Record, hint: str = "shut it down first") -> None:
    """Check that a domain is neither running nor starting.

    :raises InUseError: when it is, with that hint.
    """
    start = record.start
    if start is None:
        return
    if start.domid is None:
        raise InUseError(
            f"domain {record.name} is running or starting: its start was prepared {seconds_since_boot() - start.since} "
            "s ago, and its guest has not come yet",
            hint=f"{hint}; if the start has failed, start it again, or wait: it is over after {ABANDONED_SECONDS} s",
        )
    raise InUseError(f"domain {record.name} is running or starting", hint=hint)


def _others(
    ledger: Ledger, uuid: str, items: Sequence[Allocation], path: str, identity: BackingIdentity | None
) -> list[Record]:
    found = [record for record in ledger.claimants(path, identity) if record.uuid != uuid]
    if has_bytes([item for item in items if item.spec.path == path], identity):
        return [record for record in found if has_bytes(record.allocations, identity)]
    return [record for record in found if _has(record, path, identity)]


def _has(record: Record, path: str, identity: BackingIdentity | None) -> bool:
    """Return True when a domain's claims are to what is at a resolved path: by its bytes, or by its name."""
    names = {item.spec.path for item in (*record.allocations, *record.intents)}
    return has_bytes(record.allocations, identity) or path in names or path in _frozen(record)


def has_bytes(items: Sequence[Allocation], identity: BackingIdentity | None) -> bool:
    """Return True when one of the NVDIMMs was provisioned with bytes of that identity."""
    return identity is not None and any(item.identity and item.identity.shares_bytes(identity) for item in items)


def _owned(path: str, record: Record, identity: BackingIdentity | None = None) -> InUseError:
    return InUseError(
        f"{path} belongs to domain {record.name} ({record.uuid})", hint=_way_to_free(path, record, identity)
    )


def _way_to_free(path: str, record: Record, identity: BackingIdentity | None) -> str:
    """Return the hint how a domain gives up what it has at a path, and nothing else of it."""
    item = find_item(record, path, identity)
    if item is not None:
        release = release_of(record.uuid, item.spec.slot)
        return (
            f"if that domain is gone for good, free the path: {release}; that keeps the data, unless the pool has "
            "wipe_on_release"
        )
    if any(each.spec.path == path for each in record.intents):
        return f"a define wants it; if none is under way, end the one that was interrupted: {repair_of(path)}"
    return "shut that domain down first: its guest has it, and its definition has not any more"


def find_item(record: Record, path: str, identity: BackingIdentity | None) -> Allocation | None:
    """Return the domain's NVDIMM that was provisioned with what is at a path, or else the one with that path."""
    by_bytes = [item for item in record.allocations if has_bytes([item], identity)]
    by_path = [item for item in record.allocations if item.spec.path == path]
    return next(iter([*by_bytes, *by_path]), None)


def mark(ledger: Ledger, backings: Sequence[Backing], record: Record) -> None:
    """Record the owner on those of a domain's backings that have another record, or were left mutable when frozen.

    What is another domain's by its mark stays so, and 'nvdimmctl check' tells whose it is. So does a mark that is later
    than the ledger, which came from a backup then.
    """
    for item in record.allocations:
        path, text = item.spec.path, owner_marks.pack(record, item)
        if not has_bytes([item], identity_at(backings, path)):  # one that is not defined any more may be missing
            continue
        if anothers := find_anothers_mark(ledger, backings, record.uuid, path, item.identity):
            LOG.warning("%s has the mark of domain %s (%s), and keeps it", path, anothers.name, anothers.uuid)
            continue
        files = _files(backings, path, item.identity if is_device(item) else None)
        if any(
            (own := readable_mark(file)) and own.is_original(file.identity) and own.is_later(item) for file in files
        ):
            LOG.warning("%s keeps its mark, which is later than the ledger: see 'nvdimmctl check'", path)
            continue
        if is_device(item) and ledger.is_from_elsewhere() and all(file.owner is None for file in files):
            continue  # it had none, and nobody has compared yet what the ledger says of it
        if not files or any(file.owner != text or (file.frozen and not file.immutable) for file in files):
            backing_of(backings, path).mark(path, text, item.identity)
        if any(file.frozen and file.owner != text for file in files) and ledger.was_given_back(record.uuid, path):
            backing_of(backings, path).note_given(path, item.changed)
        unmark_parts(backings, record, item)


def mark_if_possible(ledger: Ledger, backings: Sequence[Backing], uuid: str) -> None:
    """Do what :func:`mark` does for a domain, after a change of the ledger: leave what cannot be marked to a repair."""
    record = ledger.find_domain(uuid)
    if record is not None:
        try:
            mark(ledger, backings, record)
        except (BackingError, LedgerError) as error:
            LOG.warning("marks of domain %s are left to 'nvdimmctl check --repair': %s", record.name, error)


def is_device(item: Allocation) -> bool:
    """Return True for an NVDIMM in a device, whose mark is not on itself."""
    return item.identity is not None and not item.identity.inode


def unmark_parts(backings: Sequence[Backing], record: Record, item: Allocation) -> None:
    """Remove a domain's marks on parts of what it has, or on what that is a part of, unless they are later.

    They are of a partition that was made larger or smaller since.
    """
    own = {each.identity for each in record.allocations}
    for part in _parts(backings, item.spec.path, item.identity):
        mark = readable_mark(part)
        is_own = mark is not None and mark.uuid == record.uuid and mark.changed <= record.changed
        if is_own and part.identity and part.identity not in own:
            backing_named(backings, part.identity.kind).mark(part.path, None, part.identity)


def times_of_marks(backings: Sequence[Backing], uuid: str, items: Sequence[Allocation]) -> dict[str, int]:
    """Return the times of the last change in a domain's own marks on these, by path.

    A mark on a part of a device counts, too, as one that was made larger has it, unless that part is one of these.
    """
    found, own = {}, {item.identity for item in items}
    for path in (item.spec.path for item in items):
        files = _files_left(backings, path)
        parts = [part for file in files for part in _parts(backings, path, file.identity) if part.identity not in own]
        marks = [readable_mark(file) for file in (*files, *parts)]
        found[path] = max((each.changed for each in marks if each and each.uuid == uuid), default=0)
    return found


def unmark_dropped(
    ledger: Ledger, backings: Sequence[Backing], record: Record | None, kept: Sequence[Allocation]
) -> None:
    """Remove the owner's record from those backings of a domain that it will not have any more.

    This comes before the ledger is written, for the reason that :func:`drop` gives.
    """
    paths = {item.spec.path for item in kept}
    dropped = [item for item in (record.allocations if record else ()) if item.spec.path not in paths]
    _unmark(ledger, backings, dropped, record.uuid if record else "")


def unknown_marks(ledger: Ledger, backings: Sequence[Backing], domain: DomainSpec) -> list[tuple[str, str]]:
    """Return path and mark of each file that is the domain's by a mark which the ledger does not know.

    A define or a start writes over it, or removes it from what the domain is to have no more: if that fails, it is put
    back.
    """
    record = None if domain.uuid is None else ledger.find_domain(domain.uuid)
    items = record.allocations if record else ()
    late = [
        item.spec.path
        for item in items
        for file in _files_left(backings, item.spec.path)
        if record and later_mark(record, item, file)
    ]
    paths = dict.fromkeys([*find_own_marks(ledger, backings, domain), *late])
    files = [file for path in paths for file in _files(backings, path)]
    return [(file.path, file.owner.decode()) for file in files if file.owner is not None]


def record_of_marks(backings: Sequence[Backing], uuid: str, marked: Iterable[tuple[str, str]]) -> Record | None:
    """Return a domain as the marks of its files say, as the ledger had it; None without marks.

    :param marked: path and mark of each file, as :func:`unknown_marks` returns them.
    """
    marks = [owner_marks.unpack(path, text.encode()) for path, text in marked]
    found = [(mark, identity_at(backings, mark.spec.path)) for mark in marks]
    items = [
        Allocation(uuid, mark.spec, identity, mark.base, changed=mark.changed)
        for mark, identity in found
        if not mark.is_copied(identity)  # who owns the folder may have exchanged the names since
    ]
    if not marks:
        return None
    last = max(marks, key=lambda mark: mark.changed)
    return Record(uuid, last.name, last.ram, last.dsm, "", tuple(items), None, changed=last.changed, cache=last.cache)


def frozen_files(backings: Sequence[Backing], identities: Mapping[str, BackingIdentity | None]) -> dict[str, Surveyed]:
    """Return the files that are frozen for a guest, by path.

    :param identities: by path, whose bytes the file has to have; None for whatever is there. Another file system that
        is mounted there may have a file of that name.
    """
    return {
        path: file
        for path, identity in identities.items()
        for file in _files_left(backings, path)
        if file.frozen and (identity is None or (file.identity is not None and file.identity.shares_bytes(identity)))
    }


def is_given_up(ledger: Ledger, backings: Sequence[Backing], uuid: str, path: str) -> bool:
    """Return True when a file of a domain's start has its mark, and the domain has given it up, and nobody has it.

    The ledger may come from a backup, and the domain have the file again since. Then the mark is later, or, if it was
    frozen all the time, what its folder tells (:meth:`.plugins.Backing.given_at`).
    """
    given_up = ledger.given_up_at(uuid, path)
    marks = [readable_mark(file) for file in _files_left(backings, path)]
    times = [mark.changed for mark in marks if mark and mark.uuid == uuid]
    if not given_up or not any(each <= given_up for each in times):
        return False
    if backing_of(backings, path).given_at(path) > given_up:
        return False
    return _is_nobodys(ledger, backings, Allocation(uuid, NvdimmSpec(0, path, PAGE)))


def is_marked_for(backings: Sequence[Backing], path: str, uuid: str, slot: int | None = None) -> bool:
    """Return True when a file or device has the mark of a domain's NVDIMM.

    :param slot: of the NVDIMM; None for any.
    """
    marks = [readable_mark(file) for file in _files_left(backings, path)]
    return any(each and each.uuid == uuid and slot in (None, each.spec.slot) for each in marks)


def drop(
    ledger: Ledger,
    backings: Sequence[Backing],
    record: Record,
    items: Sequence[Allocation],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Give up a domain's claims to some of its NVDIMMs, whether it runs or not.

    The marks go first. If this process is killed before the ledger is written, the domain has its backings still, and
    'check --repair' marks them again. In the other order, it would give the domain what it has given up.

    :param check: called in the ledger's transaction; raises what speaks against it.
    """
    try:
        _unmark(ledger, backings, items, record.uuid)
    except BackingError:
        mark_if_possible(ledger, backings, record.uuid)  # those before it
        raise
    kept = [item for item in record.allocations if item not in items]
    if kept:
        ledger.store(
            *(record.uuid, record.name, record.ram, kept),
            dsm=record.dsm,
            cache=record.cache,
            hot_slots=record.hot_slots,
            kind="forgotten",
            check=check,
        )
    else:
        ledger.give_up(record.uuid, kind="forgotten", check=check)


def give_up(
    ledger: Ledger, backings: Sequence[Backing], record: Record, items: Sequence[Allocation] | None = None
) -> None:
    """Give up a domain's claims to some of its NVDIMMs; to all of them for None.

    :raises InUseError: while it runs, also if only a frozen file shows that, or its start begins just now.
    """

    def check_still_off() -> None:
        now = ledger.find_domain(record.uuid)
        if now is not None:
            check_off(now)

    check_off(record)
    items = record.allocations if items is None else items
    for path in [item.spec.path for item in items]:
        for file in _files_left(backings, path):
            _check_frozen(ledger, path, file)
    try:
        drop(ledger, backings, record, items, check_still_off)
    except InUseError:
        mark(ledger, backings, record)  # a file that is frozen by now gets it at the end of its start
        raise


def _unmark(ledger: Ledger, backings: Sequence[Backing], items: Sequence[Allocation], uuid: str = "") -> None:
    """Remove the owner's record from backings that no domain has, by any name; another owner's stays.

    :param uuid: of a domain that does not count.
    """
    for item in items:
        if not _is_nobodys(ledger, backings, item, uuid):
            continue
        if item.identity and is_device(item):  # a boot may have given it another name
            backing_named(backings, item.identity.kind).mark(item.spec.path, None, item.identity)
            if record := ledger.find_domain(item.uuid):
                unmark_parts(backings, record, item)
            continue
        for backing in backings:
            if backing.handles(item.spec.path):
                backing.mark(item.spec.path, None, item.identity)


def _is_nobodys(ledger: Ledger, backings: Sequence[Backing], item: Allocation, uuid: str = "") -> bool:
    """Return True when no domain, but for that uuid's, has what is at an NVDIMM's path, by the ledger or by its mark.

    False for what is not the NVDIMM's own.
    """
    path, identity = item.spec.path, identity_at(backings, item.spec.path)
    if is_device(item) and not has_bytes([item], identity) and item.identity:  # a boot has given it another name
        if not backing_named(backings, item.identity.kind).find(item.identity):
            return False  # it is lost, and keeps its mark: should it come back, its bytes are those of the domain still
        others = owners_of_bytes(ledger, Record(item.uuid, "", 0, None, "", (), None), item.identity)
        owner = readable_mark(Surveyed(path, ledger.device_marks.owner(item.identity), False, True))
        return not any(each.uuid != uuid for each in others) and (owner is None or owner.uuid == item.uuid)
    records = [each for each in ledger.claimants(path, identity) if each.uuid != uuid]
    replaced = item.identity is not None and identity is not None and not has_bytes([item], identity)
    owned = any(has_bytes(each.allocations, identity) if identity else _has(each, path, None) for each in records)
    if replaced or owned:
        return False
    try:
        marks = [readable_mark(file) for file in _files(backings, path, identity and item.identity)]
    except TurnedError:
        return False  # what had the mark is not there
    return not any(each and each.uuid != item.uuid for each in marks)
