# SPDX-License-Identifier: Apache-2.0
"""Copies that have a file's mark, as 'cp -a' makes them, when the ledger is lost; on real ext4 and XFS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_marks import unmark_copy
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.errors import InUseError, NotFoundError, NvdimmError, RefusedError
from nvdimm_driver.model import Allocation, Record
from nvdimm_driver.plugins import unwatched
from nvdimm_driver.state import owner_marks
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import SIZE, Host, empty, is_immutable
from tests.unit.doubles import OTHER_UUID, map_prepared


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem], tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, file_systems[request.param])
    host.define("a.img", data=b"old" * 1000)
    yield host
    empty(file_systems[request.param])


def copy_only(host: Host) -> None:
    """Copy the file with its mark, under names before and after its own."""
    for name in ("a.bak", "z.bak"):
        run("cp", "-a", "--sparse=never", "--reflink=never", host.path("a.img"), host.path(name))


def copy(host: Host) -> None:
    """Copy the file with its mark; the guest writes on."""
    copy_only(host)
    with open(host.path("a.img"), "r+b") as file:
        file.write(b"NEW" * 1000)


def lose(host: Host) -> None:
    host.driver.ledger.close()
    for path in host.folder.glob("ledger.sqlite*"):
        path.unlink()
    host.driver = host.another()


def repair(host: Host) -> list[tuple[Inconsistency, str]]:
    return _repair(lambda: look(host.driver))


def as_an_earlier_version_marks(host: Host, name: str) -> None:
    record = host.record()
    with open(host.path(name), "rb") as file:
        inode.mark(file.fileno(), owner_marks.pack(record, _unidentified(record)))


def as_an_earlier_version_freezes(host: Host, name: str) -> None:
    with open(host.path(name), "rb") as file:
        inode.thaw(file.fileno())
        os.setxattr(file.fileno(), "trusted.nvdimm_driver.frozen", b"")
        inode._set_immutable(file.fileno(), True)


def _unidentified(record: Record) -> Allocation:
    (item,) = record.allocations
    return Allocation(item.uuid, item.spec, None, item.base, item.written)


def test_a_lost_ledger_is_made_again_with_the_file_and_not_with_a_copy(host: Host) -> None:
    copy(host)
    lose(host)
    repair(host)
    assert look(host.driver) == []
    (item,) = host.record().allocations
    assert item.spec.path == host.path("a.img")
    assert host.mark("a.img")
    assert host.mark("a.bak") is host.mark("z.bak") is None
    with pytest.raises(InUseError, match="belongs to domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_lost_ledger_is_made_again_with_the_file_that_a_guest_runs_with(host: Host, earlier: bool) -> None:
    if earlier:
        as_an_earlier_version_marks(host, "a.img")
    copy(host)
    host.mapper.alive[7] = host.record().uuid
    host.driver.prepare(host.domain("a.img"))
    with host.driver.ledger._db as database:  # the holder and the freezing stay
        database.execute("UPDATE attachment SET state = 'mapped', domid = 7")
    lose(host)
    rows = repair(host)
    assert look(host.driver) == [], rows
    record = host.record()
    assert [item.spec.path for item in record.allocations] == [host.path("a.img")]
    assert record.start
    assert record.start.domid == 7
    assert is_immutable(host.path("a.img"))
    assert host.mark("a.img")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_copy_of_a_running_guests_file_is_not_frozen(host: Host, earlier: bool) -> None:
    """``cp -a`` copies the attribute by which a file is known as frozen, and not the flag that makes it immutable."""
    uuid = host.record().uuid
    host.mapper.alive[7] = uuid
    host.driver.prepare(host.domain("a.img"))
    map_prepared(host.driver.ledger, 7)
    if earlier:
        as_an_earlier_version_freezes(host, "a.img")
    copy_only(host)
    assert [(each.path, each.remedy) for each in look(host.driver)] == [
        (host.path(name), "remove the mark") for name in ("a.bak", "z.bak")
    ]
    host.driver.define(host.domain("z.bak", OTHER_UUID))
    host.driver.forget(OTHER_UUID)
    lose(host)
    repair(host)
    assert look(host.driver) == []
    record = host.record()
    assert [item.spec.path for item in record.allocations] == [host.path("a.img")]
    assert (record.start.domid if record.start else None) == 7
    assert [is_immutable(host.path(name)) for name in ("a.img", "a.bak", "z.bak")] == [True, False, False]
    host.mapper.alive.clear()
    assert host.driver.release(uuid) == ""
    assert not is_immutable(host.path("a.img"))
    assert look(host.driver) == []


def test_marks_of_an_earlier_version_do_not_say_which_is_the_copy_and_nothing_is_repaired(host: Host) -> None:
    as_an_earlier_version_marks(host, "a.img")
    copy(host)
    assert [each.path for each in look(host.driver)] == [
        host.path("a.bak"),
        host.path("z.bak"),
    ]  # that of a.img is good
    lose(host)
    assert repair(host) == []
    found = look(host.driver)
    assert {each.path for each in found} == {host.path(name) for name in ("a.bak", "a.img", "z.bak")}
    assert all(host.path("a.bak") in each.problem and host.path("a.img") in each.problem for each in found)
    for name in ("a.bak", "z.bak"):  # as the remedy says
        os.removexattr(host.path(name), "trusted.nvdimm_driver.owner")
    repair(host)
    assert look(host.driver) == []
    assert host.record().allocations[0].spec.path == host.path("a.img")


def test_a_copy_is_not_moved_to_where_its_file_was_when_there_is_another_copy(host: Host) -> None:
    copy(host)
    os.rename(host.path("a.img"), host.path("moved.img"))
    repair(host)
    assert look(host.driver) == []
    assert host.read("a.img").startswith(b"NEW")


def test_a_repair_that_did_nothing_does_not_say_that_it_did(host: Host) -> None:
    copy(host)
    host.backing.freeze(host.path("a.bak"))
    host.mapper.alive[7] = None  # type: ignore[assignment]  # a guest that is dying
    rows = [row for row in repair(host) if row[0].path == host.path("a.bak")]
    assert rows
    assert all(row[-1].startswith("no: ") for row in rows), rows
    host.backing.thaw(host.path("a.bak"))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_copy_is_not_taken_for_its_file_that_is_gone(host: Host, earlier: bool) -> None:
    """The guest wrote on since; only the operator knows whether there is a later copy."""
    if earlier:
        as_an_earlier_version_marks(host, "a.img")
    run("cp", "-a", "--sparse=never", "--reflink=never", host.path("a.img"), host.path("monday.img"))
    os.unlink(host.path("a.img"))
    (found,) = look(host.driver)
    assert (found.path, found.mend) == (host.path("a.img"), None)
    assert found.problem == f"it is not there; a copy of it is {host.path('monday.img')}"
    assert found.remedy.endswith(f"nvdimmctl check --repair --zeros {host.path('a.img')}")
    assert repair(host) == []
    assert not Path(host.path("a.img")).exists()
    os.rename(host.path("monday.img"), host.path("a.img"))  # as the remedy says
    repair(host)
    assert look(host.driver) == []
    assert host.read("a.img").startswith(b"old")


@pytest.mark.parametrize("marked", [True, False])
def test_what_is_gone_is_given_up_on_demand_whatever_copy_there_is(host: Host, marked: bool) -> None:
    run("cp", "-a", "--sparse=never", "--reflink=never", host.path("a.img"), host.path("monday.img"))
    before = host.read("monday.img")
    os.unlink(host.path("a.img"))
    if not marked:
        os.removexattr(host.path("monday.img"), "trusted.nvdimm_driver.owner")
    assert repair(host) == []
    (item,) = host.record().allocations
    assert item.identity is not None
    _repair(lambda: look(host.driver, zeros=[host.path("a.img")]))
    assert [item.identity for item in host.record().allocations] == [None]
    host.driver.define(host.domain("a.img"))
    repair(host)
    assert look(host.driver) == []
    assert (host.read("a.img"), host.read("monday.img")) == (bytes(SIZE), before)


def test_a_copy_of_what_a_domain_had_does_not_bring_it_back(host: Host) -> None:
    run("cp", "-a", "--sparse=never", "--reflink=never", host.path("a.img"), host.path("bak.img"))
    before = host.read("bak.img")
    with pytest.raises(InUseError, match="belongs to domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))
    host.driver.wiper.give_up(host.record(), lambda _: unwatched, delete=True)
    (found,) = look(host.driver)
    assert (found.path, found.mend) == (host.path("bak.img"), None)
    with pytest.raises(InUseError) as raised:
        host.driver.define(host.domain("bak.img", OTHER_UUID))
    command = f"nvdimmctl check --repair --unmark {host.path('bak.img')}"
    assert raised.value.hint.endswith(command)
    assert command in found.remedy
    unmark_copy(host.driver, host.path("bak.img"))
    with pytest.raises(NotFoundError, match="has no mark"):
        unmark_copy(host.driver, host.path("bak.img"))
    host.driver.define(host.domain("bak.img", OTHER_UUID))
    assert look(host.driver) == []
    assert host.read("bak.img") == before


def test_only_a_copy_loses_its_mark(host: Host) -> None:
    """It says whose the file is when the ledger is lost, and the operator may have taken the one for the other."""
    mark = host.mark("a.img")
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"a.img is no copy: its mark, of domain x .*, was written on it"):
            unmark_copy(host.driver, host.path("a.img"))
        lose(host)
    os.symlink("a.img", host.path("link"))
    with pytest.raises(NvdimmError):
        unmark_copy(host.driver, host.path("link"))
    assert host.mark("a.img") == mark


def test_a_lost_ledger_gets_what_was_copied_to_a_new_file_system_when_its_domain_is_defined(host: Host) -> None:
    run("cp", "-a", "--sparse=never", "--reflink=never", host.path("a.img"), host.path("b.img"))
    os.rename(host.path("b.img"), host.path("a.img"))
    lose(host)
    assert repair(host) == []
    host.driver.define(host.domain("a.img"))  # as the remedy says
    assert look(host.driver) == []
    assert host.read("a.img").startswith(b"old")
