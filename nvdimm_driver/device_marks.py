# SPDX-License-Identifier: Apache-2.0
"""Records of who has devices, and which run of a guest had them last: small files in a folder of root's.

A device keeps no record on itself. A record is of a range of bytes of a namespace, so it does not matter which name a
boot gives to it, and a partition is found by the record of the whole device, and the reverse.

Imports nothing heavy: the device model, which has to start fast, uses it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from nvdimm_driver import host_files
from nvdimm_driver.errors import LedgerError, hint_of, own_file_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from nvdimm_driver.model import BackingIdentity

FOLDER = "devices"
"""Name of the folder, in that of the ledger."""
_OWNER, _RUN = ".owner", ".run"
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
_MISSING = (FileNotFoundError, NotADirectoryError)


class DeviceMarks:
    """The records of all devices of the host. Whatever is written is synced, or fails and leaves what was there.

    :param folder: created if it does not exist; None for none, where nothing is recorded.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else os.fspath(folder)

    def owner(self, device: BackingIdentity) -> bytes | None:
        """Return the mark of exactly these bytes; None without one.

        :raises LedgerError: when it cannot be read.
        """
        return self._read(_name(device) + _OWNER)

    def owners_of_parts(self, device: BackingIdentity) -> list[tuple[BackingIdentity, bytes]]:
        """Return the marks of other devices with bytes of this one: parts of it, or what it is a part of.

        :raises LedgerError: when one cannot be read.
        """
        found = [(other, self.owner(other)) for other in self._sharing(device, _OWNER)]
        return [(other, owner) for other, owner in found if owner is not None]

    def owned_namespaces(self) -> set[str]:
        """Return the uids of the namespaces of which a device or a part has an owner, whether it is there now or not.

        :raises LedgerError: when the folder cannot be read.
        """
        return {found.device for name in self._names() if (found := _device_of(name, _OWNER))}

    def set_owner(self, device: BackingIdentity, owner: bytes | None) -> None:
        """Write the mark of exactly these bytes; None removes it.

        :raises LedgerError: when that fails.
        """
        self._write(_name(device) + _OWNER, owner)

    def owner_file(self, device: BackingIdentity) -> str:
        """Return the path of the file with the mark of exactly these bytes."""
        return os.path.join(self._folder or "", _name(device) + _OWNER)

    def last_run(self, device: BackingIdentity) -> int | None:
        """Return the number of the last run that had these bytes; None if unknown.

        0 after something else had some, and if it cannot be read, which must not keep a guest from booting.
        """
        try:
            text = self._read(_name(device) + _RUN)
            if text is None:
                return 0 if self._sharing(device, _RUN) else None
        except LedgerError:
            return 0
        return int(text) if text.isdigit() else 0

    def note_run(self, devices: Iterable[BackingIdentity], number: int) -> None:
        """Note the run that has these devices from now on, or 0 before something else writes to them.

        :raises LedgerError: when that fails.
        """
        for device in devices:
            for other in self._sharing(device, _RUN):
                self._put(_name(other) + _RUN, b"0")
            self._put(_name(device) + _RUN, b"%d" % number)

    def forget_run(self, devices: Iterable[BackingIdentity]) -> None:
        """Let nobody know which run had these devices last: what cannot be deleted stays."""
        for device in devices:
            with suppress(LedgerError):
                self._put(_name(device) + _RUN, None)

    def follow(self, before: DeviceMarks) -> list[str]:
        """Take over the records that were in use until now, as far as they can be read.

        The marks that are here of the same bytes are older, and go. Those of bytes that nobody had there stay: a device
        that is kept too long is better than one that is given away.

        :returns: what was not taken over, and what that means, a text for each.
        :raises LedgerError: when one cannot be written.
        """
        lost = []
        try:
            names = before._names()
        except LedgerError as error:
            return [f"{error.message}; whose devices are, and which run had them last, is not known here"]
        for name in names:
            if not name.endswith((_OWNER, _RUN)):
                continue
            try:
                content = before._read(name)
            except LedgerError as error:
                if name.endswith(_OWNER):
                    lost.append(f"{error.message}; whose that device is, is not known here")
                    continue
                lost.append(f"{error.message}; no saved guest with that device can go on")
                content = b"0"
            if name.endswith(_OWNER) or content is None:
                self._write(name, content)
            else:
                self._put(name, content)  # as note_run does: the number that is here need not be readable
            device = _device_of(name, _OWNER)
            for older in self._sharing(device, _OWNER) if device else ():
                if _name(older) + _OWNER not in names:
                    self.set_owner(older, None)
        return lost

    def _sharing(self, device: BackingIdentity, suffix: str) -> list[BackingIdentity]:
        """Return the other devices with such a file that share bytes with this one."""
        found = filter(None, (_device_of(name, suffix, device.kind) for name in self._names()))
        return [other for other in found if _name(other) != _name(device) and other.shares_bytes(device)]

    def _names(self) -> list[str]:
        if self._folder is None:
            return []
        try:
            return sorted(os.listdir(self._folder))
        except _MISSING:
            return []
        except OSError as error:
            raise _unread(self._folder, error) from error

    def _read(self, name: str) -> bytes | None:
        if self._folder is None:
            return None
        path = os.path.join(self._folder, name)
        try:
            with open(path, "rb") as file:
                return file.read()
        except _MISSING:
            return None
        except OSError as error:
            raise _unread(path, error) from error

    def _write(self, name: str, content: bytes | None) -> None:
        """Write a file, or remove it for None; one that cannot be read, of whomever it is, stays."""
        if self._read(name) != content:
            self._put(name, content)

    def _put(self, name: str, content: bytes | None) -> None:
        if self._folder is None:
            return
        path = os.path.join(self._folder, name)
        try:
            if content is None:
                os.unlink(path)
                host_files.sync_folder(self._folder)
            else:
                self._make_folder(self._folder)
                from threading import get_ident

                host_files.write(path, content, new=f"{path}.{os.getpid()}.{get_ident()}")
        except OSError as error:
            raise own_file_error(f"cannot write {path}", error) from error

    def _make_folder(self, folder: str) -> None:
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            return
        host_files.sync_folder(os.path.dirname(folder))


