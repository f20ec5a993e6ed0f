# SPDX-License-Identifier: Apache-2.0
"""Files that a tired operator has moved by hand: who follows what is printed loses none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor import pmem as doctor_pmem
from nvdimm_driver.doctor.finding import Result
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, InUseError
from nvdimm_driver.pools.usage import usage_of
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, Host, empty
from tests.unit.doubles import OTHER_UUID

OTHER_DATA = DATA[::-1]


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    """Domain x has a.img, and domain y has b.img; both are off."""
    host = Host(tmp_path, file_systems[request.param])
    host.define("a.img")
    host.define("b.img", OTHER_UUID, OTHER_DATA)
    yield host
    empty(file_systems[request.param])


def repair(host: Host) -> None:
    _repair(lambda: look(host.driver))


def test_of_two_files_that_were_exchanged_none_is_moved_over_the_other(host: Host) -> None:
    for source, target in (("a.img", "t"), ("b.img", "a.img"), ("t", "b.img")):
        os.rename(host.path(source), host.path(target))
    hint = f"first move what is at {host.path('b.img')} now to a free name"
    with pytest.raises(InUseError) as refused:
        host.driver.prepare(host.domain("a.img"))
    assert hint in refused.value.hint
    assert any(each.remedy.startswith(hint) and each.path == host.path("a.img") for each in look(host.driver))
    os.rename(host.path("b.img"), host.path("free"))
    os.rename(host.path("a.img"), host.path("b.img"))
    repair(host)
    assert look(host.driver) == []
    assert (host.read("a.img"), host.read("b.img")) == (DATA, OTHER_DATA)


def test_a_folder_that_was_renamed_is_said_to_be_missing(host: Host) -> None:
    os.mkdir(host.path("in"))
    host.driver.define(host.domain("in/c.img", "6a1b2c3d-0000-4000-8000-00000000000c"))
    os.rename(host.path("in"), host.path("away"))
    (found,) = look(host.driver)
    assert found.mend is not None
    with pytest.raises(BackingError, match=f"there is no {host.path('in')} ") as refused:
        found.mend()
    assert refused.value.hint == "rename the folder back, or make it; then repeat this"
    os.mkdir(host.path("in"))
    repair(host)
    assert look(host.driver) == []
    assert os.path.exists(host.path("in/c.img"))


def test_a_pool_that_is_mounted_read_only_has_a_problem(host: Host) -> None:
    (pool,) = host.pools
    run("mount", "-o", "remount,ro", host.fs.root)
    try:
        usage = usage_of(pool, host.pools, host.driver.ledger, host.driver.backings)
        assert usage.problems == (f"{host.fs.root}: Read-only file system (mount it read-write)",)
        assert usage.space is not None
        assert doctor_pmem.check_usage(usage).result is Result.WARN
    finally:
        run("mount", "-o", "remount,rw", host.fs.root)
    assert usage_of(pool, host.pools, host.driver.ledger, host.driver.backings).problems == ()
