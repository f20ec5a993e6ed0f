"""The driver: one method for each event in the life of a domain with NVDIMMs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self
from uuid import uuid4

from oslo_config import cfg

from nvdimm_driver import claims, frames, layout, logs, marks, plugins
from nvdimm_driver.acpi.walk import find
from nvdimm_driver.backing.inventory import bad_ranges, namespaces, physical_address_bits
from nvdimm_driver.conf import configured_pools
from nvdimm_driver.contents import Contents
from nvdimm_driver.errors import BackingError, LayoutError, LedgerError, NvdimmError
from nvdimm_driver.events import Event
from nvdimm_driver.label_servers import LabelServers
from nvdimm_driver.ledger import Ledger
from nvdimm_driver.model import (
    GIB,
    PAGE,
    AcpiTables,
    Allocation,
    DomainSpec,
    NvdimmSpec,
    Plan,
    Pool,
    Progress,
    Record,
)
from nvdimm_driver.planning import Host, Planner
from nvdimm_driver.plugins import AcpiBuilder, Backing, Mapper, backing_of
from nvdimm_driver.pools import Pools
from nvdimm_driver.starts import Starts
from nvdimm_driver.usage import PoolUsage, usage_of


class XenNvdimmDriver:
    """NVDIMMs of Xen domains, from definition to release.

    :param qemu: what a domain's device model becomes, unless the domain names its own emulator.
    :param gap: bytes of guest-physical space to keep free behind the RAM.
    :param dsm: who serves label areas, for domains that do not say: one of :data:`.model.DSM`.
    :param pools: where domains may have their backings.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        state_dir: Path,
        backings: Sequence[Backing],
        acpi: AcpiBuilder,
        mapper: Mapper,
        host: Host,
        qemu: str,
        gap: int,
        dsm: str,
        pools: Pools,
    ) -> None:
        self.ledger = ledger
        self.state_dir = state_dir
        self.backings = backings
        self.acpi = acpi
        self.qemu = qemu
        self.pools = pools
        self.planner = Planner(ledger=ledger, backings=backings, acpi=acpi, mapper=mapper, host=host, gap=gap, dsm=dsm)
        self.starts = Starts(ledger, backings, mapper, LabelServers(state_dir))
        self.contents = Contents(ledger, backings, pools)

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        """Make the driver as the operator's configuration says.

        :raises ConfigError: when a plug-in is missing.
        :raises LedgerError: when there is no ledger and none can be made.
        """
        state_dir = Path(conf.state_dir)
        return cls(
            ledger=Ledger(str(state_dir / "ledger.sqlite"), logs.tell),
            state_dir=state_dir,
            backings=plugins.load_all("nvdimm_driver.backings", conf),
            acpi=plugins.load("nvdimm_driver.acpi_builders", conf.acpi.builder, conf),
            mapper=plugins.load("nvdimm_driver.mappers", conf.xen.mapper, conf),
            host=Host(namespaces, physical_address_bits(), bad_ranges),
            qemu=conf.xen.qemu,
            gap=conf.layout.gap_gib * GIB,
            dsm=conf.acpi.dsm,
            pools=Pools(configured_pools(conf), any_path=conf.allow_any_path),
        )

    def plan(self, domain: DomainSpec) -> Plan:
        """All that defining and starting the domain would do; nothing is done.

        :raises NvdimmError: what define or a start would raise.
        """
        domain = self.known(domain)
        claims.check_paths(self.ledger, domain)
        self.pools.check(domain, self.ledger.domains())
        return self.planner.assumed(domain, None if domain.uuid is None else self.ledger.domain(domain.uuid))

    def check(self, domain: DomainSpec) -> None:
        """Raise what :meth:`define` would raise before it does anything."""
        self.reconcile()
        self.plan(domain)

    def check_ram(self, uuid: str, ram: int) -> None:
        """Check that a defined domain could have so much RAM.

        :param ram: bytes.
        :raises LayoutError: when it reaches the NVDIMMs, whose places are kept.
        """
        record = self.ledger.domain(uuid)
        if record is None or not record.allocations:
            return
        guest = self.planner.around(record, ram)
        first = min(guest.nvdimms, key=lambda placement: placement.base)
        if guest.highmem_end > first.base:
            raise LayoutError(
                f"domain {record.name}: RAM of {ram} bytes reaches up to {guest.highmem_end:#x}, and its NVDIMM in "
                f"slot {first.slot} is at {first.base:#x}",
                hint="NVDIMMs keep their places; define the domain anew with a new uuid to have them placed again",
            )

    def identified(self, domain: DomainSpec) -> DomainSpec:
        """With a uuid: its own, that of the domain of that name that the ledger knows, or a new one."""
        known = self.known(domain)
        return known if known.uuid is not None else replace(domain, uuid=str(uuid4()))

    def define(self, domain: DomainSpec) -> tuple[NvdimmSpec, ...]:
        """Provision the domain's NVDIMMs and choose their places. Can be repeated, also with another spec.

        :param domain: with its uuid.
        :returns: those whose backings were created.
        :raises NvdimmError: nothing has changed then, save that unwritten parts of existing files hold real zeros.
        """
        uuid = _uuid(domain)
        self.plan(domain)
        before = self.ledger.domain(uuid)
        wanted = [Allocation(uuid, spec) for spec in domain.nvdimms]
        self.ledger.replace(uuid, domain.name, domain.ram, wanted, dsm=domain.dsm)
        created: list[NvdimmSpec] = []
        try:
            for spec in domain.nvdimms:
                backing = self._backing(spec)
                creates = backing.examine(spec).creates
                backing.provision(spec, self._progress(domain, spec))
                if creates:
                    created.append(spec)
            self._settle(uuid, domain, before)
        except BaseException:
            for spec in created:
                self._backing(spec).discard(spec)
            self._roll_back(uuid, before)
            raise
        return tuple(created)

    def undo(self, uuid: str, created: Sequence[NvdimmSpec]) -> None:
        """Undo :meth:`define` for a domain that libvirt then did not take: delete what it created.

        A domain that had all its backings before keeps its claim to them.
        """
        if created:
            self.forget(uuid)
        for spec in created:
            self._backing(spec).discard(spec)

    def drop(self, uuid: str) -> None:
        """A domain was redefined without NVDIMMs: give up its claims. What it runs with stays its own until it ends."""
        record = self.ledger.domain(uuid)
        if record is None:
            return
        if record.attachment is None:
            self.ledger.forget(uuid, kind="forgotten")
        else:
            self.ledger.replace(uuid, record.name, record.ram, [], kind="forgotten")
        self._unmark(record.allocations)

    def begin(self, uuid: str) -> Record | None:
        """Somebody is about to start the domain: why an earlier start failed is of no interest any more.

        :returns: None for a domain without NVDIMMs.
        """
        self.ledger.clear_fault(uuid)
        return self.ledger.domain(uuid)

    def prepare(self, domain: DomainSpec) -> None:
        """Make everything ready for a start: freeze, check, build the tables, write the plan for the device model.

        :raises NvdimmError: the reason is in the ledger too; nothing stays frozen.
        """
        uuid = _uuid(domain)
        try:
            self.reconcile()
            self.serve_labels()
            self.starts.check_ended(uuid)
            plan = self._prepare(self._adopt(uuid, domain), domain)
        except NvdimmError as error:
            self.ledger.failed(uuid, error)
            raise
        for spec, bad in zip(domain.nvdimms, plan.bad_blocks, strict=True):
            if bad:
                size = sum(length for _, length in bad)
                found = Event(
                    "bad-blocks", uuid, domain.name, None, {"path": spec.path, "bytes": size, "first": hex(bad[0][0])}
                )
                logs.tell(found)

    def release(self, uuid: str) -> str:
        """Put away what a start has left. Can be repeated.

        :returns: why the start failed, or an empty string when it did not.
        """
        record = self.ledger.domain(uuid)
        if record is None or record.attachment is None:
            return record.fault if record else ""
        if not self.starts.release(record):
            logs.tell(Event("dying", uuid, record.name, record.attachment.domid, {}))
        return record.fault

    def reconcile(self) -> None:
        """Put away what starts have left whose domains are gone."""
        self.starts.reconcile()

    def serve_labels(self) -> None:
        """Start label servers for the running guests whose own were killed."""
        self.starts.serve_labels()

    def bad_blocks(self, item: Allocation) -> tuple[tuple[int, int], ...]:
        """What the host knows to be bad of an NVDIMM's backing, as (offset in it, bytes).

        :raises BackingError: when the backing is not fit to be located.
        """
        return self.planner.bad_blocks(item.spec)

    def usage(self, pool: Pool) -> PoolUsage:
        """What a pool has, and who has what of it."""
        return usage_of(pool, self.ledger, self.backings)

    def label_server(self, record: Record) -> str | None:
        """``running`` or ``gone``; None for a domain that has none now."""
        if record.attachment is None or not record.attachment.served:
            return None
        return "running" if self.starts.label_servers.is_running(record.uuid) else "gone"

    def forget(self, uuid: str) -> Record:
        """Give up the domain's claim to its backings; their bytes stay.

        :raises InUseError: while the domain runs.
        :raises LedgerError: when there is no such domain.
        """
        self.reconcile()
        record = self.ledger.domain(uuid)
        if record is None:
            raise LedgerError(f"no domain {uuid} in the ledger", hint="'nvdimmctl list' shows all")
        claims.check_off(record)
        self.ledger.forget(uuid, kind="forgotten")
        self._unmark(record.allocations)
        return record

    def tables_file(self, uuid: str) -> Path:
        """Where the tables of the domain's last start are, NFIT first."""
        return self.state_dir / "domains" / uuid / "tables"

    def tables(self, record: Record) -> AcpiTables:
        """The tables that a start of a defined domain would make."""
        return self.acpi.build(self.planner.around(record, record.ram))

    def guest_tables(self, record: Record) -> tuple[bytes, ...]:
        """All ACPI tables that a running guest has, those of its firmware too; none for a domain that is off.

        :raises AcpiError: when they cannot be found in its memory, or one is wrong.
        """
        attachment = record.attachment
        if attachment is None or attachment.domid is None:
            return ()
        return find(partial(self.planner.mapper.read, attachment.domid))

    def prepare_known(self, uuid: str) -> None:
        """Prepare a start of which no hook has told: of a domain that ``xl`` has created.

        :raises LedgerError: when the domain was never defined.
        """
        record = self.ledger.domain(uuid)
        if record is None or not record.allocations:
            raise LedgerError(
                f"no NVDIMMs are known for domain {uuid}, whose device model is nvdimm-device-model",
                hint="define the domain in libvirt first; for xl, keep the uuid that libvirt has given it",
            )
        nvdimms = tuple(item.spec for item in record.allocations)
        self.prepare(DomainSpec(record.name, uuid, record.ram, None, nvdimms, record.dsm))

    def _prepare(self, record: Record, domain: DomainSpec) -> Plan:
        """From here on the domain's backings are its own: what fails now thaws them; what failed before must not."""
        paths = [spec.path for spec in domain.nvdimms]
        try:
            self.starts.freeze(record.uuid, paths)
            plan = self.planner.started(domain, record)
            self._write_tables(record.uuid, plan.tables.tables)
            guest_frames = (plan.layout.highmem_end // PAGE, plan.layout.limit // PAGE)
            self.ledger.prepared(
                record.uuid,
                domain.emulator or self.qemu,
                guest_frames,
                plan.mappings,
                plan.areas,
                served=record.labels if plan.layout.label_clients else "",
                uncached=layout.label_frames(plan.layout),
                detail={"nvdimms": len(domain.nvdimms), **frames.summary(plan.mappings)},
            )
        except BaseException:
            self.starts.put_away(record.uuid, paths)
            raise
        return plan

    def _settle(self, uuid: str, domain: DomainSpec, before: Record | None) -> None:
        """Write identities and bases, after everything is provisioned."""
        locations = self.planner.locate(domain)
        identities = {spec.path: at.identity for spec, at in zip(domain.nvdimms, locations, strict=True)}
        claims.check_bytes(self.ledger, uuid, identities)
        plan = self.planner.provisioned(domain, locations, before)
        self.ledger.replace(
            uuid,
            domain.name,
            domain.ram,
            [
                Allocation(uuid, spec, location.identity, placement.base)
                for spec, location, placement in zip(domain.nvdimms, locations, plan.layout.nvdimms, strict=True)
            ],
            dsm=domain.dsm,
            kind="defined",
        )
        self._mark(uuid, before)

    def _mark(self, uuid: str, before: Record | None) -> None:
        """Have the domain's backings say whose they are, and those that it had before say nothing any more."""
        record = self.ledger.domain(uuid)
        kept = record.allocations if record else ()
        for item in kept:
            if record:
                self._backing(item.spec).mark(item.spec.path, marks.pack(record, item))
        paths = {item.spec.path for item in kept}
        self._unmark(item for item in (before.allocations if before else ()) if item.spec.path not in paths)

    def _unmark(self, items: Iterable[Allocation]) -> None:
        for item in items:
            for backing in self.backings:
                if backing.handles(item.spec.path):
                    backing.mark(item.spec.path, None)

    def _adopt(self, uuid: str, domain: DomainSpec) -> Record:
        """The domain's record, after taking over NVDIMMs that were added or changed behind our back.

        A domain XML that was rewritten by hand and defined, or edited, never went through :meth:`define`. What is
        already provisioned is taken as it is; nothing is created here, where libvirt waits with a lock held.
        """
        record = self.ledger.domain(uuid)
        wanted = (domain.ram, domain.name, domain.dsm)
        if record is not None and (record.ram, record.name, record.dsm) == wanted:
            known = {item.spec: item for item in record.allocations if item.ready}
            if all(spec in known for spec in domain.nvdimms) and len(known) == len(domain.nvdimms):
                return record
        for spec in domain.nvdimms:
            intake = self._backing(spec).examine(spec)
            if intake.creates or intake.writes:
                raise BackingError(
                    f"domain {domain.name}: {spec.path} is not provisioned ({intake.writes} bytes are to be written)",
                    hint="define the domain with virsh, through nvdimmd",
                )
        self.define(domain)
        adopted = self.ledger.domain(uuid)
        if adopted is None:
            raise LedgerError(f"domain {uuid} vanished from the ledger")
        return adopted

    def known(self, domain: DomainSpec) -> DomainSpec:
        """With the uuid of the domain of that name, when the XML leaves it out and the ledger knows one."""
        known = [record.uuid for record in self.ledger.domains() if record.name == domain.name]
        return replace(domain, uuid=known[0]) if domain.uuid is None and known else domain

    def _progress(self, domain: DomainSpec, spec: NvdimmSpec) -> Progress:
        """What is told about writing the zeros of an NVDIMM: each percent to the ledger, each tenth to the log."""
        uuid, told = _uuid(domain), -1

        def tell(done: int, total: int) -> None:
            nonlocal told
            percent = 100 * done // total
            if percent == told:
                return
            if percent // 10 > told // 10:
                news = Event(
                    "provisioning", uuid, domain.name, None, {"path": spec.path, "written": done, "bytes": total}
                )
                logs.tell(news)
            told = percent
            self.ledger.progress(uuid, spec.slot, percent)

        return tell

    def _backing(self, spec: NvdimmSpec) -> Backing:
        return backing_of(self.backings, spec.path)

    def _roll_back(self, uuid: str, before: Record | None) -> None:
        if before is None:
            self.ledger.forget(uuid)
        else:
            self.ledger.replace(uuid, before.name, before.ram, before.allocations, dsm=before.dsm)

    def _write_tables(self, uuid: str, tables: Sequence[bytes]) -> None:
        path = self.tables_file(uuid)
        temporary = path.with_suffix(".new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_bytes(b"".join(tables))
            os.replace(temporary, path)
        except OSError as error:
            raise LedgerError(f"cannot write {path}: {error.strerror}", hint="is the disk full?") from error


def _uuid(domain: DomainSpec) -> str:
    if domain.uuid is None:
        raise LedgerError(f"domain {domain.name} has no uuid", hint="libvirt gives it one when it is defined")
    return domain.uuid
