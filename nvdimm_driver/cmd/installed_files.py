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
    """Return True for a file that :func:`install` has written."""
    return host_files.exists(path) and MARK in read(path)


def install(path: Path, text: str, mode: int) -> str:
    """Write a file atomically; return a line that says what was done.

    :raises ConfigError: when the path has a file without :data:`MARK`.
    """
    if host_files.exists(path):
        if not is_ours(path):
            raise ConfigError(f"{path} exists, and {NOT_OURS}", hint="move it away, and try again")
        if read(path) == text:
            return f"unchanged {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(mode)
    temporary.replace(path)
    return f"installed {path}"


def remove(path: Path) -> str:
    """Delete a file that :func:`install` has written; return a line that says what was done."""
    if not host_files.exists(path):
        return f"not there {path}"
    if not is_ours(path):
        return f"left alone {path}: {NOT_OURS}"
    path.unlink()
    return f"removed {path}"
