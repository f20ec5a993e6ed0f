# SPDX-License-Identifier: Apache-2.0
"""What may happen to domains that share a pool; after each step, all agrees with their model.

Files and ledger are real, Xen is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import cache, partial
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from nvdimm_driver.backing import inventory
from nvdimm_driver.cmd import device_model
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.model import PAGE, DomainSpec, NvdimmSpec
from tests.integration.crash_points import Fault, traced
from tests.integration.crash_world import RAM, SIZE, deleted, quiet, repaired
from tests.integration.domains_model import (
    SLOTS,
    UUIDS,
    WHICH,
    Guest,
    OneXen,
    Places,
    happens_to,
    is_off,
    is_prepared,
    is_saved,
    runs,
    some_names,
    while_mounted,
)
from tests.integration.loop_pmem import MKFS, FileSystem

ABANDONED = 601
"""Seconds after which a start that did not come is put away."""

T = TypeVar("T")


class DomainsMachine(RuleBasedStateMachine):
    """What may happen to the domains."""

    file_systems: dict[str, tuple[FileSystem, Path]]
    steps = 0
    away = False
    """The pool is not mounted."""

    @initialize(kind=st.sampled_from([*MKFS]))
    def begin(self, kind: str) -> None:
        fs, own = self.file_systems[kind]
        self.world = OneXen(fs.memory / "state", fs, own)
        self.world.reset()
        self.guests = {uuid: Guest() for uuid in UUIDS}
        self.contents: dict[str, bytes] = {}
        self.domids = self.writes = 0
        self.ahead = 0
        self.patches = ExitStack()
        self.patches.enter_context(mock.patch("time.time", partial(_later, time.time, self)))
        for look_up in (inventory.namespaces, inventory.volume_if_pmem):  # devices stay; a look at each is slow
            self.patches.enter_context(mock.patch.object(inventory, look_up.__name__, cache(look_up)))

    def teardown(self) -> None:
        if hasattr(self, "patches"):
            self.patches.close()

    # --- what operators and clients do ---

    @while_mounted
    @rule(uuid=st.sampled_from(UUIDS), names=some_names(3))
    def define(self, uuid: str, names: set[str]) -> None:
        domain = self._domain(uuid, names)
        if self._refuses(uuid, names):
            with pytest.raises(NvdimmError):
                self._do(partial(self.world.define, domain))
        else:
            self._do(partial(self.world.define, domain))
            self._is_defined(uuid, names)

    @while_mounted
    @rule(
        uuid=st.sampled_from(UUIDS),
        names=some_names(2),
        point=st.integers(0, 90),
    )
    def define_is_killed(self, uuid: str, names: set[str], point: int) -> None:
        domain = self._domain(uuid, names)
        if not self._refuses(uuid, names):
            self._kill(partial(self.world.define, domain), point)
            self._is_defined(uuid, names)

    @while_mounted
    @rule(uuid=st.sampled_from(UUIDS), names=some_names(2))
    def create_that_libvirt_refuses(self, uuid: str, names: set[str]) -> None:
        guest = self.guests[uuid]
        if not self._refuses(uuid, names) and guest.running is None and guest.prepared is None:
            self._do(partial(self.world.create_refused, self._domain(uuid, names)))

    @while_mounted
    @rule(uuid=st.sampled_from(UUIDS), delete=st.booleans(), point=st.none() | st.integers(0, 40))
    def release(self, uuid: str, delete: bool, point: int | None) -> None:
        guest = self.guests[uuid]
        if guest.running is not None or guest.prepared is not None:
            with pytest.raises(NvdimmError):
                self._do(lambda driver: ctl_release(driver, uuid, delete=delete, must=True))
            return
        work = partial(ctl_release, uuid=uuid, delete=delete, must=False)
        if point is None:
            self._do(work)
        else:
            self._kill(work, point)
        if delete:
            for name in guest.claims:
                del self.contents[name]
        self.guests[uuid] = Guest()

    @happens_to(is_off)
    @rule(which=WHICH, point=st.none() | st.integers(0, 20))
    def wipe(self, which: int, point: int | None) -> None:
        uuid = self._one(is_off, which)
        guest = self.guests[uuid]
        work = partial(ctl_wipe, uuid=uuid)
        if point is None:
            self._do(work)
        else:
            self._kill(work, point)
        self.contents |= dict.fromkeys(guest.claims, bytes(SIZE))

    @while_mounted
    @rule()
    def repair(self) -> None:
        left = self._do(repaired)
        assert left == [], left

    @while_mounted
    @rule()
    def reconcile(self) -> None:
        self._do(lambda driver: driver.reconcile())

    # --- the life of a guest ---

    @happens_to(is_off)
    @rule(which=WHICH)
    def prepare(self, which: int) -> None:
        uuid = self._one(is_off, which)
        domain = self._next(uuid)
        self._do(lambda driver: self.world.prepare(domain, driver))
        self._is_prepared(uuid, domain)

    @happens_to(is_off)
    @rule(which=WHICH, point=st.integers(0, 60))
    def prepare_is_killed(self, which: int, point: int) -> None:
        uuid = self._one(is_off, which)
        domain = self._next(uuid)
        self._kill(lambda driver: self.world.prepare(domain, driver), point)
        self._is_prepared(uuid, domain)

    @happens_to(is_prepared)
    @rule(
        which=WHICH,
        other=st.sampled_from(UUIDS),
        meanwhile=st.sampled_from(["", "reconcile", "release", "wipe", "define", "repair"]),
    )
    def attach(self, which: int, other: str, meanwhile: str) -> None:
        uuid = self._one(is_prepared, which)
        guest = self.guests[uuid]
        self.world.shared.meanwhile = partial(self._meanwhile, meanwhile, other)
        runs = self._attach(uuid, guest.prepared or {}, None)
        self.world.shared.meanwhile = None
        assert runs or meanwhile, "a start that nobody disturbs fails"

    @happens_to(runs)
    @rule(which=WHICH)
    def reboot(self, which: int) -> None:
        uuid = self._one(runs, which)
        guest = self.guests[uuid]
        self._end(uuid)
        if guest.claims:
            domain = self._next(uuid)
            self._do(lambda driver: self.world.prepare(domain, driver))
            self._is_prepared(uuid, domain)
            assert self._attach(uuid, guest.prepared or {}, None), "a reboot fails"

    @happens_to(runs)
    @rule(which=WHICH)
    def shut_down(self, which: int) -> None:
        uuid = self._one(runs, which)
        self._end(uuid)

    @happens_to(runs)
    @rule(which=WHICH)
    def end_unheard(self, which: int) -> None:
        """The guest ends while libvirtd is not there: no hook runs."""
        uuid = self._one(runs, which)
        self._destroy(uuid)
        self._do(lambda driver: driver.reconcile())

    @happens_to(runs)
    @rule(which=WHICH)
    def guest_writes(self, which: int) -> None:
        self.writes += 1
        data = f"write {self.writes}".encode().ljust(32, b".") * (SIZE // 32)
        for name in self.guests[self._one(runs, which)].running or ():
            self.world.write(name, data)
            self.contents[name] = data

    @happens_to(runs)
    @rule(which=WHICH)
    def save(self, which: int) -> None:
        uuid = self._one(runs, which)
        guest = self.guests[uuid]
        had = dict(guest.running or {})
        image = dict(self.world.shared.memory[guest.domid])
        self._end(uuid)
        guest.saved = had, {name: self.contents[name] for name in had}, image

    @happens_to(is_saved)
    @rule(which=WHICH)
    def restore(self, which: int) -> None:
        self._restore(self._one(is_saved, which))

    @happens_to(runs)
    @rule(which=WHICH, overwritten=st.booleans())
    def save_and_restore(self, which: int, overwritten: bool) -> None:
        """A guest goes on with what it has written, unless that was overwritten meanwhile."""
        uuid = self._one(runs, which)
        self.guest_writes(which)
        self.save(which)
        if overwritten:
            self._do(partial(ctl_wipe, uuid=uuid))
            self.contents |= dict.fromkeys(self.guests[uuid].claims, bytes(SIZE))
        saved = self.guests[uuid].saved
        assert saved
        kept = all(self.contents[name] == content for name, content in saved[1].items())
        assert self._restore(uuid) == kept, f"a guest was overwritten: {not kept}"

    def _restore(self, uuid: str) -> bool:
        """Let a saved guest go on, as far as it is let; return True when it runs."""
        guest = self.guests[uuid]
        assert guest.saved
        had, contents, image = guest.saved
        goes_on = False
        with suppress(NvdimmError):
            self._do(lambda driver: self.world.prepare(self._domain(uuid, had), driver))
            guest.prepared = dict(had)
            goes_on = self._attach(uuid, had, image)
        same = contents == {name: self.contents[name] for name in had}
        assert same or not goes_on, "a guest goes on with other bytes"
        self._learn(uuid)
        return goes_on

    # --- what happens to the host ---

    @rule(seconds=st.sampled_from([-ABANDONED, ABANDONED, 86400]))
    def clock_steps(self, seconds: int) -> None:
        self.ahead += seconds

    # --- what must hold ---

    @invariant()
    def everybody_has_their_own(self) -> None:
        DomainsMachine.steps += 1
        if not hasattr(self, "guests"):
            return
        for name, content in self.contents.items():
            assert self.world.content(name) == content, f"{name} has other bytes"
        self._do(self._agrees)

    def _agrees(self, driver: XenNvdimmDriver) -> None:
        records = {record.uuid: record for record in driver.ledger.domains()}
        for uuid, guest in self.guests.items():
            record = records.get(uuid)
            items = record.allocations if record else ()
            now = {Path(item.spec.path).name: (item.spec.own_slot, item.base) for item in items}
            assert now == guest.claims, f"{uuid} is defined with {now}, its start has {guest.prepared or guest.running}"
            start = record.start if record else None
            if guest.prepared is not None and start is None:
                guest.prepared = None
            if guest.running is not None:
                assert start is not None, f"{uuid} runs, and the ledger does not know it"
                assert (start.state, start.domid) == ("mapped", guest.domid)
                assert {Path(path).name for path in start.paths} == {*guest.running}
            for name in guest.running or guest.prepared or ():
                assert self.world.is_immutable(name), f"{name} can be changed"
        for domid, mappings in self.world.shared.mapped.items():
            guest = next(each for each in self.guests.values() if each.running is not None and each.domid == domid)
            assert self._frames(driver, guest.running or {}) == _frames_of(mappings), "a guest has other frames"
        used = {name for guest in self.guests.values() for name in guest.running or guest.prepared or ()}
        for name in self.contents.keys() - used if not self.away else ():
            assert not self.world.is_immutable(name), f"{name} is immutable for nobody"

    # --- steps of the rules ---

    def _one(self, kind: Callable[[Guest], bool], which: int) -> str:
        found = [uuid for uuid, guest in self.guests.items() if kind(guest)]
        return found[which % len(found)]

    def _do(self, what: Callable[[XenNvdimmDriver], T]) -> T:
        driver = self.world.driver()
        with closing(driver.ledger):
            return what(driver)

    def _kill(self, what: Callable[[XenNvdimmDriver], object], point: int) -> None:
        """Do it in a process that is killed at a point, repair, and do it again."""
        ended = traced(self.world.work(lambda driver: bool(what(driver))), Fault(point))
        if ended.error is not None:
            raise ended.error
        if ended.killed:
            deleted(self._do(repaired))
            self._do(what)

    def _domain(self, uuid: str, names: set[str] | Places) -> DomainSpec:
        nvdimms = [
            NvdimmSpec(SLOTS[name], self.world.path(name), SIZE) for name in sorted(names, key=SLOTS.__getitem__)
        ]
        return DomainSpec(f"domain{uuid[-1]}", uuid, RAM, None, tuple(nvdimms))

    def _refuses(self, uuid: str, names: set[str]) -> bool:
        """Return True when another domain has one of the files."""
        return any(not guest.has().isdisjoint(names) for each, guest in self.guests.items() if each != uuid)

    def _is_defined(self, uuid: str, names: set[str]) -> None:
        """Note a definition, in which the NVDIMMs that it had keep their places."""
        before = self.guests[uuid].claims
        self._learn(uuid)
        now = self.guests[uuid].claims
        assert {*now} == names
        last = self.guests[uuid].last
        for name in names & {*before}:
            free = [None, *(last[each][1] for each in names & {*last} if each != name)]
            kept = now[name] in (before[name], last.get(name))
            assert kept or before[name][1] in free, f"{before} became {now}, the last guest had {last}"
        for name in names:
            self.contents.setdefault(name, bytes(SIZE))

    def _next(self, uuid: str) -> DomainSpec:
        """Return a domain for its next guest: of two NVDIMMs in one slot, the one that is set aside is in no XML."""
        record = self._do(lambda driver: driver.ledger.find_domain(uuid))
        items = record.allocations if record else ()
        return self._domain(uuid, {Path(item.spec.path).name for item in items if not item.spec.set_aside})

    def _is_prepared(self, uuid: str, domain: DomainSpec) -> None:
        self._is_defined(uuid, {*self.guests[uuid].claims})
        names = {Path(spec.path).name for spec in domain.nvdimms}
        self.guests[uuid].prepared = {name: at for name, at in self.guests[uuid].claims.items() if name in names}

    def _learn(self, uuid: str) -> None:
        """Take over what the ledger says that a domain is defined with."""
        record = self._do(lambda driver: driver.ledger.find_domain(uuid))
        items = record.allocations if record else ()
        assert all(item.ready for item in items)
        self.guests[uuid].claims = {Path(item.spec.path).name: (item.spec.own_slot, item.base) for item in items}
        every = [name for guest in self.guests.values() for name in guest.claims]
        assert len(every) == len({*every}), "two domains have a file"

    def _attach(self, uuid: str, places: Places, image: dict[int, bytes] | None) -> bool:
        """Have libxl run the device model; return True when the guest runs then."""
        guest, xen = self.guests[uuid], self.world.shared
        self.domids += 1
        guest.domid = self.domids
        xen.alive[guest.domid] = uuid
        if image is not None:
            xen.memory[guest.domid] = dict(image)
        try:
            self._do(partial(self._become, guest.domid, restored=image is not None))
        except NvdimmError:
            self._end(uuid)
            return False
        if image is None:
            xen.boot(guest.domid)
        guest.running, guest.prepared, guest.last = dict(places), None, dict(places)
        return True

    def _become(self, domid: int, driver: XenNvdimmDriver, *, restored: bool) -> None:
        folder, xen = str(self.world.folder), self.world.shared
        device_model.attach(domid, driver.ledger, xen, folder, _unprepared, _serve, restored=restored)

    def _end(self, uuid: str) -> None:
        """Have a guest end, and libvirt run its hook."""
        self._destroy(uuid)
        self._do(lambda driver: driver.release(uuid))

    def _destroy(self, uuid: str) -> None:
        guest, xen = self.guests[uuid], self.world.shared
        for table in (xen.alive, xen.mapped, xen.uncached, xen.memory, xen.delivered):
            table.pop(guest.domid, None)
        guest.running = guest.prepared = None

    def _meanwhile(self, what: str, uuid: str) -> None:
        """Do what another process may do while a device model maps; what it is refused does not matter."""
        guest = self.guests[uuid]
        busy = guest.running is not None or guest.prepared is not None
        with suppress(NvdimmError):
            if what == "reconcile":
                self._do(lambda driver: driver.reconcile())
            elif what == "repair":
                assert self._do(repaired) == []
            elif what == "release":
                self._do(partial(ctl_release, uuid=uuid, delete=False, must=True))
                assert not busy
                self.guests[uuid] = Guest()
            elif what == "wipe":
                self._do(partial(ctl_wipe, uuid=uuid))
                self.contents |= dict.fromkeys(guest.claims, bytes(SIZE))
                assert not busy or not guest.claims
            elif what == "define":
                self.define(uuid, {"f0", "f1"})

    def _frames(self, driver: XenNvdimmDriver, places: Places) -> dict[int, int]:
        """Return the machine frame of each guest frame that a guest is to have."""
        frames = {}
        for name, (slot, base) in places.items():
            assert base is not None
            for extent in driver.backings[0].locate(NvdimmSpec(slot, str(self.world.own / name), SIZE)).extents:
                for at in range(0, extent.length, PAGE):
                    frames[(base + extent.offset + at) // PAGE] = (extent.spa + at) // PAGE
        return frames


def _frames_of(mappings: list[tuple[int, int, int]]) -> dict[int, int]:
    return {gfn + n: mfn + n for gfn, mfn, count in mappings for n in range(count)}


def _later(clock: Callable[[], float], machine: DomainsMachine) -> float:
    return clock() + machine.ahead


def ctl_release(driver: XenNvdimmDriver, uuid: str, *, delete: bool, must: bool) -> None:
    """Do what nvdimmctl release does."""
    driver.reconcile()
    record = driver.ledger.find_domain(uuid)
    if record is not None:
        driver.wiper.give_up(record, quiet, delete=delete)
    elif must:
        raise NvdimmError("no such domain")


def ctl_wipe(driver: XenNvdimmDriver, uuid: str) -> None:
    """Do what nvdimmctl wipe does."""
    driver.reconcile()
    record = driver.ledger.find_domain(uuid)
    for item in record.allocations if record else ():
        driver.wiper.wipe(item.spec, quiet, record)


def _unprepared(uuid: str) -> None:
    raise NvdimmError(f"the start of {uuid} was put away")


def _serve(state_dir: str, domid: int, uuid: str) -> None:
    raise AssertionError("no domain here has a label server")
