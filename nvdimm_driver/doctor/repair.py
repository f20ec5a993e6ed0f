# SPDX-License-Identifier: Apache-2.0
"""Find inconsistencies between the ledger, the backings, their marks, and Xen; and repair them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial

from nvdimm_driver.backing.paths import HINTS, resolve
from nvdimm_driver.doctor.repair_nvdimms import Nvdimms
from nvdimm_driver.doctor.repair_pool_files import PoolFiles
from nvdimm_driver.doctor.repair_view import (
    DefinitionOf,
    Inconsistency,
    View,
    about,
    nobody_to_ask,
)
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NvdimmError, XenError
from nvdimm_driver.model import Allocation, NvdimmSpec, Record
from nvdimm_driver.plugins import exists
from nvdimm_driver.shell import command

LOG = logging.getLogger(__name__)


def look(
    driver: XenNvdimmDriver,
    definition_of: DefinitionOf = nobody_to_ask,
    zeros: Collection[str] = (),
    named: Collection[str] = (),
) -> list[Inconsistency]:
    """Find all inconsistencies; nothing is changed.

    :param zeros: paths of files whose lost bytes the operator wants to be replaced with zeros.
    :param named: paths of which the operator wants what nobody else can decide: see :class:`.Nvdimms`.

    Two of them may be the same file: one that was moved, and one that the ledger does not know. Repair them in the
    order of the list, then look again.
    """
    return list(_Look(View(driver, definition_of, zeros, named)).findings())


class _Look:
    def __init__(self, view: View) -> None:
        self.view, self.driver, self.changes = view, view.driver, view.changes
        self.nvdimms = Nvdimms(view)
        self.pool_files = PoolFiles(view)

    def findings(self) -> Iterator[Inconsistency]:
        yield from self.view.unseen
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
            devices = {path for path in (record.start.paths if record.start else ()) if not self.view.is_file(path)}
            take_up = partial(self.changes.take_up, record, domid, self.view.frozen_of(record.uuid) | devices)
            yield Inconsistency(record.name, record.uuid, "", problem, "write the start into the ledger", take_up)
        yield from self._unknown_guests()
        yield from self._unattended()
        yield from self._deleted()
        for record in self.view.records:
            yield from _guarded(record, "", self._elsewhere(record))
        for record in self.view.records:
            for item in record.allocations:
                yield from _guarded(record, item.spec.path, self._nvdimm(record, item))
            yield from self._intents(record)
        for file in self.view.files.values():
            owner = self.view.owner_at(file)
            yield from _guarded(owner[0] if owner else None, file.path, self.pool_files.of(file))

    def _nvdimm(self, record: Record, item: Allocation) -> Iterator[Inconsistency]:
        path = item.spec.path
        if (record.uuid, path) not in self._kept or exists(path):  # else, a backup would have older bytes
            yield from self.nvdimms.of(record, item)

    @cached_property
    def _kept(self) -> set[tuple[str, str]]:
        """The files that were deleted under a guest, and can be copied still, each with the domain's uuid."""
        return {(uuid, path) for _, uuid, path, _ in self.driver.starts.holders.deleted()}

    def _unattended(self) -> Iterator[Inconsistency]:
        """Yield the running guests that lack a process of the driver's."""
        processes = self.driver.guest_processes
        for record in processes.find_unserved():
            remedy, serve = "start another", partial(processes.serve_guest, record)
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
        for record in processes.find_unheld():
            problem = "nothing holds its backings: they can be unmounted and overwritten while the guest runs"
            hold = partial(processes.hold_guest, record)
            yield Inconsistency(record.name, record.uuid, "", problem, "hold them again", hold, of_guest=True)

    def _deleted(self) -> Iterator[Inconsistency]:
        """Yield the files that were deleted under a guest: only its holder, or a keeper, has them still."""
        names = {record.uuid: record.name for record in self.view.records}
        for pid, uuid, path, there in self.driver.starts.holders.deleted():
            problem = f"it was deleted while its guest had it; process {pid} has its bytes still"
            copy = command("cp", "--sparse=never", there, "FILE")
            remedy = f"shut the guest down, then copy them: {copy}; the process ends with the host, or by: kill {pid}"
            yield Inconsistency(names.get(uuid, ""), uuid, path, problem, remedy)

    def _elsewhere(self, record: Record) -> Iterator[Inconsistency]:
        """Yield the files of a running guest whose bytes are not where the guest has them."""
        if record.start is None or not self.driver.starts.has_guest(record.start):
            return
        announced = self._announced.get(record.start.domid or 0, [])
        for path in self.driver.starts.find_elsewhere(record.start, announced):
            yield Inconsistency(
                record.name,
                record.uuid,
                path,
                "blocks of it were moved while its guest runs, as by a defragmentation: what the guest writes there is "
                "not in the file, and the file system may give these blocks to others",
                f"save the data of domain {record.name} from within its guest to another place at once, then shut it "
                "down, and copy the data back in the next guest: the file has what it had when it was moved",
                of_guest=True,
            )

    @cached_property
    def _announced(self) -> dict[int, list[tuple[int, int]]]:
        """The frames that guests have announced, as (mfn, count), by domid."""
        found: dict[int, list[tuple[int, int]]] = {}
        try:
            for domid, mfn, count in self.driver.starts.mapper.frames_of_guests():
                found.setdefault(domid, []).append((mfn, count))
        except XenError as error:
            LOG.info("the frames of guests cannot be determined: %s", error)
        return found

    def _unknown_guests(self) -> Iterator[Inconsistency]:
        try:
            for domid, uuid in self.driver.starts.find_unknown():
                yield from self._unknown_guest(domid, uuid)
        except XenError as error:
            LOG.info("guests that the ledger does not know cannot be looked for: %s", error)

    def _unknown_guest(self, domid: int, uuid: str) -> Iterator[Inconsistency]:
        """Yield a guest without a start in the ledger, unless what is found of its files says so already."""
        record = next((each for each in self.view.records if each.uuid == uuid), None)
        paths = [item.spec.path for item in record.allocations] if record else []
        has = {path for path in paths if domid in self.driver.checks.guests_with(path)}
        frozen = self.view.frozen_of(uuid)
        if frozen and has <= frozen:
            return
        problem = f"its guest runs with domid {domid} and has NVDIMMs, and the ledger has no start of it"
        if record and has:
            take_up = partial(self.changes.take_up, record, domid, has | frozen)
            yield Inconsistency(record.name, record.uuid, "", problem, "write the start into the ledger", take_up)
        elif uuid not in self.view.marks.uuids():
            name = record.name if record else uuid
            yield Inconsistency(
                name, uuid, "", problem, f"shut it down: xl shutdown {domid}; nobody knows which it has"
            )

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
            defined = self.view.definition_of(record.uuid)
        except NvdimmError as error:
            LOG.info("domain %s: its definition is not known: %s", record.name, error)
            return (
                f"give that up: {keeps}; if libvirt, which cannot be asked, has the new definition already, the domain "
                "has to be defined again before it starts",
                self.changes.of_intents(record, change),
            )

        def is_current() -> bool:
            return self.view.definition_of(record.uuid) == defined

        give_up = self.changes.of_intents(record, change, is_current)
        paths = {resolve(spec.path) for spec in defined.nvdimms} if defined else set()
        if defined and {item.spec.path for item in record.intents} <= paths:
            if moved := self.view.moved_from(record):
                move = partial(self.changes.move_to_define, record, moved)
                remedy = f"move {' and '.join(moved)} back, which has the mark; then finish that define"
                return remedy, self.changes.of_intents(record, move, is_current)
            new = [spec for spec in defined.nvdimms if self.view.is_made_by(replace(spec, path=resolve(spec.path)))]
            if doubt := self._doubt_of_new(record, new):
                return doubt, give_up
            finish = partial(self.changes.finish_define, defined, [resolve(spec.path) for spec in new])
            besides = "; what the domain had before stays its own, too, until it is defined again"
            remedy = "finish it: libvirt has the new definition already" + besides * bool(record.allocations)
            return remedy, self.changes.of_intents(record, finish, is_current)
        if record.allocations:
            return f"give that up: {keeps}", give_up
        return "give that up: the domain had nothing before, and has no such definition in libvirt", give_up

    def _doubt_of_new(self, record: Record, new: Sequence[NvdimmSpec]) -> str:
        """Return that a define that was killed must not make new files, and what to do; empty when it may.

        It may have ended since the ledger's backup was made, and its guest have written to the files.

        :param new: what it would make.
        """
        runs_with = record.start.paths if record.start else ()  # it may have given that up meanwhile
        marked = [
            path for spec in new for path in self.view.marks.all_of(record.uuid, spec.slot) if path not in runs_with
        ]
        if not marked and not (new and self.driver.ledger.is_from_elsewhere()):
            return ""
        why = f"{' and '.join(marked)} has the mark" if marked else "the ledger is from a backup"
        return (
            f"give that up: finishing it would make {' and '.join(spec.path for spec in new)} anew, of zeros, and "
            f"{why}; if the domain had that, put it back before the repair; if not, define the domain again after it"
        )


def _guarded(owner: Record | None, path: str, found: Iterator[Inconsistency]) -> Iterator[Inconsistency]:
    """Yield what is found of one NVDIMM or file; if that cannot be found out, yield why: others are not its concern."""
    inconsistency = about(owner, path)
    try:
        yield from found
    except NvdimmError as error:
        problem = error.message.removeprefix(f"{path}: ")
        yield inconsistency(problem, error.hint or "find out what has changed it")
    except OSError as error:
        yield inconsistency(error.strerror or str(error), HINTS.get(error.errno or 0, ""))
