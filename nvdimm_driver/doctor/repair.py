# SPDX-License-Identifier: Apache-2.0
"""Find inconsistencies between the ledger, the backings, their marks, and Xen; and repair them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from nvdimm_driver.backing.identity import describe_differences
from nvdimm_driver.backing.paths import HINTS, resolve, same_file_system
from nvdimm_driver.doctor.repair_changes import Changes, LaterMark, exchanged_names, exchanged_with
from nvdimm_driver.doctor.repair_files import UnfitFiles, go_on, on_same_volume
from nvdimm_driver.doctor.repair_marks import Marks
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import ConfigError, NvdimmError, XenError
from nvdimm_driver.lifecycle import slots
from nvdimm_driver.model import Allocation, BackingIdentity, DomainSpec, Record, Start, Surveyed
from nvdimm_driver.plugins import Backing, backing_named, backing_of, exists
from nvdimm_driver.shell import command, repair_of
from nvdimm_driver.sizes import human
from nvdimm_driver.state import condition, owner_marks, ownership
from nvdimm_driver.state.condition import Condition
from nvdimm_driver.state.owner_marks import Mark
from nvdimm_driver.state.words import release_of

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inconsistency:
    """An inconsistency, and its repair.

    :ivar domain: name of the domain; empty when none is known.
    :ivar uuid: of the domain; empty when none is known. Another domain can have the same name.
    :ivar path: path of the backing; empty when it concerns none.
    :ivar remedy: what the repair does or, when there is none, what the operator can do.
    :ivar mend: repairs it; None when it cannot be repaired.
    :ivar of_guest: True when a running guest lacks something that the ledger says it has: the ledger is right.
    """

    domain: str
    uuid: str
    path: str
    problem: str
    remedy: str
    mend: Callable[[], object] | None = field(default=None, compare=False)
    of_guest: bool = field(default=False, compare=False)


DefinitionOf = Callable[[str], DomainSpec | None]
"""Returns the domain of a uuid as libvirt's definition has it; None when that has no NVDIMMs, or there is none.

