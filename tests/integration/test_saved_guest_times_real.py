# SPDX-License-Identifier: Apache-2.0
"""Saved guests whose file could not be thawed at their end, and older copies that come into its place; ext4 and XFS.

A copy that was made before or while the guest ran has the time that the file had then.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.errors import BackingError, InUseError, RefusedError
from nvdimm_driver.lifecycle.file_times import FileTimes
from nvdimm_driver.lifecycle.start import Starts
from nvdimm_driver.model import DomainSpec, NvdimmSpec
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import SIZE, Host, empty, is_immutable
from tests.integration.test_restored_ledger_real import back_up, repair
from tests.integration.test_restored_ledger_saved_real import Image, boot, end, put_back, unmounted
from tests.unit.doubles import UUID

BEFORE, NEWER = b"before", b"newer."


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    """Yield a host with a guest that has written its file since a copy of that was made, and runs."""
    host = Host(tmp_path, file_systems[request.param])
    os.mkdir(host.path("in"))
    host.driver.define(host.domain("in/a.img"))
    guest_writes(host, BEFORE)
    boot(host, 5)
    run("cp", "-p", host.path("in/a.img"), str(tmp_path / "copy"))
    guest_writes(host, NEWER)
    yield host
    empty(file_systems[request.param])


def guest_writes(host: Host, text: bytes) -> None:
    """Write as a guest does: nothing of the file changes but its bytes."""
    path = host.path("in/a.img")
    found, frozen = os.stat(path), is_immutable(path)
    run("chattr", "-i", path)
    with open(path, "r+b", buffering=0) as file:
        file.write(text)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    run("chattr", "+i" if frozen else "-i", path)


def end_away(host: Host) -> Image:
    """End the guest while its file is not at its path; then it is again."""
    os.rename(host.path("in"), host.path("away"))
    image = end(host, 5)
    os.rename(host.path("away"), host.path("in"))
    return image


def end_read_only(host: Host) -> Image:
    """End the guest while its file system takes no changes; then it does again."""
    run("mount", "-o", "remount,ro", host.fs.root)
    with pytest.raises(BackingError, match="Read-only"):
        end(host, 5)
    run("mount", "-o", "remount,rw", host.fs.root)
    return host.mapper.memory[5]


def end_read_only_and_away(host: Host) -> Image:
    """Do both, the one after the other: the file may have got its new time at the first."""
    image = end_read_only(host)
    with unmounted(host):
        host.another().reconcile()
    return image


ENDS = [end_away, end_read_only_and_away]


def goes_on(host: Host, image: Image, domid: int = 7) -> bool:
    """Return True if the saved guest goes on: by the trial that nvdimmd makes, and by its start."""
    try:
        host.another().try_restore(UUID)
        boot(host, domid, image)
    except RefusedError:
        return False
    return True


@pytest.mark.parametrize("end_guest", ENDS)
def test_it_goes_on_when_nobody_has_touched_the_file(host: Host, end_guest: Any) -> None:
    image = end_guest(host)
    assert host.record().start is None
    assert is_immutable(host.path("in/a.img"))
    assert goes_on(host, image)


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("end_guest", [*ENDS, end_read_only])
def test_no_copy_counts_whose_flag_was_in_the_way(host: Host, tmp_path: Path, end_guest: Any, repaired: bool) -> None:
    image = end_guest(host)
    run("chattr", "-i", host.path("in/a.img"))
    run("cp", "-p", tmp_path / "copy", host.path("in/a.img"))
    if repaired:
        repair(host)
    assert not goes_on(host, image)
    assert Path(host.path("in/a.img")).read_bytes().startswith(BEFORE)


@pytest.mark.parametrize("start", ["a trial", "one that fails"])
@pytest.mark.parametrize("end_guest", ENDS)
def test_a_start_that_maps_nothing_gives_the_file_its_new_time(
    host: Host, tmp_path: Path, end_guest: Any, start: str
) -> None:
    image = end_guest(host)
    if start == "a trial":
        host.another().try_restore(UUID)
    else:
        host.another().prepare(host.domain("in/a.img"))  # then libxl has no memory for the guest
        host.another().release(UUID)
    path = host.path("in/a.img")
    assert not is_immutable(path)
    assert not has_time_of_copy(host, tmp_path)
    assert goes_on(host, image)
    image = end(host, 7)
    run("cp", "-p", tmp_path / "copy", path)
    assert not goes_on(host, image, 8)


def has_time_of_copy(host: Host, folder: Path) -> bool:
    """Return True if ``rsync -a`` skips the file."""
    return os.stat(host.path("in/a.img")).st_mtime_ns == os.stat(folder / "copy").st_mtime_ns


def start_with_two(host: Host, folder: Path) -> DomainSpec:
    """Have the guest run with another file before the one, and write that since a copy was made; return its domain."""
    end(host, 5)
    domain = host.domain("b.img")
    domain = replace(domain, nvdimms=(*domain.nvdimms, NvdimmSpec(1, host.path("in/a.img"), SIZE)))
    host.driver.define(domain)
    boot(host, 6, domain=domain)
    run("cp", "-p", host.path("in/a.img"), folder / "copy")
    guest_writes(host, NEWER)
    return domain


@pytest.mark.parametrize("how", ["refused", "killed"])
def test_a_start_that_comes_to_no_file_gives_each_its_new_time(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    domain = start_with_two(host, tmp_path)
    os.rename(host.path("in"), host.path("away"))
    image = end(host, 6)
    os.rename(host.path("away"), host.path("in"))
    if how == "refused":
        with open(host.path("b.img"), "r+b"), pytest.raises(InUseError):
            host.another().prepare(domain)
    else:

        def killed(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Starts, "_thaw_left", killed)
            patch.setattr(Starts, "put_away", killed)
            with pytest.raises(KeyboardInterrupt):
                host.another().prepare(domain)
        host.another().release(UUID)
    assert not is_immutable(host.path("in/a.img"))
    assert not has_time_of_copy(host, tmp_path)
    boot(host, 7, image, domain)


@pytest.mark.parametrize("before", [False, True])
def test_a_file_system_that_is_mounted_while_the_start_is_put_away(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Its file stays immutable: it has no new time yet."""
    note = FileTimes.note_times

    def mounted(*args: Any) -> object:
        if before:
            os.rename(host.path("away"), host.path("in"))
        noted = note(*args)
        if not before:
            os.rename(host.path("away"), host.path("in"))
        return noted

    os.rename(host.path("in"), host.path("away"))
    with monkeypatch.context() as patch:
        patch.setattr(FileTimes, "note_times", mounted)
        image = end(host, 5)
    assert host.record().start is None
    assert is_immutable(host.path("in/a.img"))
    assert goes_on(host, image)
    end(host, 7)
    assert not has_time_of_copy(host, tmp_path)


