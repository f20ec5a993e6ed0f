# SPDX-License-Identifier: Apache-2.0
"""The processes that have a file open, or mapped, so that they may write it: for people, who have to end them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def describe(fd: int, proc: Path = Path("/proc")) -> str:
    """Return for people which processes may write an open file, as far as /proc tells it to this one."""
    found = sorted({int(process.name) for process in proc.glob("[0-9]*") if _may_write(process, os.fstat(fd))})
    names = [f"process {each} ({_name(proc / str(each))})" for each in found]
    return " and ".join(names) or "a program, which /proc does not show,"


def _may_write(process: Path, file: os.stat_result) -> bool:
    with suppress(OSError, ValueError):  # it has ended
        return any(_writes(process, each.name, file) for each in (process / "fd").iterdir()) or any(
            os.path.samestat(os.stat(each), file) for each in _shared_mappings(process)
        )
    return False


def _writes(process: Path, number: str, file: os.stat_result) -> bool:
    """Return True for a descriptor of the file with which a process can write."""
    with suppress(OSError, ValueError):  # it is closed
        if os.path.samestat(os.stat(process / "fd" / number), file):
            lines = (process / "fdinfo" / number).read_text(encoding="ascii").splitlines()
            flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
            return flags & os.O_ACCMODE != os.O_RDONLY
    return False


def _shared_mappings(process: Path) -> Iterator[Path]:
    """Yield the files that a process has mapped, writable and shared (proc(5): maps, map_files)."""
    for line in (process / "maps").read_bytes().splitlines():
        addresses, mode = line.split(b" ", 2)[:2]
        if mode.startswith(b"rw") and mode.endswith(b"s"):
            start, end = (int(each, 16) for each in addresses.split(b"-"))
            file = process / "map_files" / f"{start:x}-{end:x}"
            if file.exists():
                yield file


def _name(process: Path) -> str:
    with suppress(OSError):
        return (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
    return "it has ended"
