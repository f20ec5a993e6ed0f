# SPDX-License-Identifier: Apache-2.0
"""NVDIMMs that come into a running guest and go, on real ext4 and XFS: who has which bytes, whatever fails."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from nvdimm_driver.errors import InUseError, LayoutError, LedgerError, NvdimmError, UnsupportedError, XenError
from nvdimm_driver.guest import hot_slots
from nvdimm_driver.model import PAGE
from tests.integration.crash_world import DOMID, SIZE, STRANGER, Hypervisor, World, X
from tests.integration.loop_pmem import MKFS, FileSystem, run


@pytest.fixture(scope="module", params=list(MKFS))
def fs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystem]:
    made = FileSystem(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.close()


@pytest.fixture
def world(fs: FileSystem) -> World:
    made = World(fs.memory / "state", fs)
    made.reset()
    made.runs_with_slots("x0")
    return made


def frames(world: World) -> int:
    """Return how many frames the guest has."""
    return len(world.xen().frames().get(DOMID, ()))


def test_a_plugged_nvdimm_is_the_guests(world: World) -> None:
    had = frames(world)
    end = world.xen().guest_end(DOMID) * PAGE
    world.do(partial(world.plug, ["x0", "x1"]))
    assert world.has() == {"x0": 0, "x1": 1}
    assert frames(world) == had + SIZE // PAGE
    assert world.is_immutable("x1")
    assert world.wrongly_cached() == []
    slot = world.slot(1)
    assert (slot.plugs, slot.requests, slot.is_empty, slot.is_taken) == (1, 1, False, False)
    (item,) = world.do(lambda driver: [each for each in driver.ledger.domains()[0].allocations if each.spec.slot == 1])
    assert item.base
    assert item.base >= end, "behind all that the guest has"
    assert item.base.to_bytes(8, "little") in slot.structures
    announced = {mfn for domid, mfn, _ in world.xen().frames_of_guests() if domid == DOMID}
    assert announced or not world.xen().announced
    assert world.repair() == []
    with pytest.raises(InUseError):
        world.do(lambda driver: driver.check(world.domain(STRANGER, "x1")))


def test_an_ejected_one_is_the_domains_and_mutable(world: World) -> None:
    had = frames(world)
    world.do(partial(world.plug, ["x0", "x1"]))
    world.do(lambda driver: driver.ask_to_eject(X, world.path("x1")))
    slot = world.slot(1)
    assert (slot.request, slot.requests, slot.is_empty) == (hot_slots.EJECT, 2, False)
    assert world.do(lambda driver: driver.put_away_ejected(X, world.path("x1"))) is False
    assert world.is_immutable("x1")
    world.eject(1)
    assert world.do(lambda driver: driver.put_away_ejected(X, world.path("x1"))) is True
    assert world.has() == {"x0": 0}
    assert (frames(world), world.is_immutable("x0"), world.is_immutable("x1")) == (had, True, False)
    assert world.repair() == []
    with pytest.raises(InUseError):
        world.do(lambda driver: driver.check(world.domain(STRANGER, "x1")))
    world.do(lambda driver: driver.give_up_claim(X, world.path("x1")))
    world.do(lambda driver: driver.check(world.domain(STRANGER, "x1")))


def test_one_of_its_start_can_be_ejected_and_plugged_again(world: World) -> None:
    world.do(partial(world.plug, ["x0", "x1"]))
    world.eject(0)
    assert world.do(lambda driver: driver.settle_guest(X)) == (world.path("x1"),)
    assert not world.is_immutable("x0")
    bases = []
    for _ in range(3):
        world.do(partial(world.plug, ["x0", "x1"], new="x0"))
        record = world.do(lambda driver: driver.ledger.domains()[0])
        bases += [item.base for item in record.allocations if item.spec.path == world.path("x0")]
        world.eject(0)
        world.do(lambda driver: driver.settle_guest(X))
    assert len({*bases}) == 3, "where the guest has had memory, nothing is put again"


def test_the_last_one_stays(world: World) -> None:
    with pytest.raises(UnsupportedError, match="the only NVDIMM"):
        world.do(lambda driver: driver.ask_to_eject(X, world.path("x0")))


def test_a_guest_without_slots_gets_none(world: World) -> None:
    world.xen().call("destroy", DOMID)
    world.do(lambda driver: driver.release(X))
    world.start(world.domain(X, "x0"), DOMID)
    with pytest.raises(UnsupportedError, match=r"no slots for hot-plug \(give its definition <maxMemory"):
        world.do(partial(world.plug, ["x0", "x1"]))
    assert "x1" not in world.names()


def test_a_domain_that_is_off_gets_none(world: World) -> None:
    world.xen().call("destroy", DOMID)
    world.do(lambda driver: driver.release(X))
    with pytest.raises(LedgerError, match="does it run"):
        world.do(partial(world.plug, ["x0", "x1"]))
    assert "x1" not in world.names()


@pytest.mark.parametrize("step", ["announce", "map", "write"])
def test_a_plug_that_fails_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    had = frames(world)

    def fail(self: Hypervisor, *_: object) -> None:
        raise XenError("EPERM")

    with monkeypatch.context() as patch:
        patch.setattr(Hypervisor, step, fail)
        with pytest.raises(XenError):
            world.do(partial(world.plug, ["x0", "x1"]))
    if step == "announce":  # what undoes it needs that, too
        world.do(lambda driver: driver.settle_guest(X))
        assert world.repair() == []
    assert (world.has(), frames(world)) == ({"x0": 0}, had)
    assert world.slot(1).is_empty
    assert world.repair() == []
    world.do(partial(world.plug, ["x0", "x1"]))
    assert world.has() == {"x0": 0, "x1": 1}


def test_a_guest_that_writes_over_its_slots_harms_itself_alone(world: World) -> None:
    world.do(partial(world.plug, ["x0", "x1"]))
    xen, size = world.xen(), hot_slots.PAGE * 2
    for filling in (b"\0", b"\xff", b"\x01\x02\x03"):
        xen.write(DOMID, hot_slots.ADDRESS, (filling * size)[:size])
        try:
            world.do(lambda driver: driver.settle_guest(X))
        except NvdimmError:
            pytest.fail("others wait for it")
        assert world.has().items() <= {"x0": 0, "x1": 1}.items()
    xen.call("destroy", DOMID)
    world.do(lambda driver: driver.release(X))
    assert not world.is_immutable("x0")
    assert not world.is_immutable("x1")
    assert world.repair() == []


def test_its_end_puts_all_away(world: World) -> None:
    world.do(partial(world.plug, ["x0", "x1"]))
    world.xen().call("destroy", DOMID)
    world.do(lambda driver: driver.release(X))
    assert not world.is_immutable("x1")
    assert world.repair() == []
    record = world.do(lambda driver: driver.ledger.find_domain(X))
    assert record
    assert {item.spec.path for item in record.allocations} == {world.path("x0"), world.path("x1")}
    base = {item.spec.slot: item.base for item in record.allocations}
    world.start(world.with_slots("x0", "x1"), DOMID)
    now = world.do(lambda driver: driver.ledger.find_domain(X))
    assert now
    assert {item.spec.slot: item.base for item in now.allocations} == base
    assert world.has() == {"x0": 0, "x1": 1}


def test_a_lost_ledger_is_made_anew_with_what_was_plugged(world: World) -> None:
    world.do(partial(world.plug, ["x0", "x1"]))
    for name in ("", "-wal", "-shm"):
        (world.folder / f"ledger.sqlite{name}").unlink(missing_ok=True)
    assert world.repair() == []
    record = world.do(lambda driver: driver.ledger.find_domain(X))
    assert record
    assert record.start
    assert {*record.start.paths} == {world.path("x0"), world.path("x1")}


@pytest.mark.parametrize("unmaps", [True, False])
def test_nobody_forgets_frames_because_their_file_is_away(
    world: World, monkeypatch: pytest.MonkeyPatch, unmaps: bool
) -> None:
    """A guest's word that it has ejected something is no proof that it has no frames of it."""
    had = frames(world)
    world.do(partial(world.plug, ["x0", "x1"]))
    for command in (("chattr", "-i", world.path("x1")), ("mv", world.path("x1"), world.path("away"))):
        run(*command)
    world.eject(1)

    def fail(self: Hypervisor, *_: object) -> None:
        raise XenError("ENOMEM")

    if unmaps:
        assert world.do(lambda driver: driver.settle_guest(X)) == (world.path("x0"),)
        assert frames(world) == had
        return
    with monkeypatch.context() as patch:
        patch.setattr(Hypervisor, "unmap", fail)
        with pytest.raises(LayoutError, match="cannot be taken out"):
            world.do(lambda driver: driver.settle_guest(X))
    assert world.has() == {"x0": 0, "x1": 1}
    assert frames(world) > had
