# SPDX-License-Identifier: Apache-2.0
"""Attacks on who owns a file, and on its immutability, on real ext4 and XFS; each lost or showed bytes once."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from multiprocessing.synchronize import Event as EventType
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.backing import inode, locks
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.cmd.ctl import render
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, InUseError, NvdimmError
from nvdimm_driver.model import (
    KIB,
    MIB,
    SUPERPAGE,
    Allocation,
    BackingIdentity,
    DomainSpec,
    Intake,
    NvdimmSpec,
    Pool,
    Progress,
    Record,
    Touch,
)
from nvdimm_driver.plugins import ByteRange, unwatched
from nvdimm_driver.pools.rules import Pools
from tests.integration.loop_pmem import MKFS, FileSystem, lease_break_time, run
from tests.unit.doubles import OTHER_UUID, UUID, RecordingMapper, make_driver, map_prepared
from tests.waiting import HANG_SECONDS

SIZE = 4 * MIB
DATA = bytes(range(256)) * (SIZE // 256)
FORK = get_context("fork")
"""Processes that get what a test has in memory: from Python 3.14 on, others are made by default."""


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
        self.backing = FsdaxBacking(
            locks=Locks(self.folder / "locks"),
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
        map_prepared(self.driver.ledger, 7)

    def evil(self, uuid: str = OTHER_UUID, *, running: bool = False) -> Path:
        """Define a domain whose owner has a folder in the pool, by a link to his file there; return the file's path."""
        folder = Path(self.path("evil"))
        folder.mkdir()
        link = folder / "link"
        (folder / "f.img").write_bytes(bytes(SIZE))
        link.symlink_to(folder / "f.img")
        spec = DomainSpec("evil", uuid, 512 * MIB, None, (NvdimmSpec(0, str(link), SIZE),))
        self.driver.define(spec)
        if running:
            self.mapper.alive[9] = uuid
            self.driver.prepare(spec)
            map_prepared(self.driver.ledger, 9, uuid)
        return folder / "f.img"

    def record(self, uuid: str = UUID) -> Record:
        record = self.driver.ledger.find_domain(uuid)
        assert record
        return record

    def mark(self, name: str) -> bytes | None:
        """Return the owner's mark of a file."""
        with open(self.path(name), "rb") as file:
            return inode.owner(file.fileno())

    def read(self, name: str) -> bytes:
        return Path(self.path(name)).read_bytes()


def turn(path: Path, target: str) -> None:
    """Put a folder in the place of a file's folder in which the file's name is a link; an immutable file stays."""
    path.parent.rename(aside(path))
    path.parent.mkdir()
    path.symlink_to(target)


def turn_back(path: Path) -> None:
    """Undo :func:`turn`."""
    path.unlink()
    path.parent.rmdir()
    aside(path).rename(path.parent)


def aside(path: Path) -> Path:
    return path.parent.with_name("aside")


@contextmanager
def another_user(work: Callable[[int], object], path: str) -> Iterator[None]:
    """Let another user open a file to read it, and do something with the descriptor."""
    ready, told = os.pipe()

    def run_as_nobody() -> None:
        os.chdir(os.path.dirname(path))  # he may not search pytest's folders above
        os.setgid(65534)
        os.setuid(65534)
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        work(os.open(os.path.basename(path), os.O_RDONLY))
        os.write(told, b"x")
        signal.pause()

    process = FORK.Process(target=run_as_nobody, daemon=True)
    process.start()
    assert os.read(ready, 1)
    try:
        yield
    finally:
        process.kill()
        process.join()
        os.close(ready)
        os.close(told)


def lease(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)


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


@pytest.fixture(params=list(MKFS))
def fs(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem]) -> Iterator[FileSystem]:
    yield file_systems[request.param]
    empty(file_systems[request.param])


