# SPDX-License-Identifier: Apache-2.0
"""What several integration tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.loop_pmem import MKFS, FileSystem, mount_points


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
