# SPDX-License-Identifier: Apache-2.0
"""What a domain had in a pool with ``wipe_on_release`` is shown to nobody, on real ext4 and XFS."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.cmd.ctl import render
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, InUseError, NvdimmError
from nvdimm_driver.lifecycle.define import Before, Made
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, BackingIdentity, DomainSpec, NvdimmSpec, Pool, Watch
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state import ownership
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, killed, quiet
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared


@pytest.fixture(params=list(MKFS))
def fs(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem]) -> Iterator[FileSystem]:
    yield file_systems[request.param]
    empty(file_systems[request.param])


@pytest.fixture
def host(tmp_path: Path, fs: FileSystem) -> Host:
    return Host(tmp_path, fs, wipe=True)


@contextmanager
def not_mounted(host: Host) -> Iterator[None]:
    """Hide the pool's file system behind another one, which is empty."""
    run("mount", "-t", "tmpfs", "none", host.fs.root)
    try:
        yield
    finally:
        run("umount", host.fs.root)


def two(*names: str) -> DomainSpec:
    nvdimms = tuple(NvdimmSpec(slot, name, SIZE) for slot, name in enumerate(names))
    return DomainSpec("x", UUID, 512 * MIB, None, nvdimms)


def write(path: str, data: bytes = DATA) -> None:
    with open(path, "r+b") as file:
        file.write(data)


def release(host: Host, *, delete: bool = False, slot: int | None = None) -> None:
    host.driver.wiper.give_up(host.record(), quiet, delete=delete, slot=slot)


def claims(host: Host) -> dict[int, str]:
    record = host.driver.ledger.find_domain(UUID)
    return {item.spec.slot: os.path.basename(item.spec.path) for item in record.allocations} if record else {}


@pytest.mark.parametrize("how", ["release", "wipe"])
def test_a_file_is_overwritten_to_its_end_after_its_nvdimm_was_redefined_smaller(
    tmp_path: Path, fs: FileSystem, how: str
) -> None:
    host = Host(tmp_path, fs)
    large = host.domain("a.img")
    host.driver.define(replace(large, nvdimms=(replace(large.nvdimms[0], size=2 * SIZE),)))
    write(host.path("a.img"), DATA * 2)
    host.driver.drop_claims(UUID)  # this pool does not wipe yet
    host = Host(tmp_path, fs, wipe=True)
    host.driver.define(large)
    if how == "release":
        release(host)
    else:
        host.driver.wiper.wipe(host.record().allocations[0].spec, quiet, host.record())
    assert host.read("a.img") == bytes(2 * SIZE)


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_a_file_whose_size_was_changed_is_overwritten_to_its_end(host: Host, size: int) -> None:
    host.define("a.img")
    os.truncate(host.path("a.img"), size)
    if size > SIZE:
        write(host.path("a.img"), DATA * 2)
    release(host)
    assert host.read("a.img") == bytes(size)
    assert claims(host) == {}


@pytest.mark.parametrize("wipe", [False, True])
@pytest.mark.parametrize("sizes", [[0], [0, SIZE]], ids=["emptied", "sparse"])
def test_a_damaged_file_is_deleted_before_its_backup_is_imported(
    tmp_path: Path, fs: FileSystem, sizes: list[int], wipe: bool
) -> None:
    host = Host(tmp_path, fs, wipe=wipe)
    host.define("a.img")
    for size in sizes:
        os.truncate(host.path("a.img"), size)
    release(host, delete=True, slot=0)
    assert not os.path.exists(host.path("a.img"))
    assert claims(host) == {}


@pytest.mark.parametrize("delete", [False, True])
def test_while_its_pool_is_not_mounted_nothing_is_released(host: Host, delete: bool) -> None:
    host.define("a.img")
    with not_mounted(host):
        with pytest.raises(BackingError, match=r"a\.img|mnt"):
            release(host, delete=delete)
        assert render.fate(host.driver, host.record(), delete=delete).startswith(
            f"{host.path('a.img')}: missing; by its mark"
        )
    assert claims(host) == {0: "a.img"}
    assert host.read("a.img") == DATA
    release(host, delete=delete)
    assert claims(host) == {}
    assert delete or host.read("a.img") == bytes(SIZE)


