# SPDX-License-Identifier: Apache-2.0
"""What a failed define, create or start leaves of marks that a ledger from a backup does not know."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.errors import FullDiskError, InUseError, NvdimmError
from nvdimm_driver.lifecycle.define import Made
from nvdimm_driver.model import KIB, DomainSpec, NvdimmSpec
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_later_marks_real import had
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty
from tests.integration.test_restored_ledger_real import HIGH, back_up, repair, restore
from tests.integration.test_restored_ledger_saved_real import put_back
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


def in_slot(host: Host, name: str, slot: int, label_size: int = 0, base: int | None = None) -> DomainSpec:
    """Return the domain with one NVDIMM."""
    spec = NvdimmSpec(slot, host.path(name), SIZE, label_size, base=base)
    return replace(host.domain("a.img"), nvdimms=(spec,))


@pytest.mark.parametrize("way", ["create", "start"])
def test_an_nvdimm_that_is_kept_besides_keeps_its_later_mark(host: Host, way: str) -> None:
    """It loses its base, which the other one has; that does not make it later than its mark."""
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.driver.define(in_slot(host, "a.img", 2, 128 * KIB, HIGH))
    wanted = had(host)
    restore(host)
    other = in_slot(host, "b.img", 1)
    if way == "create":
        host.driver.create(other, host.driver.check(other))
    else:
        host.driver.define(replace(other, uuid=OTHER_UUID, name="y"))
        host.driver.forget(OTHER_UUID)
        host.driver.prepare(other)
        host.driver.release(UUID)
    repair(host)
    assert had(host)["a.img"] == wanted["a.img"]


def test_a_define_that_fails_marks_again_what_it_was_to_drop(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is whole, and the mark went before the ledger was written."""
    host.driver.define(host.domain("a.img"))
    mark = host.mark("a.img")
    assert mark

    def broken(*_: object, **__: object) -> None:
        raise FullDiskError("the disk is full")

    monkeypatch.setattr(Ledger, "store", broken)
    with pytest.raises(FullDiskError):
        host.driver.define(host.domain("b.img"))
    monkeypatch.undo()
    assert host.mark("a.img") == mark


