# SPDX-License-Identifier: Apache-2.0
"""Attacks on who owns a file, and on its immutability, on real ext4 and XFS; each lost or showed bytes once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import Process
from pathlib import Path

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.backing.inventory import Volume
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, InUseError
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, Allocation, BackingIdentity, DomainSpec, NvdimmSpec, Pool, Progress
from nvdimm_driver.plugins import unwatched
from nvdimm_driver.pools.rules import Pools
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.unit.doubles import OTHER_UUID, UUID, RecordingMapper, make_driver

SIZE = 4 * MIB
DATA = bytes(range(256)) * (SIZE // 256)


class Backing(FsdaxBacking):
    """Dies where it looks at a file's identity, when it is told to."""

    dies = False

    def _identity(self, fd: int, volume: Volume) -> BackingIdentity:
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._identity(fd, volume)


class Host:
    """The driver on a real file system; Xen is a double."""

    def __init__(self, folder: Path, file_system: FileSystem, *, wipe: bool = False) -> None:
        self.folder, self.fs = folder, file_system
        self.mapper = RecordingMapper({})
        self.pools = Pools([Pool("main", "fsdax", (str(file_system.root),), None, SUPERPAGE, 128 * KIB, wipe)])
        self.driver = self.another()

    def another(self) -> XenNvdimmDriver:
        """Return the driver as another process has it."""
        shipped = self.fs.backing
        self.backing = Backing(
            lock=self.folder / "freeze.lock",
            sysfs=shipped.sysfs,
            mountinfo=shipped.mountinfo,
            cross_check=shipped.cross_check,
        )
        return make_driver(self.folder, self.backing, self.mapper, pools=self.pools)  # type: ignore[arg-type]

    def path(self, name: str) -> str:
        return f"{self.fs.root}/{name}"

    def domain(self, name: str, uuid: str = UUID, *, label_size: int = 0, ram: int = 512 * MIB) -> DomainSpec:
        """Return a domain with a file of that name; the domain is named after its uuid."""
        label = "x" if uuid == UUID else "y"
        return DomainSpec(label, uuid, ram, None, (NvdimmSpec(0, self.path(name), SIZE, label_size),))

    def define(self, name: str, uuid: str = UUID, data: bytes = DATA) -> None:
        """Define a domain with a file, and let its guest write."""
        self.driver.define(self.domain(name, uuid))
        with open(self.path(name), "r+b") as file:
            file.write(data)

    def run(self, domain: DomainSpec) -> None:
        """Define a domain, and start it."""
        self.driver.define(domain)
        self.mapper.alive[7] = UUID
        self.driver.prepare(domain)
        self.driver.ledger.begin_mapping(UUID, 7)
        self.driver.ledger.finish_mapping(UUID)

    def read(self, name: str) -> bytes:
        return Path(self.path(name)).read_bytes()


def quiet(what: str) -> Progress:
    del what
    return unwatched


def is_immutable(path: str) -> bool:
    return "i" in run("lsattr", path).split()[0]


