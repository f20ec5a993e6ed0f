# SPDX-License-Identifier: Apache-2.0
"""Pools that are not there, or whose medium has errors: nothing of them is repaired, and other domains go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor import ledger as doctor_ledger
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.errors import InUseError, NvdimmError
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec
from nvdimm_driver.pools.rules import Pools
from tests.integration.loop_pmem import IMAGE, MKFS, SPA, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, is_immutable
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared
from tests.unit.fake_sysfs import FakeSysfs

OTHER_NAMESPACE = "6a1b2c3d-0000-4000-8000-000000000002"


@pytest.fixture
def host(tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    """Domain x has two NVDIMMs on ext4."""
    host = Host(tmp_path, file_systems["ext4"])
    nvdimms = tuple(NvdimmSpec(slot, host.path(name), SIZE) for slot, name in enumerate(("a.img", "b.img")))
    host.driver.define(DomainSpec("x", UUID, 512 * MIB, None, nvdimms))
    for name in ("a.img", "b.img"):
        Path(host.path(name)).write_bytes(DATA)
    yield host
    for each in file_systems.values():
        empty(each)


def repair(host: Host) -> list[Inconsistency]:
    """Repair what can be; return what was found before."""
    found = look(host.driver)
    _repair(lambda: look(host.driver))
    return found


def both_on_pmem(folder: Path, one: FileSystem, other: FileSystem) -> Path:
    """Return a sysfs in which two file systems are on two namespaces."""
    sysfs = FakeSysfs(folder / "both")
    sysfs.fsdax(one.device, spa=SPA, size=IMAGE)
    spa = SPA + 2 * IMAGE
    sysfs.namespace("namespace1.0", mode="memory", spa=spa, size=IMAGE, uuid=OTHER_NAMESPACE)
    pfn = sysfs.holder("pfn1.1", "namespace1.0", mode="ram", resource=hex(spa), size=IMAGE)
    sysfs.disk("pmem1", pfn, other.device)
    return sysfs.root


@contextmanager
def covered(host: Host, other: FileSystem, what: str) -> Iterator[None]:
    """Hide the file system of a host behind another one."""
    with ExitStack() as covers:
        if what == "another file system with DAX":
            host.driver.backings[0].sysfs = both_on_pmem(host.folder, host.fs, other)  # type: ignore[attr-defined]
            mounts = host.fs.mountinfo.read_text()
            number = f"{os.major(other.device)}:{os.minor(other.device)}"
            host.fs.mountinfo.write_text(f"{mounts}2 0 {number} / {host.fs.root} rw - xfs /dev/pmem1 rw,dax=always\n")
            covers.callback(host.fs.mountinfo.write_text, mounts)
        source = ("-t", "tmpfs", "none") if what == "an empty mount point" else ("--bind", other.root)
        run("mount", *source, host.fs.root)
        covers.callback(run, "umount", host.fs.root)
        yield


@pytest.mark.parametrize("what", ["an empty mount point", "another file system", "another file system with DAX"])
@pytest.mark.parametrize("namesake", [False, True])
@pytest.mark.parametrize("any_path", [False, True])
def test_nothing_of_a_pool_that_is_not_there_is_repaired(
    host: Host, file_systems: dict[str, FileSystem], what: str, namesake: bool, any_path: bool
) -> None:
    """Before, check gave the contents up, and the next definition chose other bases: NVDIMMs were swapped."""
    if any_path:
        host.pools = Pools([], any_path=True)
        host.driver = host.another()
    before = host.record()
    with covered(host, file_systems["xfs"], what):
        if namesake:
            Path(host.path("a.img")).write_bytes(bytes(SIZE // 2))
        found = repair(host)
        if namesake:
            assert host.read("a.img") == bytes(SIZE // 2)
        pools = [each for each in found if each.problem.startswith("pool main: ")]
        assert len(pools) == (0 if any_path or what == "another file system with DAX" else 1)
        assert [(each.domain, os.path.basename(each.path)) for each in found if each not in pools] == [
            ("x", "a.img"),
            ("x", "b.img"),
        ]
        assert [each.mend for each in found] == [None] * len(found)
    assert host.record() == before
    assert look(host.driver) == []


@pytest.mark.parametrize("what", ["an empty mount point", "another file system"])
def test_a_guest_that_ends_while_its_files_are_away_leaves_them_immutable_and_says_so(
    host: Host, file_systems: dict[str, FileSystem], caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The host went down with the guest, and nobody mounted the pool when it was up again."""
    domain = DomainSpec("x", UUID, 512 * MIB, None, tuple(item.spec for item in host.record().allocations))
    host.mapper.alive[7] = UUID
    host.driver.prepare(domain)
    map_prepared(host.driver.ledger, 7)
    del host.mapper.alive[7]
    with covered(host, file_systems["xfs"], what):
        host.driver.reconcile()
    assert host.record().start is None
    for name in ("a.img", "b.img"):
        assert f"event=left-immutable domain=x uuid={UUID} domid=7 path={host.path(name)}" in caplog.text
        assert is_immutable(host.path(name))
    left = [(each.path, each.problem) for each in look(host.driver)]
    assert left == [(host.path(name), "it is immutable, but no known start needs that") for name in ("a.img", "b.img")]
    repair(host)
    assert look(host.driver) == []
    assert not is_immutable(host.path("a.img"))


