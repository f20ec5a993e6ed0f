# SPDX-License-Identifier: Apache-2.0
"""Files on an ext4 or XFS file system that is mounted with DAX on a pmem namespace in fsdax mode."""

from __future__ import annotations

import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nvdimm_driver.backing import extents, freespace, handles, inode, inventory, shared_blocks, writers
from nvdimm_driver.backing.byteranges import FileBytes, LockedBytes, MappedBytes, give_own_blocks
from nvdimm_driver.backing.files import (
    check_copy_name,
    check_named,
    check_no_flag,
    check_not_doubtful,
    check_only_root_writes,
    check_own,
    check_regular,
    check_size,
    hidden_name,
    is_new,
    lease_break_seconds,
    look,
    unlink_empty,
    unlink_second_name,
)
from nvdimm_driver.backing.identity import check_identity, check_same_bytes
from nvdimm_driver.backing.inventory import Mount, Volume, space_of
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.backing.paths import (
    Entry,
    entry,
    is_gone,
    open_again,
    opened,
    others_can_turn,
    patiently,
    reporting,
    resolve,
    status,
)
from nvdimm_driver.backing.walk import walk
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError
from nvdimm_driver.model import (
    SUPERPAGE,
    BackingIdentity,
    Extent,
    Intake,
    Location,
    Namespace,
    NvdimmSpec,
    Progress,
    Space,
    Surveyed,
    Touch,
)
from nvdimm_driver.plugins import IF_LOST, Backing, ByteRange, unwatched
from nvdimm_driver.shell import NOT_AS_ROOT, command
from nvdimm_driver.sizes import human

if TYPE_CHECKING:
    from oslo_config import cfg

LOG = logging.getLogger(__name__)

_FILE_SYSTEMS = ("ext4", "xfs")
_SECOND = 10**9
_TICK = _SECOND // 100
"""The clock by which the kernel gives files their times is late by that at most (CLOCK_REALTIME_COARSE, HZ=100)."""
_LONGEST_WAIT = 3 * _SECOND
"""It is longer only if the clock was set back since :meth:`FsdaxBacking.time_to_touch` was asked."""
_CHUNK = 4 << 20
_LEASE_SECONDS = 2.0
"""How long a label area waits for a lease on its file: the freezing has ended all but those of root's programs, of
which :func:`.inode.has_writer` takes some for a moment."""


