# SPDX-License-Identifier: Apache-2.0
"""Extents, provisioning and freezing on real ext4 and XFS; the oracles are filefrag, xfs_io and the disk image itself.

The image is a loop device, which a fake sysfs presents as a pmem namespace: a byte's "SPA" is the namespace's address
plus the byte's offset in the image, where the test reads it.
"""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.backing import extents
from nvdimm_driver.backing.extents import LAST, MERGED, UNWRITTEN, FileExtent
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, NvdimmSpec, Surveyed
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.waiting import wait_until

SIZE = 8 * MIB


@pytest.fixture(params=list(MKFS))
def fs(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem]) -> Iterator[FileSystem]:
    file_system = file_systems[request.param]
    yield file_system
    file_system.clear()


@pytest.fixture
def xfs(file_systems: dict[str, FileSystem]) -> Iterator[FileSystem]:
    yield file_systems["xfs"]
    file_systems["xfs"].clear()


def inode_flags(path: Path) -> str:
    """Return ``i`` when lsattr shows the file as immutable, else an empty string."""
    return "i" if "i" in run("lsattr", path).split()[0] else ""


def spec(fs: FileSystem) -> NvdimmSpec:
    return NvdimmSpec(0, str(fs.path), SIZE)


def free_runs(fs: FileSystem) -> int:
    """Return the bytes of the longest free run, as the file system's own tools report it."""
    run("sync", "-f", fs.root)
    device = run("findmnt", "-n", "-o", "SOURCE", fs.root).strip()
    if fs.kind == "ext4":
        found = re.search(r"Max. free extent: (\d+) KB", run("e2freefrag", device))
        assert found
        return int(found[1]) * KIB
    rows = re.findall(r"^ *\d+ +\d+ +(\d+)$", run("xfs_db", "-r", "-c", "freesp -d", device), re.MULTILINE)
    return max(map(int, rows)) * 4 * KIB


