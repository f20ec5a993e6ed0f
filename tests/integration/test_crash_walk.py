# SPDX-License-Identifier: Apache-2.0
"""The crash walk: each operation is killed before each system call that changes something, and each such call fails.

After each of these, a fresh process repairs what ``check`` finds; then nobody's bytes, slots and bases have changed,
nobody can have another's file, and the operation completes when it is done again.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest

from nvdimm_driver.contents import ordinary_files, streams
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.plugins import unwatched
from nvdimm_driver.state.schema import SCHEMAS
from tests.integration.crash_labels import has_the_label, has_whole_pages, write_labels
from tests.integration.crash_points import Ended, Fault, traced
from tests.integration.crash_world import (
    LABEL,
    NEIGHBOURS_DOMID,
    SIZE,
    STRANGER,
    World,
    X,
    deleted,
    quiet,
    quietly,
    repaired,
)
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.ledger_copies import forget_in_use

DOMID = 5
ERRORS = (errno.ENOSPC, errno.EIO, errno.EPERM, errno.ENOMEM, errno.E2BIG)
WAYS = [*((error, lasting) for lasting in (False, True) for error in ERRORS), (errno.EINTR, False)]
"""How a call can fail: an errno, and whether later calls of its kind fail, too. EINTR that lasts would be no errno."""
EVERY = 12
"""Of how many points one is tried, in the short version."""


@dataclass(frozen=True)
class Operation:
    """Something that programs of the driver do.

    :ivar before: makes the state in which it begins.
    :ivar work: does it; can be repeated.
    :ivar gives_up: names of files that the domain has no more when it is done.
    :ivar overwrites: names of files whose bytes it overwrites or deletes.
    :ivar ready: names of files that are the domain's, or zeros, when it is done.
    :ivar after: what libxl and libvirt do when it has failed or was killed.
    :ivar again: prepares its repetition; then it is done in the same way.
    :ivar done: checks that it is done.
    """

    name: str
    before: Callable[[World], None]
    work: Callable[[World, XenNvdimmDriver], object]
    gives_up: tuple[str, ...] = ()
    overwrites: tuple[str, ...] = ()
    after: Callable[[World], None] = lambda world: None
    again: Callable[[World], None] = lambda world: None
    done: Callable[[World], None] = lambda world: None
    wipe: bool = False


# --- the operations ---


def _new(world: World) -> None:
    """Begin without the domain."""


def _defined(world: World) -> None:
    world.defined("x0", "x1")


def _define_more(world: World, driver: XenNvdimmDriver) -> None:
    world.define(world.domain(X, "new", "x1", ram=768 << 20), driver)


def _holds_one(world: World) -> None:
    """Have a domain whose only NVDIMM is not where a plan made anew would put it."""
    world.defined("x0", "x1")
    world.do(partial(world.define, world.domain(X, "-", "x1")))
    run("chattr", "-i", world.path("x0"))
    os.unlink(world.path("x0"))


def _create(world: World, driver: XenNvdimmDriver) -> None:
    world.create_refused(world.domain(X, "x0", "x1"), driver)


def _create_defined(world: World, driver: XenNvdimmDriver) -> None:
    world.create_refused(world.domain(X, "x0", "new"), driver)


def _claims_nothing(world: World) -> None:
    """Give up what is left of a create whose undoing failed, too."""
    world.do(partial(_give_up, world))


def _starts_as_before(world: World) -> None:
    world.start(world.domain(X, "x0", "x1"), DOMID)
    world.do(partial(world.define, world.domain(X, "x0", "x1")))


def _provision(world: World, driver: XenNvdimmDriver) -> None:
    driver.importer.provision(world.domain(X, "new").nvdimms[0], quiet)


def _image(world: World) -> None:
    """Have an image with bytes, holes and unwritten extents, outside the pool and in it."""
    for file in (world.folder / "image", Path(world.path("image"))):
        with open(file, "wb") as image:
            image.write(b"image's own bytes" * 1000)
            image.truncate(SIZE)
            os.posix_fallocate(image.fileno(), SIZE // 2, SIZE // 4)


def _import_in_place(world: World, driver: XenNvdimmDriver) -> None:
    driver.importer.import_in_place(world.path("image"), SIZE, LABEL, quiet)


def _import_copy(world: World, driver: XenNvdimmDriver) -> None:
    if not os.path.exists(world.path("new")):
        driver.importer.import_copy(str(world.folder / "image"), world.path("new"), SIZE, LABEL, quiet)


def _stream(world: World) -> None:
    """Have an image as another host sends it."""
    _image(world)
    with ordinary_files.open_source(str(world.folder / "image")) as image, open(world.folder / "stream", "wb") as out:
        streams.write_header(out, [streams.Sent("new", SIZE, LABEL, None)], is_whole=True)
        streams.write_end(out, streams.write(image, out, (), unwatched))


def _receive(world: World, driver: XenNvdimmDriver) -> None:
    if not os.path.exists(world.path("new")):
        with open(world.folder / "stream", "rb") as stream:
            sent, is_whole = streams.read_header(stream)
            driver.importer.receive(stream, sent, [world.path("new")], quietly, is_whole=is_whole)


def _prepare(world: World, driver: XenNvdimmDriver) -> None:
    world.prepare(world.domain(X, "x0", "x1"), driver)


def _prepared(world: World) -> None:
    world.defined("x0", "x1")
    world.do(partial(world.prepare, world.domain(X, "x0", "x1")))
    world.xen().call("create", DOMID, X)


def _attach(world: World, driver: XenNvdimmDriver) -> None:
    world.attach(DOMID, driver)


def _destroyed(world: World) -> None:
    """Do what libxl and libvirt do when the device model of a start fails."""
    world.xen().call("destroy", DOMID)
    world.do(lambda driver: driver.release(X))


def _prepared_again(world: World) -> None:
    world.do(partial(world.prepare, world.domain(X, "x0", "x1")))
    world.xen().call("create", DOMID, X)


def _is_mapped(world: World) -> None:
    assert set(world.xen().mapped) == {NEIGHBOURS_DOMID, DOMID}
    assert world.is_immutable("x0")
    assert world.is_immutable("x1")


def _over(world: World) -> None:
    world.defined("x0", "x1")
    world.start(world.domain(X, "x0", "x1"), DOMID)
    world.xen().call("destroy", DOMID)


def _release_start(world: World, driver: XenNvdimmDriver) -> None:
    driver.release(X)


def _is_mutable(world: World) -> None:
    assert not world.is_immutable("x0")
    assert not world.is_immutable("x1")


def _give_up(world: World, driver: XenNvdimmDriver, *, delete: bool = False) -> None:
    record = driver.ledger.find_domain(X)
    if record is not None:
        driver.wiper.give_up(record, quiet, delete=delete)


def _can_be_anothers(world: World) -> None:
    for name in sorted(world.names() & {"x0", "x1"}):
        world.do(partial(world.define, world.domain(STRANGER, name)))


def _is_anothers_and_empty(world: World) -> None:
    _can_be_anothers(world)
    assert world.content("x0") == world.content("x1") == bytes(SIZE)


def _is_deleted(world: World) -> None:
    assert not world.names() & {"x0", "x1"}


def _wipe(world: World, driver: XenNvdimmDriver) -> None:
    record = driver.ledger.find_domain(X)
    assert record
    for item in record.allocations:
        driver.wiper.wipe(item.spec, quiet, record)


def _is_empty(world: World) -> None:
    assert world.content("x0") == world.content("x1") == bytes(SIZE)


def _ledger_lost(world: World) -> None:
    world.defined("x0", "x1")
    for name in ("", "-wal", "-shm"):
        (world.folder / f"ledger.sqlite{name}").unlink(missing_ok=True)


def _repair(world: World, driver: XenNvdimmDriver) -> None:
    left = repaired(driver)
    if left:
        raise NvdimmError(str(left))


def _old_ledger(world: World) -> None:
    """Have a ledger of the version before, with the same content."""
    world.defined("x0", "x1")
    new, old = world.folder / "ledger.sqlite", world.folder / "old"
    with sqlite3.connect(old, isolation_level=None) as database:
        for function in ("real_path", "real_paths"):  # for the content of an older ledger
            database.create_function(function, 1, str)
        database.executescript(
            f"PRAGMA journal_mode=WAL; {''.join(SCHEMAS[:-1])}; PRAGMA user_version={len(SCHEMAS) - 1}"
        )
        database.execute("ATTACH ? AS new", (str(new),))
        tables = [name for (name,) in database.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")]
        for table in tables:
            database.execute(f"DELETE FROM main.{table}")
            columns = ", ".join(row[1] for row in database.execute(f"PRAGMA main.table_info({table})"))
            database.execute(f"INSERT OR REPLACE INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}")
        database.execute("UPDATE main.latest SET file = ''")  # that of the other file
    database.close()
    for name in (".sqlite-wal", ".sqlite-shm"):
        (world.folder / f"ledger{name}").unlink(missing_ok=True)
    forget_in_use(world.folder)
    os.replace(old, new)


def _open_ledger(world: World, driver: XenNvdimmDriver) -> None:
    assert driver.ledger.find_domain(X)


def _runs(world: World) -> None:
    world.defined("x0", "x1")
    world.start(world.domain(X, "x0", "x1"), DOMID)


def _open_labels(world: World, driver: XenNvdimmDriver) -> None:
    """Do what a label server does at its start. It cannot write here: without DAX, ext4 takes no stores then."""
    record = driver.ledger.find_domain(X)
    assert record
    item = record.allocations[0]
    assert item.identity
    with driver.backings[0].open_labels(item.spec, item.identity) as labels:
        assert labels.read(0, 4)


def _has_the_label(world: World) -> None:
    _is_mapped(world)
    has_the_label(world)


def _has_slots(world: World) -> None:
    world.runs_with_slots("x0")


def _plug(world: World, driver: XenNvdimmDriver) -> None:
    if "x1" not in world.has():
        world.plug(["x0", "x1"], driver)


def _is_plugged(world: World) -> None:
    _is_mapped(world)
    assert world.has() == {"x0": 0, "x1": 1}


def _has_ejected(world: World) -> None:
    world.runs_with_slots("x0")
    world.do(partial(world.plug, ["x0", "x1"]))
    world.fill_plugged("x1")
    world.eject(1)


def _settle(world: World, driver: XenNvdimmDriver) -> None:
    driver.settle_guest(X)


def _is_put_away(world: World) -> None:
    assert world.has() == {"x0": 0}
    assert world.is_immutable("x0")
    assert not world.is_immutable("x1")


BOTH = ("x0", "x1")
OPERATIONS = [
    Operation("define", _new, lambda world, driver: world.define(world.domain(X, "x0", "x1"), driver)),
    Operation("redefine", _holds_one, _define_more),
    Operation("create", _new, _create, done=_claims_nothing),
    Operation("create of a defined domain", _defined, _create_defined, done=_starts_as_before),
    Operation("provision", _new, _provision),
    Operation("import in place", _image, _import_in_place),
    Operation("import copy", _image, _import_copy),
    Operation("receive", _stream, _receive),
    Operation("prepare", _defined, _prepare),
    Operation("map", _prepared, _attach, after=_destroyed, again=_prepared_again, done=_is_mapped),
    Operation("release of a start", _over, _release_start, done=_is_mutable),
    Operation("release", _defined, _give_up, BOTH, done=_can_be_anothers),
    Operation("release with a wipe", _defined, _give_up, BOTH, BOTH, done=_is_anothers_and_empty, wipe=True),
    Operation("release --delete", _defined, partial(_give_up, delete=True), BOTH, BOTH, done=_is_deleted),
    Operation(
        "release --delete with a wipe",
        *(_defined, partial(_give_up, delete=True), BOTH, BOTH),
        done=_is_deleted,
        wipe=True,
    ),
    Operation("wipe", _defined, _wipe, overwrites=BOTH, done=_is_empty),
    Operation("repair", _ledger_lost, _repair),
    Operation("upgrade of the ledger", _old_ledger, _open_ledger),
    Operation("open labels", _runs, _open_labels, done=_is_mapped),
    Operation("plug", _has_slots, _plug, done=_is_plugged),
    Operation("put away what was ejected", _has_ejected, _settle, done=_is_put_away),
    Operation("write labels", _runs, write_labels, overwrites=("x0",), after=has_whole_pages, done=_has_the_label),
]


# --- the walk ---


def ends_of_rows(points: list[str]) -> list[int]:
    """Return the numbers of all points but those between two equal ones, such as the pages of one transaction."""
    inner = range(1, len(points) - 1)
    return [n for n in range(len(points)) if n not in inner or not points[n - 1] == points[n] == points[n + 1]]


class Walk:
    """One operation on one file system."""

    def __init__(self, world: World, operation: Operation) -> None:
        self.world, self.operation = world, operation
        world.wipe = operation.wipe

    def points(self) -> list[str]:
        """Return the points of the operation, which completes."""
        self._begin()
        ended = self._run(None)
        if ended.error:
            raise ended.error
        self.operation.done(self.world)
        return ended.points

    def at(self, fault: Fault) -> None:
        """Let a fault happen; assert that nothing is lost and that the operation then completes."""
        self._begin()
        ended = self._run(fault)
        if ended.error and not isinstance(ended.error, NvdimmError | OSError):
            raise ended.error
        failed = ended.killed or ended.error is not None
        if failed:
            self._keeps("before anything is repaired, ")
            self.operation.after(self.world)
        assert deleted(self.world.repair()) == []
        self._keeps("after the repair, ")
        if failed:
            self.operation.again(self.world)
            self.world.do(partial(self.operation.work, self.world))
        self.operation.done(self.world)
        self._keeps("when it was done again, ")
        left = self.world.repair()
        assert left == [], left

    def _begin(self) -> None:
        self.world.reset()
        self.world.neighbour()
        self.operation.before(self.world)
        self.had = {} if self.operation.before is _ledger_lost else self.world.kept()
        self.contents = {name: self.world.content(name) for name in self.world.names()}

    def _run(self, fault: Fault | None) -> Ended:
        return traced(self.world.work(partial(self.operation.work, self.world)), fault)

    def _keeps(self, when: str) -> None:
        self._keeps_content(when)
        self._keeps_places(when)
        self._keeps_apart(when)

    def _keeps_content(self, when: str) -> None:
        for name, content in self.contents.items():
            if name not in self.operation.overwrites and name != "image":
                assert self.world.content(name) == content, f"{when}{name} has other bytes"
        for name in ("image", "new") if "image" in self.contents else ():
            if name in self.world.names():
                assert self.world.content(name) == self.contents["image"], f"{when}{name} has other bytes"
        for name in {"x0", "x1", "new"} & self.world.names() - {*self.contents} if "image" not in self.contents else ():
            assert self.world.content(name) == bytes(SIZE), f"{when}{name} shows bytes that were there before it"

    def _keeps_places(self, when: str) -> None:
        """Assert that the domains have their NVDIMMs in their slots and at their bases, and no other can have them."""
        names = [name for _, name in self.had if name not in self.operation.gives_up]
        now, given = self.world.do(lambda driver: (self.world.kept_by(driver), self.world.given(driver, names)))
        for key, had in self.had.items():
            if had.path not in self.operation.gives_up:
                expected = had
                if had.path in self.operation.overwrites and key in now:
                    expected = replace(had, content=now[key].content)
                assert now.get(key) == expected, f"{when}{had.path} is another"
        assert given == [], f"{when}another domain may have {given}"

    def _keeps_apart(self, when: str) -> None:
        """Assert that no guest can get what is another's."""
        assert self.world.is_immutable("n0"), when
        assert self.world.is_immutable("n1"), when
        frames = self.world.xen().frames()
        for domid, own in frames.items():
            for other, others in frames.items():
                assert domid == other or not own & others, f"{when}{domid} and {other} have the same frames"
        assert self.world.wrongly_cached() == [], when


