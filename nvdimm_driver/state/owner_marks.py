"""What a backing says of itself: whose NVDIMM it is. With these, a ledger that was lost is made again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from nvdimm_driver.errors import LedgerError
from nvdimm_driver.model import Allocation, NvdimmSpec, Record

VERSION = 1


@dataclass(frozen=True)
class Mark:
    """An NVDIMM of a domain, as its backing has it.

    :ivar ram: of the domain, bytes.
    :ivar base: guest-physical base.
    """

    uuid: str
    name: str
    ram: int
    dsm: str | None
    spec: NvdimmSpec
    base: int | None


def pack(record: Record, item: Allocation) -> bytes:
    """The mark of a domain's NVDIMM. The path is not in it: a file knows where it is."""
    nvdimm = asdict(item.spec)
    del nvdimm["path"]
    domain = {"uuid": record.uuid, "name": record.name, "ram": record.ram, "dsm": record.dsm}
    return json.dumps({"version": VERSION, **domain, "base": item.base, "nvdimm": nvdimm}).encode()


def unpack(path: str, data: bytes) -> Mark:
    """Read the mark of the backing of that path.

    :raises LedgerError: when it is not one, or one of a newer nvdimm_driver.
    """
    try:
        found = json.loads(data)
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}")
        spec = NvdimmSpec(path=path, **found["nvdimm"])
        return Mark(found["uuid"], found["name"], found["ram"], found["dsm"], spec, found["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path}: its mark cannot be read: {error}") from error
