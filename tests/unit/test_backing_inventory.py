# SPDX-License-Identifier: Apache-2.0
import json
import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.backing.host_file import HostDescription, read_host
from nvdimm_driver.backing.inventory import (
    Mount,
    Volume,
    bad_parts,
    bad_ranges,
    dax_alignment,
    has_dax,
    mounts,
    names_of,
    namespaces,
    problems,
    volume_of,
)
from nvdimm_driver.errors import BackingError, ConfigError
from nvdimm_driver.model import GIB, MIB, Extent, Namespace
from tests.unit.fake_sysfs import NO_UUID, UUID, FakeSysfs

PMEM = os.makedev(259, 0)
OTHER = "6a1b2c3d-0000-4000-8000-000000000002"


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path / "sys")


def test_no_pmem(tmp_path: Path) -> None:
    assert namespaces(tmp_path) == ()


def test_fsdax_data_is_behind_the_pfn_info_block(sysfs: FakeSysfs) -> None:
    sysfs.fsdax(PMEM, spa=0x1_4020_0000, size=1022 * MIB)
    assert namespaces(sysfs.root) == (
        Namespace("namespace0.0", "fsdax", "pmem0", UUID, 0x1_4020_0000, 1022 * MIB, None),
    )


def test_raw_without_labels(sysfs: FakeSysfs) -> None:
    sysfs.raw(PMEM, spa=0x1_4000_0000, size=GIB)
    assert namespaces(sysfs.root) == (
        Namespace("namespace0.0", "raw", "pmem0", "spa-0x140000000", 0x1_4000_0000, GIB, None),
    )


def test_a_region_with_page_structures_of_its_own_is_fsdax(sysfs: FakeSysfs) -> None:
    space = sysfs.namespace("namespace0.0", mode="memory", spa=0x1_0000_0000, size=GIB)
    sysfs.disk("pmem0", space, PMEM)
    assert [each.mode for each in namespaces(sysfs.root)] == ["fsdax"]


def test_sector(sysfs: FakeSysfs) -> None:
    sysfs.sector(PMEM)
    (found,) = namespaces(sysfs.root)
    assert (found.mode, found.device) == ("sector", "pmem0s")


def devdax(sysfs: FakeSysfs, driver: str = "device_dax") -> None:
    sysfs.namespace("namespace0.1", mode="dax", spa=0x2_0000_0000, size=GIB, uuid=UUID, node=1)
    # The nd_dax device has its own number; the device-dax device is named after the namespace.
    seed = sysfs.holder("dax0.0", "namespace0.1", node=1, resource=hex(0x2_0020_0000), size=GIB - 2 * MIB)
    sysfs.dax("dax0.1", seed, os.makedev(252, 1), spa=0x2_0020_0000, size=GIB - 2 * MIB, driver=driver)


def test_devdax(sysfs: FakeSysfs) -> None:
    devdax(sysfs)
    expected = Namespace("namespace0.1", "devdax", "dax0.1", UUID, 0x2_0020_0000, GIB - 2 * MIB, 1)
    assert namespaces(sysfs.root) == (expected,)
    assert dax_alignment(expected, sysfs.root) == 2 * MIB


@pytest.mark.parametrize("driver", ["kmem", ""])
def test_dax_that_is_system_ram_or_idle_is_not_pmem(sysfs: FakeSysfs, driver: str) -> None:
    devdax(sysfs, driver)
    assert namespaces(sysfs.root) == ()


def test_dax_of_other_memory_is_not_pmem(sysfs: FakeSysfs) -> None:
    hmem = sysfs.device(sysfs.root / "devices/platform/hmem.0")
    sysfs.dax("dax1.0", hmem, os.makedev(252, 2), spa=0x3_0000_0000, size=GIB)
    assert namespaces(sysfs.root) == ()


def test_all_are_listed_in_order_of_address(sysfs: FakeSysfs) -> None:
    devdax(sysfs)
    sysfs.fsdax(PMEM, spa=0x1_4020_0000, size=GIB)
    assert [each.device for each in namespaces(sysfs.root)] == ["pmem0", "dax0.1"]


def test_the_pfn_uuid_stands_in_for_a_null_one_of_the_namespace(sysfs: FakeSysfs) -> None:
    sysfs.namespace("namespace0.0", mode="memory", spa=0, size=GIB, uuid=NO_UUID)
    pfn = sysfs.holder("pfn0.0", "namespace0.0", uuid=UUID, resource=hex(2 * MIB), size=GIB - 2 * MIB)
    sysfs.disk("pmem0", pfn, PMEM)
    assert [each.uid for each in namespaces(sysfs.root)] == [UUID]


