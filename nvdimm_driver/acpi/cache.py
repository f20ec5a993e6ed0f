"""Tables that were taken from a QEMU, kept by the question: asked the same, it would give the same."""

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
"""Entries, of some 15 KB each; the longest unused ones go."""


class TableCache:
    """Files in a folder, one an entry. Any number of processes may use it at a time.

    :param folder: made when there is something to keep; when its parent is missing or it cannot be written, nothing is
        kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> tuple[bytes, ...] | None:
        """Return what was kept under the key; None when there is nothing, or what is there is damaged."""
        path = self.folder / key
        try:
            tables = tuple(split(path.read_bytes()))
            os.utime(path)
        except OSError:
            return None
        except AcpiError as error:
            LOG.warning("%s is damaged, and made anew: %s", path, error)
            return None
        return tables or None

    def put(self, key: str, tables: Sequence[bytes]) -> None:
        """Keep tables under the key."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".")
            with open(descriptor, "wb") as file:
                file.write(b"".join(tables))
            os.replace(temporary, self.folder / key)
            self._prune()
        except OSError as error:
            LOG.debug("ACPI tables are not kept for the next time: %s", error)

    def _prune(self) -> None:
        entries = [entry for entry in os.scandir(self.folder) if not entry.name.startswith(".")]
        if len(entries) <= LIMIT:
            return
        with suppress(FileNotFoundError):  # another process prunes, too
            for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime_ns)[:-LIMIT]:
                os.unlink(entry.path)


def key_of(binary: str, question: Sequence[str]) -> str:
    """Return the key for what a program is asked.

    :param binary: its path; a program that was replaced since has another key.
    """
    status = os.stat(binary)
    known = (os.path.realpath(binary), status.st_ino, status.st_size, status.st_mtime_ns, tuple(question))
    return hashlib.sha256(repr(known).encode()).hexdigest()
