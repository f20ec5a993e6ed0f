# SPDX-License-Identifier: Apache-2.0
"""Find inconsistencies between the ledger, the backings, their marks, and Xen; and repair them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from nvdimm_driver.backing.identity import describe_differences
from nvdimm_driver.backing.paths import HINTS, resolve
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError, LedgerError, NvdimmError
from nvdimm_driver.model import Allocation, BackingIdentity, Record, Surveyed
from nvdimm_driver.plugins import Backing, backing_named, backing_of
from nvdimm_driver.sizes import human
from nvdimm_driver.state import owner_marks, ownership
from nvdimm_driver.state.owner_marks import Mark
from nvdimm_driver.state.words import word_for

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inconsistency:
    """An inconsistency, and its repair.

    :ivar domain: name of the domain; empty when none is known.
    :ivar path: path of the backing; empty when it concerns none.
    :ivar remedy: what the repair does or, when there is none, what the operator can do.
    :ivar mend: repairs it; None when it cannot be repaired.
    """

    domain: str
    path: str
    problem: str
    remedy: str
    mend: Callable[[], object] | None = field(default=None, compare=False)


def look(driver: XenNvdimmDriver) -> list[Inconsistency]:
    """Find all inconsistencies; nothing is changed.

    Two of them may be the same file: one that was moved, and one that the ledger does not know. Repair them in the
    order of the list, then look again.
    """
    return list(_Look(driver).findings())


def _find_device(record: Record) -> str:
    """Return the remedy for a device that is gone or another: its bytes exist, and no other domain may get them."""
    return (
        "enable or rename its device, or correct the options of its backing; or give it up: nvdimmctl release "
        + word_for(record.name, record.uuid)
    )


_WHICH = "find the guest's own, and take the mark from each copy: setfattr -x trusted.nvdimm_driver.owner COPY"


def _several(paths: list[str]) -> str:
    return f"{' and '.join(paths)} have the same mark"


def _set_mark(backing: Backing, path: str, text: bytes | None, identity: BackingIdentity | None) -> None:
    """Write a file's mark, or remove it for None.

    :raises InUseError: when the file keeps the mark that it has, as one does that is immutable for a guest.
    """
    backing.mark(path, text, identity)
    found = backing.inspect(path)
    if found is not None and found.owner != text:
        why = "immutable for a guest" if found.frozen else "another file by now"
        raise InUseError(f"{path} is {why}, and keeps its mark", hint="shut that guest down first, or try again")


class _Look:
    def __init__(self, driver: XenNvdimmDriver) -> None:
        self.driver = driver
        self.records = driver.ledger.domains()
        self.seen = {record.uuid: record for record in self.records}
        self.owners = {item.spec.path: (record, item) for record in self.records for item in record.allocations}
        self.files: dict[str, Surveyed] = {}
        self.unseen: list[Inconsistency] = []
        for pool in driver.pools:
            try:
                backing = self._named(pool.kind)
                for path in pool.paths:
                    backing.check_home(resolve(path))
                self.files |= {file.path: file for file in backing.survey(pool.paths)}
            except NvdimmError as error:
                self.unseen.append(Inconsistency("", "", f"pool {pool.name}: {error.message}", error.hint))

    def findings(self) -> Iterator[Inconsistency]:
        yield from self.unseen
        for record in self.driver.starts.find_stale():
            if record.start:
                problem = f"its start as domid {record.start.domid} is over, but was not cleaned up"
                put_away = partial(self.driver.starts.put_away, record.start, kind="put-away")
                yield Inconsistency(record.name, "", problem, "clean it up", put_away)
        starts = self.driver.starts
        for record, domid in starts.find_moved():
            problem = f"its guest runs with domid {domid}, and the ledger has an earlier start: it is from a backup"
            take_up = partial(self._take_up_moved, record, domid)
            yield Inconsistency(record.name, "", problem, "write the start into the ledger", take_up)
        for record in starts.find_unserved():
            yield Inconsistency(record.name, "", "its label server is gone", "start another", starts.serve_labels)
        for record in starts.find_unheld():
            problem = "nothing holds its backings: they can be unmounted and overwritten while the guest runs"
            yield Inconsistency(record.name, "", problem, "hold them again", starts.hold_again)
        for record in self.records:
            for item in record.allocations:
                yield from _guarded(record.name, item.spec.path, self._allocation(record, item))
            yield from self._intents(record)
        for file in self.files.values():
            owner = self.owners.get(file.path)
            yield from _guarded(owner[0].name if owner else "", file.path, self._file(file))

    # --- NVDIMMs in the ledger ---

    def _intents(self, record: Record) -> Iterator[Inconsistency]:
        """Yield what a define that was killed has left behind; one that is under way leaves nothing."""
        if record.intents and not self.driver.locks.is_changing(record.uuid):
            give_up = partial(self.driver.definitions.give_up_intents, record.uuid)
            for item in record.intents:
                yield Inconsistency(
                    record.name,
                    item.spec.path,
                    f"a define that was interrupted wants it ({item.written}% of it is written), and no other domain "
                    "can have its path",
                    "give that up: the domain keeps what it had before; or define the domain again",
                    give_up,
                )

    def _allocation(self, record: Record, item: Allocation) -> Iterator[Inconsistency]:
        if not item.ready:
            yield _unfinished(record, item)
            return
        path = item.spec.path
        inconsistency = partial(Inconsistency, record.name, path)
        backing = self._named(item.identity.kind if item.identity else "")
        if not backing.exists(path):
            backing.check_home(path, item.identity)
            yield self._gone(record, item)
            return
        if mark := ownership.find_anothers_mark(self.driver.ledger, self.driver.backings, record.uuid, path):
            yield self._anothers(record, item, mark)
            return
        if (lacking := backing.lacking(item.spec)) and self._is_still(item):
            problem = f"it is {human(lacking)} too short: the missing bytes are lost"
            yield inconsistency(problem, "replace them with zeros", self._change(record, self._complete, backing, item))
            return
        if backing.is_shared(item.spec):
            yield _shared(record, item, backing)
            return
        found = backing.locate(item.spec).identity
        if found != item.identity:
            problem = f"it is not the backing that was provisioned: {describe_differences(found, item.identity)}"
            if found.inode == 0:
                yield inconsistency(problem, _find_device(record))
            elif not _on_same_volume(found, item.identity):
                yield inconsistency(problem, "mount the file system that had it there")
            else:
                yield inconsistency(problem, "take it as it is now", self._change(record, self._adopt, backing, item))
            return
        if misplaced := self.driver.planner.find_misplaced_labels(item.spec):
            yield inconsistency(misplaced, "give it another slot: <address type='dimm' slot='…'/> in the domain's XML")
        file = self.files.get(path)
        if file is not None and not file.frozen and not owner_marks.is_current(file.owner, record, item):
            problem = "it has no mark" if file.owner is None else "its mark is wrong or out of date"
            yield inconsistency(problem, "write its mark", self._change(record, self._write_mark, backing, item))

    def _is_still(self, item: Allocation) -> bool:
        """Return True when what is at an NVDIMM's path is its backing, by its bytes or by its mark, whatever its size.

        A file that has no bytes any more can only be known by its mark.
        """
        found = ownership.identity_at(self.driver.backings, item.spec.path)
        if found is not None:
            return item.identity is not None and item.identity.shares_bytes(found)
        file = self.files.get(item.spec.path)
        mark = self._mark(file) if file else None
        return mark is not None and (mark.uuid, mark.spec.slot) == (item.uuid, item.spec.slot)

    def _named(self, kind: str) -> Backing:
        return backing_named(self.driver.backings, kind)

    def _gone(self, record: Record, item: Allocation) -> Inconsistency:
        inconsistency = partial(Inconsistency, record.name, item.spec.path)
        marked = self._marked(record.uuid, item.spec.slot)
        if len(marked) == 1:
            backing = self._named(item.identity.kind if item.identity else "")
            move = partial(backing.move, marked[0], item.spec.path)
            return inconsistency(f"it is not there; it was moved to {marked[0]}", "move it back", move)
        if marked:
            return inconsistency(f"it is not there; {_several(marked)}", _WHICH)
        if item.identity is not None and item.identity.inode == 0:
            return inconsistency("it is not there", _find_device(record))
        return inconsistency(
            "it is not there",
            "give up its contents: the next define makes a new backing, of zeros; restore a backup first, if any",
            self._change(
                record, self._give_up_contents, self._named(item.identity.kind if item.identity else ""), item
            ),
        )

    def _anothers(self, record: Record, item: Allocation, mark: Mark) -> Inconsistency:
        """Return a file that the ledger says is a domain's, and that another one was given since: it has the mark."""
        path = item.spec.path
        problem = (
            f"its mark says that it is domain {mark.name}'s ({mark.uuid}): {record.name} has given it up since the "
            "ledger's backup was made, or it was put in the place of another file"
        )
        if record.start is not None:
            return Inconsistency(record.name, path, problem, f"shut domain {record.name} down first")
        if path not in self.files:
            word = word_for(record.name, record.uuid)
            return Inconsistency(record.name, path, problem, f"nvdimmctl release {word}: the file keeps its mark")
        remedy = f"give up the claim of {record.name}, and write that of {mark.name} into the ledger"
        return Inconsistency(record.name, path, problem, remedy, self._change(record, self._give_up, item))

    # --- changes of the ledger ---

    def _change(self, record: Record, change: Callable[..., None], *arguments: object) -> Callable[[], None]:
        """Return the repair that changes what a domain has: nobody else changes it meanwhile, or has since it was seen.

        :param change: is called with the domain as it is then, and the arguments.
        """

        def mend() -> None:
            with self.driver.locks.changing(record.uuid):
                now = self.driver.ledger.find_domain(record.uuid)
                if not _is_as_seen(now, self.seen.get(record.uuid)):
                    raise InUseError(f"domain {record.name} was changed meanwhile", hint="repeat 'nvdimmctl check'")
                change(now or record, *arguments)
                after = self.driver.ledger.find_domain(record.uuid)
                self.seen.pop(record.uuid, None)
                if after is not None:
                    self.seen[record.uuid] = after

        return mend

    def _write_mark(self, record: Record, backing: Backing, item: Allocation) -> None:
        self._check_mark(record, item)
        _set_mark(backing, item.spec.path, owner_marks.pack(record, item), item.identity)

    def _complete(self, record: Record, backing: Backing, item: Allocation) -> None:
        self._check_mark(record, item)
        backing.extend(item.spec)
        self._adopt(record, backing, item)

    def _adopt(self, record: Record, backing: Backing, item: Allocation) -> None:
        """Take a backing as it is: provision it, check that no other domain has it, store it in the ledger, mark it."""
        self._check_mark(record, item)
        identity = backing.provision(item.spec)
        ownership.check_bytes(self.driver.ledger, record.uuid, {item.spec.path: identity})
        changed = replace(item, identity=identity)
        self._store(record, [*_without(record, item), changed])
        backing.mark(item.spec.path, owner_marks.pack(record, changed), identity)

    def _give_up_contents(self, record: Record, backing: Backing, item: Allocation) -> None:
        """Let an NVDIMM have no backing: it is not provisioned any more."""
        if backing.exists(item.spec.path):
            raise InUseError(f"{item.spec.path} is there again", hint="repeat 'nvdimmctl check'")
        self._store(record, [*_without(record, item), replace(item, identity=None, written=0)])

    def _give_up(self, record: Record, item: Allocation) -> None:
        """Give up a claim to what is another domain's, whose mark stays."""
        ownership.check_off(record)
        if kept := _without(record, item):
            self._store(record, kept)
        else:
            self.driver.ledger.give_up(record.uuid, kind="forgotten")

    def _check_mark(self, record: Record, item: Allocation) -> None:
        """Check that a file is not another domain's by its mark.

        :raises InUseError: when it is.
        """
        path = item.spec.path
        if mark := ownership.find_anothers_mark(self.driver.ledger, self.driver.backings, record.uuid, path):
            raise InUseError(f"{path} has the mark of domain {mark.name} ({mark.uuid})", hint="see 'nvdimmctl check'")

    def _store(self, record: Record, items: Sequence[Allocation]) -> None:
        """Store what a domain has instead of what is in its record."""

        def check() -> None:
            if not _is_as_seen(self.driver.ledger.find_domain(record.uuid), record):
                raise InUseError(f"domain {record.name} was changed by another process meanwhile", hint="try again")

        self.driver.ledger.store(record.uuid, record.name, record.ram, items, dsm=record.dsm, check=check)

    # --- files in the pools ---

    def _file(self, file: Surveyed) -> Iterator[Inconsistency]:
        owner = self.owners.get(file.path)
        if file.error is not None:
            problem = file.error.message.removeprefix(f"{file.path}: ")
            yield Inconsistency(owner[0].name if owner else "", file.path, problem, file.error.hint)
            return
        mark = self._mark(file)
        users = self._users(file)
        if file.frozen and not users:
            yield self._frozen(file, owner[0] if owner else None, mark)
        for user in users:
            if user.start and self.driver.starts.is_running(user.start) and not file.immutable:
                freeze = partial(self._freeze, file)
                yield Inconsistency(
                    user.name, file.path, "a guest has it, and it is not immutable", "make it so", freeze
                )
        if owner is None and file.owner is not None:
            yield from self._unknown(file, mark)

    def _users(self, file: Surveyed) -> list[Record]:
        """Return the domains whose starts have a file."""
        started = [each for each in self.records if each.start]
        if not started or (file.immutable and not file.frozen):
            return []
        identity = ownership.identity_at(self.driver.backings, file.path)
        return [each for each in started if ownership.runs_with(each, file.path, identity)]

    def _freeze(self, file: Surveyed) -> None:
        """Freeze a guest's file; thaw it again if the guest has ended meanwhile, and its start is put away."""
        backing_of(self.driver.backings, file.path).freeze(file.path, file.identity)
        self.driver.starts.thaw(file.path, file.identity)

    @cached_property
    def _guests(self) -> list[tuple[int, str | None]]:
        """Domid and uuid of Xen's guests; this asks Xen for each possible domid."""
        return self.driver.starts.mapper.guests()

    def _frozen(self, file: Surveyed, owner: Record | None, mark: Mark | None) -> Inconsistency:
        name = owner.name if owner else mark.name if mark else ""
        inconsistency = partial(Inconsistency, name, file.path, "it is immutable, but no known start needs that")
        for domid, uuid in self._guests:
            if owner is not None and mark is not None and owner.uuid == mark.uuid == uuid:
                take_up = partial(self._take_up, owner, domid, self._frozen_of(mark.uuid))
                return inconsistency(f"write into the ledger that the guest with domid {domid} has it", take_up)
            if mark is None or uuid in (None, mark.uuid):
                return inconsistency(f"shut down the guest with domid {domid} first: it may own the file")
        return inconsistency("make it mutable", partial(self.driver.starts.thaw, file.path, file.identity))

    def _take_up_moved(self, record: Record, domid: int) -> None:
        """Write into the ledger that a guest has the domain's frozen files, and the devices of its earlier start."""
        devices = {path for path in (record.start.paths if record.start else ()) if path not in self.files}
        self._take_up(record, domid, self._frozen_of(record.uuid) | devices)

    def _take_up(self, record: Record, domid: int, paths: Collection[str]) -> None:
        """Write into the ledger that a guest has these paths; what is repaired after that has seen it."""
        self.driver.take_up_running(record, domid, paths)
        now = self.driver.ledger.find_domain(record.uuid)
        if now is not None and record.uuid in self.seen:
            self.seen[record.uuid] = replace(self.seen[record.uuid], start=now.start)

    def _frozen_of(self, uuid: str) -> set[str]:
        """Return the frozen files that have the mark of a domain."""
        marks = {file.path: self._mark(file) for file in self.files.values() if file.frozen}
        return {path for path, mark in marks.items() if mark and mark.uuid == uuid}

    @cached_property
    def _marks(self) -> dict[tuple[str, int], list[tuple[Surveyed, Mark]]]:
        """The files that are no NVDIMM of the ledger and have a mark, by the uuid and slot in it."""
        found: dict[tuple[str, int], list[tuple[Surveyed, Mark]]] = {}
        for file in self.files.values():
            if file.path not in self.owners and (mark := self._mark(file)):
                found.setdefault((mark.uuid, mark.spec.slot), []).append((file, mark))
        return found

    def _marked(self, uuid: str, slot: int) -> list[str]:
        """Return the files of which one is a domain's NVDIMM, by their marks; the others with its mark are copies.

        A mark of an earlier version does not say on which file it was written.
        """
        found = self._marks.get((uuid, slot), [])
        sure = [file.path for file, mark in found if file.frozen or mark.is_original(file.identity)]
        maybe = [file.path for file, mark in found if not mark.is_copied(file.identity)]
        return sure or maybe or [file.path for file, _ in found]

    def _unknown(self, file: Surveyed, mark: Mark | None) -> Iterator[Inconsistency]:
        backing = backing_of(self.driver.backings, file.path)
        unmark = partial(self._unmark, backing, file)
        if mark is None:
            yield Inconsistency("", file.path, "its mark cannot be read", "remove the mark", unmark)
            return
        known = next((each for each in self.records if each.uuid == mark.uuid), None)
        slots = {item.spec.slot: item for item in known.allocations} if known else {}
        inconsistency = partial(Inconsistency, mark.name, file.path)
        if mark.spec.slot in slots:
            kept = slots[mark.spec.slot].spec.path
            if self._is_still(slots[mark.spec.slot]):  # else it was moved, or is behind another file system
                problem = f"its mark says slot {mark.spec.slot}, but that is {kept}"
                if self.driver.pools.wipes(file.path) and mark.is_original(file.identity):
                    yield inconsistency(f"{problem}: the domain's file was moved", _find_moved(mark, kept))
                else:
                    yield inconsistency(problem, "remove the mark", unmark)
            return
        marked = self._marked(mark.uuid, mark.spec.slot)
        if file.path not in marked:
            yield inconsistency(f"it has the mark of {marked[0]}, and is a copy", "remove the mark", unmark)
            return
        if len(marked) > 1:
            yield inconsistency(_several(marked), _WHICH)
            return
        record = known or Record(mark.uuid, mark.name, mark.ram, mark.dsm, "", (), None)
        item = Allocation(mark.uuid, mark.spec, base=mark.base)
        problem = f"its mark says slot {mark.spec.slot} of {mark.name} ({mark.uuid}), which the ledger does not know"
        yield inconsistency(problem, "write it into the ledger", self._change(record, self._adopt, backing, item))

    def _unmark(self, backing: Backing, file: Surveyed) -> None:
        """Remove the mark of a file that no domain has.

        :raises InUseError: when a domain has it now, or it has another mark.
        """
        ownership.check_free(self.driver.ledger, file.path, file.identity)
        now = backing.inspect(file.path)
        if now is None or now.owner != file.owner:
            raise InUseError(f"{file.path} was changed meanwhile", hint="repeat 'nvdimmctl check'")
        _set_mark(backing, file.path, None, file.identity)

    def _mark(self, file: Surveyed) -> Mark | None:
        if file.owner is None:
            return None
        try:
            return owner_marks.unpack(file.path, file.owner)
        except LedgerError as error:
            LOG.warning("%s", error)
            return None


