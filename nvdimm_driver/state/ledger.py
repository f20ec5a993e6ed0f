# SPDX-License-Identifier: Apache-2.0
"""The ledger: domains, allocations, starts, events and counters in an SQLite file.

Only this module, database.py and schema.py know SQL. The device model uses it and must start fast: model types are
imported where they are made.
"""

from __future__ import annotations

import time

from nvdimm_driver.errors import LedgerError, NvdimmError
from nvdimm_driver.host_text import escaped
from nvdimm_driver.state.database import Database
from nvdimm_driver.state.events import Event, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from nvdimm_driver.model import Allocation, Record, Run, Start
    from nvdimm_driver.state.events import Value

OWN_START = "uuid = ? AND state = ? AND domid IS ? AND boot_id = ? AND since = ?"
"""A start, by :attr:`.model.Start.key`."""
ALLOCATION_COLUMNS = (
    "slot, path, size, label_size, alignsize, fixed_base, node, pmem, "
    "kind, device, start, inode, generation, file_size, base, written"
)


def host_boot_id(path: str = "/proc/sys/kernel/random/boot_id") -> str:
    """Return the kernel's id of this boot of the host."""
    with open(path, encoding="ascii") as file:
        return file.read().strip()


class PreparedStart:
    """A prepared start, as the device model needs it. Frames are 4 KiB.

    :ivar mappings: (gfn, mfn, count).
    :ivar areas: pmem data areas of the host as (mfn, count).
    :ivar qemu: program that the device model becomes.
    :ivar label_server: the guest needs one.
    :ivar uncached: guest frames that must not be cached, as (gfn, count).
    :ivar run: number, nvdimms and written of the :class:`.model.Run` that it begins.
    """

    __slots__ = ("areas", "gfn_limit", "gfn_start", "label_server", "mappings", "name", "qemu", "run", "uncached")

    def __init__(
        self,
        name: str,
        qemu: str,
        gfn_start: int,
        gfn_limit: int,
        label_server: bool,
        mappings: list[tuple[int, int, int]],
        areas: list[tuple[int, int]],
        uncached: list[tuple[int, int]],
        run: tuple[int, str, str],
    ) -> None:
        self.run = run
        self.uncached = uncached
        self.name = name
        self.qemu = qemu
        self.gfn_start = gfn_start
        self.gfn_limit = gfn_limit
        self.label_server = label_server
        self.mappings = mappings
        self.areas = areas


