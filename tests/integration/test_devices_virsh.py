# SPDX-License-Identifier: Apache-2.0
"""Raw namespaces and partitions of them as NVDIMMs, under the real libvirtd and its libxl driver, without Xen."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.backing import device as device_backing
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.backing.pmem import PmemBacking
from nvdimm_driver.errors import InUseError
from nvdimm_driver.model import NvdimmSpec
from tests.integration.bench_host import CONF, Host
from tests.integration.loop_device import Device, MakeDevice, Partition, rename, with_paths
from tests.integration.test_lost_state import rows
from tests.ledger_copies import copy_ledger, forget_devices
from tests.waiting import HANG_SECONDS

MIB = 1 << 20
SECRET = b"of db1"
WIPED = """
[pool:wiped]
kind = pmem
paths = {folder}/pmem1, {folder}/pmem1p1, {folder}/pmem1p2
wipe_on_release = true
"""
KEPT = """
[pool:kept]
kind = pmem
paths = {folder}/pmem3, {folder}/pmem4, {folder}/pmem5
"""


@pytest.fixture
def host(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, made: list[Device | Partition]
) -> Iterator[Host]:
    """Return a host with these pools; the devices are detached after its end."""
    pools = getattr(request, "param", WIPED)
    host = Host(tmp_path_factory.mktemp("host"), conf=CONF.replace("allow_any_path=true", "") + pools)
    try:
        yield host
    finally:
        host.libvirtd.close()


def xml(host: Host, name: str, number: int, *paths: Path, mib: int = 4) -> Path:
    """Return a file with a domain that has these, with a size of each."""
    file = host.xml(name, number)
    file.write_text(with_paths(file.read_text(), *paths).replace("<size unit='MiB'>4<", f"<size unit='MiB'>{mib}<"))
    return file


@pytest.fixture
def shrunk(host: Host, device: MakeDevice, made: list[Device | Partition]) -> tuple[Partition, ...]:
    """Return a partition that was made smaller under db1, and the one that has the rest now, with bytes of db1."""
    disk = device(1, 16)
    first = Partition(disk, 1, 2 * MIB, 8 * MIB)
    made.append(first)
    host.check("define", xml(host, "db1", 1, first.path, mib=8))
    disk.write(SECRET, 8 * MIB)
    first.resize(2 * MIB, 4 * MIB)
    second = Partition(disk, 2, 6 * MIB, 4 * MIB)
    made.append(second)
    return first, second


def content(partition: Partition, offset: int) -> bytes:
    """Return what a domain with a partition reads."""
    return partition.device.read(len(SECRET), offset)


@pytest.mark.parametrize("verb", ["release", "wipe"])
def test_a_partition_that_was_made_smaller_is_not_wiped_in_part(
    host: Host, shrunk: tuple[Partition, ...], verb: str
) -> None:
    first, second = shrunk
    host.check("undefine", "db1")
    done = host.nvdimmctl(verb, "--yes", "db1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "its size is 4 MiB, it was 8 MiB: bytes of the domain are outside of it" in done.stderr
    assert "belongs to domain db1" in host.virsh("define", xml(host, "db2", 2, second.path)).stderr
    first.resize(2 * MIB, 8 * MIB)
    assert host.nvdimmctl("release", "--yes", "db1").returncode == 0
    assert content(second, 8 * MIB) == bytes(len(SECRET))
    host.check("define", xml(host, "db2", 2, second.path))


def test_a_partition_that_was_made_smaller_is_given_up_as_lost(host: Host, shrunk: tuple[Partition, ...]) -> None:
    first, _ = shrunk
    first.device.write(SECRET, 2 * MIB)
    host.check("undefine", "db1")
    assert host.nvdimmctl("release", "--yes", "--lost", "--slot", "0", "db1").returncode == 0
    assert content(first, 2 * MIB) == bytes(len(SECRET))
    assert content(first, 8 * MIB) == SECRET


@pytest.mark.parametrize("mib", [8, 4])
def test_a_domain_is_not_redefined_with_a_part_of_what_has_to_be_wiped(
    host: Host, device: MakeDevice, made: list[Device | Partition], mib: int
) -> None:
    disk = device(1, 16)
    first = Partition(disk, 1, 2 * MIB, 8 * MIB)
    made.append(first)
    host.check("define", xml(host, "db1", 1, first.path, mib=mib))
    disk.write(SECRET, 8 * MIB)
    first.resize(2 * MIB, 4 * MIB)
    made.append(second := Partition(disk, 2, 6 * MIB, 4 * MIB))
    assert host.virsh("define", xml(host, "db1", 1, first.path)).returncode != 0
    assert host.virsh("start", "db1").returncode != 0
    assert "belongs to domain db1" in host.virsh("define", xml(host, "db2", 2, second.path)).stderr


def test_a_whole_device_is_not_given_up_for_a_part_of_it(
    host: Host, device: MakeDevice, made: list[Device | Partition]
) -> None:
    disk = device(1, 16)
    made.append(first := Partition(disk, 1, 2 * MIB, 8 * MIB))
    made.append(second := Partition(disk, 2, 10 * MIB, 4 * MIB))
    host.check("define", xml(host, "db1", 1, disk.path))
    disk.write(SECRET, 10 * MIB)
    host.check("define", xml(host, "db1", 1, first.path))
    (finding,) = rows(host, "check")
    assert "that is only a part of it" in finding["Remedy"]
    host.nvdimmctl("check", "--repair")
    for verb in ("release", "wipe"):
        assert "which the domain keeps" in host.nvdimmctl(verb, "--yes", "--slot", "256", "db1").stderr
    assert "belongs to domain db1" in host.virsh("define", xml(host, "db2", 2, second.path)).stderr
    host.check("define", xml(host, "db1", 1, disk.path))
    assert host.nvdimmctl("check", "--repair").returncode == 0
    host.check("undefine", "db1")
    assert host.nvdimmctl("release", "--yes", "db1").returncode == 0
    host.check("define", xml(host, "db2", 2, second.path))
    assert content(second, 10 * MIB) == bytes(len(SECRET))


@pytest.mark.parametrize("host", [pytest.param(KEPT, id="kept")], indirect=True)
def test_devices_that_have_each_others_names_after_a_boot(host: Host, device: MakeDevice) -> None:
    """Each of three domains keeps its device, its slot and its base, and nobody gets another's bytes meanwhile."""
    disks = [device(index, 4) for index in (3, 4, 5)]
    names = ["db1", "db2", "db3"]
    for number, (name, disk) in enumerate(zip(names, disks, strict=True), 1):
        host.check("define", xml(host, name, number, disk.path))
        disk.write(f"of {name}".encode())
    before = {name: host.record(name).allocations[0] for name in names}
    host.libvirtd.stop()
    paths = [disk.path for disk in disks]
    rename(dict(zip(disks, paths[1:] + paths[:1], strict=True)))
    host.libvirtd.start()
    for number, (name, disk) in enumerate(zip(names, disks, strict=True), 1):
        assert host.virsh("start", name).returncode != 0
        assert host.virsh("define", xml(host, name, number, disk.path)).returncode != 0
    found = rows(host, "check")
    assert [row["Domain"] for row in found] == names
    for row, disk in zip(found, disks, strict=True):
        assert f"its device has the name {disk.path} now" in row["Problem"]
        assert f"define {row['Domain']} with {disk.path}" in row["Remedy"]
    done = rows(host, "check", "--repair")
    assert [row["Done"] for row in done[:3]] == ["yes"] * 3
    left = sorted(rows(host, "check"), key=lambda row: row["Domain"])
    for row, disk in zip(left, disks, strict=True):
        assert f"{row['Domain']} has {disk.path} instead, by the ledger: define " in row["Remedy"]
    for name in names:
        assert "belongs to domain" in host.virsh("start", name).stderr
    for number, (name, disk) in enumerate(zip(names, disks, strict=True), 1):
        host.check("define", xml(host, name, number, disk.path))
        after = host.record(name).allocations
        assert [(each.identity, each.base, each.spec.slot) for each in after] == [
            (before[name].identity, before[name].base, before[name].spec.slot)
        ]
        assert disk.read(6) == f"of {name}".encode()
        host.check("start", name)
    assert host.nvdimmctl("check").returncode == 0


