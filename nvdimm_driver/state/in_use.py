# SPDX-License-Identifier: Apache-2.0
"""The file that tells the ledger in use from a copy of it: it has its id, and how often it was written.

It is beside the ledger's folder: all of that can be put aside, and come back.

Imports nothing heavy: the device model, which has to start fast, uses it.
"""

from __future__ import annotations

import os
from contextlib import suppress

from nvdimm_driver import host_files
from nvdimm_driver.errors import LedgerError, own_file_error

FORMAT = "{:32} {:20}\n"
SIZE = len(FORMAT.format("", 0))
UNKNOWN = ("unknown", 0)
"""A ledger was in use, and nobody knows which: it is none that has an id."""


def beside(ledger: str) -> InUse:
    """Return the file for the ledger at a path: one for each folder, whatever names links give to that."""
    if ledger == ":memory:":
        return InUse(None)
    return InUse(f"{os.path.realpath(os.path.dirname(os.path.abspath(ledger)))}-in-use")


class InUse:
    """The file, which is written after each write to the ledger: its number may be lower than the ledger's, not higher.

    The number is not synced. After the power was lost, it may be much lower: a copy that is as old is not noticed then.

    :param path: path of the file, which need not exist; None for a ledger in memory.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def read(self) -> tuple[str, int] | None:
        """Return the id of the ledger in use and how often it was written; None when that is not known.

        :raises LedgerError: when the file cannot be read.
        """
        if self.path is None:
            return None
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return _parse(os.pread(fd, SIZE, 0))
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(
                f"cannot read {self.path}: {error.strerror}",
                hint="run 'nvdimmctl check --repair': it compares the ledger, and makes the file anew",
            ) from error

    def known(self) -> tuple[str, int] | None:
        """Do what :meth:`read` does; return :data:`UNKNOWN` when the file cannot be read."""
        try:
            return self.read()
        except LedgerError:
            return UNKNOWN

    def is_beyond(self, ledger: str, writes: int) -> bool:
        """Return True when a ledger of that id was written that often already; False when it cannot be read."""
        known = self.known()
        return known is not None and known[0] == ledger and known[1] >= writes

    def advance(self, ledger: str, writes: int) -> None:
        """Note a write, if it is of the ledger in use, or if none is known.

        Of two processes at once, the later write may be noted first, and not stay. The next one makes up for it.
        """
        try:
            self._write(ledger, writes, anew=False)
        except OSError:
            return  # the ledger is written; only a copy of it may not be noticed

    def replace(self, ledger: str, writes: int) -> None:
        """Take a ledger for the one in use from now on, also after the power was lost.

        :raises LedgerError: when that cannot be written.
        """
        try:
            try:
                self._write(ledger, writes, anew=True)
            except OSError:  # a bad sector
                self._put_another(ledger, writes)
        except OSError as error:
            raise own_file_error(f"cannot write {self.path}", error) from error

    def follow(self, other: InUse) -> None:
        """Take the ledger that another such file tells for the one in use, or none if that cannot be read.

        :raises LedgerError: when that cannot be written.
        """
        self.replace(*(other.known() or UNKNOWN))

    def _write(self, ledger: str, writes: int, *, anew: bool) -> None:
        """Write in place: that needs no room on the disk once the file is there."""
        if self.path is None:
            return
        import fcntl

        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # until it is closed: a write of the ledger before must not come later
            known = None if anew else _parse(os.pread(fd, SIZE, 0))
            if known is None or (known[0] == ledger and known[1] < writes):
                os.pwrite(fd, FORMAT.format(ledger, writes).encode(), 0)
            if anew:
                os.fsync(fd)
        finally:
            os.close(fd)
        if anew:
            host_files.sync_folder(os.path.dirname(self.path))

    def _put_another(self, ledger: str, writes: int) -> None:
        """Put a new file in the place of one that can be neither read nor written."""
        if self.path is None:
            return
        new = f"{self.path}.{os.getpid()}"
        try:
            InUse(new)._write(ledger, writes, anew=True)
            os.rename(new, self.path)
        except OSError:
            with suppress(OSError):
                os.unlink(new)
            raise
        host_files.sync_folder(os.path.dirname(self.path))


def _parse(text: bytes) -> tuple[str, int] | None:
    """Return the id and the number in the file; None when there are none, or not whole."""
    words = text.decode("ascii", "replace").split()
    return (words[0], int(words[1])) if len(text) == SIZE and len(words) == 2 and words[1].isdigit() else None
