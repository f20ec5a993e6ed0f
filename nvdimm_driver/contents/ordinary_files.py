# SPDX-License-Identifier: Apache-2.0
"""Files outside persistent memory: sources of imports and destinations of exports."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from nvdimm_driver.backing.byteranges import FileBytes
from nvdimm_driver.backing.files import (
    check_copy_name,
    check_not_doubtful,
    check_own,
    export_name,
    is_new,
    unlink_empty,
)
from nvdimm_driver.backing.paths import Entry, entry, opened
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError, RefusedError, UnsupportedError

_MAGIC = {
    b"QFI\xfb": "qcow2",
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"<<< ": "vdi",
}
"""QEMU's names of image formats, by the first bytes of an image (block/*.c)."""


def open_source(path: str) -> FileBytes:
    """Open a file or block device to read all of it.

    :param path: a resolved one.

    :raises NotFoundError: when there is no such path.
    :raises BackingError: when it is something else, or cannot be opened, or a guest may have written to it that does
        not have it.
    """
    if not os.path.exists(path):
        raise NotFoundError(f"{path}: there is no such file")
    with opened(path, os.O_RDONLY) as fd:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise BackingError(f"{path}: is neither a file nor a block device")
        check_not_doubtful(fd, path)
        return FileBytes(os.dup(fd), os.lseek(fd, 0, os.SEEK_END))


def check_raw(path: str, head: bytes) -> None:
    """Refuse an image that is not raw: its bytes are not those that a guest sees.

    :param head: its first 8 bytes or more.
    :raises UnsupportedError: when it is of another format.
    """
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is not None:
        raise UnsupportedError(
            f"{path}: is an image in format {kind} and has to be raw",
            hint="convert it first, as its owner and not as root: it may name other files, whose bytes would be in it "
            f"then; with qemu-img convert -f {kind} -O raw",
        )


class Destination:
    """A file that is written as ``.NAME.export`` until :meth:`publish`.

    :ivar content: its bytes.
    """

    def __init__(self, path: str, at: Entry, hidden: Entry, content: FileBytes, fd: int, *, overwrite: bool) -> None:
        self._path = path
        self._fd = fd
        self._at = at
        self._hidden = hidden
        self._overwrite = overwrite
        self.content = content

    def publish(self) -> None:
        """Give the file its name, durably. Without ``overwrite``, that takes the name from no file but an empty one.

        :raises RefusedError: when the destination exists and may not be overwritten, or is a symbolic link or no file.
        """
        _check_destination(self._path, self._at.status(), self._overwrite)
        _check_there(self._fd, self._hidden)
        if self._overwrite:
            self._hidden.replace(self._at)
        else:
            unlink_empty(self._path, self._at)
            try:
                self._hidden.rename_new(self._at)
            except FileExistsError as error:
                raise _exists(self._path) from error
        self._at.sync()


@contextmanager
def opened_destination(path: str, size: int, *, overwrite: bool) -> Iterator[Destination]:
    """Yield a file to write in the folder of a resolved path; continue an existing ``.NAME.export`` of that size.

    The folder stays the same until the file has its name, whatever is at the folder's path by then.

    :param size: bytes.
    :raises RefusedError: when the destination exists and may not be overwritten, or is a symbolic link or no file.
    """
    check_copy_name(path)
    if not os.path.isdir(os.path.dirname(path)):
        raise NotFoundError(f"{os.path.dirname(path)}: there is no such folder")
    with entry(path) as at:
        _check_destination(path, at.status(), overwrite)
        hidden = at.beside(os.path.basename(export_name(path)))
        with hidden.opened(os.O_RDWR | os.O_CREAT) as fd:
            check_own(export_name(path), os.fstat(fd))
            _lock(fd, hidden)
            if os.fstat(fd).st_size != size:
                os.truncate(fd, 0)
                os.truncate(fd, size)
            with FileBytes(os.dup(fd), size) as content:
                yield Destination(path, at, hidden, content, fd, overwrite=overwrite)


def _lock(fd: int, hidden: Entry) -> None:
    """Keep others from writing to this user's beginning of a copy, which no other user can open and lock.

    :raises InUseError: when another process does, or has just given it its name.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(f"{hidden.name}: another process writes it", hint="wait for its end, or stop it") from error
    _check_there(fd, hidden)


def _check_there(fd: int, hidden: Entry) -> None:
    """Check that an open file has a name still; raise InUseError if another process has taken that from it."""
    there = hidden.status()
    if there is None or not os.path.samestat(there, os.fstat(fd)):
        raise InUseError(f"{hidden.name}: another process has just renamed or replaced it", hint="try again")


def check_no_link(path: str) -> None:
    """Check that nothing at a path is a symbolic link; raise RefusedError if it is, also one that leads to nothing."""
    if os.path.islink(path):
        raise _link(path)


def _link(path: str) -> RefusedError:
    return RefusedError(f"{path}: is a symbolic link", hint="name the file itself, which need not exist yet")


def _check_destination(path: str, there: os.stat_result | None, overwrite: bool) -> None:
    if there is not None and stat.S_ISLNK(there.st_mode):
        raise _link(path)
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise RefusedError(f"{path}: is not a file", hint="name a file, which need not exist yet")
    if not overwrite and not is_new(there):
        raise _exists(path)


def _exists(path: str) -> RefusedError:
    return RefusedError(f"{path}: exists already", hint="--force overwrites it")
