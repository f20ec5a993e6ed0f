# SPDX-License-Identifier: Apache-2.0
"""The base class of backings that are a device, not a file."""

from __future__ import annotations

import errno
import os
import time
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nvdimm_driver.backing import extents, holders, inventory
from nvdimm_driver.backing.byteranges import LockedBytes
from nvdimm_driver.backing.identity import check_identity
from nvdimm_driver.backing.inventory import Volume, space_of
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.backing.paths import is_gone, open_resolved, opened, resolve, status
from nvdimm_driver.errors import BackingError, NotFoundError
from nvdimm_driver.model import BackingIdentity, Extent, Intake, Location, Namespace, NvdimmSpec, Progress, Space
from nvdimm_driver.plugins import Backing, ByteRange, unwatched
from nvdimm_driver.sizes import human

if TYPE_CHECKING:
    from oslo_config import cfg

LOOK_SECONDS = 1.0
"""How long to wait for another process that looks at a device, too, and has it open for a moment."""


class DeviceBacking(Backing):
    """An NVDIMM in a device: one extent, which exists already. Provisioning writes nothing and keeps the bytes.

    :cvar mode: mode of the device's namespace.
    """

    mode: str

    def __init__(self, *, sysfs: Path = inventory.SYSFS, locks: Locks | None = None) -> None:
        self.sysfs = sysfs
        self.locks = locks or Locks(None)

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        return cls(locks=Locks(Path(conf.state_dir) / "locks"))

    def handles(self, path: str) -> bool:
        try:
            found = status(path)
        except OSError:  # as os.path.isfile does
            return False
        return found is not None and self.is_kind(found.st_mode)

    def areas(self) -> Sequence[Namespace]:
        return [each for each in inventory.namespaces(self.sysfs) if each.mode == self.mode]

    @abstractmethod
    def is_kind(self, mode: int) -> bool:
        """Return True for the st_mode of a device of this kind."""

    @abstractmethod
    def volume(self, path: str, number: int) -> Volume:
        """Return the volume that a device number stands for.

        :raises BackingError: when it cannot be a backing.
        """

    @abstractmethod
    def check(self, path: str, fd: int, volume: Volume, extent: Extent) -> None:
        """Check an open device against what sysfs says, as far as possible.

        :raises BackingError: when they disagree.
        """

    @abstractmethod
    def open_range(self, path: str, size: int, *, write: bool) -> ByteRange:
        """Open the bytes of a device that :meth:`open_bytes` has checked and, to write, locked.

        :raises OSError: when the device cannot be opened.
        """

    def examine(self, spec: NvdimmSpec) -> Intake:
        volume, _ = self._find(spec)
        return Intake(self.name, False, 0, volume.namespace)

    def space(self, paths: Sequence[str], taken: Collection[str]) -> Space:
        """Return the room in a pool. Works for devices in use in the host too, which cannot be located."""
        volumes = {path: self._identify(path)[0] for path in map(resolve, paths)}
        free = [volume for path, volume in volumes.items() if path not in taken]
        largest = max((volume.size for volume in free), default=0)
        return space_of(volumes.values(), _all_bytes(volumes.values()), _all_bytes(free), largest)

    def size(self, path: str) -> int:
        if is_gone(path):
            raise NotFoundError(f"{path}: there is no such device")
        return self._identify(path)[0].size

    def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        path = spec.path
        size = self.size(path)
        if spec.size > size:
            raise _too_small(path, size, spec.size)
        if not write:
            return self._open(path, spec.size, write=False)
        identity = self.locate(spec).identity
        with ExitStack() as lock:
            with _opened(path) as fd:
                lock.enter_context(self.locks.writing(fd, path, identity))
            return LockedBytes(self._open(path, spec.size, write=True), lock.pop_all().close, identity)

    def provision(
        self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
    ) -> BackingIdentity:
        """Do what the base class does, unless a process overwrites the device."""
        self.freeze(spec.path)
        return super().provision(spec, progress, identity)

    def identify(self, path: str) -> BackingIdentity:
        """Do what the base class does, also for a device that is in use: others look at devices, too."""
        return self._identity(self._identify(path)[0])

    def locate(self, spec: NvdimmSpec) -> Location:
        volume, extent = self._find(spec)
        return Location(self._identity(volume), (extent,))

    def freeze(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Check only that no process overwrites the device: the kernel does not move a namespace."""
        del identity  # nothing is changed
        with _opened(path) as fd:
            self.locks.check_unwritten(fd, path, self._identity(self.volume(path, os.fstat(fd).st_rdev)))

    def hold(self, path: str, identity: BackingIdentity) -> int:
        """Open the device exclusively: a block device can then be neither mounted, nor disabled, nor made anew.

        Linux has nothing like it for a character device: the descriptor only shows who uses it.
        """
        with _opened(path, shared=False) as fd:
            check_identity(path, self._identity(self.volume(path, os.fstat(fd).st_rdev)), identity)
            return os.dup(fd)

    def check_home(self, path: str, identity: BackingIdentity | None = None) -> None:
        if identity is not None and not self.exists(path):
            name, mode = inventory.mode_of(identity.device, self.sysfs) or ("", self.mode)
            if mode != self.mode:
                raise BackingError(
                    f"{path}: its namespace {name} is in {mode} mode now, not {self.mode}: an info block in it says "
                    "so, which its guest can have written",
                    hint=f"to have all its bytes back: {inventory.raw_again(name)}" if self.mode == "raw" else "",
                )
        super().check_home(path, identity)

    def find(self, identity: BackingIdentity) -> str:
        """Return the namespace, also one that is disabled or in another mode."""
        for each in inventory.namespaces(self.sysfs):
            if each.uid == identity.device:
                within = f"{each.name}, from byte {identity.start} of /dev/{each.device} on"
                return within if identity.start else f"{each.name}, /dev/{each.device}"
        return next(iter(inventory.mode_of(identity.device, self.sysfs) or ()), "")

    def _identity(self, volume: Volume) -> BackingIdentity:
        return BackingIdentity(self.name, volume.namespace.uid, volume.start, 0, 0, volume.size)

    def _open(self, path: str, size: int, *, write: bool) -> ByteRange:
        try:
            return self.open_range(path, size, write=write)
        except OSError as error:
            raise BackingError(f"{path}: {error.strerror}") from error

    def _find(self, spec: NvdimmSpec) -> tuple[Volume, Extent]:
        path = spec.path
        volume, number = self._identify(path)
        with _opened(path) as fd:
            if os.fstat(fd).st_rdev != number:
                raise BackingError(f"{path}: has just become another device", hint="try again")
            if spec.size > volume.size:
                raise _too_small(path, volume.size, spec.size)
            whole = extents.FileExtent(0, 0, volume.size, extents.LAST)
            (extent,) = extents.to_machine(path, (whole,), spec.size, spa=volume.spa, device_size=volume.size)
            self.check(path, fd, volume, extent)
        return volume, extent

    def _identify(self, path: str) -> tuple[Volume, int]:
        """Return volume and number of a device without opening it: a wrong mode is a better error than EBUSY."""
        with opened(path, os.O_PATH) as fd:
            found = os.fstat(fd)
        if not self.is_kind(found.st_mode):
            raise BackingError(f"{path}: is not {self.describe()}")
        return self.volume(path, found.st_rdev), found.st_rdev


def _all_bytes(volumes: Iterable[Volume]) -> int:
    """Return how many bytes these have; those of a device and of a partition of it count once."""
    total = end = 0
    for volume in sorted(volumes, key=lambda each: each.spa):
        total += max(0, volume.spa + volume.size - max(end, volume.spa))
        end = max(end, volume.spa + volume.size)
    return total


def _too_small(path: str, size: int, needed: int) -> BackingError:
    return BackingError(
        f"{path}: has {human(size)}, the NVDIMM needs {human(needed)} ({human(needed - size)} more)",
        hint="ask for less, or use a larger namespace",
    )


@contextmanager
def _opened(path: str, *, shared: bool = True) -> Iterator[int]:
    """Yield a descriptor of a device that nothing in the host uses.

    :param shared: accept a block device that a holder has for a guest.
    :raises BackingError: when something uses it, or it cannot be opened.
    """
    try:
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            try:
                # EBUSY for a block device that a file system, another driver or a holder uses (open(2)).
                fd = open_resolved(path, os.O_RDONLY | os.O_EXCL)
                break
            except OSError as error:
                found = status(path) if shared and error.errno == errno.EBUSY else None
                if found is not None and holders.is_held(found.st_rdev):
                    fd = open_resolved(path, os.O_RDONLY)
                    break
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)
    except OSError as error:
        busy = error.errno == errno.EBUSY
        raise BackingError(
            f"{path}: {'is in use in the host' if busy else error.strerror}",
            hint="unmount it, or see what uses it: lsblk, fuser -v" if busy else "",
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)
