# SPDX-License-Identifier: Apache-2.0
"""The driver: one method for each event in the life of a domain with NVDIMMs."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self
from uuid import uuid4

from oslo_config import cfg

from nvdimm_driver import caching, logs, plugin_loader, plugins, registered
from nvdimm_driver.acpi.native import slot_records
from nvdimm_driver.acpi.walk import find
from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.backing.inventory import bad_ranges, physical_address_bits
from nvdimm_driver.backing.paths import resolve, resolve_strictly
from nvdimm_driver.conf import configured_pools
from nvdimm_driver.contents.exporting import Exporter
from nvdimm_driver.contents.importing import Importer
from nvdimm_driver.contents.shared_checks import Checks
from nvdimm_driver.contents.wiping import Wiper
from nvdimm_driver.errors import (
    ConfigError,
    InUseError,
    LayoutError,
    LedgerError,
    NvdimmError,
    UnsupportedError,
)
from nvdimm_driver.guest import hot_slots, layout, p2m
from nvdimm_driver.labels.servers import LabelServers
from nvdimm_driver.lifecycle import saved_guest, slots
from nvdimm_driver.lifecycle.define import Before, Definitions, Made, uuid_of
from nvdimm_driver.lifecycle.domain_locks import DomainLocks
from nvdimm_driver.lifecycle.emulators import Emulators
from nvdimm_driver.lifecycle.guest_processes import GuestProcesses
from nvdimm_driver.lifecycle.hotplug import HotPlug
from nvdimm_driver.lifecycle.plan import HostFacts, Planner
from nvdimm_driver.lifecycle.start import Starts
from nvdimm_driver.model import (
    GIB,
    MAX_NVDIMMS,
    PAGE,
    AcpiTables,
    Allocation,
    BackingIdentity,
    DomainSpec,
    GuestLayout,
    NvdimmSpec,
    Plan,
    Pool,
    Record,
    Run,
    Watch,
)
from nvdimm_driver.plugins import AcpiBuilder, Backing, Mapper
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.pools.usage import PoolUsage, usage_of
from nvdimm_driver.sizes import human
from nvdimm_driver.state import ownership
from nvdimm_driver.state.database import FROM_ELSEWHERE, TAKE_OVER
from nvdimm_driver.state.device_claims import UnknownClaims
from nvdimm_driver.state.events import Event
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xml.definition_files import DefinitionFiles, StoredDomain, has_managed_save
from nvdimm_driver.xml.hooks import XmlHooks

LOG = logging.getLogger(__name__)


def load_driver(conf: cfg.ConfigOpts) -> XenNvdimmDriver:
    """Make the driver that ``[DEFAULT] driver`` names.

    :raises ConfigError: when no installed package has it, or a plug-in that it needs.
    :raises LedgerError: when there is no ledger and none can be created.
    """
    if conf.driver == "xen":
        return XenNvdimmDriver.from_conf(conf)  # without a search, which takes longer
    driver_class(conf)
    driver: XenNvdimmDriver = plugin_loader.load("nvdimm_driver.drivers", conf.driver, conf)
    return driver


def driver_class(conf: cfg.ConfigOpts) -> type[XenNvdimmDriver]:
    """Return the class that ``[DEFAULT] driver`` names.

    :raises ConfigError: when no installed package has it, or it is not a driver.
    """
    if conf.driver == "xen":
        return XenNvdimmDriver
    found = plugin_loader.find("nvdimm_driver.drivers", conf.driver)
    if not issubclass(found, XenNvdimmDriver):
        raise ConfigError(
            f"[DEFAULT] driver: {conf.driver} is {found.__module__}.{found.__qualname__}, which is not a driver",
            hint="a driver must derive from nvdimm_driver.driver.XenNvdimmDriver",
        )
    return found


class XenNvdimmDriver(plugins.Plugin):
    """NVDIMMs of Xen domains, from definition to release.

    :param emulators: programs that a domain's device model may become.
    :param gap: bytes of guest-physical space to keep free above the RAM.
    :param dsm: default for domains that do not specify who serves label areas: one of :data:`.model.DSM`.
    :param cache: default for domains that do not specify whether their NVDIMMs are cached: one of
        :data:`.caching.CACHES`.
    :param hotplug: guests get the slots for hot-plug that their XML has.
    :param pools: pools that domains may have their backings in.
    :param stored: the domains in libvirt's files, which are read anew by each iteration.
    :param is_saved: returns True when the domain of a name and a uuid has a managed save.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        state_dir: Path,
        backings: Sequence[Backing],
        acpi: AcpiBuilder,
        mapper: Mapper,
        host: HostFacts,
        emulators: Emulators,
        gap: int,
        dsm: str,
        pools: Pools,
        cache: str = caching.AUTO,
        hotplug: bool = False,
        holders: Holders | None = None,
        stored: Iterable[StoredDomain] = (),
        is_saved: Callable[[str, str], bool] = lambda name, uuid: False,
    ) -> None:
        self.ledger = ledger
        self.state_dir = state_dir
        self.backings = backings
        for backing in backings:
            backing.device_marks = ledger.device_marks
        self.acpi = acpi
        self.emulators = emulators
        self.pools = pools
        self.locks = DomainLocks(state_dir / "locks", ledger.reserve)
        self.planner = Planner(
            ledger=ledger,
            backings=backings,
            acpi=acpi,
            mapper=mapper,
            host=host,
            gap=gap,
            dsm=dsm,
            cache=cache,
            hotplug=hotplug,
        )
        unknown = UnknownClaims(ledger, backings, stored)
        self.definitions = Definitions(ledger, self.planner, pools, self.locks, unknown, is_saved)
        held = holders or Holders(state_dir)
        self.starts = Starts(ledger, backings, mapper, LabelServers(state_dir), held, is_saved)
        self.guest_processes = GuestProcesses(self.starts)
        self.hotplug = HotPlug(self.starts, self.planner)
        self.checks = Checks(ledger, backings, pools, self.note_overwritten, mapper.frames_of_guests, unknown)
        self.importer, self.exporter, self.wiper = Importer(self.checks), Exporter(self.checks), Wiper(self.checks)

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """Make the driver from the operator's configuration.

        :raises ConfigError: when a plug-in is missing, or the driver is registered with another state folder.
        :raises LedgerError: when there is no ledger and none can be created.
        """
        state_dir = Path(conf.state_dir)
        ledger = Ledger(registered.ledger_path(conf), logs.tell)
        ledger.reserve.keep()
        return cls(
            ledger=ledger,
            state_dir=state_dir,
            backings=plugin_loader.load_all("nvdimm_driver.backings", conf),
            acpi=plugin_loader.load("nvdimm_driver.acpi_builders", conf.acpi.builder, conf),
            mapper=plugin_loader.load("nvdimm_driver.mappers", conf.xen.mapper, conf),
            host=HostFacts(physical_address_bits(), bad_ranges),
            emulators=Emulators.from_conf(conf),
            gap=conf.layout.gap_gib * GIB,
            dsm=conf.acpi.dsm,
            cache=conf.xen.cache,
            hotplug=conf.xen.hotplug,
            pools=Pools(configured_pools(conf), any_path=conf.allow_any_path),
            stored=DefinitionFiles(
                conf.libvirt.definition_dirs,
                lambda xml: XmlHooks.from_conf(conf).restore(xml),
                resolve_strictly,
                conf.libvirt.save_dir,
            ),
            is_saved=partial(has_managed_save, conf.libvirt.save_dir),
        )

    def describe(self) -> str:
        return "NVDIMMs of Xen HVM domains that libvirt's libxl driver runs"

    def close(self) -> None:
        """Close the ledger and the connections to Xen. Can be repeated; the driver can be used again."""
        self.ledger.close()
        self.planner.mapper.close()

    def plan(self, domain: DomainSpec) -> Plan:
        """Return the plan for a define and start of the domain; change nothing.

        :raises NvdimmError: any error that a define or start would raise.
        """
        self.emulators.check(domain)
        return self.definitions.plan(domain)

    def check(self, domain: DomainSpec, *, repairs: bool = False) -> Plan:
        """Return the plan for a define; raise any error that :meth:`define` raises before it changes anything.

        :param repairs: the ledger may be from elsewhere: what it lacks is repaired.
        """
        if not repairs:
            self.ledger.check_own()
        self.reconcile()
        return self.plan(domain)

    def begin(self, domain: DomainSpec, plan: Plan) -> tuple[NvdimmSpec, ...]:
        """Write what a define wants into the ledger, before libvirt gets the definition.

        If the define is killed from then on, libvirt's definition tells whether it is to be finished.

        :param domain: with its uuid.
        :param plan: returned by :meth:`check`.
        :returns: what an earlier define wanted that was killed, for :meth:`cancel`.
        :raises NvdimmError: nothing has changed then.
        """
        with self.locks.storing(uuid_of(domain), spends=False):
            return self.definitions.begin(domain, plan)

    def cancel(self, domain: DomainSpec, had: Sequence[NvdimmSpec]) -> None:
        """Undo :meth:`begin`, once libvirt has the definition of before.

        :param had: as :meth:`begin` has returned it.
        """
        with self.locks.storing(uuid_of(domain)):
            self.definitions.cancel(domain, had)

    def define(self, domain: DomainSpec, plan: Plan | None = None) -> Made:
        """Provision the domain's NVDIMMs and choose their guest addresses. Can be repeated, also with another spec.

        :param domain: with its uuid.
        :param plan: returned by :meth:`check`, so that it is not made twice.
        :returns: what was made, for :meth:`undo`.
        :raises NvdimmError: nothing has changed then, except that unwritten parts of existing files hold real zeros.
        """
        with self.locks.storing(uuid_of(domain), spends=False):
            return self.definitions.define(domain, plan)

    def create(self, domain: DomainSpec, plan: Plan) -> Made:
        """Do what :meth:`define` does, for a guest that libvirt may refuse: what the domain has besides stays its own.

        That is what its definition has, or what it had before: until the guest runs, no other domain may take it.
        """
        with self.locks.storing(uuid_of(domain)):
            return self.definitions.define(domain, plan, kept=self.definitions.others(domain))

    def give_up_others(self, domain: DomainSpec) -> None:
        """Give up the claims that :meth:`create` has kept, of a domain without a definition."""
        with self.locks.storing(uuid_of(domain)):
            self.definitions.give_up_others(domain)

    def state_of(self, uuid: str, domain: DomainSpec | None = None) -> Before:
        """Return what :meth:`undo` needs to know of a domain, before a create or a restore.

        :param domain: as it is to be created.
        """
        return self.definitions.state_of(uuid, domain)

    def undo(self, uuid: str, before: Before, made: Made, over: Record | None) -> None:
        """Undo :meth:`create`, or a start that has failed: all is as before; a guest's bytes stay.

        :param before: as :meth:`state_of` has returned it.
        :param made: as :meth:`create` has returned it.
        :param over: the domain, if nobody goes on with the start that it has; any other may be another client's.
        """
        if over is not None:
            self.starts.release(over)
        with self.locks.storing(uuid):
            self.definitions.put_back(uuid, before, made)

    def drop_claims(self, uuid: str) -> None:
        """Give up the claims of a domain redefined without NVDIMMs; those it runs with stay its own until it ends."""
        with self.locks.storing(uuid):
            self.definitions.drop_claims(uuid)

    def forget(self, uuid: str) -> Record:
        """Give up the domain's claim to its backings, whose bytes stay; return its last record.

        :raises NvdimmError: when there is no such domain, or it runs, which perhaps only Xen knows.
        """
        self.ledger.check_own()
        with self.locks.changing(uuid), self.locks.storing(uuid):
            self.reconcile()
            record = self.ledger.find_domain(uuid)
            if record is None:
                raise LedgerError(f"no domain {uuid} in the ledger", hint="'nvdimmctl list' shows all")
            ownership.check_off(record)
            self.wiper.check_unmapped(record)
            ownership.give_up(self.ledger, self.backings, record)
            self.remove_leftovers()
            return record

    def release_claims(
        self, record: Record, watch: Watch, *, delete: bool, slot: int | None = None, lost: bool = False
    ) -> None:
        """Release a domain's backings, as :meth:`.wiping.Wiper.give_up` does, while nobody defines or creates it.

        :raises InUseError: also while another process does so.
        :raises NvdimmError: also when the domain's start is over, and cannot be put away.
        """
        with self.locks.changing(record.uuid), self.locks.storing(record.uuid):
            self.starts.put_away_if_over(record)
            self.wiper.give_up(record, watch, delete=delete, slot=slot, lost=lost)

    # --- hot-plug ---

    def has_slots(self, uuid: str) -> bool:
        """Return True when a domain runs, and its guest has slots for hot-plug."""
        record = self.ledger.find_domain(uuid)
        is_known = record is not None and record.start is not None and self._has_guest(record)
        return bool(record and is_known and self.hotplug.count_slots(record))

    def check_plug(self, uuid: str, domain: DomainSpec, path: str, taken: Collection[int] = ()) -> DomainSpec:
        """Check that a running guest could get an NVDIMM; return the domain, with its slot and place.

        :param domain: what the guest has, with the NVDIMM.
        :param path: of its backing, resolved.
        :param taken: slots that the domain's definition has; if the XML gives the NVDIMM no slot, it gets another one.
        :raises NvdimmError: when it could not.
        """
        self.ledger.check_own()
        record = self._known_guest(uuid)
        placed = self.definitions.keep_slots(domain)
        (spec,) = (each for each in placed.nvdimms if each.path == path)
        had = {item.spec.path for item in record.allocations}
        if path in domain.unplaced and path not in had and spec.slot in taken:
            others = {*taken, *(each.slot for each in placed.nvdimms)}
            free = next(each for each in range(MAX_NVDIMMS + 1) if each not in others)
            nvdimms = tuple(replace(each, slot=free) if each is spec else each for each in placed.nvdimms)
            placed = replace(placed, nvdimms=tuple(sorted(nvdimms, key=lambda each: each.slot)))
        return self.hotplug.check_room(record, placed, path)

    def plug(self, uuid: str, domain: DomainSpec, path: str) -> None:
        """Give a running guest an NVDIMM that its domain has.

        :param domain: as :meth:`check_plug` returned it.
        :raises NvdimmError: when it cannot; the guest has not seen it then.
        """
        with self.locks.starting(uuid):
            record = self._known_guest(uuid)
            (item,) = (each for each in record.allocations if each.spec.path == path)
            self.hotplug.plug(record, replace(domain, nvdimms=(item.spec,)), item)

    def has_taken(self, uuid: str, slot: int) -> bool:
        """Return True when a running guest has read which NVDIMM is in a slot."""
        return self.hotplug.read_slot(self._known_guest(uuid), slot).is_taken

    def ask_to_eject(self, uuid: str, path: str) -> None:
        """Ask a running guest to eject an NVDIMM.

        :raises UnsupportedError: when it cannot, or has no other: a guest with NVDIMMs keeps one.
        """
        record = self._known_guest(uuid)
        places = self.hotplug.paths(record)
        if path not in places:
            raise LedgerError(f"the guest of domain {record.name} has no {path}", hint="see 'nvdimmctl show'")
        if len(places) == 1:
            raise UnsupportedError(
                f"{path} is the only NVDIMM of the guest of domain {record.name}, which keeps one while it runs",
                hint="attach another one first, or detach it with --config and shut the guest down",
            )
        self.hotplug.ask(record, places[path])

    def put_away_ejected(self, uuid: str, path: str) -> bool:
        """Put away what a running guest has ejected; return True when it has a backing no more."""
        return path not in (self.settle_guest(uuid) or (path,))

    def settle_guest(self, uuid: str) -> tuple[str, ...] | None:
        """Put away what a running guest has ejected; return the paths of what it has left.

        :returns: None for a guest without slots for hot-plug, and for one that does not run.
        """
        record = self.ledger.find_domain(uuid)
        if record is None or record.start is None or not record.start.hot_slots or not self._has_guest(record):
            return None
        with self.locks.starting(uuid):
            record = self._known_guest(uuid)
            self.hotplug.put_away_gone(record)
            return tuple(self.hotplug.paths(record))

    def give_up_claim(self, uuid: str, path: str) -> None:
        """Give up the claim to an NVDIMM that the domain has neither in its definition nor in its guest."""
        with self.locks.storing(uuid):
            self.definitions.give_up_path(uuid, path)

    def _known_guest(self, uuid: str) -> Record:
        record = self.ledger.find_domain(uuid)
        if record is None:
            raise LedgerError(f"domain {uuid} has no NVDIMMs", hint="define it with one, and boot it anew")
        return record

    def check_ram(self, uuid: str, paths: Iterable[str], ram: int) -> None:
        """Check that a defined domain could have that much RAM from its next start on.

        :param paths: of the NVDIMMs in its definition; the ledger may have others that it keeps.
        :param ram: bytes.
        :raises LayoutError: when its NVDIMMs do not fit beside it, wherever those go whose base no user gave.
        """
        record = self.ledger.find_domain(uuid)
        if record is not None:
            self.planner.check_ram(record, {resolve(path) for path in paths}, ram)

    def check_running_ram(self, uuid: str, ram: int) -> None:
        """Check that a running domain could have that much RAM now.

        :param ram: bytes.
        :raises LayoutError: when it reaches the NVDIMMs, which keep their places until the next start.
        """
        record = self.ledger.find_domain(uuid)
        if record is None:
            return
        guest, last = self.planner.layout_around(record, ram), self.ledger.find_run(uuid)
        places = [(each.base, each.slot) for each in guest.nvdimms]
        if last is not None and record.start is not None:  # the definition may have changed since the start
            places = saved_guest.places(last)
        if not places:  # a version that numbered no runs has started it, and it was redefined without NVDIMMs
            return
        base, slot = min(places)
        if guest.highmem_end > base:
            raise LayoutError(
                f"domain {record.name} runs: RAM of {human(ram)} reaches up to {guest.highmem_end:#x}, and its NVDIMM "
                f"in slot {slot} is at {base:#x}",
                hint="raise the RAM of its next start, <memory> and <currentMemory>: virsh edit",
            )

    def identify(self, domain: DomainSpec) -> DomainSpec:
        """Return the domain with a uuid: its own, that of the ledger's domain of the same name, or a new one."""
        known = self.definitions.identify_by_name(domain)
        return known if known.uuid is not None else replace(domain, uuid=str(uuid4()))

    def clear_fault(self, uuid: str) -> Record | None:
        """Clear the reason why an earlier start failed, because a new start begins.

        :returns: the domain's record; None for a domain without NVDIMMs.
        """
        self.ledger.clear_fault(uuid)
        return self.ledger.find_domain(uuid)

    def prepare(self, domain: DomainSpec) -> None:
        """Prepare a start: freeze the backings, check, build the tables, write the plan for the device model.

        :raises NvdimmError: the reason is in the ledger, too; nothing stays frozen.
        """
        uuid = uuid_of(domain)
        try:
            with self.locks.starting(uuid):
                self.reconcile()
                self.restart_lost()
                self.distrust_saved_guests()
                if self.ledger.is_from_elsewhere():
                    LOG.warning("%s %s (%s)", self.ledger.path, FROM_ELSEWHERE, TAKE_OVER)
                plan = self._prepare_alone(domain)
        except NvdimmError as error:
            self.ledger.record_failure(uuid, error)
            raise
        self._mark_devices(uuid)
        for spec, bad in zip(plan.domain.nvdimms, plan.bad_blocks, strict=True):
            if not self.pools.allow(spec.path):
                logs.tell(Event("outside-pools", uuid, domain.name, None, {"path": spec.path}))
            if bad:
                size = sum(length for _, length in bad)
                found = Event(
                    "bad-blocks", uuid, domain.name, None, {"path": spec.path, "bytes": size, "first": hex(bad[0][0])}
                )
                logs.tell(found)

    def _prepare_alone(self, domain: DomainSpec) -> Plan:
        """Do what :meth:`prepare` does, with the lock for the preparation of the domain's start."""
        uuid = uuid_of(domain)
        qemu = self.emulators.choose(domain)
        domain = self.definitions.keep_slots(self.definitions.resolve_for_start(domain))
        self.starts.end_earlier(uuid)
        record = self.definitions.adopt(domain)
        identities = {item.spec.path: item.identity for item in record.allocations if item.spec in domain.nvdimms}
        self.definitions.check_unknown(domain, identities)  # of these bytes, which a start freezes, and no others
        return self._prepare(record, domain, qemu)

    def check_restore(self, uuid: str) -> None:
        """Check that the domain's guest, saved at the end of its last run, could go on now; change nothing.

        Whoever starts it calls :meth:`try_restore`.

        :raises NvdimmError: when it could not.
        """
        self.ledger.check_own()
        self.reconcile()
        self.starts.check_not_starting(uuid)
        self.starts.require_ended(uuid)
        last = self.starts.times.find_last_run(uuid)
        unnumbered, spoiled = self.ledger.is_unnumbered(uuid), self.ledger.is_spoiled(uuid)
        saved_guest.check_known(last, is_unnumbered=unnumbered, is_spoiled=spoiled)
        if last is None:
            defined = self._find_known(uuid)
            self.starts.times.check_left(uuid, dict.fromkeys(each.path for each in defined.nvdimms) if defined else {})
            return
        self.starts.times.check_left(uuid, dict(saved_guest.backings_of(last)))
        domain = saved_guest.domain_of(last, uuid)
        record = self.ledger.find_domain(uuid)
        known = domain or record
        identities = saved_guest.check_available(last, self.backings, (known and known.dsm) or self.planner.dsm)
        ownership.check_bytes(self.ledger, uuid, identities, record.allocations if record else ())
        self.starts.check_can_freeze(uuid, identities)
        if domain is not None:
            saved_guest.check_plan(last, self.definitions.plan_start(domain))

    def try_restore(self, uuid: str, saved: DomainSpec | None = None) -> None:
        """Check that the domain's saved guest can go on: prepare its start as the hook will do, and put that away.

        libvirt removes a managed save before it calls the hook: a start that the hook refuses costs the guest. Whoever
        calls this has the lock of the domain (:meth:`.domain_locks.DomainLocks.changing`) until libvirt has replied:
        nothing may change the domain before the hook, and no other trial may come between the hook and the guest.

        :param saved: the domain in the saved image; None when nobody knows it: then as it was in its last run.
        :raises NvdimmError: as for :meth:`check_restore` and :meth:`prepare`.
        """
        self.check_restore(uuid)
        last = self.ledger.find_run(uuid)
        if last is not None and saved is not None:
            saved_guest.check_plan(last, self.definitions.plan_start(saved))
        domain = saved or (last and saved_guest.domain_of(last, uuid)) or self._find_known(uuid)
        if domain is None:
            return
        with self.locks.starting(uuid):
            self._prepare_alone(domain)
            prepared = self.ledger.find_domain(uuid)
            if prepared is not None and prepared.start is not None:
                self.starts.put_away(prepared.start)

    def distrust_saved_guests(self) -> None:
        """If the ledger comes from elsewhere, let no guest go on that was saved with a device before that was seen.

        Nobody can tell whether something has written the device since. Guests that are saved later can go on.
        """
        if not self.ledger.is_strange():
            return
        for uuid, run in self.ledger.runs().items():
            if not self._has_guest(self.ledger.find_domain(uuid)) and any(
                not each.inode for _, each in saved_guest.backings_of(run)
            ):
                self.ledger.spoil_run(uuid, run.number)
        for record in self.ledger.domains():
            if not self._has_guest(record) and any(map(ownership.is_device, record.allocations)):
                self.ledger.spoil_unnumbered(record.uuid)
        try:
            self.ledger.take_over(compared=False)
        except LedgerError as error:  # domains that are defined boot all the same
            LOG.warning("%s", error)

    def _has_guest(self, record: Record | None) -> bool:
        return bool(record and record.start and self.starts.has_guest(record.start))

    def has_taken_up(self, record: Record | None, domid: int, paths: Collection[str]) -> bool:
        """Return True when the ledger has the start of a domain's guest, with these paths."""
        start = record.start if record else None
        return bool(start and start.domid == domid and self.starts.has_guest(start) and {*paths} <= {*start.paths})

    def check_redefinition(self, plan: Plan) -> None:
        """Check that a domain whose guest is saved is defined with the NVDIMMs that this guest had, in their places.

        The definition may have other paths to the same bytes. The guest goes on with the paths that it had, so these
        must lead there, too.

        :raises UnsupportedError: when it is not.
        """
        uuid = uuid_of(plan.domain)
        record, last = self.ledger.find_domain(uuid), self.ledger.find_run(uuid)
        had: dict[str, BackingIdentity | None]
        if last is not None:
            differing, had = saved_guest.differences(last, plan), dict(saved_guest.backings_of(last))
        else:
            items = record.started if record else ()
            differing, had = saved_guest.not_as_stored(items, plan), {item.spec.path: item.identity for item in items}
        gone = saved_guest.missing(had, self.backings)
        if gone and not differing:
            raise UnsupportedError(
                f"domain {plan.domain.name} has a managed save, whose guest cannot go on now: {gone}",
                hint="have it there again, as after a boot that gives devices these names, or discard the saved guest: "
                "virsh managedsave-remove",
            )
        if differing:
            raise UnsupportedError(
                f"domain {plan.domain.name} has a managed save, whose guest has other NVDIMMs than this definition: "
                f"{differing}",
                hint="start the domain, or discard the saved guest: virsh managedsave-remove",
            )

    def release(self, uuid: str) -> str:
        """Put away the domain's start. Can be repeated.

        :returns: why the start failed; empty when it did not.
        """
        record = self.ledger.find_domain(uuid)
        if record is None or record.start is None:
            return record.fault if record else ""
        if not self.starts.release(record):
            logs.tell(Event("dying", uuid, record.name, record.start.domid, {}))
        self.remove_leftovers()
        return record.fault

    def reconcile(self) -> None:
        """Put away the starts whose domains are gone."""
        self.starts.reconcile()
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove the files of domains that the ledger does not have any more: tables, counts of label requests."""
        folder = self.state_dir / "domains"
        found = [each.name for each in os.scandir(folder) if each.is_dir()] if folder.is_dir() else []
        known = self.ledger.uuids()  # after the look at the folder: a domain is in the ledger before it has files
        for uuid in found:
            with suppress(OSError):  # a full disk, on which nothing may fail for this
                if uuid not in known and not self.starts.label_servers.is_running(uuid):
                    shutil.rmtree(folder / uuid)

    def restart_lost(self) -> list[Record]:
        """Do what :meth:`.GuestProcesses.restart_lost` does; return who got a holder."""
        return self.guest_processes.restart_lost()

    def note_pools(self) -> None:
        """Note of all NVDIMMs what their pools say of them: the options, or the version, are new.

        Not of a device whose name a boot has given to another one: that may be in another pool.
        """
        places = self.pools.places()
        for record in self.ledger.domains():
            there = [item for item in record.allocations if not ownership.is_device(item) or self._is_there(item)]
            noted = [(item, self.pools.noted(item, places=places)) for item in there]
            new = [
                replace(now, wipes=now.wipes or item.wipes)
                for item, now in noted
                if now.pool != item.pool or now.wipes > item.wipes
            ]
            if new:
                self.ledger.note_pools(record.uuid, new)

    def _is_there(self, item: Allocation) -> bool:
        """Return True when what was provisioned is at its path."""
        return ownership.has_bytes([item], ownership.identity_at(self.backings, item.spec.path))

    def mark_devices(self) -> None:
        """Record on devices whose they are: an earlier version did not, or the records were lost.

        Those of a ledger from elsewhere have to be compared first.
        """
        if not self.ledger.is_from_elsewhere():
            for record in self.ledger.domains():
                self._mark_devices(record.uuid)

    def _mark_devices(self, uuid: str) -> None:
        """Do what :meth:`mark_devices` does for a domain, unless libvirt has one of its devices for another one.

        Nothing fails for that: 'nvdimmctl check' tells what has no mark.
        """
        try:
            if not self._with_devices(uuid):
                return
            with self.locks.storing(uuid):
                if record := self._with_devices(uuid):
                    self.checks.unknown.check(uuid, {item.spec.path: item.identity for item in record.allocations})
                    ownership.mark(self.ledger, self.backings, record)
        except NvdimmError as error:
            LOG.warning("devices of domain %s are not marked as its own: %s", uuid, error)

    def _with_devices(self, uuid: str) -> Record | None:
        """Return a domain with its devices alone; None if it has none."""
        record = self.ledger.find_domain(uuid)
        devices = tuple(item for item in (record.allocations if record else ()) if ownership.is_device(item))
        return replace(record, allocations=devices) if record and devices else None

    def renew_label_servers(self) -> list[tuple[Record, bool]]:
        """Replace the label servers that are older than the installed code; return their domains, and if that worked.

        That of a domain that was redefined since its start stays.
        """
        return self.guest_processes.renew_label_servers()

    def find_bad_blocks(self, item: Allocation) -> tuple[tuple[int, int], ...]:
        """Return the known bad blocks of an NVDIMM's backing, as (offset in it, bytes).

        :raises BackingError: when the backing cannot be located.
        """
        return self.planner.find_bad_blocks(item.spec)

    def measure_pool(self, pool: Pool) -> PoolUsage:
        """Return a pool's space and its use by domains."""
        return usage_of(pool, self.pools, self.ledger, self.backings)

    def label_server_state(self, record: Record) -> str | None:
        """Return ``running`` or ``gone``; None for a domain that needs no label server now."""
        if record.start is None or not record.start.served:
            return None
        return "running" if self.starts.label_servers.is_running(record.uuid) else "gone"

    def holder_state(self, record: Record) -> str | None:
        """Return ``running`` or ``gone``; None for a domain that has no start."""
        if record.start is None:
            return None
        return "running" if self.starts.holders.has(record.uuid) else "gone"

    def tables_file(self, uuid: str) -> Path:
        """Return the path of the tables of the domain's last start; the NFIT is the first table."""
        return self.state_dir / "domains" / uuid / "tables"

    def build_tables(self, record: Record) -> AcpiTables:
        """Build the tables that a start of a defined domain would use."""
        return self.acpi.build(self.planner.layout_around(record, record.ram))

    def read_guest_tables(self, record: Record) -> tuple[bytes, ...]:
        """Return all ACPI tables of a running guest, also those of its firmware; none for a domain that is off.

        :raises AcpiError: when they cannot be found in its memory, or one is invalid.
        """
        domid = self.starts.find_domid(record.start) if record.start else None  # in a backup, another guest has that
        return () if domid is None else find(partial(self.planner.mapper.read, domid))

    def take_up_running(self, record: Record, domid: int, frozen: Collection[str]) -> None:
        """Write the start of a running guest into the ledger, which has lost it.

        :param frozen: files that are frozen for it, without symbolic links.
        :raises BackingError: when one of them is not the domain's any more.
        :raises InUseError: when it may be starting still.
        """
        self.starts.check_not_mapping(record, domid)
        items = slots.in_guest([item for item in record.allocations if item.spec.path in frozen])
        had = replace(record, allocations=tuple(items), start=None)  # a repair that was killed has begun with fewer
        mappings, areas, nvdimms = self.planner.map_running(had, items)
        last = self.ledger.find_run(record.uuid)
        read = partial(self.planner.mapper.read, domid)
        run, has_number = saved_guest.run_of_guest(read, nvdimms, last, self.backings)
        served = had.labels if self.starts.label_servers.is_running(record.uuid) else ""
        paths = [item.spec.path for item in items]
        start = (record.uuid, record.start, domid, paths, mappings, areas)
        self.ledger.take_up_running(*start, served=served, run=run, is_numbered=has_number)
        self.restart_lost()

    def prepare_known(self, uuid: str) -> None:
        """Prepare a start for which no hook has run, such as that of a domain that ``xl`` has created.

        :raises LedgerError: when the domain was never defined.
        """
        known = self._find_known(uuid)
        if known is None:
            raise LedgerError(
                f"no NVDIMMs are known for domain {uuid}, whose device model is nvdimm-device-model",
                hint="define the domain in libvirt first; for xl, keep the uuid that libvirt has given it",
            )
        self.prepare(known)

    def _find_known(self, uuid: str) -> DomainSpec | None:
        """Return the domain as the ledger has it; None when it has no NVDIMMs."""
        record = self.ledger.find_domain(uuid)
        nvdimms = tuple(item.spec for item in record.allocations if not item.spec.set_aside) if record else ()
        if record is None or not nvdimms:
            return None
        return record.as_spec(nvdimms)

    def _prepare(self, record: Record, domain: DomainSpec, qemu: str) -> Plan:
        """Freeze the domain's backings and prepare its start. A failure here thaws them; an earlier one must not."""
        items = [item for item in record.allocations if item.spec in domain.nvdimms]
        number = saved_guest.new_number()
        start = self.starts.freeze(record.uuid, items, number)
        try:
            self._check_unchanged(record.uuid, items)
            plan = self.planner.plan_start(domain, record)
            located = zip(domain.nvdimms, plan.locations, strict=True)
            backings_of_start = [(spec.path, each.identity) for spec, each in located]
            hold = self.starts.hold_each if plan.layout.slots else self.starts.hold
            hold(record.uuid, record.name, backings_of_start)
            run = self._new_run(plan, number)
            self._write_tables(record.uuid, saved_guest.numbered(plan.tables.tables, run.number), plan.layout)
            has = replace(record, allocations=tuple(items))
            guest_frames = (plan.layout.highmem_end // PAGE, plan.layout.limit // PAGE)
            self.ledger.finish_preparing(
                start,
                qemu,
                guest_frames,
                plan.mappings,
                plan.areas,
                run=run,
                served=has.labels if plan.layout.label_clients else "",
                uncached=layout.label_frames(plan.layout),
                cache=plan.cache,
                hot_slots=len(plan.layout.slots),
                detail={"nvdimms": len(domain.nvdimms), **p2m.summary(plan.mappings)},
            )
        except BaseException:
            self.starts.put_away(start)
            raise
        return plan

    def _check_unchanged(self, uuid: str, items: Sequence[Allocation]) -> None:
        """Check that a start, which a define sees from now on, has NVDIMMs as they are defined now.

        :raises InUseError: when one was defined otherwise just before.
        """
        now = self.ledger.find_domain(uuid)
        if now is None or not {*items} <= {*now.allocations}:
            raise InUseError(f"domain {uuid} was defined anew while it was started", hint="start it again")

    def spoil_runs(self, identity: BackingIdentity, uuid: str | None = None) -> None:
        """Record that no guest which was saved with bytes of a backing can go on: something else writes them now.

        :param uuid: of the domain whose own guest does not count.
        """
        for each, run in self.ledger.runs().items():
            if each != uuid and saved_guest.has_bytes_of(run, identity):
                self.ledger.spoil_run(each, run.number)
        for record in self.ledger.claimants("", identity):
            if record.uuid != uuid and ownership.has_bytes(record.allocations, identity):
                self.ledger.spoil_unnumbered(record.uuid)

    def note_overwritten(self, identity: BackingIdentity) -> None:
        """Do what :meth:`spoil_runs` does; of a device, note it beside the ledger, too, which a backup may replace."""
        self.spoil_runs(identity)
        if not identity.inode:
            self.ledger.device_marks.note_run([identity], 0)

    def _new_run(self, plan: Plan, number: int) -> Run:
        """Return the run that a start of this plan begins; guests of other domains that had its bytes have no more."""
        for location in plan.locations:
            self.spoil_runs(location.identity, plan.domain.uuid)
        nvdimms = saved_guest.describe(plan.domain, plan.layout, plan.locations)
        return Run(number, nvdimms, saved_guest.times(self.backings, nvdimms))

    def _write_tables(self, uuid: str, tables: Sequence[bytes], guest: GuestLayout) -> None:
        """Write what the device model delivers to a guest that boots."""
        (nfit,) = (table for table in tables if table[:4] == b"NFIT")
        slots = hot_slots.pages(len(guest.slots), slot_records(guest, nfit)) if guest.slots else b""
        self.ledger.reserve.write(self.tables_file(uuid), b"".join(tables))
        self.ledger.reserve.write(self.state_dir / "domains" / uuid / "slots", slots)
