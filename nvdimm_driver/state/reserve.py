# SPDX-License-Identifier: Apache-2.0
"""Space that is kept for the ledger, so that a guest can be started when the disk is full.

Imports nothing heavy: the device model, which has to start fast, uses it.
"""

from __future__ import annotations

import os

from nvdimm_driver import host_files
from nvdimm_driver.errors import FullDiskError, own_file_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeVar

    T = TypeVar("T")

SIZE = 16 << 20
"""A start takes some 200 KiB, and 30 bytes more for each extent of its backings."""
SLICE = 1 << 20
"""Bytes that are given back at a time. Other programs may take them before the start does: then it gets the next."""


class Reserve:
    """A file of allocated blocks in the ledger's file system; their content is not used.

    :param path: path of the file, which need not exist.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def size(self) -> int:
        """Return how many bytes are kept. A copy of the file, as from a backup, may have holes."""
        try:
            status = os.stat(self.path)
        except OSError:
            return 0
        return min(status.st_size, status.st_blocks * 512)

    def keep(self) -> None:
        """Allocate what is missing, if the file system has twice the room for that."""
        missing = SIZE - self.size()
        try:
            if missing > 0 and _free(os.path.dirname(self.path)) > 2 * missing:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    os.posix_fallocate(fd, 0, SIZE)
                finally:
                    os.close(fd)
        except OSError:
            return  # 'nvdimmctl doctor' reports it

    def give_back(self) -> bool:
        """Give a slice back to the file system; return False when there is none left."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            size = os.fstat(fd).st_size
            os.ftruncate(fd, max(0, size - SLICE))
            os.fsync(fd)  # a journal may hold freed blocks back until it is written
        except OSError:
            return False
        finally:
            os.close(fd)
        return size > 0

    def spend(self, work: Callable[[], T]) -> T:
        """Do something that a start needs, and give back slices while the disk is too full for it.

        :param work: can be repeated after an error.
        :raises FullDiskError: when there is no slice left.
        """
        while True:
            try:
                return work()
            except FullDiskError:
                if not self.give_back():
                    raise

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the driver's own that a start needs, durably, all of it or nothing.

        :raises LedgerError: when it cannot be written.
        """
        self.spend(lambda: _replace(path, content))


def _replace(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        host_files.write(path, content)
    except OSError as error:
        raise own_file_error(f"cannot write {path}", error) from error


def _free(folder: str) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
