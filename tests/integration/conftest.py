# SPDX-License-Identifier: Apache-2.0
"""What several integration tests need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from nvdimm_driver.backing import locks
from tests.integration.loop_device import Device, MakeDevice, Partition, detached
from tests.integration.loop_pmem import MKFS, FileSystem, mount_points
from tests.waiting import HANG_SECONDS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run each test that is there for ext4 and XFS on one of them; thorough runs have both."""
    for item in items:
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        kinds = [each for each in params if isinstance(each, str) and each in MKFS]
        if Path(__file__).parent in item.path.parents and len(kinds) == 1:
            number = crc32(item.nodeid.replace(kinds[0], "").encode()) % len(MKFS)
            if kinds[0] != [*MKFS][number]:
                item.add_marker(pytest.mark.thorough)


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


@pytest.fixture
def made() -> Iterator[list[Device | Partition]]:
    """Return a list of devices, which are detached at the end."""
    found: list[Device | Partition] = []
    with detached(found):
        yield found


@pytest.fixture
def device(host: Any, made: list[Device | Partition]) -> MakeDevice:
    """Return what makes a device of a host: a :class:`.bench_host.Host` that ends before :func:`made` does."""

    def make(index: int, mib: int = 4) -> Device:
        made.append(found := Device(host.folder, index, mib << 20))
        return found

    return make


@pytest.fixture(scope="module", autouse=True)
def nothing_left_mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Check that a module's tests unmount what they mount: otherwise, pytest cannot remove their folders."""
    folder = str(tmp_path_factory.getbasetemp())
    yield
    assert [each for each in mount_points() if each.startswith(f"{folder}/")] == []
