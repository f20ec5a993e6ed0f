# SPDX-License-Identifier: Apache-2.0
"""A file of a domain in the place of another one of the same domain's, on real ext4 and XFS: no file is for two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.errors import InUseError
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec
from nvdimm_driver.plugins import unwatched
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty
from tests.unit.doubles import UUID


@pytest.fixture(params=list(MKFS))
def file_system(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem]) -> Iterator[FileSystem]:
    yield file_systems[request.param]
    empty(file_systems[request.param])


@pytest.fixture
def host(file_system: FileSystem, tmp_path: Path) -> Host:
    return Host(tmp_path, file_system)


@pytest.fixture
def renamed(file_system: FileSystem, tmp_path: Path) -> Host:
    """A pool with wipe_on_release; the domain was defined with another name for its file, which was renamed then."""
    host = Host(tmp_path, file_system, wipe=True)
    host.define("a.img")
    host.driver.define(host.domain("b.img"))
    os.replace(host.path("a.img"), host.path("b.img"))
    return host


def two(host: Host) -> None:
    """Define a domain with two NVDIMMs, of which each has bytes of its own."""
    nvdimms = tuple(NvdimmSpec(slot, host.path(name), SIZE) for slot, name in enumerate(("a.img", "b.img")))
    host.driver.define(DomainSpec("x", UUID, 512 * MIB, None, nvdimms))
    for name in ("a.img", "b.img"):
        Path(host.path(name)).write_bytes(name.encode().ljust(SIZE))


def repair(host: Host) -> list[tuple[Inconsistency, str]]:
    return _repair(lambda: look(host.driver))


def claims(host: Host) -> dict[int, str]:
    """Return the names of the domain's files by slot; no two have the same bytes."""
    items = host.record().allocations
    identities = [item.identity for item in items if item.identity]
    assert len(set(identities)) == len(identities)
    return {item.spec.slot: os.path.basename(item.spec.path) for item in items}


def test_a_renamed_file_is_the_one_that_the_domain_was_defined_with(renamed: Host) -> None:
    assert claims(renamed) == {0: "b.img", 256: "a.img"}
    (row,) = repair(renamed)
    assert row[-1] == "yes"
    assert look(renamed.driver) == []
    assert claims(renamed) == {0: "b.img"}
    assert renamed.read("b.img") == DATA
    renamed.driver.prepare(renamed.domain("b.img"))


def test_a_file_that_is_defined_with_another_name_and_size_is_still_one(
    file_system: FileSystem, tmp_path: Path
) -> None:
    host = Host(tmp_path, file_system, wipe=True)
    host.define("a.img")
    os.rename(host.path("a.img"), host.path("b.img"))
    with open(host.path("b.img"), "ab") as file:
        file.write(bytes(SIZE))
    host.driver.define(
        replace(host.domain("b.img"), nvdimms=(NvdimmSpec(0, host.path("b.img"), 2 * SIZE),)),
    )
    assert claims(host) == {0: "b.img"}
    assert look(host.driver) == []


def test_a_file_that_is_defined_with_another_name_and_size_keeps_its_slot(host: Host) -> None:
    two(host)
    os.rename(host.path("b.img"), host.path("c.img"))
    with open(host.path("c.img"), "ab") as file:
        file.write(bytes(SIZE))
    spec = NvdimmSpec(0, host.path("c.img"), 2 * SIZE)
    host.driver.define(DomainSpec("x", UUID, 512 * MIB, None, (spec,), unplaced=frozenset({spec.path})))
    assert claims(host) == {1: "c.img"}


def test_a_renamed_file_of_another_size_goes_back(renamed: Host) -> None:
    """Taken for the smaller NVDIMM, the guest would miss its end."""
    record = renamed.record()
    items = [
        replace(each, spec=replace(each.spec, size=SIZE // 2 if each.spec.slot == 0 else SIZE))
        for each in record.allocations
    ]
    renamed.driver.ledger.store(UUID, record.name, record.ram, items)
    repair(renamed)
    assert claims(renamed)[256] == "a.img"
    assert renamed.read("a.img") == DATA


def test_a_file_that_was_moved_onto_another_goes_back(host: Host) -> None:
    two(host)
    os.replace(host.path("b.img"), host.path("a.img"))
    assert [each.mend is None for each in look(host.driver)] == [True, False]
    repair(host)
    assert host.read("b.img").startswith(b"b.img")
    assert claims(host) == {0: "a.img", 1: "b.img"}


def test_two_files_in_each_others_places_are_named_and_not_taken(host: Host) -> None:
    two(host)
    before = host.record()
    for old, new in (("a.img", "c"), ("b.img", "a.img"), ("c", "b.img")):
        os.rename(host.path(old), host.path(new))
    found = look(host.driver)
    assert [each.problem for each in found] == [
        f"what is there is the domain's NVDIMM in slot {slot}, {host.path(name)}"
        for slot, name in ((1, "b.img"), (0, "a.img"))
    ]
    assert repair(host) == []
    assert host.record() == before


@pytest.mark.parametrize("kept", ["a.img", "b.img"])
def test_what_an_earlier_repair_gave_two_numbers_is_not_overwritten_and_has_one_again(renamed: Host, kept: str) -> None:
    record, identity = renamed.record(), renamed.record().allocations[1].identity
    items = [replace(each, identity=identity) for each in record.allocations]
    renamed.driver.ledger.store(UUID, record.name, record.ram, items)
    os.rename(renamed.path("b.img"), renamed.path(kept))
    for delete in (False, True):
        with pytest.raises(InUseError, match="too, which the domain keeps"):
            renamed.driver.wiper.give_up(
                renamed.record(), lambda _: unwatched, delete=delete, slot=256 if kept == "a.img" else 0
            )
    repair(renamed)
    assert look(renamed.driver) == []
    assert claims(renamed) == {0: "b.img"}
    assert renamed.read("b.img") == DATA
