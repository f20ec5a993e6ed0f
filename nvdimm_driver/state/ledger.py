# SPDX-License-Identifier: Apache-2.0
"""The ledger: domains, allocations, starts, events and counters in an SQLite file.

Only this module, start_steps.py, database.py and schema.py know SQL. The device model uses it and must start fast:
model types are imported where they are made.
"""

from __future__ import annotations

import time

from nvdimm_driver.errors import InUseError, NvdimmError
from nvdimm_driver.host_text import escaped
from nvdimm_driver.state.events import Event, failure
from nvdimm_driver.state.plug_steps import PlugSteps
from nvdimm_driver.state.start_steps import count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from nvdimm_driver.model import Allocation, BackingIdentity, DomainSpec, NvdimmSpec, Record
    from nvdimm_driver.state.events import Value

INTENT_COLUMNS = "slot, path, size, label_size, alignsize, fixed_base, node, pmem"
ALLOCATION_COLUMNS = (
    f"{INTENT_COLUMNS}, kind, device, start, inode, generation, file_size, base, written, changed, overwritten, "
    "deleted, wipes, renamed_from, pool, doubtful"
)


class Ledger(PlugSteps):
    """The ledger. Every method is one transaction.

    :raises LedgerError: from every method, when the file cannot be read or written.
    """

    def domains(self) -> tuple[Record, ...]:
        """Return all domains in the ledger, by name."""
        return self._records("SELECT uuid FROM domain")

    def each_domain(self) -> Iterator[Record]:
        """Yield all domains in the ledger, by name; read them when the first is asked for."""
        yield from self.domains()

    def started_domains(self) -> tuple[Record, ...]:
        """Return all domains that have a start, by name."""
        return self._records("SELECT uuid FROM attachment")

    def find_domain(self, uuid: str) -> Record | None:
        """Return the domain, or None when the ledger does not know it."""
        records = self._records("SELECT ?", uuid)
        return records[0] if records else None

    def named(self, name: str) -> tuple[Record, ...]:
        """Return all domains of that name."""
        return self._records("SELECT uuid FROM domain WHERE name = ?", name)

    def claimants(self, path: str, identity: BackingIdentity | None = None) -> tuple[Record, ...]:
        """Return the domains that may have, want or run with what is at a path, by name; others certainly do not.

        :param identity: of what is there; None if it is unknown, or only the path counts.
        """
        by_path = [f"SELECT uuid FROM {table} WHERE path = ?" for table in ("allocation", "intent", "frozen")]
        values: list[Any] = [path] * len(by_path)
        if identity is not None:  # a file shares bytes with no other file, but with the device that it is on
            by_path.append("SELECT uuid FROM allocation WHERE device IS ? AND (? = 0 OR inode IN (0, ?))")
            values += [identity.device, identity.inode, identity.inode]
        return self._records(" UNION ".join(by_path), *values)

    def store(
        self,
        uuid: str,
        name: str,
        ram: int,
        allocations: Sequence[Allocation],
        *,
        intents: Sequence[NvdimmSpec] = (),
        dsm: str | None = None,
        cache: str | None = None,
        hot_slots: int = 0,
        kind: str = "",
        check: Callable[[], None] = lambda: None,
        marked: Mapping[str, int] | None = None,
    ) -> None:
        """Store the domain and its allocations, replacing those it had, and what a define wants for it.

        An allocation that is not defined anew keeps the time of its last change if the domain has had the same bytes at
        that path. So one that is only set aside does not become later than a mark that the ledger, from a backup, does
        not know. One that is defined anew keeps it if nothing of it differs, and its mark is not later. What a release
        has noted stays with what is not defined anew, too.

        :param intents: what no other domain may have until the next call, beside the allocations.
        :param kind: kind of the event to record; empty for none.
        :param check: called in the transaction; raises what speaks against it.
        :param marked: of what is defined anew, the times in the marks, by path: what is stored instead is later.
        :raises InUseError: when another domain has one of the paths, or a define wants it for another.
        """
        before = self.find_domain(uuid)
        times = marked or {}
        had = {item.spec.path: item for item in (before.allocations if before else ())}

        def kept(item: Allocation) -> tuple[int | None, int, int]:
            """Return what stays of what the ledger has: the last change, and how far a release has come."""
            known = had.get(item.spec.path)
            if known is None or known.identity != item.identity:
                return None, 0, 0
            at = times.get(item.spec.path)
            if at is None:
                return known.changed, int(known.overwritten), int(known.deleted)
            return (known.changed if known == item and known.changed >= at else None), 0, 0

        statements: list[tuple[str, Sequence[Any]]] = [
            (
                "INSERT INTO domain (uuid, name, ram, dsm, cache, hot_slots) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (uuid) DO UPDATE SET name = excluded.name, ram = excluded.ram, dsm = excluded.dsm, "
                "cache = excluded.cache, hot_slots = excluded.hot_slots",
                (uuid, name, ram, dsm, cache, hot_slots),
            ),
            *_change(uuid, max(times.values(), default=0)),
            _spoil_without(uuid, allocations),
            ("DELETE FROM intent WHERE uuid = ?", (uuid,)),
            ("DELETE FROM allocation WHERE uuid = ?", (uuid,)),
        ]
        statements += [
            (
                f"INSERT INTO allocation (uuid, {ALLOCATION_COLUMNS}) "
                f"SELECT uuid{', ?' * 16}, coalesce(?, changed), ?, ?, ?, ?, ?, ? FROM domain WHERE uuid = ?",
                (*_allocation_values(item), *kept(item), *_noted_values(item), uuid),
            )
            for item in allocations
        ]
        statements += [_note_given_up(uuid), *(_intent(uuid, spec) for spec in intents)]
        size = sum(item.spec.size for item in allocations)
        event = Event(kind, uuid, name, None, {"nvdimms": len(allocations), "bytes": size}) if kind else None

        def check_all() -> None:
            self._check_paths(uuid, [item.spec.path for item in allocations])
            check()

        self._write(statements, event, check=check_all)

    def note_pools(self, uuid: str, items: Iterable[Allocation]) -> None:
        """Note what is known now of the pools of a domain's NVDIMMs."""
        sql = "UPDATE allocation SET wipes = ?, pool = ? WHERE uuid = ? AND slot = ? AND path = ?"
        self._write([(sql, (int(item.wipes), item.pool, uuid, item.spec.slot, item.spec.path)) for item in items])

    def doubt_names(self, devices: Iterable[tuple[str, int]]) -> None:
        """Note of devices, by uuid and slot, that the operator has to say whether their names here are right."""
        self._write([("UPDATE allocation SET doubtful = 1 WHERE uuid = ? AND slot = ?", key) for key in devices])

    def note_overwritten(self, uuid: str, slots: Iterable[int]) -> None:
        """Note that a release has overwritten NVDIMMs of a domain, until the next define or start of them begins."""
        self._write(
            [("UPDATE allocation SET overwritten = 1 WHERE uuid = ? AND slot = ?", (uuid, each)) for each in slots]
        )

    def note_deleted(self, uuid: str, slot: int, *, deleted: bool = True) -> None:
        """Note that a release deletes an NVDIMM of a domain, until the next define or start of it begins.

        :param deleted: False if it has not been deleted.
        """
        self._write([("UPDATE allocation SET deleted = ? WHERE uuid = ? AND slot = ?", (int(deleted), uuid, slot))])

    def rename_devices(self, names: Mapping[tuple[str, int], str], check: Callable[[], None]) -> None:
        """Give devices that domains have other names: all at once, as they may have each other's.

        :param names: paths, by uuid and slot.
        :param check: called in the transaction; raises what speaks against it.
        """
        free = (
            "UPDATE allocation SET renamed_from = coalesce(nullif(renamed_from, ''), path), path = ? "
            "WHERE uuid = ? AND slot = ?"
        )
        take = (
            "UPDATE allocation SET path = ?1, doubtful = 0, "
            "renamed_from = CASE renamed_from WHEN ?1 THEN '' ELSE renamed_from END "
            "WHERE uuid = ?2 AND slot = ?3"
        )
        statements = [(free, (f"{uuid}:{slot}", uuid, slot)) for uuid, slot in names]  # a path is one domain's
        self._write([*statements, *((take, (path, *key)) for key, path in names.items())], check=check)

    def begin_define(self, domain: DomainSpec, check: Callable[[], None]) -> None:
        """Record what a define wants for a domain, beside what the domain has, until :meth:`store` or another call.

        :param domain: with its uuid.
        :param check: called in the transaction; raises what speaks against it.
        """
        uuid = domain.uuid or ""
        statements: list[tuple[str, Sequence[Any]]] = [
            (
                "INSERT INTO domain (uuid, name, ram, dsm, cache, hot_slots) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (uuid) DO NOTHING",
                (uuid, domain.name, domain.ram, domain.dsm, domain.cache, domain.hot_slots),
            ),
            ("DELETE FROM intent WHERE uuid = ?", (uuid,)),
        ]
        statements += [_intent(uuid, spec) for spec in domain.nvdimms]
        self._write(statements, check=check)

    def give_up_intents(self, uuid: str) -> None:
        """Delete what a define wanted for a domain, and the domain if it has nothing else."""
        self._write_start([("DELETE FROM intent WHERE uuid = ?", (uuid,))])
        self.forget_unused(uuid)

    def _check_paths(self, uuid: str, paths: Sequence[str]) -> None:
        for table in ("allocation", "intent"):
            for path in paths:
                sql = f"SELECT name, uuid FROM {table} JOIN domain USING (uuid) WHERE path = ? AND uuid != ?"
                for name, other in self._rows(sql, path, uuid):
                    raise InUseError(f"{path} belongs to domain {name} ({other})", hint="see 'nvdimmctl list'")

    def record_progress(self, uuid: str, slot: int, percent: int) -> None:
        """Record what percentage of an NVDIMM is written that a define wants."""
        self._note([("UPDATE intent SET written = ? WHERE uuid = ? AND slot = ?", (percent, uuid, slot))])

    def forget(self, uuid: str, *, kind: str = "") -> None:
        """Delete the domain with its allocations and its start; its events stay.

        :param kind: kind of the event to record; empty for none.
        """
        self._write_start([("DELETE FROM domain WHERE uuid = ?", (uuid,))], self._event(kind, uuid))

    def give_up(self, uuid: str, *, kind: str = "", check: Callable[[], None] = lambda: None) -> None:
        """Delete the domain's allocations, what a define wants for it, and the domain, unless it has a start.

        :param kind: kind of the event to record; empty for none.
        :param check: called in the transaction; raises what speaks against it.
        """
        self._write(
            [
                *_change(uuid),
                _spoil_without(uuid, ()),
                ("DELETE FROM allocation WHERE uuid = ?", (uuid,)),
                _note_given_up(uuid),
                ("DELETE FROM intent WHERE uuid = ?", (uuid,)),
                ("DELETE FROM domain WHERE uuid = ? AND uuid NOT IN (SELECT uuid FROM attachment)", (uuid,)),
            ],
            self._event(kind, uuid),
            check=check,
        )

    def uuids(self) -> set[str]:
        """Return the uuids of all domains."""
        return {uuid for (uuid,) in self._rows("SELECT uuid FROM domain")}

    def forget_unused(self, uuid: str) -> None:
        """Delete the domain if it has and wants no NVDIMM, and has no start, nor a run whose guest may be saved."""
        unused = " AND ".join(
            f"uuid NOT IN (SELECT uuid FROM {table})" for table in ("allocation", "intent", "attachment", "run")
        )
        self._write_start([(f"DELETE FROM domain WHERE uuid = ? AND {unused}", (uuid,))])

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
                count("start_failures", label=type(error).__name__),
            ],
            self._event("start-failed", uuid, failure(error), domid),
        )

    def clear_fault(self, uuid: str) -> None:
        """Clear the reason why the domain's last start failed."""
        self._note([("UPDATE domain SET fault = '' WHERE uuid = ?", (uuid,))])

    def count_harvest(self, seconds: float) -> None:
        """Count one harvest of ACPI tables from a QEMU, and the time that it took."""
        self._note([count("harvests"), count("harvest_seconds", seconds)])

    def record_event(self, kind: str, uuid: str, detail: Mapping[str, Value] | None = None) -> None:
        """Record an event that changes nothing else in the ledger."""
        self._note([], self._event(kind, uuid, detail))

    def record_marks(self, uuid: str, marked: Iterable[tuple[str, str]]) -> None:
        """Record an event for each mark that is written over from now on; :meth:`marks_after` returns them."""
        for path, mark in marked:
            self._write([], self._event("mark-found", uuid, {"path": path, "mark": mark}))

    def marks_after(self, uuid: str, event: int) -> list[tuple[str, str]]:
        """Return path and mark of the files of a domain for which :meth:`record_marks` was called after an event."""
        found = [each.detail for each in self.events(event) if (each.kind, each.uuid) == ("mark-found", uuid)]
        return [(str(each["path"]), str(each["mark"])) for each in found]

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

    def _records(self, uuids: str, *values: Any) -> tuple[Record, ...]:
        """Return the domains whose uuids a query selects, with one query per table however many there are."""
        from nvdimm_driver.model import Allocation, Record, Start

        def rows(columns: str, table: str, order: str) -> list[Any]:
            return self._rows(f"SELECT uuid, {columns} FROM {table} WHERE uuid IN ({uuids}) ORDER BY {order}", *values)

        allocations: dict[str, list[Allocation]] = {}
        for uuid, *row in rows(ALLOCATION_COLUMNS, "allocation", "slot"):
            allocations.setdefault(uuid, []).append(_allocation(uuid, row))
        intents: dict[str, list[Allocation]] = {}
        for uuid, *wanted, written in rows(f"{INTENT_COLUMNS}, written", "intent", "slot"):
            intents.setdefault(uuid, []).append(Allocation(uuid, _spec(wanted), written=written))
        frozen: dict[str, list[str]] = {}
        for uuid, path in rows("path", "frozen", "path"):
            frozen.setdefault(uuid, []).append(path)
        starts = {
            uuid: Start(
                uuid, state, domid, boot_id, since, tuple(frozen.get(uuid, ())), served, identifier, bool(ended), *more
            )
            for uuid, state, domid, boot_id, since, served, identifier, ended, *more in rows(
                "state, domid, boot_id, since, served, id, ended, cache, hot_slots", "attachment", "uuid"
            )
        }
        return tuple(
            Record(
                *(uuid, name, ram, dsm, fault, tuple(allocations.get(uuid, ()))),
                *(starts.get(uuid), tuple(intents.get(uuid, ())), changed, *more),
            )
            for uuid, name, ram, dsm, fault, changed, *more in rows(
                "name, ram, dsm, fault, changed, cache, hot_slots", "domain", "name"
            )
        )


