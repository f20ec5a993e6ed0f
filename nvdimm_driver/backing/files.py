# SPDX-License-Identifier: Apache-2.0
"""Files that are backings or will be: how they are checked and named."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from nvdimm_driver.backing import extents, inode
from nvdimm_driver.backing.extents import FileExtent
from nvdimm_driver.backing.paths import Entry, check_length, status
from nvdimm_driver.errors import BackingError, InUseError, RefusedError
from nvdimm_driver.host_text import escaped, printable
from nvdimm_driver.plugins import DOUBTFUL
from nvdimm_driver.shell import repair_of
from nvdimm_driver.sizes import human

NAME_MAX = 255
"""Bytes in the name of a file (limits.h)."""


class ExaminedFile(NamedTuple):
    """An existing file that is fit: its extents, and its unwritten runs (offset, length), to be filled with zeros."""

    found: tuple[FileExtent, ...]
    unwritten: tuple[tuple[int, int], ...]


def is_new(found: os.stat_result | None) -> bool:
    """Return True when there is no file, or an empty one: a new one may take its name.

    :param found: the status of what has the name; None when nothing has.
    """
    return found is None or (stat.S_ISREG(found.st_mode) and found.st_size == 0 and found.st_nlink == 1)


def check_own(path: str, found: os.stat_result) -> None:
    """Check that a file that an earlier copy has left is this user's own: others may read or write theirs.

    :param found: its status.
    :raises RefusedError: when it is not.
    """
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
        raise RefusedError(
            f"{path}: is in the way, and is not the beginning of a copy of this user's",
            hint="find out who has put it there, and delete it",
        )


def check_regular(fd: int, path: str) -> None:
    """Check that an open file is a regular one.

    :raises BackingError: when it is not.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise BackingError(f"{path}: is not a regular file")


def check_named(fd: int, path: str) -> None:
    """Check that an open file still has its name.

    :raises InUseError: when it has not.
    """
    found = status(path)
    if found is None or not os.path.samestat(found, os.fstat(fd)):
        raise InUseError(f"{path}: was given another name, or deleted, by another process just now", hint="try again")


def check_only_root_writes(fd: int, path: str) -> None:
    """Check that only root may open a frozen file for writing while that can be done, for a moment.

    :raises BackingError: when others may: a version that left files to their owners has frozen it.
    """
    if inode.others_may_write(fd):
        raise BackingError(
            f"{path}: others than root may write it, and could truncate it under the guest while its label area is "
            "opened",
            hint="shut the guest down and start it again: the start makes the file root's alone",
        )


def check_no_flag(fd: int, path: str) -> None:
    """Check that an open file is neither immutable nor append-only, unless the driver has made it so for a guest.

    With another's flag, the file could get neither the number of a guest's run nor, at its end, a new time.

    :raises BackingError: when it is.
    """
    if inode.has_others_flag(fd):
        raise BackingError(
            f"{path}: is immutable or append-only, and not by the driver, so that no guest starts with it",
            hint="take that flag away (lsattr, chattr -ia): the driver makes a file immutable itself while a guest has "
            "it; if its guest runs now, have 'nvdimmctl check --repair' do that at once",
        )


def look(fd: int, path: str, size: int) -> ExaminedFile:
    """Examine an open file for an NVDIMM of that size.

    :raises BackingError: when the file cannot be its backing.
    """
    check_regular(fd, path)
    status = os.fstat(fd)
    if status.st_nlink != 1:
        raise BackingError(
            f"{path}: has {status.st_nlink} hard links, and must have one",
            hint=f"find the others: find -xdev -inum {status.st_ino}",
        )
    check_not_doubtful(fd, path)
    check_size(path, status.st_size, size)
    found = extents.fiemap(fd, size)
    extents.check_flags(path, found, allowed=extents.LAST | extents.MERGED | extents.UNWRITTEN)
    extents.check_holes(path, found, size)
    unwritten = tuple(
        (each.offset, min(each.end, size) - each.offset) for each in found if each.flags & extents.UNWRITTEN
    )
    return ExaminedFile(found, unwritten)