def test_a_file_that_was_truncated_to_nothing_is_completed_by_its_mark(host: Host) -> None:
    path = host.path("a.img")
    os.truncate(path, 0)
    (found,) = repair(host)
    assert found.remedy.endswith(f"nvdimmctl check --repair --zeros {path}")
    assert os.path.getsize(path) == 0
    (found,) = look(host.driver, zeros=[path])
    assert (found.path, found.remedy) == (path, "replace them with zeros")
    _repair(lambda: look(host.driver, zeros=[path]))
    lost = [event.detail for event in host.driver.ledger.events() if event.kind == "bytes-lost"]
    assert lost == [{"path": path, "bytes": SIZE, "first": "0x0"}]
    assert look(host.driver) == []
    assert host.read("a.img") == bytes(SIZE)
    assert host.read("b.img") == DATA


def test_a_mark_stays_on_a_file_whose_path_has_a_file_of_another_file_system(
    host: Host, file_systems: dict[str, FileSystem], tmp_path: Path
) -> None:
    """The pool's file system is mounted elsewhere, and a namesake is where the NVDIMM was."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (pool,) = host.pools
    host.pools = Pools([replace(pool, name="two", paths=(str(elsewhere),))])
    host.driver = host.another()
    run("mount", "--bind", host.fs.root, elsewhere)
    try:
        with covered(host, file_systems["xfs"], "an empty mount point"):
            for name in ("a.img", "b.img"):
                Path(host.path(name)).write_bytes(bytes(SIZE))
            assert [each.mend for each in repair(host)] == [None, None]
    finally:
        run("umount", elsewhere)
    assert host.mark("a.img")
    assert host.mark("b.img")


@contextmanager
def moved_mounts(*places: tuple[Path, Path]) -> Iterator[None]:
    """Mount file systems in other places than they were: each as (mount point of before, that of now)."""
    with ExitStack() as undo:
        for source, _ in places:
            held = source.parent / "held"
            held.mkdir()
            run("mount", "--bind", source, held)
            undo.callback(run, "umount", held)
            undo.callback(run, "mount", "--bind", held, source)
            run("umount", source)
        for source, target in places:
            run("mount", "--bind", source.parent / "held", target)
            undo.callback(run, "umount", target)
        yield


@pytest.mark.parametrize("kind", list(MKFS))
def test_a_file_system_with_another_mount_point_is_not_a_file_that_was_moved(tmp_path: Path, kind: str) -> None:
    for name in ("fs", "new", "driver"):
        (tmp_path / name).mkdir()
    fs = FileSystem(tmp_path / "fs", kind)
    try:
        host = Host(tmp_path / "driver", fs)
        host.define("a.img")
        before = host.record().allocations[0]
        with moved_mounts((fs.root, tmp_path / "new")):
            host.pools = Pools([replace(pool, paths=(str(tmp_path / "new"),)) for pool in host.pools])
            host.driver = host.another()
            (found,) = repair(host)
            assert (found.path, found.mend) == (host.path("a.img"), None)
            assert found.problem.endswith(f"is mounted in another place, and has it as {tmp_path}/new/a.img")
            assert "define the domain with that path" in found.remedy
            spec = replace(before.spec, path=f"{tmp_path}/new/a.img")
            host.driver.define(DomainSpec("x", UUID, 512 * MIB, None, (spec,)))
            after = host.record().allocations[0]
            assert (after.identity, after.base, after.spec) == (before.identity, before.base, spec)
            assert look(host.driver) == []
    finally:
        fs.close()


def test_two_file_systems_in_each_others_places_are_named(tmp_path: Path) -> None:
    for name in ("one", "other", "driver"):
        (tmp_path / name).mkdir()
    one, other = FileSystem(tmp_path / "one", "ext4"), FileSystem(tmp_path / "other", "xfs")
    try:
        other_mount = other.mountinfo.read_text().replace("1 0", "2 0", 1).replace("pmem0", "pmem1")
        one.mountinfo.write_text(one.mountinfo.read_text() + other_mount)
        host = Host(tmp_path / "driver", one)
        host.pools = Pools(
            [pool for main in host.pools for pool in (main, replace(main, name="b", paths=(str(other.root),)))]
        )
        one.backing.sysfs = both_on_pmem(tmp_path, one, other)
        host.driver = host.another()
        domains = {
            name: DomainSpec(name, uuid, 512 * MIB, None, (NvdimmSpec(0, f"{fs.root}/a.img", SIZE),))
            for name, uuid, fs in (("x", UUID, one), ("y", OTHER_UUID, other))
        }
        for domain in domains.values():
            host.driver.define(domain)
        with moved_mounts((one.root, other.root), (other.root, one.root)):
            for name, fs, its_own in (("x", one, other), ("y", other, one)):
                with pytest.raises(
                    InUseError,
                    match=f"{fs.root}/a.img has the mark of .*and is its {its_own.root}/a.img .*each other's",
                ):
                    host.driver.prepare(domains[name])
            found = repair(host)
            assert [(each.path, each.mend) for each in found] == [
                (f"{one.root}/a.img", None),
                (f"{other.root}/a.img", None),
            ]
            assert all(each.remedy.startswith("mount the file system that had") for each in found)
        assert look(host.driver) == []
        host.driver.prepare(domains["x"])
    finally:
        host.backing.thaw(f"{one.root}/a.img")
        for fs in (one, other):
            fs.close()


def read_only(fs: FileSystem) -> None:
    run("mount", "-o", "remount,ro", fs.root)


def shut_down(fs: FileSystem) -> None:
    """Do what the kernel does after an error of the medium: everything fails with EIO."""
    run("xfs_io", "-x", "-c", "shutdown", fs.root)


@pytest.mark.parametrize("breaks", [read_only, shut_down])
@pytest.mark.parametrize("kind", list(MKFS))
def test_a_pool_that_cannot_be_thawed_keeps_no_other_domain_from_anything(
    tmp_path: Path, kind: str, breaks: Callable[[FileSystem], None]
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "works").mkdir()
    fs, works = FileSystem(tmp_path / "broken", kind), FileSystem(tmp_path / "works", "ext4")
    try:
        works.backing.sysfs = both_on_pmem(tmp_path, fs, works)
        works.mountinfo.write_text(works.mountinfo.read_text() + fs.mountinfo.read_text())
        ended, other = Host(tmp_path, fs), Host(tmp_path, works)
        ended.run(ended.domain("a.img", label_size=MIB))
        breaks(fs)
        ended.mapper.alive.clear()
        for driver in (ended.another(), other.another()):  # with a backing for the broken pool, and with another
            driver.reconcile()
            driver.restart_lost()
            assert look(driver)
            _repair(lambda driver=driver: look(driver))  # type: ignore[misc]
            list(doctor_ledger.check_backings(driver.ledger.domains(), driver.backings))
            for pool in driver.pools:
                driver.measure_pool(pool)
        assert ended.record().start is not None, "it is put away when its file can be thawed"
        other.driver.define(other.domain("b.img", OTHER_UUID))
        other.driver.prepare(other.domain("b.img", OTHER_UUID))
        assert is_immutable(other.path("b.img"))
        if breaks is read_only:
            run("mount", "-o", "remount,rw", fs.root)
            ended.driver.reconcile()
            assert ended.record().start is None
            assert not is_immutable(ended.path("a.img"))
        other.backing.thaw(other.path("b.img"))
    finally:
        for each in (fs, works):
            each.close()


def test_a_start_says_that_a_file_is_in_no_pool_any_more(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """The operator has changed the pools: the domain keeps what was provisioned for it, and nothing else is frozen."""
    host.pools = Pools([])
    host.driver = host.another()
    (domain,) = host.driver.ledger.domains()
    host.driver.prepare_known(domain.uuid)
    assert is_immutable(host.path("a.img"))
    assert f"event=outside-pools domain=x uuid={UUID} domid=- path={host.path('a.img')}" in caplog.text
    host.driver.starts.put_away(host.record().start)  # type: ignore[arg-type]
    os.rename(host.path("a.img"), host.path("own.img"))
    Path(host.path("a.img")).write_bytes(DATA)
    with pytest.raises(NvdimmError):
        host.driver.prepare_known(domain.uuid)
    assert not is_immutable(host.path("a.img"))


@pytest.mark.parametrize("what", ["an empty mount point", "another file system", "another file system with DAX"])
def test_a_saved_guest_can_go_on_once_its_pool_is_back(
    host: Host, file_systems: dict[str, FileSystem], what: str
) -> None:
    """Nobody is told to give a guest up whose pool is merely not mounted."""
    host.mapper.alive[7] = UUID
    host.driver.prepare(DomainSpec("x", UUID, 512 * MIB, None, tuple(item.spec for item in host.record().allocations)))
    map_prepared(host.driver.ledger, 7)
    del host.mapper.alive[7]
    host.driver.release(UUID)
    host.driver.check_restore(UUID)
    with covered(host, file_systems["xfs"], what), pytest.raises(NvdimmError, match="cannot go on yet: ") as caught:
        host.driver.check_restore(UUID)
    assert "mount" in (caught.value.hint or "")
    assert "managedsave-remove" not in (caught.value.hint or "")
    host.driver.check_restore(UUID)