def test_an_unreadable_attribute_is_an_error(sysfs: FakeSysfs) -> None:
    disk = sysfs.fsdax(PMEM)
    resource = disk.parent.parent / "resource"
    resource.unlink()
    with pytest.raises(BackingError, match=r"pfn0\.1/resource: cannot be read: No such file"):
        namespaces(sysfs.root)
    resource.write_text("many\n")
    with pytest.raises(BackingError, match="expected a number, found 'many'"):
        namespaces(sysfs.root)


def test_only_root_may_see_addresses() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        disk = FakeSysfs(Path(folder) / "sys").fsdax(PMEM)
        (disk.parent.parent / "resource").chmod(0o400)
        os.seteuid(65534)
        try:
            with pytest.raises(BackingError, match=r"resource: Permission denied \(only root may see"):
                namespaces(Path(folder) / "sys")
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("attribute", ["resource", "size"])
def test_an_idle_device_is_not_listed(sysfs: FakeSysfs, attribute: str) -> None:
    path = sysfs.fsdax(PMEM).parent.parent / attribute
    path.unlink()
    os.mknod(path, stat.S_IFSOCK | 0o600)  # open(2) of a socket is ENXIO, as read(2) is of an idle device's address
    assert namespaces(sysfs.root) == ()


def test_areas_are_whole_frames() -> None:
    space = Namespace("namespace0.0", "raw", "pmem0", "u", 0x1800, 0x3000)
    assert space.frames == (2, 2)
    assert replace(space, data_size=0x100).frames[1] == 0


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 20))
def test_areas_never_reach_outside(spa: int, size: int) -> None:
    mfn, count = Namespace("n", "raw", "pmem0", "u", spa, size).frames
    if count:
        assert spa <= mfn * 4096 < (mfn + count) * 4096 <= spa + size


def test_volume_of_a_whole_namespace(sysfs: FakeSysfs) -> None:
    sysfs.fsdax(PMEM, size=GIB)
    (space,) = namespaces(sysfs.root)
    assert volume_of(PMEM, "/mnt/x", sysfs.root) == Volume(space, 0, GIB)


def test_volume_of_a_partition(sysfs: FakeSysfs) -> None:
    disk = sysfs.fsdax(PMEM, spa=0x1_4020_0000, size=GIB)
    number = os.makedev(259, 1)
    sysfs.partition(disk, 1, number, start=MIB, size=64 * MIB)
    volume = volume_of(number, "/mnt/x", sysfs.root)
    assert (volume.start, volume.size, volume.spa) == (MIB, 64 * MIB, 0x1_4020_0000 + MIB)


def test_volume_of_another_disk(sysfs: FakeSysfs) -> None:
    sysfs.fsdax(PMEM)
    mapper = sysfs.device(sysfs.root / "devices/virtual/block/dm-0")
    sysfs.link("dev/block/253:0", mapper)
    with pytest.raises(BackingError, match=r"/mnt/x: is on dm-0 \(device 253:0\), not on persistent memory") as caught:
        volume_of(os.makedev(253, 0), "/mnt/x", sysfs.root)
    assert "device-mapper" in caught.value.hint


def test_volume_of_no_device(sysfs: FakeSysfs) -> None:
    with pytest.raises(BackingError, match=r"no block device \(device 0:21\)"):
        volume_of(os.makedev(0, 21), "/proc/x", sysfs.root)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [("cpu_cache", "cpu_cache"), ("memory_controller", "memory_controller"), ("", ""), ("unknown", "")],
)
def test_persistence_domain_is_the_regions(sysfs: FakeSysfs, attribute: str, expected: str) -> None:
    sysfs.device(sysfs.region, persistence_domain=attribute)
    sysfs.fsdax(PMEM)
    (found,) = namespaces(sysfs.root)
    assert found.persistence_domain == expected


