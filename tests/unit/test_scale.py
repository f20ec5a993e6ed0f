# SPDX-License-Identifier: Apache-2.0
"""Many domains in the ledger: what is done for one does not read the others, and a look at all reads each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.doctor import repair
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError, RefusedError
from nvdimm_driver.model import MIB, Pool, Record
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state.ledger import Ledger
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, domain, make_driver, map_prepared
from tests.unit.many_domains import NAMESPACE, fill, path_of, uuid_of

NUMBER, RUNNING = 1000, 20
A = "/mnt/pmem0/a"


class Counted(Ledger):
    """Counts the domains that it has read."""

    read = 0

    def _records(self, uuids: str, *values: Any) -> tuple[Record, ...]:
        found = super()._records(uuids, *values)
        self.read += len(found)
        return found


def many(folder: Path, number: int = NUMBER, quota: int | None = None) -> tuple[XenNvdimmDriver, RecordingMapper]:
    backing, mapper = MemoryBacking(), RecordingMapper()
    pools = Pools([Pool("main", "memory", ("/mnt/pmem0",), quota, MIB, 0, False)])
    driver = make_driver(folder, backing, mapper, pools=pools, namespace=NAMESPACE, ledger=Counted)
    fill(driver, backing, mapper, number, RUNNING)
    return driver, mapper


def read(driver: XenNvdimmDriver) -> int:
    """Return how many domains the ledger has read since the last time."""
    ledger = driver.ledger
    assert isinstance(ledger, Counted)
    count, ledger.read = ledger.read, 0
    return count


def life(driver: XenNvdimmDriver, mapper: RecordingMapper) -> list[int]:
    """Let a domain be defined, started, ended and released; return how many others each of these has read."""
    read(driver)
    driver.define(domain(A), driver.check(domain(A)))
    counts = [read(driver)]
    driver.prepare(domain(A))
    map_prepared(driver.ledger, 9999)
    mapper.alive[9999] = UUID
    counts.append(read(driver))
    del mapper.alive[9999]
    driver.release(UUID)
    counts.append(read(driver))
    driver.forget(UUID)
    return [*counts, read(driver)]


def test_what_is_done_for_one_domain_reads_no_more_when_there_are_many(tmp_path: Path) -> None:
    few, others = tmp_path / "few", tmp_path / "many"
    few.mkdir()
    others.mkdir()
    assert life(*many(few, RUNNING)) == life(*many(others))


def test_a_check_reads_each_domain_only_so_often(tmp_path: Path) -> None:
    few, others = tmp_path / "few", tmp_path / "many"
    few.mkdir()
    others.mkdir()
    driver, _ = many(few, RUNNING)
    read(driver)
    assert repair.look(driver) == []
    once = read(driver)
    driver, _ = many(others)
    read(driver)
    assert repair.look(driver) == []
    assert read(driver) <= once * NUMBER // RUNNING


def test_among_many_domains_a_file_is_only_its_owners(tmp_path: Path) -> None:
    driver, _ = many(tmp_path)
    for index in (0, NUMBER // 2, NUMBER - 1):
        with pytest.raises(InUseError, match=f"belongs to domain guest{index} "):
            driver.define(domain(path_of(index)))
        found = driver.ledger.find_domain(uuid_of(index))
        assert found is not None
        identity = found.allocations[0].identity
        assert [each.uuid for each in driver.ledger.claimants("/another/name", identity)] == [uuid_of(index)]
    assert len(driver.ledger.domains()) == NUMBER
    assert driver.ledger.find_domain(UUID) is None


def test_a_quota_counts_all(tmp_path: Path) -> None:
    driver, _ = many(tmp_path, quota=NUMBER * 64 * MIB)
    with pytest.raises(RefusedError, match="of its quota of"):
        driver.define(domain(A))
