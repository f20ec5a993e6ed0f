# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.backing.inventory import Mount
from nvdimm_driver.doctor import pmem
from nvdimm_driver.doctor.dax import has_dax
from nvdimm_driver.doctor.finding import Finding, Result
from nvdimm_driver.model import GIB, KIB, MIB, Namespace, Pool, Space
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.pools.usage import PoolUsage
from tests.unit.doubles import NAMESPACE, MemoryBacking
from tests.unit.fake_sysfs import FakeSysfs

MOUNT = Mount(1, "/mnt/pmem0", "ext4", ("rw", "dax=always", "stripe=512"))


class FsdaxInMemory(MemoryBacking):
    """A backing in memory for pools of kind fsdax."""

    name = "fsdax"


def pool(kind: str = "fsdax", path: str = "/mnt/pmem0") -> Pool:
    return Pool("main", kind, (path,), None, 2 * MIB, 0, False)


def usage(alignment: int = 2 * MIB, problems: tuple[str, ...] = ()) -> PoolUsage:
    return PoolUsage(pool(), Space(GIB, GIB, GIB, alignment, (NAMESPACE,)), (), problems)


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {each.check: each for each in findings}


def test_a_host_without_pmem(tmp_path: Path) -> None:
    (found,) = pmem.check_namespaces(tmp_path)
    assert (found.result, found.check) == (Result.FAIL, "namespaces")
    assert "pool create" in found.hint


def test_a_healthy_host(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path)
    sysfs.fsdax(os.makedev(259, 0), size=GIB)
    (sysfs.region / "persistence_domain").write_text("memory_controller\n")
    found = list(pmem.check_namespaces(tmp_path))
    assert [(each.check, each.result) for each in found] == [
        ("namespaces", Result.PASS),
        ("namespace0.0", Result.PASS),
        ("namespace0.0, power loss", Result.PASS),
    ]
    assert found[0].message == "1 active, 1 GiB in all"
    assert found[1].message == "pmem0, fsdax, 1 GiB"


def test_bad_blocks_and_what_cannot_be_used(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path)
    disk = sysfs.fsdax(os.makedev(259, 0), size=GIB)
    (disk / "badblocks").write_text("8 1\n")
    found = by_check(list(pmem.check_namespaces(tmp_path)))
    assert found["namespace0.0"].result == Result.WARN
    assert "512 B of bad blocks" in found["namespace0.0"].message
    assert found["namespace0.0, power loss"].result == Result.NOTE
    assert pmem.check_namespace(replace(NAMESPACE, mode="sector"), ()).result == Result.NOTE


def test_a_sysfs_that_makes_no_sense(tmp_path: Path) -> None:
    FakeSysfs(tmp_path).fsdax(os.makedev(259, 0))
    (next(tmp_path.rglob("pfn0.1")) / "size").write_text("much\n")
    (found,) = pmem.check_namespaces(tmp_path)
    assert found.result == Result.FAIL
    assert "'much'" in found.message


def test_without_pools() -> None:
    (found,) = pmem.check_pools(Pools([]), [MemoryBacking()], any_path=False)
    assert found.result == Result.FAIL
    (found,) = pmem.check_pools(Pools([]), [MemoryBacking()], any_path=True)
    assert found.result == Result.NOTE


@pytest.mark.parametrize(("dax", "result"), [(True, Result.PASS), (False, Result.FAIL)])
def test_a_pool_whose_file_system_is_mounted_with_dax(tmp_path: Path, dax: bool, result: Result) -> None:
    device = os.stat(tmp_path).st_dev
    mountinfo = tmp_path / "mountinfo"
    number = f"{os.major(device)}:{os.minor(device)}"
    mountinfo.write_text(f"1 0 {number} / /mnt/pmem0 rw - ext4 /dev/pmem0 rw,dax=always,stripe=512\n")
    pools = Pools([pool(path=str(tmp_path))])
    found = by_check(
        list(pmem.check_pools(pools, [FsdaxInMemory()], any_path=False, mountinfo=mountinfo, dax=lambda _: dax))
    )
    found.pop("pool main, mount options", None)  # of the machine that runs the test
    assert {name: each.result for name, each in found.items()} == {
        "pool main": Result.PASS,
        "pool main, alignment": Result.PASS,
        "pool main, DAX": result,
        "pool main, file system": Result.PASS,
    }


