# SPDX-License-Identifier: Apache-2.0
"""FsdaxBacking on real files of this machine, whose disk a fake sysfs presents as a pmem namespace."""

import errno
import itertools
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.backing.paths import Entry
from nvdimm_driver.errors import BackingError, NvdimmError
from nvdimm_driver.model import MIB, PAGE, Extent, NvdimmSpec
from tests.unit.fake_sysfs import UUID, FakeSysfs

SPA = 0x1_4020_0000
SIZE = 4 * MIB


class Host:
    """A backing whose namespace is the disk that ``folder`` is on."""

    def __init__(self, folder: Path, options: str = "rw,dax=always", kind: str = "ext4") -> None:
        self.folder = folder / "dax"
        self.folder.mkdir(parents=True)
        self.device = os.stat(folder).st_dev
        self.sysfs = FakeSysfs(folder / "sys")
        self.mountinfo = folder / "mountinfo"
        self.mount(options, kind)
        self.checked: list[Sequence[Extent]] = []
        self.backing = FsdaxBacking(
            sysfs=self.sysfs.root,
            mountinfo=self.mountinfo,
            cross_check=lambda fd, found: self.checked.append(found),
        )

    def mount(self, options: str, kind: str = "ext4") -> None:
        number = f"{os.major(self.device)}:{os.minor(self.device)}"
        self.mountinfo.write_text(f"1 0 {number} / /mnt rw - {kind} /dev/pmem0 {options}\n")

    def spec(self, name: str = "a.img", size: int = SIZE) -> NvdimmSpec:
        return NvdimmSpec(0, str(self.folder / name), size)

    def file(self, name: str = "a.img", size: int = SIZE) -> Path:
        path = self.folder / name
        path.write_bytes(os.urandom(size))
        return path


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.sysfs.fsdax(host.device, spa=SPA)
    return host


def test_handles(host: Host) -> None:
    path = host.file()
    (host.folder / "link").symlink_to(path)
    (host.folder / "dangling").symlink_to(host.folder / "new")
    for name, expected in [
        ("a.img", True),
        ("link", True),
        ("dangling", True),
        ("new", True),
        ("none/new", False),
        ("", False),
    ]:
        assert host.backing.handles(str(host.folder / name)) is expected
    assert not host.backing.handles("/dev/null")


def test_a_new_file_is_examined_provisioned_located(host: Host) -> None:
    spec = host.spec()
    intake = host.backing.examine(spec)
    assert (intake.kind, intake.creates, intake.writes, intake.namespace.name) == ("fsdax", True, SIZE, "namespace0.0")
    assert os.listdir(host.folder) == []
    progress: list[tuple[int, int]] = []
    identity = host.backing.provision(spec, lambda done, total: progress.append((done, total)))
    path = Path(spec.path)
    assert os.listdir(host.folder) == ["a.img"]
    assert path.read_bytes() == bytes(SIZE)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert progress[-1] == (SIZE, SIZE)
    again = host.backing.examine(spec)
    assert (again.creates, again.writes, again.assumed) == (False, 0, False)
    assert (identity.kind, identity.device, identity.start, identity.size) == ("fsdax", UUID, 0, SIZE)
    assert identity.inode == path.stat().st_ino
    location = host.backing.locate(spec)
    assert location.identity == identity
    assert host.checked == [location.extents]
    assert sum(extent.length for extent in location.extents) == SIZE
    assert all(extent.spa >= SPA for extent in location.extents)


def test_provisioning_again_changes_nothing(host: Host) -> None:
    identity = host.backing.provision(host.spec())
    Path(host.spec().path).write_bytes(content := os.urandom(SIZE))
    location = host.backing.locate(host.spec())
    assert host.backing.provision(host.spec()) == identity
    assert host.backing.locate(host.spec()) == location
    assert Path(host.spec().path).read_bytes() == content


