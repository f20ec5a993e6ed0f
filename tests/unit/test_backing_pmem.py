# SPDX-License-Identifier: Apache-2.0
"""PmemBacking on a loop device, which a fake sysfs presents as a pmem block device."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.backing.pmem import PmemBacking
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError
from nvdimm_driver.model import MIB, PAGE, BackingIdentity, Extent, Location, NvdimmSpec
from tests.unit.fake_sysfs import FakeSysfs

SPA = 0x1_4000_0000
SIZE = 64 * MIB


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from attached(tmp_path_factory.mktemp("loop") / "image")


@pytest.fixture
def other_loop(tmp_path: Path) -> Iterator[str]:
    yield from attached(tmp_path / "image")


def attached(image: Path) -> Iterator[str]:
    image.touch()
    os.truncate(image, SIZE)
    found = subprocess.run(["losetup", "--show", "-f", str(image)], capture_output=True, text=True, check=True)
    node = found.stdout.strip()
    subprocess.run(["mkfs.ext4", "-q", node], check=True)
    yield node
    subprocess.run(["losetup", "-d", node], check=True)


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path / "sys")


def backing(sysfs: FakeSysfs) -> PmemBacking:
    return PmemBacking(sysfs=sysfs.root)


def number(node: str) -> int:
    return os.stat(node).st_rdev


def test_handles(sysfs: FakeSysfs, loop: str) -> None:
    assert backing(sysfs).handles(loop)
    assert not backing(sysfs).handles("/dev/null")
    assert not backing(sysfs).handles("/dev/none")


def test_a_whole_namespace(sysfs: FakeSysfs, loop: str) -> None:
    sysfs.raw(number(loop), spa=SPA, size=SIZE)
    before = Path(loop).read_bytes()
    spec = NvdimmSpec(0, loop, 32 * MIB)
    intake = backing(sysfs).examine(spec)
    assert (intake.kind, intake.creates, intake.writes, intake.namespace.device) == ("pmem", False, 0, "pmem0")
    identity = backing(sysfs).provision(spec)
    assert identity == BackingIdentity("pmem", "spa-0x140000000", 0, 0, 0, SIZE)
    location = backing(sysfs).locate(spec)
    assert (location.identity, location.extents) == (identity, (Extent(0, SPA, 32 * MIB),))
    backing(sysfs).freeze(loop)
    backing(sysfs).thaw(loop)
    backing(sysfs).discard(spec)
    assert Path(loop).read_bytes() == before


def test_a_partition(sysfs: FakeSysfs, loop: str) -> None:
    disk = sysfs.raw(os.makedev(259, 0), spa=SPA)
    sysfs.partition(disk, 1, number(loop), start=MIB, size=SIZE)
    location = backing(sysfs).locate(NvdimmSpec(0, loop, SIZE))
    assert location.extents == (Extent(0, SPA + MIB, SIZE),)
    assert location.identity == BackingIdentity("pmem", "spa-0x140000000", MIB, 0, 0, SIZE)


def test_a_partition_that_is_not_on_whole_pages(sysfs: FakeSysfs, loop: str) -> None:
    disk = sysfs.raw(os.makedev(259, 0), spa=SPA)
    sysfs.partition(disk, 1, number(loop), start=63 * 512, size=SIZE)
    with pytest.raises(BackingError, match=r"not on whole pages .*partitions have to start at a multiple of 4 KiB"):
        backing(sysfs).examine(NvdimmSpec(0, loop, SIZE))


def test_more_than_the_device_has(sysfs: FakeSysfs, loop: str) -> None:
    sysfs.raw(number(loop), spa=SPA, size=SIZE)
    with pytest.raises(BackingError, match="has 64 MiB, the NVDIMM needs 66 MiB"):
        backing(sysfs).examine(NvdimmSpec(0, loop, SIZE + 2 * MIB))


@pytest.mark.parametrize(("mode", "reason"), [("fsdax", "info block"), ("sector", "btt")])
def test_other_modes(sysfs: FakeSysfs, loop: str, mode: str, reason: str) -> None:
    getattr(sysfs, mode)(number(loop))
    for act in (backing(sysfs).examine, backing(sysfs).provision, backing(sysfs).locate):
        with pytest.raises(BackingError, match=rf"is in {mode} mode.*{reason}.*create-namespace -f .* -m raw"):
            act(NvdimmSpec(0, loop, 2 * MIB))


@pytest.mark.parametrize("uuid", ["", "1ba1a01e-7a6c-4f4b-9d8c-2d5dc3a26b43"], ids=["no uuid", "uuid"])
def test_a_namespace_that_an_info_block_of_its_guest_has_changed(tmp_path: Path, loop: str, uuid: str) -> None:
    """The kernel then has /dev/pmem0s in place of /dev/pmem0 (drivers/nvdimm/btt_devs.c:nd_btt_probe)."""
    before, after = FakeSysfs(tmp_path / "before"), FakeSysfs(tmp_path / "after")
    namespace = before.namespace("namespace0.0", mode="raw", spa=SPA, size=SIZE, uuid=uuid)
    before.disk("pmem0", namespace, number(loop), SIZE)
    identity = backing(before).locate(NvdimmSpec(0, loop, SIZE)).identity
    after.namespace("namespace0.0", mode="safe", spa=SPA, size=SIZE, uuid=uuid)
    btt = after.holder("btt0.0", "namespace0.0", sector_size=4096, size=SIZE - MIB, resource=hex(SPA), uuid="1" * 36)
    after.disk("pmem0s", btt, os.makedev(259, 99))
    with pytest.raises(BackingError, match=r"namespace0\.0 is in sector mode now, not raw: .*its guest") as caught:
        backing(after).check_home("/dev/no-such-pmem0", identity)
    assert "force_raw" in caught.value.hint
    with pytest.raises(BackingError, match="its device is not there, and has its bytes still"):
        backing(before).check_home("/dev/no-such-pmem0", identity)


def test_a_disk_that_is_not_pmem(sysfs: FakeSysfs, loop: str) -> None:
    sysfs.raw(os.makedev(259, 0))
    with pytest.raises(BackingError, match=rf"{loop}: is on .*, not on persistent memory"):
        backing(sysfs).examine(NvdimmSpec(0, loop, 2 * MIB))


def test_a_device_that_is_in_use(sysfs: FakeSysfs, loop: str, tmp_path: Path) -> None:
    sysfs.raw(number(loop), spa=SPA, size=SIZE)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", loop, str(tmp_path / "mnt")], check=True)
    try:
        for act in (backing(sysfs).examine, backing(sysfs).locate):
            with pytest.raises(BackingError, match=rf"{loop}: is in use in the host \(unmount it"):
                act(NvdimmSpec(0, loop, 2 * MIB))
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    assert backing(sysfs).locate(NvdimmSpec(0, loop, 2 * MIB))


def test_its_bytes(sysfs: FakeSysfs, loop: str, tmp_path: Path) -> None:
    sysfs.raw(number(loop), spa=SPA, size=SIZE)
    device, spec = PmemBacking(sysfs=sysfs.root, locks=Locks(tmp_path / "locks")), NvdimmSpec(0, loop, 32 * MIB)
    assert device.size(loop) == SIZE
    assert device.allocate(spec) == spec
    with device.open_bytes(spec, write=True) as content:
        assert content.identity == device.locate(spec).identity
        content.write(10, b"here")
        content.write(32 * MIB - 4, b"last")
        content.sync()
        with pytest.raises(BackingError, match="not in a range of 32 MiB"):
            content.write(32 * MIB - 3, b"last")
        with pytest.raises(InUseError, match=f"{loop}: is being overwritten"):
            device.open_bytes(spec, write=True)
        with pytest.raises(InUseError, match=f"{loop}: is being overwritten"):
            device.freeze(loop)
        with device.open_bytes(spec) as other:
            assert other.read(8, 8) == b"\0\0here\0\0"
    device.freeze(loop)
    with open(loop, "rb") as file:
        assert os.pread(file.fileno(), 4, 32 * MIB - 4) == b"last"
    device.publish(spec)


def test_a_link_that_is_turned_while_labels_are_opened_does_not_open_another_device(
    sysfs: FakeSysfs, loop: str, other_loop: str, tmp_path: Path
) -> None:
    sysfs.raw(number(loop), spa=SPA, size=SIZE)
    namespace = sysfs.namespace("namespace1.0", mode="raw", spa=SPA + SIZE, size=SIZE)
    sysfs.disk("pmem1", namespace, number(other_loop), SIZE)
    link = tmp_path / "link"
    link.symlink_to(other_loop)
    spec = NvdimmSpec(0, str(link), 32 * MIB, MIB)
    own = backing(sysfs).locate(NvdimmSpec(0, loop, 32 * MIB)).identity

    class Turned(PmemBacking):
        def locate(self, spec: NvdimmSpec) -> Location:
            link.unlink()
            link.symlink_to(loop)
            return super().locate(spec)

    with pytest.raises(BackingError, match="a part of the path has become a symbolic link"):
        Turned(sysfs=sysfs.root).open_labels(spec, own)


def test_bytes_that_are_not_there(sysfs: FakeSysfs, loop: str) -> None:
    sysfs.raw(number(loop), spa=SPA, size=SIZE)
    with pytest.raises(NotFoundError, match="/dev/none"):
        backing(sysfs).open_bytes(NvdimmSpec(0, "/dev/none", PAGE))
    with pytest.raises(BackingError, match="has 64 MiB, the NVDIMM needs 66 MiB"):
        backing(sysfs).open_bytes(NvdimmSpec(0, loop, SIZE + 2 * MIB))


def test_a_mounted_device_is_not_overwritten(sysfs: FakeSysfs, loop: str, tmp_path: Path) -> None:
    sysfs.raw(number(loop), spa=SPA, size=SIZE)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mkfs.ext4", "-q", loop], check=True)
    subprocess.run(["mount", loop, str(tmp_path / "mnt")], check=True)
    try:
        with pytest.raises(BackingError, match="is in use in the host"):
            backing(sysfs).open_bytes(NvdimmSpec(0, loop, 2 * MIB), write=True)
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
