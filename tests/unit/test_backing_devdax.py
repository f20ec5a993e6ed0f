# SPDX-License-Identifier: Apache-2.0
"""DevdaxBacking on a character device of this machine, which a fake sysfs presents as device-dax."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nvdimm_driver.backing.devdax import DevdaxBacking
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError
from nvdimm_driver.model import GIB, MIB, BackingIdentity, Extent, NvdimmSpec
from tests.unit.fake_sysfs import UUID, FakeSysfs

NODE = "/dev/zero"
SPA = 0x1_4020_0000
SIZE = GIB - 2 * MIB


class Host:
    def __init__(self, folder: Path, driver: str = "device_dax") -> None:
        sysfs = FakeSysfs(folder / "sys")
        sysfs.namespace("namespace0.0", mode="dax", spa=SPA - 2 * MIB, size=GIB, uuid=UUID)
        seed = sysfs.holder("dax0.1", "namespace0.0")
        self.dax = sysfs.dax("dax0.0", seed, os.stat(NODE).st_rdev, spa=SPA, size=SIZE, driver=driver)
        self.checked: list[tuple[Sequence[Extent], int]] = []
        self.backing = DevdaxBacking(sysfs=sysfs.root, locks=Locks(folder / "locks"), cross_check=self.cross_check)

    def cross_check(self, fd: int, extents: Sequence[Extent], window: int) -> None:
        assert os.fstat(fd).st_rdev == os.stat(NODE).st_rdev
        self.checked.append((extents, window))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def spec(size: int, path: str = NODE) -> NvdimmSpec:
    return NvdimmSpec(0, path, size)


def test_handles(host: Host, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(NODE)
    assert host.backing.handles(NODE)
    assert not host.backing.handles(str(tmp_path / "link")), "paths are resolved before"
    assert not host.backing.handles(str(tmp_path))
    assert not host.backing.handles("/dev/none")


def test_a_device_is_one_extent(host: Host) -> None:
    intake = host.backing.examine(spec(SIZE))
    assert (intake.kind, intake.creates, intake.writes, intake.namespace.device) == ("devdax", False, 0, "dax0.0")
    location = host.backing.locate(spec(8 * MIB))
    assert location.extents == (Extent(0, SPA, 8 * MIB),)
    assert location.identity == BackingIdentity("devdax", UUID, 0, 0, 0, SIZE)
    assert host.backing.provision(spec(8 * MIB)) == location.identity
    assert host.checked[1] == ((Extent(0, SPA, 8 * MIB),), 2 * MIB)


def test_pagemap_does_not_see_mappings_of_1_gib(host: Host) -> None:
    (host.dax / "align").write_text(f"{GIB}\n")
    host.backing.locate(spec(2 * MIB))
    assert host.checked == []


def test_a_failed_cross_check_names_the_device(host: Host) -> None:
    backing = DevdaxBacking(sysfs=host.backing.sysfs)
    with pytest.raises(BackingError, match=r"/dev/zero: byte 0x0 is at SPA 0x\w+ by the page tables, at 0x140200000"):
        backing.locate(spec(2 * MIB))


def test_more_than_the_device_has(host: Host) -> None:
    with pytest.raises(BackingError, match=r"/dev/zero: has 1022 MiB, the NVDIMM needs 1 GiB \(2 MiB more\)"):
        host.backing.examine(spec(GIB))


def test_another_character_device(host: Host) -> None:
    with pytest.raises(BackingError, match="/dev/null: is not the device-dax device of a pmem namespace"):
        host.backing.examine(spec(2 * MIB, "/dev/null"))


def test_system_ram(tmp_path: Path) -> None:
    with pytest.raises(BackingError, match="daxctl reconfigure-device --mode=devdax"):
        Host(tmp_path, driver="kmem").backing.examine(spec(2 * MIB))


def test_a_device_that_is_gone(host: Host) -> None:
    with pytest.raises(BackingError, match="/dev/none: No such file"):
        host.backing.locate(spec(2 * MIB, "/dev/none"))


def test_a_file_is_no_device(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackingError, match="is not a device-dax device"):
        host.backing.locate(spec(2 * MIB, str(tmp_path / "file")))


def test_there_is_nothing_to_freeze_or_discard(host: Host) -> None:
    host.backing.freeze(NODE)
    host.backing.thaw("/dev/none")
    host.backing.discard(spec(2 * MIB))
    assert os.stat(NODE).st_mode & 0o222


def test_its_bytes(host: Host) -> None:
    """Each mapping of /dev/zero has its own bytes."""
    assert host.backing.size(NODE) == SIZE
    with host.backing.open_bytes(spec(3 * MIB), write=True) as content:
        content.write(3 * MIB - 4, b"last")
        content.sync()
        assert content.read(3 * MIB - 6, 6) == b"\0\0last"
        with pytest.raises(InUseError, match="is being overwritten"):
            host.backing.open_bytes(spec(MIB), write=True)
        with pytest.raises(InUseError, match="is being overwritten"):
            host.backing.freeze(NODE)
    with host.backing.open_bytes(spec(SIZE)) as content:
        assert content.read(SIZE - MIB, MIB) == bytes(MIB)
        with pytest.raises(TypeError):
            content.write(0, b"x")
    with pytest.raises(BackingError, match=r"has 1022 MiB"):
        host.backing.open_bytes(spec(GIB))
    with pytest.raises(NotFoundError):
        host.backing.size("/dev/none")
