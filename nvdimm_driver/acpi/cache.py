# SPDX-License-Identifier: Apache-2.0
"""A cache of ACPI tables taken from QEMU: the same QEMU with the same arguments gives the same tables."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nvdimm_driver.acpi.tables import split
from nvdimm_driver.errors import AcpiError

LOG = logging.getLogger(__name__)

LIMIT = 256
"""Maximum number of entries, of some 15 KB each; the least recently used ones are removed."""


_DIGEST_SIZE = hashlib.sha256().digest_size


class TableCache:
    """A folder with one file per entry. Any number of processes may use it at a time.

    :param folder: created with the first entry. When its parent is missing or it cannot be written, nothing is cached.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> tuple[bytes, ...] | None:
        """Return the tables of the key; None when there is no entry, or it is not as :meth:`put` has written it."""
        path = self.folder / key
        try:
            entry = path.read_bytes()
            os.utime(path)
            if entry[:_DIGEST_SIZE] != _digest(key, entry[_DIGEST_SIZE:]):
                raise AcpiError("its checksum is wrong")
            tables = tuple(split(entry[_DIGEST_SIZE:]))
        except OSError:
            return None
        except AcpiError as error:
            LOG.warning("%s is damaged and will be replaced: %s", path, error)
            return None
        return tables or None

    def put(self, key: str, tables: Sequence[bytes]) -> None:
        """Store tables under the key."""
        content = b"".join(tables)
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".")
            try:
                with open(descriptor, "wb") as file:
                    file.write(_digest(key, content) + content)
                os.replace(temporary, self.folder / key)
            except OSError:
                os.unlink(temporary)
                raise
            self._prune()
        except OSError as error:
            LOG.debug("cannot cache ACPI tables: %s", error)

    def _prune(self) -> None:
        entries = [entry for entry in os.scandir(self.folder) if not entry.name.startswith(".")]
        if len(entries) <= LIMIT:
            return
        with suppress(FileNotFoundError):  # another process is pruning, too
            for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime_ns)[:-LIMIT]:
                os.unlink(entry.path)


def _digest(key: str, content: bytes) -> bytes:
    """Return the checksum of an entry: whole tables of another entry, or of nobody, do not have it."""
    return hashlib.sha256(f"{key}\n".encode() + content).digest()


def key_of(binary: str, inputs: Sequence[str]) -> str:
    """Return the key for a program and the inputs that determine its tables.

    :param binary: path of the program; once the program is replaced, the key differs.
    """
    status = os.stat(binary)
    parts = (os.path.realpath(binary), status.st_ino, status.st_size, status.st_mtime_ns, tuple(inputs))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
