# SPDX-License-Identifier: Apache-2.0
"""What a user can put at a backing's path, or in the way to it, on real ext4 and XFS."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError, NvdimmError, RefusedError
from nvdimm_driver.lifecycle.define import Before
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, is_immutable, quiet
from tests.unit.doubles import OTHER_UUID, UUID


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


def mallory(path: str | Path) -> DomainSpec:
    """Return the domain of a user who may define domains and owns folders, in the pool too."""
    return DomainSpec("mallory", OTHER_UUID, 512 * MIB, None, (NvdimmSpec(0, str(path), SIZE),))


# --- the way in: paths are resolved once ---


@pytest.mark.parametrize(
    "path",
    [
        "{link}/own.img",
        "{pool}/folder/link.img",
        "{pool}/folder/../folder/own.img",
        "/{pool}//folder///own.img",
        "{pool}/folder/./own.img",
        "/proc/self/root{pool}/folder/own.img",
        "/proc/self/cwd/own.img",
    ],
)
def test_the_ledger_has_what_a_path_led_to_when_it_was_defined(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    folder = Path(host.path("folder"))
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(folder)
    if path.endswith("link.img"):
        (folder / "own.img").write_bytes(DATA)
        (folder / "link.img").symlink_to("own.img")
    monkeypatch.chdir(folder)
    host.driver.define(mallory(path.format(link=link, pool=host.fs.root)))
    (item,) = host.record(OTHER_UUID).allocations
    assert item.spec.path == f"{folder}/own.img"
    assert item.identity
    link.unlink()
    link.symlink_to("/etc")
    monkeypatch.chdir("/")
    host.driver.prepare(host.domain("folder/own.img", OTHER_UUID))


@pytest.mark.parametrize("way", ["link", "..", "/proc/self/root"])
def test_a_path_that_leads_out_of_the_pools_is_refused(host: Host, tmp_path: Path, way: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(DATA)
    Path(host.path("link")).symlink_to(victim)
    up = "/.." * host.path("").count("/")
    path = {
        "link": host.path("link"),
        "..": f"{host.fs.root}{up}{victim}",
        "/proc/self/root": f"/proc/self/root{victim}",
    }
    with pytest.raises(RefusedError, match="victim is in none of the host's pools"):
        host.driver.define(mallory(path[way]))
    assert host.driver.ledger.find_domain(OTHER_UUID) is None


@pytest.mark.parametrize("way", ["link", "prefix", ".."])
def test_another_domains_file_is_refused_whatever_its_path(host: Host, tmp_path: Path, way: str) -> None:
    host.define("a.img")
    (tmp_path / "link").symlink_to(host.path("a.img"))
    (tmp_path / "prefix").symlink_to(host.fs.root)
    Path(host.path("folder")).mkdir()
    path = {"link": f"{tmp_path}/link", "prefix": f"{tmp_path}/prefix/a.img", "..": host.path("folder/../a.img")}[way]
    with pytest.raises(InUseError, match=r"a\.img belongs to domain x"):
        host.driver.define(mallory(path))


# --- what is put in the place of a file afterwards ---


class Swap:
    """A domain's file, in whose place its folder's owner puts something else, and a victim's file.

    :ivar path: of the domain's file.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.mounted = False
        self.victim = Path(host.path("victim"))
        self.victim.write_bytes(DATA)
        folder = Path(host.path("evil"))
        folder.mkdir()
        self.path = folder / "f.img"
        self.created = host.driver.define(mallory(self.path))

    @property
    def aside(self) -> Path:
        return self.path.parent.with_name("aside")

    def swap(self, kind: str) -> None:
        """Put something in the place of the file, which is immutable while a guest has it."""
        self.path.parent.rename(self.aside)
        if kind == "folder is a link":
            (self.victim.parent / "there").mkdir()
            os.link(self.victim, self.victim.parent / "there/f.img")
            os.unlink(self.victim)
            self.victim = self.victim.parent / "there/f.img"
            self.path.parent.symlink_to(self.victim.parent)
            return
        if kind == "gone":
            return
        self.path.parent.mkdir()
        if kind == "link":
            self.path.symlink_to(self.victim)
        elif kind == "hard link":
            os.link(self.victim, self.path)
        elif kind == "renamed":
            self.victim.rename(self.path)
            self.victim = self.path
        elif kind == "fifo":
            os.mkfifo(self.path)
        elif kind == "device":
            os.mknod(self.path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        elif kind == "folder":
            self.path.mkdir()
        elif kind == "bind mount":
            self.path.touch()
            run("mount", "--bind", self.victim, self.path)
            self.mounted = True

    def clean(self) -> None:
        if self.mounted:
            run("umount", self.path)

    def check_victim(self) -> None:
        """Check that nothing has changed the victim's file, or what has its name."""
        assert self.victim.read_bytes() == DATA
        with open(self.victim, "rb") as file:
            assert inode.owner(file.fileno()) is None
            assert not inode.is_immutable(file.fileno())


KINDS = ["link", "folder is a link", "hard link", "renamed", "fifo", "device", "folder", "bind mount", "gone"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def swap(host: Host) -> Iterator[Swap]:
    swap = Swap(host)
    yield swap
    swap.clean()


def is_there(path: Path) -> bool:
    return os.path.lexists(path)


def test_undo_deletes_nothing_else(swap: Swap, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    swap.swap(kind)
    before = is_there(swap.path)
    swap.host.driver.undo(OTHER_UUID, Before(None, None, 0), swap.created, None)
    assert f"{swap.path} stays" in caplog.text
    assert is_there(swap.path) == before
    swap.check_victim()


@pytest.mark.parametrize("delete", [True, False])
def test_release_deletes_and_unmarks_nothing_else(swap: Swap, kind: str, delete: bool) -> None:
    swap.swap(kind)
    before = is_there(swap.path)
    with suppress(BackingError):  # or there is nothing of it
        swap.host.driver.wiper.give_up(swap.host.record(OTHER_UUID), quiet, delete=delete)
    assert is_there(swap.path) == before
    swap.check_victim()


def test_wipe_overwrites_nothing_else(swap: Swap, kind: str) -> None:
    record = swap.host.record(OTHER_UUID)
    swap.swap(kind)
    with pytest.raises((BackingError, NotFoundError)):
        swap.host.driver.wiper.wipe(record.allocations[0].spec, quiet, record)
    swap.check_victim()


def test_a_start_freezes_nothing_else(swap: Swap, kind: str) -> None:
    swap.swap(kind)
    with pytest.raises(NvdimmError):
        swap.host.driver.prepare(mallory(swap.path))
    swap.check_victim()
    items = swap.host.record(OTHER_UUID).allocations
    with pytest.raises(BackingError):  # as after the last check
        swap.host.driver.starts.freeze(OTHER_UUID, items, 2)
    swap.check_victim()


@pytest.mark.parametrize("kind", ["link", "fifo", "device", "folder", "bind mount", "gone"])
def test_the_end_of_a_guest_thaws_nothing_else(swap: Swap, kind: str) -> None:
    """An immutable file can be neither renamed nor given another name."""
    swap.host.driver.prepare(mallory(swap.path))
    with open(swap.victim, "rb") as file:
        inode.freeze(file.fileno())  # for a guest that the ledger does not know
    swap.swap(kind)
    swap.host.driver.release(OTHER_UUID)
    with open(swap.victim, "rb") as file:
        assert inode.is_immutable(file.fileno())
        inode.thaw(file.fileno())
    swap.check_victim()
    assert swap.host.record(OTHER_UUID).start is None


def test_the_end_of_a_guest_thaws_nothing_else_though_its_domain_has_given_its_file_up(host: Host) -> None:
    for name in ("p", "q"):
        os.mkdir(host.path(name))
    host.run(host.domain("p/a.img"))
    host.driver.drop_claims(UUID)
    host.driver.define(host.domain("q/a.img", OTHER_UUID))
    with open(host.path("q/a.img"), "rb") as file:
        inode.freeze(file.fileno())  # for a guest that the ledger does not know
    os.rename(host.path("p"), host.path("r"))
    os.rename(host.path("q"), host.path("p"))
    host.mapper.alive.clear()
    host.driver.reconcile()
    assert is_immutable(host.path("p/a.img"))


def test_labels_of_nothing_else_are_opened(swap: Swap, kind: str) -> None:
    (item,) = swap.host.record(OTHER_UUID).allocations
    assert item.identity
    swap.swap(kind)
    with pytest.raises(BackingError):
        swap.host.backing.open_labels(item.spec, item.identity)
    swap.check_victim()


@pytest.mark.parametrize(
    "work", ["freeze", "mark", "unmark", "thaw", "discard", "unshare", "extend", "fill_holes", "provision"]
)
def test_the_last_step_compares_what_it_has_opened(swap: Swap, kind: str, work: str) -> None:
    (item,) = swap.host.record(OTHER_UUID).allocations
    backing, path = swap.host.backing, str(swap.path)
    works: dict[str, Callable[[], object]] = {
        "freeze": lambda: backing.freeze(path, item.identity),
        "mark": lambda: backing.mark(path, b"mallory", item.identity),
        "unmark": lambda: backing.mark(path, None, item.identity),
        "thaw": lambda: backing.thaw(path, item.identity),
        "discard": lambda: backing.discard(item.spec, item.identity),
        "unshare": lambda: backing.unshare(item.spec, item.identity),
        "extend": lambda: backing.extend(replace(item.spec, size=2 * SIZE), item.identity),
        "fill_holes": lambda: backing.fill_holes(item.spec, item.identity),
        "provision": lambda: backing.provision(item.spec, identity=item.identity),
    }
    swap.swap(kind)
    before = is_there(swap.path)
    may_pass = work in ("unmark", "thaw") or (work, kind) == ("discard", "gone")
    with suppress(BackingError) if may_pass else pytest.raises(BackingError):
        works[work]()
    assert is_there(swap.path) == before
    swap.check_victim()


def test_import_and_export_follow_no_link(host: Host, tmp_path: Path) -> None:
    host.define("a.img")
    victim, source = tmp_path / "victim", tmp_path / "source"
    victim.write_bytes(b"of somebody else")
    source.write_bytes(bytes(SIZE))
    Path(host.path(".new.img.partial")).symlink_to(victim)
    with pytest.raises(NvdimmError, match=r"partial: .*has become a symbolic link"):
        host.driver.importer.import_copy(str(source), host.path("new.img"), None, 0, quiet)
    (tmp_path / ".copy.export").symlink_to(victim)
    spec = host.domain("a.img").nvdimms[0]
    with pytest.raises(NvdimmError, match=r"has become a symbolic link"):
        host.driver.exporter.export(spec, str(tmp_path / "copy"), quiet, overwrite=True, running=False)
    assert victim.read_bytes() == b"of somebody else"


@pytest.mark.parametrize("leads_to", ["nothing", "a file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_export_writes_through_no_link(host: Host, tmp_path: Path, leads_to: str, overwrite: bool) -> None:
    """A user asks the operator for a copy in his folder, and has made a link of its name there."""
    host.define("a.img")
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    folder.mkdir()
    if leads_to == "a file":
        victim.write_bytes(b"of somebody else")
    (folder / "copy").symlink_to(victim)
    spec = host.domain("a.img").nvdimms[0]
    with pytest.raises(RefusedError, match=r"folder/copy: is a symbolic link"):
        host.driver.exporter.export(spec, str(folder / "copy"), quiet, overwrite=overwrite, running=False)
    assert victim.read_bytes() == b"of somebody else" if leads_to == "a file" else not victim.exists()
    host.driver.exporter.export(spec, str(folder / "other"), quiet, overwrite=overwrite, running=False)
    assert (folder / "other").stat().st_size == SIZE


def test_an_import_does_not_go_on_with_a_file_of_another_user(host: Host, tmp_path: Path) -> None:
    source, left = tmp_path / "source", Path(host.path(".new.img.partial"))
    source.write_bytes(DATA)
    left.write_bytes(bytes(SIZE))
    os.chown(left, 65534, 65534)
    with pytest.raises(RefusedError, match=r"partial: is in the way"):
        host.driver.importer.import_copy(str(source), host.path("new.img"), None, 0, quiet)
    assert left.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "hard link"])
def test_a_define_takes_only_a_plain_file(host: Host, kind: str) -> None:
    path = Path(host.path("x.img"))
    Path(host.path("victim")).write_bytes(DATA)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    elif kind == "folder":
        path.mkdir()
    else:
        os.link(host.path("victim"), path)
    with pytest.raises(BackingError):
        host.driver.define(mallory(path))
    assert host.read("victim") == DATA
    assert host.driver.ledger.find_domain(OTHER_UUID) is None


# --- a domain of an earlier version ---


def test_a_definition_with_a_link_goes_on_while_the_link_leads_to_its_bytes(host: Host, tmp_path: Path) -> None:
    """libvirt has the path as its user wrote it."""
    link = tmp_path / "link"
    link.symlink_to(host.fs.root)
    host.define("a.img", OTHER_UUID)
    host.define("b.img")
    host.driver.prepare(mallory(link / "a.img"))
    host.driver.release(OTHER_UUID)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.img").symlink_to(host.path("b.img"))
    link.unlink()
    link.symlink_to("folder")
    with pytest.raises(BackingError, match=r"link/a\.img leads to .*b\.img now, which is not the backing"):
        host.driver.prepare(mallory(link / "a.img"))
    assert host.record(OTHER_UUID).allocations[0].spec.path == host.path("a.img")


@pytest.mark.parametrize("kind", ["link", "hard link", "renamed", "bind mount"])
def test_a_repair_changes_nothing_that_came_after_it_was_found(swap: Swap, kind: str) -> None:
    swap.host.driver.ledger.forget(OTHER_UUID)
    with open(swap.path, "rb") as file:
        inode.mark(file.fileno(), b"what no version wrote")
        inode.freeze(file.fileno())
    found = look(swap.host.driver)
    assert sorted(each.remedy for each in found) == ["make it mutable", "remove the mark"]
    with open(swap.victim, "rb") as file:
        inode.mark(file.fileno(), b"of somebody else")
    swap.swap(kind)
    with open(swap.victim, "rb") as file:
        inode.freeze(file.fileno())
    for each in found:
        assert each.mend
        with suppress(NvdimmError):  # it may be refused, as the file was changed meanwhile
            each.mend()
    with open(swap.victim, "rb") as file:
        assert inode.is_immutable(file.fileno())
        assert inode.owner(file.fileno()) == b"of somebody else"
        inode.thaw(file.fileno())
