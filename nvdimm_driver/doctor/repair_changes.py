# SPDX-License-Identifier: Apache-2.0
"""Change what domains have, to repair it: nobody else changes a domain meanwhile, or has since it was seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError
from nvdimm_driver.lifecycle import slots
from nvdimm_driver.model import Allocation, BackingIdentity, DomainSpec, Record, Surveyed
from nvdimm_driver.plugins import Backing, backing_of, exists
from nvdimm_driver.state import owner_marks, ownership
from nvdimm_driver.state.owner_marks import Mark


@dataclass(frozen=True)
class LaterMark:
    """The file of an NVDIMM, and its mark, which is later than the ledger."""

    backing: Backing
    file: Surveyed
    mark: Mark

    def is_whole(self) -> bool:
        """Return True unless bytes that the mark tells of are not there."""
        spec = replace(self.mark.spec, path=self.file.path)
        return not (self.backing.lacking(spec) or self.backing.examine(spec).writes)


class Changes:
    """The changes that repair one look's findings.

    A file or device that a domain is to have gets the argument ``found``: the identity of what the look has found.
    Nothing is done with anything else that has its path by then.

    :param records: the domains as the look has seen them.
    :param files: the files in the pools, by path.
    """

    def __init__(self, driver: XenNvdimmDriver, records: Iterable[Record], files: Mapping[str, Surveyed]) -> None:
        self.driver = driver
        self.files = files
        self.seen = {record.uuid: record for record in records}

    def of(self, record: Record, change: Callable[..., None], *arguments: object) -> Callable[[], None]:
        """Return the repair that changes what a domain has.

        :param change: is called with the domain as it is then, and the arguments.
        """

        def mend() -> None:
            with self.driver.locks.changing(record.uuid), self.driver.locks.storing(record.uuid):
                now = self._find_as_seen(record)
                change(now or replace(record, allocations=(), intents=(), start=None), *arguments)
                self._see(record.uuid)

        return mend

    def of_intents(
        self, record: Record, change: Callable[[], object], is_current: Callable[[], bool] = lambda: True
    ) -> Callable[[], None]:
        """Return the repair that ends a define that was killed, unless it has ended since.

        :param change: takes the lock for what the ledger says the domain has, with which nobody asks libvirt.
        :param is_current: asks libvirt, and returns True while its definition is the one that was seen.
        """

        def mend() -> None:
            with self.driver.locks.changing(record.uuid):
                now = self._find_as_seen(record)
                if not is_current():
                    raise _changed(record)
                if now is not None and now.intents:
                    change()
                self._see(record.uuid)

        return mend

    def _find_as_seen(self, record: Record) -> Record | None:
        """Return a domain as the ledger has it now.

        :raises InUseError: when it was changed since it was seen.
        """
        now = self.driver.ledger.find_domain(record.uuid)
        if not _is_as_seen(now, self.seen.get(record.uuid)):
            raise _changed(record)
        return now

    def _see(self, uuid: str) -> None:
        """Take a domain as it is after a repair for what the other repairs may go by."""
        self.seen.pop(uuid, None)
        now = self.driver.ledger.find_domain(uuid)
        if now is not None:
            self.seen[uuid] = now

    # --- of one NVDIMM ---

    def write_mark(self, record: Record, backing: Backing, item: Allocation) -> None:
        """Mark a file or device as the domain's; of a device, libvirt's definitions may say otherwise."""
        self._check_whose(record, backing, item, item.identity)
        if ownership.is_device(item):
            self.driver.checks.unknown.check(record.uuid, {item.spec.path: item.identity})
        _set_mark(backing, item.spec.path, owner_marks.pack(record, item), item.identity)

    def complete(self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None) -> None:
        """Write zeros for the bytes that a file has lost, after recording that they are lost."""
        ownership.check_off(record)
        self._check_can_write(record, backing, item, found)
        self._tell_lost(item, backing.lacking(item.spec))
        backing.extend(item.spec, found)
        self.fill(record, backing, item, found)

    def fill(self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None) -> None:
        """Take a file as it is; parts that are not allocated, or not written, become the zeros as which they read."""
        ownership.check_off(record)
        self._check_can_write(record, backing, item, found)
        backing.fill_holes(item.spec, found)
        self._unshare(record, backing, item, found)
        writes = backing.examine(item.spec).writes
        self.adopt(record, backing, item, found)
        if item.ready:
            self.driver.ledger.record_event("backing-replaced", record.uuid, {"path": item.spec.path, "zeros": writes})

    def adopt(self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None) -> None:
        """Take a backing as it is: provision it, check that no other domain has it, store it in the ledger, mark it."""
        changed = self._provision(record, backing, item, found)
        items = slots.spread([*map(self._as_marked_later, _without(record, item)), changed])
        self._store(record, items, [item.spec.path])
        for each in items:
            if each.spec.path == item.spec.path:
                self._mark(record, backing, each)

    def take_marks(self, record: Record, later: Sequence[LaterMark]) -> None:
        """Give a domain all its NVDIMMs that have later marks than the ledger as these say, in one transaction.

        Of two NVDIMMs for one slot, or with addresses in common, the later one has them: the other is set aside, and
        the next start chooses a base for it. A repair of one does it for all.
        """
        had = {item.spec.path: item for item in record.allocations}
        taken: list[Allocation] = []
        for each in sorted(later, key=lambda each: -each.mark.changed):
            path = each.file.path
            if each.mark.is_later(had[path]):
                spec, changed = replace(each.mark.spec, path=path), each.mark.changed
                marked = replace(had[path], spec=spec, base=each.mark.base, changed=changed)
                taken.append(self._provision(record, each.backing, slots.fitted(marked, taken), each.file.identity))
        if not taken:
            return
        paths = {item.spec.path for item in taken}
        items = slots.combined([*taken, *(item for item in record.allocations if item.spec.path not in paths)])
        last = max((each.mark for each in later), key=lambda mark: mark.changed)
        if last.changed > record.changed:
            record = replace(record, name=last.name, ram=last.ram, dsm=last.dsm, cache=last.cache)
        self._store(record, items, paths)
        now = self.driver.ledger.find_domain(record.uuid)
        for each in later:
            for item in now.allocations if now else ():
                if item.spec.path == each.file.path:
                    self._mark(record, each.backing, item)

    def adopt_instead(
        self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None, own: Allocation
    ) -> None:
        """Do what :meth:`adopt` does with what another NVDIMM of the domain was, which the domain then gives up."""
        ownership.check_off(record)
        rest = replace(record, allocations=tuple(_without(record, own)))
        changed = self._provision(rest, backing, item, found)
        self._store(record, [*_without(rest, item), changed], [item.spec.path])
        self._mark(record, backing, changed)

    def adopt_another(self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None) -> None:
        """Do what :meth:`adopt` does, with what is in the place of an NVDIMM's backing; the bytes of that are lost."""
        ownership.check_off(record)
        self.adopt(record, backing, item, found)
        self.driver.ledger.record_event("backing-replaced", record.uuid, {"path": item.spec.path})

    def _tell_lost(self, item: Allocation, count: int) -> None:
        """Record that the last bytes of an NVDIMM are lost, before zeros can take their place.

        :param count: how many.
        """
        first = hex(item.spec.size - count)
        self.driver.ledger.record_event(
            "bytes-lost", item.uuid, {"path": item.spec.path, "bytes": count, "first": first}
        )
        if item.identity is not None:
            self.driver.spoil_runs(item.identity)

    def adopt_beside(
        self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None, has_slot: bool
    ) -> None:
        """Do what :meth:`adopt` does, for an NVDIMM whose slot the ledger has another in: the domain keeps both.

        :param has_slot: the other one is set aside, and not this one.
        """
        changed = self._provision(record, backing, item, found)
        first, kept = ([changed], record.allocations) if has_slot else (record.allocations, [changed])
        items = [*first, *slots.set_aside(kept, [each.spec.slot for each in first])]
        self._store(record, sorted(items, key=lambda each: each.spec.slot), [item.spec.path])
        for each in items:
            if each.spec.path == item.spec.path:
                self._mark(record, backing, each)

    def move_back(self, record: Record, backing: Backing, source: str, item: Allocation) -> None:
        """Move a file to the place that the ledger has it at."""
        ownership.check_off(record)
        if item not in record.allocations:
            raise InUseError(f"{item.spec.path} has changed meanwhile", hint="repeat 'nvdimmctl check'")
        backing.move(source, item.spec.path, item.identity)

    def unshare(self, record: Record, backing: Backing, item: Allocation) -> None:
        """Copy the blocks that a file shares with another."""
        self._unshare(record, backing, item, item.identity)

    def trust(self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None) -> None:
        """Take the bytes of a file for the domain's to which a guest may have written that does not have it."""
        self._check_whose(record, backing, item, found)
        self._unshare(record, backing, item, found)
        backing.trust(item.spec.path, found)

    def give_up_contents(self, record: Record, backing: Backing, item: Allocation) -> None:
        """Let an NVDIMM have no backing: it is not provisioned any more."""
        if backing.exists(item.spec.path):
            raise InUseError(f"{item.spec.path} is there again", hint="repeat 'nvdimmctl check'")
        self._tell_lost(item, item.spec.size)
        self._store(record, [*_without(record, item), replace(item, identity=None, written=0)], [item.spec.path])

    def forget_base(self, record: Record, item: Allocation) -> None:
        """Forget at which base an NVDIMM is: the next start chooses another."""
        ownership.check_off(record)
        without = replace(item, base=None)
        self._store(record, [*_without(record, item), without], [item.spec.path])
        if item.identity is not None:
            self._mark(record, backing_of(self.driver.backings, item.spec.path), without)

    def give_up(self, record: Record, item: Allocation) -> None:
        """Give up a claim to what is another domain's, whose mark stays, to a part of what it has, or to nothing."""
        ownership.check_off(record)
        kept = _without(record, item)
        if ownership.is_device(item) and not any(each.identity == item.identity for each in kept):
            ownership.unmark_dropped(self.driver.ledger, self.driver.backings, record, kept)
        if kept:
            self._store(record, kept)
        else:
            self.driver.ledger.give_up(record.uuid, kind="forgotten")

    def _provision(
        self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None
    ) -> Allocation:
        """Provision what the look has found; return the NVDIMM with the identity of that.

        Nothing is made: who has moved the file meanwhile still has its bytes.

        :raises InUseError: when something else is there, or nothing; when it is another NVDIMM of the domain, or
            another domain's by its mark; while the domain runs without it.
        """
        self._check_can_write(record, backing, item, found)
        file = backing.inspect(item.spec.path)
        if file is None or not file.frozen:  # else it is for the guest, by its mark
            ownership.check_off(record)
        self._mark_moved(record, item)
        self._unshare(record, backing, item, found)
        return self.driver.pools.noted(replace(item, identity=backing.provision(item.spec, identity=found)))

    def _mark(self, record: Record, backing: Backing, item: Allocation) -> None:
        """Mark what was provisioned and stored, unless it has got the mark of another domain since.

        A frozen file keeps its mark.

        :raises InUseError: when it has, or something else is there.
        """
        self._check_whose(record, backing, item, item.identity)
        now = self.driver.ledger.find_domain(record.uuid)
        for stored in now.allocations if now else ():
            if now and stored == item:
                backing.mark(item.spec.path, owner_marks.pack(record, stored), item.identity)
                ownership.unmark_parts(self.driver.backings, now, stored)

    def _mark_moved(self, record: Record, item: Allocation) -> None:
        """Mark what an NVDIMM was provisioned with, if that is at another path: it stays the domain's.

        A mark of a version before 0.2.0 does not say on which file it was written. It would be taken for a copy's.
        """
        ledger, backings = self.driver.ledger, self.driver.backings
        for path in [file.path for file in self.files.values() if ownership.has_bytes([item], file.identity)]:
            backing = backing_of(backings, path)
            now = None if path == item.spec.path else backing.inspect(path)
            if now is None or not ownership.has_bytes([item], now.identity):
                continue
            if not ownership.anothers_mark(ledger, backings, record.uuid, now):
                _set_mark(backing, path, owner_marks.pack(record, item), item.identity)

    def _unshare(self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None) -> None:
        """Copy what a file that is to be the domain's shares with another, such as the backup that it is a copy of."""
        if backing.is_shared(item.spec):
            ownership.check_off(record)
            self._check_can_write(record, backing, item, found)
            self.driver.checks.check_no_guests_blocks(record.uuid, item.spec.path)
            backing.unshare(item.spec, found)

    def _check_can_write(
        self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None
    ) -> None:
        """Do what :meth:`_check_whose` does, and check that blocks that the file can get are no guest's."""
        self._check_whose(record, backing, item, found)
        self.driver.checks.check_room(item.spec.path, item.spec.size)

    def _check_whose(self, record: Record, backing: Backing, item: Allocation, found: BackingIdentity | None) -> None:
        """Check that what is there is what was found, and not another domain's by its mark, nor another NVDIMM's.

        The mark is read from the file that has the identity, whatever the path leads to before and after.

        :raises InUseError: when it is.
        :raises BackingError: when somebody else has made it immutable: it could not get its mark.
        """
        path, file = item.spec.path, backing.inspect(item.spec.path)
        here = (file and file.identity) or ownership.identity_at(self.driver.backings, path)
        if found is None or not found.is_same(here):
            raise InUseError(
                f"{path} was changed meanwhile: it is another file, or gone", hint="repeat 'nvdimmctl check'"
            )
        if own := ownership.find_own(record, item, here):
            raise InUseError(f"{path} is the domain's NVDIMM in slot {own.spec.slot}", hint="see 'nvdimmctl check'")
        known = self.driver.ledger, self.driver.backings, record.uuid
        mark = ownership.anothers_mark(*known, file) if file else None
        if found.inode == 0 and mark is None:  # that of a part of a device, or of what it is a part of
            mark = ownership.find_anothers_mark(*known, path, found)
        if mark:
            raise InUseError(f"{path} has the mark of domain {mark.name} ({mark.uuid})", hint="see 'nvdimmctl check'")
        backing.check_can_freeze(path, found)

    def _store(self, record: Record, items: Sequence[Allocation], taken: Collection[str] = ()) -> None:
        """Store what a domain has instead of what is in its record.

        :param taken: paths of what was taken from marks, or as it is: it is later than its mark from now on.
        :raises InUseError: when the domain was changed meanwhile, or another domain has bytes that are new to it.
        """
        new = {each.spec.path: each.identity for each in items if each.identity and each not in record.allocations}

        def check() -> None:
            ownership.check_bytes(self.driver.ledger, record.uuid, new)
            if not _is_as_seen(self.driver.ledger.find_domain(record.uuid), record):
                raise InUseError(f"domain {record.name} was changed by another process meanwhile", hint="try again")

        marked = ownership.times_of_marks(
            self.driver.backings, record.uuid, [each for each in items if each.spec.path in taken]
        )
        self.driver.ledger.store(
            *(record.uuid, record.name, record.ram, items),
            intents=[each.spec for each in record.intents],  # which another repair finishes
            dsm=record.dsm,
            cache=record.cache,
            hot_slots=record.hot_slots,
            check=check,
            marked=marked,
        )

    # --- of a define that was killed ---

    def move_to_define(self, record: Record, moved: Mapping[str, str]) -> None:
        """Move files to where a define wants them, unless they are there; a repair of one does it for all.

        :param moved: where each is to be, by its path of now.
        """
        ownership.check_off(record)
        for source, target in moved.items():
            if exists(source):
                backing_of(self.driver.backings, source).move(source, target, self.files[source].identity)

    def finish_define(self, domain: DomainSpec, new: Collection[str]) -> None:
        """Define a domain as libvirt has defined it already; what it has besides stays its own.

        :param new: paths of files that this may make.
        :raises NvdimmError: when that fails; what the define wants stays in the ledger, for the next look.
        """
        plan = self.driver.check(domain, repairs=True)
        for spec, intake in zip(plan.domain.nvdimms, plan.intakes, strict=True):
            if intake.creates and spec.path not in new:
                raise InUseError(f"{spec.path} is gone", hint="repeat 'nvdimmctl check'")
        try:
            self.driver.create(domain, plan)
        except BaseException:
            self.driver.ledger.begin_define(plan.domain, lambda: None)
            raise

    # --- of devices ---

    def follow_names(self, names: Mapping[tuple[str, int], str]) -> None:
        """Give devices that have each other's names the ones of now. A repair of one does it for all of these.

        :param names: as :func:`exchanged_with` returns them.
        :raises InUseError: when one of the domains runs, or they have other names by now.
        """
        uuids = sorted({uuid for uuid, _ in names})

        def check() -> None:
            found = exchanged_names(self.driver.backings, self.driver.ledger.domains())
            for record in filter(None, map(self.driver.ledger.find_domain, uuids)):
                ownership.check_off(record)
            if not names.items() <= found.items():
                raise InUseError("devices have other names by now", hint="repeat 'nvdimmctl check'")

        with ExitStack() as locks:
            for uuid in uuids:
                locks.enter_context(self.driver.locks.changing(uuid))
                locks.enter_context(self.driver.locks.storing(uuid))
            left = exchanged_names(self.driver.backings, self.driver.ledger.domains())
            if not names.keys().isdisjoint(left):
                self.driver.ledger.rename_devices(names, check)
            for uuid in uuids:
                self._see(uuid)

    # --- of starts, and of files that no domain has ---

    def take_up(self, record: Record, domid: int, paths: Collection[str]) -> None:
        """Write into the ledger that a guest has these paths; what is repaired after that has seen it.

        A repair of one of the paths does it for all.
        """
        now = self.driver.ledger.find_domain(record.uuid)
        wanted = {item.spec.path for item in record.allocations} & {*paths}
        if self.driver.has_taken_up(now, domid, wanted):
            return
        items = now.allocations if now else record.allocations  # another repair may have taken later marks since
        placed = replace(record, allocations=tuple(self._as_marked(item) for item in items))
        self.driver.take_up_running(placed, domid, paths)
        now = self.driver.ledger.find_domain(record.uuid)
        if now is not None and record.uuid in self.seen:
            self.seen[record.uuid] = replace(self.seen[record.uuid], start=now.start)

    def _as_marked(self, item: Allocation) -> Allocation:
        """Return an NVDIMM as a guest has it: at the base in the mark, which its file keeps while it is frozen.

        The ledger may say another base: it came from a backup, or the domain was defined again since the start.
        """
        mark = self._mark_for_guest(item)
        return replace(item, base=mark.base) if mark else item

    def _as_marked_later(self, item: Allocation) -> Allocation:
        """Return an NVDIMM at the base at which a guest has it, unless it was defined again since."""
        mark = self._mark_for_guest(item)
        return replace(item, base=mark.base) if mark and mark.is_later(item) else item

    def _mark_for_guest(self, item: Allocation) -> Mark | None:
        """Return the mark of an NVDIMM's own file if that is frozen for a guest."""
        file = self.files.get(item.spec.path)
        mark = ownership.readable_mark(file) if file and file.frozen else None
        if file is None or mark is None or mark.is_copied(file.identity):
            return None
        is_its = (mark.uuid, mark.spec.own_slot) == (item.uuid, item.spec.own_slot)
        return mark if is_its else None

    def unmark(self, backing: Backing, file: Surveyed) -> None:
        """Remove the mark of a file that no domain has, or of a part of a device.

        :raises InUseError: when a domain has it now, or it has another mark.
        """
        ownership.check_free(self.driver.ledger, file.path, file.identity)
        now = backing.inspect(file.path, file.identity if file.is_device else None)
        if now is None or now.owner != file.owner:
            raise InUseError(f"{file.path} was changed meanwhile", hint="repeat 'nvdimmctl check'")
        _set_mark(backing, file.path, None, file.identity)