def _name(device: BackingIdentity) -> str:
    return f"{_escaped(device.device)}-{device.start}-{device.size}"


def _device_of(name: str, suffix: str, kind: str = "") -> BackingIdentity | None:
    """Return the device that a file with that suffix is of; None for any other file."""
    from nvdimm_driver.model import BackingIdentity

    uid, *numbers = name.removesuffix(suffix).rsplit("-", 2)
    if not name.endswith(suffix) or len(numbers) != 2 or not all(each.isdigit() for each in numbers):
        return None
    parts = uid.split("%")  # every second one is a character's number
    with suppress(ValueError, OverflowError):
        plain = "".join(chr(int(part, 16)) if number % 2 else part for number, part in enumerate(parts))
        return BackingIdentity(kind, plain, int(numbers[0]), 0, 0, int(numbers[1]))
    return None


def _escaped(uid: str) -> str:
    """Return the uid of a namespace, of which a plug-in may have any, as a part of a file's name."""
    return "".join(each if each in _PLAIN else f"%{ord(each):x}%" for each in uid)


def _unread(path: str, error: OSError) -> LedgerError:
    hint = hint_of(error) or "see the kernel's log"
    if path.endswith(_OWNER) and error.errno not in (errno.EACCES, errno.EPERM):
        hint += (
            "; if it stays so, and 'nvdimmctl show' has the device with its domain, delete that file: the domain's "
            "next start makes it anew"
        )
    return LedgerError(f"cannot read {path}: {error.strerror}", hint=hint)