def killed(work: Callable[[], object]) -> None:
    """Run something in a process that kills itself in the middle of it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture(scope="module")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FileSystem]]:
    mounted = {kind: FileSystem(tmp_path_factory.mktemp(kind), kind) for kind in MKFS}
    yield mounted
    for each in mounted.values():
        run("umount", each.root)


@pytest.fixture(params=list(MKFS))
def fs(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem]) -> Iterator[FileSystem]:
    yield file_systems[request.param]
    file_systems[request.param].clear()


@pytest.fixture
def host(tmp_path: Path, fs: FileSystem) -> Host:
    return Host(tmp_path, fs)


# --- whose file it is ---


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
def test_an_import_leaves_a_domains_file_alone_that_has_the_name_of_its_own(
    host: Host, tmp_path: Path, size: int
) -> None:
    """0.1.0 let a domain have such a name."""
    hidden, source = ".db1.img.partial", tmp_path / "source"
    source.write_bytes(bytes(size))
    spec = host.domain(hidden).nvdimms[0]
    with open(host.path(hidden), "wb") as file:
        file.write(DATA)
    host.driver.ledger.store(UUID, "x", 512 * MIB, [Allocation(UUID, spec, host.backing.provision(spec))])
    with pytest.raises(InUseError, match="partial belongs to domain x"):
        host.driver.importer.import_copy(str(source), host.path("db1.img"), None, 0, quiet)
    assert host.read(hidden) == DATA
    assert not os.path.exists(host.path("db1.img"))


def test_an_export_leaves_a_domains_file_alone_that_has_the_name_of_its_own(host: Host) -> None:
    host.define("a.img")
    hidden = ".copy.partial"
    spec = host.domain(hidden, OTHER_UUID).nvdimms[0]
    with open(host.path(hidden), "wb") as file:
        file.write(DATA)
    host.driver.ledger.store(OTHER_UUID, "y", 512 * MIB, [Allocation(OTHER_UUID, spec, host.backing.provision(spec))])
    exported = host.domain("a.img").nvdimms[0]
    with pytest.raises(InUseError, match="partial belongs to domain y"):
        host.driver.exporter.export(exported, host.path("copy"), quiet, overwrite=False, running=False)
    assert host.read(hidden) == DATA
    assert not os.path.exists(host.path("copy"))


def test_a_file_keeps_its_mark_when_its_domain_calls_it_by_another_name(host: Host) -> None:
    host.define("a.img")
    host.driver.define(host.domain("./a.img"))
    assert look(host.driver) == []


def test_no_domain_can_have_the_name_of_an_unfinished_import(host: Host) -> None:
    os.symlink(host.path(".db1.img.partial"), host.path("link"))
    for name in (".db1.img.partial", "link"):
        with pytest.raises(InUseError, match="a file whose import is not finished"):
            host.driver.define(host.domain(name))
    os.unlink(host.path("link"))
    assert host.fs.files() == []
    assert host.driver.ledger.domains() == ()
    for name in (".img", "a.partial", ".partial"):
        host.driver.define(host.domain(name))


@pytest.mark.parametrize("how", ["release", "release --delete", "wipe"])
def test_what_another_domain_has_taken_while_root_was_asked_is_kept(tmp_path: Path, fs: FileSystem, how: str) -> None:
    host = Host(tmp_path, fs, wipe=how == "release")
    host.define("a.img")
    seen = host.driver.ledger.find_domain(UUID)
    assert seen
    host.another().drop_claims(UUID)
    host.another().define(host.domain("a.img", OTHER_UUID))
    works: dict[str, Callable[[], None]] = {
        "release": lambda: host.driver.wiper.give_up(seen, quiet, delete=False),
        "release --delete": lambda: host.driver.wiper.give_up(seen, quiet, delete=True),
        "wipe": lambda: host.driver.wiper.wipe(seen.allocations[0].spec, quiet, seen),
    }
    with pytest.raises(InUseError, match="domain x was changed meanwhile"):
        works[how]()
    assert host.read("a.img") == DATA


@pytest.mark.parametrize("delete", [False, True])
def test_a_claim_by_another_name_of_a_domains_file_can_be_given_up_and_nothing_is_lost(
    tmp_path: Path, fs: FileSystem, delete: bool
) -> None:
    """Such a claim is left when a define is killed."""
    host = Host(tmp_path, fs, wipe=not delete)
    host.define("y.img", OTHER_UUID)
    host.driver.ledger.store(UUID, "x", 512 * MIB, [Allocation(UUID, host.domain("./y.img").nvdimms[0])])
    claim = host.driver.ledger.find_domain(UUID)
    assert claim
    assert host.driver.wiper.to_wipe(claim) == host.driver.wiper.own(claim) == ()
    host.driver.wiper.give_up(claim, quiet, delete=delete)
    assert host.driver.ledger.find_domain(UUID) is None
    assert host.read("y.img") == DATA
    assert look(host.driver) == [], "and it has the mark of its owner"


def test_a_file_that_another_domain_is_defined_with_now_is_refused_by_any_name(host: Host) -> None:
    """The other domain's define has told the ledger of its intent, and no more."""
    host.driver.ledger.store(OTHER_UUID, "y", 512 * MIB, [Allocation(OTHER_UUID, host.domain("y.img").nvdimms[0])])
    with pytest.raises(InUseError, match="belongs to domain y"):
        host.driver.check(host.domain("./y.img"))


