# SPDX-License-Identifier: Apache-2.0
"""The files below a folder, whatever its users have made there: folders as deep, or as closed, as they like."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from nvdimm_driver.backing.paths import HINTS, open_resolved, opened
from nvdimm_driver.errors import BackingError

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What was a folder when its name was read is none any more; ELOOP: it is a symbolic link."""


def walk(top: str) -> Iterator[tuple[str, BackingError | None]]:
    """Yield the path of each regular file below a resolved folder, on its file system, with None.

    A folder that cannot be read, such as one whose path is too long for the kernel, is yielded itself, with the reason.

    :raises BackingError: when the top folder cannot be read.
    """
    with opened(top, os.O_RDONLY | os.O_DIRECTORY) as fd:
        device = os.fstat(fd).st_dev
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            files, folders = _read(folder, device)
        except OSError as error:
            if error.errno in _GONE and folder != top:
                continue
            hint = HINTS.get(error.errno or 0, "")
            yield folder, BackingError(f"{folder}: what is in it cannot be examined: {error.strerror}", hint=hint)
        else:
            yield from ((os.path.join(folder, name), None) for name in files)
            waiting += [os.path.join(folder, name) for name in reversed(folders)]


def _read(folder: str, device: int) -> tuple[list[str], list[str]]:
    """Return the sorted names of the files and of the folders in a folder; none when another device is there."""
    fd = open_resolved(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if os.fstat(fd).st_dev != device:
            return [], []
        with os.scandir(fd) as found:
            entries = sorted(found, key=lambda each: each.name)
        files = [each.name for each in entries if each.is_file(follow_symlinks=False)]
        return files, [each.name for each in entries if each.is_dir(follow_symlinks=False)]
    finally:
        os.close(fd)
