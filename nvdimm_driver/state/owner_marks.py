# SPDX-License-Identifier: Apache-2.0
"""Owner marks: each backing records which NVDIMM of which domain it is. A lost ledger is rebuilt from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from nvdimm_driver.errors import LedgerError
from nvdimm_driver.model import Allocation, BackingIdentity, NvdimmSpec, Record
from nvdimm_driver.shell import command, repair_of

VERSION = 1


@dataclass(frozen=True)
class Mark:
    """An NVDIMM of a domain, as recorded on its backing.

    :ivar ram: the domain's RAM, bytes.
    :ivar base: guest-physical base.
    :ivar file: inode and generation of the file that it was written on; None when an earlier version wrote it.
    :ivar changed: as in :class:`.model.Allocation`; 0 when an earlier version wrote it.
    """

    uuid: str
    name: str
    ram: int
    dsm: str | None
    spec: NvdimmSpec
    base: int | None
    file: tuple[int, int] | None = None
    changed: int = 0
    cache: str | None = None

    def is_copied(self, found: BackingIdentity | None) -> bool:
        """Return True when the mark was written on another file than the one found: ``cp -a`` copies it, too."""
        return found is not None and self.file not in (None, (found.inode, found.generation))

    def is_original(self, found: BackingIdentity | None) -> bool:
        """Return True when the mark was written on the file found."""
        return found is not None and self.file == (found.inode, found.generation)

    def is_later(self, item: Allocation) -> bool:
        """Return True when the mark was written for a later change of an NVDIMM than the ledger has."""
        return self.changed > item.changed


def pack(record: Record, item: Allocation) -> bytes:
    """Return the mark of a domain's NVDIMM, without the path, which is that of the file it is read from."""
    file = {"file": [item.identity.inode, item.identity.generation]} if item.identity else {}
    changed = {"changed": item.changed} if item.changed else {}
    return json.dumps({**_content(record, item), **file, **changed}).encode()


def unmark_command(path: str) -> str:
    """Return the command that takes the mark from a copy."""
    return command("nvdimmctl", "check", "--repair", "--unmark", path)


def is_current(data: bytes | None, record: Record, item: Allocation) -> bool:
    """Return True when a backing has the mark of a domain's NVDIMM, if only as an earlier version wrote it."""
    return data in (pack(record, item), json.dumps(_content(record, item)).encode())


def _content(record: Record, item: Allocation) -> dict[str, Any]:
    nvdimm = asdict(item.spec)
    del nvdimm["path"]
    domain = {"uuid": record.uuid, "name": record.name, "ram": record.ram, "dsm": record.dsm}
    domain |= {"cache": record.cache} if record.cache else {}
    return {"version": VERSION, **domain, "base": item.base, "nvdimm": nvdimm}


def unpack(path: str, data: bytes) -> Mark:
    """Read the mark of the backing at a path.

    :raises LedgerError: when it is not a mark, or a newer nvdimm_driver wrote it.
    """
    try:
        found = json.loads(data)
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}")
        spec = NvdimmSpec(path=path, **found["nvdimm"])
        file: tuple[int, int] | None = None
        if found.get("file"):
            inode, generation = found["file"]
            file = inode, generation
        domain = found["uuid"], found["name"], found["ram"], found["dsm"]
        return Mark(*domain, spec, found["base"], file, found.get("changed", 0), found.get("cache"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(
            f"{path}: its mark cannot be read: {error}", hint=f"to remove it: {repair_of(path)}"
        ) from error
