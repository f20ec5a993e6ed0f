# SPDX-License-Identifier: Apache-2.0
"""Three domains share a pool, and anything may happen to them and their host in any order: a state machine.

What may happen to the host comes here beside the rest: its pool is not mounted for a while, and its ledger comes from a
backup.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from nvdimm_driver.backing import inode
from nvdimm_driver.cmd import device_model
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import LedgerError, NvdimmError
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.lifecycle.start import Starts
from nvdimm_driver.model import DomainSpec
from nvdimm_driver.state import ownership
from tests.integration.crash_world import deleted, repaired
from tests.integration.domains_machine import DomainsMachine, ctl_release, ctl_wipe
from tests.integration.domains_model import (
    NAMES,
    UUIDS,
    WHICH,
    Guest,
    Places,
    happens_to,
    is_off,
    is_prepared,
    is_saved,
    runs,
    some_names,
    while_mounted,
)
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.ledger_copies import copy_ledger

STEPS, LONG_STEPS = 5_000, 50_000
RUNS, LONG_RUNS = 4, 20
STEPS_OF_AN_EXAMPLE = 50
MS_BIND = 0x1000
_libc = ctypes.CDLL(None, use_errno=True)


class HostMachine(DomainsMachine):
    """What may happen to the domains and to their host."""

    backup: dict[str, tuple[Places, Places]] | None = None
    """When there is a backup of the ledger: what each domain was defined with then, and what its last guest had."""

    had_starts = False
    """When the pool was unmounted, a guest was running or starting: its files keep their marks if it ends meanwhile."""

    def teardown(self) -> None:
        if self.away:
            self._mount()
        super().teardown()

    # --- the pool is not mounted ---

    @while_mounted
    @rule()
    def pool_is_unmounted(self) -> None:
        _call("umount2", os.fsencode(self.world.fs.root), 2)  # as 'umount --lazy', which guests do not hinder
        self.away = True
        self.had_starts = any(guest.running or guest.prepared for guest in self.guests.values())

    @precondition(lambda self: self.away)
    @rule()
    def pool_is_mounted_again(self) -> None:
        """Files of guests that have ended meanwhile are still immutable, and have their marks: check finds that."""
        self._mount()
        self.repair()
        for uuid in UUIDS:
            self._has_its_own(uuid)

    @precondition(lambda self: self.away)
    @rule()
    def check_repairs_nothing_of_a_pool_that_is_away(self) -> None:
        before = self._do(_claims)
        assert self._do(repaired), "nothing tells that the pool is not there"
        assert self._do(_claims) == before

    @precondition(lambda self: self.away)
    @rule(uuid=st.sampled_from(UUIDS), names=some_names(3))
    def define_without_the_pool(self, uuid: str, names: set[str]) -> None:
        self._is_refused(partial(self.world.define, self._domain(uuid, names)))

    @happens_to(is_off, away=True)
    @rule(which=WHICH)
    def wipe_without_the_pool(self, which: int) -> None:
        self._is_refused(partial(ctl_wipe, uuid=self._one(is_off, which)))

    @happens_to(is_off, away=True)
    @rule(which=WHICH)
    def delete_without_the_pool(self, which: int) -> None:
        self._is_refused(partial(ctl_release, uuid=self._one(is_off, which), delete=True, must=True))

    @precondition(lambda self: not self.had_starts)
    @happens_to(is_off, away=True)
    @rule(which=WHICH)
    def release_without_the_pool(self, which: int) -> None:
        """The claim to a device that will not come back can be given up. If it does, its mark says whose it is."""
        uuid = self._one(is_off, which)
        had = self.guests[uuid].claims
        self._do(partial(ctl_release, uuid=uuid, delete=False, must=True))
        self.pool_is_mounted_again()
        self.guests[uuid] = Guest()
        self._learn(uuid)
        assert self.guests[uuid].claims == had

    @happens_to(is_off, away=True)
    @rule(which=WHICH)
    def start_without_the_pool(self, which: int) -> None:
        uuid = self._one(is_off, which)
        domain = self._domain(uuid, self.guests[uuid].claims)
        self._is_refused(partial(self.world.prepare, domain))

    @happens_to(is_saved, away=True)
    @rule(which=WHICH)
    def restore_without_the_pool(self, which: int) -> None:
        uuid = self._one(is_saved, which)
        saved = self.guests[uuid].saved
        assert saved
        self._is_refused(partial(self.world.prepare, self._domain(uuid, saved[0])))

    @happens_to(is_prepared, away=True)
    @rule(which=WHICH)
    def attach_without_the_pool(self, which: int) -> None:
        """What is held since the hook has run stays where it is: Xen may map it."""
        uuid = self._one(is_prepared, which)
        assert self._attach(uuid, self.guests[uuid].prepared or {}, None)

    @happens_to(runs, away=True)
    @rule(which=WHICH, heard=st.booleans())
    def guest_ends_without_the_pool(self, which: int, heard: bool) -> None:
        uuid = self._one(runs, which)
        self._destroy(uuid)
        self._do(lambda driver: driver.release(uuid) if heard else driver.reconcile())

    # --- the ledger comes from a backup ---

    @rule()
    def ledger_is_backed_up(self) -> None:
        copy_ledger(self.world.folder / "ledger.sqlite", self.world.folder / "backup")
        self.backup = {uuid: (dict(guest.claims), dict(guest.last)) for uuid, guest in self.guests.items()}

    @precondition(lambda self: self.backup is not None and not self.away)
    @rule()
    def ledger_comes_from_the_backup(self) -> None:
        copy_ledger(self.world.folder / "backup", self.world.folder / "ledger.sqlite")
        for uuid, guest in self.guests.items():
            if guest.running is None:  # a start that is in the backup is over
                guest.prepared = None
                self._do(partial(_put_away, uuid=uuid))
            guest.last = dict((self.backup or {})[uuid][1] if guest.running is None else guest.running)
        gone = [path for path in map(self.world.path, NAMES) if not Path(path).exists()]
        left = self._do(partial(repaired, zeros=gone, definition_of=self._definition))
        for uuid, guest in self.guests.items():
            has_more = f"shut domain domain{uuid[-1]} down first" in [remedy for _, _, remedy in left]
            if guest.running is not None and has_more:
                self._end(uuid)  # what it was defined with since is its own again once it is off
        deleted(self._do(partial(repaired, zeros=gone, definition_of=self._definition)))
        for uuid in UUIDS:
            self._has_its_own(uuid)
        self.repair()

    def _definition(self, uuid: str) -> DomainSpec | None:
        """Return what libvirt has of a domain."""
        claims = self.guests[uuid].claims
        one_each = {slot: name for name, (slot, _) in claims.items()}  # of those in one slot, XML has one
        return self._domain(uuid, {*one_each.values()}) if claims else None

    def _has_its_own(self, uuid: str) -> None:
        """Check that a domain has what it had, and besides only what no other domain has."""
        guest = self.guests[uuid]
        had = guest.claims
        record = self._do(lambda driver: driver.ledger.find_domain(uuid))
        items = record.allocations if record else ()
        found = {Path(item.spec.path).name for item in items}
        assert found >= had.keys(), f"{uuid} had {had}, and has {found}"
        bases = {item.base for item in items}
        if any(not item.ready or item.spec.set_aside for item in items) or len(bases) < len(items):
            # deleted since, or in the place of another: the operator defines the domain as libvirt has it, if it has
            if had:
                if len({slot for slot, _ in had.values()}) == len(had):  # else no XML can have them all
                    self._do(partial(self.world.define, self._domain(uuid, had)))
            elif guest.running is None:
                self._do(partial(ctl_release, uuid=uuid, delete=False, must=True))
        self._learn(uuid)
        for name, (slot, base) in had.items():
            now = guest.claims[name]
            assert now[0] == slot, f"{uuid} had {had}, and has {guest.claims}"
            # another one has it now, and no guest has used it, as when a define has chosen it beside a running guest
            others = {item.base for item in items if Path(item.spec.path).name != name}
            may_move = base in others or len(bases) < len(items) or name in guest.last
            unused = may_move and guest.last.get(name) != (slot, base)
            assert now[1] == base or unused, f"{uuid} had {had}, and has {guest.claims}; its last guest: {guest.last}"

    # --- steps of the rules ---

    def _mount(self) -> None:
        _call("mount", os.fsencode(self.world.own), os.fsencode(self.world.fs.root), None, MS_BIND, None)
        self.away = False

    def _is_refused(self, what: object) -> None:
        before = self._do(_claims)
        with pytest.raises(NvdimmError):
            self._do(what)  # type: ignore[arg-type]
        assert self._do(_claims) == before


def _put_away(driver: XenNvdimmDriver, uuid: str) -> None:
    driver.release(uuid)


def _claims(driver: XenNvdimmDriver) -> list[tuple[str, object]]:
    return [(record.uuid, record.claims) for record in driver.ledger.domains()]


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


@pytest.fixture(scope="module")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[FileSystem, Path]]]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in MKFS}
    made = {}
    for kind, folder in folders.items():
        fs, own = FileSystem(folder, kind), folder / "own"
        own.mkdir()
        run("mount", "--bind", fs.root, own)
        made[kind] = fs, own
    yield made
    for fs, own in made.values():
        run("umount", own)
        fs.close()


def _seeded(chance: int) -> type[HostMachine]:
    """Return the machine; Hypothesis chooses its steps by this seed."""

    class Seeded(HostMachine):
        pass

    return seed(chance)(Seeded)


def run_steps(file_systems: dict[str, tuple[FileSystem, Path]], steps: int, chance: int = 0) -> None:
    """Run at least so many steps, in examples of STEPS_OF_AN_EXAMPLE, each on one of the file systems.

    Hypothesis ends some of them early.

    :param chance: which steps: the seed of the choice.

    Hypothesis would draw constants of all modules that are loaded: other steps when other tests have run before.
    """
    DomainsMachine.file_systems, DomainsMachine.steps = file_systems, 0
    began = time.monotonic()
    with (
        mock.patch.object(HypothesisProvider, "_maybe_draw_constant", return_value=None),
        mock.patch("nvdimm_driver.backing.locks.find_waiting", return_value=None),  # nobody suspends these file systems
    ):
        run_state_machine_as_test(
            _seeded(chance),
            settings=settings(
                max_examples=max(1, steps * 3 // 2 // STEPS_OF_AN_EXAMPLE),
                stateful_step_count=STEPS_OF_AN_EXAMPLE,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    print(f"{DomainsMachine.steps} steps, {time.monotonic() - began:.0f} s")
    assert DomainsMachine.steps >= steps


@pytest.mark.parametrize("chance", range(RUNS))
def test_domains_keep_what_is_their_own(file_systems: dict[str, tuple[FileSystem, Path]], chance: int) -> None:
    run_steps(file_systems, STEPS, chance)


TWO = UUIDS[1]
FOUND = {
    "a running guest's base beside a ledger from a backup": [
        ("define", {"uuid": TWO, "names": {"f0", "f1"}}),
        ("prepare", {"which": 0}),
        ("define", {"uuid": TWO, "names": {"f2"}}),
        ("ledger_is_backed_up", {}),
        ("attach", {"which": 0, "other": TWO, "meanwhile": ""}),
        ("ledger_comes_from_the_backup", {}),
        ("reboot", {"which": 0}),
        ("ledger_comes_from_the_backup", {}),
    ],
    "a later mark of what a running guest does not have": [
        ("define", {"uuid": TWO, "names": {"f0", "f1", "f2"}}),
        ("prepare", {"which": 0}),
        ("attach", {"which": 0, "other": TWO, "meanwhile": ""}),
        ("ledger_is_backed_up", {}),
        ("define", {"uuid": TWO, "names": {"f1", "f3"}}),
        ("shut_down", {"which": 0}),
        ("prepare", {"which": 0}),
        ("define", {"uuid": TWO, "names": {"f1", "f2", "f3"}}),
        ("attach", {"which": 0, "other": TWO, "meanwhile": ""}),
        ("ledger_comes_from_the_backup", {}),
    ],
}
"""Steps of runs with other seeds that found something, without those that do not matter for it."""


@pytest.mark.parametrize("kind", [*MKFS])
@pytest.mark.parametrize("steps", FOUND.values(), ids=FOUND)
def test_what_was_found_once_is_mended(
    file_systems: dict[str, tuple[FileSystem, Path]], kind: str, steps: list[tuple[str, dict[str, object]]]
) -> None:
    DomainsMachine.file_systems = file_systems
    machine = HostMachine()
    machine.begin(kind)
    try:
        for name, arguments in steps:
            getattr(machine, name)(**arguments)
            machine.everybody_has_their_own()
    finally:
        machine.teardown()


def _refuse(*_: object, **__: object) -> NoReturn:
    raise LedgerError("refused")


def _do_nothing(*_: object, **__: object) -> None:
    return None


@pytest.mark.parametrize(
    ("what", "name", "instead"),
    [
        (device_model, "attach", _refuse),
        (saved_guest, "check", _refuse),
        (saved_guest, "check_run", _do_nothing),
        (inode, "freeze", _do_nothing),
        (Starts, "thaw", _do_nothing),
        (ownership, "_unmark", _do_nothing),
    ],
    ids=["no start", "no restore", "a restore of all", "no freeze", "no thaw", "marks kept"],
)
def test_the_machine_sees_a_driver_that_errs(
    file_systems: dict[str, tuple[FileSystem, Path]],
    monkeypatch: pytest.MonkeyPatch,
    what: object,
    name: str,
    instead: object,
) -> None:
    monkeypatch.setattr(what, name, instead)
    with pytest.raises((AssertionError, NvdimmError, pytest.fail.Exception)):
        run_steps(file_systems, 5_000)


@pytest.mark.long
@pytest.mark.parametrize("chance", range(RUNS, RUNS + LONG_RUNS))
def test_domains_keep_what_is_their_own_for_long(file_systems: dict[str, tuple[FileSystem, Path]], chance: int) -> None:
    run_steps(file_systems, LONG_STEPS, chance)
