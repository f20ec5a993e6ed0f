# SPDX-License-Identifier: Apache-2.0
"""Files outside persistent memory: sources of imports and destinations of exports."""

from __future__ import annotations

import os
import stat

from nvdimm_driver.backing.byteranges import FileBytes
from nvdimm_driver.backing.files import check_copy_name, hidden_name, is_new, opened, sync_directory
from nvdimm_driver.errors import BackingError, NotFoundError, RefusedError, UnsupportedError

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

    :raises NotFoundError: when there is no such path.
    :raises BackingError: when it is something else, or cannot be opened.
    """
    if not os.path.exists(path):
        raise NotFoundError(f"{path}: there is no such file")
    with opened(os.path.realpath(path), os.O_RDONLY) as fd:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise BackingError(f"{path}: is neither a file nor a block device")
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
            hint=f"convert it first: qemu-img convert -f {kind} -O raw {path} {path}.raw",
        )


def open_destination(path: str, size: int, *, overwrite: bool) -> FileBytes:
    """Open a file for writing, named ``.NAME.partial`` until :func:`publish`. Continue an existing one of that size.

    :param size: bytes.
    :raises RefusedError: when the destination exists and may not be overwritten, or is not a file.
    """
    check_copy_name(path)
    _check_destination(path, overwrite)
    hidden = hidden_name(path)
    with opened(hidden, os.O_RDWR | os.O_CREAT) as fd:
        if os.fstat(fd).st_size != size:
            os.truncate(fd, 0)
            os.truncate(fd, size)
        return FileBytes(os.dup(fd), size)


def publish(path: str, *, overwrite: bool) -> None:
    """Give a file of :func:`open_destination` its name, durably.

    :raises RefusedError: when the destination exists and may not be overwritten, or is not a file.
    """
    _check_destination(path, overwrite)
    real = os.path.realpath(path)
    try:
        os.replace(hidden_name(path), real)
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}") from error
    sync_directory(real)


def _check_destination(path: str, overwrite: bool) -> None:
    real = os.path.realpath(path)
    if not os.path.isdir(os.path.dirname(real)):
        raise NotFoundError(f"{os.path.dirname(real)}: there is no such folder")
    if os.path.lexists(real) and not os.path.isfile(real):
        raise RefusedError(f"{path}: is not a file", hint="name a file, which need not exist yet")
    if not overwrite and not is_new(real):
        raise RefusedError(f"{path}: exists already", hint="--force overwrites it")