def test_two_files_have_no_frame_in_common(host: Host) -> None:
    spans = []
    for name in ("a.img", "b.img"):
        host.backing.provision(host.spec(name))
        spans += [(each.spa, each.spa + each.length) for each in host.backing.locate(host.spec(name)).extents]
    spans.sort()
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))


def test_an_empty_file_is_replaced(host: Host) -> None:
    path = host.file(size=0)
    assert host.backing.examine(host.spec()).creates
    host.backing.provision(host.spec())
    assert path.stat().st_size == SIZE


@pytest.mark.parametrize("there", ["nothing", "empty", "another"])
def test_with_an_identity_nothing_else_is_provisioned(host: Host, there: str) -> None:
    path = host.file()
    identity = host.backing.provision(host.spec())
    assert host.backing.provision(host.spec(), identity=identity) == identity
    path.rename(path.with_name("moved.img"))
    if there != "nothing":
        host.file(size=0 if there == "empty" else SIZE)
    before = path.exists() and path.stat().st_ino
    with pytest.raises(BackingError):
        host.backing.provision(host.spec(), identity=identity)
    assert (path.exists() and path.stat().st_ino) == before


def test_an_existing_larger_file(host: Host) -> None:
    path = host.file(size=2 * SIZE)
    content = path.read_bytes()
    assert host.backing.provision(host.spec()).size == 2 * SIZE
    assert sum(each.length for each in host.backing.locate(host.spec()).extents) == SIZE
    assert path.read_bytes() == content


def test_what_fallocate_left_unwritten_is_filled(host: Host) -> None:
    path = host.file(size=MIB)
    content = path.read_bytes()
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        os.pwrite(file.fileno(), b"guest", 2 * MIB)
    with pytest.raises(BackingError, match="is allocated and not written"):
        host.backing.locate(host.spec())
    intake = host.backing.examine(host.spec())
    assert not intake.creates
    assert 0 < intake.writes < 3 * MIB
    host.backing.provision(host.spec())
    assert host.backing.examine(host.spec()).writes == 0
    assert path.read_bytes() == content + bytes(MIB) + b"guest" + bytes(SIZE - 2 * MIB - 5)


def test_sparse_files_are_refused(host: Host) -> None:
    path = host.file(size=MIB)
    os.truncate(path, SIZE)
    for act in (host.backing.examine, host.backing.provision, host.backing.locate):
        with pytest.raises(
            BackingError, match=r"a\.img: is sparse: \S+ MiB at 0x100000 are not allocated.*nvdimmctl import /"
        ):
            act(host.spec())


def test_a_file_that_is_too_small(host: Host) -> None:
    host.file(size=SIZE - PAGE)
    with pytest.raises(BackingError, match=r"has 4092 KiB, the NVDIMM needs 4 MiB \(4 KiB more\)"):
        host.backing.examine(host.spec())


def test_hard_links_are_refused(host: Host) -> None:
    path = host.file()
    path.with_name("other").hardlink_to(path)
    for act in (host.backing.examine, host.backing.locate):
        with pytest.raises(BackingError, match=r"has 2 hard links.*find -xdev -inum"):
            act(host.spec())


@pytest.mark.parametrize("name", ["link", "folder/real.img", "dangling", "../{}/real.img"])
def test_symbolic_links_are_never_followed(host: Host, name: str) -> None:
    path = host.file("real.img")
    (host.folder / "link").symlink_to(path)
    (host.folder / "folder").symlink_to(host.folder)
    (host.folder / "dangling").symlink_to(host.folder / "new.img")
    spec = host.spec(name.format(host.folder.name))
    works: list[Callable[[NvdimmSpec], object]] = [
        host.backing.locate,
        host.backing.provision,
        host.backing.open_bytes,
        host.backing.discard,
        lambda spec: host.backing.freeze(spec.path),
        lambda spec: host.backing.mark(spec.path, b"x"),
    ]
    for work in works:
        with pytest.raises(BackingError, match="has become a symbolic link"):
            work(spec)
    host.backing.thaw(spec.path)
    host.backing.mark(spec.path, None)
    assert path.stat().st_size == SIZE
    assert not (host.folder / "new.img").exists()


