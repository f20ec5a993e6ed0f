# SPDX-License-Identifier: Apache-2.0
"""The steps of starts in the ledger: the only place that changes the state of a start.

``preparing`` → ``prepared`` → ``mapping`` → ``mapped``, and from each of them to its end. A step names the start, by
its random id, and the state that it is in. It is refused if the start is in another one, is over, or is not the
domain's start any more: of two processes that do the same step, one does it. The device model uses this module.
"""

from __future__ import annotations

import os
import time

from nvdimm_driver.errors import InUseError, LedgerError
from nvdimm_driver.state.database import Database
from nvdimm_driver.state.events import Event

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from nvdimm_driver.model import BackingIdentity, Run, Start
    from nvdimm_driver.state.events import Value

ABANDONED_SECONDS = 600
"""A start that was prepared this long ago is given up, if no device model has taken it and Xen has no such domain."""
THIS_START = "uuid = ? AND id = ? AND state = ?"
"""A start in a state, by :attr:`.model.Start.key`."""


def host_boot_id(path: str = "/proc/sys/kernel/random/boot_id") -> str:
    """Return the kernel's id of this boot of the host."""
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def seconds_since_boot() -> int:
    """Return the seconds since the host's boot, those of its sleep too. Nobody can set this clock."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


class PreparedStart:
    """A prepared start, as the device model needs it. Frames are 4 KiB.

    :ivar key: as :attr:`.model.Start.key`.
    :ivar mappings: (gfn, mfn, count).
    :ivar areas: pmem data areas of the host as (mfn, count).
    :ivar qemu: program that the device model becomes.
    :ivar label_server: the guest needs one.
    :ivar uncached: guest frames that must not be cached, as (gfn, count).
    :ivar cache: what is asked for, one of :data:`.caching.CACHES`.
    :ivar run: number, nvdimms and written of the :class:`.model.Run` that it begins.
    """

    __slots__ = (
        "areas",
        "cache",
        "gfn_limit",
        "gfn_start",
        "key",
        "label_server",
        "mappings",
        "name",
        "qemu",
        "run",
        "uncached",
    )

    def __init__(
        self,
        key: tuple[str, str, str],
        name: str,
        qemu: str,
        gfn_start: int,
        gfn_limit: int,
        label_server: bool,
        mappings: list[tuple[int, int, int]],
        areas: list[tuple[int, int]],
        uncached: list[tuple[int, int]],
        run: tuple[int, str, str],
        cache: str = "auto",
    ) -> None:
        self.key = key
        self.run = run
        self.cache = cache
        self.uncached = uncached
        self.name = name
        self.qemu = qemu
        self.gfn_start = gfn_start
        self.gfn_limit = gfn_limit
        self.label_server = label_server
        self.mappings = mappings
        self.areas = areas


class StartSteps(Database):
    """The starts of domains. Every method is one transaction.

    :raises LedgerError: from every method, when the file cannot be read or written.
    """

    # --- steps ---

    def begin_start(self, uuid: str, paths: Sequence[str], number: int | None = None) -> Start:
        """Record that a start begins and which paths will be frozen for it; clear the domain's fault.

        :param number: of the run that it will begin.
        :raises LedgerError: when another process has deleted the domain.
        :raises InUseError: when the domain has a start, which has to be put away first.
        """
        from nvdimm_driver.model import Start

        identifier = os.urandom(8).hex()
        start = Start(
            uuid, "preparing", None, host_boot_id(), seconds_since_boot(), tuple(sorted(paths)), id=identifier
        )
        begun = self._write_start(
            [
                (
                    "INSERT INTO attachment (uuid, id, state, boot_id, since, number) SELECT uuid, ?, ?, ?, ?, ? FROM "
                    "domain WHERE uuid = ? AND uuid NOT IN (SELECT uuid FROM attachment)",
                    (identifier, start.state, start.boot_id, start.since, number, uuid),
                ),
                ("UPDATE domain SET fault = '' WHERE uuid = ?", (uuid,)),
                *have(uuid, paths),
            ],
            guarded=True,
        )
        if begun:
            return start
        if self._rows("SELECT 1 FROM domain WHERE uuid = ?", uuid):
            raise InUseError(f"domain {uuid} has another start, which has begun just now", hint="see 'nvdimmctl list'")
        raise LedgerError(
            f"domain {uuid} was deleted from the ledger while it was started", hint="define it again, and start it"
        )

    def finish_preparing(
        self,
        start: Start,
        qemu: str,
        guest_frames: tuple[int, int],
        mappings: Sequence[tuple[int, int, int]],
        areas: Sequence[tuple[int, int]],
        *,
        run: Run,
        served: str = "",
        uncached: Sequence[tuple[int, int]] = (),
        cache: str = "auto",
        hot_slots: int = 0,
        detail: Mapping[str, Value] | None = None,
    ) -> None:
        """Record that the start is prepared, with everything that the device model will do.

        :param start: as :meth:`begin_start` has returned it.
        :param guest_frames: first guest frame above the guest's RAM, first frame the guest cannot use.
        :param run: the run that it will begin.
        :param served: as in :class:`.model.Start`.
        :param cache: what is asked for, one of :data:`.caching.CACHES`.
        :param hot_slots: as in :class:`.model.Start`.
        :param detail: detail of the event.
        :raises LedgerError: when another process has put this start away.
        """
        uuid = start.uuid
        self._advance(
            start.key,
            "prepared",
            {
                "qemu": qemu,
                "gfn_start": guest_frames[0],
                "gfn_limit": guest_frames[1],
                "served": served,
                "number": run.number,
                "nvdimms": run.nvdimms,
                "written": run.written,
                "cache": cache,
                "hot_slots": hot_slots,
            },
            [
                *[("INSERT INTO mapping VALUES (?, ?, ?, ?)", (uuid, *mapping)) for mapping in mappings],
                *[("INSERT INTO area VALUES (?, ?, ?)", (uuid, *area)) for area in areas],
                *[("INSERT INTO uncached VALUES (?, ?, ?)", (uuid, *frames)) for frames in uncached],
            ],
            self._event("prepared", uuid, detail),
        )

    def begin_mapping(self, start: PreparedStart, domid: int) -> None:
        """Record that the device model of that domid is about to map. Another one of the domain cannot do so, too.

        :raises LedgerError: when another process has put the start away, or maps it.
        """
        self._advance(start.key, "mapping", {"domid": domid})

    def finish_mapping(
        self,
        start: PreparedStart,
        seconds: float = 0.0,
        detail: Mapping[str, Value] | None = None,
        *,
        cache: str = "",
    ) -> None:
        """Record that the device model has mapped the NVDIMMs, and that the domain starts: its run begins.

        :param seconds: how long mapping took.
        :param cache: as in :class:`.model.Start`.
        :param detail: detail of the event.
        :raises LedgerError: when another process has put the start away.
        """
        uuid, identifier, _ = start.key
        self._advance(
            (uuid, identifier, "mapping"),
            "mapped",
            {"cache": cache},
            [
                ("UPDATE domain SET fault = '' WHERE uuid = ?", (uuid,)),
                (
                    "INSERT OR REPLACE INTO run SELECT uuid, number, nvdimms, written FROM attachment "
                    "WHERE uuid = ? AND number IS NOT NULL",
                    (uuid,),
                ),
                ("DELETE FROM never_run WHERE uuid = ?", (uuid,)),
                count("starts"),
                count("map_seconds", seconds),
            ],
            self._event("started", uuid, detail),
        )
        self._note_run(start.run[0], start.run[1])

    def _note_run(self, number: int, nvdimms: str) -> None:
        """Note beside the ledger which run has its devices now: the ledger may be replaced with an earlier one.

        A guest starts also where that cannot be written.
        """
        if devices := _devices_of(nvdimms):
            try:
                self.reserve.spend(lambda: self.device_marks.note_run(devices, number))
            except LedgerError:
                self.device_marks.forget_run(devices)

    def record_ioreq_server(self, uuid: str, domid: int, server: int) -> None:
        """Record the id of the ioreq server that the label server of a running guest has created.

        :raises LedgerError: when the domain does not run as that domid any more.
        """
        statement = (
            "UPDATE attachment SET ioreq_server = ? WHERE uuid = ? AND domid = ? AND boot_id = ? "
            "AND state IN ('mapping', 'mapped') AND ended = 0"
        )
        if not self._write_start([(statement, (server, uuid, domid, host_boot_id()))], guarded=True):
            raise _undone(uuid)

    def note_end(self, start: Start) -> bool:
        """Record that a start is over: no other step of it can follow. Can be repeated.

        :returns: False when it is not over: it has gone on to another state meanwhile.
        """
        self._write_start([(f"UPDATE attachment SET ended = 1 WHERE {THIS_START} AND ended = 0", start.key)])
        uuid, identifier, state = start.key
        return not self._rows(
            "SELECT 1 FROM attachment WHERE uuid = ? AND id = ? AND state != ?", uuid, identifier, state
        )

    def has_times(self, start: Start) -> bool:
        """Return True when :meth:`note_written` has been called for a start that is over."""
        return bool(self._rows(f"SELECT 1 FROM attachment WHERE {THIS_START} AND ended = 2", *start.key))

    def note_written(self, start: Start, begun: Run, written: str, before: str) -> bool:
        """Record when the backings of a start that is over were last written.

        :param begun: as :meth:`find_begun` returned it.
        :param written: as in :class:`.model.Run`: the times that they get when they are thawed, and that the run has
            from :meth:`end_start` on.
        :param before: the times that they have, and the run until then.
        :returns: False when another process has recorded some meanwhile: what was recorded first stays.
        """
        number = f"SELECT number FROM attachment WHERE {THIS_START}"
        return self._write_start(
            [
                (
                    f"UPDATE attachment SET written = ?, ended = 2 WHERE {THIS_START} AND ended != 0 AND written = ?",
                    (written, *start.key, begun.written),
                ),
                (
                    f"UPDATE run SET written = ? WHERE uuid = ? AND number = ({number})",
                    (before, start.uuid, *start.key),
                ),
            ],
            guarded=True,
        )

    def end_start(self, start: Start, *, kind: str = "", left: bool = False, written: str = "") -> None:
        """Forget a start that is over, after :meth:`note_end`: nothing is frozen or mapped for it any more.

        Another start of the domain stays, and no event is recorded then: it may have begun meanwhile.

        :param kind: kind of the event to record; empty for none.
        :param left: the start has never run, and a file may be frozen for it still: its number is kept.
        :param written: when its backings were last written, if not as :meth:`note_written` says; as in
            :class:`.model.Run`.
        """
        noted = "SELECT coalesce(nullif(?, ''), written) FROM attachment WHERE uuid = run.uuid AND number = run.number"
        never_run = (
            f"SELECT uuid, number FROM attachment WHERE {THIS_START} AND state != 'mapped' AND number IS NOT NULL "
            f"UNION SELECT uuid, 0 FROM attachment WHERE {THIS_START} AND state IN ('prepared', 'mapping')"
        )
        self._write_start(
            [
                (f"UPDATE attachment SET ended = ended WHERE {THIS_START}", start.key),
                (f"UPDATE run SET written = coalesce(({noted}), written) WHERE uuid = ?", (written, start.uuid)),
                *([(f"INSERT OR IGNORE INTO never_run {never_run}", start.key * 2)] if left else []),
                ("DELETE FROM attachment WHERE uuid = ?", (start.uuid,)),
            ],
            self._event(kind, start.uuid, domid=start.domid),
            guarded=True,
        )

    def take_up_running(
        self,
        uuid: str,
        before: Start | None,
        domid: int,
        paths: Sequence[str],
        mappings: Sequence[tuple[int, int, int]],
        areas: Sequence[tuple[int, int]],
        *,
        served: str,
        run: Run | None = None,
        is_numbered: bool = True,
    ) -> None:
        """Record the start of a domain that runs, after the ledger has lost it, or a part of it; and its run.

        :param before: the start that the ledger has.
        :param paths: backings that are frozen for it.
        :param served: as in :class:`.model.Start`.
        :param run: the guest's; None when it is not known.
        :param is_numbered: the guest's run has a number, or may have.
        :raises LedgerError: when the ledger has another start of the domain meanwhile.
        """
        free = "UPDATE domain SET uuid = uuid WHERE uuid = ? AND uuid NOT IN (SELECT uuid FROM attachment)"
        taken_up = self._write_start(
            [
                (free, (uuid,)) if before is None else (f"DELETE FROM attachment WHERE {THIS_START}", before.key),
                (
                    "INSERT INTO attachment (uuid, id, state, domid, boot_id, since, served, number, nvdimms, written) "
                    "VALUES (?, ?, 'mapped', ?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(uuid, os.urandom(8).hex(), domid, host_boot_id(), seconds_since_boot(), served),
                        *(run or (None, "", "")),
                    ),
                ),
                ("DELETE FROM run WHERE uuid = ?", (uuid,)),
                ("DELETE FROM unnumbered WHERE uuid = ?", (uuid,)),
                ("DELETE FROM never_run WHERE uuid = ?", (uuid,)),
                *([("INSERT INTO run VALUES (?, ?, ?, ?)", (uuid, *run))] if run else []),
                *([] if is_numbered else [("INSERT INTO unnumbered (uuid) VALUES (?)", (uuid,))]),
                *have(uuid, paths),
                *[("INSERT INTO mapping VALUES (?, ?, ?, ?)", (uuid, *mapping)) for mapping in mappings],
                *[("INSERT INTO area VALUES (?, ?, ?)", (uuid, *area)) for area in areas],
            ],
            guarded=True,
        )
        if not taken_up:
            raise _undone(uuid)
        if run:
            self._note_run(run.number, run.nvdimms)

    def _advance(
        self,
        key: tuple[str, str, str],
        state: str,
        values: Mapping[str, Value | None],
        more: Sequence[tuple[str, Sequence[Any]]] = (),
        event: Event | None = None,
    ) -> None:
        """Take a start to its next state.

        :param values: of columns of the attachment.
        :param more: statements to execute with it.
        :raises LedgerError: when it is not in the state of the key any more.
        """
        columns = "".join(f", {name} = ?" for name in values)
        statement = (
            f"UPDATE attachment SET state = ?, since = ?{columns} WHERE {THIS_START} AND boot_id = ? AND ended = 0",
            (state, seconds_since_boot(), *values.values(), *key, host_boot_id()),
        )
        if not self._write_start([statement, *more], event, guarded=True):
            raise _undone(key[0])

    # --- questions ---

    def find_prepared(self, uuid: str) -> PreparedStart | None:
        """Return the domain's start that was prepared in this boot of the host and is not mapped yet, or None."""
        rows = self._rows(
            "SELECT id, name, qemu, gfn_start, gfn_limit, served, attachment.cache, number, nvdimms, written "
            "FROM attachment JOIN domain USING (uuid) "
            "WHERE uuid = ? AND state = 'prepared' AND boot_id = ? AND number IS NOT NULL AND ended = 0",
            uuid,
            host_boot_id(),
        )
        if not rows:
            return None
        mappings = self._rows("SELECT gfn, mfn, count FROM mapping WHERE uuid = ? ORDER BY gfn", uuid)
        areas = self._rows("SELECT mfn, count FROM area WHERE uuid = ?", uuid)
        uncached = self._rows("SELECT gfn, count FROM uncached WHERE uuid = ?", uuid)
        identifier, name, qemu, gfn_start, gfn_limit, served, cache, *run = rows[0]
        limits, frames = (gfn_start, gfn_limit, bool(served)), (mappings, areas, uncached)
        key = uuid, identifier, "prepared"  # an earlier version has prepared it if no cache is asked for
        return PreparedStart(key, name, qemu, *limits, *frames, tuple(run), cache or "auto")

    def find_run(self, uuid: str) -> Run | None:
        """Return the domain's last run, which may not be over; None when no version that numbers them has begun one.

        Its number is 0 if a later run, of whatever domain, had one of its devices: the ledger is from a backup then.
        """
        from nvdimm_driver.model import Run

        rows = self._rows("SELECT number, nvdimms, written FROM run WHERE uuid = ?", uuid)
        if not rows:
            return None
        run = Run(*rows[0])
        later = any(self.device_marks.last_run(each) not in (None, run.number) for each in _devices_of(run.nvdimms))
        return run._replace(number=0) if later else run

    def is_unnumbered(self, uuid: str) -> bool:
        """Return True when the domain's last guest was started by a version that gave runs no numbers."""
        return bool(self._rows("SELECT 1 FROM unnumbered WHERE uuid = ?", uuid)) and self.find_run(uuid) is None

    def is_spoiled(self, uuid: str) -> bool:
        """Return True after :meth:`spoil_unnumbered`, or after the domain gave up what that guest had."""
        return bool(self._rows("SELECT 1 FROM unnumbered WHERE uuid = ? AND spoiled", uuid))

    def runs(self) -> dict[str, Run]:
        """Return the last run of each domain that has one, by uuid."""
        from nvdimm_driver.model import Run

        return {uuid: Run(*run) for uuid, *run in self._rows("SELECT uuid, number, nvdimms, written FROM run")}

    def note_thawed(self, uuid: str, run: Run, written: str) -> bool:
        """Record when the backings of a domain's last run were last written; return False if that run has changed.

        :param written: as in :class:`.model.Run`, for what was frozen until now, though the start was put away.
        """
        same = "uuid = ? AND number = ? AND written = ?"
        noted = f"UPDATE run SET written = ? WHERE {same}", (written, uuid, run.number, run.written)
        return self._write([noted], guarded=True)

    def spoil_run(self, uuid: str, number: int) -> None:
        """Record that a guest which was saved in this run of the domain, if it is the last one, can go on no more."""
        self._write([("UPDATE run SET number = 0 WHERE uuid = ? AND number = ?", (uuid, number))])

    def spoil_saved(self, start: Start) -> None:
        """Record that no guest of a start's domain that was saved before can go on; nothing if the start is forgotten.

        A guest that the ledger does not know may have written its NVDIMMs.
        """
        self._write_start(
            [
                (f"UPDATE attachment SET ended = ended WHERE {THIS_START}", start.key),
                ("UPDATE run SET number = 0 WHERE uuid = ?", (start.uuid,)),
                ("UPDATE unnumbered SET spoiled = 1 WHERE uuid = ?", (start.uuid,)),
            ],
            guarded=True,
        )

    def spoil_unnumbered(self, uuid: str) -> None:
        """Record that the domain's guest, if a version that gave runs no numbers has started it, can go on no more."""
        self._write([("UPDATE unnumbered SET spoiled = 1 WHERE uuid = ?", (uuid,))])

    def find_begun(self, start: Start) -> Run | None:
        """Return the run of a start that is prepared; None when it has none, or is forgotten."""
        from nvdimm_driver.model import Run

        rows = self._rows(
            f"SELECT number, nvdimms, written FROM attachment WHERE {THIS_START} AND number IS NOT NULL "
            "AND state != 'preparing'",
            *start.key,
        )
        return Run(*rows[0]) if rows else None

    def number_of(self, start: Start) -> int | None:
        """Return the number of the run that a start begins; None when it has none, or is forgotten."""
        rows = self._rows(f"SELECT number FROM attachment WHERE {THIS_START}", *start.key)
        return rows[0][0] if rows else None

    def is_whole(self, start: Start) -> bool:
        """Return True when the ledger has all steps of a start; in a backup, it may have mapped since."""
        return start.state == "mapped" or not self.is_from_elsewhere()

    def never_run(self, uuid: str) -> set[int | None]:
        """Return the numbers of the domain's starts that may have left a file frozen, and have never run.

        None is with them if one has frozen all its files: an earlier version wrote no number on a file.
        """
        return {number or None for (number,) in self._rows("SELECT number FROM never_run WHERE uuid = ?", uuid)}

    def given_up_at(self, uuid: str, path: str) -> int:
        """Return when a domain has given up what its start has at a path, in nanoseconds since 1970; else 0.

        0 also for what a ledger of before version 9 has.
        """
        rows = self._rows("SELECT coalesce(max(given_up), 0) FROM frozen WHERE uuid = ? AND path = ?", uuid, path)
        return int(rows[0][0])

    def was_given_back(self, uuid: str, path: str) -> bool:
        """Return True when a domain has what its start has at a path again, after it had given that up."""
        return bool(self._rows("SELECT 1 FROM frozen WHERE uuid = ? AND path = ? AND given_up = 0", uuid, path))

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

    def mappings_of(self, start: Start) -> list[tuple[int, int, int]]:
        """Return what a start maps, as (gfn, mfn, count); nothing when it is not the domain's start any more."""
        return self._rows(
            "SELECT gfn, mfn, count FROM mapping JOIN attachment USING (uuid) WHERE uuid = ? AND id = ? ORDER BY gfn",
            start.uuid,
            start.id,
        )

    def frames_of_others(self, uuid: str) -> list[tuple[str, int, int]]:
        """Return the machine frames of all other domains' starts in this boot, as (domain name, mfn, count)."""
        return self._rows(
            "SELECT name, mfn, count FROM mapping JOIN attachment USING (uuid) JOIN domain USING (uuid) "
            "WHERE uuid != ? AND boot_id = ?",
            uuid,
            host_boot_id(),
        )

    def frames_of_starts(self) -> list[tuple[str, int | None, int, int, str]]:
        """Return the machine frames of all starts in this boot, as (domain name, domid, mfn, count, nvdimms).

        :returns: with ``nvdimms`` for :func:`has_namespace`. A version that numbered no runs has begun a start without:
            the domain's NVDIMMs of now tell as much.
        """
        each = """'"namespace": "' || device || '"'"""
        defined = f"SELECT group_concat({each}) FROM allocation WHERE allocation.uuid = attachment.uuid"
        return self._rows(
            f"SELECT name, domid, mfn, count, coalesce(nullif(nvdimms, ''), ({defined}), '') "
            "FROM mapping JOIN attachment USING (uuid) JOIN domain USING (uuid) WHERE boot_id = ?",
            host_boot_id(),
        )

    def find_ioreq_server(self, uuid: str) -> int | None:
        """Return Xen's id of the ioreq server that the domain's label server has created; None before."""
        rows = self._rows("SELECT ioreq_server FROM attachment WHERE uuid = ?", uuid)
        return rows[0][0] if rows else None

    def count_mapped(self) -> tuple[int, int]:
        """Return how many domains have their NVDIMMs mapped, and how many frames are mapped in all."""
        (found,) = self._rows(
            "SELECT count(DISTINCT uuid), coalesce(sum(count), 0) FROM attachment LEFT JOIN mapping USING (uuid) "
            "WHERE state = 'mapped'"
        )
        return found[0], found[1]

    def _event(
        self, kind: str, uuid: str, detail: Mapping[str, Value] | None = None, domid: int | None = None
    ) -> Event | None:
        """Return an event with the domain's current name and domid; None without a kind."""
        if not kind:
            return None
        sql = "SELECT name, domid FROM domain LEFT JOIN attachment USING (uuid) WHERE uuid = ?"
        rows = self._rows(sql, uuid) or [("", None)]
        return Event(kind, uuid, rows[0][0], rows[0][1] if domid is None else domid, detail or {})