def test_mounts(tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    file.write_text(
        "29 1 259:0 / /mnt/a\\040b rw,relatime shared:1 - ext4 /dev/pmem0 rw,dax=always\n"
        "30 1 0:22 / /proc rw - proc proc rw\n"
        "31 1 0:23 /a\\040b /mnt/c rw - fuse  rw\n"
    )
    assert mounts(file) == (
        Mount(PMEM, "/mnt/a b", "ext4", ("rw", "dax=always"), id=29),
        Mount(os.makedev(0, 22), "/proc", "proc", ("rw",), id=30),
        Mount(os.makedev(0, 23), "/mnt/c", "fuse", ("rw",), "/a b", 31),
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [("rw,dax", True), ("rw,dax=always", True), ("rw,dax=inode", False), ("rw,dax=never", False), ("rw", False)],
)
def test_has_dax(options: str, expected: bool) -> None:
    assert has_dax(options.split(",")) is expected


def test_the_mounts_of_this_machine_are_those_of_the_kernel() -> None:
    found = {mount.directory: mount.device for mount in mounts(Path("/proc/self/mountinfo"))}
    assert found["/proc"] == os.stat("/proc").st_dev


SPACE = Namespace("namespace0.0", "fsdax", "pmem0", UUID, 0x1_4020_0000, GIB, 1)
RAW = Namespace("namespace1.0", "raw", "pmem1", "spa-0x200000000", 0x2_0000_0000, GIB)
HOST = HostDescription((SPACE, RAW), 46, (("/mnt", "namespace0.0"), ("/mnt/b", "namespace1.0")))


def test_read_host(sysfs: FakeSysfs, tmp_path: Path) -> None:
    sysfs.fsdax(PMEM)
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "cpuinfo").write_text("model name\t: x\naddress sizes\t: 46 bits physical, 48 bits virtual\n")
    (proc / "self/mountinfo").write_text(
        "29 1 259:0 / /mnt/pmem0 rw - ext4 /dev/pmem0 rw,dax=always\n"
        "30 1 0:40 / /mnt/v rw - virtiofs tag rw,dax=always\n"
        "31 1 259:0 / /mnt/plain rw - ext4 /dev/pmem0 rw\n"
    )
    host = read_host(sysfs.root, proc)
    assert host == HostDescription(namespaces(sysfs.root), 46, (("/mnt/pmem0", "namespace0.0"),))
    assert HostDescription.from_json(host.to_json()) == host
    (proc / "cpuinfo").write_text("Processor : arm\n")
    with pytest.raises(BackingError, match="no line 'address sizes'"):
        read_host(sysfs.root, proc)


def test_host_file_round_trip() -> None:
    assert HostDescription.from_json(HOST.to_json()) == HOST


def test_host_file_without_what_may_be_left_out() -> None:
    content = json.loads(HOST.to_json())
    del content["mounts"], content["namespaces"][0]["numa_node"]
    assert HostDescription.from_json(json.dumps(content)) == HostDescription((replace(SPACE, numa_node=None), RAW), 46)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), 3, "host file: expected an object, found 3"),
        (("namespaces",), {}, "host file: namespaces: expected a list"),
        (("namespaces",), None, "host file: namespaces is missing"),
        (("physical_address_bits",), 53, "physical_address_bits: expected a number from 32 to 52, found 53"),
        (("physical_address_bits",), True, "physical_address_bits: expected a number from 32 to 52, found true"),
        (("surplus",), 1, "host file: 'surplus' is not known"),
        (("mounts",), [], "host file: mounts: expected an object"),
        (("mounts", "mnt"), "namespace0.0", "mounts: 'mnt' is not an absolute path"),
        (("mounts", "/x"), "namespace9.0", 'mounts: /x is on "namespace9.0", which is not among'),
        (("namespaces", 0), "x", r"namespaces\[0\]: expected an object"),
        (("namespaces", 0, "uid"), "", r'namespaces\[0\]: uid: expected a non-empty string, found ""'),
        (("namespaces", 0, "mode"), "memory", r"namespaces\[0\]: mode: expected one of fsdax, devdax, raw, sector"),
        (("namespaces", 0, "data_spa"), "0x1", r"namespaces\[0\]: data_spa: expected a number"),
        (("namespaces", 0, "data_spa"), -1, r"namespaces\[0\]: data_spa: expected a number from 0"),
        (("namespaces", 0, "data_size"), 0, r"namespaces\[0\]: data_size: expected a number from 1"),
        (("namespaces", 0, "data_size"), 1 << 46, r"namespaces\[0\]: ends beyond 0x400000000000"),
        (("namespaces", 0, "numa_node"), -1, r"namespaces\[0\]: numa_node: expected a number or null"),
        (("namespaces", 0, "persistence_domain"), "rtc", 'persistence_domain: expected one of "", "memory_controller"'),
        (("namespaces", 0, "data_sp"), 1, r"namespaces\[0\]: 'data_sp' is not known \(known: data_size, data_spa"),
        (("namespaces", 1, "name"), "namespace0.0", "two namespaces are called namespace0.0"),
    ],
)
def test_host_file_errors(path: tuple[Any, ...], value: Any, message: str) -> None:
    content = json.loads(HOST.to_json())
    if not path:
        content = value
    else:
        place = content
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        HostDescription.from_json(json.dumps(content))


def test_host_file_is_not_json() -> None:
    with pytest.raises(ConfigError, match=r"my\.json: not JSON: .*line 1 column 2"):
        HostDescription.from_json("{", "my.json")
    with pytest.raises(ConfigError, match=r"my\.json: not JSON: .*recursion"):
        HostDescription.from_json("[" * 100_000, "my.json")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/dev/pmem1", "namespace1.0"),
        ("/mnt/x", "namespace0.0"),
        ("/mnt/b/x", "namespace1.0"),
        ("/mnt/bb/x", "namespace0.0"),
    ],
)
def test_namespace_of(path: str, name: str) -> None:
    assert HOST.namespace_of(path).name == name


