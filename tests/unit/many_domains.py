# SPDX-License-Identifier: Apache-2.0
"""A ledger with many domains: each has one NVDIMM and had a guest, and some have one that runs."""

from __future__ import annotations

from dataclasses import replace

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.model import GIB, Namespace
from nvdimm_driver.state import owner_marks
from tests.unit.doubles import MemoryBacking, RecordingMapper, domain, map_prepared

FIRST_INODE = 10_000
NAMESPACE = Namespace("namespace0.0", "fsdax", "pmem0", "ns-0", 5 * GIB, 4096 * GIB)
"""With room for the 128 MiB that a file of :class:`.doubles.MemoryBacking` takes, by its inode."""


def uuid_of(index: int) -> str:
    return f"00000000-0000-4000-8000-{index:012x}"


def path_of(index: int) -> str:
    return f"/mnt/pmem0/guest{index}.img"


def fill(driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper, number: int, running: int) -> None:
    """Let so many domains be in the driver's ledger, and the guests of the first of them run."""
    ledger = driver.ledger
    ledger._db.execute("PRAGMA synchronous = OFF")
    for index in range(running):
        spec = domain(path_of(index), uuid=uuid_of(index), name=f"guest{index}")
        driver.define(spec)
        driver.prepare(spec)
        map_prepared(ledger, index + 1, uuid_of(index))
        mapper.alive[index + 1] = uuid_of(index)
    last, record = ledger.find_run(uuid_of(0)), ledger.find_domain(uuid_of(0))
    assert last is not None
    assert record is not None
    (like,) = record.allocations
    assert like.identity is not None
    for index in range(running, number):
        inode, path, uuid, name = FIRST_INODE + index, path_of(index), uuid_of(index), f"guest{index}"
        backing.files[path] = (inode, like.spec.size)
        item = replace(
            like, uuid=uuid, spec=replace(like.spec, path=path), identity=replace(like.identity, inode=inode)
        )
        ledger.store(uuid, name, record.ram, [item])
        stored = ledger.find_domain(uuid)
        assert stored
        backing.marks[path] = owner_marks.pack(stored, stored.allocations[0])
        had = last.nvdimms.replace(like.spec.path, path).replace(f'"inode": {like.identity.inode}', f'"inode": {inode}')
        ledger._db.execute("INSERT INTO run VALUES (?, ?, ?, ?)", (uuid, last.number, had, last.written))
