# SPDX-License-Identifier: Apache-2.0
"""NVDIMMs that are plugged into a running guest, and taken out of it.

A guest with slots for hot-plug (:mod:`.guest.hot_slots`) looks at a slot when dom0 raises an interrupt. What is in a
slot is the guest's from then on: it is taken away only once the guest has ejected it, or has ended.

One rule mends what was killed half-way: what the ledger says that the guest has, and the guest's slot does not have, is
put away. A plug that was killed before the guest could know of it is such a case, and so is an ejection that nobody has
waited for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nvdimm_driver import caching
from nvdimm_driver.acpi.native import slot_records
from nvdimm_driver.acpi.tables import Header
from nvdimm_driver.errors import InUseError, LayoutError, LedgerError, NvdimmError, UnsupportedError, XenError
from nvdimm_driver.guest import hot_slots, layout, mapping_guards
from nvdimm_driver.guest.hot_slots import SlotRecord
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.lifecycle.plan import Planner
from nvdimm_driver.lifecycle.start import Starts
from nvdimm_driver.model import (
    PAGE,
    Allocation,
    BackingIdentity,
    DomainSpec,
    NvdimmSpec,
    Placement,
    Plan,
    Record,
    Run,
    Start,
)
from nvdimm_driver.state import ownership

if TYPE_CHECKING:
    from nvdimm_driver.state.events import Value

LOG = logging.getLogger(__name__)

NO_SLOTS = "the guest has no slots for hot-plug"
_GIVE_SLOTS = "give its definition <maxMemory slots='…'> and dsm 'aml' or 'none', and boot it anew"


class HotPlug:
    """Plugs NVDIMMs into running guests, and puts away what these have ejected."""

    def __init__(self, starts: Starts, planner: Planner) -> None:
        self.starts = starts
        self.planner = planner
        self.ledger = starts.ledger
        self.mapper = starts.mapper

    # --- what a guest has ---

    def count_slots(self, record: Record) -> int:
        """Return how many slots a running guest has; 0 when it has none, or has overwritten the pages.

        :raises LedgerError: when the ledger does not know the guest, or it does not run.
        """
        start, domid, _ = self._guest(record)
        if not start.hot_slots:
            return 0
        try:
            head = self.mapper.read(domid, hot_slots.ADDRESS, hot_slots.EVENTS_OFFSET)
        except XenError as error:  # a guest that was saved by an earlier version has no such pages
            LOG.debug("domid %d: %s", domid, error)
            return 0
        return start.hot_slots if head.startswith(hot_slots.SIGNATURE) else 0

    def read_slot(self, record: Record, slot: int) -> SlotRecord:
        """Return the record of a slot of a running guest."""
        _, domid, _ = self._guest(record)
        return SlotRecord.parse(self.mapper.read(domid, hot_slots.address_of(slot), hot_slots.RECORD))

    def paths(self, record: Record) -> dict[str, int]:
        """Return the slots of the NVDIMMs that a running guest has, by path."""
        return saved_guest.paths_of(self._guest(record)[2])

    def find_gone(self, record: Record) -> list[tuple[NvdimmSpec, SlotRecord]]:
        """Return the NVDIMMs that the ledger says a running guest has, and the guest's slots do not have."""
        count, (_, _, run) = self.count_slots(record), self._guest(record)
        found = [(spec, self.read_slot(record, spec.slot)) for spec, *_ in saved_guest.placed(run) if spec.slot < count]
        return [(spec, slot) for spec, slot in found if slot.is_empty]

    def _guest(self, record: Record) -> tuple[Start, int, Run]:
        """Return the start of a running guest, its domid, and its run."""
        start = record.start
        run = self.ledger.find_begun(start) if start else None
        if start is None or start.domid is None or start.state != "mapped" or run is None or not run.number:
            raise LedgerError(
                f"the ledger does not know what the guest of domain {record.name} has",
                hint="does it run? 'nvdimmctl check --repair' writes what it finds into the ledger",
            )
        if not self.starts.has_guest(start):
            raise LedgerError(f"the guest of domain {record.name} has ended", hint="start the domain")
        return start, start.domid, run

    # --- plugging ---

    def check_room(self, record: Record, domain: DomainSpec, path: str) -> DomainSpec:
        """Check that a guest could get an NVDIMM of its domain; return the domain, with what its place must be.

        :param domain: with the NVDIMM, in its slot.
        :raises UnsupportedError: when the guest has no slots, or its domain has this one not.
        :raises InUseError: when there is an NVDIMM in the slot.
        """
        count, (_, domid, _) = self.count_slots(record), self._guest(record)
        if not count:
            raise UnsupportedError(f"domain {record.name} runs, and {NO_SLOTS}", hint=_GIVE_SLOTS)
        (spec,) = (each for each in domain.nvdimms if each.path == path)
        if spec.slot >= count:
            raise UnsupportedError(
                f"the NVDIMM would be in slot {spec.slot}, and the guest of domain {record.name} has slots 0 to "
                f"{count - 1}",
                hint="write a free slot into <address>, or detach an NVDIMM first",
            )
        if not self.read_slot(record, spec.slot).is_empty:
            raise InUseError(
                f"the guest of domain {record.name} has an NVDIMM in slot {spec.slot}",
                hint="leave <address> out, or write another slot",
            )
        return self.placed_above(domain, path, domid)

    def placed_above(self, domain: DomainSpec, path: str, domid: int) -> DomainSpec:
        """Return a domain whose NVDIMM at a path goes behind all that its guest has or had."""
        return replace(domain, plugged=path, plugged_above=self.mapper.guest_end(domid) * PAGE)

    def plug(self, record: Record, domain: DomainSpec, item: Allocation) -> None:
        """Give a running guest an NVDIMM that its domain has, and tell it. On failure, nothing is changed.

        Whoever calls this has the lock for the preparation of the domain's start: nothing puts away meanwhile what the
        guest does not know of yet.

        :param domain: with this NVDIMM alone.
        :raises NvdimmError: when it cannot be plugged; the guest has not seen it then.
        """
        start, domid, before = self._guest(record)
        slot, path = self.read_slot(record, item.spec.slot), item.spec.path
        if not slot.is_empty:
            raise InUseError(
                f"the guest of domain {record.name} has an NVDIMM in slot {item.spec.slot}", hint="detach it"
            )
        plan = self.planner.plan_start(self.placed_above(domain, path, domid), record)
        described = saved_guest.describe(plan.domain, plan.layout, plan.locations)
        run = saved_guest.with_nvdimm(before, described, self.starts.backings)
        self.ledger.plug(start, path, plan.mappings, plan.areas, before=before, run=run)
        mapped, pids = False, []
        try:
            self.starts.freeze_one(start, item, run.number)
            if saved_guest.with_nvdimm(before, described, self.starts.backings) != run:
                raise InUseError(f"{path}: was written meanwhile", hint="try again")
            pids = self.starts.hold_each(record.uuid, record.name, [(path, plan.locations[0].identity)])
            self._guard(start, domid, plan)
            self.mapper.announce(domid, self.ledger.mappings_of(start))
            self._guard(start, domid, plan)
            self.mapper.map(domid, plan.mappings, _uncached_of(start, plan))
            mapped = True
            self._guest(record)  # which may have ended meanwhile: its files are thawed by now
            (new,) = self._records(plan).values()
            new.plugs, new.requests, new.ejected, new.taken = slot.plugs + 1, slot.requests + 1, slot.plugs, 0
            for address, data in new.writes(item.spec.slot):
                self.mapper.write(domid, address, data)
        except BaseException:
            LOG.debug("plugging %s into domain %s failed: take it back", path, record.name)
            self._take_back(record, start, item, plan, run, pids, mapped=mapped)
            raise
        detail: dict[str, Value] = {"path": path, "slot": item.spec.slot, "base": hex(plan.layout.nvdimms[0].base)}
        self.ledger.record_event("plugged", record.uuid, detail)
        self.tell(record)

    def tell(self, record: Record) -> None:
        """Have a guest look at its slots. One that is not told looks at them the next time."""
        try:
            self.mapper.raise_slot_event(self._guest(record)[1])
        except NvdimmError as error:
            LOG.warning("domain %s cannot be told of its slots: %s", record.name, error)

    def _records(self, plan: Plan) -> dict[int, SlotRecord]:
        (nfit,) = (table for table in plan.tables.tables if Header.parse(table).signature == b"NFIT")
        return slot_records(plan.layout, nfit)

    def _guard(self, start: Start, domid: int, plan: Plan) -> None:
        """Check all that a guest has with the new NVDIMM, whose frames the ledger has among those of its start."""
        others = [
            (f"with domid {each}", mfn, count) for each, mfn, count in self.mapper.frames_of_guests() if each != domid
        ]
        mapping_guards.check_mappings(
            self.ledger.mappings_of(start),
            areas={area.frames for backing in self.starts.backings for area in backing.areas()},
            ram=self.mapper.ram(),
            taken=[*self.ledger.frames_of_others(start.uuid), *others],
            guest_start_gfn=plan.layout.highmem_end // PAGE,
            guest_limit_gfn=plan.layout.limit // PAGE,
        )

    def _take_back(
        self,
        record: Record,
        start: Start,
        item: Allocation,
        plan: Plan,
        run: Run,
        pids: list[int],
        *,
        mapped: bool,
    ) -> None:
        """Undo :meth:`plug`; what fails is told, and put away with the guest's end at the latest."""
        path = item.spec.path
        try:
            if mapped and start.domid is not None:
                self.mapper.unmap(start.domid, plan.mappings, _uncached_of(start, plan))
            less = saved_guest.without_slot(run, item.spec.slot)
            self.ledger.unplug(start, path, [each.gfn for each in plan.mappings], before=run, run=less)
            self.starts.thaw(path, item.identity)
            self.starts.holders.kill(record.uuid, pids)
            if start.domid is not None:
                self.mapper.announce(start.domid, self.ledger.mappings_of(start))
        except (NvdimmError, OSError) as error:
            LOG.error(
                "domain %s: %s stays immutable until its guest ends, or 'nvdimmctl check': %s", record.name, path, error
            )

    # --- ejection ---

    def ask(self, record: Record, slot: int) -> None:
        """Ask a guest to eject the NVDIMM in a slot.

        :raises UnsupportedError: when it has no slots.
        """
        if not self.count_slots(record):
            raise UnsupportedError(f"domain {record.name} runs, and {NO_SLOTS}", hint=_GIVE_SLOTS)
        now, (_, domid, _) = self.read_slot(record, slot), self._guest(record)
        if now.is_empty:
            return
        now.request, now.requests = hot_slots.EJECT, now.requests + 1
        for address, data in now.writes(slot):
            self.mapper.write(domid, address, data)
        self.tell(record)

    def put_away_gone(self, record: Record) -> list[str]:
        """Put away the NVDIMMs that a guest has ejected, or never heard of; return the paths of their backings.

        Whoever calls this has the lock for the preparation of the domain's start.
        """
        done = []
        for spec, _ in self.find_gone(record):
            start, domid, run = self._guest(record)
            self._put_away(record, start, domid, run, spec)
            done.append(spec.path)
        return done

    def _put_away(self, record: Record, start: Start, domid: int, run: Run, spec: NvdimmSpec) -> None:
        ((_, identity, place, labels),) = (each for each in saved_guest.placed(run) if each[0].slot == spec.slot)
        pages = [(place.base, place.end), *([place.label_pages] if labels else [])]
        mappings = [
            each
            for each in self.ledger.mappings_of(start)
            if any(first <= each[0] * PAGE < last for first, last in pages)
        ]
        self._unmap(start, domid, spec, identity, place, mappings, labels=labels)
        # the ledger has it until all is done: what is killed before is done again
        self.starts.thaw_unknown(spec.path, identity, record.uuid, over=start)
        if os.path.exists(spec.path):
            self.starts.holders.kill(record.uuid, self.starts.holders.find_holding(record.uuid, spec.path))
        detail: dict[str, Value] = {"path": spec.path, "slot": spec.slot}
        less, gfns = saved_guest.without_slot(run, spec.slot), [each[0] for each in mappings]
        self.ledger.unplug(start, spec.path, gfns, before=run, run=less, kind="unplugged", detail=detail)
        self.mapper.announce(domid, self.ledger.mappings_of(start))

    def _unmap(
        self,
        start: Start,
        domid: int,
        spec: NvdimmSpec,
        identity: BackingIdentity,
        place: Placement,
        mappings: list[tuple[int, int, int]],
        *,
        labels: bool,
    ) -> None:
        """Unmap an NVDIMM of which perhaps only a part is mapped.

        Xen does not tell what of it is: if it cannot be removed as a whole, it is mapped as a whole first. It is that
        of the ledger still: its file is frozen. One that is there and not frozen was never mapped.

        :raises LayoutError: when nobody can say what is mapped: the guest has it until it ends.
        """
        uncached = _uncached(start, mappings, [place.label_pages] if labels else [])
        try:
            self.mapper.unmap(domid, mappings, uncached)
            return
        except XenError as error:
            LOG.debug("%s cannot be unmapped as a whole: %s", spec.path, error)
        backings = self.starts.backings
        here = ownership.identity_at(backings, spec.path)
        is_there = here is not None and here.shares_bytes(identity)
        if is_there and identity.inode and not ownership.frozen_files(backings, {spec.path: identity}):
            return
        extents = self.planner.locate(spec).extents if is_there else ()
        if not is_there or [*layout.mappings(place, extents, labels=labels)] != mappings:
            raise LayoutError(
                f"{spec.path} is not where the guest with domid {domid} has it, and cannot be taken out of that",
                hint="shut the guest down",
            )
        self.mapper.map(domid, mappings, uncached)
        self.mapper.unmap(domid, mappings, uncached)


def _uncached_of(start: Start, plan: Plan) -> list[tuple[int, int]]:
    return _uncached(start, plan.mappings, [each.label_pages for each in plan.layout.label_areas])


def _uncached(
    start: Start, mappings: Sequence[tuple[int, int, int]], labels: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the guest frames that must not be cached, as :func:`.device_model.attach` has it.

    :param labels: guest-physical addresses of the pages of label areas.
    """
    if start.cache == caching.WRITE_BACK:
        return [(first // PAGE, (end - first) // PAGE) for first, end in labels]
    first = min(gfn for gfn, _, _ in mappings)
    return [(first, max(gfn + count for gfn, _, count in mappings) - first)]
