# SPDX-License-Identifier: Apache-2.0
"""Marks that are later than a ledger from a backup: what changed since is taken from them, and nothing is given up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import InUseError
from nvdimm_driver.lifecycle.define import Made
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, DomainSpec, NvdimmSpec
from nvdimm_driver.state import owner_marks
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_ownership_real import SIZE, Host, empty
from tests.integration.test_restored_ledger_real import HIGH, SECRET, back_up, repair, restore, start
from tests.unit.doubles import OTHER_UUID, UUID


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


def two_nvdimms(host: Host, first: NvdimmSpec | None = None, second: NvdimmSpec | None = None) -> DomainSpec:
    """Return a domain with a.img and b.img, in slots 0 and 1 unless others are given."""
    specs = (first or NvdimmSpec(0, host.path("a.img"), SIZE), second or NvdimmSpec(1, host.path("b.img"), SIZE))
    return replace(host.domain("a.img"), nvdimms=tuple(sorted(specs, key=lambda spec: spec.slot)))


def had(host: Host) -> dict[str, tuple[int, int, int | None]]:
    """Return slot, label area and base of what the domain has in the ledger, by name."""
    items = host.record().allocations
    return {os.path.basename(item.spec.path): (item.spec.slot, item.spec.label_size, item.base) for item in items}


@pytest.mark.parametrize("way", ["repair", "define"])
def test_a_slot_that_was_changed_since_is_taken_from_the_mark(host: Host, way: str) -> None:
    """The repair wrote the old slot, label area and base over the mark."""
    host.driver.define(host.domain("a.img"))
    back_up(host)
    spec = replace(host.domain("a.img").nvdimms[0], slot=1, label_size=128 * KIB)
    host.driver.define(replace(host.domain("a.img"), nvdimms=(replace(spec, base=HIGH),)))
    host.driver.define(replace(host.domain("a.img"), nvdimms=(spec,)))
    (had,) = host.record().allocations
    restore(host)
    if way == "define":
        host.driver.define(replace(host.domain("a.img"), nvdimms=(spec,)))
    assert repair(host) == []
    assert host.record().allocations == (had,)


@pytest.mark.parametrize("way", ["create", "start"])
def test_what_is_refused_leaves_what_a_later_mark_says(host: Host, way: str) -> None:
    """The undo wrote the old slot, label area and base of the ledger over the mark."""
    host.driver.define(host.domain("a.img"))
    back_up(host)
    spec = replace(host.domain("a.img").nvdimms[0], slot=1, label_size=128 * KIB)
    host.driver.define(replace(host.domain("a.img"), nvdimms=(replace(spec, base=HIGH),), ram=2 << 30))
    domain = replace(host.domain("a.img"), nvdimms=(spec,), ram=2 << 30)
    host.driver.define(domain)
    wanted, ram = had(host), host.record().ram
    restore(host)
    before = host.driver.state_of(UUID)
    if way == "create":
        host.driver.undo(UUID, before, host.driver.create(domain, host.driver.check(domain)), None)
    else:
        host.driver.prepare(domain)
        host.driver.undo(UUID, before, Made(), host.record())
    assert repair(host) == []
    assert (had(host), host.record().ram) == (wanted, ram)


@pytest.mark.parametrize("way", ["create", "start", "repair of another"])
def test_what_is_set_aside_is_not_later_than_its_mark(host: Host, way: str) -> None:
    """It got a new time with its other number, and then its mark, which nobody had read, was written over."""
    a, b = host.path("a.img"), host.path("b.img")
    host.driver.define(host.domain("a.img"))
    back_up(host)
    moved = NvdimmSpec(1, a, SIZE, 128 * KIB, base=HIGH)
    if way == "repair of another":
        host.driver.define(two_nvdimms(host, moved, NvdimmSpec(0, b, SIZE)))
    else:
        host.driver.define(replace(host.domain("a.img"), nvdimms=(moved,)))
    wanted, mark = had(host), host.mark("a.img")
    restore(host)
    if way == "repair of another":
        (one,) = [found for found in look(host.driver) if found.path == b]
        assert one.mend
        one.mend()
    elif way == "create":
        host.driver.create(host.domain("b.img"), host.driver.check(host.domain("b.img")))
    else:
        host.driver.define(host.domain("b.img", OTHER_UUID))
        host.driver.forget(OTHER_UUID)
        host.driver.prepare(host.domain("b.img"))
        host.driver.release(UUID)
    assert host.mark("a.img") == mark
    assert repair(host) == []
    found = had(host)
    assert (found["a.img"], found["b.img"][0]) == (wanted["a.img"], 0)


@pytest.mark.parametrize("way", ["create", "start"])
@pytest.mark.parametrize("known", ["one", "none"])
def test_an_undo_gives_no_two_nvdimms_one_base(host: Host, way: str, known: str) -> None:
    """Of what the ledger and marks say of these addresses, the last is right; the other one gets a base at a start."""
    a, b = host.path("a.img"), host.path("b.img")
    if known == "one":  # a.img by the ledger, b.img by its mark
        host.driver.define(host.domain("a.img"))
        back_up(host)
        (first,) = host.record().allocations
        host.driver.define(replace(host.domain("a.img"), nvdimms=(NvdimmSpec(1, b, SIZE, base=first.base),)))
        last, base = "b.img", first.base
    else:  # marks of both are later, that of b.img by less: a process was killed between the two
        host.driver.define(two_nvdimms(host))
        back_up(host)
        other = host.record().allocations[1]
        host.driver.define(
            two_nvdimms(host, NvdimmSpec(0, a, SIZE, base=other.base), NvdimmSpec(1, b, SIZE, base=HIGH))
        )
        now, moved = host.record().allocations
        with open(b, "rb") as file:
            before = replace(moved, base=other.base, spec=replace(moved.spec, base=None), changed=now.changed - 1)
            inode.mark(file.fileno(), owner_marks.pack(host.record(), before))
        last, base = "a.img", other.base
    restore(host)
    state, domain = host.driver.state_of(UUID), two_nvdimms(host)
    if way == "create":
        host.driver.undo(UUID, state, host.driver.create(domain, host.driver.check(domain)), None)
    else:
        host.driver.prepare(domain)
        host.driver.undo(UUID, state, Made(), host.record())
    found = had(host)
    assert found[last][2] == base
    assert [place[2] for place in found.values()].count(base) == 1
    assert repair(host) == []
    host.driver.prepare(domain)
    assert had(host)[last][2] == base


@pytest.mark.parametrize("halted", [0, 1])
@pytest.mark.parametrize("change", ["swapped", "chain", "one more"])
def test_slots_and_bases_that_changed_together_are_taken_together(host: Host, change: str, halted: int) -> None:
    """A repair in several steps took for another NVDIMM's what had moved on, too, or was ended between two of them."""
    a, b = host.path("a.img"), host.path("b.img")
    host.driver.define(host.domain("a.img") if change == "one more" else two_nvdimms(host))
    bases = [item.base for item in host.record().allocations]
    back_up(host)
    if change == "chain":
        host.driver.define(two_nvdimms(host, NvdimmSpec(0, a, SIZE, base=bases[1]), NvdimmSpec(1, b, SIZE, base=HIGH)))
    domain = two_nvdimms(host)
    if change != "chain":
        domain = two_nvdimms(host, NvdimmSpec(1, a, SIZE), NvdimmSpec(0, b, SIZE))
    host.driver.define(domain)
    wanted = had(host)
    restore(host)
    for found in look(host.driver)[:halted]:
        assert found.mend
        found.mend()
    assert repair(host) == []
    assert had(host) == wanted
    host.driver.prepare(domain)
    assert had(host) == wanted


