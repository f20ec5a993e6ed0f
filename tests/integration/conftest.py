# SPDX-License-Identifier: Apache-2.0
"""What several integration tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nvdimm_driver.backing import locks
from tests.integration.loop_pmem import MKFS, FileSystem, mount_points
from tests.waiting import HANG_SECONDS


@pytest.fixture(autouse=True)
def _file_systems_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a file system as long as it takes on a busy machine; five seconds are what a host's operator waits."""
    monkeypatch.setattr(locks, "FREEZE_SECONDS", HANG_SECONDS)


@pytest.fixture(scope="module")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FileSystem]]:
    """Return an empty file system of each kind, by its name; it lasts as long as the module's tests."""
    mounted = {kind: FileSystem(tmp_path_factory.mktemp(kind), kind) for kind in MKFS}
    yield mounted
    for each in mounted.values():
        each.close()


@pytest.fixture(scope="module", autouse=True)
def nothing_left_mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Check that a module's tests unmount what they mount: otherwise, pytest cannot remove their folders."""
    folder = str(tmp_path_factory.getbasetemp())
    yield
    assert [each for each in mount_points() if each.startswith(f"{folder}/")] == []
