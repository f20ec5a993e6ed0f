# SPDX-License-Identifier: Apache-2.0
"""A redefinition while a guest runs, or after it, on real ext4 and XFS: what is written afterwards stays its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, RefusedError
from nvdimm_driver.model import KIB, DomainSpec
from tests.integration.loop_pmem import MKFS, SPA, FileSystem, run
from tests.integration.test_ownership_real import SIZE, Host
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
    file_system.close()


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


def resized(host: Host, size: int) -> DomainSpec:
    domain = host.domain("a.img")
    return replace(domain, nvdimms=(replace(domain.nvdimms[0], size=size),))


def test_an_nvdimm_is_not_made_as_its_last_guest_had_it_over_what_was_copied_there_since(host: Host) -> None:
    host.run(host.domain("a.img"))
    host.mapper.alive.clear()
    host.driver.release(UUID)
    Path(host.path("a.img")).write_bytes(DATA * (2 * SIZE // len(DATA)))
    host.driver.define(resized(host, 2 * SIZE))
    with pytest.raises(RefusedError, match="the guest would lose its end"):
        host.driver.define(resized(host, SIZE))
    assert host.record().allocations[0].spec.size == 2 * SIZE


def test_another_definition_makes_no_zeros_in_the_place_of_a_file_that_was_moved(host: Host) -> None:
    """A start is refused meanwhile, and so is what 'virsh edit' does, or an NVDIMM that is attached."""
    host.define("a.img", data=DATA)
    os.rename(host.path("a.img"), host.path("aside"))
    before = host.record()
    for refused in (host.driver.plan, host.driver.define):
        with pytest.raises(BackingError, match=r"a\.img: what was provisioned for the domain is not there"):
            refused(host.domain("a.img", ram=1 << 30))
    assert host.record() == before
    assert not os.path.exists(host.path("a.img"))
    for each in look(host.driver):
        if each.mend:
            each.mend()
    host.driver.define(host.domain("a.img", ram=1 << 30))
    assert host.read("a.img").startswith(DATA)


def test_a_file_that_was_deleted_is_made_anew_once_an_operator_wants_that(host: Host) -> None:
    host.define("a.img", data=DATA)
    os.unlink(host.path("a.img"))
    with pytest.raises(BackingError, match="restore a backup"):
        host.driver.define(host.domain("a.img"))
    (found,) = look(host.driver, zeros=[host.path("a.img")])
    assert found.mend
    found.mend()
    host.driver.define(host.domain("a.img"))
    assert host.read("a.img") == bytes(SIZE)


def test_another_file_may_be_put_in_the_place_of_one_that_is_lost(host: Host) -> None:
    host.define("a.img")
    os.unlink(host.path("a.img"))
    Path(host.path("a.img")).write_bytes(DATA * (SIZE // len(DATA)))
    with pytest.raises(BackingError, match="is not the backing that was provisioned"):
        host.driver.define(host.domain("a.img"))
    (found,) = look(host.driver)
    assert found.mend
    found.mend()
    host.driver.define(host.domain("a.img"))
    assert host.read("a.img").startswith(DATA)
