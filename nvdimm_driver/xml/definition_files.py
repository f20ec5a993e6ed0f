# SPDX-License-Identifier: Apache-2.0
"""The files in which libvirt keeps domains: definitions, the XML of guests that run, and saved guests.

They can be read when libvirt cannot be asked: libvirt waits for its hook, and keeps the domain locked meanwhile.
libvirt writes each of them whole, under another name first (src/util/virfile.c:virFileRewrite).
"""

from __future__ import annotations

import logging
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from nvdimm_driver import host_files
from nvdimm_driver.errors import ConfigError, DomainXmlError, NvdimmError, UnsupportedError
from nvdimm_driver.host_text import decode
from nvdimm_driver.xml import document
from nvdimm_driver.xml.document import MAX_BYTES, may_have, parse
from nvdimm_driver.xml.parse_domain import nvdimm_elements, path_of, uuid_of

LOG = logging.getLogger(__name__)

_SAVE_MAGIC, _SAVE_VERSION = b"libvirt-xml\n \0 \r", 2
_SAVE_HEADER = struct.Struct("=16sII40x")


@dataclass(frozen=True)
class StoredDomain:
    """A domain in one of libvirt's files; it can be in several, while it runs or is saved.

    :ivar uuid: empty if nobody knows it.
    :ivar paths: of its NVDIMMs, resolved.
    :ivar text: the XML, if it cannot be read: nobody knows what it has; empty otherwise.
    :ivar is_saved: True for the image of a saved guest.
    :ivar file: in which it is.
    :ivar unfollowed: why some of its paths cannot be followed. They are among the paths as they are written.
    """

    name: str
    uuid: str
    paths: tuple[str, ...]
    text: str = ""
    is_saved: bool = False
    file: str = field(default="", compare=False)
    unfollowed: tuple[str, ...] = field(default=(), compare=False)

    def names(self, path: str) -> bool:
        """Return True when the domain has an NVDIMM with that path, or may have: its XML cannot be read."""
        return path in self.paths or re.search(f"{re.escape(path)}(?![0-9])", self.text) is not None

    @property
    def has_any(self) -> bool:
        """Return True when the domain has an NVDIMM, or may have one."""
        return bool(self.paths or self.text)


