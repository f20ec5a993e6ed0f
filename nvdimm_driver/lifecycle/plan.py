# SPDX-License-Identifier: Apache-2.0
"""Plans for a define or start: where the NVDIMMs' bytes are, where the guest gets them, and that this is allowed.

Nothing is changed here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from nvdimm_driver import caching
from nvdimm_driver.backing.identity import check_identity
from nvdimm_driver.backing.inventory import bad_parts
from nvdimm_driver.errors import BackingError, DomainXmlError, NvdimmError
from nvdimm_driver.guest import layout, mapping_guards
from nvdimm_driver.labels import index_block, namespace_labels
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.lifecycle.growth import Growth
from nvdimm_driver.model import (
    MIB,
    PAGE,
    PERSISTENCE_DOMAINS,
    SUPERPAGE,
    AcpiTables,
    Allocation,
    BackingIdentity,
    DomainSpec,
    Extent,
    GuestLayout,
    Intake,
    Location,
    Mapping,
    NvdimmSpec,
    Plan,
    Record,
)
from nvdimm_driver.plugins import AcpiBuilder, Backing, Mapper, backing_of
from nvdimm_driver.sizes import align_up, human
from nvdimm_driver.state import condition, ownership, stray_frames
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.stray_frames import StrayFrames

LOG = logging.getLogger(__name__)

_USUAL_AREA = 2 * MIB
"""Bytes of an NVDIMM's end in which a define looks for a label area that the definition does not have."""


@dataclass(frozen=True)
class HostFacts:
    """Facts about the host, apart from its backings.

    :ivar address_bits: physical address bits of the CPU.
    :ivar bad_ranges: returns the known bad ranges of persistent memory, as (SPA, bytes).
    """

    address_bits: int
    bad_ranges: Callable[[], tuple[tuple[int, int], ...]] = tuple


