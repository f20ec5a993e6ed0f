# SPDX-License-Identifier: Apache-2.0
"""The holders of running guests: one process per guest, which has the guest's backings open.

A file that somebody has deleted under the guest would be gone with its holder. Another process gets it before, the
*keeper*, which goes on until the operator ends it.

Xen does not tell Linux that a guest has frames of a file or device. An open file keeps its file system mounted; a block
device that is open exclusively can be neither mounted nor given to a file system, and ndctl does not disable its
namespace (open(2), O_EXCL). A holder is a process of its own, because QEMU may die while its guest runs on.

Imports next to nothing: the device model uses it and must start fast.
"""

from __future__ import annotations

import os
import stat

from nvdimm_driver.errors import BackingError
from nvdimm_driver.host_text import decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

PROGRAM = os.path.join(os.path.dirname(os.path.dirname(__file__)), "cmd", "holder.py")
PROCESS_NAME = "nvdimm-holder"
"""As lsof(8), fuser(1) and ps(1) show it; cmd/holder.py sets it."""
_POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")
"""Without capabilities, so that nvdimmd, which has few, may see what it holds (ptrace(2), cap_issubset)."""
_PROGRAM_NAME = b"/nvdimm_driver/cmd/holder.py"
START_SECONDS = 60.0
_KEEPER = "deleted:"
"""What a keeper has before the domain's uuid."""


class Holders:
    """Starts, finds and ends the holders of the guests of one ledger.

    :param state_dir: the driver's folder.
    """

    def __init__(self, state_dir: str | Path) -> None:
        self._state_dir = os.path.realpath(state_dir)

    def start(self, uuid: str, name: str, descriptors: Sequence[int]) -> int:
        """Start a holder of these descriptors, which are held when this returns; the caller keeps its own.

        :param name: of the domain, for people who look at the process.
        :returns: its process id.
        :raises BackingError: when it cannot be started.
        """
        import subprocess
        import sys

        from nvdimm_driver.processes import leave_unit

        program = [sys.executable, "-I", "-S", PROGRAM, self._state_dir, uuid, name]
        null = subprocess.DEVNULL
        try:
            done = subprocess.run(
                [*_POWERLESS, *program],
                pass_fds=descriptors,
                stdin=null,
                stdout=subprocess.PIPE,
                stderr=null,
                timeout=START_SECONDS,
                check=True,
            )
            pid = int(done.stdout)
            leave_unit(pid)
            return pid
        except (OSError, subprocess.SubprocessError) as error:
            raise BackingError(
                f"no process could be started that holds the backings of domain {name}: {error}",
                hint=f"run it to see why: {' '.join([*_POWERLESS, *program[:4]])}",
            ) from error

    def held(self) -> set[str]:
        """Return the uuids of the domains that have a holder."""
        found = {uuid for _, state_dir, uuid in _holders() if state_dir == self._state_dir}
        return {uuid for uuid in found if not uuid.startswith(_KEEPER)}

    def has(self, uuid: str) -> bool:
        """Return True when a domain has a holder; fast for one that was just started."""
        return any(rest == [self._state_dir, uuid] for _, *rest in _holders())

    def find(self, uuid: str) -> list[int]:
        """Return the process ids of the holders of a domain; more than one, if two processes have started one."""
        return [pid for pid, *rest in _holders() if rest == [self._state_dir, uuid]]

    def find_holding(self, uuid: str, path: str) -> list[int]:
        """Return the process ids of the holders of a domain that have what is at a path open.

        :raises OSError: when nothing is there.
        """
        wanted = os.stat(path)
        return [pid for pid in self.find(uuid) if any(_is_that(each, wanted) for each in _opened(pid))]

    def kill(self, uuid: str, pids: Collection[int]) -> None:
        """End those of these processes that are holders of a domain; what they held is free when this returns.

        A deleted file gets a keeper before: see :meth:`deleted`.

        :raises BackingError: when no keeper can be started: that holder goes on.
        """
        from functools import partial

        from nvdimm_driver.processes import kill

        for pid in pids:
            if self._is_of(uuid, pid):
                self._keep(uuid, [there for _, there in _deleted(pid)])
                kill(pid, partial(self._is_of, uuid, pid))

    def _keep(self, uuid: str, files: Sequence[str]) -> None:
        """Start a keeper of deleted files, unless there are none, or a keeper has them already.

        :param files: paths at which they can be opened.
        """
        from contextlib import ExitStack

        if not files:
            return
        kept = [there for pid in self.find(_KEEPER + uuid) for _, there in _deleted(pid)]
        with ExitStack() as opened:
            descriptors = []
            for file in files:
                try:
                    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:  # the holder has been killed, and nobody has the file any more
                    return
                opened.callback(os.close, descriptor)
                if not any(_is_same(descriptor, each) for each in kept):
                    descriptors.append(descriptor)
            if descriptors:
                self.start(_KEEPER + uuid, "deleted files", descriptors)

    def deleted(self) -> list[tuple[int, str, str, str]]:
        """Return what only a holder or a keeper has: its process id, the domain's uuid, the file, and how to open it.

        That is a path below ``/proc``, which cp(1) reads.
        """
        own = ((pid, uuid.removeprefix(_KEEPER)) for pid, state_dir, uuid in _holders() if state_dir == self._state_dir)
        return [(pid, uuid, path, there) for pid, uuid in own for path, there in _deleted(pid)]

    def _is_of(self, uuid: str, pid: int) -> bool:
        return _holder(pid) == (pid, self._state_dir, uuid)