def empty(file_system: FileSystem) -> None:
    """Delete everything, whatever a test has left frozen."""
    for each in [each for each in file_system.root.rglob("*") if each.is_file() and not each.is_symlink()]:
        run("chattr", "-ia", each)
    run("find", file_system.root, "-mindepth", "1", "-delete")


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
    hidden = ".copy.export"
    spec = host.domain(hidden, OTHER_UUID).nvdimms[0]
    with open(host.path(hidden), "wb") as file:
        file.write(DATA)
    host.driver.ledger.store(OTHER_UUID, "y", 512 * MIB, [Allocation(OTHER_UUID, spec, host.backing.provision(spec))])
    exported = host.domain("a.img").nvdimms[0]
    with pytest.raises(InUseError, match="export belongs to domain y"):
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
        with pytest.raises(
            (InUseError, BackingError), match=r"a file whose import is not finished|partial, and nothing is there"
        ):
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
    meanwhile = Host(tmp_path, fs)  # in a pool that wipes, the claim would stay
    meanwhile.driver.drop_claims(UUID)
    meanwhile.driver.define(host.domain("a.img", OTHER_UUID))
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


def test_a_link_that_is_turned_to_a_file_does_not_keep_it_from_being_wiped_on_release(
    tmp_path: Path, fs: FileSystem
) -> None:
    """Before, the wipe was left out, and the link's owner could have the bytes."""
    host = Host(tmp_path, fs, wipe=True)
    host.define("a.img")
    turn(host.evil(), host.path("a.img"))
    assert render.fate(host.driver, host.record(), delete=False) == (
        f"{host.path('a.img')}: overwritten with zeros (wipe_on_release)"
    )
    host.driver.wiper.give_up(host.record(), quiet, delete=False)
    assert host.driver.ledger.find_domain(UUID) is None
    assert host.read("a.img") == bytes(SIZE)


def test_a_link_that_is_turned_to_a_file_does_not_keep_it_from_its_owner(host: Host) -> None:
    host.define("a.img")
    turn(host.evil(), host.path("a.img"))
    host.driver.define(host.domain("a.img", ram=600 * MIB))
    host.driver.wiper.wipe(host.record().allocations[0].spec, quiet, host.record())
    assert host.read("a.img") == bytes(SIZE)
    assert host.mark("a.img")
    host.driver.forget(UUID)
    assert host.mark("a.img") is None


def test_what_release_says_of_a_file_that_a_link_was_turned_to_is_so(host: Host) -> None:
    host.define("a.img")
    turn(host.evil(), host.path("a.img"))
    assert render.fate(host.driver, host.record(), delete=True) == f"{host.path('a.img')}: deleted"
    host.driver.wiper.give_up(host.record(), quiet, delete=True)
    assert not os.path.exists(host.path("a.img"))


@pytest.mark.parametrize("how", ["release", "release --delete", "wipe"])
def test_the_owner_of_a_link_that_is_turned_cannot_have_another_domains_file_wiped(
    tmp_path: Path, fs: FileSystem, how: str
) -> None:
    host = Host(tmp_path, fs, wipe=how == "release")
    host.define("a.img")
    turn(host.evil(), host.path("a.img"))
    evil = host.record(OTHER_UUID)
    works: dict[str, Callable[[], None]] = {
        "release": lambda: host.driver.wiper.give_up(evil, quiet, delete=False),
        "release --delete": lambda: host.driver.wiper.give_up(evil, quiet, delete=True),
        "wipe": lambda: host.driver.wiper.wipe(evil.allocations[0].spec, quiet, evil),
    }
    with pytest.raises(BackingError, match="a part of the path has become a symbolic link"):
        works[how]()
    host.driver.forget(OTHER_UUID)
    assert host.read("a.img") == DATA
    assert host.mark("a.img")


def test_a_link_that_is_turned_to_a_file_that_cannot_be_located_has_it_neither_wiped_nor_deleted(
    tmp_path: Path, fs: FileSystem
) -> None:
    host = Host(tmp_path, fs, wipe=True)
    path = host.evil()
    with open(host.path("holes.img"), "wb") as file:
        file.seek(SIZE - 4)
        file.write(b"here")
    turn(path, host.path("holes.img"))
    with pytest.raises(BackingError, match="a part of the path has become a symbolic link"):
        host.driver.wiper.give_up(host.record(OTHER_UUID), quiet, delete=True)
    assert host.read("holes.img").endswith(b"here")


