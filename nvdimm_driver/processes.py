# SPDX-License-Identifier: Apache-2.0
"""Processes of the host, as ``/proc/PID`` shows them (proc(5))."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STARTTIME = 19
"""Index among the fields after the name in ``stat``: clock ticks from the host's boot to the start of the process."""


def start_time(process: Path) -> float | None:
    """Return when a process started, in seconds since the epoch; None when it has ended.

    :param process: its folder, ``/proc/PID``.
    """
    try:
        fields = (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    if len(fields) <= _STARTTIME:
        return None
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + int(fields[_STARTTIME]) / os.sysconf("SC_CLK_TCK")