@pytest.mark.parametrize("end_guest", [*ENDS, end_read_only])
def test_a_define_does_not_hide_that_the_flag_was_gone(host: Host, tmp_path: Path, end_guest: Any) -> None:
    image = end_guest(host)
    run("chattr", "-i", host.path("in/a.img"))
    run("cp", "-p", tmp_path / "copy", host.path("in/a.img"))
    host.another().define(host.domain("in/a.img"))
    assert not goes_on(host, image)
    assert Path(host.path("in/a.img")).read_bytes().startswith(BEFORE)


def test_each_file_gets_its_new_time_when_one_was_another_guests(host: Host, tmp_path: Path) -> None:
    """The ledger came from a backup, and no saved guest can go on; backups by time copy what the guest wrote."""
    start_with_two(host, tmp_path)
    back_up(host)
    os.rename(host.path("in"), host.path("away"))
    end(host, 6)
    os.rename(host.path("away"), host.path("in"))
    host.another().define(host.domain("b.img"))
    boot(host, 7, domain=host.domain("b.img"))
    put_back(host)
    del host.mapper.alive[7]
    host.another().reconcile()
    assert not is_immutable(host.path("in/a.img"))
    assert not has_time_of_copy(host, tmp_path)


@pytest.mark.parametrize("upgraded", [False, True])
def test_a_file_that_was_away_at_the_first_attempt_gets_its_new_time_at_the_next(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upgraded: bool
) -> None:
    """The version before noted its old time then."""
    domain = start_with_two(host, tmp_path)
    thaw = FsdaxBacking.thaw_unless

    def fails(backing: FsdaxBacking, path: str, *args: Any, **options: Any) -> None:
        if path.endswith("b.img"):
            raise BackingError(f"{path}: Input/output error")
        thaw(backing, path, *args, **options)

    os.rename(host.path("in"), host.path("away"))
    with monkeypatch.context() as patch:
        patch.setattr(FsdaxBacking, "thaw_unless", fails)
        with pytest.raises(BackingError, match="Input/output"):
            end(host, 6)
    os.rename(host.path("away"), host.path("in"))
    if upgraded:
        with closing(sqlite3.connect(host.folder / "ledger.sqlite")) as ledger, ledger:
            old = os.stat(host.path("in/a.img")).st_mtime_ns
            ledger.execute("UPDATE attachment SET written = replace(written, ' -1', ?)", (f" {old}",))
            assert ledger.total_changes == 1
    host.another().reconcile()
    assert host.record().start is None
    assert not is_immutable(host.path("in/a.img"))
    assert not has_time_of_copy(host, tmp_path)
    image = host.mapper.memory[6]
    boot(host, 7, image, domain)
    image = end(host, 7)
    run("cp", "-p", tmp_path / "copy", host.path("in/a.img"))
    with pytest.raises(RefusedError):
        boot(host, 8, image, domain)


def test_a_look_at_a_saved_guest_changes_nothing_for_the_repair_of_its_file(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = end_away(host)
    thaw, looked = FsdaxBacking.thaw_unless, []

    def looked_at_first(*args: Any, **options: Any) -> None:
        host.another().check_restore(UUID)
        looked.append(args)
        thaw(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FsdaxBacking, "thaw_unless", looked_at_first)
        assert repair(host) == []
    assert looked
    assert goes_on(host, image)
