# SPDX-License-Identifier: Apache-2.0
"""Files that share blocks, as XFS lets them: after a reflink, or root's deduplication.

A guest does not start with such a file. If it comes to share blocks while its guest runs, the others have what that
guest writes, in place of their own bytes: they are doubtful (:func:`.inode.doubt`).
"""

from __future__ import annotations

import logging
import os
import stat
from contextlib import ExitStack

from nvdimm_driver.backing import extents, inode
from nvdimm_driver.backing.paths import open_again, opened, reporting
from nvdimm_driver.backing.walk import walk
from nvdimm_driver.errors import BackingError
from nvdimm_driver.guest.mapping_guards import Ranges

LOG = logging.getLogger(__name__)


def doubt_sharers(fd: int, size: int, top: str) -> list[str]:
    """Mark each file that shares blocks with the beginning of an open one as doubtful, durably; return the paths.

    An immutable one is left out: nobody can let it have other blocks.

    :param size: bytes of the beginning.
    :param top: the folder, resolved, below which the files are.
    :raises BackingError: when one cannot be marked.
    """
    own, here, found = Ranges("", (("", *each) for each in _shared(fd, size))), os.fstat(fd), []
    for path, error in walk(top) if own.starts else ():
        with ExitStack() as stack:
            try:
                if error is not None:
                    raise error
                place = stack.enter_context(opened(path, os.O_PATH))
                there = os.fstat(place)
                is_other = stat.S_ISREG(there.st_mode) and there.st_dev == here.st_dev and there.st_ino != here.st_ino
                shares = is_other and _shares(place, path, own)
            except BackingError as failed:
                LOG.warning("whether it shares blocks with a guest's file cannot be determined: %s", failed)
                continue
            if shares:
                with reporting(path):
                    os.utime(f"/proc/self/fd/{place}")  # no guest that was saved before goes on over it
                    inode.doubt(place, True)
                found.append(path)
    if found:
        os.sync()  # they need not be open
    return found


def _shares(place: int, path: str, own: Ranges) -> bool:
    """Return True for a file with blocks in ranges, and for one whose owner has a lease, which keeps it from a look.

    :param place: a descriptor of O_PATH.
    """
    with reporting(path):
        try:
            other = open_again(place, os.O_RDONLY)
        except BlockingIOError:
            return True
        try:
            return not inode.is_immutable(other) and any(
                own.touched_by(*each) for each in _shared(other, os.fstat(other).st_size)
            )
        finally:
            os.close(other)


def _shared(fd: int, size: int) -> list[tuple[int, int]]:
    """Return place on the device and length, in bytes, of what the first bytes of an open file share with others."""
    found = extents.fiemap(fd, size)
    return [(each.physical, each.length) for each in found if each.flags & extents.SHARED]
