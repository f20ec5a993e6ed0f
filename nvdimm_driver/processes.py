# SPDX-License-Identifier: Apache-2.0
"""Processes of the host: programs that are run, and processes as ``/proc/PID`` shows them (proc(5))."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from nvdimm_driver.host_text import decode, read

FIRST_UID = 0x7000_0000
"""User of the QEMUs that build tables, and group of all QEMUs without a guest; a domain's label server has the user
``FIRST_UID + domid``. systemd's list of numbers (docs/UIDS-GIDS.md) has this range, up to 0x7FFF_FFFF, as unused."""
KILL_SECONDS = 10.0
CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified")
"""Roots of the hierarchy that systemd uses: unified, or one of the two of the older layouts (cgroups(7))."""
_STARTTIME = 19
"""Index among the fields after the name in ``stat``: clock ticks from the host's boot to the start of the process."""


def run(
    words: Sequence[str], *, timeout: float | None = None, folder: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program without input until it ends; return its status and what it has printed.

    :param timeout: seconds.
    :param folder: its working directory.
    :raises OSError: when it cannot be started.
    :raises subprocess.TimeoutExpired: when it takes longer.
    """
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, cwd=folder, check=False
    )
    return subprocess.CompletedProcess(done.args, done.returncode, decode(done.stdout), decode(done.stderr))


def leave_unit(pid: int, roots: Sequence[str] = CGROUPS) -> None:
    """Move a process, and the children that it starts from then on, into the driver's own control group.

    A guest outlives whoever notices that its holder or label server is gone. That can be a command of a timer, or of
    nova-compute: systemd kills what such a unit leaves (systemd.kill(5), KillMode=control-group).
    """
    for root in roots:
        with suppress(OSError):  # there is no such hierarchy, or a container may not change it
            if os.path.exists(f"{root}/cgroup.procs"):
                with suppress(FileExistsError):
                    os.mkdir(f"{root}/nvdimm-driver")
                Path(f"{root}/nvdimm-driver/cgroup.procs").write_text(str(pid), encoding="ascii")


def start_time(process: Path) -> float | None:
    """Return when a process started, in seconds since the epoch; None when it has ended.

    :param process: its folder, ``/proc/PID``.
    """
    try:
        fields = read(process / "stat").rpartition(")")[2].split()
    except OSError:
        return None
    if len(fields) <= _STARTTIME:
        return None
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + int(fields[_STARTTIME]) / os.sysconf("SC_CLK_TCK")


def users(pid: int) -> set[int]:
    """Return the users that a process runs as: real, effective, saved, and that of file accesses.

    The owner of ``/proc/PID`` is the effective one: root, for a program with the set-user-ID bit that anybody runs.

    :raises OSError: when it has ended.
    """
    lines = read(Path(f"/proc/{pid}/status")).splitlines()
    return {int(word) for line in lines if line.startswith("Uid:") for word in line.split()[1:]}


def kill(pid: int, is_meant: Callable[[], bool] = lambda: True, *, patience: float = 0.0) -> None:
    """Kill a process, and wait until it is dead: its locks are released and its files closed then.

    :param is_meant: returns False when another process has the number by now; it is asked when that cannot happen any
        more.
    :param patience: seconds in which it may end by itself.
    """
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            # not select(2), which takes no descriptor above 1023, nor poll(2), which eventlet takes away
            with selectors.DefaultSelector() as end:
                end.register(descriptor, selectors.EVENT_READ)
                if is_meant() and not end.select(patience):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    end.select(KILL_SECONDS)
        finally:
            os.close(descriptor)