def test_a_start_whose_guest_has_not_come_is_named_as_such(host: Host) -> None:
    """libvirt says that the domain is off, so nobody can shut it down."""
    host.define("a.img")
    host.driver.prepare(host.domain("a.img"))
    with pytest.raises(InUseError, match=r"x is running or starting: .* and its guest has not come yet") as caught:
        release(host)
    assert "it is over after 600 s" in caught.value.hint
    with pytest.raises(InUseError, match="has not come yet"):
        host.driver.wiper.wipe(host.record().allocations[0].spec, quiet, host.record())


def test_what_is_lost_with_its_medium_is_given_up_on_demand(host: Host) -> None:
    """Its namespace is another now: nothing else gets rid of the claim, and what is there is overwritten as ever."""
    host.driver.define(two(host.path("a.img"), host.path("b.img")))
    write(host.path("b.img"))
    os.unlink(host.path("a.img"))
    lost, here = host.record().allocations
    assert lost.identity
    lost = replace(lost, identity=replace(lost.identity, device="another"))
    host.driver.ledger.store(UUID, "x", 512 * MIB, [lost, here])
    with pytest.raises(
        BackingError, match=r"not the namespace that had it.*'nvdimmctl release --lost --slot N DOMAIN' gives it up"
    ):
        release(host)
    assert host.read("b.img") == DATA
    host.driver.release_claims(host.record(), quiet, delete=False, lost=True)
    assert host.driver.ledger.find_domain(UUID) is None
    assert host.read("b.img") == bytes(SIZE)


@pytest.mark.parametrize("delete", [False, True])
def test_what_has_the_place_of_a_lost_medium_is_not_touched(host: Host, delete: bool) -> None:
    """A new file system is mounted where the lost one was, and a backup was copied there."""
    host.driver.define(host.domain("a.img"))
    write(host.path("a.img"))
    (lost,) = host.record().allocations
    assert lost.identity
    os.rename(host.path("a.img"), host.path("of-the-lost-medium"))
    run("cp", "--reflink=never", "--sparse=never", host.path("of-the-lost-medium"), host.path("a.img"))
    os.unlink(host.path("of-the-lost-medium"))
    run("sync", host.path("a.img"))
    lost = replace(lost, identity=replace(lost.identity, device="another"))
    host.driver.ledger.store(UUID, "x", 512 * MIB, [lost])
    with pytest.raises(BackingError, match="'nvdimmctl check' says"):
        release(host, delete=delete)
    with pytest.raises(BackingError, match="'nvdimmctl check' says"):
        host.driver.define(host.domain("a.img"))
    (found,) = look(host.driver)
    assert found.remedy.endswith("nvdimmctl release --lost --slot 0 " + UUID)
    assert "kept as it is" in render.fate(host.driver, host.record(), delete=delete)
    host.driver.wiper.give_up(host.record(), quiet, delete=delete, slot=0, lost=True)
    assert host.driver.ledger.find_domain(UUID) is None
    assert host.read("a.img") == DATA
    host.driver.define(host.domain("a.img"))
    assert host.read("a.img") == DATA


@pytest.mark.parametrize("lost", [False, True])
def test_a_file_that_was_moved_within_its_file_system_is_not_lost(host: Host, lost: bool) -> None:
    host.driver.define(host.domain("a.img"))
    os.rename(host.path("a.img"), host.path("moved"))
    run("cp", "--reflink=never", "--sparse=never", host.path("moved"), host.path("a.img"))
    with pytest.raises(BackingError, match="'nvdimmctl check' says"):
        host.driver.wiper.give_up(host.record(), quiet, delete=False, slot=0, lost=lost)


def test_a_claim_whose_define_was_cut_stays_while_its_pool_is_not_mounted(host: Host) -> None:
    """The file may have bytes of the domain: an interrupted redefinition has forgotten that it was provisioned."""
    host.define("a.img")
    item = host.record().allocations[0]
    host.driver.ledger.store(UUID, "x", 512 * MIB, [replace(item, identity=None)])
    with not_mounted(host), pytest.raises(BackingError):
        release(host)
    assert claims(host) == {0: "a.img"}
    release(host)
    assert host.read("a.img") == bytes(SIZE)


