# SPDX-License-Identifier: Apache-2.0
"""Locks of backings, in a folder of root's.

A lock on a backing itself (flock) would not do: everybody who may read the backing can hold it for ever.
"""

from __future__ import annotations

import fnmatch
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from nvdimm_driver.backing.fsfreeze import find_waiting
from nvdimm_driver.errors import BackingError, InUseError, hint_of
from nvdimm_driver.lock_files import holder, is_at, is_taken, is_waiting, leave_waiting, take
from nvdimm_driver.model import BackingIdentity

FREEZE_SECONDS = 5.0
"""How long freezing and thawing wait for one that freezes or thaws on the same file system, however many do so."""


class Locks:
    """The locks of all backings of the host.

    :param folder: created if it does not exist; only root may have access. None: this process is the only one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @contextmanager
    def freezing(self, fd: int, path: str) -> Iterator[None]:
        """Keep other processes from freezing and thawing on the file system of an open file meanwhile.

        Two at once would leave a running guest's file mutable. There is one lock for each file system, because a
        process that changes a file on a file system which fsfreeze has frozen waits there, and cannot be killed.

        :raises InUseError: when one other has that lock for FREEZE_SECONDS. While it goes from one to the next, as when
            many guests start at once, this waits for its turn.
        :raises BackingError: when the file system takes no changes for so long.
        """
        if self._folder is None:
            yield
            return
        file = self._folder / f"freeze-{_number(os.fstat(fd).st_dev)}"
        lock = self._open(file)
        try:
            turn, deadline = 0, 0.0
            while not take(lock):
                if is_waiting(lock):
                    raise _suspended(path, file)
                if turn != (turn := os.fstat(lock).st_mtime_ns):  # the next one has written its number
                    deadline = time.monotonic() + FREEZE_SECONDS
                if time.monotonic() > deadline:
                    raise InUseError(
                        f"{path}: {holder(file)} has been freezing or thawing a file of this file system for "
                        f"{FREEZE_SECONDS:.0f} s",
                        hint="wait until that ends, or stop it",
                    )
                time.sleep(0.02)
            waiting = find_waiting(fd, lock, FREEZE_SECONDS)
            if waiting is not None:
                leave_waiting(lock, waiting)
                raise _suspended(path, file)
            yield
        finally:
            os.close(lock)

    def check_changeable(self, fd: int, path: str) -> None:
        """Check that the file system of an open file or folder takes changes.

        :raises InUseError: when another process has been changing a file of it for FREEZE_SECONDS.
        :raises BackingError: when it takes none for so long.
        """
        with self.freezing(fd, path):
            pass

    @contextmanager
    def writing(self, fd: int, path: str, device: BackingIdentity | None = None) -> Iterator[None]:
        """Keep other processes from writing to an open file or device meanwhile, and starts from freezing it.

        :param device: the identity of a device, which shares bytes with the partitions of its namespace.
        :raises InUseError: when another process writes to it.
        :raises BackingError: when its file system takes no changes.
        """
        if self._folder is None:
            yield
            return
        if stat.S_ISREG(os.fstat(fd).st_mode):
            self.check_changeable(fd, path)
        file = _writer(self._folder, fd, device)
        with ExitStack() as locked:
            # Of the version before 0.2.0, too: 'wipe' and 'import' can go on for hours while the package is upgraded.
            for each in dict.fromkeys((file, _writer_of_before(self._folder, fd))):
                locked.enter_context(self._taken(each, path))
            for other in self._writers(file, device):
                if other != file and is_taken(other):  # of two at once, each may find the other
                    raise _overwritten(path, other)
            yield

    @contextmanager
    def _taken(self, file: Path, path: str) -> Iterator[None]:
        """Lock a file, and delete it at the end.

        :raises InUseError: when another process has it.
        """
        lock = self._open(file)
        try:
            while not take(lock) or not is_at(lock, file):
                if is_at(lock, file):
                    raise _overwritten(path, file)
                os.close(lock)  # its holder has just deleted it
                lock = self._open(file)
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
        finally:
            os.close(lock)

    def check_unwritten(self, fd: int, path: str, device: BackingIdentity | None = None) -> None:
        """Check that no process is :meth:`writing` to an open file or device.

        :param device: as for :meth:`writing`.
        :raises InUseError: when one is.
        """
        if self._folder is not None:
            writers = self._writers(_writer(self._folder, fd, device), device)
            for file in {*writers, _writer_of_before(self._folder, fd)}:
                if is_taken(file):
                    raise _overwritten(path, file)

    def _writers(self, file: Path, device: BackingIdentity | None) -> list[Path]:
        """Return the files that writers of the same bytes lock; of a device, also those of its parts, or of the whole.

        :param file: the one of a writer of exactly these.
        """
        if device is None:
            return [file]
        found = []
        for name in fnmatch.filter(self._names(file.parent), f"write-{device.device}-*-*"):
            start, size = map(int, name.rsplit("-", 2)[1:])
            if replace(device, start=start, size=size).shares_bytes(device):
                found.append(file.parent / name)
        return found

    def _names(self, folder: Path) -> list[str]:
        """Return the names in a folder. ``Path.glob`` of Python 3.13 finds none where it cannot look."""
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BackingError(f"{folder}: {error.strerror}", hint=hint_of(error)) from error

    def _open(self, file: Path) -> int:
        try:
            file.parent.mkdir(mode=0o700, exist_ok=True)
            return os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise BackingError(f"{file}: {error.strerror}", hint=hint_of(error)) from error


def _writer(folder: Path, fd: int, device: BackingIdentity | None) -> Path:
    """Return the file that a writer to an open file or device locks."""
    if device is not None:
        return folder / f"write-{device.device}-{device.start}-{device.size}"
    status = os.fstat(fd)
    return folder / f"write-{_number(status.st_dev)}-{status.st_ino}"


def _writer_of_before(folder: Path, fd: int) -> Path:
    """Return the file that a writer of version 0.1.0 locks; the version after 0.2.0 need not know that."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return _writer(folder, fd, None)
    kind = "block" if stat.S_ISBLK(status.st_mode) else "char"
    return folder / f"write-{kind}-{_number(status.st_rdev)}"


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _suspended(path: str, file: Path) -> BackingError:
    return BackingError(
        f"{path}: its file system takes no changes: {holder(file)} waits for one",
        hint="is it frozen? 'fsfreeze -u' of its mount point thaws it; else, see the kernel's log",
    )


def _overwritten(path: str, file: Path) -> InUseError:
    return InUseError(
        f"{path}: is being overwritten by {holder(file)}",
        hint="a define, an import or a wipe: wait until it ends, or stop it",
    )
