# SPDX-License-Identifier: Apache-2.0
"""What a failed define, create or start leaves of marks that a ledger from a backup does not know."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.errors import FullDiskError
from nvdimm_driver.model import KIB, DomainSpec, NvdimmSpec
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_later_marks_real import had
from tests.integration.test_ownership_real import SIZE, Host, empty
from tests.integration.test_restored_ledger_real import HIGH, back_up, repair, restore
from tests.unit.doubles import OTHER_UUID, UUID


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
        host.driver.undo(UUID, state, (), host.record())
    assert [*had(host)] == ["a.img"]
