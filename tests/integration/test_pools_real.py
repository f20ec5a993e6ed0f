# SPDX-License-Identifier: Apache-2.0
"""Pools whose folders have other names too: symbolic links, bind mounts, other nodes of a device."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvdimm_driver import conf
from nvdimm_driver.errors import ConfigError, RefusedError
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, DomainSpec, NvdimmSpec, Pool
from nvdimm_driver.pools.rules import Pools
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, quiet
from tests.unit.doubles import OTHER_UUID, UUID


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
    assert pools.wipes(f"{tmp_path}/other")
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