def _is_as_seen(now: Record | None, seen: Record | None) -> bool:
    """Return True when a domain has what it had when it was seen; other repairs may have ended its start since."""
    if now is None or seen is None:
        return now is None and (seen is None or not seen.allocations)
    claims = now.allocations == seen.allocations and now.intents in ((), seen.intents)
    return claims and now.start in (None, seen.start)


def _without(record: Record, item: Allocation) -> list[Allocation]:
    """Return the domain's NVDIMMs but for the one in an NVDIMM's slot."""
    return [each for each in record.allocations if each.spec.slot != item.spec.slot]


def _find_moved(mark: Mark, kept: str) -> str:
    """Return the remedy for a domain's file that was moved, and is to be overwritten before others may have it."""
    word = word_for(mark.name, mark.uuid)
    return (
        f"delete it; or let the domain have it again: 'nvdimmctl release {word} --slot {mark.spec.slot}' gives up "
        f"{kept}, and 'nvdimmctl check --repair' then writes this one into the ledger"
    )


def _shared(record: Record, item: Allocation, backing: Backing) -> Inconsistency:
    """Return a file that shares blocks with another: XFS lets a reflink be made of an immutable file, too."""
    inconsistency = partial(Inconsistency, record.name, item.spec.path, "it shares blocks with another file (reflink)")
    if record.start is not None:
        return inconsistency("delete that file, whose reader sees what the guest writes")
    return inconsistency("copy what is shared", partial(backing.unshare, item.spec, item.identity))


def _guarded(name: str, path: str, found: Iterator[Inconsistency]) -> Iterator[Inconsistency]:
    """Yield what is found of one NVDIMM or file; if that cannot be found out, yield why: others are not its concern."""
    try:
        yield from found
    except NvdimmError as error:
        problem = error.message.removeprefix(f"{path}: ")
        yield Inconsistency(name, path, problem, error.hint or "find out what has changed it")
    except OSError as error:
        yield Inconsistency(name, path, error.strerror or str(error), HINTS.get(error.errno or 0, ""))


def _on_same_volume(found: BackingIdentity, expected: BackingIdentity | None) -> bool:
    """Return True when two files are on one file system, as far as an identity shows that."""
    return expected is not None and (found.device, found.start) == (expected.device, expected.start)


def _unfinished(record: Record, item: Allocation) -> Inconsistency:
    """Return an NVDIMM that is not provisioned: a define is running or was interrupted, or its backing is gone."""
    word = word_for(record.name, record.uuid)
    return Inconsistency(
        record.name,
        item.spec.path,
        f"it is not provisioned ({item.written}% of it is written), and no other domain can have its path",
        f"unless a define is running, define the domain again, or run: nvdimmctl release {word}",
    )
