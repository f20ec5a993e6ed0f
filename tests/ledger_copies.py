# SPDX-License-Identifier: Apache-2.0
"""Copies of a ledger, made and put back."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path


def forget_in_use(folder: Path) -> None:
    """Delete what tells which ledger of a state folder is in use."""
    folder.with_name(f"{folder.name}-in-use").unlink(missing_ok=True)


def forget_devices(folder: Path) -> None:
    """Let a state folder be as one of a version that wrote no marks of devices."""
    shutil.rmtree(folder / "devices", ignore_errors=True)


def copy_ledger(source: Path, target: Path) -> None:
    """Write a ledger to a file, as the documentation says.

    Where a ledger is, it becomes that one, in the same file, and it is not known any more how often that was written:
    nothing then tells that it comes from a backup, as with an image of the whole file system.
    """
    if target.exists():
        forget_in_use(target.parent)
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)
