# SPDX-License-Identifier: Apache-2.0
"""Owner marks: each backing records which NVDIMM of which domain it is. A lost ledger is rebuilt from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from nvdimm_driver.errors import LedgerError
from nvdimm_driver.model import Allocation, NvdimmSpec, Record

VERSION = 1


@dataclass(frozen=True)
class Mark:
    """An NVDIMM of a domain, as recorded on its backing.

    :ivar ram: the domain's RAM, bytes.
    :ivar base: guest-physical base.
    """

    uuid: str
    name: str
    ram: int
    dsm: str | None
    spec: NvdimmSpec
    base: int | None


def pack(record: Record, item: Allocation) -> bytes:
    """Return the mark of a domain's NVDIMM, without the path, which is that of the file it is read from."""
    nvdimm = asdict(item.spec)
    del nvdimm["path"]
    domain = {"uuid": record.uuid, "name": record.name, "ram": record.ram, "dsm": record.dsm}
    return json.dumps({"version": VERSION, **domain, "base": item.base, "nvdimm": nvdimm}).encode()


def unpack(path: str, data: bytes) -> Mark:
    """Read the mark of the backing at a path.

    :raises LedgerError: when it is not a mark, or a newer nvdimm_driver wrote it.
    """
    try:
        found = json.loads(data)
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}")
        spec = NvdimmSpec(path=path, **found["nvdimm"])
        return Mark(found["uuid"], found["name"], found["ram"], found["dsm"], spec, found["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{path}: its mark cannot be read: {error}", hint="'nvdimmctl check --repair' removes it"
        ) from error