KEPT_AND_WIPED = KEPT + "wipe_on_release = true\n"


@pytest.mark.parametrize("host", [pytest.param(KEPT_AND_WIPED, id="wiped")], indirect=True)
def test_what_a_domain_has_given_up_is_not_taken_for_what_it_has(host: Host, device: MakeDevice) -> None:
    """A boot exchanges the names of the two: one is to be wiped, the other one is the guest's."""
    own, other, _ = [device(index, 4) for index in (3, 4, 5)]
    host.check("define", xml(host, "db1", 1, other.path))
    host.check("define", xml(host, "db1", 1, own.path))
    own.write(b"precious")
    other.write(b"given up")
    (before, aside) = host.record("db1").allocations
    host.libvirtd.stop()
    rename({own: other.path, other: own.path})
    host.libvirtd.start()
    for row in rows(host, "check", "--repair"):
        assert row["Done"] == "", row
    assert host.record("db1").allocations == (before, aside)
    assert host.virsh("start", "db1").returncode != 0
    for path in (own.path, other.path):
        assert host.virsh("define", xml(host, "db2", 2, path)).returncode != 0
    host.check("define", xml(host, "db1", 1, own.path))  # as the remedy says
    now = host.record("db1").allocations
    assert [(each.spec.slot, each.identity, each.spec.path) for each in now] == [
        (0, before.identity, str(own.path)),
        (256, aside.identity, str(other.path)),
    ]
    assert now[0].base == before.base
    host.check("start", "db1")
    host.check("destroy", "db1")
    assert host.nvdimmctl("release", "--yes", "--slot", "256", "db1").returncode == 0
    assert (own.read(8), other.read(8)) == (b"precious", bytes(8))


