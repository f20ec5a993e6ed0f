# SPDX-License-Identifier: Apache-2.0
"""The root folder of a label server and its QEMU: programs and libraries, read-only, and nothing else of the host.

It is in memory, in a mount namespace of the process's own. Sockets with a path are files: where there is no path to
one, nobody connects to it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence

SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/etc/alternatives", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"),
)
STORES = ("/nix/store", "/gnu/store")
"""Folders in which each program and each library has a folder of its own."""
_BESIDE = {"bin": ("lib", "lib64", "libexec", "share"), "libexec": ("lib", "lib64", "share")}
"""By the name of a program's folder, what is beside it and may be the program's."""
_PLACE = "/sys"
"""Where it is made, as nothing below is needed and every host has it. Then it takes the place of ``/``."""
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC = 0x2, 0x4, 0x8, 0x1000, 0x4000
_MNT_DETACH = 2
_MOUNT_ATTR_RDONLY, _MS_SLAVE, _AT_RECURSIVE = 0x1, 1 << 19, 0x8000
_SYS_MOUNT_SETATTR = 442  # the same on all architectures
_AT_FDCWD = -100


class _MountAttributes(ctypes.Structure):
    """``struct mount_attr`` (include/uapi/linux/mount.h)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def enter(programs: Sequence[str]) -> None:
    """Make the root folder, with all that these programs and this Python need, and go into it.

    What the host unmounts goes here, too, if its mounts are shared, as systemd makes them; else it would stay in use.

    :param programs: paths of programs that are run later.
    :raises OSError: when the kernel refuses; it needs CAP_SYS_ADMIN, a mount namespace and Linux 5.12.
    """
    _set_mounts("/", _MountAttributes(propagation=_MS_SLAVE))
    _mount("tmpfs", _PLACE, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for path in sorted({*SYSTEM, *_needed(programs)}):  # a folder before what is in it
        _show(path)
    os.mkdir(f"{_PLACE}/proc")
    _set_mounts(_PLACE, _MountAttributes(set=_MOUNT_ATTR_RDONLY))
    # writable, as its AppArmor profile is written there; of processes it has only those that it may look into
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("proc", f"{_PLACE}/proc", "proc", flags, "subset=pid,hidepid=invisible")
    os.chdir(_PLACE)
    _call("pivot_root", b".", b".")  # the old root is then mounted over the new one (pivot_root(2))
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def _needed(programs: Sequence[str]) -> Iterator[str]:
    """Yield what programs and this Python need, in the host's root folder."""
    for program in programs:
        path = os.path.realpath(program)
        stores = [store for store in STORES if path.startswith(f"{store}/")]
        yield from stores or (path, *_beside(path))
    yield from (os.path.abspath(path) for path in sys.path if path)


def _beside(program: str) -> Iterator[str]:
    folder, kind = os.path.split(os.path.dirname(program))
    yield from (os.path.join(folder, each) for each in _BESIDE.get(kind, ()))


def _show(path: str) -> None:
    """Show a file or a folder of the host, read-only, at its own path in the new root folder, if it exists.

    A symbolic link is shown as what it leads to.
    """
    place = _PLACE + path
    if os.path.exists(place) or not os.path.exists(path):
        return  # it is in a folder that is shown already
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.isdir(path):
        os.mkdir(place)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    _mount(path, place, "", _MS_BIND | _MS_REC, "")
    _set_mounts(place, _MountAttributes(set=_MOUNT_ATTR_RDONLY))


def _mount(source: str, place: str, kind: str, flags: int, data: str) -> None:
    words = [each.encode() for each in (source, place, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), data.encode(), what=place)


def _set_mounts(path: str, wanted: _MountAttributes) -> None:
    """Change a mount and all below it."""
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    _call(
        *("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, ctypes.byref(wanted), size),
        what=f"mount_setattr {path}",
    )


def _call(name: str, *arguments: object, what: str = "") -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what or name}: {os.strerror(number)}")
