# SPDX-License-Identifier: Apache-2.0
"""The times of a guest's files: by them, a saved guest goes on only over the bytes that it had.

Each end of a guest gives its files a new time, which the ledger has beside the one before. A program that writes a file
changes its time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.lifecycle.saved_guest import NO_TIME
from nvdimm_driver.model import BackingIdentity, Run, Start, Surveyed, Touch
from nvdimm_driver.plugins import Backing, backing_of, exists
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger


class FileTimes:
    """The times that the ledger has of the files of guests, and the runs for which they may be frozen."""

    def __init__(self, ledger: Ledger, backings: Sequence[Backing]) -> None:
        self._ledger = ledger
        self._backings = backings

    def distrust_unknown(
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
            self._ledger.spoil_saved(start)
        touches = {path: self.touch_now(path) for path in unknown}
        return {path: touch for path, touch in touches.items() if touch}

    def known_runs(self, uuid: str, over: Start | None = None) -> set[int | None]:
        """Return the runs that a file of a domain is frozen for, as far as no guest has it that the ledger lacks.

        With them is None if it may have no number, as an earlier version has frozen it for a start that is known.

        :param over: the domain's start, which is over.
        """
        last = self._ledger.find_run(uuid)
        known = self._ledger.never_run(uuid) | ({last.number} if last else set())
        return known | ({self._ledger.number_of(over), None} if over and self._ledger.is_whole(over) else set())

    def touch_now(self, path: str) -> Touch | None:
        """Return how a file is touched that a guest may have written; None for a backing that has no time."""
        when = backing_of(self._backings, path).time_to_touch(path)
        return None if when is None else Touch((), when)

    def check_left(self, uuid: str, identities: Mapping[str, BackingIdentity | None]) -> None:
        """Check that no guest of which the ledger does not know may have written a domain's files.

        A start would thaw them, and let no saved guest go on.

        :param identities: of the files, by path.
        :raises RefusedError: when one may have.
        """
        record = self._ledger.find_domain(uuid)
        known = self.known_runs(uuid, record.start if record else None)
        for path, file in ownership.frozen_files(self._backings, identities).items():
            if file.run not in known:
                why = "is immutable for a guest that the ledger does not know, or for another domain's"
                raise saved_guest.refused(f"{path} {why}")

    def note_times(self, start: Start, there: Collection[str], frozen: Mapping[str, Surveyed]) -> dict[str, Touch]:
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
            for backing in self._backings:
                if not backing.handles(path) or (at := backing.written_at(path)) is None:
                    continue
                after = backing.time_to_touch(path)
                if after is None:
                    times[path] = (at,)
                elif path in frozen:
                    before[path], times[path] = (at,), (after,)
        touched = {*before}
        while begun := self._ledger.find_begun(start):
            noted, found = saved_guest.times_of(begun), times
            if self._ledger.has_times(start):
                # a version before has noted the old time of a file that was away
                lacks = {path for path in before if noted.get(path) == before[path] and not frozen[path].unflagged}
                found = {path: times[path] for path in times if noted.get(path) == NO_TIME or path in lacks}
            else:
                noted |= dict.fromkeys(noted.keys() - {*there}, NO_TIME)
            had = {path: before[path] for path in found if path in before}
            run = self._ledger.find_run(start.uuid)
            is_same = run is not None and run.number == begun.number
            earlier = saved_guest.times_at_end(run if run and is_same else begun, had)
            if self._ledger.note_written(start, begun, saved_guest.times_at_end(begun, {**noted, **found}), earlier):
                break
        if begun := self._ledger.find_begun(start):
            times = {**times, **saved_guest.times_of(begun)}
            run = self._ledger.find_run(start.uuid)
            before = saved_guest.times_of(run) if run and run.number == begun.number else {}
        return {path: Touch(before.get(path, ()), times[path][-1]) for path in touched}

    def times_of_left(self, start: Start, away: Collection[str]) -> str:
        """Return what :meth:`note_times` has noted, and of each file that is away the time that it had before, too.

        An earlier attempt may have thawed the file and given it its new time, or not. Empty if no file is away.
        """
        begun, run = self._ledger.find_begun(start), self._ledger.find_run(start.uuid)
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
        last = self._ledger.find_run(uuid)
        times = saved_guest.times_of(last) if last else {}
        identities = dict(saved_guest.backings_of(last)) if last else {}
        left = ownership.frozen_files(self._backings, {path: identities[path] for path in times})
        if last is None or not left:
            return last
        found = {
            path: backing_of(self._backings, path).written_at(path)
            for path, file in left.items()
            if file.run == last.number and not file.unflagged
        }
        own = {path: (at,) for path, at in found.items() if at is not None and at in times[path]}
        return last._replace(written=saved_guest.times_at_end(last, own))