def test_more_than_there_is_room_for(host: Host) -> None:
    found = os.statvfs(host.folder)
    with pytest.raises(BackingError, match=r"needs \S+ \wiB, its file system has \S+ \wiB free"):
        host.backing.examine(host.spec(size=(found.f_blocks + 1024) * found.f_frsize))
    assert os.listdir(host.folder) == []


def test_a_failure_while_writing_leaves_nothing(host: Host) -> None:
    def fail(done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BackingError, match=r"No space left on device \(make room"):
        host.backing.provision(host.spec(), fail)
    assert os.listdir(host.folder) == []
    empty = host.file("empty", size=0)
    inode_number = empty.stat().st_ino
    with pytest.raises(BackingError, match="No space left"):
        host.backing.provision(host.spec("empty"), fail)
    assert (empty.stat().st_size, empty.stat().st_ino) == (0, inode_number)


def test_a_file_that_appears_meanwhile_is_kept(host: Host) -> None:
    path = Path(host.spec().path)

    def appear(done: int, total: int) -> None:
        path.write_bytes(b"mine")

    with pytest.raises(BackingError, match="someone else has written it meanwhile"):
        host.backing.provision(host.spec(), appear)
    assert path.read_bytes() == b"mine"


def test_what_is_to_be_created_takes_the_place_of_no_file_but_an_empty_one(host: Host) -> None:
    path = host.file("data")
    with pytest.raises(BackingError, match=r"someone else has written it meanwhile \(to take it as it is, define"):
        host.backing.create(host.spec("data"))
    assert os.listdir(host.folder) == ["data"]
    path.write_bytes(b"")
    identity = host.backing.create(host.spec("data"))
    assert os.listdir(host.folder) == ["data"]
    assert identity == host.backing.identify(str(path))


