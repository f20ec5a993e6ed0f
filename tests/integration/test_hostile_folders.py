# SPDX-License-Identifier: Apache-2.0
"""Folders that a pool's user makes as he likes do not keep a look at the pool from the rest; real ext4 and XFS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.doctor.repair import look
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_ownership_real import Host
from tests.unit.doubles import UUID

DEEPER_THAN_PYTHON_RECURSES = 1100
DEEPER_THAN_A_PATH_IS_LONG = 2200


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    (tmp_path / "fs").mkdir()
    host = Host(tmp_path, FileSystem(tmp_path / "fs", request.param))
    host.define("x.img")
    yield host
    host.fs.close()


def make_deep(top: Path, depth: int) -> None:
    """Make a folder, with folders in it, one in the other, the innermost with a file."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("left.img", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def found(host: Host) -> list[str]:
    return [each.path for each in host.backing.survey([str(host.fs.root)])]


def test_deep_folders_are_looked_through(host: Host) -> None:
    make_deep(Path(host.path("eve")), DEEPER_THAN_PYTHON_RECURSES)
    assert look(host.driver) == []
    assert found(host) == [host.path("x.img"), host.path("eve/" + "d/" * DEEPER_THAN_PYTHON_RECURSES + "left.img")]


def test_a_folder_that_cannot_be_looked_into_is_found_and_hides_no_other(host: Host) -> None:
    make_deep(Path(host.path("eve")), DEEPER_THAN_A_PATH_IS_LONG)
    host.driver.ledger.forget(UUID)
    lost, too_deep = look(host.driver)
    assert lost.path == host.path("x.img")
    assert lost.mend, "a lost ledger can be made again"
    assert too_deep.path.startswith(host.path("eve/d/d/"))
    assert too_deep.problem == "what is in it cannot be examined: File name too long"
    assert too_deep.mend is None
