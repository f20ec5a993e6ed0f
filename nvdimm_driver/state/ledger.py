# SPDX-License-Identifier: Apache-2.0
"""The ledger: domains, allocations, starts, events and counters in an SQLite file.

Only this module and schema.py know SQL. The device model uses it and must start fast: model types are imported where
they are made.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time

from nvdimm_driver.errors import DamagedLedgerError, FullDiskError, LedgerError, NvdimmError
from nvdimm_driver.host_text import escaped
from nvdimm_driver.state.events import Event, failure, unheard
from nvdimm_driver.state.reserve import Reserve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from nvdimm_driver.model import Allocation, Record, Run, Start
    from nvdimm_driver.state.events import Value

SCHEMA_VERSION = 4
"""How many versions :mod:`.schema` has. It is imported only for a ledger that has another."""
KEPT_EVENTS = 10_000
"""Older events are deleted."""
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
"""SQLite's errors on a full disk. It calls the second, for the index of its write-ahead log, "disk I/O error"."""
FOREIGN = "PRAGMA foreign_key_check"
REBUILD = "'nvdimmctl check --repair' keeps the damaged file under another name, and makes a new one from the marks"
"""Hint for a damaged ledger."""
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


class Ledger:
    """The ledger file, created if it does not exist. Every method is one transaction.

    :param path: file in an existing folder; ``:memory:`` for a ledger that is not kept.
    :param tell: called with each event after it is written.
    :raises LedgerError: from every method, when the file cannot be read or written.
    :ivar reserve: space for what a start needs; whoever wants it kept calls its ``keep``.
    """

    def __init__(self, path: str, tell: Callable[[Event], None] = unheard) -> None:
        self.path = path
        self._tell = tell
        self.reserve = Reserve(f"{path}-reserve")
        try:
            self._db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        except sqlite3.Error as error:
            raise LedgerError(
                f"cannot open {self.path}: {error}", hint="run 'nvdimmctl register' as root first"
            ) from error
        self._write([("PRAGMA foreign_keys = ON", ())], begin="")
        if self._rows("PRAGMA user_version")[0][0] != SCHEMA_VERSION:
            self._create()

    def check_integrity(self) -> None:
        """Check all of the file.

        :raises DamagedLedgerError: when it is damaged.
        """
        found = [str(row[0]) for row in self._rows("PRAGMA integrity_check(3)")]
        if found == ["ok"]:
            found = [f"{table} refers to a {parent} that is not there" for table, _, parent, _ in self._rows(FOREIGN)]
        if found:
            raise DamagedLedgerError(f"{self.path} is damaged: {'; '.join(found)}", hint=REBUILD)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

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

    def spoil_run(self, uuid: str) -> None:
        """Record that a guest which was saved in the domain's last run can go on no more."""
        self._write([("UPDATE run SET number = 0 WHERE uuid = ?", (uuid,))])

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
        statement = "UPDATE attachment SET state = 'mapping', domid = ?, since = ? WHERE uuid = ? AND domid IS NULL"
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

    def _create(self) -> None:
        from nvdimm_driver.state.schema import SCHEMAS

        found = self._rows("PRAGMA user_version")[0][0]
        if found > SCHEMA_VERSION:
            raise LedgerError(
                f"{self.path} has schema version {found}, this nvdimm_driver knows {SCHEMA_VERSION}",
                hint="a newer nvdimm_driver wrote it: install that version again",
            )
        # If two processes turn on WAL at the same time, SQLite fails one with "locked", whatever the timeout.
        import fcntl

        folder = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            found = self._rows("PRAGMA user_version")[0][0]
            if found == SCHEMA_VERSION:
                return  # another process was first
            self._write([("PRAGMA journal_mode = WAL", ())], begin="")
            statements = [part for schema in SCHEMAS[found:] for part in schema.split(";\n") if part.strip()]
            self._write([*[(part, ()) for part in statements], (f"PRAGMA user_version = {SCHEMA_VERSION}", ())])
        finally:
            os.close(folder)

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        """Return what a query finds. On a full disk, SQLite has no room for its index of the write-ahead log."""
        return self.reserve.spend(lambda: self._read(sql, values))

    def _read(self, sql: str, values: Sequence[Any]) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed("read", error) from error

    def _write_start(
        self, statements: Sequence[tuple[str, Sequence[Any]]], event: Event | None = None, *, guarded: bool = False
    ) -> bool:
        """Write what a start or its end needs, from the reserve if the disk is full; the event only if it fits, too."""
        try:
            return self.reserve.spend(lambda: self._write(statements, event, guarded=guarded))
        except FullDiskError:
            if event is None:
                raise
            written = self._write(statements, guarded=guarded)
            if written:
                self._tell(event)
            return written

    def _note(self, statements: Sequence[tuple[str, Sequence[Any]]], event: Event | None = None) -> None:
        """Write what nothing depends on; if that fails, only tell the event."""
        try:
            self._write(statements, event)
        except LedgerError:
            if event is not None:
                self._tell(event)

    def _write(
        self,
        statements: Sequence[tuple[str, Sequence[Any]]],
        event: Event | None = None,
        *,
        begin: str = "BEGIN IMMEDIATE",
        guarded: bool = False,
    ) -> bool:
        """Execute the statements in one transaction, and record the event.

        :param guarded: do nothing, and return False, when the first statement changes no row.
        """
        try:
            if begin:
                self._db.execute(begin)
            for number, (sql, values) in enumerate([*statements, *_recording(event)]):
                changed = self._db.execute(sql, values).rowcount
                if guarded and number == 0 and changed != 1:
                    self._db.execute("ROLLBACK")
                    return False
            if begin:
                self._db.execute("COMMIT")
        except (sqlite3.Error, UnicodeEncodeError) as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._failed("write", error) from error
        if event is not None:
            self._tell(event)
        return True

    def _failed(self, what: str, error: sqlite3.Error | UnicodeEncodeError) -> LedgerError:
        """Return the error for a query or a transaction that failed."""
        if isinstance(error, UnicodeEncodeError):
            return LedgerError(
                f"{self.path} cannot have '{escaped(error.object)}': it is not UTF-8", hint="rename the file"
            )
        extended = getattr(error, "sqlite_errorcode", 0)
        code = extended & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return DamagedLedgerError(f"{self.path} is damaged: {error}", hint=REBUILD)
        if extended in FULL:
            return FullDiskError(f"cannot {what} {self.path}: the disk is full", hint="make room, and try again")
        if "readonly" in str(error) or not os.access(os.path.dirname(self.path) or ".", os.W_OK):
            return LedgerError(f"cannot {what} {self.path}: {error}", hint="run as root")
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):  # a file beside it cannot be made or written
            return FullDiskError(f"cannot {what} {self.path}: {error}", hint="is the disk full?")
        return LedgerError(f"cannot {what} {self.path}: {error}")


