# SPDX-License-Identifier: Apache-2.0
"""The label servers of running guests (``[acpi] dsm = qemu``): one process per guest, which holds the guest's lock."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from nvdimm_driver.errors import XenError
from nvdimm_driver.processes import FIRST_UID, kill, run, start_time, users

MODULE = "nvdimm_driver.cmd.label_server"
END_SECONDS = 3.0
"""Time in which a label server sees that its domain is gone: it looks twice a second."""
START_SECONDS = 40.0
"""Time that a label server may take to start; libxl waits 60 s for the device model, which waits for this."""

_REQUESTS = struct.Struct("=QQ")
"""Content of a domain's file of request counts: answered, failed."""


class RequestCounter:
    """Counts the label requests of a domain in a file that stays open when this process gives up its privileges.

    It continues the counts of earlier servers of the domain.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._counts = list(_counts(os.pread(self._descriptor, _REQUESTS.size, 0)))

    def add(self, *, failed: bool) -> None:
        """Count one request. On a full disk, the file has the count later: the guest waits for its answer."""
        self._counts[failed] += 1
        with suppress(OSError):
            os.pwrite(self._descriptor, _REQUESTS.pack(*self._counts), 0)


class LabelServers:
    """Starts, locks and observes the label servers of this host.

    :param state_dir: the driver's folder.
    """

    def __init__(self, state_dir: str | Path) -> None:
        self.state_dir = Path(state_dir)

    def lock(self, uuid: str) -> int | None:
        """Take the lock of the domain's label server; return its descriptor, or None while a server holds it."""
        descriptor = os.open(self._lock_file(uuid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def count_requests(self, uuid: str) -> RequestCounter:
        """Return a counter for the label requests of a domain."""
        return RequestCounter(self._requests_file(uuid))

    def requests(self, uuid: str) -> tuple[int, int] | None:
        """Return the numbers of answered and failed label requests of the domain; None if no server ever counted."""
        try:
            return _counts(self._requests_file(uuid).read_bytes())
        except FileNotFoundError:
            return None

    def is_running(self, uuid: str) -> bool:
        """Return True while the domain has a label server."""
        try:
            descriptor = self.lock(uuid)
        except FileNotFoundError:
            return False
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def is_older_than(self, uuid: str, moment: float) -> bool:
        """Return True if the domain has a label server that started before a moment.

        :param moment: seconds since the epoch.
        """
        return any((start_time(each) or moment) < moment for each in self._processes(uuid))

    def kill(self, uuid: str) -> None:
        """Kill the domain's label server; its guest's requests wait in Xen until another is started."""
        for pid in self.find(uuid):
            kill(pid, partial(self._serves, uuid, pid))

    def find(self, uuid: str) -> list[int]:
        """Return the process ids of the domain's label server, and of the process that watches it."""
        return [int(process.name) for process in self._processes(uuid)]

    def end(self, uuid: str, pids: Collection[int]) -> None:
        """Wait until those of these processes that serve a domain, which is gone, have ended and closed its backings.

        :param pids: of processes that may have ended, so that others have their numbers.
        """
        end = time.monotonic() + END_SECONDS
        for pid in pids:
            kill(pid, partial(self._serves, uuid, pid), patience=max(0.0, end - time.monotonic()))

    def start(self, domid: int, uuid: str) -> None:
        """Start a label server for a domain that has its page for requests; it serves when this returns.

        :raises XenError: with the server's reason, when it does not start.
        """
        command = [sys.executable, "-I", "-m", MODULE, str(domid), uuid]
        try:
            done = run(command, timeout=START_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise XenError(
                f"the label server of domid {domid} did not start in {START_SECONDS:.0f} s",
                hint="look for the reason in its log, or use dsm 'aml', which needs no label server",
            ) from error
        if done.returncode:
            raise XenError(f"no label server for domid {domid}: {done.stderr.strip()}")

    def _processes(self, uuid: str) -> Iterator[Path]:
        """Yield the folders in /proc of the processes that serve a domain."""
        for process in Path("/proc").glob("[0-9]*"):
            if self._serves(uuid, int(process.name)):
                yield process

    def _serves(self, uuid: str, pid: int) -> bool:
        """Return True when a process has the domain's lock file open.

        Everybody chooses the command line of his own processes, and what their files are called: in a mount namespace,
        any file can have the path of the lock. So the file has to be the lock itself, which only root can open. That is
        asked of root's processes and confined label servers only: others' files can hold up who looks at them.
        """
        process = Path(f"/proc/{pid}")
        try:
            if MODULE.encode() not in (process / "cmdline").read_bytes().split(b"\0"):
                return False
            if not all(user == 0 or user > FIRST_UID for user in users(pid)):
                return False
            path, lock = str(self._lock_file(uuid).resolve()), self._lock_file(uuid).stat()
            named = [each for each in (process / "fd").iterdir() if os.readlink(each) == path]
            return any(os.path.samestat(each.stat(), lock) for each in named)
        except OSError:  # it has ended, or there is no lock yet
            return False

    def _lock_file(self, uuid: str) -> Path:
        return self.state_dir / "domains" / uuid / "label-server"

    def _requests_file(self, uuid: str) -> Path:
        return self.state_dir / "domains" / uuid / "label-requests"


def _counts(content: bytes) -> tuple[int, int]:
    if len(content) != _REQUESTS.size:
        return 0, 0
    answered, failed = _REQUESTS.unpack(content)
    return answered, failed