@pytest.mark.parametrize("host", [pytest.param(KEPT, id="kept")], indirect=True)
def test_a_definition_that_nobody_can_read_is_named(host: Host, device: MakeDevice) -> None:
    """It takes none from the domain that has it, and gives none that it names to another one."""
    disk, free = device(3, 16), device(4, 16)
    host.check("define", xml(host, "db1", 1, disk.path))
    host.check("start", "db1")
    host.check("destroy", "db1")
    plain = re.sub(r"<memory model.*?</memory>\s*", "", host.xml("p", 7).read_text(), flags=re.DOTALL)
    direct = ("virsh", "-q", "-c", "xen+unix:///system?socket=/run/libvirt/libvirt-sock")
    for more, returncode in (("0", 0), ("", 1)):
        file = host.folder / "p.xml"
        text = f"<description>nvdimm {disk.path} {free.path}{more}</description><memory unit"
        file.write_text(plain.replace("<memory unit", text, 1))
        host.check("define", file)
        broken = host.libvirtd.run(*direct, "metadata", "p", "--uri", "x<y", "--key", "a", "--set", "<a/>", "--config")
        assert broken.returncode == 0, broken.stderr
        host.check("start", "db1")
        host.check("destroy", "db1")
        assert "libxl/p.xml cannot be read as the XML of a domain" in host.nvdimmctl("check").stdout
        defined = host.virsh("define", xml(host, "db2", 2, free.path))
        assert defined.returncode == returncode, defined.stderr
        if not returncode:
            host.check("undefine", "db2")
            assert host.nvdimmctl("release", "--yes", "db2").returncode == 0
    assert "libxl/p.xml cannot be read as the XML of a domain, and may have" in defined.stderr


