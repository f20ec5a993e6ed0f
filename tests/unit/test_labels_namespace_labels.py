# SPDX-License-Identifier: Apache-2.0
"""The slot that labels were made for. tests/lab/test_slots_and_saves.py has those that a real Linux has made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nvdimm_driver.doctor import repair
from nvdimm_driver.labels.namespace_labels import slots_of
from nvdimm_driver.model import KIB, MIB, NvdimmSpec
from tests.unit.doubles import MemoryBacking, RecordingMapper, domain, make_driver
from tests.unit.label_areas import area_with_namespaces, cookie, label_area

AREA = 128 * KIB
A = "/mnt/pmem0/a"


@pytest.mark.parametrize("slot", [0, 1, 255])
@pytest.mark.parametrize("version", [1, 2])
def test_a_label_tells_its_slot(slot: int, version: int) -> None:
    assert slots_of(area_with_namespaces(AREA, cookie(slot, version=version))) == frozenset({slot})


def test_an_area_without_namespaces_tells_none() -> None:
    assert slots_of(bytes(AREA)) is None
    assert slots_of(label_area(AREA)) is None
    assert slots_of(area_with_namespaces(AREA)) is None
    assert slots_of(area_with_namespaces(AREA, cookie(3))[: AREA // 2]) is None


def test_labels_of_another_make_and_of_two_slots() -> None:
    assert slots_of(area_with_namespaces(AREA, 12345)) == frozenset()
    assert slots_of(area_with_namespaces(AREA, cookie(1), cookie(4), 12345)) == frozenset({1, 4})


def test_plan_and_check_say_that_the_guest_would_find_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backing = MemoryBacking()
    driver = make_driver(tmp_path, backing, RecordingMapper())
    wanted = domain(A, label_size=AREA)
    driver.importer.provision(wanted.nvdimms[0], lambda _: lambda done, total: None)
    backing.contents[A] = bytearray(64 * MIB - AREA) + area_with_namespaces(AREA, cookie(1))
    said = "its labels were made in slot 1, and in slot 0 the guest finds none of its namespaces"
    (problem,) = driver.plan(wanted).misplaced_labels
    assert problem.startswith(said)
    driver.define(wanted)
    assert "misplaced-labels" in caplog.text
    assert [each.problem.startswith(said) for each in repair.look(driver) if "slot" in each.remedy] == [True]
    assert driver.planner.find_slot_of_labels(wanted.nvdimms[0]) == 1
    moved = dataclasses.replace(wanted, nvdimms=(dataclasses.replace(wanted.nvdimms[0], slot=1),))
    assert driver.plan(moved).misplaced_labels == ("",)
    driver.define(moved)
    assert repair.look(driver) == []


def test_labels_of_another_make_are_told_apart(tmp_path: Path) -> None:
    backing = MemoryBacking()
    driver = make_driver(tmp_path, backing, RecordingMapper())
    wanted = domain(A, label_size=AREA)
    driver.define(wanted)
    backing.contents[A] = bytearray(64 * MIB - AREA) + area_with_namespaces(AREA, 5)
    assert "made on another make of NVDIMM" in driver.plan(wanted).misplaced_labels[0]
    assert driver.planner.find_slot_of_labels(wanted.nvdimms[0]) is None


@pytest.mark.parametrize("size", [0, 2 * AREA])
def test_plan_and_define_say_that_the_definition_has_another_label_area(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    backing = MemoryBacking()
    driver = make_driver(tmp_path, backing, RecordingMapper())
    wanted = domain(A, label_size=size)
    driver.importer.provision(wanted.nvdimms[0], lambda _: lambda done, total: None)
    backing.contents[A] = bytearray(64 * MIB - AREA) + area_with_namespaces(AREA, cookie(0))
    (problem,) = driver.plan(wanted).misplaced_labels
    assert problem.startswith("it ends with labels in an area of 128 KiB, not ")
    driver.define(wanted)
    assert "misplaced-labels" in caplog.text
    backing.contents[A] = bytearray(64 * MIB - AREA) + label_area(AREA)  # without namespaces
    assert driver.plan(wanted).misplaced_labels == ("",)


def test_an_area_larger_than_any_in_use_is_not_read(tmp_path: Path) -> None:
    """Who defines a domain chooses its size, and nvdimmd's memory is not theirs."""
    backing = MemoryBacking()
    driver = make_driver(tmp_path, backing, RecordingMapper())
    wanted = dataclasses.replace(domain(A), nvdimms=(NvdimmSpec(0, A, 256 * MIB, label_size=128 * MIB),))
    driver.define(wanted)
    assert driver.plan(wanted).misplaced_labels == ("",)
    assert backing.contents == {}, "nobody has opened it"
