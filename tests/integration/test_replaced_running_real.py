# SPDX-License-Identifier: Apache-2.0
"""Another file is at the path of a running guest's: its folder was renamed, which the flag does not prevent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import InUseError
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec
from nvdimm_driver.pools.rules import Pools
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import SIZE, Host, empty, is_immutable
from tests.unit.doubles import UUID


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem], tmp_path: object) -> Iterator[Host]:
    host = Host(tmp_path, file_systems[request.param])  # type: ignore[arg-type]
    os.mkdir(host.path("g"))
    host.run(DomainSpec("x", UUID, 512 * MIB, None, (NvdimmSpec(0, host.path("g/a.img"), SIZE),)))
    os.rename(host.path("g"), host.path("h"))
    os.mkdir(host.path("g"))
    with open(host.path("g/a.img"), "wb") as file:
        file.write(b"of a backup".ljust(SIZE, b"b"))
    run("sync", host.path("g/a.img"))
    yield host
    empty(file_systems[request.param])


def test_nothing_is_taken_in_the_place_of_what_a_guest_has(host: Host) -> None:
    had = host.record()
    (found,) = look(host.driver)
    assert (found.path, found.mend) == (host.path("g/a.img"), None)
    assert host.path("h/a.img") in found.remedy
    assert _repair(lambda: look(host.driver)) == []
    assert host.record() == had
    assert [is_immutable(host.path(f"{name}/a.img")) for name in "gh"] == [False, True]


def test_a_start_that_came_since_the_look_is_seen(host: Host) -> None:
    """A guest that has ended lets the repair take the other file; one that has begun since does not."""
    host.mapper.alive.clear()
    host.driver.release(UUID)
    main = next(iter(host.pools))
    host.pools = Pools([replace(main, paths=(host.path("g"),))])  # it does not see where the guest's own file is now
    host.driver = host.another()
    (found,) = [each for each in look(host.driver) if each.path == host.path("g/a.img")]
    assert found.mend
    os.rename(host.path("g"), host.path("of-the-backup"))
    os.rename(host.path("h"), host.path("g"))
    host.run(DomainSpec("x", UUID, 512 * MIB, None, (NvdimmSpec(0, host.path("g/a.img"), SIZE),)))
    had = host.record()
    with pytest.raises(InUseError):
        found.mend()
    assert host.record() == had


def test_its_folder_is_renamed_back(host: Host) -> None:
    os.unlink(host.path("g/a.img"))
    os.rmdir(host.path("g"))
    os.rename(host.path("h"), host.path("g"))
    assert look(host.driver) == []
