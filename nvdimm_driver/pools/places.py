# SPDX-License-Identifier: Apache-2.0
"""The pool that a path is in, by what it really is: a bind mount, or another node of a device, is another name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from nvdimm_driver.backing.inventory import mount_of, mounts
from nvdimm_driver.backing.paths import open_resolved, resolve
from nvdimm_driver.model import Pool

_MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Place:
    """A device, or a path within a file system, by whatever name.

    :ivar kind: file type of a device (stat.S_IFMT); 0 in a file system.
    :ivar device: number of the device, or of the file system.
    :ivar path: absolute; the root of a file system is ``/``, as is a device.
    """

    kind: int
    device: int
    path: str

    def has(self, other: Place) -> bool:
        """Return True when the other one is this, or below it."""
        same = (self.kind, self.device) == (other.kind, other.device)
        return same and is_below(other.path, self.path)


class Places:
    """The devices and folders of pools as they are now, read once for any number of paths.

    :raises BackingError: when the host's mounts cannot be read, or a pool's path is too long.
    """

    def __init__(self, pools: Iterable[Pool]) -> None:
        self._mounts = {mount.id: mount for mount in mounts(_MOUNTINFO)}
        tops = [(pool, resolve(path)) for pool in pools for path in pool.paths]
        self._tops = [(pool, top, self._place(top)) for pool, top in tops]

    def pool_of(self, path: str) -> Pool | None:
        """Return the pool that a resolved path is in, or None; nothing needs to be at the path.

        What the path really is counts first: a folder of one pool can be mounted below another pool's folder. Else the
        path counts, as another file system can be mounted below a pool's folder.
        """
        if path != os.path.normpath(path):
            return None
        place = self._place(path)
        found = [pool for pool, _, its in self._tops if place is not None and its is not None and its.has(place)]
        return next(iter(found or [pool for pool, top, _ in self._tops if is_below(path, top)]), None)

    def _place(self, path: str) -> Place | None:
        """Return what a resolved path is; None when its file system was mounted after the mounts were read."""
        with _nearest(path) as fd:
            mount = self._mounts.get(mount_of(fd))
            with suppress(OSError):  # of a file system whose medium has errors, which has no devices
                status = os.fstat(fd)
                if stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
                    return Place(stat.S_IFMT(status.st_mode), status.st_rdev, "/")
        if mount is None or not is_below(path, mount.directory):
            return None
        below = os.path.relpath(path, mount.directory)
        return Place(0, mount.device, os.path.normpath(os.path.join(mount.root, below)))


def find_nested(pools: Sequence[Pool]) -> tuple[Pool, Pool, str] | None:
    """Return two pools, and a path of the first that is in the second, too; None when each path is in one pool only."""
    places = [Places([pool]) for pool in pools]
    for (one, its), (other, others) in combinations(zip(pools, places, strict=True), 2):
        for path in one.paths:
            if others.pool_of(resolve(path)) or any(its.pool_of(resolve(each)) for each in other.paths):
                return one, other, path
    return None


def is_below(path: str, top: str) -> bool:
    """Return True when an absolute path is another one, or below it, going by their text."""
    return path == top or path.startswith(top.rstrip("/") + "/")


@contextmanager
def _nearest(path: str) -> Iterator[int]:
    """Open what is at a path, or the nearest folder above it, if nothing is; without looking into it.

    A folder on the way that has become a symbolic link since counts as what is there, not as what it leads to.
    """
    while True:
        try:
            fd = open_resolved(path, os.O_PATH | os.O_NOFOLLOW)
            break
        except OSError:
            if path == "/":
                raise
            path = os.path.dirname(path)
    try:
        yield fd
    finally:
        os.close(fd)