class Ledger(Database):
    """The ledger. Every method is one transaction.

    :raises LedgerError: from every method, when the file cannot be read or written.
    """

    def domains(self) -> tuple[Record, ...]:
        """Return all domains in the ledger, by name."""
        return self._records("SELECT uuid FROM domain")

    def started_domains(self) -> tuple[Record, ...]:
        """Return all domains that have a start, by name."""
        return self._records("SELECT uuid FROM attachment")

    def find_domain(self, uuid: str) -> Record | None:
        """Return the domain, or None when the ledger does not know it."""
        records = self._records("SELECT ?", uuid)
        return records[0] if records else None

    def store(
        self,
        uuid: str,
        name: str,
        ram: int,
        allocations: Sequence[Allocation],
        *,
        dsm: str | None = None,
        kind: str = "",
    ) -> None:
        """Store the domain and its allocations, replacing those it had.

        :param kind: kind of the event to record; empty for none.
        """
        statements: list[tuple[str, Sequence[Any]]] = [
            (
                "INSERT INTO domain (uuid, name, ram, dsm) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (uuid) DO UPDATE SET name = excluded.name, ram = excluded.ram, dsm = excluded.dsm",
                (uuid, name, ram, dsm),
            ),
            ("DELETE FROM allocation WHERE uuid = ?", (uuid,)),
        ]
        statements += [
            (
                f"INSERT INTO allocation (uuid, {ALLOCATION_COLUMNS}) VALUES (?{', ?' * 16})",
                (uuid, *_allocation_values(item)),
            )
            for item in allocations
        ]
        size = sum(item.spec.size for item in allocations)
        event = Event(kind, uuid, name, None, {"nvdimms": len(allocations), "bytes": size}) if kind else None
        self._write(statements, event)

    def record_progress(self, uuid: str, slot: int, percent: int) -> None:
        """Record what percentage of an NVDIMM is written."""
        self._note([("UPDATE allocation SET written = ? WHERE uuid = ? AND slot = ?", (percent, uuid, slot))])

    def forget(self, uuid: str, *, kind: str = "") -> None:
        """Delete the domain with its allocations and its start; its events stay.

        :param kind: kind of the event to record; empty for none.
        """
        self._write_start([("DELETE FROM domain WHERE uuid = ?", (uuid,))], self._event(kind, uuid))

    def give_up(self, uuid: str, *, kind: str = "") -> None:
        """Delete the domain's allocations, and the domain, unless it has a start.

        :param kind: kind of the event to record; empty for none.
        """
        self._write(
            [
                ("DELETE FROM allocation WHERE uuid = ?", (uuid,)),
                ("DELETE FROM domain WHERE uuid = ? AND uuid NOT IN (SELECT uuid FROM attachment)", (uuid,)),
            ],
            self._event(kind, uuid),
        )

    def uuids(self) -> set[str]:
        """Return the uuids of all domains."""
        return {uuid for (uuid,) in self._rows("SELECT uuid FROM domain")}

    def forget_unused(self, uuid: str) -> None:
        """Delete the domain if it has neither allocations nor a start, nor a run from which a guest may be saved."""
        unused = " AND ".join(
            f"uuid NOT IN (SELECT uuid FROM {table})" for table in ("allocation", "attachment", "run")
        )
        self._write_start([(f"DELETE FROM domain WHERE uuid = ? AND {unused}", (uuid,))])

    def begin_start(self, uuid: str, paths: Sequence[str]) -> Start:
        """Record that a start begins and which paths will be frozen for it; clear the domain's fault.

        :raises LedgerError: when another process has deleted the domain.
        """
        from nvdimm_driver.model import Start

        start = Start(uuid, "preparing", None, host_boot_id(), int(time.time()), tuple(sorted(paths)))
        begun = self._write_start(
            [
                ("UPDATE domain SET fault = '' WHERE uuid = ?", (uuid,)),
                ("DELETE FROM attachment WHERE uuid = ?", (uuid,)),
                (
                    "INSERT INTO attachment (uuid, state, boot_id, since) VALUES (?, 'preparing', ?, ?)",
                    (uuid, start.boot_id, start.since),
                ),
                *[("INSERT INTO frozen VALUES (?, ?)", (uuid, path)) for path in paths],
            ],
            guarded=True,
        )
        if not begun:
            raise LedgerError(
                f"domain {uuid} was deleted from the ledger while it was started", hint="define it again, and start it"
            )
        return start

    def finish_preparing(
        self,
        uuid: str,
        qemu: str,
        guest_frames: tuple[int, int],
        mappings: Sequence[tuple[int, int, int]],
        areas: Sequence[tuple[int, int]],
        *,
        run: Run,
        served: str = "",
        uncached: Sequence[tuple[int, int]] = (),
        detail: Mapping[str, Value] | None = None,
    ) -> None:
        """Record that the start is prepared, with everything that the device model will do.

        :param guest_frames: first guest frame above the guest's RAM, first frame the guest cannot use.
        :param run: the run that it will begin.
        :param served: as in :class:`.model.Start`.
        :param detail: detail of the event.
        :raises LedgerError: when another process has put this start away, or prepared another.
        """
        prepared = self._write_start(
            [
                (
                    "UPDATE attachment SET state = 'prepared', since = ?, qemu = ?, gfn_start = ?, gfn_limit = ?, "
                    "served = ?, number = ?, nvdimms = ?, written = ? WHERE uuid = ? AND state = 'preparing'",
                    (int(time.time()), qemu, *guest_frames, served, *run, uuid),
                ),
                *[("INSERT INTO mapping VALUES (?, ?, ?, ?)", (uuid, *mapping)) for mapping in mappings],
                *[("INSERT INTO area VALUES (?, ?, ?)", (uuid, *area)) for area in areas],
                *[("INSERT INTO uncached VALUES (?, ?, ?)", (uuid, *run)) for run in uncached],
            ],
            self._event("prepared", uuid, detail),
            guarded=True,
        )
        if not prepared:
            raise _undone(uuid)

    def find_prepared(self, uuid: str) -> PreparedStart | None:
        """Return the domain's start that was prepared in this boot of the host and is not mapped yet, or None."""
        rows = self._rows(
            "SELECT name, qemu, gfn_start, gfn_limit, served, number, nvdimms, written FROM attachment "
            "JOIN domain USING (uuid) WHERE uuid = ? AND state = 'prepared' AND boot_id = ? AND number IS NOT NULL",
            uuid,
            host_boot_id(),
        )
        if not rows:
            return None
        mappings = self._rows("SELECT gfn, mfn, count FROM mapping WHERE uuid = ? ORDER BY gfn", uuid)
        areas = self._rows("SELECT mfn, count FROM area WHERE uuid = ?", uuid)
        uncached = self._rows("SELECT gfn, count FROM uncached WHERE uuid = ?", uuid)
        name, qemu, gfn_start, gfn_limit, served, *run = rows[0]
        return PreparedStart(name, qemu, gfn_start, gfn_limit, bool(served), mappings, areas, uncached, tuple(run))

    def find_run(self, uuid: str) -> Run | None:
        """Return the domain's last run, which may not be over; None when no version that numbers them has begun one."""
        from nvdimm_driver.model import Run

        rows = self._rows("SELECT number, nvdimms, written FROM run WHERE uuid = ?", uuid)
        return Run(*rows[0]) if rows else None

    def runs(self) -> dict[str, Run]:
        """Return the last run of each domain that has one, by uuid."""
        from nvdimm_driver.model import Run

        return {uuid: Run(*run) for uuid, *run in self._rows("SELECT uuid, number, nvdimms, written FROM run")}

    def spoil_run(self, uuid: str, number: int) -> None:
        """Record that a guest which was saved in this run of the domain, if it is the last one, can go on no more."""
        self._write([("UPDATE run SET number = 0 WHERE uuid = ? AND number = ?", (uuid, number))])

    def find_begun(self, start: Start) -> Run | None:
        """Return the run of a start whose end is not noted yet; None when it has none, or is not the domain's start."""
        from nvdimm_driver.model import Run

        rows = self._rows(
            f"SELECT number, nvdimms, written FROM attachment WHERE {OWN_START} AND number IS NOT NULL AND ended = 0",
            *start.key,
        )
        return Run(*rows[0]) if rows else None

    def note_end(self, start: Start, written: str) -> None:
        """Record when the backings of a start that is over were last written, before anything in the host can write."""
        statement = f"UPDATE attachment SET written = ?, ended = 1 WHERE {OWN_START} AND ended = 0"
        self._write_start([(statement, (written, *start.key))])

    def has_mapped(self, uuid: str, domid: int) -> bool:
        """Return True when the NVDIMMs were mapped into exactly this domid in this boot of the host."""
        return bool(
            self._rows(
                "SELECT 1 FROM attachment WHERE uuid = ? AND state = 'mapped' AND domid = ? AND boot_id = ?",
                uuid,
                domid,
                host_boot_id(),
            )
        )

    def frames_of_others(self, uuid: str) -> list[tuple[str, int, int]]:
        """Return the machine frames of all other domains' starts in this boot, as (domain name, mfn, count)."""
        return self._rows(
            "SELECT name, mfn, count FROM mapping JOIN attachment USING (uuid) JOIN domain USING (uuid) "
            "WHERE uuid != ? AND boot_id = ?",
            uuid,
            host_boot_id(),
        )

    def begin_mapping(self, uuid: str, domid: int) -> None:
        """Record that the device model is about to map.

        :raises LedgerError: when another process has put the start away.
        """
        statement = (
            "UPDATE attachment SET state = 'mapping', domid = ?, since = ?, ended = 0 WHERE uuid = ? AND domid IS NULL"
        )
        if not self._write_start([(statement, (domid, int(time.time()), uuid))], guarded=True):
            raise _undone(uuid)

    def find_ioreq_server(self, uuid: str) -> int | None:
        """Return Xen's id of the ioreq server that the domain's label server has created; None before."""
        rows = self._rows("SELECT ioreq_server FROM attachment WHERE uuid = ?", uuid)
        return rows[0][0] if rows else None

    def record_ioreq_server(self, uuid: str, server: int) -> None:
        """Record the id of the ioreq server that the domain's label server has created."""
        self._write_start([("UPDATE attachment SET ioreq_server = ? WHERE uuid = ?", (server, uuid))])

    def finish_mapping(self, uuid: str, seconds: float = 0.0, detail: Mapping[str, Value] | None = None) -> None:
        """Record that the device model has mapped the NVDIMMs, and that the domain starts: its run begins.

        :param seconds: how long mapping took.
        :param detail: detail of the event.
        :raises LedgerError: when another process has put the start away.
        """
        mapped = self._write_start(
            [
                (
                    "UPDATE attachment SET state = 'mapped', since = ? WHERE uuid = ? AND state = 'mapping'",
                    (int(time.time()), uuid),
                ),
                ("UPDATE domain SET fault = '' WHERE uuid = ?", (uuid,)),
                (
                    "INSERT OR REPLACE INTO run SELECT uuid, number, nvdimms, written FROM attachment "
                    "WHERE uuid = ? AND number IS NOT NULL",
                    (uuid,),
                ),
                _count("starts"),
                _count("map_seconds", seconds),
            ],
            self._event("started", uuid, detail),
            guarded=True,
        )
        if not mapped:
            raise _undone(uuid)

    def take_up_running(
        self,
        uuid: str,
        domid: int,
        paths: Sequence[str],
        mappings: Sequence[tuple[int, int, int]],
        areas: Sequence[tuple[int, int]],
        *,
        served: str,
    ) -> None:
        """Record the start of a domain that runs, after the ledger has lost it.

        :param paths: backings that are frozen for it.
        :param served: as in :class:`.model.Start`.
        """
        self._write(
            [
                ("DELETE FROM attachment WHERE uuid = ?", (uuid,)),
                (
                    "INSERT INTO attachment (uuid, state, domid, boot_id, since, served) "
                    "VALUES (?, 'mapped', ?, ?, ?, ?)",
                    (uuid, domid, host_boot_id(), int(time.time()), served),
                ),
                *[("INSERT INTO frozen VALUES (?, ?)", (uuid, path)) for path in paths],
                *[("INSERT INTO mapping VALUES (?, ?, ?, ?)", (uuid, *mapping)) for mapping in mappings],
                *[("INSERT INTO area VALUES (?, ?, ?)", (uuid, *area)) for area in areas],
            ]
        )

    def count_mapped(self) -> tuple[int, int]:
        """Return how many domains have their NVDIMMs mapped, and how many frames are mapped in all."""
        (found,) = self._rows(
            "SELECT count(DISTINCT uuid), coalesce(sum(count), 0) FROM attachment LEFT JOIN mapping USING (uuid) "
            "WHERE state = 'mapped'"
        )
        return found[0], found[1]

    def end_start(self, start: Start, *, kind: str = "") -> None:
        """Record that this start is over: nothing is frozen or mapped for it any more.

        Another start of the domain stays, and no event is recorded then: it may have begun meanwhile.

        :param kind: kind of the event to record; empty for none.
        """
        written = "SELECT written FROM attachment WHERE uuid = run.uuid AND number = run.number"
        self._write_start(
            [
                (f"UPDATE attachment SET ended = 1 WHERE {OWN_START}", start.key),
                (f"UPDATE run SET written = coalesce(({written}), written) WHERE uuid = ?", (start.uuid,)),
                ("DELETE FROM attachment WHERE uuid = ?", (start.uuid,)),
            ],
            self._event(kind, start.uuid, domid=start.domid),
            guarded=True,
        )

    def record_failure(self, uuid: str, error: Exception, domid: int | None = None) -> None:
        """Record that a start failed, unless the error was recorded already on its way up.

        :param uuid: the ledger need not know the domain; empty if its uuid is unknown, too.
        """
        if isinstance(error, NvdimmError):
            if error.recorded:
                return
            error.recorded = True
        self._note(
            [
                ("UPDATE domain SET fault = ? WHERE uuid = ?", (escaped(str(error)), uuid)),
                _count("start_failures", label=type(error).__name__),
            ],
            self._event("start-failed", uuid, failure(error), domid),
        )

    def clear_fault(self, uuid: str) -> None:
        """Clear the reason why the domain's last start failed."""
        self._note([("UPDATE domain SET fault = '' WHERE uuid = ?", (uuid,))])

    def count_harvest(self, seconds: float) -> None:
        """Count one harvest of ACPI tables from a QEMU, and the time that it took."""
        self._note([_count("harvests"), _count("harvest_seconds", seconds)])

    def record_event(self, kind: str, uuid: str, detail: Mapping[str, Value] | None = None) -> None:
        """Record an event that changes nothing else in the ledger."""
        self._note([], self._event(kind, uuid, detail))

    def events(self, after: int = 0) -> list[Event]:
        """Return the events whose id is greater than `after`, in order."""
        import json

        rows = self._rows("SELECT kind, uuid, name, domid, detail, id, time FROM event WHERE id > ? ORDER BY id", after)
        return [
            Event(kind, uuid, name, domid, json.loads(detail), id=number, time=seconds)
            for kind, uuid, name, domid, detail, number, seconds in rows
        ]

    def last_event(self) -> int:
        """Return the id of the last event; 0 when there is none."""
        return int(self._rows("SELECT coalesce(max(id), 0) FROM event")[0][0])

    def last_times(self) -> list[tuple[str, float]]:
        """Return the time of the last event of each kind, as (kind, seconds since the epoch)."""
        return self._rows("SELECT kind, max(time) FROM event GROUP BY kind ORDER BY kind")

    def counters(self) -> list[tuple[str, str, float]]:
        """Return all counters since the ledger was created, as (name, label, value)."""
        return self._rows("SELECT name, label, value FROM counter ORDER BY name, label")

    def _event(
        self, kind: str, uuid: str, detail: Mapping[str, Value] | None = None, domid: int | None = None
    ) -> Event | None:
        """Return an event with the domain's current name and domid; None without a kind."""
        if not kind:
            return None
        sql = "SELECT name, domid FROM domain LEFT JOIN attachment USING (uuid) WHERE uuid = ?"
        rows = self._rows(sql, uuid) or [("", None)]
        return Event(kind, uuid, rows[0][0], rows[0][1] if domid is None else domid, detail or {})

    def _records(self, uuids: str, *values: str) -> tuple[Record, ...]:
        """Return the domains whose uuids a query selects, with one query per table however many there are."""
        from nvdimm_driver.model import Record, Start

        def rows(columns: str, table: str, order: str) -> list[Any]:
            return self._rows(f"SELECT uuid, {columns} FROM {table} WHERE uuid IN ({uuids}) ORDER BY {order}", *values)

        allocations: dict[str, list[Allocation]] = {}
        for uuid, *row in rows(ALLOCATION_COLUMNS, "allocation", "slot"):
            allocations.setdefault(uuid, []).append(_allocation(uuid, row))
        frozen: dict[str, list[str]] = {}
        for uuid, path in rows("path", "frozen", "path"):
            frozen.setdefault(uuid, []).append(path)
        starts = {
            uuid: Start(uuid, state, domid, boot_id, since, tuple(frozen.get(uuid, ())), served)
            for uuid, state, domid, boot_id, since, served in rows(
                "state, domid, boot_id, since, served", "attachment", "uuid"
            )
        }
        return tuple(
            Record(uuid, name, ram, dsm, fault, tuple(allocations.get(uuid, ())), starts.get(uuid))
            for uuid, name, ram, dsm, fault in rows("name, ram, dsm, fault", "domain", "name")
        )