def test_a_third_domain_gets_no_device_of_a_definition_by_another_name(host: Host, device: MakeDevice) -> None:
    """The ledger, from a backup, has another device for that domain: a boot has exchanged the names since."""
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    conf.write_text(conf.read_text().replace("[DEFAULT]", "[DEFAULT]\nallow_any_path = true"))
    first, second = device(3, 4), device(4, 4)
    ledger, backup = host.folder / "state/ledger.sqlite", host.folder / "backup"
    host.check("define", xml(host, "db1", 1, first.path))
    copy_ledger(ledger, backup)
    host.libvirtd.stop()
    rename({first: second.path, second: first.path})
    host.libvirtd.start()
    host.check("define", xml(host, "db1", 1, first.path))
    host.check("define", xml(host, "db1", 1, second.path))
    second.write(SECRET)
    copy_ledger(backup, ledger)
    alias = host.folder / "alias"
    os.mknod(alias, stat.S_IFBLK | 0o600, second.number)
    for path in (second.path, alias):
        assert host.virsh("define", xml(host, "db3", 3, path)).returncode != 0
    refused = host.nvdimmctl("wipe", "--yes", "--unclaimed", str(alias))
    assert refused.returncode != 0
    assert second.read(len(SECRET)) == SECRET


def test_a_device_is_not_written_while_a_part_of_it_is(tmp_path: Path, made: list[Device | Partition]) -> None:
    """Nor a part while the whole is: no wipe goes on over what a domain has been given meanwhile."""
    made.append(whole := Device(tmp_path, 1, 16 * MIB))
    for index in (1, 2):
        made.append(Partition(whole, index, index * 4 * MIB, 4 * MIB))
    backings = [PmemBacking(sysfs=whole.sysfs.root, locks=Locks(tmp_path / "locks")) for _ in range(2)]
    specs = [NvdimmSpec(0, str(each.path), 4 * MIB) for each in made]
    for one, other in ((0, 1), (1, 0)):
        with backings[0].open_bytes(specs[one], write=True):
            with pytest.raises(InUseError, match="is being overwritten by"):
                backings[1].open_bytes(specs[other], write=True)
            with pytest.raises(InUseError, match="is being overwritten by"):
                backings[1].provision(specs[other])
            with pytest.raises(InUseError, match="is being overwritten by"):
                backings[1].freeze(specs[other].path)
    with backings[0].open_bytes(specs[1], write=True):
        backings[1].provision(specs[2])
        backings[1].open_bytes(specs[2], write=True).close()
    backings[1].open_bytes(specs[0], write=True).close()


def test_the_driver_is_not_removed_while_only_libvirt_knows_of_a_saved_guest(host: Host) -> None:
    """The ledger was lost."""
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    conf.write_text(conf.read_text().replace("[DEFAULT]", "[DEFAULT]\nallow_any_path = true"))
    host.define("db1", 1)
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.libvirtd.end("nvdimmd")
    for end in ("", "-wal", "-shm"):
        (host.folder / f"state/ledger.sqlite{end}").unlink(missing_ok=True)
    refused = host.nvdimmctl("unregister")
    assert refused.returncode == 4
    assert "domains with NVDIMMs have saved guests: db1" in refused.stderr


@pytest.mark.parametrize("since", ["exchanged", "base", "nothing"])
def test_a_running_guests_devices_are_where_it_has_them(host: Host, device: MakeDevice, since: str) -> None:
    """The ledger is from a backup; since then, the domain was defined with them in other places, and started."""
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    conf.write_text(conf.read_text().replace("[DEFAULT]", "[DEFAULT]\nallow_any_path = true"))
    paths = [device(index, 4).path for index in (3, 4)]
    ledger, backup = host.folder / "state/ledger.sqlite", host.folder / "backup"
    host.check("define", xml(host, "db1", 1, *paths))
    copy_ledger(ledger, backup)
    if since == "exchanged":
        host.check("define", xml(host, "db1", 1))
        host.check("define", xml(host, "db1", 1, *reversed(paths)))
    elif since == "base":
        file = xml(host, "db1", 1, *paths)
        text = file.read_text().replace("</target>", "</target><address type='dimm' slot='0' base='0x1200000000'/>", 1)
        file.write_text(text)
        host.check("define", file)
    host.check("start", "db1")
    has = [(item.spec.slot, item.spec.path, item.base) for item in host.record("db1").allocations]
    copy_ledger(backup, ledger)
    found = [row for row in rows(host, "check", "--repair") if row["Domain"] == "db1"]
    assert {row["Done"] for row in found} == {"yes"}, found
    record = host.record("db1")
    assert [(item.spec.slot, item.spec.path, item.base) for item in record.allocations] == has
    assert record.start
    assert {*record.start.paths} == {path for _, path, _ in has}
    host.check("destroy", "db1")
    assert host.virsh("define", xml(host, "db2", 2, paths[0])).returncode != 0


