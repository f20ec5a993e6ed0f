# SPDX-License-Identifier: Apache-2.0
"""Find what is wrong with the NVDIMMs of the ledger, and how to repair it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from nvdimm_driver.backing.identity import describe_differences
from nvdimm_driver.backing.paths import same_file_system
from nvdimm_driver.doctor.repair_changes import LaterMark, exchanged_with
from nvdimm_driver.doctor.repair_files import go_on, on_same_volume
from nvdimm_driver.doctor.repair_marks import WHICH, several
from nvdimm_driver.doctor.repair_view import (
    Inconsistency,
    View,
    has_bytes,
    runs_without,
)
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.lifecycle import slots
from nvdimm_driver.model import Allocation, BackingIdentity, Record, Surveyed
from nvdimm_driver.plugins import Backing, backing_of, exists
from nvdimm_driver.shell import command, repair_of
from nvdimm_driver.sizes import human
from nvdimm_driver.state import condition, owner_marks, ownership
from nvdimm_driver.state.condition import Condition
from nvdimm_driver.state.owner_marks import Mark
from nvdimm_driver.state.words import release_of

_TAKE = "take it as it is now; if that is not what the guest should have, put the right file there first"


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
    if not driver.definitions.is_saved(name, uuid):
        return edit
    discard = command("virsh", "managedsave-remove", uuid)
    return (
        f"leave it, as its guest is saved: it can go on after a boot that gives the name back, and another 'nvdimmctl "
        f"check --repair'; or give its guest up, {discard}, and {edit}"
    )


class Nvdimms:
    """The findings of the NVDIMMs of the ledger."""

    def __init__(self, view: View) -> None:
        self.view, self.driver, self.files, self.changes = view, view.driver, view.files, view.changes

    def of(self, record: Record, item: Allocation) -> Iterator[Inconsistency]:
        """Yield what is wrong with one of them."""
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
        backing = self.view.backing(item.identity.kind if item.identity else "")
        if not backing.exists(path):
            moved = self._moved(item)
            if any(each.spec.path in moved and _can_become(item, each) for each in record.allocations):
                return  # the finding is at that one
            if not any(has_bytes(item, self.files[each]) for each in moved):
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
        if found is None or on_same_volume(found, item.identity):
            backing.check_can_freeze(path, found)
        if unfit := self.view.unfit.remedy(record, item, backing, state):
            yield inconsistency(*unfit)
            return
        if found is not None and found != item.identity:
            if name := self.view.exchanged.get((record.uuid, item.spec.slot)):
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
        if runs_without(record, later.file):
            return problem, f"shut domain {record.name} down first", None
        later.backing.check_can_freeze(later.file.path, later.file.identity)
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
            each if self.view.is_defined_with(record.uuid, each.spec.path) else replace(each, changed=0)
            for each in items
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
        items = [each for other in self.view.records for each in other.allocations]
        names = exchanged_with(item, self.view.exchanged, items)
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
        is_named = any(each.spec.path in self.view.named for each in with_it)
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
            return inconsistency(f"{ownership.moved_back(own.spec.path)}; what belongs here is another file")
        take = self.changes.of(record, self.changes.adopt_instead, backing, item, found, own)
        return inconsistency(f"take it for this one, and give up number {own.spec.slot}", take)

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
        unfit = self.view.unfit.remedy(record, item, backing, found)
        if unfit and found.condition in (Condition.SHORT, Condition.DOUBTFUL):
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

    def _gone(self, record: Record, item: Allocation, moved: list[str]) -> Inconsistency:
        """Return an NVDIMM that is not at its path.

        :param moved: where it is now.
        """
        path = item.spec.path
        inconsistency = partial(Inconsistency, record.name, record.uuid, path)
        if len(moved) > 1:
            return inconsistency(f"it is not there; {several(moved)}", WHICH)
        if moved and not same_file_system(moved[0], path):
            return inconsistency(
                f"it is not there; its file system is mounted in another place, and has it as {moved[0]}",
                "mount it where it was, or define the domain with that path: the NVDIMM stays the same",
            )
        if moved:
            backing = self.view.backing(item.identity.kind if item.identity else "")
            move = self.changes.of(record, self.changes.move_back, backing, moved[0], item)
            return inconsistency(f"it is not there; it was moved to {moved[0]}", "move it back", move)
        if item.overwritten or item.deleted:
            give_up = self.changes.of(record, self.changes.give_up, item)
            return inconsistency("it is not there: a release of it was interrupted", "finish that", give_up)
        if item.identity is not None and item.identity.inode == 0:
            now = self.view.backing(item.identity.kind).find(item.identity)
            return inconsistency("it is not there", _find_device(record, item, now))
        marked = self.view.marks.all_of(item.uuid, item.spec.slot)
        copies = [each for each in marked if not self.view.is_later(self.files[each], item)]
        has = record.start is not None and path in record.start.paths
        if copies and not has and path not in self.view.unfit.zeros:
            return inconsistency(
                f"it is not there; a copy of it is {' and '.join(copies)}",
                f"restore a backup, or rename the copy to {path}: the guest goes on with what it had when that was "
                f"made, and a repair takes it: {repair_of(path)}; {go_on(path)}",
            )
        return inconsistency(
            *self.view.unfit.gone(record, item, self.view.backing(item.identity.kind if item.identity else ""))
        )

    def _moved(self, item: Allocation) -> list[str]:
        """Return where an NVDIMM's file is that is not at its path: by its identity, or by its mark if it has no bytes.

        A file with the identity can be at another NVDIMM's path. One with the mark of that slot and another identity is
        a copy, or, if the mark was written on it, a later NVDIMM of the domain.
        """
        if ownership.is_device(item):
            return []  # no repair moves one; Backing.find knows where it is
        if here := [path for path, file in self.files.items() if file.identity and has_bytes(item, file)]:
            return here
        marked = self.view.marks.files_of(item.uuid, item.spec.slot)
        return [path for path in marked if self.files[path].identity is None]

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
        had = self.view.find(mark.uuid, mark.spec.slot)
        if had and file and not self.view.is_still(had) and not self.view.is_later(file, had):
            problem = f"what is there is {had.spec.path} of domain {mark.name} ({mark.uuid}), by its mark"
            remedy = ownership.moved_back(had.spec.path)
            if item.identity and file.identity and not on_same_volume(file.identity, item.identity):
                remedy = f"mount the file system that had {path} here again, and the one that is here where it was"
            return Inconsistency(record.name, record.uuid, path, problem, remedy)
        if file is None:
            command = release_of(record.uuid, item.spec.slot)
            return Inconsistency(record.name, record.uuid, path, problem, f"{command}: the file keeps its mark")
        remedy = f"give up the claim of {record.name}, and write that of {mark.name} into the ledger"
        return Inconsistency(
            record.name,
            record.uuid,
            path,
            problem,
            remedy,
            self.changes.of(record, self.changes.give_up, item),
        )


def _can_become(own: Allocation, item: Allocation) -> bool:
    """Return True when an NVDIMM that a domain only keeps may take the place of one that it has: they are alike."""
    return own.spec.set_aside and own.spec == replace(item.spec, slot=own.spec.slot, path=own.spec.path)
