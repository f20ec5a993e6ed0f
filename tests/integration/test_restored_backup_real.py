# SPDX-License-Identifier: Apache-2.0
"""A file that was lost and comes from a backup is taken by a repair, with all its bytes; on real ext4 and XFS."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import MIB, NvdimmSpec
from nvdimm_driver.pools.rules import Pools
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, quiet
from tests.unit.doubles import OTHER_UUID


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem], tmp_path: Path) -> Iterator[Host]:
    """Return a host with a domain, and a backup of its file in the ordinary way."""
    host = Host(tmp_path, file_systems[request.param])
    host.define("a.img", data=b"of the guest" * 1000)
    host.driver.exporter.export(
        NvdimmSpec(0, host.path("a.img"), SIZE), backup(host), quiet, overwrite=False, running=False
    )
    yield host
    empty(file_systems[request.param])


def backup(host: Host) -> str:
    return str(host.folder / "backup")


def repair(host: Host, zeros: Collection[str] = ()) -> list[tuple[Inconsistency, str]]:
    return _repair(lambda: look(host.driver, zeros=zeros))


def start(host: Host) -> None:
    host.mapper.alive[7] = host.record().uuid
    host.driver.prepare(host.domain("a.img"))


@pytest.mark.parametrize("new", [True, False], ids=["a new file", "the same file"])
@pytest.mark.parametrize("way", ["sparse", "unwritten", "written"])
def test_a_repair_takes_what_was_copied_from_a_backup(host: Host, way: str, new: bool) -> None:
    before = host.read("a.img")
    (had,) = host.record().allocations
    if new:
        os.unlink(host.path("a.img"))
    run("cp", f"--sparse={'never' if way == 'written' else 'always'}", backup(host), host.path("a.img"))
    if way == "unwritten":
        run("fallocate", "-l", str(SIZE), host.path("a.img"))
    if way != "written":
        with pytest.raises(BackingError):
            start(host)
    rows = repair(host)
    if way != "written" and not new:  # it looks as if its end was lost
        (found,) = look(host.driver)
        assert found.mend is None
        rows += repair(host, zeros=[found.path])
    assert look(host.driver) == [], rows
    assert host.read("a.img") == before
    (has,) = host.record().allocations
    assert (has.spec, has.base) == (had.spec, had.base)
    assert host.mark("a.img")
    start(host)


@pytest.mark.parametrize("sparse", ["always", "never"])
def test_a_repair_takes_a_backup_that_comes_after_one_that_has_given_the_file_up(host: Host, sparse: str) -> None:
    before = host.read("a.img")
    (had,) = host.record().allocations
    os.unlink(host.path("a.img"))
    repair(host, zeros=[host.path("a.img")])
    (left,) = look(host.driver)
    assert "is not provisioned" in left.problem
    run("cp", f"--sparse={sparse}", backup(host), host.path("a.img"))
    rows = repair(host)
    assert look(host.driver) == [], rows
    assert host.read("a.img") == before
    assert host.record().allocations[0].base == had.base
    start(host)


def test_another_domains_file_is_not_taken_for_one_that_was_given_up(host: Host) -> None:
    host.define("b.img", OTHER_UUID)
    os.unlink(host.path("a.img"))
    repair(host, zeros=[host.path("a.img")])
    os.rename(host.path("b.img"), host.path("a.img"))
    before = host.read("a.img")
    repair(host)
    assert look(host.driver)[0].path == host.path("a.img")
    assert not os.path.exists(host.path("a.img"))
    assert host.read("b.img") == before
    assert host.record(OTHER_UUID).allocations[0].spec.path == host.path("b.img")


def test_a_file_of_that_name_on_another_file_system_is_left_alone(host: Host) -> None:
    """The pool's own is not mounted."""
    run("mount", "-t", "tmpfs", "none", host.fs.root)
    try:
        run("cp", "--sparse=always", backup(host), host.path("a.img"))
        allocated = os.stat(host.path("a.img")).st_blocks
        repair(host)
        assert os.stat(host.path("a.img")).st_blocks == allocated
        assert look(host.driver)
    finally:
        run("umount", host.fs.root)
    assert look(host.driver) == []