def make(path: Path, case: str) -> None:
    """Make a file of SIZE bytes."""
    with open(path, "wb", buffering=0) as file, open(path.with_name("other"), "wb", buffering=0) as other:
        if case == "fragmented":
            # Preallocation in turns: neither file can grow where it ends.
            for offset in range(0, SIZE, SIZE // 64):
                for each in (file, other):
                    os.posix_fallocate(each.fileno(), offset, SIZE // 64)
        if case == "unwritten":
            os.posix_fallocate(file.fileno(), 0, SIZE)
        if case == "sparse":
            os.truncate(file.fileno(), SIZE)
        if case in ("unwritten", "sparse"):
            os.pwrite(file.fileno(), os.urandom(MIB), MIB)
            os.pwrite(file.fileno(), os.urandom(MIB), 3 * MIB)
        else:
            file.write(os.urandom(SIZE))


def ours(path: Path, batch: int = 1024) -> tuple[FileExtent, ...]:
    with open(path, "rb") as file:
        return extents.fiemap(file.fileno(), SIZE, batch=batch)


def by_filefrag(path: Path) -> list[tuple[int, int, int]]:
    """Return the extents as (offset, physical, length)."""
    rows = re.findall(r"^ *\d+: +(\d+)\.\. +\d+: +(\d+)\.\. +\d+: +(\d+):", run("filefrag", "-v", "-b1024", path), re.M)
    return [(int(offset) * KIB, int(physical) * KIB, int(length) * KIB) for offset, physical, length in rows]


def by_xfs_io(path: Path) -> list[tuple[int, int, int, int]]:
    """Return the extents as (offset, physical, length, flags); xfs_io counts in sectors, on any file system."""
    rows = re.findall(
        r"^ *\d+: \[(\d+)\.\.\d+\]: +(\d+)\.\.\d+ +(\d+) +0x(\w+)$", run("xfs_io", "-r", "-c", "fiemap -v", path), re.M
    )
    return [
        (int(offset) * 512, int(physical) * 512, int(length) * 512, int(flags, 16))
        for offset, physical, length, flags in rows
    ]


CASES = {"plain": 1, "fragmented": 64, "unwritten": 5, "sparse": 2}


@pytest.mark.parametrize("case", list(CASES))
def test_fiemap_says_what_others_say(fs: FileSystem, case: str) -> None:
    make(fs.path, case)
    found = ours(fs.path)
    assert len(found) >= CASES[case]
    assert [(each.offset, each.physical, each.length) for each in found] == by_filefrag(fs.path)
    assert [(each.offset, each.physical, each.length, each.flags) for each in found] == by_xfs_io(fs.path)
    assert any(each.flags & UNWRITTEN for each in found) == (case == "unwritten")


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_fiemap_in_many_calls(fs: FileSystem, batch: int) -> None:
    make(fs.path, "fragmented")
    assert ours(fs.path, batch) == ours(fs.path)


@pytest.mark.parametrize("case", ["plain", "fragmented"])
def test_the_bytes_are_where_the_location_says(fs: FileSystem, case: str) -> None:
    make(fs.path, case)
    location = fs.backing.locate(spec(fs))
    assert len(location.extents) >= CASES[case]
    assert fs.stored(location) == fs.path.read_bytes()


def test_a_new_file_is_really_zeros(fs: FileSystem) -> None:
    identity = fs.backing.provision(spec(fs))
    assert all(not each.flags & ~(LAST | MERGED) for each in ours(fs.path))
    location = fs.backing.locate(spec(fs))
    assert location.identity == identity
    assert fs.stored(location) == bytes(SIZE)


def test_a_new_file_on_xfs_is_aligned_to_superpages(xfs: FileSystem) -> None:
    xfs.backing.provision(spec(xfs))
    assert run("xfs_io", "-r", "-c", "extsize", xfs.path).startswith(f"[{SUPERPAGE}]")
    assert all(not (each.physical | each.length) % SUPERPAGE for each in ours(xfs.path))


def test_what_was_unwritten_becomes_zeros_and_the_rest_stays(fs: FileSystem) -> None:
    make(fs.path, "unwritten")
    content = fs.path.read_bytes()
    assert fs.backing.examine(spec(fs)).writes >= SIZE - 2 * MIB - 64 * KIB
    fs.backing.provision(spec(fs))
    location = fs.backing.locate(spec(fs))
    assert fs.path.read_bytes() == content
    assert fs.stored(location) == content


def test_sparse_files_are_refused(fs: FileSystem) -> None:
    make(fs.path, "sparse")
    for act in (fs.backing.examine, fs.backing.provision, fs.backing.locate):
        with pytest.raises(BackingError, match=r"is sparse: 1 MiB at 0x0 are not allocated"):
            act(spec(fs))


def test_reflinked_files_are_refused(xfs: FileSystem) -> None:
    make(xfs.path, "plain")
    assert xfs.backing.locate(spec(xfs))
    run("cp", "--reflink=always", xfs.path, xfs.root / "copy")
    for act in (xfs.backing.examine, xfs.backing.provision, xfs.backing.locate):
        with pytest.raises(BackingError, match=r"shares its blocks .*SHARED\) \(of a domain's file"):
            act(spec(xfs))


def test_the_identity_is_what_lsattr_and_stat_say(fs: FileSystem) -> None:
    identity = fs.backing.provision(spec(fs))
    generation, _, name = run("lsattr", "-v", fs.path).split()
    assert (identity.generation, str(fs.path)) == (int(generation), name)
    assert (identity.inode, identity.size) == (fs.path.stat().st_ino, SIZE)
    fs.backing.discard(spec(fs))
    assert fs.backing.provision(spec(fs)) != identity


def test_a_frozen_file_stays_where_it_is(fs: FileSystem) -> None:
    make(fs.path, "fragmented")
    location = fs.backing.locate(spec(fs))
    fs.backing.freeze(str(fs.path))
    for command in (
        ["truncate", "-s", "1M", fs.path],
        ["fallocate", "-p", "-o", "0", "-l", "1M", fs.path],
        ["rm", "-f", fs.path],
        ["mv", fs.path, fs.root / "new"],
        ["ln", fs.path, fs.root / "new"],
        ["dd", "if=/dev/zero", f"of={fs.path}", "count=1", "conv=notrunc"],
        ["e4defrag", fs.path] if fs.kind == "ext4" else ["cp", "--reflink=always", fs.root / "other", fs.path],
    ):
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert result.returncode, command
    assert fs.backing.locate(spec(fs)) == location
    fs.backing.thaw(str(fs.path))
    os.truncate(fs.path, MIB)


def test_a_crash_leaves_nothing_behind(fs: FileSystem) -> None:
    run("sync", "-f", fs.root)
    free = os.statvfs(fs.root).f_bfree
    before = fs.files()
    child = os.fork()
    if not child:
        fs.backing.provision(spec(fs), lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert fs.files() == before
    # XFS frees in the background.
    wait_until(lambda: (free - os.statvfs(fs.root).f_bfree) * 4 * KIB <= SIZE // 2, "the space of the unfinished file")


def test_dax_by_the_files_own_flag(xfs: FileSystem) -> None:
    make(xfs.path, "plain")
    xfs.mount("rw")
    try:
        with pytest.raises(BackingError, match="is not mounted with DAX"):
            xfs.backing.locate(spec(xfs))
        run("xfs_io", "-r", "-c", "chattr +x", xfs.path)
        assert xfs.backing.locate(spec(xfs))
    finally:
        xfs.mount("rw,dax=always")


def test_the_room_in_a_pool(fs: FileSystem) -> None:
    with open(fs.path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MIB)
    space = fs.backing.space([str(fs.root), f"{fs.root}/."], [])
    status = os.statvfs(fs.root)
    assert (space.capacity, space.free) == (status.f_blocks * status.f_frsize, status.f_bfree * status.f_frsize)
    assert space.largest_free == free_runs(fs)
    assert 0 < space.largest_free <= space.free < space.capacity - 64 * MIB + MIB
    assert (space.alignment, [each.name for each in space.namespaces]) == (SUPERPAGE, ["namespace0.0"])


def test_a_file_is_no_folder_of_a_pool(fs: FileSystem) -> None:
    fs.path.touch()
    with pytest.raises(BackingError, match="Not a directory"):
        fs.backing.space([str(fs.path)], [])


def test_a_file_says_whose_it_is(fs: FileSystem) -> None:
    fs.backing.provision(spec(fs))
    path, location = str(fs.path), fs.backing.locate(spec(fs))
    fs.backing.mark(path, b"mine")
    fs.backing.freeze(path)
    fs.backing.mark(path, b"yours")
    assert inode_flags(fs.path) == "i", "frozen as before, and so with the mark that it had"
    below = fs.root / "folder"
    below.mkdir()
    (below / "plain").touch()
    (below / "link").symlink_to(path)
    plain = f"{below}/plain"
    found = {each.path: each for each in fs.backing.survey([str(fs.root)])}
    of_plain = found[plain].identity
    assert of_plain is not None
    assert (of_plain.inode, of_plain.size) == (os.stat(plain).st_ino, 0)
    assert found == {
        path: Surveyed(path, b"mine", True, True, identity=location.identity),
        plain: Surveyed(plain, None, False, False, identity=of_plain),
    }
    fs.backing.thaw(path)
    fs.backing.mark(path, None)
    assert fs.backing.locate(spec(fs)) == location
    fs.backing.mark(f"{fs.root}/nothing", None)
    with pytest.raises(BackingError, match="No such file"):
        fs.backing.mark(f"{fs.root}/nothing", b"mine")
    for each in (below / "plain", below / "link"):
        each.unlink()
    below.rmdir()


def test_a_file_that_was_truncated_is_extended(fs: FileSystem) -> None:
    identity = fs.backing.provision(spec(fs))
    with open(fs.path, "r+b") as file:
        file.write(b"\xa5" * SIZE)
        file.truncate(SIZE - MIB)
    assert fs.backing.lacking(spec(fs)) == MIB
    fs.backing.extend(spec(fs))
    assert fs.backing.provision(spec(fs)) == identity
    assert fs.backing.lacking(spec(fs)) == 0
    assert fs.stored(fs.backing.locate(spec(fs))) == b"\xa5" * (SIZE - MIB) + bytes(MIB)


def test_a_file_is_moved_and_never_over_another(fs: FileSystem) -> None:
    identity = fs.backing.provision(spec(fs))
    target = fs.root / "target"
    target.write_bytes(b"other")
    with pytest.raises(BackingError, match=r"cannot be moved to .*target: File exists"):
        fs.backing.move(str(fs.path), str(target))
    target.unlink()
    fs.backing.move(str(fs.path), str(target))
    assert fs.files() == [target]
    fs.backing.move(str(target), str(fs.path))
    assert fs.backing.locate(spec(fs)).identity == identity
