"""Files on an ext4 or XFS file system that is mounted with DAX on a pmem namespace in fsdax mode."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from nvdimm_driver.backing import extents, freespace, inode, inventory
from nvdimm_driver.backing.extents import FileExtent
from nvdimm_driver.backing.inventory import Mount, Volume, space_of
from nvdimm_driver.backing.labels import MappedLabels, check_identity
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import (
    SUPERPAGE,
    BackingIdentity,
    Extent,
    Intake,
    Location,
    NvdimmSpec,
    Progress,
    Space,
    Surveyed,
)
from nvdimm_driver.plugins import Backing, LabelArea, unwatched

_FILE_SYSTEMS = ("ext4", "xfs")
_CHUNK = 4 << 20
_HINTS = {
    errno.EPERM: "is it immutable (lsattr, chattr -i)?",
    errno.EACCES: "only root may use backings",
    errno.ENOSPC: "make room, or ask for less",
    errno.EROFS: "mount it read-write",
}


class _File(NamedTuple):
    """An existing file that was found fit: its extents, and the runs (offset, length) to fill with zeros."""

    found: tuple[FileExtent, ...]
    unwritten: tuple[tuple[int, int], ...]


class FsdaxBacking(Backing):
    """Keeps each NVDIMM in a file.

    :param mountinfo: ``/proc/self/mountinfo`` or a file like it.
    :param cross_check: compares the extents of an open file with what the page tables say; raises BackingError.
    """

    name = "fsdax"

    def __init__(
        self,
        *,
        sysfs: Path = inventory.SYSFS,
        mountinfo: Path = Path("/proc/self/mountinfo"),
        cross_check: Callable[[int, Sequence[Extent]], None] = extents.cross_check,
    ) -> None:
        self.sysfs = sysfs
        self.mountinfo = mountinfo
        self.cross_check = cross_check

    def describe(self) -> str:
        return "a file on ext4 or XFS, mounted with -o dax on a namespace in fsdax mode"

    def handles(self, path: str) -> bool:
        """True for a regular file, and for a path without a file whose directory exists."""
        path = os.path.realpath(path)
        if os.path.lexists(path):
            return os.path.isfile(path)
        return os.path.isdir(os.path.dirname(path))

    def examine(self, spec: NvdimmSpec) -> Intake:
        path = os.path.realpath(spec.path)
        if _is_new(path):
            directory = os.path.dirname(path)
            with _opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
                volume = self._volume(fd, path)
                free = os.fstatvfs(fd)
            if spec.size > free.f_bfree * free.f_frsize:
                raise BackingError(
                    f"{path}: needs {spec.size} bytes, its file system has {free.f_bfree * free.f_frsize} free",
                    hint="make room, or ask for less",
                )
            return Intake(self.name, True, spec.size, volume.namespace)
        with _opened(path, os.O_RDONLY) as fd:
            volume = self._volume(fd, path)
            file = _look(fd, path, spec.size)
        return Intake(self.name, False, sum(length for _, length in file.unwritten), volume.namespace)

    def provision(self, spec: NvdimmSpec, progress: Progress = unwatched) -> BackingIdentity:
        """Create the file, or fill what a ``fallocate`` has left unwritten with the zeros it reads as.

        Bytes that were written are never written again. A new file has no name until it is complete, so that a crash
        leaves nothing behind; an empty one is replaced. ENOSPC and the like leave everything as it was.
        """
        intake = self.examine(spec)
        path = os.path.realpath(spec.path)
        if intake.creates:
            self._create(path, spec.size, progress)
        elif intake.writes:
            self._complete(path, spec.size, progress)
        with _opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)  # also what the operator has written: a place on the device is final when it is in the journal
            if _look(fd, path, spec.size).unwritten:
                raise BackingError(
                    f"{path}: parts of it are still unwritten after zeros were written",
                    hint="does something in the host punch holes in it (fstrim, defragmentation)?",
                )
            return self._identity(fd, self._volume(fd, path))

    def space(self, paths: Sequence[str], taken: Collection[str]) -> Space:
        del taken  # files take their room by themselves
        capacity = free = largest = 0
        volumes: dict[int, Volume] = {}
        for path in map(os.path.realpath, paths):
            with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
                device = os.fstat(fd).st_dev
                if device in volumes:
                    continue
                volumes[device] = self._volume(fd, path)
                status = os.fstatvfs(fd)
                capacity += status.f_blocks * status.f_frsize
                free += status.f_bfree * status.f_frsize
                largest = max(largest, freespace.largest_free(fd))
        return space_of(volumes.values(), capacity, free, largest)

    def discard(self, spec: NvdimmSpec) -> None:
        path = os.path.realpath(spec.path)
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise BackingError(f"{path}: cannot be deleted: {error.strerror}") from error
        _sync_directory(path)

    def locate(self, spec: NvdimmSpec) -> Location:
        path = os.path.realpath(spec.path)
        with _opened(path, os.O_RDONLY) as fd:
            volume = self._volume(fd, path)
            found = _look(fd, path, spec.size).found
            extents.check_flags(path, found)
            located = extents.to_machine(path, found, spec.size, spa=volume.spa, device_size=volume.size)
            try:
                self.cross_check(fd, located)
            except BackingError as error:
                raise BackingError(f"{path}: {error.message}", hint=error.hint) from error
            return Location(self._identity(fd, volume), located)

    def freeze(self, path: str) -> None:
        """Make the file immutable: nobody, not even root, then truncates, punches, reflinks, renames or deletes it."""
        path = os.path.realpath(path)
        with _opened(path, os.O_RDONLY) as fd:
            inode.freeze(fd)

    def thaw(self, path: str) -> None:
        """Undo :meth:`freeze`. A file that was immutable before stays so."""
        path = os.path.realpath(path)
        if os.path.lexists(path):
            with _opened(path, os.O_RDONLY) as fd:
                inode.thaw(fd)

    def mark(self, path: str, owner: bytes | None) -> None:
        path = os.path.realpath(path)
        if owner is not None or os.path.lexists(path):
            with _opened(path, os.O_RDONLY) as fd:
                inode.mark(fd, owner)

    def survey(self, paths: Sequence[str]) -> Iterator[Surveyed]:
        for top in map(os.path.realpath, paths):
            with _opened(top, os.O_RDONLY | os.O_DIRECTORY) as fd:
                device = os.fstat(fd).st_dev
            for folder, folders, files in os.walk(top):
                folders[:] = [each for each in folders if os.stat(os.path.join(folder, each)).st_dev == device]
                for path in (os.path.join(folder, name) for name in sorted(files)):
                    if os.path.isfile(path) and not os.path.islink(path):
                        with _opened(path, os.O_RDONLY) as fd:
                            yield Surveyed(path, inode.owner(fd), inode.is_frozen(fd))

    def lacking(self, spec: NvdimmSpec) -> int:
        return max(0, spec.size - os.stat(spec.path).st_size)

    def extend(self, spec: NvdimmSpec) -> None:
        path = os.path.realpath(spec.path)
        with _opened(path, os.O_RDWR) as fd:
            size = os.fstat(fd).st_size
            os.posix_fallocate(fd, size, spec.size - size)

    def move(self, source: str, target: str) -> None:
        try:
            os.link(source, target)  # unlike rename, it fails when something is there
            os.unlink(source)
        except OSError as error:
            raise BackingError(
                f"{source}: cannot be moved to {target}: {error.strerror}", hint="move it by hand"
            ) from error
        _sync_directory(target)
        _sync_directory(source)

    def open_labels(self, spec: NvdimmSpec, identity: BackingIdentity) -> LabelArea:
        """Map it: an immutable file on DAX takes stores, but no write and no open for one (ext4_file_write_iter,
        fs/namei.c:inode_permission), so it is mutable for as long as it takes to open it.
        """
        path = os.path.realpath(spec.path)
        with _opened(path, os.O_RDONLY) as fd:
            frozen = inode.is_frozen(fd)
            inode.thaw(fd)
            try:
                with _opened(path, os.O_RDWR) as writable:
                    check_identity(path, self._identity(writable, self._volume(writable, path)), identity)
                    return MappedLabels(writable, spec.size - spec.label_size, spec.label_size)
            finally:
                if frozen:
                    inode.freeze(fd)

    def _volume(self, fd: int, path: str) -> Volume:
        """The volume that an open file or directory is on, after checking that it can be used with DAX there."""
        volume = inventory.volume_of(os.fstat(fd).st_dev, path, self.sysfs)
        namespace = volume.namespace
        if namespace.mode != "fsdax":
            raise BackingError(
                f"{path}: is on {namespace.device}, a namespace in {namespace.mode} mode, and DAX needs fsdax mode",
                hint=f"this deletes all on it: ndctl create-namespace -f -e {namespace.name} -m fsdax --map=mem",
            )
        mount = self._mount(fd, path)
        flags = inode.xflags(fd)
        if not inventory.has_dax(mount.options) and not flags & inode.XFLAG_DAX:
            raise BackingError(
                f"{path}: {mount.directory} is not mounted with DAX",
                hint="unmount it and mount it with -o dax, in /etc/fstab too",
            )
        if flags & inode.XFLAG_REALTIME:
            raise BackingError(f"{path}: is on a realtime device", hint="make it in a directory without rtinherit")
        return volume

    def _mount(self, fd: int, path: str) -> Mount:
        device = os.fstat(fd).st_dev
        mount = next((each for each in inventory.mounts(self.mountinfo) if each.device == device), None)
        if mount is None or mount.kind not in _FILE_SYSTEMS:
            raise BackingError(
                f"{path}: its file system is {mount.kind if mount else 'not mounted here'}",
                hint="ext4 and XFS are supported",
            )
        return mount

    def _identity(self, fd: int, volume: Volume) -> BackingIdentity:
        status = os.fstat(fd)
        return BackingIdentity(
            self.name, volume.namespace.uid, volume.start, status.st_ino, inode.generation(fd), status.st_size
        )

    def _create(self, path: str, size: int, progress: Progress) -> None:
        directory, name = os.path.split(path)
        with _opened(directory, os.O_TMPFILE | os.O_RDWR) as fd, _opened(directory, os.O_DIRECTORY) as parent:
            if self._mount(fd, path).kind == "xfs":
                inode.set_extent_size(fd, SUPERPAGE)  # aligns the extents; ext4 has mke2fs -E stride for that
            os.posix_fallocate(fd, 0, size)
            self._write_zeros(fd, [(0, size)], progress)
            if os.path.lexists(path):
                if not _is_new(path):
                    raise BackingError(f"{path}: someone else has written it meanwhile")
                os.unlink(path)
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent, follow_symlinks=True)  # fails where one exists
            os.fsync(parent)

    def _complete(self, path: str, size: int, progress: Progress) -> None:
        with _opened(path, os.O_RDWR) as fd:
            self._write_zeros(fd, _look(fd, path, size).unwritten, progress)

    def _write_zeros(self, fd: int, runs: Sequence[tuple[int, int]], progress: Progress) -> None:
        zeros = memoryview(bytes(_CHUNK))
        total, done = sum(length for _, length in runs), 0
        for offset, length in runs:
            end = offset + length
            while offset < end:
                written = os.pwrite(fd, zeros[: end - offset], offset)
                offset += written
                done += written
                progress(done, total)
        os.fsync(fd)


def _is_new(path: str) -> bool:
    """True when there is no such file, or an empty one."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_size == 0 and status.st_nlink == 1


def _look(fd: int, path: str, size: int) -> _File:
    """Look at an open file, and refuse what can never be a backing of that size."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BackingError(f"{path}: is not a regular file")
    if status.st_nlink != 1:
        raise BackingError(
            f"{path}: has {status.st_nlink} names (hard links), and must have one",
            hint=f"find the others: find -xdev -inum {status.st_ino}",
        )
    if status.st_size < size:
        raise BackingError(
            f"{path}: has {status.st_size} bytes, the NVDIMM needs {size}",
            hint="size it to fit, or name a path without a file to have one made",
        )
    found = extents.fiemap(fd, size)
    extents.check_flags(path, found, allowed=extents.LAST | extents.MERGED | extents.UNWRITTEN)
    extents.check_holes(path, found, size)
    unwritten = tuple(
        (each.offset, min(each.end, size) - each.offset) for each in found if each.flags & extents.UNWRITTEN
    )
    return _File(found, unwritten)


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor of a path without symbolic links; what the system says of it is reported with the path."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}", hint=_HINTS.get(error.errno or 0, "")) from error


def _sync_directory(path: str) -> None:
    with _opened(os.path.dirname(path), os.O_DIRECTORY) as fd:
        os.fsync(fd)
