# SPDX-License-Identifier: Apache-2.0
"""A random walk of a guest that is saved and restored, of copies of its file, and of processes that are killed.

A saved guest may go on only over the bytes that it had when it was saved. Real files on ext4 and XFS, a real ledger;
Xen is a double.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.lifecycle.start import Starts
from nvdimm_driver.state.start_steps import StartSteps
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import Host, empty, is_immutable
from tests.integration.test_restored_ledger_real import back_up, repair, restore
from tests.integration.test_restored_ledger_saved_real import Image, boot, end
from tests.unit.doubles import UUID, boot_host

STEPS = 150
POINTS: list[tuple[Any, str]] = [
    *((StartSteps, name) for name in ("begin_start", "finish_preparing", "begin_mapping", "finish_mapping")),
    *((StartSteps, name) for name in ("note_end", "note_written", "end_start", "note_thawed", "spoil_saved")),
    *((inode, name) for name in ("freeze", "_set_run", "_set_immutable", "_touch")),
    (FsdaxBacking, "thaw_unless"),
    (Starts, "thaw"),
    (os, "removexattr"),
]
"""What a process is killed before or after."""
RUNS = {"write": 3, "save": 4, "copy": 2, "move_away": 1, "destroy": 1, "power": 1, "back_up": 1, "read_only": 1}
IS_OFF = {"boot": 1, "restore": 4, "trial": 1, "start_fails": 1, "copy": 1, "put_copy_back": 2, "back_up": 1}
ALWAYS = {"repair": 1, "reconcile": 1, "old_ledger": 0.3}


class Killed(BaseException):
    """The process is gone."""


class Walk:
    """The host and what is known of it besides.

    :ivar guest: domid of the guest that runs; None when it is off.
    :ivar saved: memory of each guest that was saved, and the bytes that it had in its file.
    :ivar restored: how many went on.
    """

    def __init__(self, host: Host, folder: Path, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.host, self.folder, self.chance, self.patch = host, folder, random.Random(seed), patch
        self.guest: int | None = None
        self.domid, self.boots, self.written, self.restored = 5, 0, 0, 0
        self.saved: list[tuple[Image, bytes]] = []
        self.copies: list[Path] = []
        self.is_away = self.is_read_only = self.has_backup = False
        self.log: list[str] = []
        boot_host(patch, "boot 0")

    @property
    def file(self) -> str:
        return self.host.path("away/a.img" if self.is_away else "in/a.img")

    def bytes(self) -> bytes:
        with open(self.file, "rb") as file:
            return file.read(8)

    def step(self) -> None:
        """Do one thing. What the driver refuses, or is killed in, is not done."""
        choices = {**(IS_OFF if self.guest is None else RUNS), **ALWAYS}
        if self.is_away:
            choices["move_back"] = 6
        if self.is_read_only:
            choices["writable"] = 6
        (name,) = self.chance.choices([*choices], [*choices.values()])
        self.log.append(name)
        try:
            getattr(self, name)()
        except (NvdimmError, OSError, Killed) as error:
            self.log.append(f"  {type(error).__name__} {str(error)[:150]}")

    def killed(self, work: Callable[[], object]) -> None:
        """Do something; one time in four, kill the process at some point."""
        if self.chance.random() > 0.25:
            work()
            return
        owner, name = self.chance.choice(POINTS)
        left, after, real = self.chance.randrange(3), self.chance.random() < 0.5, getattr(owner, name)

        def dies(*args: Any, **options: Any) -> object:
            nonlocal left
            left -= 1
            if left >= 0:
                return real(*args, **options)
            if after:
                real(*args, **options)
            raise Killed

        put_away = Starts.put_away

        def put_away_unless_killed(starts: Starts, *args: Any, **options: Any) -> None:
            if sys.exc_info()[0] is Killed:
                raise Killed
            put_away(starts, *args, **options)

        self.log.append(f"  killed at {name} {left}, after: {after}")
        with self.patch.context() as patch:
            patch.setattr(owner, name, dies)
            patch.setattr(Starts, "put_away", put_away_unless_killed)
            try:
                work()
            except Killed:
                self.host.driver.ledger.close()
                self.host.driver = self.host.another()
                raise

    def _start(self, image: Image | None = None) -> None:
        self.domid += 1
        try:
            self.killed(lambda: boot(self.host, self.domid, image))
        except BaseException:
            self.host.mapper.alive.pop(self.domid, None)
            self.host.mapper.announce(self.domid, ())
            raise
        self.guest = self.domid

    def _end(self) -> None:
        domid, self.guest = self.guest, None
        assert domid is not None
        self.host.mapper.announce(domid, ())
        self.killed(lambda: end(self.host, domid))

    # --- while the domain is off ---

    def boot(self) -> None:
        self._start()

    def restore(self) -> None:
        if self.saved:
            image, had = self.chance.choice(self.saved[-2:])
            now = self.bytes()
            self._start(image)
            assert now == had, f"the guest, which had {had!r}, goes on over {now!r}"
            self.restored += 1

    def trial(self) -> None:
        self.killed(lambda: self.host.another().try_restore(UUID))

    def start_fails(self) -> None:
        def fails() -> None:
            self.host.another().prepare(self.host.domain("in/a.img"))
            self.host.another().release(UUID)

        self.killed(fails)

    def put_copy_back(self) -> None:
        if self.copies and not self.is_read_only:
            if is_immutable(self.file):
                if self.chance.random() < 0.7:
                    return
                run("chattr", "-i", self.file)
            run("cp", "-p", self.chance.choice(self.copies), self.file)

    # --- while its guest runs ---

    def write(self) -> None:
        """Write as a guest does: nothing of the file changes but its bytes."""
        if self.is_read_only:
            return
        self.written += 1
        found, frozen = os.stat(self.file), is_immutable(self.file)
        run("chattr", "-i", self.file)
        with open(self.file, "r+b", buffering=0) as file:
            file.write(b"%08d" % self.written)
        os.utime(self.file, ns=(found.st_atime_ns, found.st_mtime_ns))
        run("chattr", "+i" if frozen else "-i", self.file)

    def save(self) -> None:
        assert self.guest is not None
        self.saved.append((dict(self.host.mapper.memory[self.guest]), self.bytes()))
        self._end()

    def destroy(self) -> None:
        self._end()

    def power(self) -> None:
        assert self.guest is not None
        self.host.mapper.alive.clear()
        self.host.mapper.announce(self.guest, ())
        self.guest = None
        self.boots += 1
        boot_host(self.patch, f"boot {self.boots}")

    # --- always ---

    def copy(self) -> None:
        self.copies.append(self.folder / f"copy{len(self.copies)}")
        run("cp", "-p", self.file, self.copies[-1])

    def repair(self) -> None:
        self.killed(lambda: repair(self.host))

    def reconcile(self) -> None:
        self.killed(lambda: self.host.another().reconcile())

    def move_away(self) -> None:
        if not (self.is_away or self.is_read_only):
            os.rename(self.host.path("in"), self.host.path("away"))
            self.is_away = True

    def move_back(self) -> None:
        if self.is_away and not self.is_read_only:
            os.rename(self.host.path("away"), self.host.path("in"))
            self.is_away = False

    def read_only(self) -> None:
        run("mount", "-o", "remount,ro", self.host.fs.root)
        self.is_read_only = True

    def writable(self) -> None:
        run("mount", "-o", "remount,rw", self.host.fs.root)
        self.is_read_only = False

    def back_up(self) -> None:
        back_up(self.host)
        self.has_backup = True

    def old_ledger(self) -> None:
        if self.has_backup:
            restore(self.host)


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    host = Host(tmp_path, file_systems[request.param])
    os.mkdir(host.path("in"))
    host.driver.define(host.domain("in/a.img"))
    yield host
    run("mount", "-o", "remount,rw", host.fs.root)
    empty(file_systems[request.param])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 101))])
def test_a_saved_guest_goes_on_over_its_own_bytes_alone(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    walk = Walk(host, tmp_path, seed, monkeypatch)
    try:
        for _ in range(STEPS):
            walk.step()
    except AssertionError:
        print(*walk.log, sep="\n")
        raise
    finally:
        print(f"seed {seed}: {len(walk.saved)} saves, {walk.restored} guests went on")
    walk.writable()
    walk.move_back()
    if walk.guest is not None:
        end(host, walk.guest)
    assert repair(host) == []
    boot(host, 1000)
    image = end(host, 1000)
    boot(host, 1001, image)