def _set_mark(backing: Backing, path: str, text: bytes | None, identity: BackingIdentity | None) -> None:
    """Write a file's mark, or remove it for None.

    :raises InUseError: when the file keeps the mark that it has, as one does that is immutable for a guest.
    """
    backing.mark(path, text, identity)
    found = backing.inspect(path, None if identity is None or identity.inode else identity)
    if found is not None and found.owner != text:
        why = "immutable for a guest" if found.frozen else "another file by now"
        raise InUseError(f"{path} is {why}, and keeps its mark", hint="shut that guest down first, or try again")


def exchanged_names(backings: Sequence[Backing], records: Iterable[Record]) -> dict[tuple[str, int], str]:
    """Return, by uuid and slot, the names of now of devices that have each other's names in the ledger.

    The kernel gives the names as it finds the devices, so a boot can exchange them. One that has a new name of its own
    is not among them, nor those of one domain that only have each other's names: a start takes a domain's own for what
    its definition means.
    """
    devices = [item for each in records for item in each.allocations if item.identity and not item.identity.inode]
    paths = {ownership.identity_at(backings, item.spec.path): item.spec.path for item in devices}
    names = {
        item: path
        for item in devices
        if item.identity and (path := paths.get(item.identity)) not in (None, item.spec.path)
    }
    while True:
        leaving = {item.spec.path for item in names}
        closed = {item: path for item, path in names.items() if path in leaving}
        if closed == names:
            break
        names = closed
    by_path = {item.spec.path: item for item in names}
    return {
        (item.uuid, item.spec.slot): path
        for item, path in names.items()
        if any(each.uuid != item.uuid for each in _cycle(item, names, by_path))
    }


