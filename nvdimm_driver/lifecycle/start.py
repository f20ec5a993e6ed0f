# SPDX-License-Identifier: Apache-2.0
"""Starts of domains: their backings are frozen and held until Xen no longer has the domain."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from nvdimm_driver import logs
from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.backing.paths import check_not_read_only
from nvdimm_driver.errors import BackingError, InUseError, NvdimmError
from nvdimm_driver.labels.servers import LabelServers
from nvdimm_driver.lifecycle import guest_frames, saved_guest
from nvdimm_driver.lifecycle.file_times import FileTimes
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
        self.times = FileTimes(ledger, backings)

    def freeze(self, uuid: str, items: Sequence[Allocation], number: int) -> Start:
        """Begin a start: freeze its backings until :meth:`put_away`. On failure, nothing stays frozen.

        :param number: of the run that it begins.
        """
        start = self.ledger.begin_start(uuid, [item.spec.path for item in items], number)
        self.holders.kill(uuid, self.holders.find(uuid))  # of a start that is over
        try:
            for item in items:
                self.freeze_one(start, item, number)
        except BaseException:
            self.put_away(start)
            raise
        return start

    def freeze_one(self, start: Start, item: Allocation, number: int) -> None:
        """Freeze one backing for a start, which the ledger has with its path."""
        LOG.debug("freeze %s", item.spec.path)
        backing = backing_of(self.backings, item.spec.path)
        self._thaw_left(start, item, number)
        backing.freeze_for(item.spec.path, number, item.identity)
        self._check_unwritten(start.uuid, backing, item)

    def _thaw_left(self, start: Start, item: Allocation, number: int) -> None:
        """Thaw a file that is frozen before its domain's start comes to it: for a guest that no start is of any more.

        Either the file was away at the end of a start, whose number it has then, or it has another guest's.
        """
        path = item.spec.path
        if frozen := ownership.frozen_files(self.backings, {path: item.identity}):
            self.times.distrust_unknown(start, frozen, {number, *self.times.known_runs(start.uuid)})
            self.thaw_unknown(path, item.identity, start.uuid, over=start)

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
            self._tell_elsewhere(start, record, frozen)
            known, last = self.times.known_runs(start.uuid, start), self.ledger.find_run(start.uuid)
            times = self.times.distrust_unknown(start, frozen, known)
            own = {path: file for path, file in frozen.items() if file.run in known}
            times |= self.times.note_times(start, there, own)
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
                if path in times:
                    self._doubt_sharers(path, had.get(path), begun)
                if start.state != "mapped" and last and path in frozen and frozen[path].run == last.number:
                    self.thaw_unknown(path, had.get(path), start.uuid, over=start, unmark=unmark)
                else:
                    self.thaw(path, had.get(path), over=start, touch=times.get(path), unmark=unmark)
        finally:
            if self._is_latest(start):
                deleted = {file for pid, _, file, _ in self.holders.deleted() if pid in holders}
                self.holders.kill(start.uuid, holders)
                for _, uuid, file, copy in self.holders.deleted() if deleted else ():
                    if uuid == start.uuid and file in deleted:
                        name, detail = record.name if record else "", {"path": file, "copy": copy}
                        logs.tell(Event("left-deleted", start.uuid, name, start.domid, detail))
        # what could not be recorded while they were frozen
        ownership.mark_if_possible(self.ledger, self.backings, start.uuid)
        written = self.times.times_of_left(start, away)
        self.ledger.end_start(start, kind=kind, left=bool(away) and self.ledger.is_whole(start), written=written)
        self.ledger.forget_unused(start.uuid)

    def _tell_elsewhere(self, start: Start, record: Record | None, frozen: Collection[str]) -> None:
        """Log the files of a guest that has ended whose bytes it had elsewhere: what it wrote there is lost.

        If it was saved, it cannot go on: its memory does not fit what is in them.

        :param frozen: its files that are frozen for it: what an earlier attempt has thawed may have been moved since.
        """
        if start.boot_id != host_boot_id():  # each boot may find the namespaces elsewhere
            return
        try:
            moved = [path for path in self.find_elsewhere(start) if path in frozen]
        except (NvdimmError, OSError) as error:
            LOG.warning("where the files of the guest with domid %s are cannot be determined: %s", start.domid, error)
            return
        for path in moved:
            logs.tell(Event("blocks-moved", start.uuid, record.name if record else "", start.domid, {"path": path}))
        if moved:
            self.ledger.spoil_saved(start)

    def find_elsewhere(self, start: Start, announced: Sequence[tuple[int, int]] = ()) -> list[str]:
        """Do what :func:`.guest_frames.find_elsewhere` does, for a start whose device model has mapped."""
        if start.state != "mapped":
            return []
        return guest_frames.find_elsewhere(self.ledger, self.backings, start, announced)

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

    def hold_each(self, uuid: str, name: str, backings: Sequence[tuple[str, BackingIdentity]]) -> list[int]:
        """Start a holder for each backing of a guest that may eject it alone; return their process ids."""
        return [self.hold(uuid, name, [each]) for each in backings]

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

    def _doubt_sharers(self, path: str, identity: BackingIdentity | None, run: Run | None) -> None:
        """Note which files share blocks with that of a guest, before it is thawed: the guest may have written there.

        No guest starts with such an NVDIMM: they share blocks since this one runs. From now on, it need not be there.

        :param run: of the guest; None if nobody knows which part of the file it had.
        """
        had = saved_guest.placed(run) if run else ()
        size = next((spec.size for spec, it, *_ in had if spec.path == path or it == identity), None)
        started = [each.start for each in self.ledger.started_domains() if each.start]
        runs = [self.ledger.find_begun(start) for start in started if start.state == "mapped"]
        mapped = [each.number for each in runs if each]
        for backing in self.backings:
            for other in backing.doubt_sharers(path, identity, size, mapped) if backing.handles(path) else ():
                owners = self.ledger.claimants(other) or [None]
                for owner in owners:
                    uuid, name = (owner.uuid, owner.name) if owner else ("", "")
                    logs.tell(Event("blocks-shared", uuid, name, None, {"path": other, "with": path}))

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
        touch = None if never_ran else self.times.touch_now(path)
        had = saved_guest.path_of(last, identity) if file and last and file.run == last.number else ""
        noted = saved_guest.times_of(last).get(had, ()) if last else ()
        at = backing_of(self.backings, path).written_at(path) if noted else None
        if file is None or last is None or touch is None or at is None:
            if touch and file:
                self._doubt_sharers(path, identity, last if last and file.run == last.number else None)
            self.thaw(path, identity, over, touch, unmark)
            return
        self._doubt_sharers(path, identity, last if file.run == last.number else None)
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

    def _end_orphans(self) -> None:
        """End the holders of domains that have no start, unless Xen has them: then the ledger has lost the start."""
        held = self.holders.held()  # first: a start is in the ledger before its holder exists
        orphans = held - {record.uuid for record in self.ledger.started_domains()}
        guests = {uuid for _, uuid in self.mapper.guests()} if orphans else set()
        if None not in guests:  # a domain that is dying has lost its uuid
            for uuid in orphans - guests:
                self.holders.kill(uuid, self.holders.find(uuid))

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
        return start.domid == domid and start.boot_id == host_boot_id() and self.ledger.is_whole(start)

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