def _undone(uuid: str) -> LedgerError:
    return LedgerError(
        f"the start of domain {uuid} was undone by another process, or another start of it has begun",
        hint="start the domain again",
    )


def set_aside(path: str) -> str:
    """Rename a damaged ledger, so that the next who opens it makes a new one; return its new name.

    :raises LedgerError: when it cannot be renamed.
    """
    aside = f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    try:
        if os.path.exists(aside):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        # The write-ahead log first: it must not be taken for that of the new ledger.
        for suffix in ("-wal", "-shm", ""):
            if os.path.exists(path + suffix):
                os.rename(path + suffix, aside + suffix)
    except OSError as error:
        raise LedgerError(f"{path} cannot be renamed to {aside}: {error.strerror}", hint="try again") from error
    return aside


def _recording(event: Event | None) -> list[tuple[str, Sequence[Any]]]:
    """Return the statements that write an event. SQLite makes the JSON: importing json takes longer than the rest."""
    if event is None:
        return []
    pairs = [escaped(part) if isinstance(part, str) else part for pair in event.detail.items() for part in pair]
    return [
        (
            "INSERT INTO event (time, kind, uuid, name, domid, detail) "
            f"VALUES (?, ?, ?, ?, ?, json_object({', '.join('?' * len(pairs))}))",
            (time.time(), event.kind, event.uuid, event.name, event.domid, *pairs),
        ),
        ("DELETE FROM event WHERE id <= (SELECT max(id) FROM event) - ?", (KEPT_EVENTS,)),
    ]


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