def test_namespace_of_what_is_not_described() -> None:
    with pytest.raises(BackingError, match=r"/root/x: .*devices: /dev/pmem0, /dev/pmem1; file systems: /mnt, /mnt/b"):
        HOST.namespace_of("/root/x")


def test_files_are_on_the_one_fsdax_namespace_where_mounts_are_not_described() -> None:
    assert HostDescription((SPACE, RAW), 46).namespace_of("/any/x") == SPACE
    with pytest.raises(BackingError):
        HostDescription((SPACE, replace(SPACE, name="namespace2.0")), 46).namespace_of("/any/x")


def test_bad_blocks_are_those_of_regions_and_of_disks(tmp_path: Path) -> None:
    """Offsets count from the start of the region, or from the start of the disk's data."""
    sysfs = FakeSysfs(tmp_path)
    disk = sysfs.fsdax(PMEM, spa=0x1_4020_0000)
    sysfs.link("bus/nd/devices/region0", sysfs.region)
    (sysfs.region / "resource").write_text("0x140000000\n")
    assert bad_ranges(tmp_path) == ()
    (sysfs.region / "badblocks").write_text("4096 8\n8192 1\n")
    (disk / "badblocks").write_text("0 8\n100 2\n")
    assert bad_ranges(tmp_path) == ((0x1_4020_0000, 4096), (0x1_4020_0000 + 51200, 1024), (0x1_4040_0000, 512))


def test_bad_parts_of_a_backing_are_told_by_their_offset_in_it() -> None:
    extents = (Extent(0, 0x10000, 0x4000), Extent(0x4000, 0x40000, 0x4000))
    bad = ((0xF000, 0x2000), (0x13E00, 0x400), (0x40000, 0x200), (0x43000, 0x9000), (0x90000, 0x200))
    assert bad_parts(extents, bad) == ((0, 0x1000), (0x3E00, 0x200), (0x4000, 0x200), (0x7000, 0x1000))
    assert bad_parts(extents, ()) == ()


def test_what_the_kernel_holds_against_a_namespace(sysfs: FakeSysfs) -> None:
    sysfs.fsdax(PMEM, spa=0x1_4020_0000, size=1022 * MIB)
    (namespace,) = namespaces(sysfs.root)
    assert problems(namespace, sysfs.root) == ()
    region = (sysfs.root / "bus/nd/devices/namespace0.0").resolve().parent
    (region / "read_only").write_text("1\n")
    (region / "mapping0").write_text("nmem0,0,1073741824,0\n")
    flags = sysfs.root / "bus/nd/devices/nmem0/nfit/flags"
    flags.parent.mkdir(parents=True)
    flags.write_text("not_armed smart_event\n")
    disk = (sysfs.root / "class/block/pmem0").resolve()
    (disk / "badblocks").write_text("8 2\n")
    assert problems(namespace, sysfs.root) == (
        "namespace0.0: 1 KiB of bad blocks",
        f"{region.name}: read-only",
        "nmem0: not_armed smart_event",
    )


@pytest.mark.parametrize("uid", [UUID, "spa-0x240000000"])
@pytest.mark.parametrize("now", ["active", "idle", "another mode"])
def test_a_namespace_is_known_by_what_a_domain_has(tmp_path: Path, uid: str, now: str) -> None:
    """Else, 'pool create --force' destroys what a domain has on a namespace that is not enabled."""
    uuid = uid if uid == UUID else None
    sysfs = FakeSysfs(tmp_path)
    namespace = sysfs.namespace("namespace1.0", mode="raw", spa=0x2_4000_0000, size=64 * MIB, uuid=uuid)
    sysfs.namespace("namespace2.0", mode="raw", spa=0x3_4000_0000, size=64 * MIB)
    if now == "active":
        sysfs.disk("pmem1", namespace, os.makedev(259, 1), 64 * MIB)
    elif now == "another mode":
        holder = sysfs.holder("pfn1.0", "namespace1.0", uuid=OTHER, mode="ram", resource="0x240200000", size=62 * MIB)
        sysfs.disk("pmem1", holder, os.makedev(259, 1))
    assert names_of([uid], ["namespace2.0"], tmp_path) == {"namespace1.0"}


def test_a_namespace_whose_uuid_is_not_known_can_be_any_idle_one(tmp_path: Path) -> None:
    """Its uuid is in its info block, which nobody reads while it is idle."""
    FakeSysfs(tmp_path).namespace("namespace1.0", mode="memory", spa=0x2_4000_0000, size=64 * MIB)
    assert names_of([UUID], ["namespace1.0"], tmp_path) == {"namespace1.0"}
    assert names_of([], ["namespace1.0"], tmp_path) == set()
