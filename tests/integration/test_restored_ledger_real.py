# SPDX-License-Identifier: Apache-2.0
"""A ledger from a backup is older than the files: on real ext4 and XFS, nobody gets what another domain has since."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvdimm_driver import driver as driver_module
from nvdimm_driver.backing import inode
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.backing.paths import Entry
from nvdimm_driver.cmd.ctl import check
from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.cmd.device_model import attach
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.errors import BackingError, InUseError, LedgerError, NvdimmError, RefusedError
from nvdimm_driver.lifecycle.plan import Planner
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, Allocation, BackingIdentity, NvdimmSpec, Pool
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state import database, owner_marks
from nvdimm_driver.state.owner_marks import Mark
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, is_immutable, quiet
from tests.ledger_copies import copy_ledger
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared

SECRET = b"of y" * 1024
HIGH = 1 << 37
"""A base that no layout chooses here."""


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


def back_up(host: Host) -> None:
    """Copy the ledger."""
    copy_ledger(host.folder / "ledger.sqlite", host.folder / "backup")


def restore(host: Host) -> None:
    """Write the copy over the ledger, which does not notice; the driver is another process's from then on."""
    holders = host.driver.starts.holders
    host.driver.ledger.close()
    copy_ledger(host.folder / "backup", host.folder / "ledger.sqlite")
    host.driver = host.another()
    host.driver.starts.holders = holders


def start(host: Host, uuid: str, domid: int, name: str = "a.img") -> None:
    """Start a domain, with its frames announced as the device model does."""
    host.mapper.alive[domid] = uuid
    host.driver.prepare(host.domain(name, uuid))
    prepared = host.driver.ledger.find_prepared(uuid)
    assert prepared
    host.mapper.announce(domid, prepared.mappings)
    map_prepared(host.driver.ledger, domid, uuid)


def owner(host: Host, name: str) -> Mark:
    """Return the mark of a file, without the time of its last change."""
    return replace(owner_marks.unpack("", host.mark(name) or b""), changed=0)


def repair(host: Host, zeros: Collection[str] = ()) -> list[Inconsistency]:
    """Repair as 'check --repair' does; return what is left."""
    _repair(lambda: look(host.driver, zeros=zeros))
    return look(host.driver)


def given_to_y_since(host: Host) -> None:
    """Let the ledger say that a.img is x's, and its mark that it is y's, who has written to it."""
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.driver.forget(UUID)
    host.define("a.img", OTHER_UUID, SECRET)
    restore(host)


# --- whose file it is ---


def test_a_repair_gives_the_file_to_the_domain_that_has_the_mark(host: Host) -> None:
    given_to_y_since(host)
    (found,) = look(host.driver)
    assert f"its mark says that it is domain y's ({OTHER_UUID})" in found.problem
    assert repair(host) == []
    assert OTHER_UUID.encode() in (host.mark("a.img") or b"")
    assert [item.spec.path for item in host.record(OTHER_UUID).allocations] == [host.path("a.img")]
    with pytest.raises(InUseError, match="belongs to domain y"):
        host.driver.prepare(host.domain("a.img"))
    assert host.read("a.img").startswith(SECRET)