@dataclass(frozen=True)
class DefinitionFiles:
    """Libvirt's files of domains.

    :ivar folders: in which they are. One that is not there has none; an empty list turns them off.
    :ivar restore: restores domain XML that libvirt has.
    :ivar resolve: returns the path that a path leads to: an earlier version let libvirt have others.
    :ivar save_dir: folder of managed saves; empty for none.
    """

    folders: Sequence[str]
    restore: Callable[[str], str]
    resolve: Callable[[str], str]
    save_dir: str = ""

    def __iter__(self) -> Iterator[StoredDomain]:
        """Yield the domains with NVDIMMs, and the saved guests with some.

        :raises ConfigError: when a folder or a file cannot be read, or none of the folders is there.
        """
        if self.folders and not any(map(os.path.isdir, self.folders)):
            raise ConfigError(
                f"libvirt's definitions say whose devices are, and none of their folders is there: "
                f"{', '.join(self.folders)}",
                hint="start libvirt; if it keeps its domains elsewhere, set [libvirt] definition_dirs",
            )
        for folder in self.folders:
            for file in self._files(folder, ".xml"):
                domain = self._read(file)
                if domain is not None:
                    yield domain
        yield from (guest for guest in self.saved(self.save_dir) if guest.has_any)

    def _files(self, folder: str, suffix: str) -> list[Path]:
        try:
            return sorted(path for path in Path(folder).iterdir() if path.suffix == suffix)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(folder, error) from error

    def _read(self, file: Path) -> StoredDomain | None:
        """Return the domain of a file; None when it has no NVDIMMs, or has just been undefined."""
        try:
            text = decode(file.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(file, error) from error
        if not may_have(text, "nvdimm"):
            return None
        xml = text[text.find("<domain ") : text.rfind("</domain>") + len("</domain>")]  # of a guest, it is in another
        domain = self._domain(file, xml)
        return domain if domain.has_any else None

    def _domain(self, file: Path, xml: str) -> StoredDomain:
        name, uuid = file.stem, ""
        with suppress(NvdimmError):
            root = parse(xml).root
            name, uuid = root.need("name").text, uuid_of(root) or ""
            written = [path_of(each) for each in nvdimm_elements(parse(self.restore(xml)).root)]
            paths, unfollowed = self._followed(written)
            return StoredDomain(name, uuid, paths, file=str(file), unfollowed=unfollowed)
        return StoredDomain(name, uuid, (), xml, file=str(file))

    def _followed(self, written: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return where paths lead to, and why some of them cannot be followed: these stay as they are."""
        found, unfollowed = [], []
        for path in written:
            try:
                found.append(self.resolve(path))
            except NvdimmError as error:
                found.append(path)
                unfollowed.append(error.message)
        return tuple(found), tuple(unfollowed)

    def saved(self, folder: str) -> Iterator[StoredDomain]:
        """Yield the domains that have a managed save, with NVDIMMs or without.

        :param folder: libvirt's folder of managed saves; empty when nobody knows it.
        :raises ConfigError: when it cannot be read.
        """
        for file in self._files(folder, ".save") if folder else ():
            yield replace(self._domain(file, xml_of_save(file) or ""), is_saved=True)


def has_managed_save(folder: str, name: str, uuid: str) -> bool:
    """Return True when a domain has a managed save in libvirt's folder; False when nobody knows that one.

    Another domain may have the name by now: the image tells whose it is. One that cannot be read may be the domain's.

    :raises OSError: when nobody can look into it.
    """
    file = Path(folder, f"{name}.save")
    if not folder or not host_files.is_file(file):
        return False
    with suppress(NvdimmError):
        return uuid_of(parse(xml_of_save(file) or "").root) in (None, uuid)
    return True


def xml_of_save(file: Path) -> str | None:
    """Return the domain XML in an image of a saved guest: a restore has that, whatever the definition has become.

    :returns: None when the file cannot be read, or is no such image.
    """
    try:
        with open_save(file) as image:
            xml = _read_save(image)
    except (OSError, NvdimmError) as error:
        LOG.warning("%r: what is saved there cannot be read: %s", str(file), error)
        return None
    return decode(xml) or None


def open_save(file: Path) -> BinaryIO:
    """Open an image of a saved guest, which a client may have named.

    :raises OSError: when it cannot be opened; at once while a program has a lease on it.
    :raises UnsupportedError: when it is no regular file: to open it could wait for ever, or do something to a device.
    """
    place = os.open(file, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise UnsupportedError(
                f"{file} is a FIFO, a device or a folder, and the driver has to read a saved guest before libvirt does",
                hint="write it to a file, and restore that",
            )
        return open(os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    finally:
        os.close(place)


def uuid_of_save(image: BinaryIO) -> str:
    """Return the uuid of the domain in an image of a saved guest; empty when libvirt refuses the image.

    :raises DomainXmlError: when it has XML that libvirt may read, and the driver does not, or no uuid.
    """
    xml = _read_save(image)
    if not xml:
        return ""
    uuid = uuid_of(parse(document.decode(xml)).root)
    if uuid is None:
        raise DomainXmlError("the XML of the saved guest has no <uuid>", hint="libvirt writes one: save the guest anew")
    return uuid


def _read_save(image: BinaryIO) -> bytes:
    """Return the domain XML in an image of a saved guest; empty when libvirt refuses the image.

    It follows a header: a magic string, a version, and its length (src/libxl/libxl_domain.c:libxlDomainSaveImageOpen).
    libvirt reads it up to the first NUL.

    :raises DomainXmlError: when it is too long.
    """
    header = image.read(_SAVE_HEADER.size)
    if len(header) < _SAVE_HEADER.size:
        return b""
    magic, version, length = _SAVE_HEADER.unpack(header)
    if magic != _SAVE_MAGIC or version > _SAVE_VERSION:
        return b""
    if length > MAX_BYTES:
        raise DomainXmlError(f"the XML of the saved guest has {length} bytes", hint=f"it may have {MAX_BYTES}")
    xml = image.read(length)
    return xml.partition(b"\0")[0] if len(xml) == length else b""


def _unreadable(path: str | Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: {error.strerror}: libvirt's definitions say whose devices are",
        hint="let the driver read it; if libvirt keeps its domains elsewhere, set [libvirt] definition_dirs",
    )