@pytest.mark.parametrize("fails", ["store", "mark"])
def test_a_define_that_fails_gives_back_what_it_had_dropped(
    host: Host, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.driver.define(in_slot(host, "a.img", 1, 128 * KIB, HIGH))
    wanted = had(host)
    restore(host)
    owner = Ledger if fails == "store" else ownership
    real, calls = getattr(owner, fails), []

    def broken(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise FullDiskError("the disk is full")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, fails, broken)
    with pytest.raises(FullDiskError):
        host.driver.define(host.domain("b.img"))
    monkeypatch.undo()
    repair(host)
    assert had(host)["a.img"] == wanted["a.img"]


@pytest.mark.parametrize("way", ["create", "start"])
def test_a_file_that_was_moved_is_not_given_back_twice(host: Host, way: str) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.driver.define(in_slot(host, "a.img", 1, 128 * KIB))
    restore(host)
    os.rename(host.path("a.img"), host.path("c.img"))
    domain = in_slot(host, "c.img", 1, 128 * KIB)
    state = host.driver.state_of(UUID, domain if way == "create" else None)
    if way == "create":
        host.driver.undo(UUID, state, host.driver.create(domain, host.driver.check(domain)), None)
    else:
        host.driver.prepare(domain)
        host.driver.undo(UUID, state, Made(), host.record())
    assert [*had(host)] == ["a.img"]


def test_what_a_saved_guest_has_is_not_given_up_by_a_define_that_fails(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The define gives it back; while it writes zeros, the guest is saved; then it fails."""
    saved: list[bool] = []
    host.driver.definitions.is_saved = host.driver.starts.is_saved = lambda *_: bool(saved)
    host.driver.define(several(host, "a.img", "g.img"))
    host.mapper.alive[7] = UUID
    host.driver.prepare(several(host, "a.img", "g.img"))
    map_prepared(host.driver.ledger, 7)
    host.driver.define(several(host, "a.img"))
    create, mark = type(host.backing).create, type(host.backing).mark

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        saved.append(True)
        host.mapper.alive.pop(7, None)
        host.driver.release(UUID)
        return create(self, *arguments, **options)

    def broken(self: Any, path: str, owner: bytes | None, identity: Any = None) -> None:
        if path.endswith("h.img") and owner is not None:
            raise FullDiskError("the disk is full")
        mark(self, path, owner, identity)

    monkeypatch.setattr(type(host.backing), "create", slow)
    monkeypatch.setattr(type(host.backing), "mark", broken)
    with pytest.raises(FullDiskError):
        host.driver.define(several(host, "a.img", "g.img", "h.img"))
    monkeypatch.undo()
    with pytest.raises(InUseError, match="belongs to domain"):
        host.driver.define(replace(several(host, "g.img"), uuid=OTHER_UUID, name="y"))
    assert "h.img" not in had(host)


def test_a_restore_that_is_refused_leaves_what_a_killed_define_wants(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    Path(host.path("h.img")).write_bytes(DATA)
    host.driver.ledger.begin_define(several(host, "a.img", "h.img"), lambda: None)
    before = host.record()
    host.driver.undo(UUID, host.driver.state_of(UUID), Made(), None)
    assert host.record() == before
    with pytest.raises(InUseError, match="a define wants it"):
        host.driver.define(host.domain("h.img", OTHER_UUID))


def test_an_undo_takes_no_file_that_was_put_in_the_place_of_a_marked_one(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.driver.define(several(host, "a.img", "b.img"))
    host.define("y.img", OTHER_UUID)
    restore(host)
    host.driver.define(host.domain("y.img", OTHER_UUID))
    domain = several(host, "a.img", "b.img")
    state = host.driver.state_of(UUID, domain)
    created = host.driver.create(domain, host.driver.check(domain))
    (others,) = host.record(OTHER_UUID).allocations
    os.rename(host.path("b.img"), host.path("aside"))
    os.rename(host.path("y.img"), host.path("b.img"))
    with suppress(NvdimmError):
        host.driver.undo(UUID, state, created, None)
    assert others.identity not in [item.identity for item in host.record().allocations]
    os.rename(host.path("b.img"), host.path("y.img"))
    os.rename(host.path("aside"), host.path("b.img"))
    assert repair(host) == []
    assert sorted(had(host)) == ["a.img", "b.img"]


def several(host: Host, *names: str) -> DomainSpec:
    """Return a domain with these, in the slots from 0 on."""
    specs = tuple(NvdimmSpec(slot, host.path(name), SIZE) for slot, name in enumerate(names))
    return replace(host.domain("a.img"), nvdimms=specs)


def backed_up_within_a_define(host: Host) -> DomainSpec:
    """Have the guest write to its file since, and the file renamed."""
    domain = host.domain("a.img")
    host.driver.begin(domain, host.driver.check(domain))
    back_up(host)
    host.driver.define(domain)
    with open(host.path("a.img"), "r+b") as file:
        file.write(DATA)
    os.rename(host.path("a.img"), host.path("moved.img"))
    put_back(host)
    return domain


def repair_as_defined(host: Host, domain: DomainSpec) -> list[Inconsistency]:
    """Repair what is there while libvirt has that definition; return what is left."""

    def find() -> list[Inconsistency]:
        return look(host.driver, lambda uuid: domain if uuid == domain.uuid else None)

    assert {done for _, done in _repair(find)} == {"yes"}
    return find()


def test_a_repair_of_a_define_moves_the_domains_file_back(host: Host) -> None:
    """The ledger's backup was made within the define: before, the repair made a new file, of zeros."""
    domain = backed_up_within_a_define(host)
    assert repair_as_defined(host, domain) == []
    assert not os.path.exists(host.path("moved.img"))
    assert host.read("a.img") == DATA
    assert [(item.spec.slot, item.spec.path) for item in host.record().allocations] == [(0, host.path("a.img"))]


@pytest.mark.parametrize("way", ["lost", "two with its mark"])
def test_a_repair_of_a_define_makes_no_file_in_place_of_one_that_may_be_the_domains(host: Host, way: str) -> None:
    domain = backed_up_within_a_define(host)
    if way == "lost":
        os.unlink(host.path("moved.img"))
    else:
        host.driver.ledger.take_over(compared=True)
        Path(host.path("another.img")).write_bytes(bytes(SIZE))
        for name in ("moved.img", "another.img"):  # as an earlier version has marked them
            mark = json.loads(host.mark("moved.img") or b"")
            mark.pop("file", None)
            os.setxattr(host.path(name), inode._OWNER, json.dumps(mark).encode())
    found = repair_as_defined(host, domain)
    same_mark = {host.path("moved.img"), host.path("another.img")}
    assert {each.path for each in found} == (set() if way == "lost" else same_mark)
    assert not os.path.exists(host.path("a.img"))
    with pytest.raises(NvdimmError, match=r"a\.img"):
        host.driver.prepare(domain)


def test_a_define_that_was_killed_gets_no_file_that_the_domain_has_given_up(host: Host) -> None:
    """Its mark has stayed, as its file system was not mounted. The ledger is the host's own."""
    os.mkdir(host.path("in"))
    host.driver.define(host.domain("in/a.img"))
    os.rename(host.path("in"), host.path("away"))
    host.driver.drop_claims(UUID)
    os.rename(host.path("away"), host.path("in"))
    domain = host.domain("in/new.img")
    host.driver.begin(domain, host.driver.check(domain))
    repair_as_defined(host, domain)
    assert os.path.exists(host.path("in/a.img"))