def is_held(number: int) -> bool:
    """Return True when a holder has a block device open: then nothing else has it exclusively.

    :param number: its device number.
    """
    return any(_has_open(pid, number) for pid, *_ in _holders())


def _holders() -> Iterator[tuple[int, str, str]]:
    """Yield process id, state folder and uuid of each holder of the host, the last that was started first."""
    for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):
        if found := _holder(pid):
            yield found


def _holder(pid: int) -> tuple[int, str, str] | None:
    """Return process id, state folder and uuid of a holder; None if the process is none, or has ended.

    Everybody chooses the command line of his own processes, and of programs with the set-user-ID bit that he runs.
    """
    folder = f"/proc/{pid}"
    try:
        descriptor = os.open(f"{folder}/cmdline", os.O_RDONLY)
        try:
            line = os.read(descriptor, 1 << 16)
        finally:
            os.close(descriptor)
        if _PROGRAM_NAME not in line:  # of most processes, this is all that is asked
            return None
        words = decode(line).split("\0")
        if len(words) < 7 or words[1:3] != ["-I", "-S"] or not words[3].endswith(_PROGRAM_NAME.decode()):
            return None
        program = os.path.basename(os.readlink(f"{folder}/exe"))
        if os.stat(folder).st_uid != 0 or not program.startswith("python"):
            return None
    except OSError:
        return None
    return pid, words[4], words[5]


def _deleted(pid: int) -> list[tuple[str, str]]:
    """Return the deleted files that a process has open, each with the path at which it can be opened still."""
    found = []
    folder = f"/proc/{pid}/fd"
    try:
        for name in sorted(os.listdir(folder)):
            there = f"{folder}/{name}"
            status = os.stat(there)
            if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                found.append((os.readlink(there).removesuffix(" (deleted)"), there))
    except OSError:  # it has ended
        return []
    return found


def _is_same(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:  # the process that had it has ended
        return False


def _has_open(pid: int, number: int) -> bool:
    return any(stat.S_ISBLK(each.st_mode) and each.st_rdev == number for each in _opened(pid))


def _opened(pid: int) -> list[os.stat_result]:
    """Return what a process has open; nothing once it has ended."""
    folder = f"/proc/{pid}/fd"
    try:
        return [os.stat(f"{folder}/{name}") for name in os.listdir(folder)]
    except OSError:
        return []


def _is_that(one: os.stat_result, other: os.stat_result) -> bool:
    """Return True for one file, or one device, by whatever name."""
    if stat.S_ISREG(one.st_mode) or stat.S_ISREG(other.st_mode):
        return os.path.samestat(one, other)
    return (stat.S_IFMT(one.st_mode), one.st_rdev) == (stat.S_IFMT(other.st_mode), other.st_rdev)