def test_the_options_that_a_pool_was_mounted_without() -> None:
    every = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
    assert list(pmem.check_mount_options(pool(), "/mnt/pmem0", every)) == []
    (found,) = pmem.check_mount_options(pool(), "/mnt/pmem0", os.ST_NODEV)
    assert (found.result, found.check) == (Result.WARN, "pool main, mount options")
    assert "mounted without nosuid,noexec:" in found.message
    assert "mount -o remount,nosuid,noexec /mnt/pmem0" in found.hint


def test_a_pool_whose_times_a_loss_of_power_loses() -> None:
    assert list(pmem.check_times(pool(), "/mnt/pmem0", MOUNT)) == []
    lazy = replace(MOUNT, options=(*MOUNT.options, "lazytime"))
    (found,) = pmem.check_times(pool(), "/mnt/pmem0/db", lazy)
    assert (found.result, found.check) == (Result.WARN, "pool main, times")
    assert "/mnt/pmem0/db is mounted with lazytime" in found.message
    assert "mount -o remount,nolazytime /mnt/pmem0" in found.hint


def test_pools_that_cannot_be_looked_at() -> None:
    broken = FsdaxInMemory()
    broken.fail_space = "/mnt/pmem0 is not mounted"
    (found,) = pmem.check_pools(Pools([pool()]), [broken], any_path=False)
    assert (found.result, found.message) == (Result.FAIL, "/mnt/pmem0 is not mounted")
    (found,) = pmem.check_pools(Pools([pool("tape")]), [broken], any_path=False)
    assert "there is no backing 'tape'" in found.message


def test_a_folder_that_takes_no_file() -> None:
    found = list(
        pmem.check_pools(Pools([pool(path="/proc")]), [FsdaxInMemory()], any_path=False, mountinfo=Path("/dev/null"))
    )
    assert found[-1].check == "pool main, DAX"
    assert found[-1].result == Result.FAIL


@pytest.mark.parametrize(
    ("kind", "path", "others", "told"),
    [
        ("pmem", "/dev/pmem1", 1, True),
        ("pmem", "/dev/pmem1p2", 1, True),
        ("devdax", "/dev/dax1.0", 1, True),
        ("pmem", "/dev/pmem1", 0, False),
        ("pmem", "/dev/disk/by-id/pmem-7b2c", 1, False),
    ],
)
def test_names_of_devices_that_a_boot_can_exchange(kind: str, path: str, others: int, told: bool) -> None:
    class Devices(MemoryBacking):
        name = kind

        def areas(self) -> Sequence[Namespace]:
            return [NAMESPACE] * (1 + others)

    found = list(pmem.check_names(pool(kind, path), [Devices()]))
    assert [(each.check, each.result) for each in found] == [("pool main, names", Result.WARN)] * told
    assert all(f"after a boot, {path} can be another namespace" in each.message for each in found)


def test_a_sick_pool() -> None:
    assert pmem.check_usage(usage()).message == "fsdax, 1 GiB"
    found = pmem.check_usage(usage(problems=("region0: read-only",)))
    assert found.result == Result.WARN
    assert "region0: read-only" in found.message


@pytest.mark.parametrize(("alignment", "result"), [(4 * KIB, Result.WARN), (2 * MIB, Result.PASS)])
def test_alignment(alignment: int, result: Result) -> None:
    assert pmem.check_alignment(usage(alignment)).result == result


@pytest.mark.parametrize(
    ("kind", "option", "stripe"),
    [
        ("ext4", "stripe=512", 2 * MIB),
        ("ext4", "stripe=16", 64 * KIB),
        ("ext4", "noatime", 0),
        ("xfs", "sunit=4096", 2 * MIB),
        ("xfs", "swidth=4096", 0),
    ],
)
def test_the_pieces_that_a_file_system_allocates_in(kind: str, option: str, stripe: int) -> None:
    mount = Mount(1, "/mnt/pmem0", kind, ("rw", option))
    assert pmem.stripe_of(mount) == stripe
    assert (pmem.check_stripe(pool(), mount).result == Result.PASS) == (stripe == 2 * MIB)


def test_a_plain_file_system_has_no_dax(tmp_path: Path) -> None:
    assert has_dax(str(tmp_path)) is False
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        has_dax(str(tmp_path / "none"))
