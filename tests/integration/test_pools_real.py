# SPDX-License-Identifier: Apache-2.0
"""Pools whose folders have other names too: symbolic links, bind mounts, other nodes of a device."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvdimm_driver import conf
from nvdimm_driver.backing.pmem import PmemBacking
from nvdimm_driver.errors import BackingError, ConfigError, InUseError, NvdimmError, RefusedError
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, DomainSpec, NvdimmSpec, Pool
from nvdimm_driver.pools.rules import Pools
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, quiet
from tests.unit.doubles import OTHER_UUID, UUID, RecordingMapper, make_driver
from tests.unit.fake_sysfs import FakeSysfs


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param], wipe=True)
    empty(file_systems[request.param])


@contextmanager
def bound(source: str | Path, folder: Path) -> Iterator[Path]:
    """Mount a folder at another one, too."""
    folder.mkdir(parents=True, exist_ok=True)
    run("mount", "--bind", source, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def pool(name: str, *paths: str | Path, quota: int | None = None, wipe: bool = False) -> Pool:
    return Pool(name, "fsdax", tuple(map(str, paths)), quota, SUPERPAGE, 128 * KIB, wipe)


@pytest.mark.parametrize("sub", ["", "/sub"])
def test_what_has_to_be_wiped_is_wiped_under_the_name_of_a_bind_mount(host: Host, tmp_path: Path, sub: str) -> None:
    os.makedirs(f"{host.fs.root}{sub}", exist_ok=True)
    host.pools = Pools([*host.pools], any_path=True)
    host.driver = host.another()
    with bound(f"{host.fs.root}{sub}", tmp_path / "own") as own:
        host.driver.define(DomainSpec("x", UUID, 512 * MIB, None, (NvdimmSpec(0, f"{own}/a.img", SIZE),)))
        with open(f"{own}/a.img", "r+b") as file:
            file.write(DATA)
        host.driver.release_claims(host.record(), quiet, delete=False)
        host.driver.define(host.domain(f"{sub}/a.img".lstrip("/"), OTHER_UUID))
        assert host.read(f"{sub}/a.img".lstrip("/")) == bytes(SIZE), "another domain reads the bytes of the first"


@pytest.mark.parametrize("way", ["release", "redefined"])
def test_what_has_to_be_wiped_stays_its_domains_while_the_bind_mount_of_its_pool_is_not_there(
    host: Host, tmp_path: Path, way: str
) -> None:
    os.makedirs(host.path("gold"))
    host.pools = Pools([pool("gold", tmp_path / "gold", wipe=True)])
    host.driver = host.another()
    with bound(host.path("gold"), tmp_path / "gold"):
        host.define("gold/a.img")
    host.driver.define(host.domain("gold/a.img", ram=600 * MIB))
    give_up(host, way, RefusedError)
    with bound(host.path("gold"), tmp_path / "gold"):
        other = DomainSpec("y", OTHER_UUID, 512 * MIB, None, (NvdimmSpec(0, f"{tmp_path}/gold/a.img", SIZE),))
        with pytest.raises(InUseError, match="domain x"):
            host.driver.define(other)
        host.driver.release_claims(host.record(), quiet, delete=False)
        host.driver.define(other)
        assert host.read("gold/a.img") == bytes(SIZE)


def give_up(host: Host, way: str, refused: type[NvdimmError]) -> None:
    """Let a domain give up what it has; a release is refused."""
    if way == "redefined":
        host.driver.drop_claims(UUID)
        return
    with pytest.raises(refused):
        host.driver.release_claims(host.record(), quiet, delete=False)


@pytest.mark.parametrize("order", [1, -1])
def test_what_has_to_be_wiped_stays_its_domains_while_another_pools_file_system_is_mounted_over_it(
    tmp_path: Path, file_systems: dict[str, FileSystem], order: int
) -> None:
    host = Host(tmp_path, file_systems["ext4"])
    other = file_systems["xfs"]
    try:
        host.pools = Pools([pool("gold", host.fs.root, wipe=True), pool("cheap", other.root)][::order])
        host.driver = host.another()
        host.define("a.img")
        with bound(other.root, host.fs.root):
            give_up(host, "release", BackingError)
        assert host.mark("a.img")
        host.driver.release_claims(host.record(), quiet, delete=False)
        assert host.read("a.img") == bytes(SIZE)
    finally:
        empty(host.fs)


@pytest.mark.parametrize("way", ["release", "redefined"])
def test_what_has_to_be_wiped_stays_its_domains_while_the_link_to_the_device_of_its_pool_is_not_there(
    tmp_path: Path, loop_device: str, way: str
) -> None:
    """A namespace that is disabled loses its node, and udev's link to it, by which the pool has it."""
    number = os.stat(loop_device).st_rdev
    sysfs = FakeSysfs(tmp_path / "sys")
    sysfs.raw(number, spa=0x1_4000_0000, size=os.path.getsize(f"{tmp_path}/image"))
    node, link = tmp_path / "pmem1", tmp_path / "by-uuid"
    os.mknod(node, stat.S_IFBLK | 0o600, number)
    link.symlink_to(node)
    pools = Pools([Pool("raw", "pmem", (str(link),), None, SUPERPAGE, 128 * KIB, True)])
    (tmp_path / "state").mkdir()
    backing = PmemBacking(sysfs=sysfs.root)
    driver = make_driver(tmp_path / "state", backing, RecordingMapper({}), pools=pools)  # type: ignore[arg-type]
    nvdimms = (NvdimmSpec(0, str(link), SIZE),)
    driver.define(DomainSpec("x", UUID, 512 * MIB, None, nvdimms))
    Path(loop_device).write_bytes(DATA)
    record = driver.ledger.find_domain(UUID)
    assert record
    link.unlink()
    node.unlink()
    if way == "redefined":
        driver.drop_claims(UUID)
    else:
        with pytest.raises(NvdimmError):
            driver.release_claims(record, quiet, delete=False)
    os.mknod(node, stat.S_IFBLK | 0o600, number)
    link.symlink_to(node)
    with pytest.raises(InUseError, match="domain x"):
        driver.define(DomainSpec("y", OTHER_UUID, 512 * MIB, None, nvdimms))


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """Yield a loop device of 64 MiB, in the file ``image``."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 64 * MIB)
    done = subprocess.run(["losetup", "--show", "-f", str(image)], capture_output=True, text=True, check=True)
    yield done.stdout.strip()
    run("losetup", "-d", done.stdout.strip())


def test_what_was_provisioned_before_its_pool_was_to_be_wiped_has_to_be_wiped(host: Host, tmp_path: Path) -> None:
    """The option, or the version that notes it, is new: register and nvdimmd note it."""
    os.makedirs(host.path("gold"))
    folder = tmp_path / "gold"
    with bound(host.path("gold"), folder):
        host.pools = Pools([pool("gold", folder)])
        host.driver = host.another()
        host.define("gold/a.img")
        host.pools = Pools([pool("gold", folder, wipe=True)])
        host.driver = host.another()
        host.driver.note_pools()
    give_up(host, "release", RefusedError)
    host.pools = Pools([pool("gold", host.path("gold"))])
    host.driver = host.another()
    host.driver.release_claims(host.record(), quiet, delete=False)
    assert host.read("gold/a.img")[: len(DATA)] == DATA, "its pool does not want it any more"


def test_a_quota_counts_what_is_called_by_a_bind_mount(host: Host, tmp_path: Path) -> None:
    host.pools = Pools([pool("main", host.fs.root, quota=6 * MIB)], any_path=True)
    host.driver = host.another()
    with bound(host.fs.root, tmp_path / "own") as own:
        host.driver.define(DomainSpec("x", UUID, 512 * MIB, None, (NvdimmSpec(0, f"{own}/a.img", SIZE),)))
        with pytest.raises(RefusedError, match="quota of 6 MiB"):
            host.driver.define(host.domain("b.img", OTHER_UUID))


def test_a_folder_of_one_pool_mounted_below_another_is_in_the_first(host: Host, tmp_path: Path) -> None:
    os.makedirs(host.path("secure"))
    (tmp_path / "main").mkdir()
    secure, main = pool("secure", host.path("secure"), wipe=True), pool("main", tmp_path / "main")
    with bound(host.path("secure"), tmp_path / "main/x"):
        pools = Pools([main, secure])
        assert pools.of(f"{tmp_path}/main/x/a.img") == secure
        assert pools.of(f"{tmp_path}/main/a.img") == main


def test_a_folder_that_has_become_a_link_leads_to_no_device_of_another_pool(host: Host, tmp_path: Path) -> None:
    """Else what its owner makes it lead to decides whether his file is wiped."""
    (tmp_path / "devices").mkdir()
    os.mknod(tmp_path / "devices/pmem1", stat.S_IFBLK | 0o600, os.makedev(7, 250))
    os.mkdir(host.path("folder"))
    main, raw = pool("main", host.fs.root, wipe=True), pool("raw", tmp_path / "devices/pmem1")
    assert Pools([main, raw]).of(host.path("folder/pmem1")) == main
    os.rmdir(host.path("folder"))
    os.symlink(tmp_path / "devices", host.path("folder"))
    assert Pools([main, raw]).of(host.path("folder/pmem1")) == main
    os.unlink(host.path("folder"))


def test_a_mount_that_another_one_covers_is_not_looked_at(host: Host, tmp_path: Path) -> None:
    for folder in ("main", "secure/b"):
        os.makedirs(host.path(folder))
    secure, main = pool("secure", host.path("secure"), wipe=True), pool("main", host.path("main"))
    with bound(host.path("main"), tmp_path / "own/b"):
        assert Pools([main, secure]).of(f"{tmp_path}/own/b/a.img") == main
        with bound(host.path("secure"), tmp_path / "own"):
            assert Pools([main, secure]).of(f"{tmp_path}/own/b/a.img") == secure
        assert Pools([main, secure]).of(f"{tmp_path}/own/b/a.img") == main


def test_another_file_system_below_a_folder_of_a_pool_is_in_the_pool(host: Host) -> None:
    parent = pool("main", host.fs.root.parent)
    assert Pools([parent]).of(host.path("a.img")) == parent


def test_a_device_is_in_its_pool_by_any_node(tmp_path: Path) -> None:
    number = os.makedev(7, 250)  # a loop device; it need not exist
    for name in ("one", "other"):
        os.mknod(tmp_path / name, stat.S_IFBLK | 0o600, number)
    os.mknod(tmp_path / "third", stat.S_IFBLK | 0o600, os.makedev(7, 251))
    pools = Pools([pool("raw", tmp_path / "one", wipe=True)])
    assert pools.of(f"{tmp_path}/other") == next(iter(pools))
    assert pools.of(f"{tmp_path}/third") is None


def test_pools_are_not_within_each_other_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "main/secure").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "main/secure")
    with bound(tmp_path / "main/secure", tmp_path / "bind"):
        for name in ("link", "bind"):
            file = tmp_path / "conf"
            file.write_text(f"[pool:main]\npaths={tmp_path}/main\n[pool:secure]\npaths={tmp_path}/{name}\n")
            with pytest.raises(ConfigError, match="pools main and secure both have"):
                conf.load([str(file)])
