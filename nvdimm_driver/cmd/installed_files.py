# SPDX-License-Identifier: Apache-2.0
"""Files that ``nvdimmctl register`` puts into other programs' folders."""

from __future__ import annotations

from pathlib import Path

from nvdimm_driver.errors import ConfigError

MARK = "# written by nvdimm_driver: change its options, not this file"
"""Each of these files has this line; a file without it belongs to somebody else."""


def install(path: Path, text: str, mode: int) -> str:
    """Write a file, whole or not at all; return what was done.

    :raises ConfigError: when a file that is not ours is in the way.
    """
    if path.exists():
        if MARK not in path.read_text(encoding="utf-8"):
            raise ConfigError(f"{path} exists and is not ours", hint="move it away")
        if path.read_text(encoding="utf-8") == text:
            return f"unchanged {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(mode)
    temporary.replace(path)
    return f"installed {path}"


def remove(path: Path) -> str:
    """Delete a file that :func:`install` wrote; return what was done."""
    if not path.exists():
        return f"not there {path}"
    if MARK not in path.read_text(encoding="utf-8"):
        return f"left alone, not ours: {path}"
    path.unlink()
    return f"removed {path}"