def test_the_file_of_a_guest_that_runs_is_not_repaired(host: Host) -> None:
    """Root has taken the flag away, and punched a hole."""
    start(host)
    run("chattr", "-i", host.path("a.img"))
    run("fallocate", "--punch-hole", "-o", str(SIZE // 2), "-l", str(1 << 20), host.path("a.img"))
    (found,) = [each for each in look(host.driver) if "sparse" in each.problem]
    assert (found.remedy, found.mend) == ("shut domain x down first", None)


@pytest.mark.parametrize("given_up", [False, True], ids=["at once", "after a repair"])
def test_a_backup_in_the_same_file_system_is_taken_though_cp_makes_a_reflink(host: Host, given_up: bool) -> None:
    """As cp of coreutils 9 does on XFS; the backup keeps its bytes when the guest writes."""
    before = host.read("a.img")
    run("cp", host.path("a.img"), host.path("a.bak"))
    os.unlink(host.path("a.img"))
    if given_up:
        repair(host, zeros=[host.path("a.img")])
    run("cp", host.path("a.bak"), host.path("a.img"))
    rows = repair(host)
    assert look(host.driver) == [], rows
    assert host.read("a.img") == before
    with open(host.path("a.img"), "r+b") as file:
        file.write(b"new")
    assert host.read("a.bak") == before
    start(host)


def cut(host: Host) -> None:
    """Put half of the backup in the place of the file, as a copy that broke off does."""
    os.unlink(host.path("a.img"))
    run("sh", "-c", f"head -c {SIZE // 2} {backup(host)} >{host.path('a.img')}")


@pytest.mark.parametrize("given_up", [False, True], ids=["at once", "after a repair"])
def test_a_copy_that_broke_off_is_to_be_copied_again(host: Host, given_up: bool) -> None:
    before = host.read("a.img")
    if given_up:
        os.unlink(host.path("a.img"))
        repair(host, zeros=[host.path("a.img")])
        Path(host.path("a.img")).touch()
    cut(host)
    (found,) = look(host.driver)
    assert found.mend is None
    assert found.remedy.startswith("copy a backup over it")
    for act in (lambda: start(host), lambda: host.driver.define(host.domain("a.img"))):
        with pytest.raises(BackingError) as refused:
            act()
        assert "nvdimmctl check" in refused.value.hint
        assert "larger" not in refused.value.hint
    assert repair(host) == []
    run("cp", "--sparse=never", backup(host), host.path("a.img"))
    repair(host)
    assert look(host.driver) == []
    assert host.read("a.img") == before
    start(host)


def test_a_copy_that_broke_off_gets_zeros_on_demand(host: Host) -> None:
    before = host.read("a.img")
    cut(host)
    repair(host, zeros=[host.path("a.img")])
    assert look(host.driver) == []
    assert host.read("a.img") == before[: SIZE // 2] + bytes(SIZE // 2)
    (lost,) = [each for each in host.driver.ledger.events() if each.kind == "bytes-lost"]
    assert (lost.detail["bytes"], lost.detail["first"]) == (SIZE // 2, hex(SIZE // 2))


def test_an_empty_file_in_the_place_of_one_that_was_moved_is_not_taken(host: Host) -> None:
    before = host.read("a.img")
    os.rename(host.path("a.img"), host.path("aside.img"))
    Path(host.path("a.img")).touch()
    (found,) = [each for each in look(host.driver, zeros=[host.path("a.img")]) if each.path == host.path("a.img")]
    assert (found.mend, host.path("aside.img") in found.remedy) == (None, True)
    with pytest.raises(BackingError):
        host.driver.define(host.domain("a.img"))
    os.unlink(host.path("a.img"))
    repair(host)
    assert look(host.driver) == []
    assert host.read("a.img") == before


@pytest.mark.parametrize("way", [["fallocate", "-l"], ["truncate", "-s"]], ids=["fallocate", "truncate"])
def test_a_define_takes_no_file_that_was_truncated_and_made_larger_again(host: Host, way: list[str]) -> None:
    (had,) = host.record().allocations
    os.truncate(host.path("a.img"), SIZE // 2)
    run(*way, str(SIZE), host.path("a.img"))
    for ram in (512, 768):  # with more RAM, a start has to adopt what was changed
        with pytest.raises(BackingError) as refused:
            host.driver.define(host.domain("a.img", ram=ram * MIB))
        assert "nvdimmctl check" in refused.value.hint
    host.mapper.alive[7] = host.record().uuid
    with pytest.raises(BackingError) as refused:
        host.driver.prepare(host.domain("a.img", ram=768 * MIB))
    assert "nvdimmctl check" in refused.value.hint
    assert host.record().allocations == (had,)
    assert repair(host) == []
    (found,) = look(host.driver)
    assert found.remedy.startswith("copy a backup over it, if there is one")
    repair(host, zeros=[found.path])
    (replaced,) = [each for each in host.driver.ledger.events() if each.kind == "backing-replaced"]
    assert replaced.detail["zeros"] == SIZE // 2
    start(host)


def test_a_file_that_never_had_more_bytes_is_made_larger_for_a_define(host: Host) -> None:
    """As the guide says; the new end is zeros."""
    before = host.read("a.img")
    run("fallocate", "-l", str(2 * SIZE), host.path("a.img"))
    domain = host.domain("a.img")
    larger = replace(domain, nvdimms=(replace(domain.nvdimms[0], size=2 * SIZE),))
    host.driver.define(larger)
    assert host.read("a.img") == before + bytes(SIZE)
    assert look(host.driver) == []


@pytest.fixture
def renamed(host: Host) -> Host:
    """A host with a domain whose own file has another name in the only pool, and another file has its name."""
    os.mkdir(host.path("g"))
    main = next(iter(host.pools))
    host.pools = Pools([replace(main, paths=(host.path("g"),))])
    host.driver = host.another()
    host.define("g/b.img", OTHER_UUID)
    os.rename(host.path("g/b.img"), host.path("g/own.img"))
    return host


OTHER_FILES: dict[str, Callable[[str], object]] = {
    "written": lambda path: Path(path).write_bytes(b"x" * SIZE),
    "too short": lambda path: Path(path).write_bytes(b"x" * (SIZE // 2)),
    "sparse": lambda path: run("truncate", "-s", str(SIZE), path),
    "unwritten": lambda path: run("fallocate", "-l", str(SIZE), path),
    "a copy": lambda path: run("cp", "-a", path.replace("b.img", "own.img"), path),
}


@pytest.mark.parametrize("other", list(OTHER_FILES))
def test_no_repair_takes_another_file_while_the_domains_own_is_in_a_pool(
    renamed: Host, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder's owner has renamed it, and put one of his own there."""
    host, had = renamed, renamed.record(OTHER_UUID)
    OTHER_FILES[other](host.path("g/b.img"))
    with pytest.raises(BackingError) as caught:
        host.driver.prepare(host.domain("g/b.img", OTHER_UUID))
    assert caught.value.hint == "'nvdimmctl check' says where it is, and how to go on"
    assert "left-immutable" not in caplog.text, "it was never made so"
    repair(host, zeros=[host.path("g/b.img")])
    assert host.record(OTHER_UUID).allocations == had.allocations
    (found,) = [each for each in look(host.driver) if each.path == host.path("g/b.img")]
    assert found.mend is None
    assert found.remedy == (
        f"what was provisioned is {host.path('g/own.img')}: move aside what is here, and repeat this; or, if the guest "
        f"is to go on with what is here, move {host.path('g/own.img')} out of the pools first"
    )
    os.rename(host.path("g/b.img"), host.path("aside.img"))
    repair(host)
    assert look(host.driver) == []
    assert host.record(OTHER_UUID).allocations == had.allocations
    assert host.read("g/b.img") == DATA
    host.driver.prepare(host.domain("g/b.img", OTHER_UUID))


def test_a_repair_takes_another_file_when_the_domains_own_is_in_no_pool_any_more(renamed: Host) -> None:
    host, had = renamed, renamed.record(OTHER_UUID)
    OTHER_FILES["written"](host.path("g/b.img"))
    os.rename(host.path("g/own.img"), host.path("own.img"))
    repair(host)
    assert look(host.driver) == []
    assert host.record(OTHER_UUID).allocations[0].spec == had.allocations[0].spec
    assert host.record(OTHER_UUID).allocations[0].identity != had.allocations[0].identity
    host.driver.prepare(host.domain("g/b.img", OTHER_UUID))