def test_looks_at_a_device_do_not_disturb_one_another(
    tmp_path: Path, made: list[Device | Partition], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each opens it for itself alone, for a moment."""
    monkeypatch.setattr(device_backing, "LOOK_SECONDS", HANG_SECONDS)
    made.append(device := Device(tmp_path, 1, 4 * MIB))
    backing = PmemBacking(sysfs=device.sysfs.root)
    spec, path = NvdimmSpec(0, str(device.path), 4 * MIB), str(device.path)
    other = os.open(path, os.O_RDONLY | os.O_EXCL)
    ends = threading.Timer(0.2, os.close, (other,))
    assert backing.identify(path)
    ends.start()
    try:
        assert backing.provision(spec) == backing.identify(path)
    finally:
        ends.join()


def test_a_partition_that_was_moved_is_not_taken_for_what_it_was(
    host: Host, device: MakeDevice, made: list[Device | Partition]
) -> None:
    """Not by the same define once more either: its guest would read other bytes, and others would get the first."""
    disk = device(1, 16)
    made.append(first := Partition(disk, 1, 2 * MIB, 8 * MIB))
    host.check("define", xml(host, "db1", 1, first.path))
    disk.write(SECRET, 2 * MIB)
    first.resize(4 * MIB, 6 * MIB)
    made.append(second := Partition(disk, 2, 2 * MIB, 2 * MIB))
    for words in (("define", xml(host, "db1", 1, first.path)), ("start", "db1")):
        refused = host.virsh(*words)
        assert "its offset in the namespace is 4 MiB, it was 2 MiB" in refused.stderr
    assert "belongs to domain db1" in host.virsh("define", xml(host, "db2", 2, second.path, mib=2)).stderr
    (found,) = rows(host, "check")
    assert "from byte 2097152 of /dev/pmem1 on" in found["Remedy"]
    first.resize(2 * MIB, 8 * MIB)
    host.check("start", "db1")


@pytest.mark.parametrize("host", [pytest.param("", id="no pool")], indirect=True)
def test_only_what_is_in_a_pool_is_wiped_as_nobodys(host: Host, device: MakeDevice) -> None:
    """Nova may say ``--unclaimed``, and domains may have backings outside of the pools."""
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    conf.write_text(conf.read_text().replace("[DEFAULT]", "[DEFAULT]\nallow_any_path = true"))
    disk = device(9, 4)
    disk.write(SECRET)
    refused = host.nvdimmctl("wipe", "--yes", "--unclaimed", str(disk.path))
    assert "is in no pool" in refused.stderr
    assert disk.read(len(SECRET)) == SECRET


def test_the_state_folder_is_not_changed_under_running_guests(host: Host) -> None:
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    conf.write_text(conf.read_text().replace("[DEFAULT]", "[DEFAULT]\nallow_any_path = true"))
    host.define("db1", 1)
    host.check("start", "db1")
    before = conf.read_text()
    conf.write_text(before.replace(f"{host.folder}/state", f"{host.folder}/other"))
    refused = host.nvdimmctl("register")
    assert refused.returncode == 4
    assert f"{host.folder}/state has to stay the state folder: domains run with NVDIMMs: db1" in refused.stderr
    conf.write_text(before)


OVERLAPPING = (
    WIPED.replace(", {folder}/pmem1p1, {folder}/pmem1p2", "")
    + """
[pool:part]
kind = pmem
paths = {folder}/pmem1p1
"""
)


@pytest.mark.parametrize("host", [pytest.param(OVERLAPPING, id="overlapping")], indirect=True)
def test_a_device_and_a_partition_of_it_in_two_pools_are_a_problem(
    host: Host, device: MakeDevice, made: list[Device | Partition]
) -> None:
    disk = device(1, 16)
    made.append(part := Partition(disk, 1, 2 * MIB, 8 * MIB))
    told = [row["Message"] for row in rows(host, "doctor") if "which is in pool" in row["Message"]]
    assert len(told) == 2
    assert f"{disk.path} has bytes of {part.path}, which is in pool part" in told[1] + told[0]


@pytest.mark.parametrize("host", [pytest.param(WIPED + KEPT, id="both")], indirect=True)
@pytest.mark.parametrize("way", ["repaired", "repaired and defined", "defined"])
def test_a_device_keeps_the_rule_of_its_pool_when_a_boot_gives_it_a_name_of_another(
    host: Host, device: MakeDevice, way: str
) -> None:
    wiped, kept = device(1, 4), device(3, 4)
    host.check("define", xml(host, "db1", 1, wiped.path))
    wiped.write(SECRET)
    if way != "defined":
        host.check("define", xml(host, "db2", 2, kept.path))
    kept.write(b"precious")
    host.libvirtd.stop()
    rename({wiped: kept.path, kept: wiped.path})
    host.libvirtd.start()
    if way != "defined":
        rows(host, "check", "--repair")
    if way != "repaired":
        host.check("define", xml(host, "db1", 1, wiped.path))
    names = ["db1"] if way == "defined" else ["db1", "db2"]
    for name in names:
        host.check("undefine", name)
    for name in names:
        assert host.nvdimmctl("release", "--yes", name).returncode == 0
    assert wiped.read(len(SECRET)) == bytes(len(SECRET))
    assert kept.read(8) == b"precious"


@pytest.mark.parametrize("host", [pytest.param(KEPT, id="kept")], indirect=True)
@pytest.mark.parametrize("other_name", ["db1", "db2"])
def test_a_name_that_a_boot_has_exchanged_is_not_wiped(host: Host, device: MakeDevice, other_name: str) -> None:
    """By the ledger, the path is that of the other device."""
    one, other = device(3, 4), device(4, 4)
    if other_name == "db1":
        host.check("define", xml(host, "db1", 1, one.path, other.path))
    else:
        host.check("define", xml(host, "db1", 1, one.path))
        host.check("define", xml(host, "db2", 2, other.path))
    one.write(SECRET)
    host.libvirtd.stop()
    rename({one: other.path, other: one.path})
    host.libvirtd.start()
    done = host.nvdimmctl("wipe", "--yes", str(one.path))
    assert done.returncode == 1
    assert f"of domain {other_name} by the ledger, and something else is there now" in done.stderr
    assert f"namespace4.0, /dev/{other.path.name}" in done.stderr
    assert one.read(len(SECRET)) == SECRET


def test_a_whole_device_is_not_wiped_by_its_name_while_a_domain_has_a_part_of_it(
    host: Host, device: MakeDevice, made: list[Device | Partition]
) -> None:
    disk = device(1, 16)
    made.append(part := Partition(disk, 1, 2 * MIB, 8 * MIB))
    host.check("define", xml(host, "db1", 1, part.path))
    disk.write(SECRET, 2 * MIB)
    done = host.nvdimmctl("wipe", "--yes", str(disk.path))
    assert done.returncode == 4
    assert f"{disk.path} has bytes of {part.path}, the NVDIMM in slot 0 of domain db1" in done.stderr
    assert content(part, 2 * MIB) == SECRET
    assert host.nvdimmctl("wipe", "--yes", str(part.path)).returncode == 0
    assert content(part, 2 * MIB) == bytes(len(SECRET))


@pytest.mark.parametrize("verb", ["release", "wipe"])
def test_a_device_and_a_part_of_it_are_wiped_together(
    host: Host, device: MakeDevice, made: list[Device | Partition], verb: str
) -> None:
    disk = device(1, 16)
    made.append(part := Partition(disk, 1, 2 * MIB, 8 * MIB))
    host.check("define", xml(host, "db1", 1, disk.path))
    host.check("define", xml(host, "db1", 1, part.path))
    for offset in (0, 2 * MIB, 12 * MIB):
        disk.write(SECRET, offset)
    host.check("undefine", "db1")
    done = host.nvdimmctl(verb, "--yes", "db1")
    assert done.returncode == 0, done.stderr
    assert not disk.read(16 * MIB).strip(b"\0")


@pytest.mark.parametrize("host", [pytest.param(KEPT, id="kept")], indirect=True)
@pytest.mark.parametrize("way", ["edited", "more RAM"])
def test_two_names_of_one_domain_that_a_boot_has_exchanged_exchange_no_slots(
    host: Host, device: MakeDevice, way: str
) -> None:
    one, other = device(3, 4), device(4, 4)
    host.check("define", xml(host, "db1", 1, one.path, other.path))
    had = [(each.spec.slot, each.identity) for each in host.record("db1").allocations]
    host.libvirtd.stop()
    rename({one: other.path, other: one.path})
    host.libvirtd.start()
    text = host.check("dumpxml", "--inactive", "db1")
    (file := host.folder / "edited.xml").write_text(text.replace("<vcpu placement='static'>1<", "<vcpu>2<"))
    if way == "edited":
        refused = host.virsh("define", file)
    else:
        for verb in ("setmaxmem", "setmem"):
            host.check(verb, "--config", "db1", "700M")
        refused = host.virsh("start", "db1")
    assert f"define the domain with {one.path} in slot 0, and the others" in refused.stderr
    names = {str(one.path): str(other.path), str(other.path): str(one.path)}
    file.write_text(re.sub("(?<=<path>).*(?=</path>)", lambda found: names[found[0]], text))
    host.check("define", file)
    host.check("start", "db1")
    assert [(each.spec.slot, each.identity) for each in host.record("db1").allocations] == had


@pytest.mark.parametrize("host", [pytest.param(KEPT.replace(", {folder}/pmem5", ""), id="kept")], indirect=True)
@pytest.mark.parametrize(("right", "marks"), [("the ledger", "kept"), ("libvirt", "kept"), ("libvirt", "lost")])
def test_names_that_a_ledger_from_a_backup_has_otherwise_are_not_followed(
    host: Host, device: MakeDevice, right: str, marks: str
) -> None:
    """The domains may have been given up and defined anew since a boot exchanged the names.

    The operator decides, unless marks say so.
    """
    one, other = device(3, 4), device(4, 4)
    files = {"db1": xml(host, "db1", 1, one.path), "db2": xml(host, "db2", 2, other.path)}
    for file in files.values():
        host.check("define", file)
    had = {name: host.record(name).allocations[0].identity for name in files}
    ledger = host.folder / "state/ledger.sqlite"
    copy_ledger(ledger, host.folder / "backup")
    host.libvirtd.stop()
    rename({one: other.path, other: one.path})
    host.libvirtd.start()
    if right == "libvirt":
        for name in files:
            host.check("undefine", name)
        for name in files:
            assert host.nvdimmctl("release", "--yes", name).returncode == 0
        for file in files.values():
            host.check("define", file)  # with the names that they had
        had = {name: host.record(name).allocations[0].identity for name in files}
    for end in ("-wal", "-shm"):
        Path(f"{ledger}{end}").unlink(missing_ok=True)
    os.rename(host.folder / "backup", ledger)
    if marks == "lost":
        forget_devices(host.folder / "state")
    for _ in range(2):  # also once the ledger was taken over
        told = rows(host, "check", "--repair")
    if (right, marks) == ("libvirt", "kept"):
        assert told == []
        assert {name: host.record(name).allocations[0].identity for name in files} == had
        return
    assert [row["Done"] for row in told] == [""] * 2, told
    assert all("if libvirt's definitions are right: nvdimmctl release" in row["Remedy"] for row in told)
    if right == "libvirt":
        for name in files:
            assert host.nvdimmctl("release", "--yes", "--slot", "0", name).returncode == 0
        rows(host, "check", "--repair")
    else:
        rows(host, "check", "--repair", str(one.path))
        host.check("define", xml(host, "db1", 1, one.path))
        host.check("define", xml(host, "db2", 2, other.path))
    assert rows(host, "check") == []
    assert {name: host.record(name).allocations[0].identity for name in files} == had


@pytest.mark.parametrize("host", [pytest.param(KEPT, id="kept")], indirect=True)
def test_the_remedy_of_an_exchanged_name_is_true_while_the_guest_is_saved(host: Host, device: MakeDevice) -> None:
    one, other = device(3, 4), device(4, 4)
    paths = one.path, other.path
    host.check("define", xml(host, "db1", 1, one.path))
    host.check("define", xml(host, "db2", 2, other.path))
    host.check("start", "db1")
    host.check("managedsave", "db1")
    for new in (paths[::-1], paths):  # the second boot gives the names back
        host.libvirtd.stop()
        rename({one: new[0], other: new[1]})
        host.libvirtd.start()
        told = [row["Remedy"] for row in rows(host, "check", "--repair") if row["Domain"] == "db1"]
        if new != paths:
            assert all("leave it, as its guest is saved" in each for each in told if "define" in each), told
            assert "after a boot that gives" in host.virsh("define", xml(host, "db1", 1, one.path)).stderr
    host.check("start", "db1")


def test_a_pool_has_the_bytes_of_a_device_and_its_partitions_once(
    host: Host, device: MakeDevice, made: list[Device | Partition]
) -> None:
    disk = device(1, 16)
    made.append(first := Partition(disk, 1, 2 * MIB, 8 * MIB))
    made.append(Partition(disk, 2, 10 * MIB, 4 * MIB))
    (pool,) = rows(host, "pool", "list")
    assert [int(pool[name]) for name in ("Capacity", "Free", "Largest free")] == [16 * MIB] * 3
    assert f"{first.path} has bytes of {disk.path}, which is in the pool, too" in pool["Health"]
    host.check("define", xml(host, "db1", 1, first.path))
    (pool,) = rows(host, "pool", "list")
    assert [int(pool[name]) for name in ("Capacity", "Free", "Largest free")] == [16 * MIB, 4 * MIB, 4 * MIB]


LINKED = """
[pool:one]
kind = pmem
paths = {folder}/by-id/pmem-one
"""


@pytest.mark.parametrize("host", [pytest.param(LINKED, id="linked")], indirect=True)
def test_a_pool_has_the_device_that_its_link_leads_to_whatever_name_a_boot_gives_it(
    host: Host, device: MakeDevice
) -> None:
    one, other = device(1, 4), device(2, 4)
    (link := host.folder / "by-id/pmem-one").parent.mkdir()
    link.symlink_to(one.path)
    host.check("define", xml(host, "db1", 1, one.path))
    host.libvirtd.stop()
    rename({one: other.path, other: one.path})
    link.unlink()
    link.symlink_to(one.path)  # udev
    host.libvirtd.start()
    host.check("define", xml(host, "db1", 1, one.path))
    host.check("start", "db1")
    assert "in none of the host's pools" in host.virsh("define", xml(host, "db2", 2, other.path)).stderr
    (pool,) = rows(host, "pool", "list")
    assert (int(pool["Capacity"]), int(pool["Free"]), pool["Health"]) == (4 * MIB, 0, "ok")


@pytest.mark.parametrize("host", [KEPT + "\n[pool:main]\nkind = bench\npaths = {folder}/pmem\n"], indirect=True)
def test_a_link_that_another_domains_owner_turns_keeps_no_guest_from_its_start(host: Host, device: MakeDevice) -> None:
    """Its definition names a path that nobody can follow then, and db1's device in its description."""
    disk = device(3, 16)
    host.check("define", xml(host, "db1", 1, disk.path))
    folder = host.folder / "pmem/own"
    run = host.libvirtd.run
    assert run("mkdir", "-p", folder / "d").returncode == 0
    other = host.xml("other", 9)
    text = other.read_text().replace(f"{host.folder}/pmem/other.img", str(folder / "d/other.img"))
    other.write_text(text.replace("<memory unit", f"<description>{disk.path}</description><memory unit", 1))
    host.check("define", other)
    assert run("mv", folder / "d", folder / "e").returncode == 0
    assert run("ln", "-s", "d", folder / "d").returncode == 0
    host.check("start", "db1")
    found = host.nvdimmctl("check").stdout
    assert "libxl/other.xml" in found, found
    assert "leads through more than 40 symbolic links" in found, found