def test_a_file_that_is_not_there_is_released_only_after_check_has_given_it_up(host: Host) -> None:
    host.define("a.img")
    os.rename(host.path("a.img"), host.path("b.img"))
    with pytest.raises(BackingError, match=r"it was moved: its file system has it still.*nvdimmctl check --repair /"):
        release(host)
    assert claims(host) == {0: "a.img"}
    for each in look(host.driver):
        assert each.mend
        each.mend()
    assert host.read("a.img") == DATA, "it was moved back"
    os.unlink(host.path("a.img"))
    with pytest.raises(BackingError, match="it is not there, and pool main has wipe_on_release"):
        release(host)
    for each in look(host.driver, zeros=[host.path("a.img")]):
        assert each.mend
        each.mend()
    release(host)
    assert claims(host) == {}


def test_a_release_that_is_refused_does_nothing_to_a_saved_guest(host: Host) -> None:
    wanted = two(host.path("a.img"), host.path("b.img"))
    host.run(wanted)
    host.mapper.alive.clear()
    host.driver.reconcile()  # as after virsh managedsave
    run("chattr", "+i", host.path("b.img"))
    try:
        with pytest.raises(BackingError, match=r"b\.img"):
            release(host)
    finally:
        run("chattr", "-i", host.path("b.img"))
    host.driver.check_restore(UUID)


@pytest.mark.parametrize("delete", [False, True])
def test_what_an_interrupted_define_only_wanted_is_given_up_and_stays(
    tmp_path: Path, fs: FileSystem, delete: bool
) -> None:
    host = Host(tmp_path, fs, wipe=not delete)
    host.define("a.img")
    Path(host.path("b.img")).write_bytes(DATA)
    host.driver.importer.import_in_place(host.path("b.img"), None, 0, quiet)
    host.driver.ledger.begin_define(host.domain("b.img"), lambda: None)
    assert f"{host.path('b.img')}: kept as it is" in render.fate(host.driver, host.record(), delete=delete)
    release(host, delete=delete)
    assert host.driver.ledger.find_domain(UUID) is None
    assert host.read("b.img") == DATA
    assert Path(host.path("a.img")).exists() is not delete


def test_what_can_be_read_is_not_overwritten_when_another_part_is_missing(host: Host) -> None:
    """All of a release is done, or nothing: so it can be repeated."""
    host.driver.define(two(host.path("a.img"), host.path("b.img")))
    write(host.path("a.img"))
    os.unlink(host.path("b.img"))
    with pytest.raises(BackingError, match=r"b\.img: it is not there"):
        release(host)
    assert claims(host) == {0: "a.img", 1: "b.img"}
    assert host.read("a.img") == DATA


