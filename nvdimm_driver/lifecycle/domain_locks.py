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
    """The locks of all domains of the host.

    There are three for each domain: ``virsh create`` changes claims around a start, and nvdimmd has one from the
    trial of a saved guest's start to its end.

    :param folder: created if it does not exist; only root may have access.
    :param reserve: space for the lock of a start when the disk is full.
    :ivar seconds: how long to wait for another process.
    """

    def __init__(self, folder: Path, reserve: Reserve) -> None:
        self._folder = folder
        self._reserve = reserve
        self.seconds = WAIT_SECONDS

    def changing(self, uuid: str) -> LockFile:
        """Take the lock for changes of the domain's claims: define, create, release, repair.

        :returns: the lock, to be closed.
        :raises InUseError: when another process still has it.
        """
        return self._change(uuid, self.seconds)

    def try_changing(self, uuid: str, client: str) -> LockFile:
        """Take the lock for changes of the domain's claims, and do not wait for it.

        :param client: who it is for, to be told to others.
        :returns: the lock, to be closed.
        :raises InUseError: when it is taken.
        """
        return self._change(uuid, 0.0, client)

    def try_restoring(self, uuid: str, client: str) -> LockFile:
        """Take the lock for the start of the domain's saved guest, and do not wait for it.

        :param client: who it is for, to be told to others.
        :returns: the lock, to be closed.
        :raises InUseError: when it is taken.
        """
        what = f"the saved guest of domain {uuid} is being started"
        return self._reserve.spend(lambda: self._take(f"restore-{uuid}", what, 0.0, client))

    def is_changing(self, uuid: str) -> bool:
        """Return True while a process has the lock for changes of the domain's claims."""
        return is_taken(self._folder / f"define-{uuid}")

    def starting(self, uuid: str) -> LockFile:
        """Take the lock for the preparation of the domain's start.

        :returns: the lock, to be closed.
        :raises InUseError: when another process still has it.
        """
        what = f"a start of domain {uuid} is being prepared"
        return self._reserve.spend(lambda: self._take(f"start-{uuid}", what, self.seconds))

    def _change(self, uuid: str, seconds: float, client: str = "") -> LockFile:
        return self._take(f"define-{uuid}", f"domain {uuid} is being defined, created or released", seconds, client)

    def _take(self, name: str, what: str, seconds: float, client: str = "") -> LockFile:
        file = self._folder / name
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return LockFile(file, seconds, client)
        except BlockingIOError as error:
            raise InUseError(f"{what} by {holder(file)}", hint="wait until that ends, or stop it") from error
        except OSError as error:
            raise own_file_error(f"cannot make {file}", error) from error