def check_not_doubtful(fd: int, path: str) -> None:
    """Check that no guest may have written to an open file that does not have it.

    :raises BackingError: when one may have.
    """
    if inode.is_doubtful(fd):
        hint = f"copy a backup over it, if there is one; then, or to go on without: {repair_of(path)}"
        raise BackingError(f"{path}: {DOUBTFUL}", hint=hint)


def check_size(path: str, size: int, needed: int) -> None:
    """Check that a file is large enough.

    :raises BackingError: when it is not.
    """
    if size < needed:
        raise BackingError(
            f"{path}: has {human(size)}, the NVDIMM needs {human(needed)} ({human(needed - size)} more)",
            hint="if it is, or was, a domain's: 'nvdimmctl check' says how to go on; if not, name a path where no "
            "file is: it is created",
        )


def hidden_name(path: str) -> str:
    """Return the path of a file until it is complete: ``.NAME.partial`` beside it."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.partial")


def export_name(path: str) -> str:
    """Return the path of an export until it is complete. It is no :func:`hidden_name`, which an import may use."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.export")


def check_copy_name(path: str) -> None:
    """Check that a file's :func:`hidden_name` is not too long, nor then its :func:`export_name`, and that it is none.

    :raises BackingError: when it is too long.
    :raises InUseError: when it is the hidden name of another file.
    """
    name = os.path.basename(path)
    longest = NAME_MAX - len("..partial")
    _check_length(path, name, longest, ": the file is .NAME.partial until it is complete")
    _check_not_hidden(path, name)


def check_name(path: str) -> None:
    """Check that a backing can have a path.

    It must not be a :func:`hidden_name` or :func:`export_name`: a copy to the other name would take it for its own.

    :raises InUseError: when it is one.
    :raises BackingError: when it is too long, has a control character, or is not UTF-8, which domain XML is.
    """
    name = os.path.basename(path)
    _check_length(path, name, NAME_MAX)
    if escaped(path) != path:
        raise BackingError(f"{path}: is not UTF-8, and domain XML has to be", hint="rename it")
    if "\t" in path or "\n" in path or printable(path) != path:
        raise BackingError(f"{path!r}: has a control character", hint="rename it")
    _check_not_hidden(path, name)


def _check_not_hidden(path: str, name: str) -> None:
    for ending, what in ((".partial", "import"), (".export", "export")):
        if len(name) > len(ending) + 1 and name.startswith(".") and name.endswith(ending):
            raise InUseError(f"{path}: is the name of a file whose {what} is not finished", hint="take another name")


def _check_length(path: str, name: str, longest: int, reason: str = "") -> None:
    length = len(os.fsencode(name))
    if length > longest:
        raise BackingError(
            f"{path}: its name has {length} bytes, and may have {longest}{reason}", hint="take a shorter name"
        )
    check_length(path)


def lease_break_seconds() -> int:
    """Return a time in which the kernel ends a lease of another program (fcntl F_SETLEASE) that is in the way."""
    try:
        seconds = int(Path("/proc/sys/fs/lease-break-time").read_text(encoding="ascii"))
    except (OSError, ValueError):
        seconds = 45  # the kernel's default
    return seconds + 2  # it counts in ticks, and looks only at the next open (fs/locks.c:__break_lease)


def unlink_empty(path: str, at: Entry) -> None:
    """Delete a file that :func:`is_new`; any other keeps its name.

    It is moved aside first, and looked at there: another file can get the name at any moment, such as a backup.

    :raises BackingError: when a file that is not empty was moved aside, and has lost its name to yet another one.
    """
    if at.status() is None or not is_new(at.status()):
        return
    aside = at.beside(f".{uuid4().hex}.empty")
    try:
        at.rename_new(aside)
    except FileNotFoundError:
        return
    if is_new(aside.status()):
        aside.unlink()
        return
    try:
        aside.rename_new(at)
    except FileExistsError as error:
        raise BackingError(
            f"{path}: two files got this name at once, and one of them is {aside.name} in the same folder now",
            hint="rename it",
        ) from error


def unlink_second_name(hidden: Entry, at: Entry) -> None:
    """Delete the hidden name of a file that has its own name, too: an import of 0.1.0 was killed between the two."""
    one, other = hidden.status(), at.status()
    if one is not None and other is not None and os.path.samestat(one, other):
        hidden.unlink()