def test_a_link_that_is_turned_while_it_is_opened_has_no_other_file_wiped(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define("a.img")
    path = host.evil()
    evil, backing = host.record(OTHER_UUID), host.driver.backings[0]
    open_bytes = backing.open_bytes

    def turned(spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        turn(path, host.path("a.img"))
        try:
            return open_bytes(spec, write=write)
        finally:
            turn_back(path)

    monkeypatch.setattr(backing, "open_bytes", turned)
    with pytest.raises(BackingError, match="a part of the path has become a symbolic link"):
        host.driver.wiper.wipe(evil.allocations[0].spec, quiet, evil)
    assert host.read("a.img") == DATA


@pytest.mark.parametrize("ledger", ["knows", "lost"])
@pytest.mark.parametrize("how", ["wipe", "wipe --unclaimed", "import"])
def test_names_that_are_exchanged_while_a_file_is_opened_have_no_other_domains_file_overwritten(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, ledger: str
) -> None:
    """Who owns the folder does that: what is at the path is nobody's, before and after."""
    host.define("a.img")
    if ledger == "lost":
        (tmp_path / "lost").mkdir()
        host = Host(tmp_path / "lost", host.fs)
    name = ".new.img.partial" if how == "import" else "free.img"
    Path(host.path(name)).write_bytes(b"x" * SIZE)
    (tmp_path / "source").write_bytes(b"y" * SIZE)
    open_bytes = host.backing.open_bytes

    def exchange() -> None:
        os.rename(host.path(name), host.path("aside"))
        os.rename(host.path("a.img"), host.path(name))
        os.rename(host.path("aside"), host.path("a.img"))

    def exchanged(spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        exchange()
        try:
            return open_bytes(spec, write=write)
        finally:
            exchange()

    monkeypatch.setattr(host.backing, "open_bytes", exchanged)
    free = NvdimmSpec(0, host.path(name), SIZE)
    works: dict[str, Callable[[], object]] = {
        "wipe": lambda: host.driver.wiper.wipe(free, quiet),
        "wipe --unclaimed": lambda: host.driver.wiper.wipe_unclaimed(free, quiet),
        "import": lambda: host.driver.importer.import_copy(
            str(tmp_path / "source"), host.path("new.img"), None, 0, quiet
        ),
    }
    with pytest.raises(NvdimmError, match=r"belongs to domain x|is not the backing"):
        works[how]()
    assert host.read("a.img") == DATA


def test_a_path_that_has_got_another_owner_since_the_operator_was_asked_is_not_wiped(host: Host) -> None:
    host.define("a.img")
    host.define("b.img", OTHER_UUID)
    spec = NvdimmSpec(0, host.path("a.img"), SIZE)
    with pytest.raises(InUseError, match=r"a\.img belongs to domain x .* by now"):
        host.driver.wiper.wipe(spec, quiet, owners=[host.record(OTHER_UUID)])
    assert host.read("a.img") == DATA
    host.driver.wiper.wipe(spec, quiet, owners=host.driver.wiper.owners([spec]))
    assert host.read("a.img") == bytes(SIZE)


def test_a_define_under_way_with_a_folder_that_is_swapped_does_not_keep_a_file_from_its_owner(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define("a.img")
    path = host.evil()
    nvdimms = (NvdimmSpec(0, f"{path.parent}/big", SIZE), NvdimmSpec(1, str(path), SIZE))
    evil = DomainSpec("evil", OTHER_UUID, 512 * MIB, None, nvdimms)
    plan = host.driver.check(evil)
    create = host.driver.backings[0].create

    def turned(spec: NvdimmSpec, *rest: Any) -> BackingIdentity:
        if spec.slot == 0:
            turn(path, host.path("a.img"))
            host.another().define(host.domain("a.img", ram=600 * MIB))
        return create(spec, *rest)

    monkeypatch.setattr(host.driver.backings[0], "create", turned)
    with pytest.raises(BackingError, match="a part of the path has become a symbolic link"):
        host.driver.define(evil, plan)
    assert host.record().ram == 600 * MIB


def test_a_define_that_fails_deletes_no_file_that_it_has_not_made(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup gets the name just after the define has looked, and found nothing there."""
    backup = Path(host.path("backup"))
    backup.write_bytes(DATA)
    plan = host.driver.check(host.domain("a.img"))
    examine = host.backing.examine

    def then_moved(spec: NvdimmSpec) -> Intake:
        intake = examine(spec)
        if backup.exists():
            backup.rename(spec.path)
        return intake

    monkeypatch.setattr(host.backing, "examine", then_moved)
    with pytest.raises(BackingError, match=r"a\.img: someone else has written it meanwhile"):
        host.driver.define(host.domain("a.img"), plan)
    assert host.read("a.img") == DATA
    assert host.driver.ledger.find_domain(UUID) is None
    host.driver.define(host.domain("a.img"))
    assert host.read("a.img") == DATA


def test_a_file_keeps_its_mark_when_its_domain_calls_it_by_a_bind_mount(host: Host, tmp_path: Path) -> None:
    bind = tmp_path / "bind"
    bind.mkdir()
    host.define("a.img")
    host.pools = Pools([Pool("main", "fsdax", (str(host.fs.root), str(bind)), None, SUPERPAGE, 128 * KIB, False)])
    run("mount", "--bind", host.fs.root, bind)
    try:
        driver = host.another()
        driver.define(DomainSpec("x", UUID, 512 * MIB, None, (NvdimmSpec(0, f"{bind}/a.img", SIZE),)))
        assert host.mark("a.img")
    finally:
        run("umount", bind)


def test_a_domain_with_the_name_of_an_unfinished_import_still_starts_with_other_ram(host: Host) -> None:
    """0.1.0 let a domain have such a name; 'virsh setmaxmem' bypasses the define."""
    spec = host.domain(".db1.img.partial").nvdimms[0]
    Path(spec.path).write_bytes(DATA)
    host.driver.ledger.store(UUID, "x", 512 * MIB, [Allocation(UUID, spec, host.backing.provision(spec), 1 << 38)])
    host.driver.prepare(host.domain(".db1.img.partial", ram=600 * MIB))
    assert is_immutable(spec.path)


def test_the_name_of_an_unfinished_import_is_refused_in_every_working_directory(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvdimmd works in /, where Debian has a link initrd.img."""
    (tmp_path / "initrd.img").symlink_to("boot/initrd.img-6.1.0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InUseError, match="a file whose import is not finished"):
        host.driver.define(host.domain(".initrd.img.partial"))


def test_a_killed_redefinition_without_nvdimms_gives_nothing_up_that_check_gives_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define("a.img")

    def dies(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        driver = host.another()
        driver.ledger.give_up = dies  # type: ignore[method-assign]
        driver.drop_claims(UUID)

    killed(work)
    (found,) = look(host.driver)
    assert found.problem == "it has no mark", "the domain has its file still"
    with pytest.raises(InUseError, match="belongs to domain x"):
        host.driver.check(host.domain("./a.img", OTHER_UUID))
    host.another().drop_claims(UUID)
    assert look(host.driver) == []


# --- whether it stays where it is ---


def test_a_label_server_that_is_killed_while_it_opens_a_file_leaves_no_mutable_one(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run(host.domain("a.img", label_size=MIB))
    record = host.driver.ledger.find_domain(UUID)
    assert record
    (item,) = record.allocations
    assert item.identity
    with monkeypatch.context() as patch:
        patch.setattr(inode, "open_again", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed(lambda: host.backing.open_labels(item.spec, item.identity))  # type: ignore[arg-type]
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

    def refused(fd: int, run: int | None) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(inode, "freeze", refused)
    with pytest.raises(BackingError, match=rf"^{host.path('a.img')}: Operation not permitted"):
        host.backing.freeze(host.path("a.img"))


def mark(host: Host, number: int) -> None:
    for each in range(150):
        host.backing.mark(host.path("a.img"), f"{number} {each}".encode())


def test_two_processes_that_mark_a_frozen_file_leave_it_frozen(host: Host) -> None:
    host.run(host.domain("a.img"))
    processes = [FORK.Process(target=mark, args=(host, number)) for number in range(3)]
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


def test_a_file_that_is_published_has_one_name_at_every_moment(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a process that is killed between link and unlink leaves a file with two names")

    monkeypatch.setattr(os, "link", refused)
    host.driver.importer.import_copy(str(source), host.path("a.img"), None, 0, quiet)
    assert host.read("a.img") == DATA
    assert [each.name for each in host.fs.files()] == ["a.img"]
    host.backing.move(host.path("a.img"), host.path("b.img"))
    Path(host.path("a.img")).write_bytes(b"other")
    with pytest.raises(BackingError, match=r"cannot be moved to .*: File exists"):
        host.backing.move(host.path("b.img"), host.path("a.img"))
    assert (host.read("a.img"), host.read("b.img")) == (b"other", DATA)


def test_an_import_that_was_killed_between_two_names_is_completed_as_the_error_says(host: Host, tmp_path: Path) -> None:
    """Earlier versions could leave both names."""
    source = tmp_path / "source"
    source.write_bytes(DATA)
    Path(host.path("a.img")).write_bytes(DATA)
    os.link(host.path("a.img"), host.path(".a.img.partial"))
    with pytest.raises(NvdimmError, match="to import it as it is: nvdimmctl import /"):
        host.driver.importer.import_copy(str(source), host.path("a.img"), None, 0, quiet)
    host.driver.importer.import_in_place(host.path("a.img"), None, 0, quiet)
    assert [each.name for each in host.fs.files()] == ["a.img"]
    assert host.read("a.img") == DATA


# --- starts that end, and others that begin ---


def test_a_start_that_begins_while_another_process_puts_the_last_one_away_is_kept(host: Host) -> None:
    """'nvdimmctl list' has found the start of domid 7 over; before it thaws the file, the guest runs as domid 8."""
    host.run(host.domain("a.img"))
    host.mapper.alive.clear()
    hook, backing = host.another(), host.driver.backings[0]
    thaw = backing.thaw_unless

    def late(
        path: str,
        needed: Callable[[BackingIdentity | None], bool],
        identity: BackingIdentity | None = None,
        touch: Touch | None = None,
        *,
        unmark: bool = False,
    ) -> None:
        hook.release(UUID)
        hook.prepare(host.domain("a.img"))
        host.mapper.alive[8] = UUID
        map_prepared(hook.ledger, 8)
        thaw(path, needed, identity, touch, unmark=unmark)

    backing.thaw_unless = late  # type: ignore[method-assign]
    host.driver.reconcile()
    start = host.record().start
    assert start
    assert (start.state, start.domid, is_immutable(host.path("a.img"))) == ("mapped", 8, True)
    with pytest.raises(InUseError, match="is running or starting"):
        host.another().wiper.wipe(host.record().allocations[0].spec, quiet, host.record())


def after(begin: EventType, host: Host, work: Callable[[XenNvdimmDriver], object]) -> None:
    begin.wait()
    work(host.another())


def test_a_start_and_a_reconcile_that_wait_for_the_same_lock_both_succeed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the start could be undone, or fail with SQLite's words."""
    monkeypatch.setattr(locks, "FREEZE_SECONDS", HANG_SECONDS)

    def reboot(driver: XenNvdimmDriver) -> None:
        driver.release(UUID)
        driver.prepare(host.domain("a.img"))

    for _ in range(4):
        host.run(host.domain("a.img"))
        host.mapper.alive.clear()
        works: tuple[Callable[[XenNvdimmDriver], object], ...] = (
            lambda driver: driver.reconcile(),
            reboot,
        )
        begin = FORK.Event()
        processes = [FORK.Process(target=after, args=(begin, host, work)) for work in works]
        for each in processes:
            each.start()
        with open(host.path("a.img"), "rb") as file, host.backing.locks.freezing(file.fileno(), file.name):
            begin.set()
            time.sleep(0.3)
        for each in processes:
            each.join()
            assert each.exitcode == 0
        start = host.record().start
        assert start
        assert (start.state, is_immutable(host.path("a.img"))) == ("prepared", True)
        host.driver.starts.put_away(start)


def test_a_failed_start_with_a_link_that_is_turned_leaves_a_running_guests_file_frozen(host: Host) -> None:
    host.run(host.domain("a.img"))
    path = host.evil()
    turn(path, host.path("a.img"))
    with pytest.raises(BackingError, match=r"evil/f.img leads to .*a.img now"):
        host.driver.prepare(DomainSpec("evil", OTHER_UUID, 512 * MIB, None, (NvdimmSpec(0, str(path), SIZE),)))
    assert is_immutable(host.path("a.img"))
    assert host.record(OTHER_UUID).start is None


def test_the_end_of_a_guest_with_a_link_that_is_turned_leaves_a_running_guests_file_frozen(host: Host) -> None:
    host.run(host.domain("a.img"))
    turn(host.evil(running=True), host.path("a.img"))
    del host.mapper.alive[9]
    host.driver.release(OTHER_UUID)
    assert is_immutable(host.path("a.img"))
    assert host.record(OTHER_UUID).start is None


def test_a_define_freezes_a_file_again_that_an_earlier_version_has_left_mutable(host: Host) -> None:
    """It made the file of a running guest mutable to mark it, and was killed."""
    host.run(host.domain("a.img"))
    run("chattr", "-i", host.path("a.img"))
    host.another().define(host.domain("a.img", ram=600 * MIB))
    assert is_immutable(host.path("a.img"))


def test_check_freezes_no_file_for_a_guest_that_is_off(host: Host) -> None:
    """A release was killed after it had thawed the file."""
    host.run(host.domain("a.img"))
    host.mapper.alive.clear()
    host.backing.thaw(host.path("a.img"))
    (found,) = look(host.driver)
    assert "is over, but was not cleaned up" in found.problem
    assert found.mend
    found.mend()
    assert not is_immutable(host.path("a.img"))


def test_a_repair_freezes_no_file_for_a_guest_that_has_ended_meanwhile(host: Host) -> None:
    host.run(host.domain("a.img"))
    host.backing.thaw(host.path("a.img"))
    (found,) = look(host.driver)
    host.mapper.alive.clear()
    host.another().release(UUID)
    assert found.mend
    found.mend()
    assert not is_immutable(host.path("a.img"))


def test_check_freezes_no_file_that_a_link_was_turned_to(host: Host) -> None:
    host.define("a.img")
    turn(host.evil(running=True), host.path("a.img"))
    for each in look(host.driver):
        if each.mend:
            with pytest.raises(InUseError) if "not the backing" in each.problem else nullcontext():
                each.mend()
    assert not is_immutable(host.path("a.img"))
    assert is_immutable(host.path("aside/f.img"))


# --- other users, other file systems ---


def test_a_lease_on_the_file_of_a_guest_that_is_off_keeps_no_other_domain_from_starting(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.define("b.img")
    evil = host.evil(running=True).parent
    host.mapper.alive.clear()
    for each in (evil, evil / "f.img"):
        run("chattr", "-i", evil / "f.img")
        os.chown(each, 65534, 65534)
    with another_user(lease, str(evil / "f.img")):
        host.driver.prepare(host.domain("b.img"))
        assert is_immutable(host.path("b.img"))
        assert "put-away-failed domain=evil" in caplog.text
        assert "another program has a lease on it" in caplog.text
    host.driver.reconcile()
    assert host.record(OTHER_UUID).start is None


def test_a_lease_on_a_file_hides_no_other_file_from_check(host: Host) -> None:
    host.run(host.domain("b.img"))
    host.backing.thaw(host.path("b.img"))
    Path(host.path("c.txt")).write_bytes(b"x")
    os.chown(host.path("c.txt"), 65534, 65534)
    with another_user(lease, host.path("c.txt")):
        found = {(os.path.basename(each.path), each.problem) for each in look(host.driver)}
    assert found == {
        ("b.img", "a guest has it, and it is not immutable"),
        ("c.txt", "Resource temporarily unavailable"),
    }


def test_a_start_waits_until_the_kernel_ends_a_lease(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.define("a.img")
    os.chown(host.path("a.img"), 65534, 65534)
    with lease_break_time(1), another_user(lease, host.path("a.img")):
        host.driver.prepare(host.domain("a.img"))
    assert is_immutable(host.path("a.img"))


def test_a_lock_by_a_reader_keeps_nobody_from_a_file(host: Host) -> None:
    """qemu-img makes files that everybody may read."""
    path = host.path("a.img")
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    os.chmod(path, 0o644)
    with another_user(lambda fd: fcntl.flock(fd, fcntl.LOCK_EX), path):
        host.driver.define(host.domain("a.img"))
        host.driver.wiper.wipe(host.record().allocations[0].spec, quiet, host.record())
        host.driver.prepare(host.domain("a.img"))
    assert is_immutable(path)
    assert not list((host.folder / "locks").glob("write-*")), "the writers' locks are gone"


def test_a_killed_writer_leaves_no_lock(host: Host) -> None:
    host.define("a.img")
    spec = host.record().allocations[0].spec

    def work() -> None:
        content = host.another().backings[0].open_bytes(spec, write=True)
        content.write(0, b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    killed(work)
    assert list((host.folder / "locks").glob("write-*"))
    host.backing.freeze(spec.path)
    host.backing.thaw(spec.path)
    host.backing.open_bytes(spec, write=True).close()
    assert not list((host.folder / "locks").glob("write-*"))


def test_who_overwrites_a_file_is_named(host: Host) -> None:
    host.define("a.img")
    spec = host.record().allocations[0].spec
    with (
        host.backing.open_bytes(spec, write=True),
        pytest.raises(InUseError, match=rf"a\.img: is being overwritten by process {os.getpid()} \("),
    ):
        host.backing.freeze(spec.path)


def is_taken(lock: Path) -> bool:
    """Return True while a process has a lock."""
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_frozen_file_system_keeps_no_guest_of_another_one_from_starting(
    tmp_path: Path, file_systems: dict[str, FileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done to the frozen one waits for half a second, and the rest as long as it takes."""
    one, other = Host(tmp_path, file_systems["ext4"]), Host(tmp_path, file_systems["xfs"])
    one.define("a.img")
    other.define("b.img", OTHER_UUID)
    run("fsfreeze", "-f", one.fs.root)
    stuck = FORK.Process(target=one.backing.mark, args=(one.path("a.img"), b"new"), daemon=True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(locks, "FREEZE_SECONDS", 0.5)
            stuck.start()
            stuck.join()
        assert any(map(is_taken, (tmp_path / "locks").glob("freeze-*")))
        other.backing.freeze(other.path("b.img"))
        assert is_immutable(other.path("b.img"))
        told = r"a\.img: its file system takes no changes: process \d+ \(.*\) waits"
        with monkeypatch.context() as patch:
            patch.setattr(locks, "FREEZE_SECONDS", 0.5)
            with pytest.raises(BackingError, match=told):
                one.backing.thaw(one.path("a.img"))
    finally:
        run("fsfreeze", "-u", one.fs.root)
        while any(map(is_taken, (tmp_path / "locks").glob("freeze-*"))):
            time.sleep(0.01)
        empty(one.fs)
        empty(other.fs)


def test_an_import_writes_into_no_file_that_a_user_makes_meanwhile(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He has it open, and would read what is imported for another."""
    (tmp_path / "secret.img").write_bytes(DATA)
    examine = FsdaxBacking.examine
    made: list[int] = []

    def then_made(self: FsdaxBacking, spec: NvdimmSpec) -> Intake:
        intake = examine(self, spec)
        if not made and spec.path.endswith(".partial"):
            made.append(os.open(spec.path, os.O_RDWR | os.O_CREAT))
            os.fchown(made[0], 65534, 65534)
        return intake

    monkeypatch.setattr(FsdaxBacking, "examine", then_made)
    with pytest.raises(BackingError, match="File exists"):
        host.driver.importer.import_copy(str(tmp_path / "secret.img"), host.path("new.img"), None, 0, quiet)
    assert os.pread(made[0], 64, 0) in (b"", bytes(64))
    os.close(made[0])