def _undone(uuid: str) -> LedgerError:
    return LedgerError(
        f"the start of domain {uuid} was undone by another process, or another start of it has begun",
        hint="start the domain again",
    )


def _count(name: str, amount: float = 1, *, label: str = "") -> tuple[str, Sequence[Any]]:
    """Return the statement that adds to a counter."""
    return (
        "INSERT INTO counter VALUES (?, ?, ?) ON CONFLICT (name, label) DO UPDATE SET value = value + excluded.value",
        (name, label, float(amount)),
    )


def _allocation_values(item: Allocation) -> tuple[Any, ...]:
    spec, identity = item.spec, item.identity
    wanted = (spec.slot, spec.path, spec.size, spec.label_size, spec.alignsize, spec.base, spec.node, int(spec.pmem))
    if identity is None:
        return (*wanted, *[None] * 6, item.base, item.written)
    found = (identity.kind, identity.device, identity.start, identity.inode, identity.generation, identity.size)
    return (*wanted, *found, item.base, item.written)


def _allocation(uuid: str, row: Sequence[Any]) -> Allocation:
    from nvdimm_driver.model import Allocation, BackingIdentity, NvdimmSpec

    slot, path, size, label_size, alignsize, fixed_base, node, pmem = row[:8]
    identity = None if row[8] is None else BackingIdentity(*row[8:14])
    spec = NvdimmSpec(slot, path, size, label_size, alignsize, fixed_base, node, bool(pmem))
    return Allocation(uuid, spec, identity, *row[14:])
