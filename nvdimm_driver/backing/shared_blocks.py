# SPDX-License-Identifier: Apache-2.0
"""Files that share blocks, as XFS lets them: after a reflink, or root's deduplication.

A guest does not start while blocks of its NVDIMM are shared. If they come to be while it runs, the others have what it
writes, in place of their own bytes: they are doubtful (:func:`.inode.doubt`).
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack

from nvdimm_driver.backing import extents, inode
from nvdimm_driver.backing.files import lease_break_seconds
from nvdimm_driver.backing.paths import opened, reporting
from nvdimm_driver.backing.walk import walk
from nvdimm_driver.errors import BackingError
from nvdimm_driver.guest.mapping_guards import Ranges

LOG = logging.getLogger(__name__)
_UNKNOWN = "whether a file shares blocks with a guest's cannot be determined:"


def doubt_sharers(
    fd: int, size: int, top: str, lock: Callable[[int, str], AbstractContextManager[None]], mapped: Collection[int]
) -> list[str]:
    """Mark each file that shares blocks with the beginning of an open one as doubtful, durably; return the paths.

    One of another guest is left out: its blocks are compared with that guest's. One that is frozen for a start that is
    prepared, or was killed, has no guest.

    :param size: bytes of the beginning.
    :param top: the folder, resolved, below which the files are.
    :param lock: keeps others from freezing and thawing an open file, with its path.
    :param mapped: numbers of the runs of guests.
    :raises BackingError: when one cannot be marked.
    """
    own, here = Ranges("", (("", *each) for each in _shared(fd, size))), os.fstat(fd)
    found: list[str] = []
    leased: list[str] = []
    for path, error in walk(top) if own.starts else ():
        if error is not None:
            LOG.warning("%s %s", _UNKNOWN, error)
        elif not _doubt_if_shared(path, own, here, found, lock, mapped):
            leased.append(path)
    patience = lease_break_seconds()  # of all at once: the kernel asks for each since the look above
    for path in leased:
        _doubt_if_shared(path, own, here, found, lock, mapped, patience)
    return found


def _doubt_if_shared(
    path: str,
    own: Ranges,
    here: os.stat_result,
    found: list[str],
    lock: Callable[[int, str], AbstractContextManager[None]],
    mapped: Collection[int],
    patience: float | None = None,
) -> bool:
    """Mark a file if it shares blocks, durably, and add it to those found; return False while a lease is on it.

    :param patience: seconds to wait for a lease; without, a lease is no error.
    """
    with ExitStack() as stack:
        try:
            other = stack.enter_context(opened(path, os.O_RDONLY, patience=patience or 0))
            there = os.fstat(other)
            is_other = stat.S_ISREG(there.st_mode) and there.st_dev == here.st_dev and there.st_ino != here.st_ino
            shares = is_other and any(own.touched_by(*each) for each in _shared(other, there.st_size))
        except (BackingError, OSError) as error:
            if patience is None and isinstance(error.__cause__, BlockingIOError):
                return False
            LOG.warning("%s %s", _UNKNOWN, error)
            return True
        if shares:
            with reporting(path), lock(other, path):
                if inode.frozen_for(other) in mapped:
                    return True
                inode.doubt(other)
                os.fsync(other)
            found.append(path)
    return True


def _shared(fd: int, size: int) -> Sequence[tuple[int, int]]:
    """Return place on the device and length, in bytes, of what the first bytes of an open file share with others."""
    found = extents.fiemap(fd, size)
    return [(each.physical, each.length) for each in found if each.flags & extents.SHARED]
