# SPDX-License-Identifier: Apache-2.0
"""A definition with a larger size: the file grows, and the labels move to its new end; on real ext4 and XFS."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, InUseError, NvdimmError, RefusedError
from nvdimm_driver.lifecycle import define
from nvdimm_driver.lifecycle.define import Definitions
from nvdimm_driver.model import DomainSpec
from nvdimm_driver.state import ownership
from tests.integration.crash_points import Fault, traced
from tests.integration.crash_world import LABEL, SIZE, World, X, repaired
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_crash_walk import DOMID, EVERY, all_faults, faults
from tests.ledger_copies import forget_in_use

LABELS = b"labels of the guest".ljust(LABEL, b"!")
LARGE = 2 * SIZE


@pytest.fixture(scope="module", params=list(MKFS))
def fs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystem]:
    made = FileSystem(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.close()


@pytest.fixture
def world(fs: FileSystem) -> World:
    """A host with a domain of two NVDIMMs, the first with labels, and another one that runs."""
    made = World(fs.memory / "state", fs)
    begin(made)
    return made


def begin(world: World) -> None:
    world.reset()
    world.neighbour()
    world.defined("x0", "x1")
    write(world, "x0", SIZE - LABEL, LABELS)


def write(world: World, name: str, offset: int, content: bytes) -> None:
    with open(world.path(name), "r+b") as file:
        file.seek(offset)
        file.write(content)


def sized(world: World, *sizes: int, label: int = LABEL) -> DomainSpec:
    """Return the domain with NVDIMMs of these sizes."""
    domain = world.domain(X, "x0", "x1")
    pairs = zip(domain.nvdimms, sizes, strict=True)
    specs = tuple(replace(spec, size=size, label_size=spec.label_size and label) for spec, size in pairs)
    return replace(domain, nvdimms=specs)


def grow(world: World, *sizes: int, label: int = LABEL) -> None:
    world.do(partial(world.define, sized(world, *sizes, label=label)))


def bases(world: World) -> list[int | None]:
    return [each.base for key, each in sorted(world.kept().items()) if key[0] == X]


def sizes_in_ledger(driver: XenNvdimmDriver) -> dict[str, int]:
    record = driver.ledger.find_domain(X)
    assert record
    return {os.path.basename(item.spec.path): item.spec.size for item in record.allocations}


def test_a_larger_size_makes_the_file_larger_and_moves_the_labels(world: World) -> None:
    before, was = {name: world.content(name) for name in ("x0", "x1")}, bases(world)
    grow(world, LARGE, LARGE)
    assert world.content("x0") == before["x0"] + bytes(LARGE - SIZE - LABEL) + LABELS
    assert world.content("x1") == before["x1"] + bytes(LARGE - SIZE)
    assert bases(world)[:1] == was[:1]
    world.start(sized(world, LARGE, LARGE), DOMID)
    assert world.repair() == []


def test_labels_that_are_all_zeros_need_not_move(world: World) -> None:
    write(world, "x0", SIZE - LABEL, bytes(LABEL))
    grow(world, LARGE, SIZE)
    assert world.content("x0")[SIZE - LABEL :] == bytes(LARGE - SIZE + LABEL)


def test_bytes_behind_the_old_end_are_the_guests_but_where_its_labels_move(world: World) -> None:
    run("fallocate", "-l", str(LARGE), world.path("x0"))
    write(world, "x0", SIZE, b"more")
    grow(world, LARGE, SIZE)
    assert world.content("x0")[SIZE:] == b"more" + bytes(LARGE - SIZE - LABEL - 4) + LABELS


def test_labels_are_copied_over_no_other_bytes(world: World) -> None:
    write(world, "x0", LARGE - 16, b"somebody's bytes")
    before = world.content("x0")
    with pytest.raises(RefusedError, match=r"its labels would move to .*, where other bytes are") as caught:
        grow(world, LARGE, SIZE)
    assert "give the domain a copy of its own" in caught.value.hint
    assert world.content("x0") == before


def test_labels_do_not_move_into_their_own_area(world: World) -> None:
    large_label = SIZE + LABEL
    world.do(partial(world.define, replace(sized(world, SIZE, SIZE), nvdimms=sized(world, SIZE, SIZE).nvdimms[1:])))
    os.unlink(world.path("x0"))
    grow(world, 2 * LARGE, SIZE, label=large_label)
    write(world, "x0", 2 * LARGE - large_label, LABELS)
    with pytest.raises(RefusedError, match="would get 2 MiB more, and its label area has 2176 KiB"):
        grow(world, 2 * LARGE + SIZE, SIZE, label=large_label)
    grow(world, 4 * LARGE, SIZE, label=large_label)
    assert world.content("x0")[-large_label:].startswith(LABELS)


@pytest.mark.parametrize("label", [2 * LABEL, 0])
def test_another_label_size_is_refused_still(world: World, label: int) -> None:
    with pytest.raises(RefusedError, match=r"its label area, .* is in use"):
        grow(world, LARGE, SIZE, label=label)
    assert os.path.getsize(world.path("x0")) == SIZE


def test_a_file_that_has_lost_its_end_is_not_made_larger(world: World) -> None:
    os.truncate(world.path("x1"), SIZE // 2)
    with pytest.raises(BackingError, match="bytes of the domain are missing"):
        grow(world, SIZE, LARGE)
    assert os.path.getsize(world.path("x1")) == SIZE // 2


def test_nothing_grows_under_a_guest(world: World) -> None:
    world.start(sized(world, SIZE, SIZE), DOMID)
    for sizes in ((LARGE, SIZE), (SIZE, LARGE)):
        with pytest.raises(RefusedError, match=r"runs, and (its NVDIMM|its guest)"):
            grow(world, *sizes)
    assert [os.path.getsize(world.path(name)) for name in ("x0", "x1")] == [SIZE, SIZE]


def test_nothing_grows_under_a_saved_guest(world: World) -> None:
    def grow_saved(driver: XenNvdimmDriver) -> None:
        driver.definitions.is_saved = lambda name, uuid: uuid == X
        world.define(sized(world, SIZE, LARGE), driver)

    with pytest.raises(RefusedError, match="has a saved guest, which could not go on with"):
        world.do(grow_saved)
    assert os.path.getsize(world.path("x1")) == SIZE


def test_without_room_nothing_is_done(world: World) -> None:
    before = os.statvfs(world.fs.root).f_bfree
    with pytest.raises(BackingError, match=r"needs .* more, its file system has .* free"):
        grow(world, SIZE, 1 << 40)
    assert (os.path.getsize(world.path("x1")), os.statvfs(world.fs.root).f_bfree) == (SIZE, before)


def test_a_full_file_system_takes_back_what_it_gave(world: World) -> None:
    """When another program was faster."""
    backing, free = world.fs.backing, os.statvfs(world.fs.root).f_bfree * os.statvfs(world.fs.root).f_frsize
    spec = replace(sized(world, SIZE, SIZE).nvdimms[1], size=SIZE + free * 2)
    with pytest.raises((BackingError, OSError)):
        backing.extend(spec)
    assert os.path.getsize(world.path("x1")) == SIZE


def enlarge(world: World, size: int) -> None:
    """Make the first file longer than its NVDIMM, as an operator can."""
    write(world, "x0", SIZE, bytes(size - SIZE))
    world.repair()


def test_labels_that_a_guest_makes_meanwhile_are_not_left_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were all zeros when the define began, which need not move."""
    write(world, "x0", SIZE - LABEL, bytes(LABEL))
    enlarge(world, LARGE)
    settle = Definitions._settle

    def meanwhile(*arguments: Any) -> None:
        world.start(sized(world, SIZE, SIZE), DOMID)
        run("chattr", "-i", world.path("x0"))
        write(world, "x0", SIZE - LABEL, LABELS)
        run("chattr", "+i", world.path("x0"))
        world.xen().call("destroy", DOMID)
        world.do(lambda driver: driver.release(X))
        settle(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Definitions, "_settle", meanwhile)
        with pytest.raises(InUseError, match="its labels were changed"):
            grow(world, LARGE, SIZE)
    assert world.do(sizes_in_ledger)["x0"] == SIZE
    assert world.content("x0")[SIZE - LABEL : SIZE] == LABELS


