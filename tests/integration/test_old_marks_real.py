# SPDX-License-Identifier: Apache-2.0
"""Marks of a version before 0.2.0, which do not say on which file they were written; on real ext4 and XFS."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import InUseError
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import Host, empty
from tests.unit.doubles import OTHER_UUID


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem], tmp_path: Path) -> Iterator[Host]:
    """Return a host with a domain whose file has a mark of before."""
    host = Host(tmp_path, file_systems[request.param], wipe=True)
    host.define("a.img", data=b"secret of x" * 1000)
    mark = json.loads(host.mark("a.img") or b"")
    del mark["file"]
    os.setxattr(host.path("a.img"), "trusted.nvdimm_driver.owner", json.dumps(mark).encode())
    yield host
    empty(file_systems[request.param])


def repair(host: Host) -> None:
    _repair(lambda: look(host.driver))


@pytest.mark.parametrize("sparse", ["never", "always"])
def test_bytes_that_have_to_be_overwritten_stay_the_domains_when_a_backup_has_their_place(
    host: Host, sparse: str
) -> None:
    run("cp", "-a", "--reflink=never", host.path("a.img"), host.folder / "backup")
    os.rename(host.path("a.img"), host.path("a.damaged"))
    run("cp", "--reflink=never", f"--sparse={sparse}", host.folder / "backup", host.path("a.img"))
    before = host.record().allocations
    repair(host)
    (found,) = look(host.driver)
    assert (found.path, found.mend) == (host.path("a.img"), None)
    assert f"what was provisioned is {host.path('a.damaged')}" in found.remedy
    assert host.record().allocations == before
    with pytest.raises(InUseError):
        host.driver.define(host.domain("a.damaged", OTHER_UUID))


def test_what_is_at_another_domains_path_keeps_the_mark_of_that(host: Host) -> None:
    """The files of two domains have exchanged their names."""
    host.define("b.img", OTHER_UUID)
    os.rename(host.path("a.img"), host.path("aside"))
    os.rename(host.path("b.img"), host.path("a.img"))
    os.rename(host.path("aside"), host.path("b.img"))
    marks = [host.mark(name) for name in ("a.img", "b.img")]
    repair(host)
    assert [host.mark(name) for name in ("a.img", "b.img")] == marks