def have(uuid: str, paths: Iterable[str]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield the statements by which a start has these paths: no release of them goes on any more."""
    for path in paths:
        yield "INSERT INTO frozen (uuid, path) VALUES (?, ?)", (uuid, path)
        yield (
            "UPDATE allocation SET overwritten = 0, deleted = 0 WHERE uuid = ? AND path = ? AND overwritten + deleted",
            (uuid, path),
        )


def _devices_of(nvdimms: str) -> list[BackingIdentity]:
    """Return the devices among what a guest has (:func:`.lifecycle.saved_guest.describe`), by its JSON."""
    if '"inode": 0' not in nvdimms:  # importing json takes longer than all the rest of a start
        return []
    import json

    from nvdimm_driver.model import BackingIdentity

    return [
        BackingIdentity(each["kind"], each["namespace"], each["offset in the namespace"], 0, 0, each["backing size"])
        for each in json.loads(nvdimms)
        if not each["inode"]
    ]


def has_namespace(nvdimms: str, uid: str) -> bool:
    """Return True when a guest has an NVDIMM on a namespace.

    :param nvdimms: what it has (:func:`.lifecycle.saved_guest.describe`); in JSON, a quote in a value is escaped.
    :param uid: :attr:`.model.Namespace.uid`.
    """
    return f'"namespace": "{uid}"' in nvdimms


def has_other_kinds(nvdimms: str, kinds: Iterable[str]) -> bool:
    """Return True when a guest has an NVDIMM of another kind of backing than these.

    :param nvdimms: as for :func:`has_namespace`.
    """
    return nvdimms.count('"kind": "') > sum(nvdimms.count(f'"kind": "{kind}"') for kind in kinds)


def _undone(uuid: str) -> LedgerError:
    return LedgerError(
        f"the start of domain {uuid} was undone by another process, or another start of it has begun",
        hint="start the domain again",
    )


def count(name: str, amount: float = 1, *, label: str = "") -> tuple[str, Sequence[Any]]:
    """Return the statement that adds to a counter."""
    return (
        "INSERT INTO counter VALUES (?, ?, ?) ON CONFLICT (name, label) DO UPDATE SET value = value + excluded.value",
        (name, label, float(amount)),
    )
