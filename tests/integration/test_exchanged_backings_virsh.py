# SPDX-License-Identifier: Apache-2.0
"""Another file or device is at the path of an NVDIMM: nothing takes it for what the domain had."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.bench_host import Host
from tests.integration.loop_pmem import run
from tests.integration.test_guide_virsh import define
from tests.integration.test_lost_state import rows
from tests.integration.test_virsh import image
from tests.unit.fake_sysfs import FakeSysfs

SIZE = 4 << 20


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    paths = ", ".join(f"{folder}/pmem{place}" for place in (1, 2, 3))
    made = Host(folder, f"[pool:raw]\nkind = pmem\npaths = {paths}\nwipe_on_release = true\n")
    yield made
    made.libvirtd.close()


@pytest.fixture(scope="module")
def numbers(host: Host) -> Iterator[list[int]]:
    """Yield the device numbers of two raw namespaces."""
    loops = []
    sysfs = FakeSysfs(host.folder / "sys")
    for number, spa in ((1, 0x1_5000_0000), (2, 0x1_5200_0000)):
        bytes_of = host.folder / f"raw{number}"
        bytes_of.write_bytes(f"bytes of {number}".encode().ljust(SIZE, b"\0"))
        loops.append(run("losetup", "--find", "--show", bytes_of).strip())
        namespace = sysfs.namespace(f"namespace{number}.0", mode="raw", spa=spa, size=SIZE)
        sysfs.disk(f"pmem{number}", namespace, os.stat(loops[-1]).st_rdev, SIZE)
    yield [os.stat(loop).st_rdev for loop in loops]
    for loop in loops:
        run("losetup", "--detach", loop)


@pytest.fixture
def devices(host: Host, numbers: list[int]) -> Iterator[list[Path]]:
    """Yield the paths of the namespaces."""
    paths = [host.folder / f"pmem{place}" for place in (1, 2)]
    for path, number in zip(paths, numbers, strict=True):
        os.mknod(path, stat.S_IFBLK | 0o600, number)
    yield paths
    for name in ("db3", "db4"):
        host.virsh("undefine", name)
        host.nvdimmctl("release", "--yes", name)
    for path in host.folder.glob("pmem[0-9]*"):
        path.unlink()


def domain_with(host: Host, number: int, device: Path) -> Path:
    """Return the file with the XML of a domain that has a device."""
    xml = host.xml(f"db{number}", number)
    xml.write_text(re.sub("<path>.*</path>", f"<path>{device}</path>", xml.read_text()))
    return xml


@contextmanager
def sysfs_without(host: Host, namespace: str) -> Iterator[None]:
    """Take a namespace away, as with its module."""
    root = host.folder / "sys"
    links = [each for each in root.rglob("*") if each.is_symlink() and namespace in str(each.resolve())]
    targets = {each: os.readlink(each) for each in links}
    for each in links:
        each.unlink()
    yield
    for each, target in targets.items():
        each.symlink_to(target)


def exchange(one: Path, other: Path) -> None:
    """Exchange the names of two devices, as a boot can."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_define_takes_no_other_device(host: Host, devices: list[Path]) -> None:
    own, strange = devices
    xml = domain_with(host, 3, own)
    host.check("define", xml)
    before = host.record("db3").allocations
    exchange(own, strange)
    (found,) = [row for row in rows(host, "check") if row["Domain"] == "db3"]
    assert f"its bytes are on namespace1.0, /dev/pmem{own.name[-1]}" in found["Remedy"]
    xml.write_text(xml.read_text().replace("<memory unit='MiB'>512<", "<memory unit='MiB'>600<"))
    refused = host.virsh("define", xml)
    host.check("setmaxmem", "--config", "db3", "700M")
    host.check("setmem", "--config", "db3", "700M")
    for each in (refused, host.virsh("start", "db3")):
        assert each.returncode != 0
        assert "is not the backing that was provisioned: its namespace is" in each.stderr
    assert host.record("db3").allocations == before
    thief = host.virsh("define", domain_with(host, 4, strange))
    assert thief.returncode != 0
    assert "belongs to domain db3" in thief.stderr
    host.check("define", domain_with(host, 3, strange))
    host.check("start", "db3")
    host.check("destroy", "db3")


def test_a_device_with_another_name_is_not_given_up_as_lost(host: Host, devices: list[Path]) -> None:
    own, _ = devices
    host.check("define", domain_with(host, 3, own))
    renamed = own.rename(host.folder / "pmem3")
    lost = host.nvdimmctl("release", "--yes", "--lost", "--slot", "0", "db3")
    assert lost.returncode != 0
    assert f"{own}: it is not lost, but on namespace1.0" in lost.stderr
    thief = host.virsh("define", domain_with(host, 4, renamed))
    assert thief.returncode != 0
    renamed.rename(own)


def test_a_lost_module_is_given_up_though_another_has_its_name(host: Host, devices: list[Path]) -> None:
    own, other = devices
    xml = domain_with(host, 3, own)
    host.check("define", xml)
    with sysfs_without(host, "namespace1.0"):
        other.rename(own)
        (found,) = [row for row in rows(host, "check", "--repair") if row["Domain"] == "db3"]
        assert found["Remedy"].endswith(f"nvdimmctl release --lost --slot 0 {host.record('db3').uuid}")
        assert host.nvdimmctl("release", "--yes", "--slot", "0", "db3").returncode != 0
        released = host.nvdimmctl("release", "--yes", "--lost", "--slot", "0", "db3")
        assert released.returncode == 0, released.stderr
        assert "has its place, which is kept as it is" in released.stdout
        assert own.read_bytes()[:10] == b"bytes of 2"
        host.check("define", xml)


def test_a_replaced_file_keeps_a_domain_with_more_ram_from_starting(host: Host) -> None:
    define(host, "first", "first.img")
    path = image(host, "first")
    host.check("setmaxmem", "--config", "first", "700M")
    host.check("setmem", "--config", "first", "700M")
    before = host.record("first").allocations
    replaced = f"mv {path} {path}.aside; dd if=/dev/urandom of={path} bs=1M count=16; sync -f {path}"
    assert host.libvirtd.run("sh", "-ec", replaced).returncode == 0
    started = host.virsh("start", "first")
    assert started.returncode != 0
    assert "is not the backing that was provisioned" in started.stderr
    assert host.record("first").allocations == before