@pytest.mark.parametrize("how", ["create", "publish"])
def test_a_file_that_takes_the_place_of_an_empty_one_at_the_last_moment_is_kept(
    host: Host, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path, rename_new = host.file("data", size=0), Entry.rename_new
    backup = host.file("backup")
    backup.write_bytes(b"mine")

    def late(source: Entry, target: Entry) -> None:
        if source.name == "data":
            backup.replace(path)
        rename_new(source, target)

    if how == "publish":
        host.backing.provision(host.backing.allocate(host.spec("data")))
    monkeypatch.setattr(Entry, "rename_new", late)
    with pytest.raises(NvdimmError, match=r"someone else has written it meanwhile|exists now"):
        getattr(host.backing, how)(host.spec("data"))
    assert path.read_bytes() == b"mine"


def test_what_was_created_is_told_by_its_own_identity(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who owns the folder puts another file in its place at once: that is not what may be deleted."""
    other, link = host.file("other"), Entry.link

    def swapped(at: Entry, fd: int) -> None:
        link(at, fd)
        other.replace(host.spec().path)

    monkeypatch.setattr(Entry, "link", swapped)
    with pytest.raises(BackingError, match="has 0 hard links"):
        host.backing.create(host.spec())
    assert os.path.exists(host.spec().path)


def test_discard(host: Host) -> None:
    host.backing.provision(host.spec())
    host.backing.discard(host.spec())
    host.backing.discard(host.spec())
    assert os.listdir(host.folder) == []


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ("rw", "ext4", "/mnt is not mounted with DAX"),
        ("rw,dax=inode", "xfs", "/mnt is not mounted with DAX"),
        ("rw,dax=never", "ext4", "/mnt is not mounted with DAX"),
        ("rw,dax=always", "btrfs", r"its file system is btrfs \(ext4 and XFS"),
    ],
)
def test_a_file_system_that_does_not_do(host: Host, options: str, kind: str, message: str) -> None:
    host.file()
    host.mount(options, kind)
    for act in (host.backing.examine, host.backing.provision, host.backing.locate):
        with pytest.raises(BackingError, match=message):
            act(host.spec())
    with pytest.raises(BackingError, match=message):
        host.backing.provision(host.spec("new"))
    assert os.listdir(host.folder) == ["a.img"]


def test_a_file_on_the_root_disk(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.sysfs.fsdax(os.makedev(259, 7))
    disk = host.sysfs.device(host.sysfs.root / "devices/virtio0/block/vda")
    host.sysfs.link(f"dev/block/{os.major(host.device)}:{os.minor(host.device)}", disk)
    with pytest.raises(BackingError, match=r"is on vda \(device \d+:\d+\), not on persistent memory"):
        host.backing.examine(host.spec())


@pytest.mark.parametrize("mode", ["raw", "sector"])
def test_a_namespace_in_the_wrong_mode(tmp_path: Path, mode: str) -> None:
    host = Host(tmp_path)
    getattr(host.sysfs, mode)(host.device)
    with pytest.raises(
        BackingError, match=rf"a namespace in {mode} mode.*ndctl create-namespace .* -m fsdax --map=mem"
    ):
        host.backing.examine(host.spec())


def test_a_partition(tmp_path: Path) -> None:
    whole, part = Host(tmp_path / "whole"), Host(tmp_path / "part")
    whole.sysfs.fsdax(whole.device, spa=SPA)
    disk = part.sysfs.fsdax(os.makedev(259, 9), spa=SPA)
    part.sysfs.partition(disk, 1, part.device, start=16 * MIB, size=1 << 39)
    whole.file()
    one, two = whole.backing.locate(whole.spec()), part.backing.locate(whole.spec())
    assert [(each.offset, each.spa + 16 * MIB, each.length) for each in one.extents] == [
        (each.offset, each.spa, each.length) for each in two.extents
    ]
    assert (two.identity.device, two.identity.start) == (UUID, 16 * MIB)


def test_an_extent_outside_the_volume(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.sysfs.fsdax(host.device, size=PAGE)
    host.file()
    with pytest.raises(BackingError, match="of the device, beyond its end at 0x1000"):
        host.backing.locate(host.spec())


def test_a_failed_cross_check_names_the_file(host: Host) -> None:
    host.file()
    backing = FsdaxBacking(sysfs=host.sysfs.root, mountinfo=host.mountinfo)
    with pytest.raises(
        BackingError, match=r"a\.img: byte 0x0 is at SPA 0x\w+ by the page tables, at 0x\w+ by the file"
    ):
        backing.locate(host.spec())


def test_a_frozen_file_stays_as_it_is_until_it_is_thawed(host: Host) -> None:
    path = host.file()
    location = host.backing.locate(host.spec())
    for _ in range(2):
        host.backing.freeze(str(path))
    try:
        with pytest.raises(PermissionError):
            os.truncate(path, 0)
        with pytest.raises(PermissionError):
            path.unlink()
        with pytest.raises(PermissionError):
            path.rename(path.with_name("b"))
        assert host.backing.locate(host.spec()) == location
        assert host.backing.provision(host.spec()) == location.identity
    finally:
        for _ in range(2):
            host.backing.thaw(str(path))
    path.unlink()
    host.backing.thaw(str(path))


def test_an_operators_own_immutable_flag_is_kept(host: Host) -> None:
    path = host.file()
    subprocess.run(["chattr", "+i", str(path)], check=True)
    try:
        with pytest.raises(BackingError, match="immutable or append-only, and not by the driver"):
            host.backing.freeze(str(path))
        host.backing.thaw(str(path))
        with pytest.raises(PermissionError):
            path.unlink()
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


def test_an_immutable_file_that_needs_zeros(host: Host) -> None:
    path = host.file(size=MIB)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    host.backing.freeze(str(path))
    try:
        with pytest.raises(BackingError, match=r"a\.img: Operation not permitted \(is it immutable"):
            host.backing.provision(host.spec())
    finally:
        host.backing.thaw(str(path))