It raises ConfigError when libvirt cannot be asked."""


def nobody_to_ask(uuid: str) -> DomainSpec | None:
    """Be a :data:`DefinitionOf` without a libvirt."""
    raise ConfigError(f"there is no libvirt to ask for domain {uuid}")


def look(
    driver: XenNvdimmDriver,
    definition_of: DefinitionOf = nobody_to_ask,
    zeros: Collection[str] = (),
    named: Collection[str] = (),
) -> list[Inconsistency]:
    """Find all inconsistencies; nothing is changed.

    :param zeros: paths of files whose lost bytes the operator wants to be replaced with zeros.
    :param named: paths of which the operator wants what nobody else can decide: see :meth:`_Look._exchanged`.

    Two of them may be the same file: one that was moved, and one that the ledger does not know. Repair them in the
    order of the list, then look again.
    """
    return list(_Look(driver, definition_of, zeros, named).findings())


def _find_device(record: Record, item: Allocation, now: str) -> str:
    """Return the remedy for a device that is gone or another: its bytes exist, and no other domain may get them.

    :param now: where they are, if that is known.
    """
    if now:
        return f"its bytes are on {now}: enable it there, or define the domain with that"
    return (
        "enable its device; if that has another name now ('nvdimmctl host'), define the domain with that; or correct "
        "the options of its backing; or, if it is lost for good, give it up: "
        + release_of(record.uuid, item.spec.slot, "--lost ")
    )


def remedy_of_name(driver: XenNvdimmDriver, name: str, uuid: str, path: str) -> str:
    """Return how a domain is defined with the name that its device has now, as the ledger has it."""
    edit = f"define {name} with {path}: {command('virsh', 'edit', uuid)}"
    if not driver.definitions.is_saved(name):
        return edit
    discard = command("virsh", "managedsave-remove", uuid)
    return (
        f"leave it, as its guest is saved: it can go on after a boot that gives the name back, and another 'nvdimmctl "
        f"check --repair'; or give its guest up, {discard}, and {edit}"
    )


_TAKE = "take it as it is now; if that is not what the guest should have, put the right file there first"
_WHICH = f"find the guest's own, and take the mark from each copy: {owner_marks.unmark_command('COPY')}"


def _several(paths: list[str]) -> str:
    return f"{' and '.join(paths)} have the same mark"


class _Look:
    def __init__(
        self, driver: XenNvdimmDriver, definition_of: DefinitionOf, zeros: Collection[str], named: Collection[str]
    ) -> None:
        self.driver = driver
        self.named = named
        self.definition_of = definition_of
        self.records = driver.ledger.domains()
        self.running = ownership.Running(self.records)
        self.owners = {item.spec.path: (record, item) for record in self.records for item in record.allocations}
        self.files: dict[str, Surveyed] = {}
        self.changes = Changes(driver, self.records, self.files)
        self.exchanged = exchanged_names(driver.backings, self.records)
        self.unfit = UnfitFiles(self.changes, zeros)
        self.unseen: list[Inconsistency] = []
        for pool in driver.pools:
            device = ""
            try:
                backing = self._named(pool.kind)
                of_devices = type(backing).mark is Backing.mark  # which keep no mark on themselves
                if of_devices:  # one that is away keeps none of the others from being seen
                    self.files |= {file.path: file for file in backing.survey(pool.paths)}
                for path in pool.paths:
                    device = path if of_devices else ""
                    backing.check_home(resolve(path))
                if not of_devices:
                    self.files |= {file.path: file for file in backing.survey(pool.paths)}
            except NvdimmError as error:
                self.unseen.append(Inconsistency("", "", device, f"pool {pool.name}: {error.message}", error.hint))
        self._see_devices()
        self.marks = Marks(self.files.values(), self.owners)

    def _see_devices(self) -> None:
        """Look at the devices in no pool that a domain has, or the operator has named."""
        devices = [item.spec.path for each in self.records for item in each.allocations if ownership.is_device(item)]
        for path in {*devices, *self.named}.difference(self.files):
            with suppress(NvdimmError):  # of what a domain has, the finding is there
                file = backing_of(self.driver.backings, path).inspect(path)
                if file and file.is_device:
                    self.files[path] = file
        for file in [*self.files.values()]:
            with suppress(NvdimmError):
                self.files[file.path] = self._as_before(file)

    def _as_before(self, file: Surveyed) -> Surveyed:
        """Return what was surveyed; a device that was made larger has the mark of what it was, unless it has an owner.

        Its bytes are where its guest looks for them.
        """
        here = file.identity
        if here is None or file.owner is not None or self._owner_at(file):
            return file
        for part in self._parts_of(file):
            is_its = part.identity and part.identity.begins_as(here) and here.covers(part.identity)
            if is_its and ownership.readable_mark(part):
                return replace(file, owner=part.owner)
        return file

    def _owner_at(self, file: Surveyed) -> tuple[Record, Allocation] | None:
        """Return who has a path in the ledger; None for a device that a boot has given another one's name."""
        found = self.owners.get(file.path)
        if found and file.is_device and found[1].ready and not _has_bytes(found[1], file):
            return None
        return found

    def _parts_of(self, file: Surveyed) -> list[Surveyed]:
        """Return the parts of a device, and what it is a part of, that have marks."""
        if file.identity is None or not file.is_device:
            return []
        return [*self._named(file.identity.kind).inspect_parts(file.path, file.identity)]

    def findings(self) -> Iterator[Inconsistency]:
        yield from self.unseen
        for record in self.driver.starts.find_stale():
            if record.start:
                problem = f"its start as domid {record.start.domid} is over, but was not cleaned up"
                put_away = partial(self.driver.starts.put_away, record.start, kind="put-away")
                yield Inconsistency(record.name, record.uuid, "", problem, "clean it up", put_away)
        starts = self.driver.starts
        for record, domid in starts.find_moved():
            problem = f"its guest runs with domid {domid}, and the ledger has an earlier start: it is from a backup"
            if record.start and (record.start.state, record.start.domid) == ("mapping", domid):
                problem = f"its guest runs with domid {domid}, or is starting: the ledger is from a backup"
            devices = {path for path in (record.start.paths if record.start else ()) if not self._is_file(path)}
            take_up = partial(self.changes.take_up, record, domid, self._frozen_of(record.uuid) | devices)
            yield Inconsistency(record.name, record.uuid, "", problem, "write the start into the ledger", take_up)
        yield from self._unknown_guests()
        yield from self._unattended()
        for record in self.records:
            for item in record.allocations:
                yield from _guarded(record, item.spec.path, self._allocation(record, item))
            yield from self._intents(record)
        for file in self.files.values():
            owner = self._owner_at(file)
            yield from _guarded(owner[0] if owner else None, file.path, self._file(file))

    def _unattended(self) -> Iterator[Inconsistency]:
        """Yield the running guests that lack a process of the driver's."""
        starts = self.driver.starts
        for record in starts.find_unserved():
            remedy, serve = "start another", partial(starts.serve_guest, record)
            if not record.can_be_served:
                remedy = f"shut domain {record.name} down: it was defined anew, and only its own could serve its guest"
            yield Inconsistency(
                record.name,
                record.uuid,
                "",
                "its label server is gone",
                remedy,
                serve if record.can_be_served else None,
                of_guest=True,
            )
        for record in starts.find_unheld():
            problem = "nothing holds its backings: they can be unmounted and overwritten while the guest runs"
            hold = partial(starts.hold_guest, record)
            yield Inconsistency(record.name, record.uuid, "", problem, "hold them again", hold, of_guest=True)

    def _unknown_guests(self) -> Iterator[Inconsistency]:
        try:
            for domid, uuid in self.driver.starts.find_unknown():
                yield from self._unknown_guest(domid, uuid)
        except XenError as error:
            LOG.info("guests that the ledger does not know cannot be looked for: %s", error)

    def _unknown_guest(self, domid: int, uuid: str) -> Iterator[Inconsistency]:
        """Yield a guest without a start in the ledger, unless what is found of its files says so already."""
        record = next((each for each in self.records if each.uuid == uuid), None)
        paths = [item.spec.path for item in record.allocations] if record else []
        has = {path for path in paths if domid in self.driver.checks.guests_with(path)}
        frozen = self._frozen_of(uuid)
        if frozen and has <= frozen:
            return
        problem = f"its guest runs with domid {domid} and has NVDIMMs, and the ledger has no start of it"
        if record and has:
            take_up = partial(self.changes.take_up, record, domid, has | frozen)
            yield Inconsistency(record.name, record.uuid, "", problem, "write the start into the ledger", take_up)
        elif uuid not in self.marks.uuids():
            name = record.name if record else uuid
            yield Inconsistency(
                name, uuid, "", problem, f"shut it down: xl shutdown {domid}; nobody knows which it has"
            )

    def _is_file(self, path: str) -> bool:
        """Return True for a file in a pool, which is frozen for a guest that has it."""
        file = self.files.get(path)
        return file is not None and not file.is_device

    # --- NVDIMMs in the ledger ---

    def _intents(self, record: Record) -> Iterator[Inconsistency]:
        """Yield what a define that was killed has left behind; one that is under way leaves nothing."""
        if record.intents and not self.driver.locks.is_changing(record.uuid):
            remedy, mend = self._remedy_of_intents(record)
            for item in record.intents:
                yield Inconsistency(
                    record.name,
                    record.uuid,
                    item.spec.path,
                    f"a define that was interrupted wants it ({item.written}% of it is written), and no other domain "
                    "can have its path",
                    remedy,
                    mend,
                )

    def _remedy_of_intents(self, record: Record) -> tuple[str, Callable[[], object]]:
        """Return what to do with a define that was killed, and the repair that does it.

        A define that was killed in its second half is in libvirt's definition, and the one of before is nowhere.
        """
        change = partial(self.driver.definitions.give_up_intents, record.uuid)
        keeps = "the domain keeps what it had before"
        try:
            defined = self.definition_of(record.uuid)
        except NvdimmError as error:
            LOG.info("domain %s: its definition is not known: %s", record.name, error)
            return (
                f"give that up: {keeps}; if libvirt, which cannot be asked, has the new definition already, the domain "
                "has to be defined again before it starts",
                self.changes.of_intents(record, change),
            )

        def is_current() -> bool:
            return self.definition_of(record.uuid) == defined

        give_up = self.changes.of_intents(record, change, is_current)
        paths = {resolve(spec.path) for spec in defined.nvdimms} if defined else set()
        if defined and {item.spec.path for item in record.intents} <= paths:
            finish = self.changes.of_intents(record, partial(self.changes.finish_define, defined), is_current)
            besides = "; what the domain had before stays its own, too, until it is defined again"
            return "finish it: libvirt has the new definition already" + besides * bool(record.allocations), finish
        if record.allocations:
            return f"give that up: {keeps}", give_up
        return "give that up: the domain had nothing before, and has no such definition in libvirt", give_up

    def _allocation(self, record: Record, item: Allocation) -> Iterator[Inconsistency]:
        if not item.ready:
            yield self._unfinished(record, item)
            return
        path = item.spec.path
        inconsistency = partial(Inconsistency, record.name, record.uuid, path)
        twin = ownership.find_other(record, item, item.identity)
        if twin and (item.spec.set_aside or not twin.spec.set_aside):
            yield self._twice(record, item, twin)
            return
        device = self._renamed(item)
        if device and (mark := self._find_anothers_mark(record, device.path)):
            yield self._anothers(record, item, mark, device)
            return
        backing = self._named(item.identity.kind if item.identity else "")
        if not backing.exists(path):
            moved = self._moved(item)
            if any(each.spec.path in moved and _can_become(item, each) for each in record.allocations):
                return  # the finding is at that one
            if not any(_has_bytes(item, self.files[each]) for each in moved):
                backing.check_home(path, item.identity)
            yield self._gone(record, item, moved)
            return
        here = ownership.identity_at(self.driver.backings, path)
        # else another device has the name by now
        is_own = not ownership.is_device(item) or ownership.has_bytes([item], here)
        if is_own and (mark := self._find_anothers_mark(record, path)):
            yield self._anothers(record, item, mark, self.files.get(path))
            return
        if own := ownership.find_own(record, item, here):
            yield self._in_place_of(record, item, own, backing, here)
            return
        if later := self._later_mark(record, item):
            yield inconsistency(*self._remedy_of_later_mark(record, later))
            return
        if fitted := self._in_others_place(record, item):
            yield fitted
            return
        state = condition.look(backing, item)
        found = state.identity
        problem = "it is not the backing that was provisioned"
        if found is not None:
            problem += f": {describe_differences(found, item.identity)}"
        if not state.own and (moved := self._moved(item)):
            yield inconsistency(state.problem or problem, self._displaced(record, item, moved))
            return
        if unfit := self.unfit.remedy(record, item, backing, state):
            yield inconsistency(*unfit)
            return
        if found is not None and found != item.identity:
            if name := self.exchanged.get((record.uuid, item.spec.slot)):
                yield self._exchanged(record, item, name)
            elif found.inode == 0:
                yield inconsistency(
                    problem, _find_device(record, item, backing.find(item.identity) if item.identity else "")
                )
            elif not on_same_volume(found, item.identity):
                give_up = release_of(record.uuid, item.spec.slot, "--lost ")
                yield inconsistency(
                    problem,
                    "mount the file system that had it there; or, if that is lost for good, give up what the guest "
                    f"had, and define the domain again with what is there: {give_up}",
                )
            elif record.start is not None:
                remedy = f"its guest runs; to take what is there, shut domain {record.name} down first"
                yield inconsistency(problem, remedy)
            else:
                adopt = self.changes.of(record, self.changes.adopt_another, backing, item, found)
                yield inconsistency(problem, _TAKE, adopt)
            return
        if misplaced := self.driver.planner.find_misplaced_labels(item.spec):
            yield inconsistency(misplaced, "give it another slot: <address type='dimm' slot='…'/> in the domain's XML")
        file = self.files.get(path)
        if file is not None and not file.frozen and not owner_marks.is_current(file.owner, record, item):
            problem = "it has no mark" if file.owner is None else "its mark is wrong or out of date"
            yield inconsistency(
                problem, "write its mark", self.changes.of(record, self.changes.write_mark, backing, item)
            )

    def _later_mark(self, record: Record, item: Allocation) -> LaterMark | None:
        """Return the mark of an NVDIMM's own file if it is later than the ledger, by :func:`.ownership.later_mark`."""
        file = self.files.get(item.spec.path)
        mark = ownership.later_mark(record, item, file) if file else None
        if file is None or mark is None:
            return None
        return LaterMark(backing_of(self.driver.backings, file.path), file, mark)

    def _remedy_of_later_mark(self, record: Record, later: LaterMark) -> tuple[str, str, Callable[[], object] | None]:
        """Return the problem, the remedy and the repair of a ledger that is older than a mark; lost bytes stay lost."""
        problem = "its mark is later than the ledger, which is from a backup"
        if not later.is_whole():
            problem += f"; of the {human(later.mark.spec.size)} in the mark, a part is not there"
            return problem, "restore a backup of the file; or define the domain again with what is there", None
        found = [*filter(None, (self._later_mark(record, item) for item in record.allocations if item.ready))]
        take = self.changes.of(record, self.changes.take_marks, [each for each in found if each.is_whole()])
        return problem, f"take slot, sizes and base from the mark; for all such NVDIMMs of {record.name}", take

    def _in_others_place(self, record: Record, item: Allocation) -> Inconsistency | None:
        """Return an NVDIMM with a base at which the domain has another one, which goes before it.

        What libvirt's definition has goes before what it has not, and of two others the one that was changed later.
        """
        items = [each for each in record.allocations if not each.spec.set_aside]
        if item.spec.set_aside or slots.fitted(item, [each for each in items if each is not item]) == item:
            return None
        problem = f"another NVDIMM of the domain has guest-physical addresses of it, from {item.base:#x} on"
        inconsistency = partial(Inconsistency, record.name, record.uuid, item.spec.path, problem)
        weighed = [
            each if self._is_defined_with(record.uuid, each.spec.path) else replace(each, changed=0) for each in items
        ]
        (now,) = [each for each in slots.spread(weighed) if each.spec.path == item.spec.path] or [item]
        if now.base == item.base:
            return None
        if record.start is not None:
            return inconsistency(f"shut domain {record.name} down first")
        forget = self.changes.of(record, self.changes.forget_base, item)
        return inconsistency("forget its base: the next start chooses another", forget)

    def _exchanged(self, record: Record, item: Allocation, name: str) -> Inconsistency:
        """Return a device whose name another domain's has now, while it has that of another's.

        If the ledger comes from elsewhere, the domains may have been given up and defined anew since it was written:
        then libvirt's definitions are right. Nothing but the operator's word tells.

        :param name: that it has now.
        """
        items = [each for other in self.records for each in other.allocations]
        names = exchanged_with(item, self.exchanged, items)
        with_it = [each for each in items if (each.uuid, each.spec.slot) in names]
        inconsistency = partial(Inconsistency, record.name, record.uuid, item.spec.path)
        problem = f"its device has the name {name} now, and another domain's has this one"
        follow = partial(self.changes.follow_names, names)
        if not (self.driver.ledger.is_from_elsewhere() or any(each.doubtful for each in with_it)):
            then = remedy_of_name(self.driver, record.name, record.uuid, name)
            return inconsistency(
                f"{problem}: a boot has exchanged their names",
                f"take the names of now into the ledger; then {then}",
                follow,
            )
        is_named = any(each.spec.path in self.named for each in with_it)
        releases = " and ".join(release_of(each.uuid, each.spec.slot) for each in with_it)
        return inconsistency(
            f"{problem}: a boot has exchanged their names, or the domains were given up and defined anew since the "
            "ledger, which is from a backup, was written",
            f"if the ledger is right, have it take the names of now: {repair_of(item.spec.path)}; if libvirt's "
            f"definitions are right: {releases}, without wipe_on_release in the pool's section, and then "
            "nvdimmctl check --repair",
            follow if is_named else None,
        )

    def _displaced(self, record: Record, item: Allocation, moved: list[str]) -> str:
        """Return the remedy for another file in the place of what an NVDIMM was provisioned with, which is elsewhere.

        No repair takes the other file: who has the folder of a file can rename it, and put one of his own there.
        """
        where = " and ".join(moved)
        if not same_file_system(moved[0], item.spec.path):
            return (
                f"what was provisioned is {where}: its file system is mounted in another place; mount it where it was, "
                "or define the domain with that path: the NVDIMM stays the same"
            )
        if record.start is not None:
            return f"its guest runs, and has {where}: move that back, or rename its folder back"
        return (
            f"what was provisioned is {where}: move aside what is here, and repeat this; or, if the guest is to go on "
            f"with what is here, move {where} out of the pools first"
        )

    def _twice(self, record: Record, item: Allocation, twin: Allocation) -> Inconsistency:
        """Return one of two NVDIMMs of a domain that have the same bytes in the ledger; an earlier repair did that."""
        problem = f"bytes of it are those of the NVDIMM in slot {twin.spec.slot}, {twin.spec.path}, too"
        inconsistency = partial(Inconsistency, record.name, record.uuid, item.spec.path, problem)
        if twin.spec.set_aside or not item.spec.set_aside:
            return inconsistency("define the domain without one of the two")
        if not (item.identity and twin.identity and twin.identity.covers(item.identity)):
            return inconsistency(
                f"that is only a part of it: define the domain with {item.spec.path} in place of {twin.spec.path}; or "
                "release the domain, and define it again"
            )
        give_up = self.changes.of(record, self.changes.give_up, item)
        return inconsistency(f"give up number {item.spec.slot}: the other one keeps the bytes", give_up)

    def _in_place_of(
        self, record: Record, item: Allocation, own: Allocation, backing: Backing, found: BackingIdentity | None
    ) -> Inconsistency:
        """Return an NVDIMM at whose path another one of the domain is.

        :param found: the identity of what is there.
        """
        problem = f"what is there is the domain's NVDIMM in slot {own.spec.slot}, {own.spec.path}"
        inconsistency = partial(Inconsistency, record.name, record.uuid, item.spec.path, problem)
        if own.identity is not None and own.identity.inode == 0:
            here = backing.find(item.identity) if item.identity else ""
            return inconsistency(_find_device(record, item, here))
        if moved := self._moved(item):
            return inconsistency(self._displaced(record, item, moved))
        if not _can_become(own, item):
            return inconsistency(f"have it moved back to {own.spec.path}; what belongs here is another file")
        take = self.changes.of(record, self.changes.adopt_instead, backing, item, found, own)
        return inconsistency(f"take it for this one, and give up number {own.spec.slot}", take)

    def _is_still(self, item: Allocation) -> bool:
        """Return True when what is at an NVDIMM's path is its backing, by its bytes or by its mark, whatever its size.

        A file that has no bytes any more can only be known by its mark.
        """
        found = ownership.identity_at(self.driver.backings, item.spec.path)
        if found is not None:
            return item.identity is not None and item.identity.shares_bytes(found)
        return self._has_mark_of(item)

    def _unfinished(self, record: Record, item: Allocation) -> Inconsistency:
        """Return an NVDIMM that is not provisioned: a define is running or was interrupted, or its backing is gone.

        If a file is there, the next define would take it as it is, and so does the repair.
        """
        path = item.spec.path
        problem = f"it is not provisioned ({item.written}% of it is written), and no other domain can have its path"
        inconsistency = partial(Inconsistency, record.name, record.uuid, path, problem)
        backing = None
        if record.start is None and not self.driver.locks.is_changing(record.uuid):
            backing = self._of_file(path)
        if backing is None:
            release = release_of(record.uuid, item.spec.slot)
            return inconsistency(
                "unless a define is running: restore a backup first, if any, and repeat this; a define makes a new "
                f"backing, of zeros, where nothing is; or give it up: {release}"
            )
        found = condition.look(backing, item)
        if found.condition is Condition.SHORT and (unfit := self.unfit.remedy(record, item, backing, found)):
            return Inconsistency(record.name, record.uuid, path, *unfit)
        remedy = "take the file that is there as it is, and write zeros where it reads as zeros"
        return inconsistency(remedy, self.changes.of(record, self.changes.fill, backing, item, found.identity))

    def _of_file(self, path: str) -> Backing | None:
        """Return the backing of a file that is at a path, also in no pool; None when there is none."""
        if not exists(path):
            return None
        backing = backing_of(self.driver.backings, path)
        file = self.files.get(path) or backing.inspect(path)
        return backing if file and not file.is_device else None

    def _named(self, kind: str) -> Backing:
        return backing_named(self.driver.backings, kind)

    def _gone(self, record: Record, item: Allocation, moved: list[str]) -> Inconsistency:
        """Return an NVDIMM that is not at its path.

        :param moved: where it is now.
        """
        path = item.spec.path
        inconsistency = partial(Inconsistency, record.name, record.uuid, path)
        if len(moved) > 1:
            return inconsistency(f"it is not there; {_several(moved)}", _WHICH)
        if moved and not same_file_system(moved[0], path):
            return inconsistency(
                f"it is not there; its file system is mounted in another place, and has it as {moved[0]}",
                "mount it where it was, or define the domain with that path: the NVDIMM stays the same",
            )
        if moved:
            backing = self._named(item.identity.kind if item.identity else "")
            move = self.changes.of(record, self.changes.move_back, backing, moved[0], item)
            return inconsistency(f"it is not there; it was moved to {moved[0]}", "move it back", move)
        if item.overwritten or item.deleted:
            give_up = self.changes.of(record, self.changes.give_up, item)
            return inconsistency("it is not there: a release of it was interrupted", "finish that", give_up)
        if item.identity is not None and item.identity.inode == 0:
            now = self._named(item.identity.kind).find(item.identity)
            return inconsistency("it is not there", _find_device(record, item, now))
        marked = self.marks.all_of(item.uuid, item.spec.slot)
        copies = [each for each in marked if not self._is_later(self.files[each], item)]
        has = record.start is not None and path in record.start.paths
        if copies and not has and path not in self.unfit.zeros:
            return inconsistency(
                f"it is not there; a copy of it is {' and '.join(copies)}",
                f"restore a backup, or rename the copy to {path}: the guest goes on with what it had when that was "
                f"made, and a repair takes it: {repair_of(path)}; {go_on(path)}",
            )
        return inconsistency(*self.unfit.gone(record, item, self._named(item.identity.kind if item.identity else "")))

    def _moved(self, item: Allocation) -> list[str]:
        """Return where an NVDIMM's file is that is not at its path: by its identity, or by its mark if it has no bytes.

        A file with the identity can be at another NVDIMM's path. One with the mark of that slot and another identity is
        a copy, or, if the mark was written on it, a later NVDIMM of the domain.
        """
        if ownership.is_device(item):
            return []  # no repair moves one; Backing.find knows where it is
        if here := [path for path, file in self.files.items() if file.identity and _has_bytes(item, file)]:
            return here
        marked = self.marks.files_of(item.uuid, item.spec.slot)
        return [path for path in marked if self.files[path].identity is None]

    def _is_later(self, file: Surveyed, item: Allocation) -> bool:
        """Return True when a file with the mark of an NVDIMM is another one, which the domain was given since."""
        mark = ownership.readable_mark(file)
        return mark is not None and mark.is_original(file.identity) and not _has_bytes(item, file)

    def _renamed(self, item: Allocation) -> Surveyed | None:
        """Return the device that an NVDIMM was provisioned with, if a boot has given it another name; else None."""
        named = [file for file in self.files.values() if file.is_device and file.identity == item.identity]
        if any(file.path == item.spec.path for file in named):
            return None
        return next(iter(named), None)

    def _find_anothers_mark(self, record: Record, path: str) -> Mark | None:
        return ownership.find_anothers_mark(self.driver.ledger, self.driver.backings, record.uuid, path)

    def _anothers(self, record: Record, item: Allocation, mark: Mark, file: Surveyed | None) -> Inconsistency:
        """Return what the ledger says is a domain's, and another one was given since: it has the mark.

        :param file: what has the mark.
        """
        path = item.spec.path
        problem = (
            f"its mark says that it is domain {mark.name}'s ({mark.uuid}): {record.name} has given it up since the "
            "ledger's backup was made, or it was put in the place of another file"
        )
        if record.start is not None:
            return Inconsistency(record.name, record.uuid, path, problem, f"shut domain {record.name} down first")
        had = self._find(mark.uuid, mark.spec.slot)
        if had and file and not self._is_still(had) and not self._is_later(file, had):
            problem = f"what is there is {had.spec.path} of domain {mark.name} ({mark.uuid}), by its mark"
            remedy = f"have it moved back to {had.spec.path} first"
            if item.identity and file.identity and not on_same_volume(file.identity, item.identity):
                remedy = f"mount the file system that had {path} here again, and the one that is here where it was"
            return Inconsistency(record.name, record.uuid, path, problem, remedy)
        if file is None:
            command = release_of(record.uuid, item.spec.slot)
            return Inconsistency(record.name, record.uuid, path, problem, f"{command}: the file keeps its mark")
        remedy = f"give up the claim of {record.name}, and write that of {mark.name} into the ledger"
        return Inconsistency(
            record.name, record.uuid, path, problem, remedy, self.changes.of(record, self.changes.give_up, item)
        )

    # --- files in the pools ---

    def _file(self, file: Surveyed) -> Iterator[Inconsistency]:
        owner = self._owner_at(file)
        if file.error is not None:
            problem = file.error.message.removeprefix(f"{file.path}: ")
            yield _about(owner[0] if owner else None, file.path)(problem, file.error.hint)
            return
        mark = ownership.readable_mark(file)
        users = self._users(file)
        if file.frozen and not users:
            yield self._frozen(file, owner[0] if owner else None, mark)
        for user in users:
            if user.start is None or _has_another(user, file) or not self.driver.starts.is_running(user.start):
                continue
            if not file.immutable:
                problem, freeze = "a guest has it, and it is not immutable", partial(self._freeze, user.start, file)
                yield Inconsistency(user.name, user.uuid, file.path, problem, "make it so", freeze, of_guest=True)
            elif error := self.driver.starts.find_writer(user.uuid, file):
                yield Inconsistency(
                    user.name, user.uuid, file.path, error.message.removeprefix(f"{file.path}: "), error.hint
                )
        if owner is None:
            yield from self._unclaimed(file, mark)

    def _unclaimed(self, file: Surveyed, mark: Mark | None) -> Iterator[Inconsistency]:
        """Yield what the marks say of a file or device that no domain has at its path."""
        if file.owner is not None and file.path not in self.owners:
            yield from self._unknown(file, mark)
        elif mark and not any(ownership.has_bytes(each.allocations, file.identity) for each in self.records):
            yield self._named_as_anothers(file, mark, *self.owners[file.path])
        for part in self._parts_of(file):
            if part.owner != file.owner:
                yield from self._unknown_part(file, part)

    def _unknown_part(self, file: Surveyed, part: Surveyed) -> Iterator[Inconsistency]:
        """Yield a mark on bytes of a device that are another device, of a domain that does not have them in the ledger.

        :param file: the device.
        :param part: a part of it, or what it is a part of.
        """
        if part.identity is None:
            return
        mark = ownership.readable_mark(part)
        known = next((each for each in self.records if mark and each.uuid == mark.uuid), None)
        if known and ownership.has_bytes(known.allocations, part.identity):
            return
        at = f"{human(part.identity.size)} from byte {part.identity.start} of the namespace on"
        path = next((each.path for each in self.files.values() if each.identity == part.identity), None)
        backing = self._named(part.identity.kind)
        inconsistency = _about(known or mark, file.path)
        if mark is None:
            problem = f"the mark of another device with bytes of it, {at}, cannot be read"
            yield inconsistency(problem, "remove the mark", partial(self.changes.unmark, backing, part))
            return
        problem = (
            f"another device with bytes of it, {at}, has the mark of slot {mark.spec.slot} of {mark.name} "
            f"({mark.uuid}), which the ledger does not know"
        )
        if path:
            yield inconsistency(problem, f"write that into the ledger: {repair_of(path)}")
            return
        now = backing.find(part.identity)
        yield inconsistency(
            problem,
            f"write that into the ledger, with the name of that device{now and f', on {now}'}: nvdimmctl check "
            "--repair DEVICE; if none has exactly these bytes, make it as it was; or, if that domain is gone for good, "
            f"and anybody may have the bytes, delete {self.driver.ledger.device_marks.owner_file(part.identity)}",
        )

    def _users(self, file: Surveyed) -> list[Record]:
        """Return the domains whose starts have a file."""
        if not self.running or (file.immutable and not file.frozen):
            return []
        return self.running.of(file.path, ownership.identity_at(self.driver.backings, file.path))

    def _freeze(self, start: Start, file: Surveyed) -> None:
        """Freeze a guest's file; thaw it again if the guest has ended meanwhile, and its start is put away."""
        begun = self.driver.ledger.find_begun(start)
        backing = backing_of(self.driver.backings, file.path)
        backing.freeze_for(file.path, begun.number if begun else None, file.identity)
        self.driver.starts.thaw(file.path, file.identity)

    @cached_property
    def _guests(self) -> list[tuple[int, str | None]]:
        """Domid and uuid of Xen's guests; this asks Xen for each possible domid."""
        return self.driver.starts.mapper.guests()

    def _frozen(self, file: Surveyed, owner: Record | None, mark: Mark | None) -> Inconsistency:
        inconsistency = partial(_about(owner or mark, file.path), "it is immutable, but no known start needs that")
        spare = owner is not None and owner.start is not None and self.owners[file.path][1].spec.set_aside
        for domid, uuid in self._guests:
            if not spare and owner is not None and mark is not None and owner.uuid == mark.uuid == uuid:
                take_up = partial(self.changes.take_up, owner, domid, self._frozen_of(mark.uuid))
                return inconsistency(f"write into the ledger that the guest with domid {domid} has it", take_up)
            if mark is None or uuid in (None, mark.uuid):
                return inconsistency(f"shut down the guest with domid {domid} first: it may own the file")
        has = mark.uuid if owner and mark and mark.uuid == owner.uuid else ""
        thaw = partial(self.driver.starts.thaw_unknown, file.path, file.identity, has)
        return inconsistency("make it mutable", thaw)

    def _frozen_of(self, uuid: str) -> set[str]:
        """Return the frozen files that have the mark of a domain."""
        marks = {file.path: ownership.readable_mark(file) for file in self.files.values() if file.frozen}
        return {path for path, mark in marks.items() if mark and mark.uuid == uuid}

    def _unknown(self, file: Surveyed, mark: Mark | None) -> Iterator[Inconsistency]:
        backing = backing_of(self.driver.backings, file.path)
        unmark = partial(self.changes.unmark, backing, file)
        if mark is None:
            yield Inconsistency("", "", file.path, "its mark cannot be read", "remove the mark", unmark)
            return
        known = next((each for each in self.records if each.uuid == mark.uuid), None)
        has_it = known is not None and known.start is not None and file.path in known.start.paths
        if has_it and not self._is_defined_with(mark.uuid, file.path):
            return  # given up by a definition, and its mark goes when the guest has ended
        inconsistency = _about(known or mark, file.path)
        item = Allocation(mark.uuid, mark.spec, base=mark.base, changed=mark.changed)
        if known and (other := self._find(mark.uuid, mark.spec.slot)):
            if not self._is_still(other) and not self._is_later(file, other):
                return  # the other was moved, or is behind another file system
            problem = f"its mark says slot {mark.spec.slot}, but that is {other.spec.path}"
            if self._is_copy(file, mark, other):
                yield inconsistency(problem, "remove the mark", unmark)
            elif _runs_without(known, file):
                yield inconsistency(problem, f"shut domain {known.name} down first")
            else:
                beside = (backing, item, file.identity, file.frozen or self._is_given_up(other))
                adopt = self.changes.of(known, self.changes.adopt_beside, *beside)
                yield inconsistency(problem, "let the domain have both", adopt)
            return
        marked = self.marks.files_of(mark.uuid, mark.spec.slot)
        problem = f"its mark says slot {mark.spec.slot} of {mark.name} ({mark.uuid}), which the ledger does not know"
        if not marked:
            yield inconsistency(
                f"{problem}; it is a copy of that file",
                f"if it is what {mark.name} is to have, define {mark.name} with it; if not, take the mark from it: "
                f"{owner_marks.unmark_command(file.path)}",
            )
            return
        if file.path not in marked:
            if mark.is_original(file.identity):
                return  # the domain gets it besides, once that one is in the ledger
            yield inconsistency(f"it has the mark of {marked[0]}, and is a copy", "remove the mark", unmark)
            return
        if len(marked) > 1:
            yield inconsistency(_several(marked), _WHICH)
            return
        record = known or Record(mark.uuid, mark.name, mark.ram, mark.dsm, "", (), None)
        if _runs_without(record, file):
            yield inconsistency(problem, f"shut domain {record.name} down first")
            return
        adopt = self.changes.of(record, self.changes.adopt, backing, item, file.identity)
        yield inconsistency(problem, "write it into the ledger", adopt)

    def _named_as_anothers(self, file: Surveyed, mark: Mark, record: Record, item: Allocation) -> Inconsistency:
        """Return a device that is a domain's by its mark, and has the name that the ledger has for another one."""
        return _about(mark, file.path)(
            f"its mark says that it is domain {mark.name}'s ({mark.uuid}), and in the ledger, this is the name of "
            f"another device, which domain {record.name} has",
            f"define {record.name} with the name that its device has now, or give that up: "
            f"{release_of(record.uuid, item.spec.slot, '--lost ')}; then repeat this",
        )

    def _is_copy(self, file: Surveyed, mark: Mark, other: Allocation) -> bool:
        """Return True when a file has its mark from the NVDIMM that has the slot in the ledger.

        A mark of an earlier version does not say on which file it was written. Then it is a copy if both have it.
        """
        if mark.file is None or file.identity is None:
            return not file.frozen and self._has_mark_of(other)
        return mark.is_copied(file.identity)

    def _has_mark_of(self, item: Allocation) -> bool:
        """Return True when an NVDIMM's file has its mark."""
        file = self._file_at(item.spec.path)
        return file is not None and _is_marked(file, item)

    def _is_defined_with(self, uuid: str, path: str) -> bool:
        """Return True when libvirt's definition of a domain has a path; False also when libvirt cannot be asked."""
        try:
            defined = self.definition_of(uuid)
        except NvdimmError as error:
            LOG.info("the definition of domain %s is not known: %s", uuid, error)
            return False
        return defined is not None and path in {resolve(spec.path) for spec in defined.nvdimms}

    def _is_given_up(self, item: Allocation) -> bool:
        """Return True when a domain has given up, since the ledger's backup, an NVDIMM that the ledger says it has.

        Its file has lost the mark, or was deleted. A device without a mark may never have had one.

        :raises BackingError: when its file may be somewhere else.
        """
        path, file = item.spec.path, self._file_at(item.spec.path)
        if file is not None:
            if ownership.is_device(item) and file.owner is None:
                return False
            return _has_bytes(item, file) and not file.frozen and not _is_marked(file, item)
        if item.identity is None or exists(path):
            return False
        self._named(item.identity.kind).check_home(path, item.identity)
        return True

    def _file_at(self, path: str) -> Surveyed | None:
        """Return the file at a path, also in no pool; None when none is there.

        :raises BackingError: when it cannot be read.
        """
        if path in self.files or not exists(path):
            return self.files.get(path)
        return backing_of(self.driver.backings, path).inspect(path)

    def _find(self, uuid: str, slot: int) -> Allocation | None:
        """Return the NVDIMM that a domain has in a slot in the ledger."""
        items = [item for record in self.records if record.uuid == uuid for item in record.allocations]
        return next((item for item in items if item.spec.slot == slot), None)