@pytest.fixture(scope="module", params=list(MKFS))
def fs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystem]:
    made = FileSystem(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.close()


@pytest.fixture
def world(fs: FileSystem) -> World:
    return World(fs.memory / "state", fs)


def faults(points: list[str], *, every: int, first: int) -> list[Fault]:
    """Return a sample of what can happen at an operation's points: it is killed at some, and others fail.

    :param every: at how many points nothing happens, for one at which something does.
    :param first: the first point at which something does.
    """
    ends = ends_of_rows(points)
    ways = cycle(WAYS)
    return [
        *(Fault(point) for point in ends[first::every]),
        *(Fault(point, *next(ways)) for point in ends[(first + every // 2) % every :: every]),
    ]


def all_faults(points: list[str]) -> list[Fault]:
    """Return everything that can happen: it is killed at any point, or any point fails in any way."""
    return [Fault(point, *way) for point in range(len(points)) for way in ((0, False), *WAYS)]


def take(walk: Walk, choose: Callable[[list[str]], list[Fault]]) -> None:
    """Walk through an operation, and report everything that is wrong."""
    points = walk.points()
    chosen = choose(points)
    wrong = []
    for fault in chosen:
        try:
            walk.at(fault)
        except (AssertionError, NvdimmError, OSError) as error:
            wrong.append(f"{fault} ({points[fault.point]}): {error}")
    name, kind = walk.operation.name, walk.world.fs.kind
    print(f"{name} on {kind}: {len(points)} points, {len(chosen)} faults, {len(wrong)} of them did harm")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_nothing_is_lost_where_an_operation_is_stopped(world: World, operation: Operation) -> None:
    first = 0 if world.fs.kind == "ext4" else EVERY // 4
    take(Walk(world, operation), partial(faults, every=EVERY, first=first))


def test_the_walk_sees_a_release_that_loses_bytes(world: World) -> None:
    def lose(world: World, driver: XenNvdimmDriver) -> None:
        _give_up(world, driver)
        for name in BOTH:
            with open(world.path(name), "r+b") as file:
                file.write(bytes(SIZE))

    walk = Walk(world, Operation("release", _defined, lose, BOTH, done=_can_be_anothers))
    with pytest.raises(AssertionError, match=r"when it was done again, x[01] has other bytes"):
        walk.at(Fault(0))


@pytest.mark.long
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_nothing_is_lost_wherever_an_operation_is_stopped(world: World, operation: Operation) -> None:
    take(Walk(world, operation), all_faults)