def _change(uuid: str, last: int = 0) -> list[tuple[str, Sequence[Any]]]:
    """Return the statements that note when a domain's allocations were changed: later than each change before.

    :param last: a time before; the clock may have been ahead then.
    """
    return [
        ("UPDATE latest SET changed = max(?, changed + 1)", (max(time.time_ns(), last + 1),)),
        ("UPDATE domain SET changed = (SELECT changed FROM latest) WHERE uuid = ?", (uuid,)),
    ]


def _note_given_up(uuid: str) -> tuple[str, Sequence[Any]]:
    """Return the statement that notes when a domain has given up what its start has, after :func:`_change`."""
    return (
        "UPDATE frozen SET given_up = CASE WHEN path NOT IN (SELECT path FROM allocation WHERE uuid = frozen.uuid) "
        "THEN coalesce(nullif(given_up, 0), (SELECT changed FROM domain WHERE uuid = frozen.uuid)) "
        "ELSE given_up * 0 END WHERE uuid = ?",  # 0 once it was given back; null remains null
        (uuid,),
    )


def _spoil_without(uuid: str, items: Sequence[Allocation]) -> tuple[str, Sequence[Any]]:
    """Return the statement that does what :meth:`.Ledger.spoil_unnumbered` does if a domain gives up what it had.

    One in another slot is not given up: the guest's tables are compared with the slots when it comes back.

    :param items: what the domain has from now on.
    """
    kept = [item.identity for item in items if item.identity is not None]
    same = " OR ".join(["(device, start, inode, generation) = (?, ?, ?, ?)"] * len(kept))
    sql = (
        "UPDATE unnumbered SET spoiled = 1 WHERE uuid = ? AND uuid IN (SELECT uuid FROM allocation WHERE kind IS NOT "
        f"NULL AND NOT ({same or '0'}))"
    )
    files = [(each.device, each.start, each.inode, each.generation) for each in kept]
    return sql, (uuid, *(value for file in files for value in file))


