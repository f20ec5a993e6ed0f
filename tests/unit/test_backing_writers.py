# SPDX-License-Identifier: Apache-2.0
"""Which processes may write a file, without a look at the files of servers that do not answer."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvdimm_driver.backing import writers


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Return two files."""
    found = tmp_path / "own", tmp_path / "other"
    for each in found:
        each.write_bytes(b"text")
    return found


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is looked at, which can take for ever: by its name."""
    found: list[str] = []
    look = os.stat

    def noted(path: Path | str | int, **options: bool) -> os.stat_result:
        if not isinstance(path, int) and str(path).startswith("/proc/") and os.path.islink(path):
            found.append(os.path.basename(os.readlink(path)))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", noted)
    return found


def test_a_descriptor_that_writes_is_found_and_no_other_file_is_looked_at(
    files: tuple[Path, Path], looked_at: list[str]
) -> None:
    own, other = files
    with open(own, "rb") as file, open(other, "r+b"):
        assert writers.find(file.fileno()) == set()
        with open(own, "r+b"):
            assert writers.find(file.fileno()) == {os.getpid()}
    assert "own" in looked_at
    assert "other" not in looked_at


@contextmanager
def mapped(path: Path, flags: int) -> Iterator[None]:
    """Map a file to write, without a descriptor of it, which Python's own mapping has."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, size = ctypes.c_void_p, ctypes.c_size_t(mmap.PAGESIZE)
    with open(path, "r+b") as file:
        pages = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file.fileno(), ctypes.c_long(0))
    yield
    assert libc.munmap(ctypes.c_void_p(pages), size) == 0


def test_a_mapping_that_writes_is_found_and_no_other_file_is_looked_at(
    files: tuple[Path, Path], looked_at: list[str]
) -> None:
    own, other = files
    with open(own, "rb") as file, mapped(other, mmap.MAP_SHARED), mapped(own, mmap.MAP_PRIVATE):
        assert writers.find(file.fileno()) == set()
        assert not looked_at
        with mapped(own, mmap.MAP_SHARED):
            assert writers.find(file.fileno()) == {os.getpid()}
    assert set(looked_at) == {"own"}


def test_of_what_is_no_file_only_the_name_is_read(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what a QEMU has open, and all that a user may open by thousands, is none."""
    asked, read = [], os.open

    def noted(path: Path | str, *arguments: int) -> int:
        asked.append(str(path))
        return read(path, *arguments)

    monkeypatch.setattr(os, "open", noted)
    with open(files[0], "rb") as file, socket.socket() as other:
        writers.find(file.fileno())
        assert f"/proc/{os.getpid()}/fdinfo/{file.fileno()}" in asked
        assert f"/proc/{os.getpid()}/fdinfo/{other.fileno()}" not in asked