def test_a_base_of_what_was_given_up_since_is_free_for_what_has_it_by_its_mark(host: Host) -> None:
    host.driver.define(two_nvdimms(host))
    base = host.record().allocations[1].base
    assert base
    back_up(host)
    spec = NvdimmSpec(0, host.path("a.img"), SIZE)
    host.driver.define(replace(host.domain("a.img"), nvdimms=(replace(spec, base=base + SUPERPAGE),)))
    host.driver.define(replace(host.domain("a.img"), nvdimms=(spec,)))
    restore(host)
    assert repair(host) == []
    assert had(host)["a.img"] == (0, 0, base + SUPERPAGE)


def test_name_ram_and_label_server_are_taken_from_a_later_mark(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    host.driver.define(replace(host.domain("a.img", label_size=128 * KIB), name="renamed", ram=2048 * MIB, dsm="aml"))
    record = host.record()
    restore(host)
    assert repair(host) == []
    assert host.record() == record


@pytest.mark.parametrize("way", ["define", "start"])
def test_a_restored_ledger_that_is_not_repaired_takes_the_base_from_a_later_mark(host: Host, way: str) -> None:
    host.driver.define(host.domain("a.img"))
    back_up(host)
    spec = NvdimmSpec(0, host.path("a.img"), SIZE)
    host.driver.define(replace(host.domain("a.img"), nvdimms=(replace(spec, base=HIGH),)))
    host.driver.define(host.domain("a.img"))
    wanted = had(host)
    restore(host)
    if way == "define":
        host.driver.define(host.domain("a.img"))
    else:
        host.driver.prepare(host.domain("a.img"))
        host.driver.release(UUID)
    assert had(host) == wanted
    assert look(host.driver) == []


def test_a_define_in_a_restored_ledger_writes_over_no_later_mark_that_says_otherwise(host: Host) -> None:
    """Nor does it after the repair, if the host's clock was ahead when the mark was written: it is later than that."""
    host.driver.define(host.domain("a.img"))
    back_up(host)
    tomorrow = time.time_ns() + 86400 * 10**9
    with pytest.MonkeyPatch.context() as ahead:
        ahead.setattr("nvdimm_driver.state.ledger.time.time_ns", lambda: tomorrow)
        host.driver.define(host.domain("a.img", label_size=128 * KIB))
    mark = host.mark("a.img")
    restore(host)
    with pytest.raises(InUseError, match="by its mark, it is the domain's NVDIMM in slot 0, of 4 MiB"):
        host.driver.define(host.domain("a.img", label_size=256 * KIB))
    assert host.mark("a.img") == mark
    assert repair(host) == []
    host.driver.define(host.domain("a.img", label_size=256 * KIB))
    assert look(host.driver) == []
    assert host.record().allocations[0].spec.label_size == 256 * KIB


@pytest.mark.parametrize("way", ["forgotten", "another define"])
def test_the_end_of_a_start_in_a_restored_ledger_gives_up_nothing_that_was_given_back_since(
    host: Host, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody repairs the ledger; another change follows in it, or the host's clock was set back: y got the bytes."""
    host.driver.define(host.domain("a.img"))
    host.driver.prepare(host.domain("a.img"))
    host.driver.define(host.domain("b.img"))
    back_up(host)
    host.driver.release(UUID)
    if way == "forgotten":
        host.driver.forget(UUID)
        yesterday = time.time_ns() - 86400 * 10**9
        monkeypatch.setattr("nvdimm_driver.state.ledger.time.time_ns", lambda: yesterday)
    host.define("a.img", UUID, SECRET)
    host.driver.prepare(host.domain("a.img"))
    restore(host)
    if way == "another define":
        host.driver.define(host.domain("c.img"))
    host.driver.release(UUID)
    with pytest.raises(InUseError, match="has the mark of domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))


@pytest.mark.parametrize("way", ["", "another define"])
def test_the_end_of_a_guest_in_a_restored_ledger_gives_up_nothing_that_it_was_given_back_while_it_had_it(
    host: Host, way: str
) -> None:
    """The file was frozen all the time, and has no later mark: its folder tells. Nobody repairs the ledger."""
    host.define("a.img", UUID, SECRET)
    start(host, UUID, 7)
    host.driver.define(host.domain("b.img"))
    back_up(host)
    host.driver.define(host.domain("a.img"))
    restore(host)
    if way:
        host.driver.define(host.domain("c.img"))
    host.mapper.alive.clear()
    host.mapper.announce(7, ())
    host.driver.reconcile()
    with pytest.raises(InUseError, match="has the mark of domain x"):
        host.driver.define(host.domain("a.img", OTHER_UUID))
    assert repair(host) == []
    host.driver.prepare(host.domain("a.img"))
    assert host.read("a.img")[: len(SECRET)] == SECRET
    host.driver.release(UUID)
    folder = host.fs.root
    assert [name for name in os.listxattr(folder) if "given" in name] == []


def test_what_a_guest_was_given_back_and_gives_up_at_last_is_free(host: Host) -> None:
    host.define("a.img")
    start(host, UUID, 7)
    for name in ("b.img", "a.img", "b.img"):
        host.driver.define(host.domain(name))
    host.mapper.alive.clear()
    host.mapper.announce(7, ())
    host.driver.reconcile()
    assert host.mark("a.img") is None
    host.driver.define(host.domain("a.img", OTHER_UUID))


def test_of_two_later_marks_with_one_base_the_later_one_has_it(host: Host) -> None:
    """The other is chosen anew: the mark could not be written since, because a guest had the file."""
    host.driver.define(two_nvdimms(host))
    back_up(host)
    first, second = host.record().allocations
    moved = [replace(first.spec, base=second.base), replace(second.spec, base=first.base)]
    host.driver.define(two_nvdimms(host, *moved))
    restore(host)
    with open(host.path("b.img"), "rb") as file:
        inode.mark(file.fileno(), owner_marks.pack(host.record(), second))
    assert repair(host) == []
    assert [item.base for item in host.record().allocations] == [second.base, None]
    host.driver.define(two_nvdimms(host))
    assert len({item.base for item in host.record().allocations}) == 2