def exchanged_with(
    item: Allocation, names: Mapping[tuple[str, int], str], items: Iterable[Allocation]
) -> dict[tuple[str, int], str]:
    """Return those of the :func:`exchanged_names` that are exchanged with a device's.

    :param items: the NVDIMMs of all domains.
    """
    renamed = {each: names[each.uuid, each.spec.slot] for each in items if (each.uuid, each.spec.slot) in names}
    by_path = {each.spec.path: each for each in renamed}
    return {(each.uuid, each.spec.slot): renamed[each] for each in _cycle(item, renamed, by_path)}


def _cycle(
    item: Allocation, names: Mapping[Allocation, str], by_path: Mapping[str, Allocation]
) -> Iterator[Allocation]:
    """Yield the devices that have each other's names, from one of them on."""
    seen: list[Allocation] = []
    while item not in seen:
        seen.append(item)
        yield item
        item = by_path[names[item]]


def _is_as_seen(now: Record | None, seen: Record | None) -> bool:
    """Return True when a domain has what it had when it was seen; other repairs may have ended its start since."""
    if now is None or seen is None:
        return now is None and (seen is None or not seen.allocations)
    claims = now.allocations == seen.allocations and now.intents in ((), seen.intents)
    return claims and now.start in (None, seen.start)


def _changed(record: Record) -> InUseError:
    return InUseError(f"domain {record.name} was changed meanwhile", hint="repeat 'nvdimmctl check'")


def _without(record: Record, item: Allocation) -> list[Allocation]:
    """Return the domain's NVDIMMs but for the one in an NVDIMM's slot."""
    return [each for each in record.allocations if each.spec.slot != item.spec.slot]
