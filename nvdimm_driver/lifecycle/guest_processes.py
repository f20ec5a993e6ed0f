# SPDX-License-Identifier: Apache-2.0
"""The processes beside running guests: a holder, which keeps their backings in use, and a label server."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from nvdimm_driver import logs
from nvdimm_driver.backing.paths import resolve
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.lifecycle.start import Starts
from nvdimm_driver.model import BackingIdentity, Record, Start
from nvdimm_driver.plugins import backing_of
from nvdimm_driver.state.events import Event, failure

LOG = logging.getLogger(__name__)


class GuestProcesses:
    """Starts anew what a running guest has lost; its device model has started the first ones.

    :param starts: knows the guests, their label servers and holders.
    """

    def __init__(self, starts: Starts) -> None:
        self._starts = starts

    def find_served(self) -> list[Record]:
        """Return the running domains that have a label server, or have lost it, and whose guest the ledger knows."""
        return [record for record, start in self._mapped() if start.served and self._starts.has_guest(start)]

    def _mapped(self) -> list[tuple[Record, Start]]:
        """Return the domains whose device model has mapped, each with its start."""
        found = [(record, record.start) for record in self._starts.ledger.started_domains()]
        return [(record, start) for record, start in found if start and start.state == "mapped"]

    def find_unserved(self) -> list[Record]:
        """Return the running domains whose label server is gone."""
        return [record for record in self.find_served() if not self._starts.label_servers.is_running(record.uuid)]

    def find_unheld(self) -> list[Record]:
        """Return the running domains that no holder holds: it was killed, or an earlier version has started them."""
        held = self._starts.holders.held()
        return [
            record
            for record, start in self._mapped()
            if (record.uuid not in held or (start.hot_slots and self._not_held(record)))
            and self._starts.is_running(start)
        ]

    def _not_held(self, record: Record) -> list[tuple[str, BackingIdentity]]:
        """Return what a running guest has, and no holder has open; what is not at its path is not looked for."""
        holders = self._starts.holders
        return [
            each
            for each in self._has(record)
            if os.path.exists(each[0]) and not holders.find_holding(record.uuid, each[0])
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
        apart = bool(record.start and record.start.hot_slots)
        if self._starts.holders.has(record.uuid) and not (apart and self._not_held(record)):
            return False
        if apart:
            pids = self._starts.hold_each(record.uuid, record.name, self._not_held(record))
        else:
            pids = [self._starts.hold(record.uuid, record.name, self._has(record))]
        if self._is_over(record):  # who has put it away meanwhile did not know of this holder
            self._starts.holders.kill(record.uuid, pids)
            return False
        self._starts.ledger.record_event("holder-gone", record.uuid)
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
        starts = [start for _, start in self._mapped()]
        announced = {domid for domid, _, _ in self._starts.mapper.frames_of_guests()} if starts else set()
        for start in starts:
            if start.domid is not None and start.domid not in announced:
                try:
                    self._announce(start, start.domid)
                except NvdimmError as error:
                    LOG.warning("frames of the guest with domid %d cannot be announced: %s", start.domid, error)

    def _announce(self, start: Start, domid: int) -> None:
        if self._starts.find_domid(start) != domid:
            return
        LOG.debug("announce the frames of domid %d again", domid)
        self._starts.mapper.announce(domid, self._starts.ledger.mappings_of(start))
        if not self._starts.is_running(start):
            self._starts.mapper.announce(domid, ())  # libxl has deleted what was announced before

    def _has(self, record: Record) -> list[tuple[str, BackingIdentity]]:
        """Return path and identity of each backing that a running guest has."""
        run = self._starts.ledger.find_run(record.uuid)
        known = [(item.spec.path, item.identity) for item in record.started if item.identity]
        has = known if run is None else saved_guest.backings_of(run)
        return [(resolve(path), identity) for path, identity in has]  # earlier versions did not resolve them

    def _is_over(self, record: Record) -> bool:
        """Return True when the start of a record is over, or another one has begun."""
        found = self._starts.ledger.find_domain(record.uuid)
        now = found.start if found else None
        return not (now and record.start and now.id == record.start.id and self._starts.is_running(now))

    def renew_label_servers(self) -> list[tuple[Record, bool]]:
        """Replace the label servers that are older than the installed code; return their domains, and if that worked.

        After an upgrade, one of an earlier version cannot start another process in place of one that died. That of a
        domain that was redefined since its start stays, or whose label areas cannot be opened now: another could not
        serve what the guest has.
        """
        installed = Path(__file__).stat().st_ctime
        old = [each for each in self.find_served() if self._starts.label_servers.is_older_than(each.uuid, installed)]
        killed = {each.uuid for each in old if each.can_be_served and self._can_open_labels(each)}
        for uuid in killed:
            self._starts.label_servers.kill(uuid)
        self.serve_labels()
        return [(each, each.uuid in killed and self._starts.label_servers.is_running(each.uuid)) for each in old]

    def _can_open_labels(self, record: Record) -> bool:
        """Return True when another label server could open the domain's label areas now; log why not."""
        try:
            for item in record.started:
                if item.spec.label_size and item.identity:
                    backing_of(self._starts.backings, item.spec.path).open_labels(item.spec, item.identity).close()
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
        if at is not None and at.domid is not None and not self._starts.label_servers.is_running(record.uuid):
            self._starts.ledger.record_event("label-server-gone", record.uuid)
            self._starts.label_servers.start(at.domid, record.uuid)