class Planner:
    """Makes plans from the current state of the backings, the ledger and the machine.

    :param mapper: provides the machine's memory map.
    :param gap: bytes of guest-physical space to keep free above the RAM.
    :param dsm: default for domains that do not specify who serves label areas.
    :param cache: default for domains that do not specify whether their NVDIMMs are cached.
    :param hotplug: guests get the slots for hot-plug that their XML has.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        backings: Sequence[Backing],
        acpi: AcpiBuilder,
        mapper: Mapper,
        host: HostFacts,
        gap: int,
        dsm: str,
        cache: str = caching.AUTO,
        hotplug: bool = False,
    ) -> None:
        self.ledger = ledger
        self.backings = backings
        self.acpi = acpi
        self.mapper = mapper
        self.host = host
        self.gap = gap
        self.dsm = dsm
        self.cache = cache
        self.hotplug = hotplug
        self.strays = StrayFrames(ledger, backings, mapper.frames_of_guests)

    def plan_define(
        self,
        domain: DomainSpec,
        before: Record | None,
        *,
        adopts: bool = False,
        growing: dict[str, Growth] | None = None,
    ) -> Plan:
        """Return the plan for a domain whose backings may not be provisioned yet.

        :param before: the domain as the ledger knows it.
        :param adopts: the domain is that of a start.
        :param growing: by path, NVDIMMs that get larger.
        :raises NvdimmError: when the domain cannot be defined or started.
        """
        growing = growing or {}
        intakes = tuple(
            growing[spec.path].examine() if spec.path in growing else self._backing(spec).examine(spec)
            for spec in domain.nvdimms
        )
        self._check_room(domain, intakes)
        self._check_can_freeze(domain, intakes, before.start.paths if before and before.start else ())
        locations = self._locate_or_assume(domain, intakes, growing)
        kept = self._kept_bases(domain, locations, before, adopts)
        guest = self._lay_out(domain, locations, _wanted_bases(domain), kept)
        plan = self._plan(domain, locations, guest, self._build_tables(guest), intakes)
        found = (
            "" if intake.creates else self.find_misplaced_labels(spec) or self._find_unseen_labels(spec)
            for spec, intake in zip(domain.nvdimms, intakes, strict=True)
        )
        return replace(plan, misplaced_labels=tuple(found))

    def _check_room(self, domain: DomainSpec, intakes: Sequence[Intake]) -> None:
        """Check that what is to be written gets no place where a running guest has its bytes."""
        writing = [(spec.path, intake) for spec, intake in zip(domain.nvdimms, intakes, strict=True) if intake.writes]
        strays = self.strays.find() if writing else ()
        for path, intake in writing:
            stray_frames.check_none(strays, path, intake.namespace)

    def _check_can_freeze(self, domain: DomainSpec, intakes: Sequence[Intake], frozen: Container[str]) -> None:
        """Check that a start could freeze the backings that there are, but for those that are frozen."""
        for spec, intake in zip(domain.nvdimms, intakes, strict=True):
            if not intake.creates and spec.path not in frozen:
                self._backing(spec).check_can_freeze(spec.path)

    def settle(self, plan: Plan, domain: DomainSpec, before: Record | None, *, adopts: bool = False) -> Plan:
        """Return the plan of :meth:`plan_define`, updated now that the backings are provisioned.

        Backings are located and checked again. Tables are built again only if the guest's layout differs from the one
        that was assumed.

        :param before: the domain as the ledger knew it; NVDIMMs that it had then keep their bases if that is possible
            and the user gives no others.
        :param adopts: as in :meth:`plan_define`.
        :raises BackingError: when a backing is not fit.
        :raises NvdimmError: when the domain cannot be started.
        """
        locations = tuple(self.locate(spec) for spec in domain.nvdimms)
        kept = self._kept_bases(domain, locations, before, adopts)
        guest = self._lay_out(domain, locations, _wanted_bases(domain), kept)
        tables = plan.tables if guest == plan.layout else self._build_tables(guest)
        return self._plan(domain, locations, guest, tables)

    def plan_start(self, domain: DomainSpec, record: Record) -> Plan:
        """Return the plan for a start of a defined domain.

        :param record: has each NVDIMM of the domain, and may have others.
        :raises BackingError: also when a backing is not the one that was provisioned.
        :raises NvdimmError: when the domain cannot be started.
        """
        items = {item.spec: item for item in record.allocations}
        wanted = [items[spec] for spec in domain.nvdimms]
        locations = tuple(self._locate_same(item) for item in wanted)
        guest = self._lay_out(domain, locations, {item.spec.slot: item.base for item in wanted})
        return self._plan(domain, locations, guest, self._build_tables(guest))

    def map_running(
        self, record: Record, items: Sequence[Allocation]
    ) -> tuple[tuple[Mapping, ...], tuple[tuple[int, int], ...], str]:
        """Return the mappings of NVDIMMs that a running guest has, the areas that they are in, and their description.

        Their backings are frozen, so the frames are those of its start.

        :param items: NVDIMMs of the domain.
        :returns: with the description of :func:`.saved_guest.describe`.
        :raises BackingError: also when a backing is not the one that was provisioned.
        """
        guest = self.layout_around(record, record.ram)
        placements = {placement.slot: placement for placement in guest.nvdimms}
        locations = [self._locate_same(item) for item in items]
        mappings, devices = [], set()
        for item, location in zip(items, locations, strict=True):
            placement = placements[item.spec.slot]
            mappings.append(layout.mappings(placement, location.extents, labels=placement in guest.label_areas))
            devices.add(location.identity.device)
        areas = {area.frames for backing in self.backings for area in backing.areas() if area.uid in devices}
        specs = tuple(item.spec for item in items)
        domain = record.as_spec(specs)
        had = replace(guest, nvdimms=tuple(placements[spec.slot] for spec in specs))
        return _flat(mappings), tuple(sorted(areas)), saved_guest.describe(domain, had, locations)

    def find_bad_blocks(self, spec: NvdimmSpec) -> tuple[tuple[int, int], ...]:
        """Return the known bad blocks of a backing, as (offset in it, bytes).

        :raises BackingError: when it cannot be located.
        """
        return bad_parts(self._backing(spec).locate(spec).extents, self.host.bad_ranges())

    def find_misplaced_labels(self, spec: NvdimmSpec) -> str:
        """Return why a guest would find no namespaces on an NVDIMM that has labels; empty when it would, or may."""
        slots = self._slots_of_labels(spec)
        if slots is None or spec.own_slot in slots:
            return ""
        made = "in slot " + " or ".join(map(str, sorted(slots))) if slots else "on another make of NVDIMM"
        return (
            f"its labels were made {made}, and in slot {spec.own_slot} the guest finds none of its namespaces: do not "
            "make new ones there, they would overwrite the data"
        )

    def _find_unseen_labels(self, spec: NvdimmSpec) -> str:
        """Return that an NVDIMM ends with labels of an area that is not as large as its own; empty when it does not.

        Of one that has a larger area than any in use, nothing is read.
        """
        size = min(spec.size, _USUAL_AREA)
        if spec.label_size > index_block.TAIL:
            return ""
        try:
            with self._backing(spec).open_bytes(spec) as content:
                end = content.read(spec.size - size, size)
        except (NvdimmError, OSError) as error:
            LOG.debug("the end of %s cannot be read: %s", spec.path, error)
            return ""
        found = index_block.label_area_size(end)
        if found in (0, spec.label_size) or namespace_labels.slots_of(end[-found:]) is None:
            return ""
        return (
            f"it ends with labels in an area of {human(found)}, not {human(spec.label_size)}: the guest finds none "
            "of its namespaces: do not make new ones there, they would overwrite the data"
        )

    def find_slot_of_labels(self, spec: NvdimmSpec) -> int | None:
        """Return the slot in which a guest finds the namespaces of an NVDIMM; None when there are none, or no slot."""
        return min(self._slots_of_labels(spec) or (), default=None)

    def _slots_of_labels(self, spec: NvdimmSpec) -> frozenset[int] | None:
        """Return the slots that the labels of an NVDIMM were made for; None when there are none, or nobody can say.

        An area that is larger than any in use is not read: who defines a domain chooses its size.
        """
        if not 0 < spec.label_size <= index_block.TAIL:
            return None
        try:
            with self._backing(spec).open_bytes(spec) as content:
                area = content.read(spec.size - spec.label_size, spec.label_size)
        except (NvdimmError, OSError) as error:
            LOG.debug("labels of %s cannot be read: %s", spec.path, error)
            return None
        return namespace_labels.slots_of(area)

    def layout_around(self, record: Record, ram: int) -> GuestLayout:
        """Return the layout of a defined domain as it would be with `ram` bytes of RAM."""
        items = [item for item in record.started if item.base is not None]
        guest = layout.around(ram, [item.placement for item in items], address_bits=self.host.address_bits)
        identities = [item.identity for item in items if item.identity]
        return self._complete(guest, record.dsm, identities, record.hot_slots)

    def check_ram(self, record: Record, paths: Container[str], ram: int) -> None:
        """Check that a defined domain could be defined with `ram` bytes of RAM; bases that no user chose may change.

        :param paths: of the NVDIMMs in its definition: those that it keeps besides are not in its next guest.
        :raises LayoutError: when its NVDIMMs do not fit.
        """
        items = [item for item in record.allocations if item.spec.path in paths]
        requests = [_request(item.spec, item.spec.base, item.base) for item in items]
        layout.place(ram, requests, address_bits=self.host.address_bits, gap=self.gap)

    def bases_of_run(self, domain: DomainSpec, identities: Sequence[BackingIdentity]) -> dict[int, int]:
        """Return, by slot, the bases that the guest of the domain's last run has, as far as its RAM leaves them free.

        That guest may be saved. They go before bases that a definition has chosen since.
        """
        last = None if domain.uuid is None else self.ledger.find_run(domain.uuid)
        pairs = zip(domain.nvdimms, identities, strict=True)
        had = saved_guest.bases(last, [(spec.slot, spec.visible_size, identity) for spec, identity in pairs])
        end = layout.around(domain.ram, (), address_bits=self.host.address_bits).highmem_end
        free = {slot: base for slot, base in had.items() if base >= end + min(self.gap, layout.MIN_GAP)}
        return {spec.slot: free[spec.slot] for spec in domain.nvdimms if spec.base is None and spec.slot in free}

    def _kept_bases(
        self, domain: DomainSpec, locations: Sequence[Location], before: Record | None, adopts: bool
    ) -> dict[int, int | None]:
        """Return, by slot, bases to keep.

        A guest whose last run has no number may have been saved by an earlier version. That put new NVDIMMs as far
        behind a multiple of 2 MiB as their backings begin. Of what the ledger does not know, the mark has the base,
        and the last run that the ledger knows may be older.
        """
        had = self.bases_of_run(domain, [location.identity for location in locations])
        unnumbered = adopts and self.ledger.is_unnumbered(domain.uuid or "")
        pairs = zip(domain.nvdimms, locations, strict=True) if unnumbered else ()
        earlier = {spec.slot: location.extents[0].spa % SUPERPAGE for spec, location in pairs}
        marks = ownership.find_own_marks(self.ledger, self.backings, domain)
        marked = {spec.slot: marks[spec.path].base for spec in domain.nvdimms if spec.path in marks}
        return {**earlier, **_kept_bases(domain, locations, before), **had, **marked}

    def _lay_out(
        self,
        domain: DomainSpec,
        locations: Sequence[Location],
        bases: dict[int, int | None],
        kept: dict[int, int | None] | None = None,
    ) -> GuestLayout:
        """Return the guest's layout.

        :param bases: by slot, the bases that NVDIMMs must have.
        :param kept: by slot, the bases that others keep if that is possible.
        """
        floors = {domain.plugged: domain.plugged_above}
        requests = [
            _request(spec, bases.get(spec.slot), (kept or {}).get(spec.slot), floors.get(spec.path, 0))
            for spec in domain.nvdimms
        ]
        guest = layout.place(domain.ram, requests, address_bits=self.host.address_bits, gap=self.gap)
        guest = self._complete(guest, domain.dsm, [location.identity for location in locations], domain.hot_slots)
        for placement in guest.nvdimms:
            LOG.debug("placed slot %d at %#x, %s", placement.slot, placement.base, human(placement.size))
        clients = set(guest.label_clients)
        for spec, placement in zip(domain.nvdimms, guest.nvdimms, strict=True):
            if placement in clients:
                self._backing(spec).check_labels(spec)
        return guest

    def _complete(
        self, guest: GuestLayout, dsm: str | None, identities: Sequence[BackingIdentity], hot_slots: int
    ) -> GuestLayout:
        """Fill in who serves labels, the places of label areas, the persistence domain, and the slots for hot-plug.

        QEMU's own SSDT, which label clients have, has no such slots.
        """
        used = {identity.device for identity in identities}
        domains = {area.persistence_domain for backing in self.backings for area in backing.areas() if area.uid in used}
        weakest = min(domains, key=PERSISTENCE_DOMAINS.index, default="")
        server = dsm or self.dsm
        count = hot_slots if self.hotplug and server != "qemu" else 0
        return layout.place_labels(replace(guest, dsm=server, persistence_domain=weakest, hot_slots=count))

    def _build_tables(self, guest: GuestLayout) -> AcpiTables:
        began = time.monotonic()
        tables = self.acpi.build(guest)
        seconds = time.monotonic() - began
        LOG.debug("ACPI tables are ready: %s, after %.3f s", human(sum(map(len, tables.tables))), seconds)
        if tables.seconds is not None:
            self.ledger.count_harvest(tables.seconds)
        return tables

    def _plan(
        self,
        domain: DomainSpec,
        locations: tuple[Location, ...],
        guest: GuestLayout,
        tables: AcpiTables,
        intakes: tuple[Intake, ...] = (),
    ) -> Plan:
        """Assemble a plan, and check that it is allowed."""
        labelled = set(guest.label_areas)
        mappings = [
            layout.mappings(placement, location.extents, labels=placement in labelled)
            for placement, location in zip(guest.nvdimms, locations, strict=True)
        ]
        assumed = [intake.assumed for intake in intakes] or [False] * len(locations)
        known = [part for part, is_assumed in zip(mappings, assumed, strict=True) if not is_assumed]
        areas = self._areas(domain)
        identities = {
            spec: location.identity
            for spec, location, is_assumed in zip(domain.nvdimms, locations, assumed, strict=True)
            if not is_assumed
        }
        check_distinct(tuple(identities), lambda one, other: identities[one].shares_bytes(identities[other]))
        self._guard(domain, guest, _flat(known), areas)
        bad = self.host.bad_ranges()
        bad_blocks = tuple(
            () if is_assumed else bad_parts(location.extents, bad)
            for location, is_assumed in zip(locations, assumed, strict=True)
        )
        cache = domain.cache or self.cache
        found = (domain, intakes, locations, guest, _flat(mappings), areas, tables, bad_blocks)
        fault = self._cache_fault(domain, _flat(mappings), guest)
        return Plan(*found, cache=cache, cache_fault=fault)

    def _cache_fault(self, domain: DomainSpec, mappings: Sequence[Mapping], guest: GuestLayout) -> str:
        if not domain.hap:
            return caching.SHADOW
        return self.mapper.write_back_fault(mappings, layout.label_frames(guest))

    def _areas(self, domain: DomainSpec) -> tuple[tuple[int, int], ...]:
        """Check that no two areas overlap; return those of the domain's backings, as machine frames (mfn, count)."""
        areas = {backing.name: backing.areas() for backing in self.backings}
        mapping_guards.check_areas(
            (area.uid, f"{area.name} of backing {name}", *area.frames)
            for name, found in areas.items()
            for area in found
        )
        used = dict.fromkeys(self._backing(spec).name for spec in domain.nvdimms)
        return tuple(area.frames for name in used for area in areas[name] if area.frames[1])

    def _guard(
        self,
        domain: DomainSpec,
        guest: GuestLayout,
        mappings: Sequence[Mapping],
        areas: Sequence[tuple[int, int]],
    ) -> None:
        mapping_guards.check_mappings(
            mappings,
            areas=areas,
            ram=self.mapper.ram(),
            taken=self.ledger.frames_of_others(domain.uuid or ""),
            guest_start_gfn=guest.highmem_end // PAGE,
            guest_limit_gfn=guest.limit // PAGE,
        )
        LOG.debug("guards passed, mappings: %d", len(mappings))

    def _locate_or_assume(
        self, domain: DomainSpec, intakes: Sequence[Intake], growing: dict[str, Growth]
    ) -> tuple[Location, ...]:
        """Return where each backing is or, if still to be written, where it would be on an empty namespace."""
        free = {intake.namespace.name: align_up(intake.namespace.data_spa, SUPERPAGE) for intake in intakes}
        locations = []
        for spec, intake in zip(domain.nvdimms, intakes, strict=True):
            if not intake.assumed:
                locations.append(self.locate(spec))
                continue
            start = free[intake.namespace.name]
            free[intake.namespace.name] = align_up(start + spec.size, SUPERPAGE)
            LOG.debug("assumed %s at SPA %#x: it is not written yet", spec.path, start)
            identity = BackingIdentity(intake.kind, intake.namespace.uid, 0, 0, 0, spec.size)
            if spec.path in growing:  # it keeps its base
                identity = growing[spec.path].identity
            locations.append(Location(identity, (Extent(0, start, spec.size),)))
        return tuple(locations)

    def locate(self, spec: NvdimmSpec) -> Location:
        location = self._backing(spec).locate(spec)
        extents = location.extents
        LOG.debug("located %s: first SPA %#x, extents: %d", spec.path, extents[0].spa, len(extents))
        return location

    def _locate_same(self, item: Allocation) -> Location:
        try:
            location = self.locate(item.spec)
        except BackingError:
            condition.check_not_lost(self._backing(item.spec), item)
            raise
        check_identity(item.spec.path, location.identity, item.identity)
        return location

    def _backing(self, spec: NvdimmSpec) -> Backing:
        return backing_of(self.backings, spec.path)


