# SPDX-License-Identifier: Apache-2.0
"""Starts of domains: their backings are frozen and held until Xen no longer has the domain."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from nvdimm_driver import logs
from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.backing.paths import check_not_read_only, resolve
from nvdimm_driver.errors import BackingError, InUseError, NvdimmError
from nvdimm_driver.labels.servers import LabelServers
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.lifecycle.saved_guest import NO_TIME
from nvdimm_driver.model import Allocation, BackingIdentity, Record, Run, Start, Surveyed, Touch
from nvdimm_driver.plugins import Backing, Mapper, backing_named, backing_of, exists
from nvdimm_driver.state import ownership
from nvdimm_driver.state.events import Event, failure
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.start_steps import ABANDONED_SECONDS, host_boot_id, seconds_since_boot

LOG = logging.getLogger(__name__)

RELEASE_SECONDS = 2.0
"""Libvirt holds the domain's lock meanwhile."""


class Starts:
    """The starts in the ledger, each with its frozen backings.

    :param mapper: tells which domains Xen has.
    :param is_saved: returns True when the domain of a name and a uuid has a managed save.
    :ivar abandoned_seconds: a start prepared this long ago is abandoned if Xen has no domain of that uuid.
    :ivar release_seconds: longest wait of a release until Xen no longer has the domain.
    """

    abandoned_seconds = ABANDONED_SECONDS
    release_seconds = RELEASE_SECONDS

    def __init__(
        self,
        ledger: Ledger,
        backings: Sequence[Backing],
        mapper: Mapper,
        label_servers: LabelServers,
        holders: Holders,
        is_saved: Callable[[str, str], bool] = lambda name, uuid: False,
    ) -> None:
        self.ledger = ledger
        self.is_saved = is_saved
        self.backings = backings
        self.mapper = mapper
        self.label_servers = label_servers
        self.holders = holders

    def freeze(self, uuid: str, items: Sequence[Allocation], number: int) -> Start:
        """Begin a start: freeze its backings until :meth:`put_away`. On failure, nothing stays frozen.

        :param number: of the run that it begins.
        """
        start = self.ledger.begin_start(uuid, [item.spec.path for item in items], number)
        self.holders.kill(uuid, self.holders.find(uuid))  # of a start that is over
        try:
            for item in items:
                LOG.debug("freeze %s", item.spec.path)
                backing = backing_of(self.backings, item.spec.path)
                self._thaw_left(start, item, number)
                backing.freeze_for(item.spec.path, number, item.identity)
                self._check_unwritten(uuid, backing, item)
        except BaseException:
            self.put_away(start)
            raise
        return start

    def _thaw_left(self, start: Start, item: Allocation, number: int) -> None:
        """Thaw a file that is frozen before its domain's start comes to it: for a guest that no start is of any more.

        Either the file was away at the end of a start, whose number it has then, or it has another guest's.
        """
        path = item.spec.path
        if frozen := ownership.frozen_files(self.backings, {path: item.identity}):
            self._distrust_unknown(start, frozen, {number, *self._known_runs(start.uuid)})
            self.thaw_unknown(path, item.identity, start.uuid, over=start)

    def _distrust_unknown(
        self, start: Start, frozen: Mapping[str, Surveyed], known: Collection[int | None]
    ) -> dict[str, Touch]:
        """Let no saved guest go on if a guest that the ledger does not know may have written its files since.

        The ledger came from a backup then: the end of that guest is not that of the run which the ledger has.

        :param frozen: by path.
        :param known: the runs that the ledger knows.
        :returns: how these files are touched when they are thawed, by path.
        """
        unknown = [path for path, file in frozen.items() if file.run not in known]
        if unknown:
            self.ledger.spoil_saved(start)
        touches = {path: self._touch_now(path) for path in unknown}
        return {path: touch for path, touch in touches.items() if touch}

    def _known_runs(self, uuid: str, over: Start | None = None) -> set[int | None]:
        """Return the runs that a file of a domain is frozen for, as far as no guest has it that the ledger lacks.

        With them is None if it may have no number, as an earlier version has frozen it for a start that is known.

        :param over: the domain's start, which is over.
        """
        last = self.ledger.find_run(uuid)
        known = self.ledger.never_run(uuid) | ({last.number} if last else set())
        return known | ({self.ledger.number_of(over), None} if over and self._is_whole(over) else set())

    def _touch_now(self, path: str) -> Touch | None:
        """Return how a file is touched that a guest may have written; None for a backing that has no time."""
        when = backing_of(self.backings, path).time_to_touch(path)
        return None if when is None else Touch((), when)

    def check_left(self, uuid: str, identities: Mapping[str, BackingIdentity | None]) -> None:
        """Check that no guest of which the ledger does not know may have written a domain's files.

        A start would thaw them, and let no saved guest go on.

        :param identities: of the files, by path.
        :raises RefusedError: when one may have.
        """
        record = self.ledger.find_domain(uuid)
        known = self._known_runs(uuid, record.start if record else None)
        for path, file in ownership.frozen_files(self.backings, identities).items():
            if file.run not in known:
                why = "is immutable for a guest that the ledger does not know, or for another domain's"
                raise saved_guest.refused(f"{path} {why}")

    def check_can_freeze(self, uuid: str, identities: Mapping[str, BackingIdentity]) -> None:
        """Check, for a domain that is off, what would keep :meth:`freeze` from its backings; change nothing.

        :param identities: of the backings, by path.
        :raises NvdimmError: when something would.
        """
        for path, identity in identities.items():
            check_not_read_only(path)
            backing = backing_of(self.backings, path)
            backing.check_can_freeze(path, identity)
            if not self.label_servers.find(uuid):  # that of the guest that has ended, which a start ends
                backing.check_unwritten(path, identity)

    def _check_unwritten(self, uuid: str, backing: Backing, item: Allocation) -> None:
        """Check that no program may write a frozen backing. The label server of the guest that has ended may: end it.

        :raises InUseError: when one may.
        """
        try:
            backing.check_unwritten(item.spec.path, item.identity)
        except InUseError:
            self.label_servers.kill(uuid)
            backing.check_unwritten(item.spec.path, item.identity)

    def find_writer(self, uuid: str, file: Surveyed) -> InUseError | None:
        """Return the error for a program, not the label server, that may write the frozen file of a running guest."""
        servers = self.label_servers.find(uuid)
        try:
            backing_of(self.backings, file.path).check_unwritten(file.path, file.identity, servers)
        except InUseError as error:
            return error
        return None

    def put_away(self, start: Start, *, kind: str = "") -> None:
        """End a start: undo :meth:`freeze` and :meth:`hold`. Can be repeated, also when another start has begun since.

        What cannot be thawed is let go nevertheless: to mend its file system, the operator has to unmount it.

        Nothing is done for a start that has gone on meanwhile. Once its end is noted, it cannot go on any more.

        :param kind: kind of the event to record; empty for none.
        """
        # a start that begins from now on has others
        holders, servers = self.holders.find(start.uuid), self.label_servers.find(start.uuid) if start.served else []
        if not self.ledger.note_end(start):
            LOG.debug("the start of domain %s has gone on: it is not over", start.uuid)
            return
        record = self.ledger.find_domain(start.uuid)
        begun = self.ledger.find_begun(start)
        had = dict(saved_guest.backings_of(begun) if begun else ())  # the domain may have given it up since
        had |= {item.spec.path: item.identity for item in (record.allocations if record else ()) if item.identity}
        try:
            if self._is_latest(start):
                self.label_servers.end(start.uuid, servers)  # which may write the backings
            # first: what is mounted from now on stays frozen, as it has no new time yet
            away = {path for path in start.paths if self._is_away(path, had.get(path))}
            there = [path for path in start.paths if path not in away]
            frozen = ownership.frozen_files(self.backings, {path: had.get(path) for path in start.paths})
            frozen = {path: file for path, file in frozen.items() if path in there}
            known, last = self._known_runs(start.uuid, start), self.ledger.find_run(start.uuid)
            times = self._distrust_unknown(start, frozen, known)
            own = {path: file for path, file in frozen.items() if file.run in known}
            times |= self._note_times(start, there, own)
            for path in start.paths:
                exists(path)  # on a medium with errors, nobody can say
                # of a start that was refused, nobody knows whether it has come to freezing that
                was_frozen = path in away and start.state != "preparing"
                if was_frozen or ownership.is_frozen_for_another(self.backings, start.uuid, path):
                    left = Event(
                        "left-immutable", start.uuid, record.name if record else "", start.domid, {"path": path}
                    )
                    logs.tell(left)
                if path in away:
                    continue
                unmark = ownership.is_given_up(self.ledger, self.backings, start.uuid, path)
                if record and self.is_saved(record.name, record.uuid):  # its guest goes on with that
                    unmark = False
                if start.state != "mapped" and last and path in frozen and frozen[path].run == last.number:
                    self.thaw_unknown(path, had.get(path), start.uuid, over=start, unmark=unmark)
                else:
                    self.thaw(path, had.get(path), over=start, touch=times.get(path), unmark=unmark)
        finally:
            if self._is_latest(start):
                self.holders.kill(start.uuid, holders)
        # what could not be recorded while they were frozen
        ownership.mark_if_possible(self.ledger, self.backings, start.uuid)
        written = self._times_of_left(start, away)
        self.ledger.end_start(start, kind=kind, left=bool(away) and self._is_whole(start), written=written)
        self.ledger.forget_unused(start.uuid)

    def _is_at(self, path: str, identity: BackingIdentity) -> bool:
        found = ownership.identity_at(self.backings, path)
        return found is not None and identity.shares_bytes(found)

    def _is_away(self, path: str, identity: BackingIdentity | None) -> bool:
        """Return True when a file is not at its path and may exist: its file system is not mounted there, or covered.

        :param identity: of the file; None if nobody knows it.
        """
        if identity is None or not identity.inode or self._is_at(path, identity):
            return False
        try:
            backing_named(self.backings, identity.kind).check_home(path, identity)
        except BackingError:
            return True
        return False

    def _note_times(self, start: Start, there: Collection[str], frozen: Mapping[str, Surveyed]) -> dict[str, Touch]:
        """Note when the backings of a guest that has ended were written; return how they are touched, by path.

        :param there: paths of those that are not away.
        :param frozen: files that are frozen for it, by path.

        That is noted while they are immutable, and before the first is thawed. So all processes that put the start
        away set the same time, also after one was killed, and none takes a program's write for the guest's. What is not
        there is noted by a later attempt that finds it frozen, if there is one, and has no time until then.
        """
        if start.state != "mapped":
            return {}
        times: dict[str, tuple[int, ...]] = {}
        before: dict[str, tuple[int, ...]] = {}
        for path in there:
            exists(path)  # as for a thaw
            for backing in self.backings:
                if not backing.handles(path) or (at := backing.written_at(path)) is None:
                    continue
                after = backing.time_to_touch(path)
                if after is None:
                    times[path] = (at,)
                elif path in frozen:
                    before[path], times[path] = (at,), (after,)
        touched = {*before}
        while begun := self.ledger.find_begun(start):
            noted, found = saved_guest.times_of(begun), times
            if self.ledger.has_times(start):
                # a version before has noted the old time of a file that was away
                lacks = {path for path in before if noted.get(path) == before[path] and not frozen[path].unflagged}
                found = {path: times[path] for path in times if noted.get(path) == NO_TIME or path in lacks}
            else:
                noted |= dict.fromkeys(noted.keys() - {*there}, NO_TIME)
            had = {path: before[path] for path in found if path in before}
            run = self.ledger.find_run(start.uuid)
            is_same = run is not None and run.number == begun.number
            earlier = saved_guest.times_at_end(run if run and is_same else begun, had)
            if self.ledger.note_written(start, begun, saved_guest.times_at_end(begun, {**noted, **found}), earlier):
                break
        if begun := self.ledger.find_begun(start):
            times = {**times, **saved_guest.times_of(begun)}
            run = self.ledger.find_run(start.uuid)
            before = saved_guest.times_of(run) if run and run.number == begun.number else {}
        return {path: Touch(before.get(path, ()), times[path][-1]) for path in touched}

    def _times_of_left(self, start: Start, away: Collection[str]) -> str:
        """Return what :meth:`_note_times` has noted, and of each file that is away the time that it had before, too.

        An earlier attempt may have thawed the file and given it its new time, or not. Empty if no file is away.
        """
        begun, run = self.ledger.find_begun(start), self.ledger.find_run(start.uuid)
        if not away or begun is None or run is None or run.number != begun.number:
            return ""
        before, after = saved_guest.times_of(run), saved_guest.times_of(begun)
        both = {path: before[path] + after.get(path, ()) for path in away if path in before}
        return saved_guest.times_at_end(begun, both)

    def find_last_run(self, uuid: str) -> Run | None:
        """Return the domain's last run as :meth:`freeze` will leave it: with the time that each file has, or will get.

        A file that is frozen for that run still is as its guest has left it, with one of the times that the ledger has,
        and gets a new one when it is thawed. Of others, the last time counts: since they were thawed, a program may
        have put an older copy in their place, with an earlier time.
        """
        last = self.ledger.find_run(uuid)
        times = saved_guest.times_of(last) if last else {}
        identities = dict(saved_guest.backings_of(last)) if last else {}
        left = ownership.frozen_files(self.backings, {path: identities[path] for path in times})
        if last is None or not left:
            return last
        found = {
            path: backing_of(self.backings, path).written_at(path)
            for path, file in left.items()
            if file.run == last.number and not file.unflagged
        }
        own = {path: (at,) for path, at in found.items() if at is not None and at in times[path]}
        return last._replace(written=saved_guest.times_at_end(last, own))

    def hold(self, uuid: str, name: str, backings: Sequence[tuple[str, BackingIdentity]]) -> int:
        """Start a holder of a domain's backings; return its process id.

        :param backings: path and identity of each.
        :raises BackingError: when one of them is not there or in use, or no holder can be started.
        """
        with ExitStack() as opened:
            descriptors = []
            for path, identity in backings:
                descriptor = backing_of(self.backings, path).hold(path, identity)
                if descriptor is not None:
                    opened.callback(os.close, descriptor)
                    descriptors.append(descriptor)
            LOG.debug("hold the backings of domain %s: %d descriptors", name, len(descriptors))
            return self.holders.start(uuid, name, descriptors)

    def _is_latest(self, start: Start) -> bool:
        """Return True unless the ledger has another start of the domain."""
        record = self.ledger.find_domain(start.uuid)
        return record is None or record.start is None or record.start.id == start.id

    def thaw(
        self,
        path: str,
        identity: BackingIdentity | None = None,
        over: Start | None = None,
        touch: Touch | None = None,
        unmark: bool = False,
    ) -> None:
        """Undo the freezing of a backing, unless a start in the ledger has it.

        :param identity: of the backing, if it is known: something else at the path stays as it is.
        :param over: a start that does not count.
        :param touch: sets the time of a backing that its guest may have written.
        :param unmark: removes the owner's record, too, from one that is frozen until now.
        :raises BackingError: when that fails, or nobody can say what is at the path.
        """
        LOG.debug("thaw %s", path)
        exists(path)  # on a medium with errors, no backing handles it
        for backing in self.backings:
            if backing.handles(path):
                thaw = partial(backing.thaw_unless, unmark=True) if unmark else backing.thaw_unless
                thaw(path, partial(self._is_needed, path, over), identity, *filter(None, [touch]))

    def thaw_unknown(
        self,
        path: str,
        identity: BackingIdentity | None = None,
        uuid: str = "",
        *,
        over: Start | None = None,
        unmark: bool = False,
    ) -> None:
        """Do what :meth:`thaw` does for a backing that no start in the ledger has: a guest may have written it.

        None has if it was frozen for a start that never ran. If it was for the domain's last run, nobody but the guest
        of that has, and the ledger gets the time that it gets: a guest that was saved then can go on. The ledger gets
        it first, beside the one that the backing has, as this process may be killed before or after it is thawed.

        :param uuid: of the domain that it was frozen for, if that is known.
        :param over: a start that does not count.
        :param unmark: as in :meth:`thaw`.
        :raises InUseError: when another process has changed that run meanwhile.
        """
        file, last = ownership.frozen_files(self.backings, {path: identity}).get(path), self.ledger.find_run(uuid)
        never_ran = file is not None and file.run in self.ledger.never_run(uuid)
        touch = None if never_ran else self._touch_now(path)
        had = saved_guest.path_of(last, identity) if file and last and file.run == last.number else ""
        noted = saved_guest.times_of(last).get(had, ()) if last else ()
        at = backing_of(self.backings, path).written_at(path) if noted else None
        if file is None or last is None or touch is None or at is None:
            self.thaw(path, identity, over, touch, unmark)
            return
        has_new = len(noted) > 1 and at == noted[-1]  # an attempt before was killed then
        is_own, after = has_new or (at in noted and not file.unflagged), at if has_new else touch.after
        noted_run = last._replace(written=saved_guest.times_at_end(last, {had: (at, after) if is_own else NO_TIME}))
        if not self.ledger.note_thawed(uuid, last, noted_run.written):
            raise InUseError(f"{path} or its domain was changed meanwhile", hint="repeat 'nvdimmctl check'")
        self.thaw(path, identity, over, Touch((at,), after), unmark)
        if is_own and backing_of(self.backings, path).written_at(path) == after:
            self.ledger.note_thawed(uuid, noted_run, saved_guest.times_at_end(noted_run, {had: (after,)}))

    def release(self, record: Record) -> bool:
        """Put the domain's start away and return True; return False if Xen still has the domain."""
        if record.start is None or not self._has_ended(record.start):
            return False
        self.put_away(record.start, kind="released")
        return True

    def find_stale(self) -> list[Record]:
        """Return the domains whose start is over and not put away."""
        return [record for record in self.ledger.started_domains() if record.start and self._is_stale(record.start)]

    def put_away_if_over(self, record: Record) -> None:
        """Put the domain's start away if it is over; unlike :meth:`reconcile`, raise the error if that fails."""
        if record.start is not None and self._is_stale(record.start):
            self.put_away(record.start, kind="put-away")

    def _is_stale(self, start: Start) -> bool:
        return not self._is_pending(start) and not self.is_running(start)

    def reconcile(self) -> None:
        """Put away the starts whose domains are gone. One that cannot be put away now is logged, and kept."""
        stale = self.find_stale()
        LOG.debug("reconcile: starts to put away: %d", len(stale))
        for record in stale:
            if record.start is None:
                continue
            LOG.debug("put away the last start of domain %s, which is over", record.name)
            try:
                self.put_away(record.start, kind="put-away")
            except (NvdimmError, OSError) as error:
                logs.tell(Event("put-away-failed", record.uuid, record.name, record.start.domid, failure(error)))
        self._end_orphans()

    def find_served(self) -> list[Record]:
        """Return the running domains that have a label server, or have lost it, and whose guest the ledger knows."""
        return [
            record
            for record in self.ledger.started_domains()
            if record.start and record.start.served and record.start.state == "mapped" and self.has_guest(record.start)
        ]

    def find_unserved(self) -> list[Record]:
        """Return the running domains whose label server is gone."""
        return [record for record in self.find_served() if not self.label_servers.is_running(record.uuid)]

    def find_unheld(self) -> list[Record]:
        """Return the running domains that no holder holds: it was killed, or an earlier version has started them."""
        held = self.holders.held()
        return [
            record
            for record in self.ledger.started_domains()
            if record.uuid not in held
            and record.start
            and record.start.state == "mapped"
            and self.is_running(record.start)
        ]

    def hold_again(self) -> list[Record]:
        """Start a holder for each running guest that has none; return their domains, and log what cannot be held."""
        held = []
        for record in self.find_unheld():
            try:
                if self.hold_guest(record):
                    held.append(record)
            except NvdimmError as error:
                domid = record.start.domid if record.start else None
                logs.tell(Event("hold-failed", record.uuid, record.name, domid, failure(error)))
        return held

    def hold_guest(self, record: Record) -> bool:
        """Start a holder for a running guest; return False if it has one, or has ended meanwhile.

        :raises BackingError: as :meth:`hold` does.
        """
        if self.holders.has(record.uuid):
            return False
        pid = self.hold(record.uuid, record.name, self._has(record))
        if self._is_over(record):  # who has put it away meanwhile did not know of this holder
            self.holders.kill(record.uuid, [pid])
            return False
        self.ledger.record_event("holder-gone", record.uuid)
        return True

    def restart_lost(self) -> list[Record]:
        """Start a label server and a holder for each running guest that has none; return who got a holder.

        The frames of a guest are announced, too, if its device model, of an earlier version, did not.
        """
        try:
            self._announce_again()
        except NvdimmError as error:
            LOG.warning("frames of guests cannot be announced: %s", error)
        self.serve_labels()
        return self.hold_again()

    def _announce_again(self) -> None:
        """Announce the frames of each running guest that has announced none; log whose cannot be."""
        starts = [each.start for each in self.ledger.started_domains() if each.start and each.start.state == "mapped"]
        announced = {domid for domid, _, _ in self.mapper.frames_of_guests()} if starts else set()
        for start in starts:
            if start.domid is not None and start.domid not in announced:
                try:
                    self._announce(start, start.domid)
                except NvdimmError as error:
                    LOG.warning("frames of the guest with domid %d cannot be announced: %s", start.domid, error)

    def _announce(self, start: Start, domid: int) -> None:
        if self.find_domid(start) != domid:
            return
        LOG.debug("announce the frames of domid %d again", domid)
        self.mapper.announce(domid, self.ledger.mappings_of(start))
        if not self.is_running(start):
            self.mapper.announce(domid, ())  # libxl has deleted what was announced before

    def _has(self, record: Record) -> list[tuple[str, BackingIdentity]]:
        """Return path and identity of each backing that a running guest has."""
        run = self.ledger.find_run(record.uuid)
        known = [(item.spec.path, item.identity) for item in record.started if item.identity]
        has = known if run is None else saved_guest.backings_of(run)
        return [(resolve(path), identity) for path, identity in has]  # earlier versions did not resolve them

    def _is_over(self, record: Record) -> bool:
        """Return True when the start of a record is over, or another one has begun."""
        found = self.ledger.find_domain(record.uuid)
        now = found.start if found else None
        return not (now and record.start and now.id == record.start.id and self.is_running(now))

    def _end_orphans(self) -> None:
        """End the holders of domains that have no start, unless Xen has them: then the ledger has lost the start."""
        held = self.holders.held()  # first: a start is in the ledger before its holder exists
        orphans = held - {record.uuid for record in self.ledger.started_domains()}
        guests = {uuid for _, uuid in self.mapper.guests()} if orphans else set()
        if None not in guests:  # a domain that is dying has lost its uuid
            for uuid in orphans - guests:
                self.holders.kill(uuid, self.holders.find(uuid))

    def renew_label_servers(self) -> list[tuple[Record, bool]]:
        """Replace the label servers that are older than the installed code; return their domains, and if that worked.

        After an upgrade, one of an earlier version cannot start another process in place of one that died. That of a
        domain that was redefined since its start stays, or whose label areas cannot be opened now: another could not
        serve what the guest has.
        """
        installed = Path(__file__).stat().st_ctime
        old = [each for each in self.find_served() if self.label_servers.is_older_than(each.uuid, installed)]
        killed = {each.uuid for each in old if each.can_be_served and self._can_open_labels(each)}
        for uuid in killed:
            self.label_servers.kill(uuid)
        self.serve_labels()
        return [(each, each.uuid in killed and self.label_servers.is_running(each.uuid)) for each in old]

    def _can_open_labels(self, record: Record) -> bool:
        """Return True when another label server could open the domain's label areas now; log why not."""
        try:
            for item in record.started:
                if item.spec.label_size and item.identity:
                    backing_of(self.backings, item.spec.path).open_labels(item.spec, item.identity).close()
        except NvdimmError as error:
            domid = record.start.domid if record.start else None
            logs.tell(Event("label-server-failed", record.uuid, record.name, domid, failure(error)))
            return False
        return True

    def serve_labels(self) -> None:
        """Do what :meth:`serve_guest` does for each running guest that has none; log what cannot be served."""
        for record in self.find_unserved():
            try:
                self.serve_guest(record)
            except (NvdimmError, OSError) as error:
                domid = record.start.domid if record.start else None
                logs.tell(Event("label-server-failed", record.uuid, record.name, domid, failure(error)))

    def serve_guest(self, record: Record) -> None:
        """Start a label server for a running guest whose own was killed together with its watcher.

        :raises XenError: when it does not start.
        """
        at = record.start
        if at is not None and at.domid is not None and not self.label_servers.is_running(record.uuid):
            self.ledger.record_event("label-server-gone", record.uuid)
            self.label_servers.start(at.domid, record.uuid)

    def end_earlier(self, uuid: str) -> None:
        """Put away the domain's earlier start, with the lock for the preparation of another.

        One that was prepared, and whose device model has not come, is over: who starts a domain once more has given up
        the start before. Should its device model come yet, it is refused.

        :raises InUseError: when it is not over.
        """
        self.require_ended(uuid)
        record = self.ledger.find_domain(uuid)
        if record is not None and record.start is not None:
            self.put_away(record.start, kind="put-away")

    def require_ended(self, uuid: str) -> None:
        """Check that the domain's last start is over: a guest that libvirt has lost track of still has its memory.

        :raises InUseError: when it is not.
        """
        record = self.ledger.find_domain(uuid)
        start = None if record is None else record.start
        if record is None or start is None:
            domid = self._find_guest(uuid)  # the ledger may have lost its start, and its files are frozen
        elif (start.domid is None and not self.is_running(start)) or self.release(record):
            return
        else:
            domid = self.find_domid(start) or start.domid
        if domid is not None:
            raise InUseError(
                f"domain {record.name if record else uuid} already has its NVDIMMs, as domid {domid}, which Xen still "
                "has",
                hint=f"shut that guest down: xl shutdown {domid}",
            )

    def _has_ended(self, start: Start) -> bool:
        """Return True once Xen no longer has the domain; False if it still does after ``release_seconds``."""
        deadline = time.monotonic() + self.release_seconds
        while self.is_running(start):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _is_needed(self, path: str, over: Start | None, identity: BackingIdentity | None) -> bool:
        """Return True when a start that is not over has what is at a path, or it was frozen for another domain."""
        if over is not None and ownership.is_frozen_for_another(self.backings, over.uuid, path):
            return True
        return any(
            record.start is not None
            and (over is None or (record.uuid, record.start.id) != (over.uuid, over.id))
            and ownership.runs_with(record, path, identity)
            for record in self.ledger.started_domains()
        )

    def is_running(self, start: Start) -> bool:
        """Return True while Xen has the domain of the start, or the guest that the domain has now."""
        return self.find_domid(start) is not None

    def has_guest(self, start: Start) -> bool:
        """Return True while the guest of the start runs, and not a later one, which the ledger does not know.

        Domids begin anew at each boot of the host: a later guest may have the same one.
        """
        return start.domid is not None and self._is_of(start, self.find_domid(start))

    def _is_of(self, start: Start, domid: int | None) -> bool:
        """Return True when that is the domid of a start, in this boot, and the start has taken no later step."""
        return start.domid == domid and start.boot_id == host_boot_id() and self._is_whole(start)

    def _is_whole(self, start: Start) -> bool:
        """Return True when the ledger has all steps of a start; in a backup, it may have mapped since."""
        return start.state == "mapped" or not self.ledger.is_from_elsewhere()

    def find_domid(self, start: Start) -> int | None:
        """Return the domid by which Xen has the guest of a start; None when it is over.

        It may be another guest than the start's (:meth:`has_guest`) when the ledger came from a backup, and the domain
        was started since: a guest with the domain's uuid has announced frames.
        """
        this_boot = start.boot_id == host_boot_id()
        if start.domid is not None and this_boot and self.mapper.is_alive(start.domid, start.uuid):
            return start.domid
        return self._find_guest(start.uuid)

    def _find_guest(self, uuid: str) -> int | None:
        """Return the domid of a guest with the domain's uuid that has announced frames, whatever the ledger knows."""
        with_frames = sorted({domid for domid, _, _ in self.mapper.frames_of_guests()})
        return next((each for each in with_frames if self.mapper.uuid(each) == uuid.lower()), None)

    def find_moved(self) -> list[tuple[Record, int]]:
        """Return the domains whose guest is a later one than that of their start in the ledger, and its domid."""
        found = [(each, self.find_domid(each.start)) for each in self.ledger.started_domains() if each.start]
        return [
            (each, domid)
            for each, domid in found
            if domid is not None and each.start and not self._is_of(each.start, domid)
        ]

    def find_unknown(self) -> list[tuple[int, str]]:
        """Return domid and uuid of each guest that has announced frames and has no start in the ledger."""
        found = [
            (each, self.mapper.uuid(each)) for each in sorted({each for each, *_ in self.mapper.frames_of_guests()})
        ]
        known = {record.uuid for record in self.ledger.started_domains()} if found else set()
        return [(domid, uuid.lower()) for domid, uuid in found if uuid is not None and uuid.lower() not in known]

    def check_not_starting(self, uuid: str) -> None:
        """Check that Xen has no domain of a start whose device model has not come yet.

        :raises InUseError: when it has.
        """
        record = self.ledger.find_domain(uuid)
        if record and record.start and self._is_pending(record.start) and self._has_domain(uuid):
            raise InUseError(f"domain {record.name} is starting: Xen has it already", hint="wait until it runs")

    def check_not_mapping(self, record: Record, domid: int) -> None:
        """Check that no device model is mapping for a guest: it fails if the ledger gets another start of the domain.

        In a ledger from a backup, it may have been then, and the guest may run by now. Nobody can tell these apart, but
        libxl does not wait that long for a device model.

        :raises InUseError: when one may be.
        """
        start = record.start
        if start is None or (start.state, start.domid, start.boot_id) != ("mapping", domid, host_boot_id()):
            return
        seconds = seconds_since_boot() - start.since
        if 0 <= seconds < self.abandoned_seconds:
            raise InUseError(
                f"domain {record.name} is starting as domid {domid}, or was when the ledger's backup was made",
                hint=f"wait until it runs, and repeat this; after {self.abandoned_seconds - seconds} s, it counts as "
                "running",
            )

    def _has_domain(self, uuid: str) -> bool:
        return any(each == uuid for _, each in self.mapper.guests())

    def _is_pending(self, start: Start) -> bool:
        """Return True for a start of this boot whose device model may still run.

        libxl makes the domain, reads the RAM of a saved guest, however long that takes, and then starts the device
        model. Versions before 0.2.0 noted the time of day, which is in the future of the clock that counts from the
        boot.
        """
        if start.domid is not None or start.ended or start.boot_id != host_boot_id():
            return False
        return 0 <= seconds_since_boot() - start.since < self.abandoned_seconds or self._has_domain(start.uuid)