def _intent(uuid: str, spec: NvdimmSpec) -> tuple[str, Sequence[Any]]:
    """Return the statement that writes an intent."""
    sql = f"INSERT INTO intent (uuid, {INTENT_COLUMNS}, written) VALUES (?{', ?' * 8}, 0)"
    return sql, (uuid, *_wanted_values(spec))


def _wanted_values(spec: NvdimmSpec) -> tuple[Any, ...]:
    return spec.slot, spec.path, spec.size, spec.label_size, spec.alignsize, spec.base, spec.node, int(spec.pmem)


def _spec(row: Sequence[Any]) -> NvdimmSpec:
    from nvdimm_driver.model import NvdimmSpec

    slot, path, size, label_size, alignsize, fixed_base, node, pmem = row
    return NvdimmSpec(slot, path, size, label_size, alignsize, fixed_base, node, bool(pmem))


def _allocation_values(item: Allocation) -> tuple[Any, ...]:
    wanted, identity = _wanted_values(item.spec), item.identity
    if identity is None:
        return (*wanted, *[None] * 6, item.base, item.written)
    found = (identity.kind, identity.device, identity.start, identity.inode, identity.generation, identity.size)
    return (*wanted, *found, item.base, item.written)


def _noted_values(item: Allocation) -> tuple[Any, ...]:
    return int(item.wipes), item.renamed_from, item.pool, int(item.doubtful)


def _allocation(uuid: str, row: Sequence[Any]) -> Allocation:
    from nvdimm_driver.model import Allocation, BackingIdentity

    identity = None if row[8] is None else BackingIdentity(*row[8:14])
    base, written, changed, overwritten, deleted, wipes, renamed_from, pool, doubtful = row[14:]
    return Allocation(
        *(uuid, _spec(row[:8]), identity, base, written, changed),
        *(bool(wipes), bool(overwritten), renamed_from, pool, bool(doubtful), bool(deleted)),
    )
