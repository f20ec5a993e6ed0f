# SPDX-License-Identifier: Apache-2.0
"""A file is being copied to its place by a program that allocates it first (rsync --preallocate, qemu-img), and is
given to a domain meanwhile: no zeros take the place of what the program has written.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, InUseError
from nvdimm_driver.model import KIB, MIB, DomainSpec, NvdimmSpec
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import Host, empty
from tests.unit.doubles import UUID

SIZE = 32 * MIB
BLOCK = os.urandom(MIB)
PIECE = BLOCK[: 4 * KIB]


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


@pytest.fixture
def copier(host: Host) -> Iterator[int]:
    """Return a descriptor of a copier that has allocated the file, and has written its first MiB."""
    fd = os.open(host.path("a.img"), os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, SIZE)
    os.pwrite(fd, BLOCK, 0)
    yield fd
    os.close(fd)


def ways(host: Host) -> dict[str, Callable[[], object]]:
    spec = NvdimmSpec(0, host.path("a.img"), SIZE)
    watch = lambda what: lambda done, total: None  # noqa: E731
    return {
        "define": lambda: host.driver.define(DomainSpec("x", UUID, 512 * MIB, None, (spec,))),
        "provision": lambda: host.driver.importer.provision(spec, watch),
        "import": lambda: host.driver.importer.import_in_place(spec.path, None, 0, watch),
    }


@pytest.mark.parametrize("way", ["define", "provision", "import"])
def test_a_copy_under_way_is_refused(host: Host, copier: int, way: str) -> None:
    said = f"parts of it are unwritten, and process {os.getpid()} \\(.*\\) has it open or mapped to write it"
    with pytest.raises(InUseError, match=said):
        ways(host)[way]()
    assert os.pread(copier, SIZE, 0) == BLOCK + bytes(SIZE - MIB)
    assert not host.driver.ledger.domains()


def test_what_is_written_meanwhile_stays(host: Host) -> None:
    """Also by a program that begins to write only when the zeros are being written, ahead of them or behind."""
    path = host.path("a.img")
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    written = {}

    def write(done: int, total: int) -> None:
        assert total == SIZE
        with open(path, "r+b", buffering=0) as file:
            for at in {max(0, done - 2 * MIB), min(done + 512, SIZE - MIB), SIZE - MIB}:
                file.seek(at)
                file.write(BLOCK)
                written[at] = BLOCK

    host.backing.provision(NvdimmSpec(0, path, SIZE), write)
    expected = bytearray(SIZE)
    for at, block in written.items():
        expected[at : at + MIB] = block
    assert len(written) > 8
    assert Path(path).read_bytes() == expected


def test_what_is_truncated_meanwhile_is_not_extended(host: Host) -> None:
    path = host.path("a.img")
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    said = re.escape(f"{path}: cannot get its own blocks up to {8 * MIB:#x}: the file ends before")
    with pytest.raises(BackingError, match=said):
        host.backing.provision(NvdimmSpec(0, path, SIZE), lambda done, total: os.truncate(path, 5 * MIB))
    assert os.path.getsize(path) == 5 * MIB


def test_a_file_that_nobody_writes_is_completed(host: Host) -> None:
    """Also one of which a part is written, and that a program reads."""
    path = host.path("a.img")
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        file.write(BLOCK)
    with open(path, "rb"):
        ways(host)["define"]()
    found = host.fs.stored(host.backing.locate(NvdimmSpec(0, path, SIZE)))
    assert found == BLOCK + bytes(SIZE - MIB)


def test_what_is_written_while_shared_blocks_are_copied_stays(
    tmp_path: Path, file_systems: dict[str, FileSystem]
) -> None:
    """ext4 shares none."""
    host = Host(tmp_path, file_systems["xfs"])
    path, blocks, sharing = host.path("a.img"), 4 * SIZE // len(PIECE), threading.Event()
    host.driver.define(DomainSpec("x", UUID, 512 * MIB, None, (NvdimmSpec(0, path, 4 * SIZE),)))
    run("cp", "--reflink=always", path, host.path("clone"))

    def copy() -> None:
        with open(path, "r+b", buffering=0) as target:
            for number in range(blocks):
                target.write(PIECE)
                if number == blocks // 20:
                    sharing.set()

    (found,) = look(host.driver)
    assert found.mend is not None
    copier = threading.Thread(target=copy)
    copier.start()
    sharing.wait()
    found.mend()
    copier.join()
    with open(path, "rb") as file:
        assert all(file.read(len(PIECE)) == PIECE for _ in range(blocks))
    assert look(host.driver) == []
    empty(file_systems["xfs"])