# --- whether it stays where it is ---


def test_a_label_server_that_is_killed_while_it_opens_a_file_leaves_no_mutable_one(host: Host) -> None:
    host.run(host.domain("a.img", label_size=MIB))
    record = host.driver.ledger.find_domain(UUID)
    assert record
    (item,) = record.allocations
    assert item.identity
    host.backing.dies = True
    killed(lambda: host.backing.open_labels(item.spec, item.identity))  # type: ignore[arg-type]
    host.backing.dies = False
    assert not is_immutable(host.path("a.img")), "the test has hit the moment"
    host.backing.open_labels(item.spec, item.identity).close()
    assert is_immutable(host.path("a.img"))
    host.backing.thaw(host.path("a.img"))
    assert not is_immutable(host.path("a.img"))


def test_check_finds_a_running_guests_file_that_is_mutable(host: Host) -> None:
    host.run(host.domain("a.img"))
    assert look(host.driver) == []
    host.backing.thaw(host.path("a.img"))
    (found,) = look(host.driver)
    assert (found.domain, found.path, found.problem) == (
        "x",
        host.path("a.img"),
        "a guest has it, and it is not immutable",
    )
    assert found.mend
    found.mend()
    assert is_immutable(host.path("a.img"))
    assert look(host.driver) == []


def test_an_error_while_a_file_is_frozen_names_the_file(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.define("a.img")

    def refused(fd: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(inode, "freeze", refused)
    with pytest.raises(BackingError, match=rf"^{host.path('a.img')}: Operation not permitted"):
        host.backing.freeze(host.path("a.img"))


def mark(host: Host, number: int) -> None:
    for each in range(150):
        host.backing.mark(host.path("a.img"), f"{number} {each}".encode())


def test_two_processes_that_mark_a_frozen_file_leave_it_frozen(host: Host) -> None:
    host.run(host.domain("a.img"))
    processes = [Process(target=mark, args=(host, number)) for number in range(3)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
        assert each.exitcode == 0
    assert is_immutable(host.path("a.img"))
    host.backing.thaw(host.path("a.img"))
    assert not is_immutable(host.path("a.img")), "it has its mark still"


def test_while_zeros_are_written_nobody_starts_with_a_file_or_writes_zeros_too(host: Host) -> None:
    """XFS lets a descriptor that is open already write to an immutable file."""
    path, size = host.path("a.img"), 4 * SIZE
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    spec = NvdimmSpec(0, path, size)
    refused = []

    def meanwhile(done: int, total: int) -> None:
        if done == total:
            return
        works: tuple[Callable[[], object], ...] = (
            lambda: host.backing.freeze(path),
            lambda: host.another().backings[0].provision(spec),
        )
        for work in works:
            with pytest.raises(InUseError, match="is being overwritten"):
                work()
            refused.append(work)

    host.backing.provision(spec, meanwhile)
    assert len(refused) >= 2
    assert Path(path).read_bytes() == bytes(size)
    host.backing.freeze(path)
    assert is_immutable(path)


def test_a_partial_import_is_owned_by_nobody_and_is_taken_up_again(host: Host, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    host.backing.allocate(NvdimmSpec(0, host.path("db1.img"), SIZE))
    host.driver.importer.import_copy(str(source), host.path("db1.img"), None, 0, quiet)
    assert host.read("db1.img") == DATA
    assert [each.name for each in host.fs.files()] == ["db1.img"]
