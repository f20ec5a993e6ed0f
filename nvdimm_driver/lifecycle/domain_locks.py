# SPDX-License-Identifier: Apache-2.0
"""Locks of domains: what changes the claims of one, or prepares its start, is done by one process at a time."""

from __future__ import annotations

from pathlib import Path

from nvdimm_driver.errors import InUseError, own_file_error
from nvdimm_driver.lock_files import LockFile, holder, is_taken
from nvdimm_driver.state.reserve import Reserve

WAIT_SECONDS = 2.0
"""How long the second waits before it is told who is the first; libvirt may hold the domain's lock meanwhile."""


class DomainLocks:
    """The locks of all domains of the host. A process that has one takes only those below it.

    * ``changing``: from the first look of what changes a domain to its end, calls to libvirt included: define, create,
      release, wipe, repair. A restore has it, too, as what it changes is put back if it fails, and so has a start from
      a managed save, from its trial to libvirt's reply: libvirt removes the save before it calls the hook, which must
      find the domain as the trial has left it.
    * ``starting``: the preparation of a start, by the hook, the trial, or a device model that xl runs.
    * ``storing``: what the ledger says the domain has is changed. The hook takes it, and libvirt waits for that with
      the domain locked; so nobody calls libvirt with it.

    The hook runs within a call that may have ``changing``. It does not take that.

    :param folder: created if it does not exist; only root may have access.
    :param reserve: space for the lock of a start when the disk is full.
    :ivar seconds: how long to wait for another process.
    """

    def __init__(self, folder: Path, reserve: Reserve) -> None:
        self._folder = folder
        self._reserve = reserve
        self.seconds = WAIT_SECONDS

    def changing(self, uuid: str) -> LockFile:
        """Take the lock for a change of the domain.

        :returns: the lock, to be closed.
        :raises InUseError: when another process still has it.
        """
        return self._change(uuid, self.seconds)

    def try_changing(self, uuid: str, client: str) -> LockFile:
        """Take the lock for a change of the domain or the start of its saved guest, and do not wait for it.

        :param client: who it is for, to be told to others.
        :returns: the lock, to be closed.
        :raises InUseError: when it is taken.
        """
        return self._reserve.spend(lambda: self._change(uuid, 0.0, client))

    def is_changing(self, uuid: str) -> bool:
        """Return True while a process changes the domain, or what the ledger says it has."""
        return any(is_taken(self._folder / name) for name in (f"define-{uuid}", f"store-{uuid}"))

    def starting(self, uuid: str) -> LockFile:
        """Take the lock for the preparation of the domain's start.

        :returns: the lock, to be closed.
        :raises InUseError: when another process still has it.
        """
        what = f"a start of domain {uuid} is being prepared"
        return self._reserve.spend(lambda: self._take(f"start-{uuid}", what, self.seconds))

    def storing(self, uuid: str, *, spends: bool = True) -> LockFile:
        """Take the lock for what the ledger says the domain has.

        :param spends: the space that is kept for starts may be used for the lock.
        :returns: the lock, to be closed.
        :raises InUseError: when another process still has it.
        """
        what = f"the NVDIMMs of domain {uuid} are being defined or released"
        if not spends:
            return self._take(f"store-{uuid}", what, self.seconds)
        return self._reserve.spend(lambda: self._take(f"store-{uuid}", what, self.seconds))

    def _change(self, uuid: str, seconds: float, client: str = "") -> LockFile:
        what = f"domain {uuid} is being defined, created, started from a saved guest or released"
        return self._take(f"define-{uuid}", what, seconds, client)

    def _take(self, name: str, what: str, seconds: float, client: str = "") -> LockFile:
        file = self._folder / name
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return LockFile(file, seconds, client)
        except BlockingIOError as error:
            raise InUseError(f"{what} by {holder(file)}", hint="wait until that ends, or stop it") from error
        except OSError as error:
            raise own_file_error(f"cannot make {file}", error) from error
