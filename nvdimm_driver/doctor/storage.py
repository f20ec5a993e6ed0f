# SPDX-License-Identifier: Apache-2.0
"""Check the folders that the driver writes to: its state, and its log."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from nvdimm_driver import host_files
from nvdimm_driver.doctor.finding import Finding, failed, passed, warned
from nvdimm_driver.shell import command
from nvdimm_driver.sizes import human
from nvdimm_driver.state.reserve import SIZE, Reserve

_TRIED = 1 << 20
"""Bytes that are allocated to see whether a folder can be written; other programs do not see them."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What starts have a reserve for."""


def check_state(ledger: Path) -> Finding:
    """Check that the state folder can be written, has room, and has space kept for starts.

    :param ledger: path of the ledger.
    """
    check, folder = "state folder", ledger.parent
    if not host_files.is_folder(folder):
        return failed(check, f"there is no {folder}", "'nvdimmctl register' makes it")
    found = os.statvfs(folder)
    if found.f_files and not found.f_favail:
        problem = f"{folder}: no inode is free on its file system: no domain with NVDIMMs can start"
        return failed(check, problem, f"delete files, or move them away; {command('df', '-i', folder)} counts inodes")
    kept = Reserve(f"{ledger}-reserve").size()
    error = _write_error(folder)
    if error is not None and error.errno in _FULL and kept:
        return warned(
            check,
            f"{folder}: {error.strerror}; {human(kept)} are kept for starts, and a define may fail",
            "make room before they are used up",
        )
    if error is not None:
        problem = f"{folder}: {error.strerror}: no domain with NVDIMMs can start"
        return failed(check, problem, "make room, or make it writable")
    if kept < SIZE:
        return warned(
            check,
            f"{folder}: {human(kept)} of {human(SIZE)} are kept for starts on a full disk",
            "make room: 'nvdimmctl list' then keeps the rest",
        )
    return passed(check, f"{folder} can be written; {human(kept)} are kept for starts on a full disk")


def check_log(file: Path) -> Finding:
    """Check that lines can be appended to the log. A start does not need that."""
    error = _append_error(file)
    if error is None and host_files.exists(file) and file.stat().st_mode & stat.S_IRWXO:
        return warned(
            "log",
            f"everybody on this host can read {file}, which names domains and files",
            f"repeat 'nvdimmctl register', or: {command('chmod', 'o=', file)}",
        )
    if error is None:
        return passed("log", str(file))
    return warned(
        "log",
        f"{file} cannot be written: {error}; starts go on, and their log lines go to libvirtd and libxl alone",
        "'nvdimmctl register' makes its folder; otherwise make room, or change [DEFAULT] log_file",
    )


def _append_error(file: Path) -> str | None:
    if not host_files.is_folder(file.parent):
        return f"there is no folder {file.parent}"
    if host_files.exists(file) and not (host_files.is_file(file) and os.access(file, os.W_OK)):
        return "it is not a file that this user may write"
    error = _write_error(file.parent)
    return None if error is None else error.strerror


def _write_error(folder: Path) -> OSError | None:
    """Return why no file can be written in a folder; None when one can. Nothing is left behind."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _TRIED)
        finally:
            os.close(fd)
    except OSError as error:
        return error
    return None
