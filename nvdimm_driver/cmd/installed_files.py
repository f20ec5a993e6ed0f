# SPDX-License-Identifier: Apache-2.0
"""Files that ``nvdimmctl register`` puts into other programs' folders."""

from __future__ import annotations

from pathlib import Path

from nvdimm_driver import host_files
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.host_text import read
from nvdimm_driver.registered import MARK

NOT_OURS = "nvdimm_driver did not write it"


def is_ours(path: Path) -> bool:
    """Return True for a file that :func:`install` has written.

    An empty one counts: earlier versions did not sync it, and XFS leaves that of it after a loss of power. But an empty
    unit is one that an operator has masked (systemd.unit(5)).
    """
    may_be_empty = path.suffix not in (".service", ".socket")
    return host_files.is_file(path) and (MARK in (text := read(path)) or (may_be_empty and not text))


def install(path: Path, text: str, mode: int, *, new: Path | None = None) -> str:
    """Write a file durably; return a line that says what was done.

    :param new: as for :func:`.host_files.write`.
    :raises ConfigError: when the path has a file of somebody else's.
    """
    if host_files.exists(path):
        if not is_ours(path):
            raise ConfigError(f"{path} exists, and {NOT_OURS}", hint="move it away, and try again")
        if read(path) == text:
            return f"unchanged {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    host_files.write(path, text.encode(errors="surrogateescape"), mode, new=new or "")
    return f"installed {path}"


def remove(path: Path) -> str:
    """Delete a file that :func:`install` has written; return a line that says what was done."""
    if not host_files.exists(path):
        return f"not there {path}"
    if not is_ours(path):
        return f"left alone {path}: {NOT_OURS}"
    path.unlink()
    host_files.sync_folder(path.parent)
    return f"removed {path}"