def test_what_a_domain_is_redefined_without_stays_its_own_until_it_is_overwritten(host: Host) -> None:
    host.define("a.img")
    host.driver.drop_claims(UUID)
    host.driver.drop_claims(UUID)
    assert claims(host) == {256: "a.img"}, "it is set aside, and in no guest"
    assert look(host.driver) == [], "its mark says so, too"
    with pytest.raises(InUseError, match="belongs to domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))
    release(host)
    host.driver.define(host.domain("a.img", OTHER_UUID))
    assert host.read("a.img") == bytes(SIZE)


def test_one_of_two_that_a_domain_is_redefined_without_stays_its_own(host: Host) -> None:
    host.driver.define(two(host.path("a.img"), host.path("b.img")))
    for name in ("a.img", "b.img"):
        write(host.path(name))
    host.driver.define(two(host.path("b.img")))
    assert set(claims(host).values()) == {"a.img", "b.img"}
    (slot,) = (slot for slot, name in claims(host).items() if name == "a.img")
    with pytest.raises(InUseError, match="belongs to domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))
    assert look(host.driver) == [], "its mark says so, too"
    release(host, slot=slot)
    assert set(claims(host).values()) == {"b.img"}
    assert host.read("a.img") == bytes(SIZE)
    assert host.read("b.img") == DATA
    assert host.mark("a.img") is None
    assert look(host.driver) == []


def test_a_definition_that_calls_its_file_by_another_name_claims_it_once(host: Host) -> None:
    host.define("a.img")
    os.mkdir(host.path("folder"))
    host.driver.define(two(host.path("folder/../a.img")))
    assert set(claims(host).values()) == {"a.img"}
    assert len(host.record().allocations) == 1


@pytest.mark.parametrize("wipe", [True, False])
@pytest.mark.parametrize("way", ["", "check"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_release_that_was_killed_after_it_deleted_a_file_can_be_repeated(
    tmp_path: Path, fs: FileSystem, count: int, way: str, wipe: bool
) -> None:
    """The bytes were deleted by then, and the repetition, or ``check``, asked for a backup of them."""
    host = Host(tmp_path, fs, wipe=wipe)
    names = [host.path(name) for name in ("a.img", "b.img")][:count]
    host.driver.define(two(*names))
    for name in names:
        write(name)

    def work() -> None:
        driver = host.another()
        discard = driver.backings[0].discard

        def discard_and_die(spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
            discard(spec, identity)
            os.kill(os.getpid(), signal.SIGKILL)

        driver.backings[0].discard = discard_and_die  # type: ignore[method-assign]
        driver.release_claims(host.record(), quiet, delete=True)

    killed(work)
    host.driver = host.another()
    (found,) = look(host.driver)
    assert found.problem == "it is not there: a release of it was interrupted"
    if way == "check":
        assert found.mend
        found.mend()
    if way != "check" or count == 2:
        release(host, delete=True)
    assert claims(host) == {}
    assert os.listdir(host.fs.root) in ([], ["lost+found"])


@pytest.mark.parametrize("wipe", [True, False])
def test_a_repair_of_one_file_keeps_what_a_release_that_was_killed_has_noted_of_another(
    tmp_path: Path, fs: FileSystem, wipe: bool
) -> None:
    host = Host(tmp_path, fs, wipe=wipe)
    names = [host.path(name) for name in ("a.img", "b.img", "c.img")]
    host.driver.define(two(*names))

    def work() -> None:
        driver = host.another()
        discard, deleted = driver.backings[0].discard, []

        def discard_two(spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
            discard(spec, identity)
            deleted.append(spec.path)
            if len(deleted) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        driver.backings[0].discard = discard_two  # type: ignore[method-assign]
        driver.release_claims(host.record(), quiet, delete=True)

    killed(work)
    host.driver = host.another()
    first, second = look(host.driver)
    assert first.mend
    first.mend()
    assert look(host.driver) == [second]
    assert second.problem == "it is not there: a release of it was interrupted"
    assert not any(item.deleted for item in host.record().allocations if item.spec.path == names[2])
    release(host, delete=True)
    assert claims(host) == {}


def test_a_release_that_has_failed_leaves_what_is_away_later_to_the_operator(tmp_path: Path, fs: FileSystem) -> None:
    """Nothing was deleted: a repair gave the claim up, as that of a release which was cut off."""
    host = Host(tmp_path, fs)
    host.driver.define(two(host.path("a.img"), host.path("b.img")))
    discard = host.backing.discard

    def discard_first(spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        if spec.path == host.path("b.img"):
            raise BackingError("Operation not permitted")
        discard(spec, identity)

    host.backing.discard = discard_first  # type: ignore[method-assign]
    with pytest.raises(BackingError, match="not permitted"):
        release(host, delete=True)
    shutil.move(host.path("b.img"), tmp_path / "b.img")
    host.driver = host.another()
    found = {each.path: each.problem for each in look(host.driver) if each.mend}
    assert found == {host.path("a.img"): "it is not there: a release of it was interrupted"}


def test_what_is_put_in_the_place_of_lost_bytes_is_overwritten_too(host: Host) -> None:
    """A backup was found after the claim's bytes were given up for lost; a redefine dropped the claim, and kept it."""
    host.define("a.img")
    os.unlink(host.path("a.img"))
    for each in look(host.driver, zeros=[host.path("a.img")]):
        assert each.mend
        each.mend()
    Path(host.path("a.img")).write_bytes(DATA)
    host.driver.drop_claims(UUID)
    with pytest.raises(InUseError, match="belongs to domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))
    release(host)
    host.driver.define(host.domain("a.img", OTHER_UUID))
    assert host.read("a.img") == bytes(SIZE)


def test_no_start_takes_what_is_already_overwritten_before_all_is(host: Host) -> None:
    host.driver.define(two(host.path("a.img"), host.path("b.img")))
    tried: list[str] = []

    def watch(what: str) -> object:
        def tell(done: int, total: int) -> None:
            with pytest.raises(InUseError, match="is being overwritten"):
                host.another().prepare(two(host.path("a.img")))
            tried.append(what)

        return tell

    host.driver.wiper.give_up(host.record(), watch, delete=False)  # type: ignore[arg-type]
    assert len(tried) == 2 * SIZE // MIB


def test_no_start_comes_between_the_wipes_of_two_nvdimms(host: Host) -> None:
    """Before, the guest ran with one that was wiped and one that was not."""
    names = [host.path("a.img"), host.path("b.img")]
    host.driver.define(two(*names))
    tried = []

    @contextmanager
    def watched(spec: NvdimmSpec) -> Iterator[Watch]:
        with pytest.raises(InUseError, match="is being overwritten"):
            host.another().prepare(two(*names))
        tried.append(spec.path)
        yield quiet

    host.driver.wiper.wipe_all([item.spec for item in host.record().allocations], watched, host.record())
    assert tried == names


@pytest.mark.parametrize("after", [False, True])
def test_a_start_within_a_release_keeps_what_it_has(host: Host, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It began after the release had looked: the guest's file was nobody's, and free for others at its end."""
    host.pools = Pools([], any_path=True)
    host.driver = host.another()
    host.define("a.img")
    unmark = ownership._unmark

    def unmark_meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(ownership, "_unmark", unmark)
        if after:
            unmark(*arguments)
        host.mapper.alive[7] = UUID
        other = host.another()
        other.prepare(host.domain("a.img"))
        map_prepared(other.ledger, 7)
        if not after:
            unmark(*arguments)

    monkeypatch.setattr(ownership, "_unmark", unmark_meanwhile)
    with pytest.raises(InUseError, match="running or starting"):
        host.driver.release_claims(host.record(), quiet, delete=False)
    host.mapper.alive.clear()
    host.driver.release(UUID)
    assert claims(host) == {0: "a.img"}
    assert look(host.driver) == []
    with pytest.raises(InUseError, match="belongs to domain x"):
        host.another().define(host.domain("a.img", OTHER_UUID))


@pytest.mark.parametrize("ran", [False, True])
def test_a_domain_that_is_undone_keeps_what_its_guest_may_have_written(host: Host, ran: bool) -> None:
    """A create failed after its guest had run; nothing deletes a device, or a file that existed before."""
    Path(host.path("a.img")).write_bytes(bytes(SIZE))
    if ran:
        host.run(host.domain("a.img"))
        host.mapper.alive.clear()
    else:
        host.driver.define(host.domain("a.img"))
    host.driver.undo(UUID, Before(None, None, 0), Made(), host.record())
    assert claims(host) == ({0: "a.img"} if ran else {})


def test_a_file_that_its_folders_owner_moves_is_not_exchanged_for_a_new_one(host: Host) -> None:
    """Before, the define made a new file, and forgot the bytes that were to be overwritten."""
    host.define("x.img")
    os.rename(host.path("x.img"), host.path("y.img"))
    for define in (host.driver.check, host.driver.define):
        with pytest.raises(BackingError, match=r"x\.img: what was provisioned for the domain is not there"):
            define(host.domain("x.img"))
    assert not os.path.exists(host.path("x.img"))
    with pytest.raises(InUseError, match=r"y\.img has the mark of domain x"):
        host.driver.define(host.domain("y.img", OTHER_UUID))
    host.driver.define(host.domain("y.img"))
    assert claims(host) == {0: "y.img"}, "under its new name, the domain can have it"
    assert host.read("y.img") == DATA


def test_a_file_that_is_moved_while_its_domain_is_redefined_stays_its_own(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define("x.img")
    provision = host.backing.provision

    def moved(spec: NvdimmSpec, *rest: Any) -> BackingIdentity:
        os.rename(host.path("x.img"), host.path("y.img"))
        return provision(spec, *rest)

    monkeypatch.setattr(host.backing, "provision", moved)
    with pytest.raises(BackingError, match=r"x\.img is not the backing that was provisioned: its inode is"):
        host.driver.define(host.domain("x.img", ram=600 * MIB))
    (item,) = host.record().allocations
    assert item.identity
    assert item.identity.inode == os.stat(host.path("y.img")).st_ino
    with pytest.raises(InUseError, match=r"y\.img has the mark of domain x"):
        host.driver.define(host.domain("y.img", OTHER_UUID))
    assert host.read("y.img") == DATA


def test_a_file_that_was_hidden_while_its_claim_was_given_up_is_not_taken_for_a_copy(host: Host) -> None:
    """Its mark tells the file on which it was written: the domain has both, and a release overwrites both."""
    host.define("x.img")
    os.rename(host.path("x.img"), host.path("y.img"))
    (item,) = host.record().allocations
    host.driver.ledger.store(UUID, "x", 512 * MIB, [replace(item, identity=None)])  # as a repair that did not see it
    host.driver.define(host.domain("x.img"))
    with pytest.raises(InUseError, match=r"y\.img has the mark of domain x .* the ledger does not know that"):
        host.driver.define(host.domain("y.img", OTHER_UUID))
    (found,) = look(host.driver)
    assert found.path == host.path("y.img")
    assert found.mend
    found.mend()
    assert claims(host) == {0: "x.img", 256: "y.img"}
    release(host)
    for name in ("x.img", "y.img"):
        assert host.read(name) == bytes(SIZE)
    assert look(host.driver) == []


def test_what_a_domain_has_given_up_is_not_taken_for_what_it_has(host: Host) -> None:
    """The two names were exchanged, as by two file systems that are mounted in each other's places."""
    host.driver.define(host.domain("b.img"))
    write(host.path("b.img"), b"b" * SIZE)
    host.driver.define(host.domain("a.img"))
    write(host.path("a.img"), b"a" * SIZE)
    before = host.record().allocations
    for old, new in (("a", "t"), ("b", "a"), ("t", "b")):
        os.rename(host.path(f"{old}.img"), host.path(f"{new}.img"))
    for finding in look(host.driver):
        if finding.mend:
            with suppress(NvdimmError):
                finding.mend()
    assert host.record().allocations == before
    with pytest.raises(NvdimmError):
        host.driver.prepare(host.domain("a.img"))
    for old, new in (("a", "t"), ("b", "a"), ("t", "b")):
        os.rename(host.path(f"{old}.img"), host.path(f"{new}.img"))
    assert look(host.driver) == []
    host.driver.prepare(host.domain("a.img"))
    assert Path(host.path("a.img")).read_bytes() == b"a" * SIZE


def test_claims_are_given_up_though_what_stays_cannot_be_marked(tmp_path: Path, fs: FileSystem) -> None:
    """An error means that nothing is given up: libvirt's definition comes back, for bytes that another can have."""
    host = Host(tmp_path, fs)
    os.mkdir(host.path("wiped"))
    host.pools = Pools([Pool("main", "fsdax", (host.path("wiped"),), None, SUPERPAGE, 128 * KIB, True)], any_path=True)
    host.driver = host.another()
    host.driver.define(two(host.path("a.img"), host.path("wiped/b.img")))
    run("chattr", "+i", host.path("wiped/b.img"))
    host.driver.drop_claims(UUID)
    run("chattr", "-i", host.path("wiped/b.img"))
    assert [*claims(host).values()] == ["b.img"]
