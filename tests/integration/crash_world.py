# SPDX-License-Identifier: Apache-2.0
"""A host whose processes can be killed: real files on ext4 or XFS, a real ledger, and a hypervisor in a file.

Each piece of work runs in a process of its own with a driver of its own, as programs of the driver do.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from nvdimm_driver.backing import inode
from nvdimm_driver.caching import UNCACHED, WRITE_BACK
from nvdimm_driver.cmd import device_model
from nvdimm_driver.cmd.ctl.check import ROUNDS
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_view import DefinitionOf, nobody_to_ask
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError, NvdimmError, XenError
from nvdimm_driver.guest import hot_slots
from nvdimm_driver.guest.hot_slots import SlotRecord
from nvdimm_driver.lifecycle.define import Made
from nvdimm_driver.model import KIB, MIB, PAGE, SUPERPAGE, DomainSpec, NvdimmSpec, Pool, Progress, Watch
from nvdimm_driver.plugins import unwatched
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.xen.domctl import guest_runs
from tests.integration.loop_pmem import FileSystem, run
from tests.ledger_copies import forget_in_use
from tests.unit.doubles import RecordingMapper, make_driver

SIZE = 2 * MIB
LABEL = 128 * KIB
RAM = 512 * MIB
X, NEIGHBOUR, STRANGER = (f"7c7b0e2e-4a6e-4f0e-9a3b-00000000000{digit}" for digit in "123")
DOMID, NEIGHBOURS_DOMID = 5, 9
FINAL = (WRITE_BACK, UNCACHED)
"""What is known of a guest once it is mapped."""

T = TypeVar("T")


def quiet(what: str) -> Progress:
    del what
    return unwatched


def quietly(path: str) -> AbstractContextManager[Watch]:
    del path
    return nullcontext(quiet)


class Hypervisor(RecordingMapper):
    """Xen, with its state in a file. Each hypercall appends a line: so it is a system call of the process.

    :param file: lines of JSON: a word, a domid, and more.
    :param fault: why guests cannot have their NVDIMMs cached; empty for a Xen with the change that caches them.
    :ivar pinned: by domid, the guest frames that are cached.
    """

    def __init__(self, file: Path, fault: str) -> None:
        self.file = file
        super().__init__({})
        self.fault = fault
        self.pinned: dict[int, set[int]] = {}
        self.ends: dict[int, int] = {}
        for word, domid, *more in map(json.loads, file.read_text().splitlines()):
            self._apply(word, domid, *more)

    def _apply(self, word: str, domid: int, *more: Any) -> None:
        if word == "create":
            self.alive[domid] = more[0]
        elif word == "destroy":
            self.alive.pop(domid, None)
            self.ends.pop(domid, None)
            self.memory.pop(domid, None)
            self._forget(domid)
        elif word == "pin":
            self.pinned.setdefault(domid, set()).update(range(more[0], more[0] + more[1]))
        elif word == "map":
            self.mapped.setdefault(domid, []).append((more[0], more[1], more[2]))
            self.ends[domid] = max(self.ends.get(domid, 0), more[0] + more[2])
        elif word == "unmap":
            self._forget(domid, more[0] if more else None)
        elif word == "write":
            self.memory.setdefault(domid, {})[more[0]] = bytes.fromhex(more[1])

    def _forget(self, domid: int, gfns: Collection[int] | None = None) -> None:
        """Forget what a guest has, or the mappings with these first guest frames."""
        mappings = self.mapped.pop(domid, [])
        if left := [each for each in mappings if gfns is not None and each[0] not in gfns]:
            self.mapped[domid] = left
            self.pinned.get(domid, set()).intersection_update(frames_of((gfn, count) for gfn, _, count in left))
        else:
            self.pinned.pop(domid, None)

    def call(self, word: str, domid: int, *more: object) -> None:
        """Append a call."""
        with open(self.file, "ab", buffering=0) as file:
            try:
                file.write(json.dumps([word, domid, *more]).encode() + b"\n")
            except OSError as error:
                raise XenError(f"{word}: {error.strerror}") from error
        self._apply(word, domid, *more)

    def map(
        self, domid: int, mappings: Sequence[tuple[int, int, int]], uncached: Sequence[tuple[int, int]] = ()
    ) -> int:
        try:
            for run in guest_runs(mappings, uncached):
                assert not self.fault, f"{run} is to be cached: {self.fault}"
                self.call("pin", domid, *run)
            for mapping in mappings:
                self.call("map", domid, *mapping)
        except XenError:
            self.call("unmap", domid, [gfn for gfn, *_ in mappings])
            raise
        return len(mappings)

    def unmap(
        self, domid: int, mappings: Sequence[tuple[int, int, int]], uncached: Sequence[tuple[int, int]] = ()
    ) -> None:
        gfns = [gfn for gfn, *_ in mappings]
        if not {*gfns} <= {gfn for gfn, *_ in self.mapped.get(domid, ())}:
            self.call("unmap", domid, gfns)
            raise XenError("EINVAL")  # what there is of it is unmapped nevertheless
        self.call("unmap", domid, gfns)

    def guest_end(self, domid: int) -> int:
        return max(self.guest_frames, self.ends.get(domid, 0))

    def give_slots(self, domid: int, pages: bytes) -> None:
        self.call("write", domid, hot_slots.ADDRESS, pages.hex())

    def write(self, domid: int, address: int, data: bytes) -> None:
        self.call("write", domid, address, data.hex())

    def raise_slot_event(self, domid: int) -> None:
        self.call("event", domid)

    def deliver(self, domid: int, tables: bytes) -> None:
        self.call("deliver", domid, sha256(tables).hexdigest())

    def frames(self) -> dict[int, set[int]]:
        """Return the machine frames of each guest."""
        return {
            domid: {mfn + n for _, mfn, count in mappings for n in range(count)}
            for domid, mappings in self.mapped.items()
        }


@dataclass(frozen=True)
class Kept:
    """An NVDIMM, as the ledger and its file have it."""

    uuid: str
    slot: int
    path: str
    size: int
    base: int | None
    inode: int
    content: int


class World:
    """The host.

    :param wipe: the pool has ``wipe_on_release``.
    """

    def __init__(self, folder: Path, fs: FileSystem, *, wipe: bool = False) -> None:
        self.folder, self.fs, self.wipe = folder, fs, wipe
        self.xen_file = folder / "xen"

    def reset(self) -> None:
        """Make the host new: no file, no ledger, no guest."""
        for each in self.fs.root.rglob("*"):
            if each.is_file() and not each.is_symlink():
                with open(each, "rb") as file:
                    inode._set_immutable(file.fileno(), False)
        run("find", self.fs.root, "-mindepth", "1", "-delete")
        shutil.rmtree(self.folder, ignore_errors=True)
        forget_in_use(self.folder)
        self.folder.mkdir(exist_ok=True)
        self.xen_file.touch()

    def xen(self) -> Hypervisor:
        """Return the hypervisor: on XFS, one that can cache NVDIMMs, so that each operation is tried on both."""
        return Hypervisor(self.xen_file, "this Xen is stock" if self.fs.kind == "ext4" else "")

    def driver(self) -> XenNvdimmDriver:
        """Return a driver, as a process of its own has it."""
        pool = Pool("main", "fsdax", (str(self.fs.root),), None, SUPERPAGE, LABEL, self.wipe)
        backing: Any = self.fs.backing
        return make_driver(self.folder, backing, self.xen(), pools=Pools([pool]), hotplug=True)

    def work(self, what: Callable[[XenNvdimmDriver], T]) -> Callable[[], T]:
        """Return what a process does: something with a driver of its own."""

        def with_driver() -> T:
            driver = self.driver()
            with closing(driver.ledger):
                return what(driver)

        return with_driver

    def do(self, what: Callable[[XenNvdimmDriver], T]) -> T:
        """Do something with a driver of its own, as another process does."""
        return self.work(what)()

    # --- what users and libvirt do ---

    def path(self, name: str) -> str:
        return str(self.fs.root / name)

    def domain(self, uuid: str, *names: str, ram: int = RAM) -> DomainSpec:
        """Return a domain with these files in slots 0, 1, …; ``-`` leaves a slot free. The first has labels."""
        nvdimms = [
            NvdimmSpec(slot, self.path(name), SIZE, 0 if slot else LABEL)
            for slot, name in enumerate(names)
            if name != "-"
        ]
        return DomainSpec(f"domain{uuid[-1]}", uuid, ram, None, tuple(nvdimms))

    def define(self, domain: DomainSpec, driver: XenNvdimmDriver) -> Made:
        """Do what virsh define does."""
        with driver.locks.changing(domain.uuid or ""):
            return driver.define(domain, driver.check(domain))

    def create_refused(self, domain: DomainSpec, driver: XenNvdimmDriver) -> None:
        """Do what virsh create does when libvirt refuses the domain; one that is defined keeps what it has."""
        uuid = domain.uuid or ""
        with driver.locks.changing(uuid):
            plan = driver.check(domain)
            before = driver.state_of(uuid, domain)
            created = driver.create(domain, plan) if before.record else driver.define(domain, plan)
            driver.undo(uuid, before, created, driver.ledger.find_domain(uuid))

    def fill(self, *names: str) -> None:
        """Write what only the guest could have written."""
        for name in names:
            with open(self.path(name), "r+b") as file:
                file.write((name.encode() + b"'s own bytes.").ljust(32, b".") * (SIZE // 32))

    def prepare(self, domain: DomainSpec, driver: XenNvdimmDriver) -> None:
        """Do what the hook does before a start."""
        driver.clear_fault(domain.uuid or "")
        driver.prepare(domain)

    def attach(self, domid: int, driver: XenNvdimmDriver) -> None:
        """Do what the device model does before it becomes QEMU."""
        mapper: Any = driver.planner.mapper
        device_model.attach(domid, driver.ledger, mapper, str(self.folder), driver.prepare_known, _serve)

    def start(self, domain: DomainSpec, domid: int) -> None:
        """Start a domain."""
        self.do(partial(self.prepare, domain))
        self.xen().call("create", domid, domain.uuid)
        self.do(partial(self.attach, domid))

    # --- hot-plug ---

    def with_slots(self, *names: str) -> DomainSpec:
        """Return the domain X with these files, and room for more while it runs."""
        return replace(self.domain(X, *names), hot_slots=4)

    def runs_with_slots(self, *names: str) -> None:
        """Have the domain X run, with slots for hot-plug."""
        self.do(partial(self.define, self.with_slots(*names)))
        self.fill(*names)
        self.start(self.with_slots(*names), DOMID)

    def plug(self, names: Sequence[str], driver: XenNvdimmDriver, new: str = "") -> None:
        """Plug one of these files, by default the last one, into the guest of X, which has the others."""
        domain, path = self.with_slots(*names), self.path(new or names[-1])
        with driver.locks.changing(X):
            driver.settle_guest(X)
            guest = driver.check_plug(X, domain, path)
            state, made = driver.state_of(X, guest), Made()
            try:
                made = driver.create(guest, driver.check(guest))
                driver.plug(X, guest, path)
            except (NvdimmError, OSError):
                driver.undo(X, state, made, None)
                raise

    def fill_plugged(self, name: str) -> None:
        """Write what only the guest could, into a file that is immutable."""
        run("chattr", "-i", self.path(name))
        self.fill(name)
        run("chattr", "+i", self.path(name))

    def slot(self, slot: int) -> SlotRecord:
        """Return what the guest of X has in a slot."""
        return SlotRecord.parse(self.xen().read(DOMID, hot_slots.address_of(slot), hot_slots.RECORD))

    def eject(self, slot: int) -> None:
        """Have the guest of X eject what is in a slot."""
        at, plugs = hot_slots.address_of(slot), self.slot(slot).plugs
        self.xen().write(DOMID, at + 12, plugs.to_bytes(4, "little"))

    def has(self) -> dict[str, int]:
        """Return what the ledger says that the guest of X has: slots, by the names of their files."""

        def read(driver: XenNvdimmDriver) -> dict[str, int]:
            record = driver.ledger.find_domain(X)
            assert record
            return {Path(path).name: slot for path, slot in driver.hotplug.paths(record).items()}

        return self.do(read)

    def neighbour(self) -> None:
        """Have another domain run."""
        domain = self.domain(NEIGHBOUR, "n0", "n1")
        self.do(partial(self.define, domain))
        self.fill("n0", "n1")
        self.start(domain, NEIGHBOURS_DOMID)

    def defined(self, *names: str) -> None:
        """Have the domain X defined, with bytes of its own."""
        self.do(partial(self.define, self.domain(X, *names)))
        self.fill(*(name for name in names if name != "-"))

    # --- what is ---

    def repair(self) -> list[tuple[str, str, str]]:
        """Do what check --repair does; return what is left, as (path, problem, why it is not mended)."""
        return self.do(repaired)

    def kept(self) -> dict[tuple[str, str], Kept]:
        """Return all NVDIMMs in the ledger whose backings are there, by uuid and path."""
        return self.do(self.kept_by)

    def given(self, driver: XenNvdimmDriver, names: Sequence[str]) -> list[str]:
        """Return those of these files that a domain could have which the host does not know yet."""
        found = []
        for name in names:
            with suppress(InUseError):
                driver.check(self.domain(STRANGER, name))
                found.append(name)
        return found

    def content(self, name: str) -> bytes:
        return Path(self.path(name)).read_bytes()

    def kept_by(self, driver: XenNvdimmDriver) -> dict[tuple[str, str], Kept]:
        """Return what :meth:`kept` does."""
        found = {}
        for record in driver.ledger.domains():
            for item in record.allocations:
                path = Path(item.spec.path)
                if item.identity is not None and path.exists():
                    content = crc32(path.read_bytes())
                    found[record.uuid, path.name] = Kept(
                        record.uuid,
                        item.spec.own_slot,
                        path.name,
                        item.spec.size,
                        item.base,
                        item.identity.inode,
                        content,
                    )
        return found

    def wrongly_cached(self) -> list[int]:
        """Return the domids of running guests of which other frames are cached than the ledger says."""
        return self.do(self._wrongly_cached)

    def _wrongly_cached(self, driver: XenNvdimmDriver) -> list[int]:
        xen, found = self.xen(), []
        for record in driver.ledger.domains():
            start = record.start
            if start and start.domid is not None and start.domid in xen.mapped and start.cache in FINAL:
                mapped = frames_of((gfn, count) for gfn, _, count in xen.mapped[start.domid])
                labels = frames_of(
                    ((item.base + item.spec.size - item.spec.label_size) // PAGE, item.spec.label_size // PAGE)
                    for item in record.allocations
                    if item.base is not None
                )
                expected = mapped - labels if start.cache == WRITE_BACK else set()
                if xen.pinned.get(start.domid, set()) != expected:
                    found.append(start.domid)
        return found

    def is_immutable(self, name: str) -> bool:
        with open(self.path(name), "rb") as file:
            return inode.is_immutable(file.fileno())

    def names(self) -> set[str]:
        return set(os.listdir(self.fs.root)) - {"lost+found"}


def frames_of(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """Return all frames of ranges (first, count)."""
    return {first + n for first, count in ranges for n in range(count)}


def repaired(
    driver: XenNvdimmDriver, zeros: Collection[str] = (), definition_of: DefinitionOf = nobody_to_ask
) -> list[tuple[str, str, str]]:
    """Repair what can be repaired; return what is left, as :meth:`World.repair` does.

    :param zeros: files whose lost bytes are given up.
    :param definition_of: returns libvirt's definition of a domain.
    """
    failed = {}
    for _ in range(ROUNDS):
        todo = [each for each in look(driver, definition_of, zeros) if each.mend and each not in failed]
        if not todo:
            break
        for finding in todo:
            try:
                assert finding.mend
                finding.mend()
            except NvdimmError as error:
                failed[finding] = str(error)
    return [(each.path, each.problem, failed.get(each, each.remedy)) for each in look(driver, definition_of)]


def deleted(left: Collection[tuple[str, str, str]]) -> list[str]:
    """Return the paths of files that were deleted; check that nothing else is left after a repair.

    :param left: as :func:`repaired` returns it.
    """
    assert all("is not provisioned" in problem or problem == "it is not there" for _, problem, _ in left), left
    return [path for path, problem, _ in left if problem == "it is not there"]


def _serve(state_dir: str, domid: int, uuid: str) -> None:
    raise AssertionError("no domain here has a label server")
