# SPDX-License-Identifier: Apache-2.0
"""A redefinition of a guest that runs, on real ext4 and XFS: what the guest writes afterwards stays its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.errors import RefusedError
from nvdimm_driver.model import KIB
from tests.integration.loop_pmem import MKFS, SPA, FileSystem, run
from tests.integration.test_ownership_real import Host
from tests.unit.doubles import UUID

DATA = b"the guest's own " * (4 * KIB)


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    (tmp_path / "fs").mkdir()
    file_system = FileSystem(tmp_path / "fs", request.param)
    yield Host(tmp_path, file_system)
    for each in Path(file_system.root).rglob("*"):
        if each.is_file():
            file_system.backing.thaw(str(each))
    run("umount", str(file_system.root))


def test_a_label_area_takes_no_bytes_that_the_guest_writes_after_the_define(host: Host) -> None:
    host.run(host.domain("a.img"))
    labelled = host.domain("a.img", label_size=128 * KIB)
    with pytest.raises(RefusedError, match="domain x runs"):
        host.driver.define(labelled)
    (item,) = host.record().allocations
    end = host.backing.locate(item.spec).extents[-1]
    with open(host.fs.image, "r+b") as image:  # the guest stores to its last frames
        image.seek(end.spa - SPA + end.length - len(DATA))
        image.write(DATA)
    host.mapper.alive.clear()
    host.driver.release(UUID)
    run("sync", "-f", str(host.fs.root))
    Path("/proc/sys/vm/drop_caches").write_text("3")
    with pytest.raises(RefusedError, match=r"the end of the guest's data, 128 KiB .* is in use"):
        host.driver.define(labelled)
    assert host.read("a.img").endswith(DATA)
