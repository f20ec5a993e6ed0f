# SPDX-License-Identifier: Apache-2.0
"""Find what is wrong with files in the pools, and with devices: their marks, and for whom they are immutable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property, partial

from nvdimm_driver.doctor.repair_files import copy_or_trust
from nvdimm_driver.doctor.repair_marks import WHICH, several
from nvdimm_driver.doctor.repair_view import (
    Inconsistency,
    View,
    about,
    has_bytes,
    is_marked,
    runs_without,
)
from nvdimm_driver.model import Allocation, Record, Start, Surveyed
from nvdimm_driver.plugins import DOUBTFUL, backing_of, exists
from nvdimm_driver.shell import repair_of
from nvdimm_driver.sizes import human
from nvdimm_driver.state import owner_marks, ownership
from nvdimm_driver.state.owner_marks import Mark
from nvdimm_driver.state.words import release_of


class PoolFiles:
    """The findings of the files in the pools, and of devices."""

    def __init__(self, view: View) -> None:
        self.view, self.driver, self.files, self.changes = view, view.driver, view.files, view.changes

    def of(self, file: Surveyed) -> Iterator[Inconsistency]:
        """Yield what is wrong with one of them."""
        owner = self.view.owner_at(file)
        if file.error is not None:
            problem = file.error.message.removeprefix(f"{file.path}: ")
            yield about(owner[0] if owner else None, file.path)(problem, file.error.hint)
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
            if file.doubtful:
                trust = partial(backing_of(self.driver.backings, file.path).trust, file.path, file.identity)
                mend = trust if file.path in self.view.named else None
                yield about(mark, file.path)(DOUBTFUL, copy_or_trust(file.path), mend)
            yield from self._unclaimed(file, mark)

    def _unclaimed(self, file: Surveyed, mark: Mark | None) -> Iterator[Inconsistency]:
        """Yield what the marks say of a file or device that no domain has at its path."""
        if file.owner is not None and file.path not in self.view.owners:
            yield from self._unknown(file, mark)
        elif mark and not any(ownership.has_bytes(each.allocations, file.identity) for each in self.view.records):
            yield self._named_as_anothers(file, mark, *self.view.owners[file.path])
        for part in self.view.parts_of(file):
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
        known = next((each for each in self.view.records if mark and each.uuid == mark.uuid), None)
        if known and ownership.has_bytes(known.allocations, part.identity):
            return
        at = f"{human(part.identity.size)} from byte {part.identity.start} of the namespace on"
        path = next((each.path for each in self.files.values() if each.identity == part.identity), None)
        backing = self.view.backing(part.identity.kind)
        inconsistency = about(known or mark, file.path)
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
        if not self.view.running or (file.immutable and not file.frozen):
            return []
        return self.view.running.of(file.path, ownership.identity_at(self.driver.backings, file.path))

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
        inconsistency = partial(about(owner or mark, file.path), "it is immutable, but no known start needs that")
        spare = owner is not None and owner.start is not None and self.view.owners[file.path][1].spec.set_aside
        for domid, uuid in self._guests:
            if not spare and owner is not None and mark is not None and owner.uuid == mark.uuid == uuid:
                take_up = partial(self.changes.take_up, owner, domid, self.view.frozen_of(mark.uuid))
                return inconsistency(f"write into the ledger that the guest with domid {domid} has it", take_up)
            if mark is None or uuid in (None, mark.uuid):
                return inconsistency(f"shut down the guest with domid {domid} first: it may own the file")
        had = mark.uuid if mark and not mark.is_copied(file.identity) else ""  # whoever has the path now
        return inconsistency("make it mutable", partial(self._thaw, file, had))

    def _thaw(self, file: Surveyed, uuid: str) -> None:
        """Thaw a file; no start of the domain that it was frozen for comes between."""
        with self.driver.locks.starting(uuid) if uuid else nullcontext():
            self.driver.starts.thaw_unknown(file.path, file.identity, uuid)

    def _unknown(self, file: Surveyed, mark: Mark | None) -> Iterator[Inconsistency]:
        backing = backing_of(self.driver.backings, file.path)
        unmark = partial(self.changes.unmark, backing, file)
        if mark is None:
            yield Inconsistency("", "", file.path, "its mark cannot be read", "remove the mark", unmark)
            return
        known = next((each for each in self.view.records if each.uuid == mark.uuid), None)
        has_it = known is not None and known.start is not None and file.path in known.start.paths
        if has_it and not self.view.is_defined_with(mark.uuid, file.path):
            return  # given up by a definition, and its mark goes when the guest has ended
        if known and file.path in self.view.moved_from(known):
            return  # the finding is at the define that wants it
        inconsistency = about(known or mark, file.path)
        item = Allocation(mark.uuid, mark.spec, base=mark.base, changed=mark.changed)
        if known and (other := self.view.find(mark.uuid, mark.spec.slot)):
            if not self.view.is_still(other) and not self.view.is_later(file, other):
                return  # the other was moved, or is behind another file system
            problem = f"its mark says slot {mark.spec.slot}, but that is {other.spec.path}"
            if self._is_copy(file, mark, other):
                yield inconsistency(problem, "remove the mark", unmark)
            elif runs_without(known, file):
                yield inconsistency(problem, f"shut domain {known.name} down first")
            else:
                beside = (backing, item, file.identity, file.frozen or self._is_given_up(other))
                adopt = self.changes.of(known, self.changes.adopt_beside, *beside)
                yield inconsistency(problem, "let the domain have both", adopt)
            return
        marked = self.view.marks.files_of(mark.uuid, mark.spec.slot)
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
            yield inconsistency(several(marked), WHICH)
            return
        record = known or Record(mark.uuid, mark.name, mark.ram, mark.dsm, "", (), None, cache=mark.cache)
        if runs_without(record, file):
            yield inconsistency(problem, f"shut domain {record.name} down first")
            return
        adopt = self.changes.of(record, self.changes.adopt, backing, item, file.identity)
        yield inconsistency(problem, "write it into the ledger", adopt)

    def _named_as_anothers(self, file: Surveyed, mark: Mark, record: Record, item: Allocation) -> Inconsistency:
        """Return a device that is a domain's by its mark, and has the name that the ledger has for another one."""
        return about(mark, file.path)(
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
            return not file.frozen and self.view.has_mark_of(other)
        return mark.is_copied(file.identity)

    def _is_given_up(self, item: Allocation) -> bool:
        """Return True when a domain has given up, since the ledger's backup, an NVDIMM that the ledger says it has.

        Its file has lost the mark, or was deleted. A device without a mark may never have had one.

        :raises BackingError: when its file may be somewhere else.
        """
        path, file = item.spec.path, self.view.file_at(item.spec.path)
        if file is not None:
            if ownership.is_device(item) and file.owner is None:
                return False
            return has_bytes(item, file) and not file.frozen and not is_marked(file, item)
        if item.identity is None or exists(path):
            return False
        self.view.backing(item.identity.kind).check_home(path, item.identity)
        return True


def _has_another(record: Record, file: Surveyed) -> bool:
    """Return True when a domain was provisioned with another file than the one that is at a path of its own."""
    had = [item.identity for item in record.allocations if item.spec.path == file.path and item.identity]
    return file.identity is not None and any(not each.shares_bytes(file.identity) for each in had)
