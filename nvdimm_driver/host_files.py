# SPDX-License-Identifier: Apache-2.0
"""Questions about files of the host. What cannot be looked at is an error, and not a file that is not there.

``Path.exists``, ``is_file`` and ``is_dir`` of Python 3.14, and ``os.path.exists`` of any, say False then, too.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def exists(path: str | Path) -> bool:
    """Return True when there is something at a path.

    :raises OSError: when nobody can say, as from every function here.
    """
    return bool(_mode(path))


def is_file(path: str | Path) -> bool:
    """Return True when there is an ordinary file at a path."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | Path) -> bool:
    """Return True when there is a folder at a path."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: str | Path) -> int:
    """Return the mode of what is at a path; 0 for nothing."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return 0