def _about(whose: Record | Mark | None, path: str) -> partial[Inconsistency]:
    """Return an inconsistency that lacks a problem and a remedy."""
    return partial(Inconsistency, whose.name if whose else "", whose.uuid if whose else "", path)


def _guarded(owner: Record | None, path: str, found: Iterator[Inconsistency]) -> Iterator[Inconsistency]:
    """Yield what is found of one NVDIMM or file; if that cannot be found out, yield why: others are not its concern."""
    inconsistency = _about(owner, path)
    try:
        yield from found
    except NvdimmError as error:
        problem = error.message.removeprefix(f"{path}: ")
        yield inconsistency(problem, error.hint or "find out what has changed it")
    except OSError as error:
        yield inconsistency(error.strerror or str(error), HINTS.get(error.errno or 0, ""))


def _runs_without(record: Record, file: Surveyed) -> bool:
    """Return True while a domain runs, or is starting, with other files than that one."""
    return record.start is not None and not file.frozen


def _is_marked(file: Surveyed, item: Allocation) -> bool:
    """Return True when a file has the mark of an NVDIMM, whatever its bytes are."""
    mark = ownership.readable_mark(file)
    return mark is not None and (mark.uuid, mark.spec.slot) == (item.uuid, item.spec.slot)


def _has_bytes(item: Allocation, file: Surveyed) -> bool:
    """Return True when a file is what an NVDIMM was provisioned with."""
    return ownership.has_bytes([item], file.identity)


def _has_another(record: Record, file: Surveyed) -> bool:
    """Return True when a domain was provisioned with another file than the one that is at a path of its own."""
    had = [item.identity for item in record.allocations if item.spec.path == file.path and item.identity]
    return file.identity is not None and any(not each.shares_bytes(file.identity) for each in had)


def _can_become(own: Allocation, item: Allocation) -> bool:
    """Return True when an NVDIMM that a domain only keeps may take the place of one that it has: they are alike."""
    return own.spec.set_aside and own.spec == replace(item.spec, slot=own.spec.slot, path=own.spec.path)