class FsdaxBacking(Backing):
    """An NVDIMM in a file.

    :param locks: None: this process is the only one.
    :param mountinfo: ``/proc/self/mountinfo`` or a file like it.
    :param cross_check: compares the extents of an open file with the page tables; raises BackingError.
    """

    name = "fsdax"

    def __init__(
        self,
        *,
        locks: Locks | None = None,
        sysfs: Path = inventory.SYSFS,
        mountinfo: Path = Path("/proc/self/mountinfo"),
        cross_check: Callable[[int, Sequence[Extent]], None] = extents.cross_check,
    ) -> None:
        self.locks = locks or Locks(None)
        self.sysfs = sysfs
        self.mountinfo = mountinfo
        self.cross_check = cross_check

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        return cls(locks=Locks(Path(conf.state_dir) / "locks"))

    def describe(self) -> str:
        return "a file on ext4 or XFS, mounted with -o dax on a namespace in fsdax mode"

    def handles(self, path: str) -> bool:
        """Return True for a regular file, and for a path without a file whose directory exists."""
        with suppress(OSError):
            found = status(path)
            if found is not None:
                return stat.S_ISREG(found.st_mode)
        return os.path.isdir(os.path.dirname(path))

    def areas(self) -> Sequence[Namespace]:
        return [each for each in inventory.namespaces(self.sysfs) if each.mode == "fsdax"]

    def check_home(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Check that the folder of a file, or that folder itself, is there and on the file system that had the file.

        A file system that was made anew on the same namespace is taken for the one before.
        """
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        if not self.exists(folder):
            make = f"make it again, {NOT_AS_ROOT}"
            if not others_can_turn(folder):
                make = command("mkdir", "-p", folder)
            hint = f"mount it, or put it back where it was; if it is gone for good: {make}"
            raise BackingError(f"{path}: its folder is not there", hint=hint)
        with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
            volume = self._volume(fd, folder)
            if identity is None:
                return
            if (volume.namespace.uid, volume.start) != (identity.device, identity.start):
                where = f"{folder} is on {volume.namespace.name} now, which is not the namespace that had it"
                raise BackingError(f"{path}: {where}", hint=f"mount the file system that had it there; {IF_LOST}")
            handles.check_deleted(fd, path, identity)

    def examine(self, spec: NvdimmSpec) -> Intake:
        path = spec.path
        with entry(path) as at:
            creates = is_new(at.status())
            if creates:
                volume = self._volume(at.folder, path)
                free = os.fstatvfs(at.folder)
        if creates:
            if spec.size > free.f_bfree * free.f_frsize:
                raise BackingError(
                    f"{path}: needs {human(spec.size)}, its file system has {human(free.f_bfree * free.f_frsize)} free",
                    hint="make room, or ask for less",
                )
            return Intake(self.name, True, spec.size, volume.namespace)
        with opened(path, os.O_RDONLY) as fd:
            volume = self._volume(fd, path)
            file = look(fd, path, spec.size)
        return Intake(self.name, False, sum(length for _, length in file.unwritten), volume.namespace)

    def create(self, spec: NvdimmSpec, progress: Progress = unwatched) -> BackingIdentity:
        return self._create(spec.path, spec.size, progress)

    def provision(
        self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
    ) -> BackingIdentity:
        """Create the file, or write zeros where ``fallocate`` has left it unwritten, which reads as zeros.

        Written bytes are never written again, also not those that a program writes meanwhile. A new file gets its name
        when it is complete: a crash leaves nothing behind. It also gets it when the user interrupts the work: the next
        call completes the file. An empty file is replaced. ENOSPC and other errors of the system leave everything as it
        was.
        """
        path = spec.path
        if identity is None and self.examine(spec).creates:
            return self._create(path, spec.size, progress)
        with opened(path, os.O_RDONLY) as fd:
            self._check_same(fd, path, identity)
            self._volume(fd, path)
            self.locks.check_unwritten(fd, path)
            if look(fd, path, spec.size).unwritten:
                self._complete(fd, path, spec.size, progress)
            return self._checked(fd, path, spec.size)

    def _checked(self, fd: int, path: str, size: int) -> BackingIdentity:
        """Return the identity of a file that is provisioned by now."""
        os.fsync(fd)  # also for what the operator wrote: an extent is final when it is in the journal
        if look(fd, path, size).unwritten:
            raise BackingError(
                f"{path}: parts of it are still unwritten after zeros were written",
                hint="does a program in the host punch holes in it (fstrim, defragmentation)?",
            )
        return self._identity(fd, self._volume(fd, path))

    def space(self, paths: Sequence[str], taken: Collection[str]) -> Space:
        del taken  # the file system counts them
        capacity = free = largest = 0
        volumes: dict[int, Volume] = {}
        for path in map(resolve, paths):
            with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
                device = os.fstat(fd).st_dev
                if device in volumes:
                    continue
                volumes[device] = self._volume(fd, path)
                status = os.fstatvfs(fd)
                capacity += status.f_blocks * status.f_frsize
                free += status.f_bfree * status.f_frsize
                largest = max(largest, freespace.largest_free(fd))
        return space_of(volumes.values(), capacity, free, largest)

    def size(self, path: str) -> int:
        with reporting(path):
            found = status(path)
        if found is None or not stat.S_ISREG(found.st_mode):
            raise NotFoundError(f"{path}: there is no such file")
        return found.st_size

    def allocate(self, spec: NvdimmSpec) -> NvdimmSpec:
        """Create ``.NAME.partial`` beside the path, of that size, with unwritten extents only."""
        check_copy_name(spec.path)
        hidden = replace(spec, path=hidden_name(spec.path))
        with self._changeable(hidden.path) as at:
            left = at.status()
            if left is not None:
                check_own(hidden.path, left)
                if left.st_size != spec.size:  # of another import
                    with at.opened(os.O_RDWR) as fd, self.locks.writing(fd, hidden.path):
                        check_named(fd, hidden.path)
                        at.unlink()
            if self.examine(hidden).creates:
                with at.opened(os.O_CREAT | os.O_EXCL | os.O_RDWR) as fd:
                    self._allocate(fd, hidden.path, spec.size)
                at.sync()
        return hidden

    def publish(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        with self._changeable(spec.path) as at:
            hidden = at.beside(os.path.basename(hidden_name(spec.path)))
            there = hidden.status()
            if there is None:
                named = at.status()
                if identity is not None and (named is None or named.st_ino != identity.inode):
                    raise NotFoundError(f"{hidden_name(spec.path)}: is not there any more", hint="import it again")
            else:
                if identity is not None and there.st_ino != identity.inode:
                    raise InUseError(f"{hidden_name(spec.path)}: another file is there now", hint="import it again")
                unlink_empty(spec.path, at)
                unlink_second_name(hidden, at)
                try:
                    hidden.rename_new(at)
                except FileExistsError as error:
                    raise InUseError(f"{spec.path}: exists now", hint="take another name") from error
            at.sync()

    def fill_holes(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        path = spec.path
        with self._changeable(path) as at:
            unlink_second_name(at.beside(os.path.basename(hidden_name(path))), at)
        with opened(path, os.O_RDWR) as fd:
            self._check_same(fd, path, identity)
            self._volume(fd, path)
            check_size(path, os.fstat(fd).st_size, spec.size)
            os.posix_fallocate(fd, 0, spec.size)

    def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        path = spec.path
        self.size(path)
        with opened(path, os.O_RDWR if write else os.O_RDONLY) as fd, ExitStack() as lock:
            identity = self._find_identity(fd, path)
            if not write:
                check_not_doubtful(fd, path)
            else:
                lock.enter_context(self.locks.writing(fd, path))
                check_named(fd, path)  # who had the lock until now may have given the file its name
                identity = self._identity(fd, self._volume(fd, path))
            check_size(path, os.fstat(fd).st_size, spec.size)
            return LockedBytes(FileBytes(os.dup(fd), spec.size), lock.pop_all().close, identity)

    def discard(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        """Delete a regular file. Nobody but the folder's owner can put another in its place before it is deleted.

        He could delete that, too: a name of it in his folder is all that goes.
        """
        path = spec.path
        with reporting(path):
            if status(path) is None:
                return
        with self._changeable(path) as at, at.opened(os.O_RDONLY) as fd:
            check_regular(fd, path)
            self._check_same(fd, path, identity)
            at.unlink()
            try:
                at.sync()
            except OSError as error:
                LOG.warning("%s was deleted, and may be there again after a power cut: %s", path, error)

    def locate(self, spec: NvdimmSpec) -> Location:
        path = spec.path
        with opened(path, os.O_RDONLY) as fd:
            volume = self._volume(fd, path)
            found = look(fd, path, spec.size).found
            extents.check_flags(path, found)
            located = extents.to_machine(path, found, spec.size, spa=volume.spa, device_size=volume.size)
            try:
                self.cross_check(fd, located)
            except BackingError as error:
                raise BackingError(f"{path}: {error.message}", hint=error.hint) from error
            return Location(self._identity(fd, volume), located)

    def find_extents(self, spec: NvdimmSpec) -> Sequence[Extent]:
        with opened(spec.path, os.O_RDONLY) as fd:
            volume = self._volume(fd, spec.path)
            return extents.in_machine(extents.fiemap(fd, spec.size), spec.size, volume.spa)

    def identify(self, path: str) -> BackingIdentity:
        with opened(path, os.O_RDONLY) as fd:
            check_regular(fd, path)
            return self._identity(fd, self._volume(fd, path))

    def freeze(self, path: str, identity: BackingIdentity | None = None) -> None:
        self.freeze_for(path, None, identity)

    def freeze_for(self, path: str, run: int | None, identity: BackingIdentity | None = None) -> None:
        """Make the file immutable: not even root can then truncate, punch, rename or delete it, or open it to write.

        That outlasts a loss of power, as what the guest writes does.
        """
        patience = lease_break_seconds()
        with opened(path, os.O_RDONLY, patience=patience) as fd:

            def attempt() -> None:
                with self.locks.freezing(fd, path):  # which others wait for: not while a lease ends
                    check_regular(fd, path)
                    self._check_same(fd, path, identity)
                    check_no_flag(fd, path)
                    self.locks.check_unwritten(fd, path)
                    inode.freeze(fd, run)

            patiently(attempt, patience)
            os.fsync(fd)  # without the lock: it may take long

    def check_can_freeze(self, path: str, identity: BackingIdentity | None = None) -> None:
        with opened(path, os.O_RDONLY) as fd:
            self._check_same(fd, path, identity)
            check_no_flag(fd, path)

    def check_unwritten(
        self, path: str, identity: BackingIdentity | None = None, allowed: Collection[int] = ()
    ) -> None:
        with opened(path, os.O_RDONLY) as fd:
            self._check_same(fd, path, identity)
            if inode.has_writer(fd):
                others = writers.find(fd) - {*allowed}
                if others or not allowed:
                    raise writers.refusal(path, others)

    def is_shared(self, spec: NvdimmSpec) -> bool:
        with opened(spec.path, os.O_RDONLY) as fd:
            return any(each.flags & extents.SHARED for each in extents.fiemap(fd, os.fstat(fd).st_size))

    def doubt_sharers(
        self,
        path: str,
        identity: BackingIdentity | None = None,
        size: int | None = None,
        mapped: Collection[int] = (),
    ) -> Sequence[str]:
        with opened(path, os.O_RDONLY, patience=lease_break_seconds()) as fd:
            if not inode.is_frozen(fd) or not self._is(fd, path, identity):
                return ()
            size = os.fstat(fd).st_size if size is None else size
            return shared_blocks.doubt_sharers(fd, size, self._top(fd, path), self.locks.freezing, mapped)

    def trust(self, path: str, identity: BackingIdentity | None = None) -> None:
        with opened(path, os.O_RDONLY) as fd:
            self._check_same(fd, path, identity)
            if inode.is_doubtful(fd):
                with reporting(path):
                    inode.trust(fd)
                    os.fsync(fd)

    def _top(self, fd: int, path: str) -> str:
        """Return a folder below which the files of an open file's file system are, all of them if it shows them."""
        device = os.fstat(fd).st_dev
        found = sorted((each for each in inventory.mounts(self.mountinfo) if each.device == device), key=_depth)
        tops = [each.directory for each in found if _is_writable(each.directory, device)]
        return tops[0] if tops else os.path.dirname(path)

    def unshare(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        """Touch each page that is shared: the file system copies it then, and both files keep their bytes.

        The file keeps its time, too, which tells whether a saved guest may go on. FALLOC_FL_UNSHARE_RANGE changes that;
        and it does not work with DAX before Linux 6.2.
        """
        path = spec.path
        with opened(path, os.O_RDWR) as fd, self.locks.writing(fd, path), ExitStack() as stack:
            self._check_same(fd, path, identity)
            inode.set_copy_size(fd, SUPERPAGE)
            size = os.fstat(fd).st_size
            shared = [each for each in extents.fiemap(fd, size) if each.flags & extents.SHARED]
            if shared:  # ext4 shares none
                folder = stack.enter_context(opened(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY))
                untimed = stack.enter_context(handles.opened_untimed(fd, folder))
            for each in shared:
                for at in range(each.offset, min(each.end, size), _CHUNK):
                    give_own_blocks(untimed, path, at, min(_CHUNK, each.end - at, size - at))
            os.fsync(fd)

    def hold(self, path: str, identity: BackingIdentity) -> int:
        """Open the file: its file system can then be neither unmounted nor made anew, as its device stays in use."""
        with opened(path, os.O_RDONLY, patience=lease_break_seconds()) as fd:
            check_identity(path, self._identity(fd, self._volume(fd, path)), identity)
            return os.dup(fd)

    def written_at(self, path: str) -> int | None:
        found = _status(path)
        return None if found is None else found.st_mtime_ns

    def time_to_touch(self, path: str) -> int | None:
        """Return a time in the next second: a copy that a program made before, with the time of then, is older.

        It is later than the last write, too, if the clock was set back since. A random fraction makes it differ from
        the time of each copy, also of one that was made after an end in the same second, or before the clock was set
        back. Where times are whole seconds, a later write may not get it, and nobody can wait for a time that is
        further in the future.
        """
        found = _status(path)
        now, last = time.time_ns() // _SECOND, found.st_mtime_ns // _SECOND if found else 0
        if found and _in_whole_seconds(found):
            return ((now if last > now + 1 else max(now, last)) + 1) * _SECOND
        return (max(now, last) + 1) * _SECOND + 1 + secrets.randbelow(_SECOND - 1)

    def thaw(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Undo :meth:`freeze`. A file that somebody else has made immutable stays so."""
        self.thaw_unless(path, lambda _: False, identity)

    def thaw_unless(
        self,
        path: str,
        needed: Callable[[BackingIdentity | None], bool],
        identity: BackingIdentity | None = None,
        touch: Touch | None = None,
        *,
        unmark: bool = False,
    ) -> None:
        """Undo :meth:`freeze`, unless the file is needed. Ask for that with the lock, which :meth:`freeze` takes.

        That outlasts a loss of power, before the ledger forgets for whom the file was frozen; also if a process that
        was killed has thawed it. A lease on the file is not waited for: one domain's file must not keep another domain
        from starting.
        """
        if is_gone(path):
            return
        with opened(path, os.O_RDONLY) as fd:
            if touch is not None and inode.is_frozen(fd):
                _let_pass(touch.after, fd)
            with self.locks.freezing(fd, path):
                if not self._is(fd, path, identity) or needed(self._find_identity(fd, path)):
                    return
                inode.thaw(fd, touch, unmark=unmark)
            os.fsync(fd)  # without the lock: it may take long

    def mark(self, path: str, owner: bytes | None, identity: BackingIdentity | None = None) -> None:
        if owner is None and is_gone(path):
            return
        with opened(path, os.O_RDONLY) as fd:
            if owner is None and not self._is(fd, path, identity):
                return
            check_regular(fd, path)
            self._check_same(fd, path, identity)
            with self.locks.freezing(fd, path):
                inode.mark(fd, owner)
                is_frozen, number = inode.is_frozen(fd), os.fstat(fd).st_ino
            os.fsync(fd)  # without the lock: it may take long
        if not is_frozen:
            with opened(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY) as folder:
                inode.note_given(folder, number, None)

    def note_given(self, path: str, when: int) -> None:
        with opened(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY) as folder, opened(path, os.O_PATH) as fd:
            inode.note_given(folder, os.fstat(fd).st_ino, when)
            os.fsync(folder)

    def given_at(self, path: str) -> int:
        with opened(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY) as folder, opened(path, os.O_PATH) as fd:
            return inode.given_at(folder, os.fstat(fd).st_ino)

    def inspect(self, path: str, identity: BackingIdentity | None = None) -> Surveyed | None:
        if identity is None:
            with reporting(path):
                there = status(path)
            if there is None or not stat.S_ISREG(there.st_mode):
                return None
        with opened(path, os.O_RDONLY, patience=lease_break_seconds() if identity else 0) as fd:
            self._check_same(fd, path, identity)
            try:
                return self._surveyed(fd, path)
            except OSError:
                if self._find_identity(fd, path) is None:
                    return None  # its file system keeps no such record, and no domain can have it
                raise

    def survey(self, paths: Sequence[str]) -> Iterator[Surveyed]:
        for path, error in chain.from_iterable(map(walk, map(resolve, paths))):
            yield self._survey(path) if error is None else Surveyed(path, None, False, False, error)

    def lacking(self, spec: NvdimmSpec) -> int:
        return max(0, spec.size - self.size(spec.path))

    def extend(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        with opened(spec.path, os.O_RDWR) as fd:
            self._check_same(fd, spec.path, identity)
            self.locks.check_changeable(fd, spec.path)
            size = os.fstat(fd).st_size
            try:
                os.posix_fallocate(fd, size, spec.size - size)
            except OSError:
                os.ftruncate(fd, size)  # what it got before the file system was full
                raise

    def shorten(self, path: str, size: int, wanted: int, identity: BackingIdentity | None = None) -> None:
        with opened(path, os.O_RDWR) as fd, self.locks.writing(fd, path):
            self._check_same(fd, path, identity)
            if wanted < os.fstat(fd).st_size == size:
                os.ftruncate(fd, wanted)
                os.fsync(fd)

    def move(self, source: str, target: str, identity: BackingIdentity | None = None) -> None:
        folder = os.path.dirname(target)
        if not self.exists(folder):
            problem = f"{source}: cannot be moved to {target}: there is no {folder}"
            raise BackingError(problem, hint="rename the folder back, or make it; then repeat this")
        with self._changeable(source) as old, entry(target) as new, old.opened(os.O_RDONLY) as fd:
            self._check_same(fd, source, identity)
            try:
                old.rename_new(new)
            except OSError as error:
                problem = f"{source}: cannot be moved to {target}: {error.strerror}"
                raise BackingError(problem, hint="move it by hand") from error
            moved = new.status()
            if moved is None or not os.path.samestat(moved, os.fstat(fd)):  # the folder's owner was faster
                new.rename_new(old)
                raise BackingError(f"{source}: another file got its name meanwhile", hint="repeat the command")
            new.sync()
            old.sync()

    def check_labels(self, spec: NvdimmSpec) -> None:
        """Accept every file: stores to its mapping are durable after msync."""

    def open_labels(self, spec: NvdimmSpec, identity: BackingIdentity) -> ByteRange:
        """Map the label area. A frozen file can be opened for writing for a moment, if only root may do so then.

        An immutable file on DAX takes stores, but neither write nor open for writing (ext4_file_write_iter,
        fs/namei.c:inode_permission).

        :raises BackingError: also if blocks of a frozen file were moved in that moment, by root's deduplication: the
            kernel refuses that to an immutable file only (fs/remap_range.c:generic_remap_file_range_prep).
        """
        path = spec.path
        with opened(path, os.O_RDONLY) as fd:
            had = self._places(fd)

            def attempt() -> tuple[MappedBytes, set[int]]:
                with self.locks.freezing(fd, path):
                    check_identity(path, self._identity(fd, self._volume(fd, path)), identity)
                    if inode.is_frozen(fd):
                        inode.freeze(fd)  # again, after a process was killed here
                        check_only_root_writes(fd, path)
                    before = writers.find(fd) if inode.has_writer(fd) else set()
                    with inode.opened_to_write(fd) as writable:
                        return MappedBytes(writable, spec.size - spec.label_size, spec.label_size), before

            try:
                labels, before = patiently(attempt, _LEASE_SECONDS)
            except BaseException:
                self._check_unmoved(fd, path, had)  # an attempt that a lease ended has had its moment, too
                raise
            try:
                self._check_unmoved(fd, path, had)
                if others := writers.find(fd) - before - {os.getpid()}:
                    raise writers.refusal(path, others)
            except BaseException:
                labels.close()
                raise
            return labels

    def _places(self, fd: int) -> Sequence[Extent]:
        """Return where the bytes of an open file are on its device."""
        size = os.fstat(fd).st_size
        return extents.in_machine(extents.fiemap(fd, size), size, 0)

    def _check_unmoved(self, fd: int, path: str, had: Sequence[Extent]) -> None:
        """Check that a file which is frozen has its bytes where it had them.

        :raises BackingError: when it has not.
        """
        if inode.is_frozen(fd) and self._places(fd) != had:
            raise BackingError(
                f"{path}: blocks of it were moved while its label area was opened, as by a deduplication",
                hint="stop the program that does that; if its guest runs, 'nvdimmctl check' says what is at stake",
            )

    @contextmanager
    def _changeable(self, path: str) -> Iterator[Entry]:
        """Do what :func:`.paths.entry` does, unless the file system takes no changes now."""
        with entry(path) as at:
            self.locks.check_changeable(at.folder, path)
            yield at

    def _survey(self, path: str) -> Surveyed:
        """Examine a file of a pool. One that cannot be opened, as with a lease on it, must not hide the others."""
        try:
            with opened(path, os.O_RDONLY) as fd:
                return self._surveyed(fd, path)
        except BackingError as error:
            return Surveyed(path, None, False, False, error)

    def _surveyed(self, fd: int, path: str) -> Surveyed:
        identity = self._find_identity(fd, path)
        frozen, immutable, unflagged = inode.is_frozen(fd), inode.is_immutable(fd), inode.is_unflagged(fd)
        return Surveyed(
            *(path, inode.owner(fd), frozen, immutable, None, identity, inode.frozen_for(fd), unflagged),
            doubtful=inode.is_doubtful(fd),
        )

    def _volume(self, fd: int, path: str) -> Volume:
        """Return the volume that an open file or directory is on.

        :raises BackingError: when it cannot be used with DAX there.
        """
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
        where, found = (self.name, volume.namespace.uid, volume.start), os.fstat(fd)
        return BackingIdentity(*where, found.st_ino, inode.generation(fd), found.st_size)

    def _find_identity(self, fd: int, path: str) -> BackingIdentity | None:
        """Return the identity of an open file, also without DAX; None when it is not on a namespace."""
        try:
            return self._identity(fd, inventory.volume_of(os.fstat(fd).st_dev, path, self.sysfs))
        except BackingError:
            return None

    def _is(self, fd: int, path: str, identity: BackingIdentity | None) -> bool:
        """Return True for an open file with the bytes of that identity, and for every one when it is None."""
        found = self._find_identity(fd, path)
        return identity is None or (found is not None and found.shares_bytes(identity))

    def _check_same(self, fd: int, path: str, identity: BackingIdentity | None) -> None:
        """Check that an open file, whatever its size, has the bytes of an identity; None accepts every file.

        :raises BackingError: when it has not.
        """
        if identity is not None and not self._is(fd, path, identity):
            check_same_bytes(path, self._identity(fd, self._volume(fd, path)), identity)

    def _create(self, path: str, size: int, progress: Progress) -> BackingIdentity:
        """Create a file of zeros, and return its identity, whatever has its name by then."""

        def give_name() -> None:
            os.fsync(fd)
            unlink_empty(path, at)
            try:
                at.link(fd)
            except FileExistsError as error:
                raise BackingError(
                    f"{path}: someone else has written it meanwhile",
                    hint="to take it as it is, define the domain again",
                ) from error
            at.sync()

        with self._changeable(path) as at, at.beside(".").opened(os.O_TMPFILE | os.O_RDWR) as fd:
            self._allocate(fd, path, size)
            try:
                self._write_zeros(fd, size, progress)
            except KeyboardInterrupt:
                give_name()  # the rest stays unwritten: the next call completes it
                raise
            give_name()
            return self._checked(fd, path, size)

    def _allocate(self, fd: int, path: str, size: int) -> None:
        if self._mount(fd, path).kind == "xfs":
            inode.set_extent_size(fd, SUPERPAGE)  # aligns the extents; ext4 has mke2fs -E stride for that
        os.posix_fallocate(fd, 0, size)

    def _complete(self, fd: int, path: str, size: int, progress: Progress) -> None:
        """Write zeros where a file is unwritten.

        :raises InUseError: when a program may write it: its contents are not all there yet.
        """
        # no start meanwhile: XFS writes to a file that was made immutable, too
        with self.locks.writing(fd, path):
            if inode.has_writer(fd):
                raise writers.still_written(path, writers.find(fd))
            writable = open_again(fd, os.O_RDWR)
            try:
                self._fill(writable, path, size, progress)
            finally:
                os.close(writable)

    def _fill(self, fd: int, path: str, size: int, progress: Progress) -> None:
        runs = look(fd, path, size).unwritten
        done = size - sum(length for _, length in runs)
        for offset, length in runs:
            for at in range(offset, offset + length, _CHUNK):
                count = min(_CHUNK, offset + length - at)
                give_own_blocks(fd, path, at, count)
                done += count
                progress(done, size)
        os.fsync(fd)

    def _write_zeros(self, fd: int, size: int, progress: Progress) -> None:
        """Write zeros to a new file, which nobody else has."""
        zeros = memoryview(bytes(_CHUNK))
        done = 0
        while done < size:
            done += os.pwrite(fd, zeros[: size - done], done)
            progress(done, size)
        os.fsync(fd)


def _in_whole_seconds(found: os.stat_result) -> bool:
    """Return True for a file of a file system without fractions of seconds: ext4 with inodes of 128 bytes."""
    return found.st_ctime_ns % _SECOND == 0


def _let_pass(when: int, fd: int) -> None:
    """Wait until a second is over, if what is written to a file in that second gets it for its time."""
    left = when + _SECOND + _TICK - time.time_ns()
    if left > 0 and _in_whole_seconds(os.fstat(fd)):
        time.sleep(min(left, _LONGEST_WAIT) / _SECOND)


def _status(path: str) -> os.stat_result | None:
    """Return the status of a file; None when it is not there, or cannot be asked."""
    with suppress(OSError):
        return status(path)
    return None


def _depth(mount: Mount) -> int:
    return len(mount.root)


def _is_writable(folder: str, device: int) -> bool:
    """Return True for a folder of that file system, which no other covers, by a mount that is not read-only."""
    with suppress(OSError):
        return os.stat(folder).st_dev == device and not os.statvfs(folder).f_flag & os.ST_RDONLY
    return False
