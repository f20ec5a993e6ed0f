# SPDX-License-Identifier: Apache-2.0
"""A running guest's file is immutable at every moment, whatever is killed, on real ext4 and XFS."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import InUseError, NvdimmError
from nvdimm_driver.model import MIB, Allocation
from nvdimm_driver.state import owner_marks, ownership
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_ownership_real import Host, empty, is_immutable, killed
from tests.unit.doubles import OTHER_UUID, UUID


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem], tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


def end(host: Host) -> None:
    host.mapper.alive.clear()
    host.another().release(UUID)


def mark_of(host: Host, name: str = "a.img") -> owner_marks.Mark | None:
    found = host.mark(name)
    return None if found is None else owner_marks.unpack(host.path(name), found)


REDEFINITIONS: dict[str, Callable[[Host], object]] = {
    "redefined": lambda host: host.another().define(host.domain("a.img", ram=600 * MIB)),
    "redefined with another": lambda host: host.another().define(host.domain("b.img")),
    "redefined without": lambda host: host.another().drop_claims(UUID),
    "repaired": lambda host: _repair(lambda: look(host.driver)),
}


@pytest.mark.parametrize("how", list(REDEFINITIONS))
def test_nothing_makes_the_file_of_a_running_guest_mutable_to_mark_it(
    host: Host, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run(host.domain("a.img"))
    set_immutable = inode._set_immutable

    def check(fd: int, immutable: bool) -> None:
        assert immutable
        set_immutable(fd, immutable)

    monkeypatch.setattr(inode, "_set_immutable", check)
    REDEFINITIONS[how](host)
    monkeypatch.undo()
    assert is_immutable(host.path("a.img"))
    assert mark_of(host)
    end(host)
    assert not is_immutable(host.path("a.img"))
    mark = mark_of(host)
    assert (mark.ram >> 20 if mark else None) == {"redefined": 600, "repaired": 512}.get(how)
    assert look(host.driver) == []


def test_a_mark_that_was_not_written_yet_is_no_finding_while_the_guest_runs(host: Host) -> None:
    host.run(host.domain("a.img"))
    host.driver.define(host.domain("a.img", ram=600 * MIB))
    assert look(host.driver) == []


def test_a_file_that_its_domain_calls_by_another_name_now_keeps_its_mark(host: Host) -> None:
    host.run(host.domain("a.img"))
    host.driver.define(host.domain("./a.img", ram=600 * MIB))
    end(host)
    mark = mark_of(host)
    assert mark
    assert mark.ram == 600 * MIB


@pytest.mark.parametrize("how", ["redefined", "redefined without"])
@pytest.mark.parametrize("point", ["setxattr", "removexattr", "second removexattr", "mark", "end_start"])
def test_an_end_that_is_killed_is_completed(host: Host, how: str, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark is removed in the thaw, and written between the thaw and the end of the start in the ledger."""
    host.run(host.domain("a.img"))
    REDEFINITIONS[how](host)
    host.mapper.alive.clear()
    driver = host.another()

    def dies(*arguments: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    removed: list[str] = []
    removexattr = os.removexattr

    def dies_the_second_time(fd: int, name: str) -> None:
        if removed:
            dies()
        removed.append(name)
        removexattr(fd, name)

    if point == "end_start":
        monkeypatch.setattr(driver.ledger, "end_start", dies)
    elif point == "mark":
        monkeypatch.setattr(ownership, "mark", dies)
    elif point == "removexattr" or (how, point) == ("redefined", "setxattr"):
        monkeypatch.setattr(os, point, dies)
    elif (how, point) == ("redefined without", "second removexattr"):
        monkeypatch.setattr(os, "removexattr", dies_the_second_time)
    else:
        return  # nothing is written there
    killed(driver.reconcile)
    monkeypatch.undo()
    host.another().reconcile()
    assert not is_immutable(host.path("a.img"))
    mark = mark_of(host)
    assert (mark.ram >> 20 if mark else None) == (600 if how == "redefined" else None)
    assert look(host.driver) == []
    if how == "redefined without":
        host.driver.define(host.domain("a.img", OTHER_UUID))


def test_check_makes_a_file_immutable_again_on_which_a_label_server_was_killed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is append-only while a label server opens it; the next label server makes it immutable, too."""
    host.run(host.domain("a.img", label_size=MIB))
    (item,) = host.record().allocations
    assert item.identity
    set_immutable = inode._set_immutable

    def dies(fd: int, immutable: bool) -> None:
        if immutable:
            os.kill(os.getpid(), signal.SIGKILL)
        set_immutable(fd, immutable)

    monkeypatch.setattr(inode, "_set_immutable", dies)
    killed(lambda: host.backing.open_labels(item.spec, item.identity))  # type: ignore[arg-type]
    monkeypatch.undo()
    assert not is_immutable(host.path("a.img")), "the test has hit the moment"
    assert [each.problem for each in look(host.driver)] == ["a guest has it, and it is not immutable"]
    _repair(lambda: look(host.driver))
    assert is_immutable(host.path("a.img"))
    assert look(host.driver) == []
    end(host)
    assert not is_immutable(host.path("a.img"))


def test_the_refused_start_of_a_second_owner_leaves_the_file_of_the_first_immutable(host: Host) -> None:
    """Freezing is not counted: who thaws has to ask who else has the file."""
    host.run(host.domain("a.img"))
    (item,), other = host.record().allocations, host.domain("./a.img", OTHER_UUID).nvdimms[0]
    host.driver.ledger.store(OTHER_UUID, "y", 512 * MIB, [replace(item, uuid=OTHER_UUID, spec=other)])
    with pytest.raises(NvdimmError):
        host.driver.prepare(host.domain("./a.img", OTHER_UUID))
    assert is_immutable(host.path("a.img"))
    start = host.driver.starts.freeze(
        OTHER_UUID, [replace(item, uuid=OTHER_UUID, spec=other)], 2
    )  # as if nothing had refused it
    host.driver.starts.put_away(start)
    assert is_immutable(host.path("a.img"))
    assert mark_of(host)


@pytest.mark.parametrize("delete", [False, True])
def test_a_frozen_file_of_a_guest_that_the_ledger_does_not_know_is_not_released(host: Host, delete: bool) -> None:
    """The ledger is of before the start: it takes the domain for off, and the guest runs."""
    host.run(host.domain("a.img"))
    record = host.record()
    host.driver.ledger.end_start(record.start)  # type: ignore[arg-type]
    with pytest.raises((InUseError, NvdimmError), match=r"immutable|not permitted"):
        host.driver.wiper.give_up(host.record(), lambda _: lambda done, total: None, delete=delete)
    assert is_immutable(host.path("a.img"))
    assert mark_of(host)
    assert isinstance(host.record().allocations[0], Allocation)
