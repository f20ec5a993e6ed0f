# SPDX-License-Identifier: Apache-2.0
"""The crash walk with a ledger from a backup, whose marks are later, and with files that were given back to a guest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.model import DomainSpec, NvdimmSpec
from tests.integration import test_crash_walk as walks
from tests.integration.crash_world import LABEL, RAM, SIZE, World, X
from tests.integration.test_crash_walk import DOMID, EVERY, Operation, Walk, all_faults, faults, take
from tests.ledger_copies import copy_ledger

fs, world = walks.fs, walks.world
BOTH = ("x0", "x1")


class RestoredWalk(Walk):
    """A walk through an operation after which, or after a repair, the domain has what it had before the backup came."""

    def _begin(self) -> None:
        super()._begin()
        self.had = getattr(self.world, "had", self.had)

    def _keeps_places(self, when: str) -> None:
        if not when.startswith("before"):
            return super()._keeps_places(when)
        given = self.world.do(lambda driver: self.world.given(driver, [name for _, name in self.had]))
        assert given == [], f"{when}another domain may have {given}"


def swapped(world: World) -> DomainSpec:
    """Return the domain with its two files in each other's slots."""
    specs = (NvdimmSpec(0, world.path("x1"), SIZE), NvdimmSpec(1, world.path("x0"), SIZE, LABEL))
    return DomainSpec(f"domain{X[-1]}", X, RAM, None, specs)


def then_restored(world: World, change: Callable[[], object]) -> None:
    """Change something and note what the domain has then; and have the ledger of before."""
    backup = world.folder / "backup"
    backup.unlink(missing_ok=True)
    copy_ledger(world.folder / "ledger.sqlite", backup)
    change()
    world.had = world.kept()  # type: ignore[attr-defined]
    copy_ledger(backup, world.folder / "ledger.sqlite")


def two(world: World) -> None:
    world.defined(*BOTH)
    then_restored(world, lambda: world.do(partial(world.define, swapped(world))))


def one_more(world: World) -> None:
    world.defined("x0")
    then_restored(world, lambda: world.do(partial(world.define, swapped(world))))


def runs_with_both(world: World) -> None:
    world.defined(*BOTH)
    world.start(world.domain(X, *BOTH), DOMID)
    world.do(partial(world.define, world.domain(X, "-", "x1")))


def give_back(world: World, driver: XenNvdimmDriver) -> None:
    world.define(world.domain(X, *BOTH), driver)


def given_back(world: World) -> None:
    runs_with_both(world)
    world.do(partial(give_back, world))
    world.xen().call("destroy", DOMID)


def given_back_since(world: World) -> None:
    runs_with_both(world)
    then_restored(world, lambda: world.do(partial(give_back, world)))
    world.xen().call("destroy", DOMID)


def end(world: World, driver: XenNvdimmDriver) -> None:
    del world
    driver.release(X)


def has_both(world: World) -> None:
    assert world.do(lambda driver: world.given(driver, [*BOTH])) == []


def ends_with_both(world: World) -> None:
    assert world.is_immutable("x0")
    assert world.is_immutable("x1")
    world.xen().call("destroy", DOMID)
    world.do(partial(end, world))
    has_both(world)


OPERATIONS = [
    Operation("repair", two, walks._repair),
    Operation("repair, one more", one_more, walks._repair),
    Operation("start", two, lambda world, driver: world.prepare(swapped(world), driver)),
    Operation("define", two, lambda world, driver: world.define(swapped(world), driver)),
    Operation("refused create", two, lambda world, driver: world.create_refused(swapped(world), driver)),
    Operation("end of a guest that was given a file back", given_back, end, done=has_both),
    Operation("end of a guest that was given a file back since", given_back_since, end, done=has_both),
    Operation("giving a file back", runs_with_both, give_back, done=ends_with_both),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_nothing_is_lost_where_an_operation_is_stopped(world: World, operation: Operation) -> None:
    first = 0 if world.fs.kind == "ext4" else EVERY // 4
    take(RestoredWalk(world, operation), partial(faults, every=EVERY, first=first))


@pytest.mark.long
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_nothing_is_lost_wherever_an_operation_is_stopped(world: World, operation: Operation) -> None:
    take(RestoredWalk(world, operation), all_faults)