def test_a_repair_while_the_guest_of_the_domain_with_the_mark_runs_gives_it_the_file(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.driver.forget(UUID)
    host.define("a.img", OTHER_UUID, SECRET)
    start(host, OTHER_UUID, 9)
    restore(host)
    assert repair(host) == []
    record = host.record(OTHER_UUID)
    assert record.start
    assert (record.start.domid, record.start.paths) == (9, (host.path("a.img"),))
    assert is_immutable(host.path("a.img"))


@pytest.mark.parametrize("way", ["release", "redefine", "drop"])
def test_what_the_old_owner_gives_up_keeps_the_mark_of_the_new_one(host: Host, way: str) -> None:
    given_to_y_since(host)
    if way == "release":
        host.driver.release_claims(host.record(), quiet, delete=False)
    elif way == "redefine":
        host.driver.define(host.domain("b.img"))
    else:
        host.driver.drop_claims(UUID)
    assert OTHER_UUID.encode() in (host.mark("a.img") or b"")
    with pytest.raises(InUseError, match="has the mark of domain y"):
        host.driver.define(host.domain("a.img", "7c7b0e2e-4a6e-4f0e-9a3b-000000000003"))


def test_the_end_of_an_old_start_keeps_the_mark_of_the_new_owner(host: Host) -> None:
    """The backup was made while x ran with the file."""
    host.driver.define(host.domain("a.img"))
    start(host, UUID, 7)
    back_up(host)
    host.mapper.alive.clear()
    host.driver.forget(UUID)
    host.define("a.img", OTHER_UUID, SECRET)
    restore(host)
    host.driver.reconcile()
    assert OTHER_UUID.encode() in (host.mark("a.img") or b"")
    assert repair(host) == []
    assert host.driver.ledger.find_domain(UUID) is None


def test_a_repair_takes_no_file_of_another_domain_that_was_put_in_the_place_of_one(host: Host) -> None:
    """By 'mv b.img a.img': what was in a.img is lost, and what was in b.img is y's still."""
    host.define("a.img", UUID)
    host.define("b.img", OTHER_UUID, SECRET)
    os.rename(host.path("b.img"), host.path("a.img"))
    found = {each.domain: each for each in look(host.driver)}
    assert f"it was moved to {host.path('a.img')}" in found["y"].problem
    assert f"what is there is {host.path('b.img')} of domain y" in found["x"].problem
    assert found["x"].mend is None
    repair(host)
    assert host.read("b.img").startswith(SECRET)
    assert OTHER_UUID.encode() in (host.mark("b.img") or b"")
    assert not os.path.exists(host.path("a.img"))
    assert [item.spec.path for item in host.record().allocations] == [host.path("a.img")]
    host.driver.prepare(host.domain("b.img", OTHER_UUID))


def test_a_file_without_a_mark_that_was_put_in_the_place_of_another_is_found_by_its_inode(host: Host) -> None:
    host.define("a.img", UUID)
    host.define("b.img", OTHER_UUID, SECRET)
    host.backing.mark(host.path("b.img"), None)
    os.rename(host.path("b.img"), host.path("a.img"))
    repair(host)
    assert host.read("b.img").startswith(SECRET)


# --- what one domain was given since ---


def redefined_since(host: Host, *, running: bool = False) -> None:
    """Let the ledger say that x has a.img; since then it was defined with b.img, has written to it, and may run."""
    host.define("a.img")
    back_up(host)
    host.define("b.img", data=SECRET)
    if running:
        start(host, UUID, 8, "b.img")
    restore(host)


def slots(host: Host) -> dict[int, str]:
    return {item.spec.slot: os.path.basename(item.spec.path) for item in host.record().allocations}


@pytest.mark.parametrize("lost", [False, True])
def test_a_domain_keeps_what_it_was_given_since_the_backup_and_what_it_had_then(host: Host, lost: bool) -> None:
    redefined_since(host)
    if lost:
        os.unlink(host.path("a.img"))
    assert [each.remedy for each in look(host.driver) if each.path == host.path("b.img")] == [
        "let the domain have both"
    ]
    repair(host)
    assert slots(host) == {0: "b.img", 256: "a.img"}
    for name in ("a.img", "b.img"):
        with pytest.raises(InUseError, match="belongs to domain x"):
            host.driver.define(host.domain(name, OTHER_UUID))
    start(host, UUID, 9, "b.img")
    assert host.read("b.img").startswith(SECRET)


def test_the_guest_that_runs_with_what_it_was_given_since_the_backup_is_taken_up(host: Host) -> None:
    redefined_since(host, running=True)
    assert repair(host) == []
    record = host.record()
    assert record.start
    assert (record.start.domid, record.start.paths) == (8, (host.path("b.img"),))
    assert slots(host) == {0: "b.img", 256: "a.img"}
    assert is_immutable(host.path("b.img"))
    assert host.driver.starts.holders.held() == {UUID}


def test_a_guest_is_taken_up_at_the_bases_that_it_has(host: Host) -> None:
    """By the backup, a.img is where the guest has b.img: the marks of frozen files say where the guest has them."""
    host.driver.define(host.domain("a.img"))
    (had,) = host.record().allocations
    back_up(host)
    assert had.base is not None
    nvdimms = (
        NvdimmSpec(0, host.path("a.img"), SIZE, base=had.base + SUPERPAGE * 2),
        NvdimmSpec(1, host.path("b.img"), SIZE, base=had.base),
    )
    both = replace(host.domain("a.img"), nvdimms=nvdimms)
    host.driver.define(both)
    host.mapper.alive[7] = UUID
    host.driver.prepare(both)
    prepared = host.driver.ledger.find_prepared(UUID)
    assert prepared
    host.mapper.announce(7, prepared.mappings)
    map_prepared(host.driver.ledger, 7, UUID)
    restore(host)
    repair(host)
    record = host.record()
    assert record.start
    assert (record.start.domid, {*record.start.paths}) == (7, {host.path("a.img"), host.path("b.img")})
    assert is_immutable(host.path("a.img"))
    assert is_immutable(host.path("b.img"))


def test_the_end_of_an_old_start_leaves_the_file_of_the_guest_that_has_it_now_immutable(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """The backup was made while x ran with the file. Since then x has given it up, and y's guest runs with it."""
    host.driver.define(host.domain("a.img"))
    start(host, UUID, 7)
    back_up(host)
    del host.mapper.alive[7]
    host.mapper.announce(7, ())
    host.driver.reconcile()
    host.driver.forget(UUID)
    host.define("a.img", OTHER_UUID)
    start(host, OTHER_UUID, 9)
    before = os.stat(host.path("a.img")).st_mtime_ns
    restore(host)
    host.driver.reconcile()
    assert is_immutable(host.path("a.img"))
    assert os.stat(host.path("a.img")).st_mtime_ns == before
    assert f"event=left-immutable domain=x uuid={UUID} domid=7 path={host.path('a.img')}" in caplog.text


def test_of_two_files_that_were_marked_for_one_slot_the_domain_has_both(host: Host) -> None:
    """Somebody moved its file aside, put another in its place, and defined it again, with an earlier version."""
    host.define("a.img", data=SECRET)
    (item,) = host.record().allocations
    host.driver.ledger.store(UUID, "x", 512 * MIB, [replace(item, identity=None)])
    os.rename(host.path("a.img"), host.path("z.img"))
    Path(host.path("a.img")).write_bytes(bytes(SIZE))
    host.define("a.img")
    assert repair(host) == []
    assert slots(host) == {0: "a.img", 256: "z.img"}
    assert host.read("z.img").startswith(SECRET)


@pytest.mark.parametrize("running", [False, True])
def test_what_a_domain_has_outside_the_pools_keeps_its_slot(host: Host, running: bool) -> None:
    """An older file of the domain has a mark of the same slot: its removal was interrupted."""
    for name in ("in", "out"):
        os.mkdir(host.path(name))
    pool = Pool("main", "fsdax", (host.path("in"),), None, SUPERPAGE, 128 * KIB, False)
    host.pools = Pools([pool], any_path=True)
    host.driver = host.another()
    host.driver.define(host.domain("in/old.img"))
    mark = host.mark("in/old.img")
    host.define("out/new.img")
    if running:
        start(host, UUID, 7, "out/new.img")
    os.setxattr(host.path("in/old.img"), "trusted.nvdimm_driver.owner", mark or b"")
    if running:
        (found,) = repair(host)
        assert (found.mend, found.remedy) == (None, "shut domain x down first")
        assert slots(host) == {0: "new.img"}
        host.mapper.alive.clear()
        host.driver.reconcile()
    assert repair(host) == []
    assert slots(host) == {0: "new.img", 256: "old.img"}


def test_what_only_a_mark_knows_is_written_into_the_lost_ledger_before_a_define_can_replace_it(host: Host) -> None:
    back_up(host)
    spec = NvdimmSpec(1, host.path("a.img"), SIZE, MIB)
    had = replace(host.domain("a.img"), nvdimms=(spec,))
    host.driver.define(had)
    mark = host.mark("a.img")
    restore(host)
    others: dict[str, Any] = {"slot": 0, "label_size": 2 * MIB, "size": SIZE // 2, "alignsize": 2 * MIB}
    for other in (replace(spec, **{name: value}) for name, value in others.items()):
        for work in (host.driver.define, host.driver.prepare):
            with pytest.raises(InUseError, match=r"a\.img: by its mark, it is the domain's NVDIMM in slot 1") as caught:
                work(replace(had, nvdimms=(other,)))
            assert caught.value.hint.endswith(f"nvdimmctl check --repair {host.path('a.img')}")
    assert host.mark("a.img") == mark
    assert host.driver.ledger.find_domain(UUID) is None
    assert repair(host) == []
    assert [item.spec for item in host.record().allocations] == [spec]


@pytest.mark.parametrize("way", ["define", "prepare"])
def test_a_guest_has_the_base_in_its_mark_though_the_ledger_was_lost(host: Host, way: str) -> None:
    """The base is no multiple of 2 MiB, as an earlier version chose it: it is in no XML."""
    back_up(host)
    had = replace(host.domain("a.img"), nvdimms=(NvdimmSpec(1, host.path("a.img"), SIZE, MIB),))
    host.driver.define(replace(had, nvdimms=(replace(had.nvdimms[0], base=0x11_0020_1000),)))
    host.driver.define(had)
    restore(host)
    getattr(host.driver, way)(had)
    assert [(item.spec, item.base) for item in host.record().allocations] == [(had.nvdimms[0], 0x11_0020_1000)]


def test_a_lost_ledger_gets_what_a_guest_has_and_what_its_domain_was_defined_with_since(host: Host) -> None:
    """Both files say slot 0: a frozen file keeps its mark."""
    back_up(host)
    host.define("b.img", data=SECRET)
    start(host, UUID, 7, "b.img")
    host.define("a.img")
    restore(host)
    assert repair(host) == []
    assert slots(host) == {0: "b.img", 256: "a.img"}
    record = host.record()
    assert record.start
    assert (record.start.domid, record.start.paths) == (7, (host.path("b.img"),))
    assert is_immutable(host.path("b.img"))
    assert host.read("b.img").startswith(SECRET)


def test_what_a_definition_gives_up_while_its_guest_runs_is_not_claimed_again(host: Host) -> None:
    """Its mark stays as long as it is frozen."""
    host.driver.define(host.domain("a.img"))
    start(host, UUID, 7)
    host.driver.define(host.domain("b.img"))
    assert host.mark("a.img")
    assert repair(host) == []
    assert slots(host) == {0: "b.img"}
    host.mapper.alive.clear()
    host.driver.reconcile()
    assert host.mark("a.img") is None


@pytest.mark.parametrize("made_again", [True, False])
def test_what_was_moved_with_its_pool_is_not_given_up(host: Host, made_again: bool) -> None:
    """The pool's folder was renamed, or another folder is mounted there; the file system of both is the same."""
    os.mkdir(host.path("pool"))
    main = Pool("main", "fsdax", (host.path("pool"),), None, SUPERPAGE, 128 * KIB, False)
    host.pools = Pools([main])
    host.driver = host.another()
    host.define("pool/a.img", data=SECRET)
    before = host.record().allocations
    os.rename(host.path("pool"), host.path("pool.old"))
    if made_again:
        os.mkdir(host.path("pool"))
    left = repair(host)
    assert any(("under another name" if made_again else "its folder is not there") in each.problem for each in left)
    with pytest.raises(BackingError):
        host.driver.release_claims(host.record(), quiet, delete=True)
    assert host.record().allocations == before
    if made_again:
        os.rmdir(host.path("pool"))
    os.rename(host.path("pool.old"), host.path("pool"))
    assert look(host.driver) == []
    assert host.read("pool/a.img").startswith(SECRET)


def test_a_file_that_was_deleted_is_given_up_on_demand(host: Host) -> None:
    """Its file system says that it has it no more; another file may have its inode by now."""
    host.define("a.img")
    os.unlink(host.path("a.img"))
    Path(host.path("other")).write_bytes(b"")
    (left,) = repair(host)
    assert (left.path, left.mend) == (host.path("a.img"), None)
    assert [item.ready for item in host.record().allocations] == [True]
    repair(host, zeros=[host.path("a.img")])
    assert [item.ready for item in host.record().allocations] == [False]


def test_the_deleted_file_of_a_guest_that_runs_is_not_given_up(host: Host) -> None:
    host.define("a.img")
    start(host, UUID, 7)
    run("chattr", "-i", host.path("a.img"))
    os.unlink(host.path("a.img"))
    for zeros in ((), (host.path("a.img"),)):
        (found,) = [each for each in repair(host, zeros) if each.path == host.path("a.img")]
        assert found.mend is None
        assert found.remedy == "before domain x is shut down, copy its data from within the guest, which has it still"
    assert [item.ready for item in host.record().allocations] == [True]


def test_nothing_of_a_folder_that_was_moved_is_given_up(host: Host) -> None:
    os.mkdir(host.path("folder"))
    host.driver.define(host.domain("folder/a.img"))
    before = host.record().allocations
    os.rename(host.path("folder"), host.path("elsewhere"))
    os.unlink(host.path("elsewhere/a.img"))  # else it would be moved back
    (left,) = repair(host)
    assert left.problem == "its folder is not there"
    assert "put it back where it was" in left.remedy
    assert host.record().allocations == before


def test_the_end_of_an_old_start_keeps_the_mark_of_what_was_given_back_since(host: Host) -> None:
    """The backup was made while x ran with a file that its definition did not have; since then it has it again."""
    host.driver.define(host.domain("a.img"))
    start(host, UUID, 7)
    host.driver.define(host.domain("b.img"))
    back_up(host)
    host.mapper.alive.clear()
    host.driver.reconcile()
    host.define("a.img", UUID, SECRET)
    restore(host)
    host.driver.reconcile()
    with pytest.raises(InUseError, match="has the mark of domain"):
        host.driver.define(host.domain("a.img", OTHER_UUID))
    repair(host)
    assert host.path("a.img") in [item.spec.path for item in host.record().allocations]


def test_the_end_of_an_old_start_keeps_the_mark_of_what_its_start_had_and_the_domain_has_again(host: Host) -> None:
    """In the backup, the domain has given it up: its mark was to go at the end of the start. It came back since."""
    host.driver.define(host.domain("a.img"))
    host.driver.prepare(host.domain("a.img"))
    host.driver.define(host.domain("b.img"))
    back_up(host)
    host.driver.release(UUID)
    assert host.mark("a.img") is None
    host.driver.define(host.domain("a.img"))
    host.driver.prepare(host.domain("a.img"))
    restore(host)
    host.driver.release(UUID)
    assert repair(host) == []
    assert host.path("a.img") in {item.spec.path for item in host.record().allocations}
    with pytest.raises(InUseError, match=r"a\.img belongs to domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))


def test_what_a_domain_was_given_back_while_its_guest_had_it_is_its_own_by_its_definition(host: Host) -> None:
    """The file was frozen all the time, and has no later mark. In the backup, the end of the guest takes the mark."""
    host.define("a.img")
    start(host, UUID, 7)
    host.driver.define(host.domain("b.img"))
    back_up(host)
    host.driver.define(host.domain("a.img"))
    restore(host)
    _repair(lambda: look(host.driver, lambda uuid: host.domain("a.img") if uuid == UUID else None))
    host.mapper.alive.clear()
    host.mapper.announce(7, ())
    host.driver.reconcile()
    assert host.path("a.img") in {item.spec.path for item in host.record().allocations}
    with pytest.raises(InUseError, match=r"a\.img belongs to domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))


@pytest.mark.parametrize("change", ["label", "base", "grown"])
def test_a_repair_takes_a_later_change_from_the_mark(host: Host, change: str) -> None:
    """The domain was defined again since the backup; before, the repair wrote the old state over the mark."""
    host.driver.define(host.domain("a.img"))
    back_up(host)
    spec = host.domain("a.img").nvdimms[0]
    if change == "label":
        spec = replace(spec, label_size=128 * KIB)
    elif change == "base":
        spec = replace(spec, base=HIGH)
    else:
        spec = replace(spec, size=2 * SIZE)
        run("fallocate", "-l", str(2 * SIZE), host.path("a.img"))
    domain = replace(host.domain("a.img"), nvdimms=(spec,))
    host.driver.define(domain)
    (changed,) = host.record().allocations
    mark = host.mark("a.img")
    restore(host)
    (found,) = look(host.driver)
    assert found.problem == "its mark is later than the ledger, which is from a backup"
    assert repair(host) == []
    assert host.record().allocations == (changed,)
    assert owner_marks.unpack("", host.mark("a.img") or b"").spec == owner_marks.unpack("", mark or b"").spec
    host.driver.prepare(domain)
    host.driver.release(UUID)


def test_the_end_of_a_guest_keeps_a_mark_that_is_later_than_the_ledger(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    host.run(host.domain("a.img"))
    back_up(host)
    host.mapper.alive.clear()
    host.driver.release(UUID)
    host.driver.define(host.domain("a.img", label_size=128 * KIB))
    mark = host.mark("a.img")
    restore(host)
    host.driver.release(UUID)
    assert host.mark("a.img") == mark
    assert repair(host) == []
    assert host.record().allocations[0].spec.label_size == 128 * KIB


@pytest.mark.parametrize("lost", ["hole", "end"])
def test_a_repair_makes_no_zeros_of_what_a_later_mark_says_and_is_not_there(host: Host, lost: str) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    domain = host.domain("a.img", label_size=128 * KIB)
    host.driver.define(domain)
    if lost == "hole":
        run("fallocate", "-p", "-o", "0", "-l", str(MIB), host.path("a.img"))
    else:
        os.truncate(host.path("a.img"), SIZE - MIB)
    mark = host.mark("a.img")
    restore(host)
    (found,) = repair(host)
    assert ("is sparse" if lost == "hole" else "a part is not there") in found.problem
    assert found.mend is None
    assert host.mark("a.img") == mark


def test_a_repair_takes_a_later_base_from_the_mark_of_a_file_that_was_left_frozen(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    placed = replace(host.domain("a.img").nvdimms[0], base=HIGH)
    host.driver.define(replace(host.domain("a.img"), nvdimms=(placed,)))
    host.driver.prepare(replace(host.domain("a.img"), nvdimms=(placed,)))
    restore(host)
    assert repair(host) == []
    assert host.record().allocations[0].base == HIGH
    assert not is_immutable(host.path("a.img"))


def test_bases_that_were_exchanged_since_are_taken_from_both_marks(host: Host) -> None:
    specs = [NvdimmSpec(slot, host.path(name), SIZE) for slot, name in enumerate(("a.img", "b.img"))]
    domain = replace(host.domain("a.img"), nvdimms=tuple(specs))
    host.driver.define(domain)
    back_up(host)
    first, second = host.record().allocations
    assert second.base is not None
    host.driver.define(replace(domain, nvdimms=(replace(specs[0], base=second.base), replace(specs[1], base=HIGH))))
    bases = [item.base for item in host.record().allocations]
    restore(host)
    assert repair(host) == []
    assert [item.base for item in host.record().allocations] == bases != [first.base, second.base]


def test_a_mark_that_is_older_than_the_ledger_is_written_anew(host: Host) -> None:
    """A define was killed before it marked the file."""
    host.driver.define(host.domain("a.img"))
    before = host.mark("a.img")
    host.driver.define(host.domain("a.img", label_size=128 * KIB))
    with open(host.path("a.img"), "rb") as file:
        inode.mark(file.fileno(), before)
    (found,) = look(host.driver)
    assert found.remedy == "write its mark"
    assert repair(host) == []
    assert host.record().allocations[0].spec.label_size == 128 * KIB


def test_a_repair_gives_a_domain_what_it_has_instead_of_what_another_has_since(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.driver.define(replace(host.domain("b.img"), nvdimms=(NvdimmSpec(1, host.path("b.img"), SIZE),)))
    host.define("a.img", OTHER_UUID, SECRET)
    restore(host)
    assert repair(host) == []
    assert [item.spec.path for item in host.record().allocations] == [host.path("b.img")]
    assert [item.spec.path for item in host.record(OTHER_UUID).allocations] == [host.path("a.img")]


# --- what was changed since it was seen ---


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_repair_moves_back_only_what_was_looked_at(host: Host, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's owner gives the name to another file; before, that was moved, and could be another domain's."""
    host.define("a.img")
    os.rename(host.path("a.img"), host.path("b.img"))
    (found,) = look(host.driver)
    assert found.mend

    def exchange() -> None:
        os.rename(host.path("b.img"), host.path("c.img"))
        Path(host.path("b.img")).write_bytes(SECRET)

    if when == "before":
        exchange()
    else:
        rename = Entry.rename_new

        def rename_late(self: Entry, target: Entry) -> None:
            monkeypatch.setattr(Entry, "rename_new", rename)
            exchange()
            rename(self, target)

        monkeypatch.setattr(Entry, "rename_new", rename_late)
    with pytest.raises(BackingError):
        found.mend()
    assert not os.path.exists(host.path("a.img"))
    assert Path(host.path("b.img")).read_bytes() == SECRET
    assert repair(host) == []
    assert host.read("a.img")[: len(DATA)] == DATA


@pytest.mark.parametrize("before", ["gone", "another", "unmarked"])
def test_a_repair_does_nothing_to_a_domain_that_was_redefined_since_it_looked(host: Host, before: str) -> None:
    host.define("a.img")
    if before == "unmarked":
        os.removexattr(host.path("a.img"), "trusted.nvdimm_driver.owner")
    else:
        os.unlink(host.path("a.img"))
    if before == "another":
        Path(host.path("a.img")).write_bytes(DATA)
    found = look(host.driver, zeros=[host.path("a.img")])
    other = host.another()
    with other.locks.changing(UUID):
        other.define(host.domain("b.img"))
    (mend,) = [each.mend for each in found if each.mend]
    with pytest.raises(InUseError, match="was changed meanwhile"):
        mend()
    assert [item.spec.path for item in host.record().allocations] == [host.path("b.img")]


def test_a_repair_waits_for_a_define_that_is_under_way_and_keeps_what_it_wants(host: Host) -> None:
    host.define("a.img")
    os.unlink(host.path("a.img"))
    (found,) = look(host.driver, zeros=[host.path("a.img")])
    assert found.mend
    other = host.another()
    host.driver.locks.seconds = 0
    with other.locks.changing(UUID):
        other.ledger.begin_define(host.domain("big.img"), lambda: None)
        with pytest.raises(InUseError, match="is being defined"):
            found.mend()
        assert [item.spec.path for item in host.record().intents] == [host.path("big.img")]
        with pytest.raises(InUseError, match="belongs to domain x"):
            host.another().check(host.domain("big.img", OTHER_UUID))


def test_a_repair_keeps_the_mark_of_a_copy_that_a_domain_was_given_since_it_looked(host: Host) -> None:
    host.define("a.img")
    Path(host.path("copy.img")).write_bytes(DATA)
    os.setxattr(host.path("copy.img"), "trusted.nvdimm_driver.owner", host.mark("a.img") or b"")
    (found,) = look(host.driver)
    assert found.mend
    assert found.remedy == "remove the mark"
    host.another().define(host.domain("copy.img", OTHER_UUID))
    with pytest.raises(InUseError, match="belongs to domain y"):
        found.mend()
    assert OTHER_UUID.encode() in (host.mark("copy.img") or b"")


def lost_ledger(host: Host) -> str:
    """Let only the mark know whose a.img is."""
    back_up(host)
    host.define("a.img")
    restore(host)
    return "a.img"


def replaced(host: Host) -> str:
    host.define("a.img")
    os.unlink(host.path("a.img"))
    Path(host.path("a.img")).write_bytes(SECRET * (SIZE // len(SECRET)))
    return "a.img"


def given_since(host: Host) -> str:
    redefined_since(host)
    return "b.img"


def interrupted(host: Host) -> str:
    """Let a define that was killed want a file that exists."""
    Path(host.path("a.img")).write_bytes(DATA)
    host.driver.ledger.store(UUID, "x", 512 * MIB, [Allocation(UUID, host.domain("a.img").nvdimms[0])])
    return "a.img"


def lost_bytes(host: Host) -> str:
    host.define("a.img")
    os.truncate(host.path("a.img"), SIZE // 2)
    return "a.img"


@pytest.mark.parametrize("there", ["nothing", "another"])
@pytest.mark.parametrize("prepare", [lost_ledger, replaced, given_since, interrupted, lost_bytes])
def test_a_repair_takes_only_the_file_that_was_looked_at(
    host: Host, prepare: Callable[[Host], str], there: str
) -> None:
    """It is moved after the look: no zeros, and no other file, become the domain's."""
    name = prepare(host)
    (found,) = [each for each in look(host.driver, zeros=[host.path(name)]) if each.path == host.path(name)]
    assert found.mend
    before, content, mark = host.driver.ledger.find_domain(UUID), host.read(name), host.mark(name)
    os.rename(host.path(name), host.path("moved.img"))
    if there == "another":
        Path(host.path(name)).write_bytes(bytes(SIZE))
    with pytest.raises(InUseError, match="was changed meanwhile"):
        found.mend()
    assert host.driver.ledger.find_domain(UUID) == before
    assert (host.read("moved.img"), host.mark("moved.img")) == (content, mark)
    assert os.path.exists(host.path(name)) == (there == "another")
    assert there == "nothing" or host.mark(name) is None


@pytest.mark.parametrize("moment", ["is_shared", "_complete", "_fill"])
def test_a_repair_gives_nobody_a_file_with_the_mark_of_another(
    host: Host, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger is lost. The owner of the folder exchanges the names while his own file is provisioned."""
    os.mkdir(host.path("g"))
    back_up(host)
    host.define("g/v.img")
    Path(host.path("g/a.img")).write_bytes(bytes(SIZE))
    host.driver.define(host.domain("g/a.img", OTHER_UUID))
    run("fallocate", "-z", "-o", "0", "-l", str(SIZE // 2), host.path("g/a.img"))
    mark = owner(host, "g/v.img")
    restore(host)
    work = getattr(FsdaxBacking, moment)

    def exchanged(self: FsdaxBacking, *rest: Any) -> Any:
        if not os.path.exists(host.path("g/z.img")):
            os.rename(host.path("g/a.img"), host.path("g/z.img"))
            os.rename(host.path("g/v.img"), host.path("g/a.img"))
        return work(self, *rest)

    monkeypatch.setattr(FsdaxBacking, moment, exchanged)
    repair(host)
    monkeypatch.undo()
    assert os.path.exists(host.path("g/z.img"))
    assert (host.read("g/a.img"), owner(host, "g/a.img")) == (DATA, mark)
    record = host.driver.ledger.find_domain(OTHER_UUID)
    inode = os.stat(host.path("g/a.img")).st_ino
    assert not any(item.identity and item.identity.inode == inode for item in (record.allocations if record else ()))
    with pytest.raises(NvdimmError):
        host.driver.prepare(host.domain("g/a.img", OTHER_UUID))


def test_a_start_makes_no_zeros_of_a_file_that_is_moved_meanwhile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is lost, and the start takes over what its definition has."""
    lost_ledger(host)
    plan_define = Planner.plan_define

    def moved(self: Planner, *rest: Any, **more: Any) -> Any:
        plan = plan_define(self, *rest, **more)
        os.rename(host.path("a.img"), host.path("b.img"))
        return plan

    monkeypatch.setattr(Planner, "plan_define", moved)
    with pytest.raises(BackingError, match=r"a\.img: is not there any more"):
        host.driver.prepare(host.domain("a.img"))
    assert not os.path.exists(host.path("a.img"))
    assert host.read("b.img") == DATA


# --- ledgers that are replaced ---


def conf(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the options for the ledger; the driver is that of the host."""
    monkeypatch.setattr(driver_module, "load_driver", lambda conf: host.another())
    return SimpleNamespace(state_dir=str(host.folder))


def test_of_two_repairs_at_once_one_replaces_the_damaged_ledger(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has found the damage, too; the first has done all of its work before the second renames."""
    host.define("a.img")
    host.driver.ledger.close()
    (host.folder / "ledger.sqlite").write_bytes(b"scribble" * 4096)
    options, rename = conf(host, monkeypatch), database.set_aside

    def late(path: str, number: int | None) -> str | None:
        monkeypatch.setattr(database, "set_aside", rename)
        first, done = check._open(options, repair=True)
        assert done
        _repair(lambda: look(first))
        with first.locks.changing(OTHER_UUID):
            first.ledger.begin_define(host.domain("b.img", OTHER_UUID), lambda: None)
        first.ledger.close()
        return rename(path, number)

    monkeypatch.setattr(database, "set_aside", late)
    second, done = check._open(options, repair=True)
    assert done == []
    assert {record.uuid for record in second.ledger.domains()} == {UUID, OTHER_UUID}
    assert len([*host.folder.glob("ledger.sqlite.damaged-*")]) == 1


def test_a_define_fails_whose_ledger_was_replaced_meanwhile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would know of its claims: they are in the file that was renamed."""
    create = host.backing.create

    def replaced(spec: NvdimmSpec, *rest: Any) -> BackingIdentity:
        path = str(host.folder / "ledger.sqlite")
        assert database.set_aside(path, database.file_number(path))
        host.another().define(host.domain("b.img", OTHER_UUID))
        return create(spec, *rest)

    monkeypatch.setattr(host.backing, "create", replaced)
    with pytest.raises(LedgerError, match="was replaced by another process"):
        host.driver.define(host.domain("a.img"))
    monkeypatch.undo()
    host.driver = host.another()
    assert repair(host) == []
    assert host.driver.ledger.find_domain(OTHER_UUID)


# --- guests that were started since ---


@pytest.mark.parametrize("backup", ["running", "prepared"])
def test_the_guest_of_a_later_start_keeps_its_frozen_file_its_holder_and_its_claim(host: Host, backup: str) -> None:
    host.driver.define(host.domain("a.img"))
    if backup == "running":
        start(host, UUID, 7)
    else:
        host.driver.prepare(host.domain("a.img"))
        host.driver.starts.abandoned_seconds = 0
    back_up(host)
    host.mapper.alive.clear()
    host.driver.starts.abandoned_seconds = 0
    host.driver.reconcile()
    start(host, UUID, 8)
    restore(host)
    host.driver.starts.abandoned_seconds = 0
    host.driver.reconcile()
    host.driver.restart_lost()
    assert is_immutable(host.path("a.img"))
    assert host.driver.starts.holders.held() == {UUID}
    with pytest.raises(InUseError):
        host.driver.release_claims(host.record(), quiet, delete=True)
    with pytest.raises(InUseError, match="as domid 8"):
        host.driver.prepare(host.domain("a.img"))
    assert "its guest runs with domid 8" in look(host.driver)[0].problem
    assert repair(host) == []
    record = host.record()
    assert record.start
    assert (record.start.domid, record.start.paths) == (8, (host.path("a.img"),))
    host.mapper.alive.clear()
    host.driver.reconcile()
    assert not is_immutable(host.path("a.img"))


def make_mutable(host: Host, name: str) -> None:
    """Do what put a start away that was not over."""
    run("chattr", "-i", host.path(name))
    os.removexattr(host.path(name), "trusted.nvdimm_driver.frozen")


def test_a_guest_that_the_ledger_does_not_know_is_found_by_its_frames(host: Host) -> None:
    """Nothing of its file shows it: that is mutable, and the ledger has no start."""
    host.driver.define(host.domain("a.img"))
    back_up(host)
    start(host, UUID, 7)
    restore(host)
    make_mutable(host, "a.img")
    (found,) = look(host.driver)
    assert found.problem == "its guest runs with domid 7 and has NVDIMMs, and the ledger has no start of it"
    assert repair(host) == []
    record = host.record()
    assert record.start
    assert (record.start.domid, record.start.paths) == (7, (host.path("a.img"),))
    assert is_immutable(host.path("a.img"))


def test_a_guest_of_which_nothing_is_known_is_named(host: Host) -> None:
    host.define("a.img")
    start(host, UUID, 7)
    make_mutable(host, "a.img")
    os.removexattr(host.path("a.img"), "trusted.nvdimm_driver.owner")
    host.driver.ledger.forget(UUID)
    (found,) = look(host.driver)
    assert (found.domain, found.mend) == (UUID, None)
    assert found.remedy == "shut it down: xl shutdown 7; nobody knows which it has"


def test_the_frames_of_a_guest_that_the_version_before_has_started_are_announced(host: Host) -> None:
    """So a ledger from a backup finds the guest, and nothing of it is given up."""
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.mapper.alive[7] = UUID
    host.driver.prepare(host.domain("a.img"))
    map_prepared(host.driver.ledger, 7)
    host.driver.restart_lost()
    (start,) = [each.start for each in host.driver.ledger.started_domains() if each.start]
    mapped = [(mfn, count) for _, mfn, count in host.driver.ledger.mappings_of(start)]
    assert mapped
    assert host.mapper.announced == {7: mapped}
    restore(host)
    with pytest.raises(InUseError, match="domid 7"):
        host.driver.forget(UUID)
    assert host.record().allocations


def test_the_frames_of_a_guest_that_a_repair_takes_up_are_announced(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.mapper.alive[7] = UUID
    host.driver.prepare(host.domain("a.img"))
    map_prepared(host.driver.ledger, 7)
    restore(host)
    assert repair(host) == []
    assert host.mapper.announced[7]


@pytest.mark.parametrize("delete", [True, False])
def test_nothing_of_a_guest_is_released_that_the_ledger_does_not_know_to_run(host: Host, delete: bool) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    start(host, UUID, 8)
    restore(host)
    with pytest.raises(InUseError, match="domid 8"):
        host.driver.release_claims(host.record(), quiet, delete=delete)
    assert host.record().allocations
    assert os.path.exists(host.path("a.img"))


def test_a_hint_releases_nothing_of_a_domain_that_has_the_name_by_now(host: Host) -> None:
    """The ledger was lost: only the mark knows the domain, and its name of that time."""
    third = "7c7b0e2e-4a6e-4f0e-9a3b-000000000003"
    back_up(host)
    host.driver.define(host.domain("a.img"))
    restore(host)
    host.driver.define(replace(host.domain("b.img", OTHER_UUID), name="x"))
    with pytest.raises(InUseError) as caught:
        host.driver.define(replace(host.domain("a.img", third), name="third"))
    assert f"nvdimmctl release --slot 0 {UUID}" in caught.value.hint


# --- saved guests ---


def boots(host: Host, domid: int, image: dict[int, bytes] | None = None) -> None:
    """Start a domain with a file; its guest boots, or goes on from an image of its memory."""
    driver = host.another()
    driver.prepare(host.domain("a.img"))
    host.mapper.alive[domid] = UUID
    if image is not None:
        host.mapper.memory[domid] = dict(image)
    is_restored = image is not None
    prepare = driver.prepare_known
    attach(domid, driver.ledger, host.mapper, str(host.folder), prepare, lambda *_: None, restored=is_restored)
    if not is_restored:
        host.mapper.boot(domid)


def ends(host: Host, domid: int) -> None:
    del host.mapper.alive[domid]
    host.another().release(UUID)


def put_back(host: Host) -> None:
    """Rename the copy to the ledger's name, which is noticed."""
    host.driver.ledger.close()
    for each in host.folder.glob("ledger.sqlite*"):
        each.unlink()
    (host.folder / "backup").rename(host.folder / "ledger.sqlite")


@pytest.mark.parametrize("runs", [False, True], ids=["has ended", "runs"])
@pytest.mark.parametrize("since", ["restored", "booted"])
def test_a_guest_that_was_saved_since_the_backup_goes_on_once(host: Host, runs: bool, since: str) -> None:
    """The ledger has the start of the guest that was saved, and the next one of the domain is what ends."""
    host.driver.define(host.domain("a.img"))
    boots(host, 5)
    back_up(host)
    image = dict(host.mapper.memory[5])
    ends(host, 5)
    boots(host, 6, image if since == "restored" else None)
    put_back(host)
    if runs:
        host.another().distrust_saved_guests()
    ends(host, 6)
    host.another().distrust_saved_guests()
    with pytest.raises(RefusedError):
        boots(host, 7, image)


def test_a_guest_that_was_saved_at_the_backup_goes_on_once(host: Host) -> None:
    """The ledger has no start of the guest that has ended since: the file is immutable still, and has its time."""
    host.driver.define(host.domain("a.img"))
    boots(host, 5)
    image = dict(host.mapper.memory[5])
    ends(host, 5)
    back_up(host)
    boots(host, 6, image)
    put_back(host)
    ends(host, 6)
    with pytest.raises(RefusedError):
        boots(host, 7, image)


def test_a_guest_that_is_saved_with_a_ledger_from_a_backup_goes_on(host: Host) -> None:
    """It runs as the ledger says, and was asked before it ended."""
    host.driver.define(host.domain("a.img"))
    boots(host, 5)
    back_up(host)
    put_back(host)
    host.another().distrust_saved_guests()
    image = dict(host.mapper.memory[5])
    ends(host, 5)
    boots(host, 6, image)