def test_a_refused_create_takes_all_of_its_copy_back(world: World) -> None:
    """Also what of it is in the file as it was: it ended in the middle of the new label area."""
    enlarge(world, LARGE - LABEL // 2)
    before = world.content("x0")
    world.do(partial(world.create_refused, sized(world, LARGE, SIZE)))
    assert world.content("x0") == before
    grow(world, LARGE, SIZE)


def test_a_repair_finishes_a_define_that_was_killed_while_it_grew(world: World) -> None:
    """The repair that takes the file as it is now leaves what the define wants besides."""
    wanted = sized(world, LARGE, SIZE)
    wanted = replace(wanted, nvdimms=(wanted.nvdimms[0], replace(wanted.nvdimms[1], path=world.path("new"))))

    def work(driver: XenNvdimmDriver) -> None:
        with driver.locks.changing(X):
            plan = driver.check(wanted)
            driver.begin(wanted, plan)
            driver.define(wanted, plan)

    points = traced(world.work(work)).points
    begin(world)
    grown = next(number for number, each in enumerate(points) if each.startswith("fallocate x0"))
    assert traced(world.work(work), Fault(grown + 1)).killed
    assert world.do(lambda driver: repaired(driver, definition_of={X: wanted}.get)) == []
    record = world.do(lambda driver: driver.ledger.find_domain(X))
    assert record
    has = {os.path.basename(item.spec.path): item.spec.size for item in record.allocations}
    assert has.items() >= {"x0": LARGE, "new": SIZE}.items()


@contextmanager
def leased(path: str) -> Iterator[None]:
    """Have a lease on a file that is given back as soon as somebody opens it, as smbd has."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(file)
        signal.signal(signal.SIGIO, before)


@pytest.mark.parametrize("step", ["_find_growing", "check_kept"])
def test_what_cannot_be_looked_at_for_a_moment_is_not_taken_for_none(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    enlarge(world, LARGE)
    if step == "check_kept":
        grow(world, LARGE, SIZE)
        write(world, "x0", SIZE, b"guest's data")
    where: Any = define if step == "check_kept" else Definitions
    real, calls = getattr(where, step), 0

    def busy(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 and step == "_find_growing":  # in the plan
            return real(*arguments)
        with leased(world.path("x0")):
            return real(*arguments)

    had = world.do(sizes_in_ledger)
    with monkeypatch.context() as patch:
        patch.setattr(where, step, busy)
        with pytest.raises(BackingError):
            grow(world, *((SIZE, SIZE) if step == "check_kept" else (LARGE, SIZE)))
    assert world.do(sizes_in_ledger) == had
    end = had["x0"]
    assert world.content("x0")[end - LABEL : end] == LABELS


def test_what_a_guest_has_run_with_is_not_taken_back(world: World) -> None:
    """A start can fail after its guest has run, as when a hook for 'started' does."""
    domain, names = sized(world, LARGE, LARGE), ("x0", "x1")

    def create(driver: XenNvdimmDriver) -> None:
        with driver.locks.changing(X):
            before = driver.state_of(X, domain)
            made = driver.create(domain, driver.check(domain))
            world.start(domain, DOMID)
            for name in names:  # as only the guest can
                run("chattr", "-i", world.path(name))
                write(world, name, SIZE, b"in the new room")
                run("chattr", "+i", world.path(name))
            world.xen().call("destroy", DOMID)
            world.do(lambda other: other.release(X))
            driver.undo(X, before, made, world.do(lambda other: other.ledger.find_domain(X)))

    world.do(create)
    assert all(world.content(name)[SIZE:].startswith(b"in the new room") for name in names)
    assert world.do(sizes_in_ledger) == {"x0": LARGE, "x1": LARGE}
    assert world.repair() == []


def test_a_create_that_libvirt_refuses_leaves_the_file_as_it_was(world: World) -> None:
    before = world.content("x0")
    world.do(partial(world.create_refused, sized(world, LARGE, SIZE)))
    assert world.content("x0") == before
    run("fallocate", "-l", str(LARGE), world.path("x0"))
    world.do(partial(world.create_refused, sized(world, LARGE, SIZE)))
    assert world.content("x0") == before + bytes(LARGE - SIZE), "no copy of the labels stays"


def test_labels_that_the_guest_has_changed_meanwhile_are_not_left_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvdimm_driver.lifecycle.growth import Growth

    move = Growth.move_labels

    def move_and_write(self: Growth, check: Any) -> None:
        move(self, check)
        write(world, "x0", SIZE - LABEL, b"newer")

    monkeypatch.setattr(Growth, "move_labels", move_and_write)
    with pytest.raises(InUseError, match="its labels were changed by its guest meanwhile"):
        grow(world, LARGE, SIZE)
    assert world.content("x0")[SIZE - LABEL :] == b"newer" + LABELS[5:]


def test_a_ledger_of_before_learns_of_the_growth_from_the_file(world: World) -> None:
    ledger, backup = world.folder / "ledger.sqlite", world.folder / "backup"
    with closing(sqlite3.connect(ledger)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    grow(world, LARGE, LARGE)
    write(world, "x0", LARGE - LABEL, b"newer")
    for restored in (True, False):
        for name in ("", "-wal", "-shm"):
            (world.folder / f"ledger.sqlite{name}").unlink(missing_ok=True)
        if restored:
            ledger.write_bytes(backup.read_bytes())
        with suppress(NvdimmError):
            world.do(partial(world.define, sized(world, SIZE, SIZE)))
        with suppress(NvdimmError):
            world.do(partial(world.create_refused, sized(world, LARGE, LARGE)))
        assert world.repair() == []
        assert world.do(sizes_in_ledger) == {"x0": LARGE, "x1": LARGE}
        assert world.content("x0")[-LABEL:] == b"newer" + LABELS[5:]
    world.start(sized(world, LARGE, LARGE), DOMID)


def test_a_ledger_that_is_lost_before_the_file_is_marked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark is of before: what it says is whole, and a definition makes it larger again."""
    with monkeypatch.context() as patched:
        patched.setattr(ownership, "mark", lambda *_: None)
        grow(world, LARGE, SIZE)
    for name in ("", "-wal", "-shm"):
        (world.folder / f"ledger.sqlite{name}").unlink(missing_ok=True)
    forget_in_use(world.folder)
    assert world.repair() == []
    grow(world, LARGE, SIZE)
    assert world.content("x0")[-LABEL:] == LABELS
    world.start(sized(world, LARGE, SIZE), DOMID)


def walk(world: World, choose: object) -> None:
    """Stop a growth at points, and assert that the old NVDIMM or the new one is whole."""

    def work(driver: XenNvdimmDriver) -> None:
        world.define(sized(world, LARGE, LARGE), driver)

    points = traced(world.work(work)).points
    wrong = []
    for fault in choose(points):  # type: ignore[operator]
        begin(world)
        before, was = {name: world.content(name) for name in ("x0", "x1")}, bases(world)
        ended = traced(world.work(work), fault)
        try:
            if ended.error and not isinstance(ended.error, NvdimmError | OSError):
                raise ended.error
            if ended.error and not isinstance(ended.error, OSError):
                is_old(world, before, "failed")
            for when in ("stopped", "repaired", "done again"):
                if when == "repaired":
                    assert world.repair() == []
                if when == "done again":
                    world.do(work)
                found = world.do(sizes_in_ledger)
                for name, size in found.items():
                    content = world.content(name)
                    labels = LABELS if name == "x0" else b""
                    kept = before[name][: SIZE - len(labels)]
                    assert content[: len(kept)] == kept, f"{when}: {name} has other bytes"
                    assert content[size - len(labels) : size] == labels, f"{when}: {name} has other labels"
                assert bases(world)[:1] == was[:1]
            assert found == {"x0": LARGE, "x1": LARGE}
            world.start(sized(world, LARGE, LARGE), DOMID)
            assert world.is_immutable("n0")
        except (AssertionError, NvdimmError, OSError) as error:
            wrong.append(f"{fault} ({points[fault.point]}): {error}")
    print(f"growth on {world.fs.kind}: {len(points)} points, {len(wrong)} did harm")
    assert not wrong, "\n".join(wrong)


def is_old(world: World, before: dict[str, bytes], when: str) -> None:
    if world.do(sizes_in_ledger) == {"x0": SIZE, "x1": SIZE}:
        for name, content in before.items():
            assert world.content(name)[:SIZE] == content, when


def test_a_growth_that_is_stopped_leaves_the_old_or_the_new(world: World) -> None:
    walk(world, partial(faults, every=EVERY, first=0 if world.fs.kind == "ext4" else EVERY // 4))


@pytest.mark.long
def test_a_growth_that_is_stopped_anywhere_leaves_the_old_or_the_new(world: World) -> None:
    walk(world, all_faults)
