# SPDX-License-Identifier: Apache-2.0
"""Locks between processes: files in a folder of root's, locked with flock(2), which the end of a process releases."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from nvdimm_driver.host_text import printable, read

_WAITING = "waiting"
"""In place of the client."""
_CONTENT_MAX = 4096


class LockFile:
    """A lock that this process has until :meth:`close`; its file is there as long as somebody has it.

    :param file: in a folder that only root may write to.
    :param seconds: how long to wait while another process has it.
    :param client: who the lock is for, as :func:`holder` tells it; empty for this process itself.
    :raises BlockingIOError: when another process still has it.
    :raises OSError: when the file cannot be made.
    """

    def __init__(self, file: Path, seconds: float = 0.0, client: str = "") -> None:
        self._file = file
        deadline = time.monotonic() + seconds
        while True:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if take(self._descriptor, client) and is_at(self._descriptor, file):
                return
            blocked = is_at(self._descriptor, file)  # else its holder has just deleted it
            os.close(self._descriptor)
            if not blocked:
                continue
            if time.monotonic() >= deadline:
                raise BlockingIOError
            time.sleep(0.02)

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            self._file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def take(lock: int, client: str = "") -> bool:
    """Take a lock and write into it who has it, for :func:`holder`; return False while another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    with suppress(OSError):  # on a full disk, the number is missing in an error message
        os.ftruncate(lock, os.pwrite(lock, f"{os.getpid()}\n{client}".encode(), 0))
    return True


def is_taken(file: Path) -> bool:
    """Return True while a process has a lock; nothing is written, so the disk may be full or read-only."""
    try:
        lock = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def leave_waiting(lock: int, process: int) -> None:
    """Write into a lock of this process that another one has it, too, and keeps it: it waits and cannot be killed."""
    with suppress(OSError):
        os.ftruncate(lock, os.pwrite(lock, f"{process}\n{_WAITING}".encode(), 0))


def is_waiting(lock: int) -> bool:
    """Return True when the process that has a lock was left waiting with it."""
    return os.pread(lock, _CONTENT_MAX, 0).partition(b"\n")[2] == _WAITING.encode()


def is_at(lock: int, file: Path) -> bool:
    """Return True when a descriptor is of the file that has that name now."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(file))
    except FileNotFoundError:
        return False


def holder(file: Path) -> str:
    """Return for people which process has a lock, and for which client."""
    try:
        number, _, client = file.read_text(encoding="utf-8").partition("\n")
        for_client = f" for {client}" if client not in ("", _WAITING) else ""
        return f"{describe(int(number))}{for_client}"
    except (OSError, ValueError):
        return "another process"


def describe(process: int) -> str:
    """Return a process for people: its number and, while it runs, its name, on one line.

    Its user chooses the name, and virsh shows it in another user's terminal.
    """
    try:
        return f"process {process} ({printable(' '.join(read(f'/proc/{process}/comm').split()))})"
    except OSError:
        return f"process {process}"