def check_distinct(nvdimms: Sequence[NvdimmSpec], same: Callable[[NvdimmSpec, NvdimmSpec], bool]) -> None:
    """Check that no two NVDIMMs of a domain have the same bytes.

    :raises DomainXmlError: when two have.
    """
    for one, other in combinations(nvdimms, 2):
        if same(one, other):
            raise DomainXmlError(
                f"the NVDIMMs in slots {one.slot} and {other.slot} have the same bytes: {one.path} and {other.path}",
                hint="give each a backing of its own, or remove one",
            )


def _kept_bases(domain: DomainSpec, locations: Sequence[Location], before: Record | None) -> dict[int, int | None]:
    """Return, by slot, the bases chosen earlier for NVDIMMs of the same size in that slot, or else for the same bytes.

    A file that has the place of another, such as a backup, has its contents, which may need the same base. So may one
    that has grown, or is in another slot.
    """
    items = sorted(before.allocations if before else (), key=lambda item: not item.spec.set_aside)
    known = {
        (item.spec.own_slot, item.spec.visible_size, which): item.base
        for item in items
        for which in (None, item.spec.path, item.identity)
    }
    kept = {}
    for spec, location in zip(domain.nvdimms, locations, strict=True):
        keys = [(spec.slot, spec.visible_size, which) for which in (location.identity, spec.path, None)]
        bases = [known[key] for key in keys if key in known]
        bases += [item.base for item in reversed(items) if item.identity and item.identity.is_same(location.identity)]
        if bases:
            kept[spec.slot] = bases[0]
    return kept


def _wanted_bases(domain: DomainSpec) -> dict[int, int | None]:
    """Return, by slot, the bases that the user gave."""
    return {spec.slot: spec.base for spec in domain.nvdimms}


def _flat(parts: Sequence[Sequence[Mapping]]) -> tuple[Mapping, ...]:
    return tuple(mapping for part in parts for mapping in part)


def _request(spec: NvdimmSpec, base: int | None, kept: int | None, floor: int = 0) -> layout.PlacementRequest:
    return layout.PlacementRequest(
        slot=spec.slot,
        size=spec.visible_size,
        label_size=spec.label_size,
        label_gap=spec.label_gap,
        alignsize=spec.alignsize,
        base=base,
        node=spec.node,
        kept=kept,
        floor=floor,
    )
