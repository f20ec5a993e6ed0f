# SPDX-License-Identifier: Apache-2.0
"""A program that sees another folder in /etc: its configuration, which it looks for nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

BIND = 'mkdir -p "$1"; mount --bind "$2" "$1"; shift 2; exec "$@"'


def with_folder(etc: str, folder: Path, command: Sequence[str | Path]) -> list[str]:
    """Return the words that run a command with a folder in the place of another, such as /etc/nova. Needs root."""
    return ["unshare", "--mount", "sh", "-euc", BIND, "sh", etc, str(folder), *map(str, command)]
