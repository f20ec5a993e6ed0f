"""What a start of a domain takes: where its NVDIMMs' bytes are, where the guest gets them, and that this is allowed.

Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nvdimm_driver.backing.identity import check_identity
from nvdimm_driver.backing.inventory import areas, bad_parts
from nvdimm_driver.guest import layout, mapping_guards
from nvdimm_driver.model import (
    PAGE,
    PERSISTENCE_DOMAINS,
    SUPERPAGE,
    Allocation,
    BackingIdentity,
    DomainSpec,
    Extent,
    GuestLayout,
    Intake,
    Location,
    Mapping,
    Namespace,
    NvdimmSpec,
    Plan,
    Record,
)
from nvdimm_driver.plugins import AcpiBuilder, Backing, Mapper, backing_of
from nvdimm_driver.sizes import align_up
from nvdimm_driver.state.ledger import Ledger


@dataclass(frozen=True)
class HostFacts:
    """What the driver has to know of the host.

    :ivar namespaces: reads the pmem namespaces.
    :ivar address_bits: physical address bits of the CPU.
    :ivar bad_ranges: reads the persistent memory that is known to be bad, as (SPA, bytes).
    """

    namespaces: Callable[[], tuple[Namespace, ...]]
    address_bits: int
    bad_ranges: Callable[[], tuple[tuple[int, int], ...]] = tuple


class Planner:
    """Makes plans of what is found now.

    :param mapper: is asked for the machine's memory map.
    :param gap: bytes of guest-physical space to keep free behind the RAM.
    :param dsm: who serves label areas, for domains that do not say.
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
    ) -> None:
        self.ledger = ledger
        self.backings = backings
        self.acpi = acpi
        self.mapper = mapper
        self.host = host
        self.gap = gap
        self.dsm = dsm

    def assumed(self, domain: DomainSpec, before: Record | None) -> Plan:
        """The plan for a domain whose backings may not be provisioned yet.

        :param before: the domain as the ledger knows it.
        :raises NvdimmError: when it cannot be had.
        """
        intakes = tuple(backing_of(self.backings, spec.path).examine(spec) for spec in domain.nvdimms)
        locations = self._locate_or_assume(domain, intakes)
        return self._plan(domain, locations, _kept_bases(domain, locations, before), intakes)

    def locate(self, domain: DomainSpec) -> tuple[Location, ...]:
        """Where the domain's backings are, which are provisioned.

        :raises BackingError: when one is not fit any more.
        """
        return tuple(backing_of(self.backings, spec.path).locate(spec) for spec in domain.nvdimms)

    def bad_blocks(self, spec: NvdimmSpec) -> tuple[tuple[int, int], ...]:
        """What is known to be bad of a backing, as (offset in it, bytes).

        :raises BackingError: when it is not fit to be located.
        """
        return bad_parts(backing_of(self.backings, spec.path).locate(spec).extents, self.host.bad_ranges())

    def provisioned(self, domain: DomainSpec, locations: tuple[Location, ...], before: Record | None) -> Plan:
        """The plan for a domain whose backings were provisioned just now.

        :param before: the domain as the ledger knew it; NVDIMMs that it had then keep their bases.
        """
        return self._plan(domain, locations, _kept_bases(domain, locations, before))

    def started(self, domain: DomainSpec, record: Record) -> Plan:
        """The plan for a start of a defined domain.

        :raises BackingError: also when a backing is not what was provisioned.
        """
        locations = tuple(self._locate_same(item) for item in record.allocations)
        return self._plan(domain, locations, {item.spec.slot: item.base for item in record.allocations})

    def around(self, record: Record, ram: int) -> GuestLayout:
        """The layout of a defined domain, if it had so many bytes of RAM."""
        placements = tuple(item.placement for item in record.allocations)
        guest = layout.around(ram, placements, address_bits=self.host.address_bits)
        return self._told(guest, record.dsm, [item.identity for item in record.allocations if item.identity])

    def _plan(
        self,
        domain: DomainSpec,
        locations: tuple[Location, ...],
        bases: dict[int, int | None],
        intakes: tuple[Intake, ...] = (),
    ) -> Plan:
        requests = [
            _request(spec, location, bases.get(spec.slot))
            for spec, location in zip(domain.nvdimms, locations, strict=True)
        ]
        guest = layout.place(domain.ram, requests, address_bits=self.host.address_bits, gap=self.gap)
        guest = self._told(guest, domain.dsm, [location.identity for location in locations])
        clients = set(guest.label_clients)
        for spec, placement in zip(domain.nvdimms, guest.nvdimms, strict=True):
            if placement in clients:
                backing_of(self.backings, spec.path).check_labels(spec)
        labelled = set(guest.label_areas)
        mappings = [
            layout.mappings(placement, location.extents, labels=placement in labelled)
            for placement, location in zip(guest.nvdimms, locations, strict=True)
        ]
        pmem = tuple(areas(self.host.namespaces()))
        known = [part for index, part in enumerate(mappings) if not (intakes and intakes[index].assumed)]
        self._guard(domain, guest, _flat(known), pmem)
        tables = self.acpi.build(guest)
        if tables.seconds is not None:
            self.ledger.count_harvest(tables.seconds)
        bad = self.host.bad_ranges()
        bad_blocks = tuple(
            () if intakes and intakes[index].assumed else bad_parts(location.extents, bad)
            for index, location in enumerate(locations)
        )
        return Plan(domain, intakes, locations, guest, _flat(mappings), pmem, tables, bad_blocks)

    def _told(self, guest: GuestLayout, dsm: str | None, identities: Sequence[BackingIdentity]) -> GuestLayout:
        """The layout with what else the guest's tables say of its NVDIMMs."""
        used = {identity.device for identity in identities}
        domains = {each.persistence_domain for each in self.host.namespaces() if each.uid in used}
        weakest = min(domains, key=PERSISTENCE_DOMAINS.index, default="")
        return replace(guest, dsm=dsm or self.dsm, persistence_domain=weakest)

    def _guard(
        self,
        domain: DomainSpec,
        guest: GuestLayout,
        mappings: Sequence[Mapping],
        pmem: Sequence[tuple[int, int]],
    ) -> None:
        mapping_guards.check_mappings(
            mappings,
            areas=pmem,
            ram=self.mapper.ram(),
            taken=self.ledger.frames_of_others(domain.uuid or ""),
            guest_start_gfn=guest.highmem_end // PAGE,
            guest_limit_gfn=guest.limit // PAGE,
        )

    def _locate_or_assume(self, domain: DomainSpec, intakes: Sequence[Intake]) -> tuple[Location, ...]:
        """Where each backing is; for one that is still to be written, where it would be on an empty namespace."""
        free = {intake.namespace.name: align_up(intake.namespace.data_spa, SUPERPAGE) for intake in intakes}
        locations = []
        for spec, intake in zip(domain.nvdimms, intakes, strict=True):
            if not intake.assumed:
                locations.append(backing_of(self.backings, spec.path).locate(spec))
                continue
            start = free[intake.namespace.name]
            free[intake.namespace.name] = align_up(start + spec.size, SUPERPAGE)
            identity = BackingIdentity(intake.kind, intake.namespace.uid, 0, 0, 0, spec.size)
            locations.append(Location(identity, (Extent(0, start, spec.size),)))
        return tuple(locations)

    def _locate_same(self, item: Allocation) -> Location:
        location = backing_of(self.backings, item.spec.path).locate(item.spec)
        check_identity(item.spec.path, location.identity, item.identity)
        return location


def _kept_bases(domain: DomainSpec, locations: Sequence[Location], before: Record | None) -> dict[int, int | None]:
    """The bases chosen earlier for the NVDIMMs that are still the same."""
    known = {} if before is None else {item.spec.slot: item for item in before.allocations}
    return {
        spec.slot: known[spec.slot].base
        for spec, location in zip(domain.nvdimms, locations, strict=True)
        if spec.slot in known
        and known[spec.slot].identity == location.identity
        and known[spec.slot].spec.visible_size == spec.visible_size
    }


def _flat(parts: Sequence[Sequence[Mapping]]) -> tuple[Mapping, ...]:
    return tuple(mapping for part in parts for mapping in part)


def _request(spec: NvdimmSpec, location: Location, base: int | None) -> layout.PlacementRequest:
    return layout.PlacementRequest(
        slot=spec.slot,
        size=spec.visible_size,
        label_size=spec.label_size,
        label_gap=spec.label_gap,
        alignsize=spec.alignsize,
        first_spa=location.extents[0].spa,
        base=base if base is not None else spec.base,
        node=spec.node,
    )
