# SPDX-License-Identifier: Apache-2.0
"""Two processes and one start: the second does all its work between any two steps of the first.

Whatever comes of it, a guest that has frames is the one that the ledger knows, its files are frozen, and at most one
domid has them. The steps are found by the test: each change of the ledger and of a backing is one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.cmd.device_model import attach
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError, NvdimmError
from nvdimm_driver.model import BackingIdentity, Touch
from nvdimm_driver.state.ledger import Ledger
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, domain, make_driver

A, B = "/mnt/pmem0/a", "/mnt/pmem0/b"


class LockingBacking(MemoryBacking):
    """Has the lock of real backings: nothing is frozen while another process thaws; who waits for it gives up."""

    def __init__(self) -> None:
        super().__init__()
        self.thawing = False

    def freeze(self, path: str, identity: BackingIdentity | None = None) -> None:
        if self.thawing:
            raise InUseError(f"{path}: another process has been thawing a file of this file system")
        super().freeze(path, identity)

    def thaw_unless(
        self,
        path: str,
        needed: Callable[[BackingIdentity | None], bool],
        identity: BackingIdentity | None = None,
        touch: Touch | None = None,
        *,
        unmark: bool = False,
    ) -> None:
        if self.thawing:
            raise InUseError(f"{path}: another process has been thawing a file of this file system")
        self.thawing = True
        try:
            super().thaw_unless(path, needed, identity, touch, unmark=unmark)
        finally:
            self.thawing = False


class Interruption:
    """Runs something before the n-th step of a process, once.

    :ivar steps: number of steps so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.at = -1
        self.other: Callable[[], None] = lambda: None

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.other()


class Host:
    """A host on which two processes work, each with a driver of its own; the domain is defined with A."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backing = LockingBacking()
        self.mapper = RecordingMapper()
        interruption = self.interruption = Interruption()

        class InterruptedLedger(Ledger):
            def _write(self, *arguments: Any, **named: Any) -> bool:
                interruption.step()
                written = super()._write(*arguments, **named)
                interruption.step()
                return written

        class InterruptedBacking(LockingBacking):
            def freeze(self, path: str, identity: BackingIdentity | None = None) -> None:
                interruption.step()
                super().freeze(path, identity)
                interruption.step()

            def thaw_unless(
                self,
                path: str,
                needed: Callable[[BackingIdentity | None], bool],
                identity: BackingIdentity | None = None,
                touch: Touch | None = None,
                *,
                unmark: bool = False,
            ) -> None:
                interruption.step()
                super().thaw_unless(path, needed, identity, touch, unmark=unmark)
                interruption.step()

        interrupted = InterruptedBacking()
        interrupted.__dict__ = self.backing.__dict__
        self.first = make_driver(folder, interrupted, self.mapper, ledger=InterruptedLedger)
        self.second = make_driver(folder, self.backing, self.mapper)
        for driver in (self.first, self.second):
            driver.locks.seconds = driver.starts.release_seconds = 0.0
            driver.ledger._write([("PRAGMA synchronous = OFF", ())], begin="")  # nobody cuts the power
        self.second.define(domain(A))

    def run(self, first: Callable[[], None], second: Callable[[], None], at: int) -> bool:
        """Do the first's work, and the second's before step `at`; return False if it has fewer steps."""

        def other() -> None:
            with suppress(NvdimmError):
                second()

        self.interruption.steps, self.interruption.at, self.interruption.other = 0, at, other
        with suppress(NvdimmError):
            first()
        self.interruption.at = -1
        return self.interruption.steps >= at

    def prepare(self, driver: XenNvdimmDriver, path: str = A) -> None:
        driver.prepare(domain(path))

    def attach(self, driver: XenNvdimmDriver, domid: int) -> None:
        """Do what a device model does after Xen has the domain; if it fails, libxl destroys the domain."""
        self.mapper.alive[domid] = UUID
        try:
            attach(domid, driver.ledger, self.mapper, str(self.folder), driver.prepare_known, no_server)
        except NvdimmError:
            del self.mapper.alive[domid]
            raise

    def put_away_what_is_abandoned(self) -> None:
        """Reconcile, as if every start that waits for its device model did so for too long."""
        self.second.starts.abandoned_seconds = 0
        self.second.reconcile()
        self.second.starts.abandoned_seconds = 600

    def check(self) -> None:
        """Check what must hold, before and after everything that is over is put away."""
        self.check_now()
        self.put_away_what_is_abandoned()
        self.check_now()
        if not self.mapper.mapped:
            assert self.backing.frozen == set()

    def check_now(self) -> None:
        record = self.second.ledger.find_domain(UUID)
        assert record is not None
        assert len(self.mapper.mapped) <= 1
        for domid in self.mapper.mapped:
            assert record.start is not None
            assert (record.start.domid, record.start.state) == (domid, "mapped")
            assert {*record.start.paths} <= self.backing.frozen


def no_server(state_dir: str, domid: int, uuid: str) -> None:
    raise AssertionError("this guest needs no label server")


def walk(tmp_path: Path, first: Callable[[Host], None], second: Callable[[Host], None], *, prepared: bool) -> int:
    """Let the second do its work at each step of the first, on a new host each time; return the number of steps."""
    for at in range(1, 1000):
        folder = tmp_path / str(at)
        folder.mkdir()
        host = Host(folder)
        if prepared:
            host.prepare(host.second)
        inside = host.run(lambda: first(host), lambda: second(host), at)  # noqa: B023
        host.check()
        host.first.ledger.close()
        host.second.ledger.close()
        if not inside:
            return at - 1
    raise AssertionError("it does not end")


def start(host: Host) -> None:
    host.prepare(host.first)
    host.attach(host.first, 5)


@pytest.mark.parametrize(
    "second",
    [
        Host.put_away_what_is_abandoned,
        lambda host: host.attach(host.second, 6),
        lambda host: host.prepare(host.second),
        lambda host: host.second.release(UUID),
    ],
    ids=["reconcile", "another device model", "another prepare", "release"],
)
def test_a_start_and_another_process_at_any_of_its_steps(tmp_path: Path, second: Callable[[Host], None]) -> None:
    assert walk(tmp_path, start, second, prepared=False) >= 10


@pytest.mark.parametrize(
    "first",
    [
        lambda host: host.first.reconcile(),
        lambda host: host.first.release(UUID),
        lambda host: host.prepare(host.first, B),
    ],
    ids=["reconcile", "release", "another prepare"],
)
def test_the_device_model_comes_at_any_step_of_who_puts_its_start_away(
    tmp_path: Path, first: Callable[[Host], None]
) -> None:
    def impatient(host: Host) -> None:
        host.first.starts.abandoned_seconds = 0
        first(host)

    assert walk(tmp_path, impatient, lambda host: host.attach(host.second, 5), prepared=True) >= 5


def test_the_file_of_a_start_that_never_came_does_not_stay_frozen(tmp_path: Path) -> None:
    """The start is prepared, a network is missing, the domain is redefined with another file, and starts."""
    host = Host(tmp_path)
    host.prepare(host.first)
    host.first.define(domain(B))
    host.prepare(host.first, B)
    host.attach(host.first, 5)
    assert host.backing.frozen == {B}


def test_a_start_of_a_ledger_of_before_is_abandoned(tmp_path: Path) -> None:
    """Earlier versions noted the time of day, which a clock that counts from the boot never reaches."""
    host = Host(tmp_path)
    host.prepare(host.first)
    assert host.first.starts.find_stale() == []
    host.first.ledger._write([("UPDATE attachment SET id = '', since = 1700000000", ())])
    host.first.reconcile()
    assert host.backing.frozen == set()
