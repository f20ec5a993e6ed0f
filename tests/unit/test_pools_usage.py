# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from nvdimm_driver.cmd.ctl import render
from nvdimm_driver.model import GIB, KIB, MIB, SUPERPAGE, Pool
from nvdimm_driver.pools.rules import Pools
from tests.unit.doubles import MemoryBacking, RecordingMapper, make_driver
from tests.unit.test_pools_rules import domain


def make_pool(kind: str = "memory", quota: int | None = None) -> Pool:
    return Pool("main", kind, ("/mnt/pmem0",), quota, SUPERPAGE, 128 * KIB, False)


def test_who_has_what(tmp_path: Path) -> None:
    driver = make_driver(tmp_path, MemoryBacking(), RecordingMapper(), pools=Pools([make_pool()]))
    driver.define(domain(("/mnt/pmem0/a", 64 * MIB)))
    usage = driver.measure_pool(make_pool())
    assert (usage.used, usage.free) == (64 * MIB, GIB - 64 * MIB)
    assert [(record.name, item.spec.path) for record, item in usage.owned] == [("db1", "/mnt/pmem0/a")]
    assert render.pool_row(usage, int) == ("main", "memory", GIB, GIB - 64 * MIB, GIB - 64 * MIB, 64 * MIB, "ok")


def test_a_quota_limits_what_is_free(tmp_path: Path) -> None:
    backing = MemoryBacking()
    make_driver(tmp_path, backing, RecordingMapper()).define(domain(("/mnt/pmem0/a", 64 * MIB)))

    def free(quota: int) -> int | None:
        pool = make_pool(quota=quota)
        return make_driver(tmp_path, backing, RecordingMapper(), pools=Pools([pool])).measure_pool(pool).free

    assert free(100 * MIB) == 36 * MIB
    assert free(10 * MIB) == 0
    assert free(2 * GIB) == GIB - 64 * MIB


def test_a_pool_that_cannot_be_looked_at_has_a_problem(tmp_path: Path) -> None:
    backing = MemoryBacking()
    backing.fail_space = "/mnt/pmem0 is not mounted"
    driver = make_driver(tmp_path, backing, RecordingMapper())
    usage = driver.measure_pool(make_pool())
    assert (usage.space, usage.free) == (None, None)
    assert render.pool_row(usage, int)[2:] == (None, None, None, 0, "/mnt/pmem0 is not mounted")


def test_a_kind_without_a_plug_in(tmp_path: Path) -> None:
    """The other pools are measured nevertheless."""
    usage = make_driver(tmp_path, MemoryBacking(), RecordingMapper()).measure_pool(make_pool("tape"))
    assert render.pool_row(usage, int)[-1] == "there is no backing 'tape' ('kind' is one of: memory)"
