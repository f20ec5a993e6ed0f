# SPDX-License-Identifier: Apache-2.0
"""How long freezing waits for others; the clock is a double."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvdimm_driver.backing import locks
from nvdimm_driver.backing.locks import FREEZE_SECONDS, Locks
from nvdimm_driver.errors import InUseError
from nvdimm_driver.lock_files import is_taken, take
from nvdimm_driver.model import MIB, BackingIdentity


@pytest.mark.parametrize("turns", [1, 100])
def test_many_that_freeze_at_once_wait_for_their_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """Each has the lock for less than that time, and all together have it for longer."""
    looks = 2 * turns
    clock = count(0, FREEZE_SECONDS / 4)
    left = iter(range(looks, -1, -1))

    def take(lock: int) -> bool:
        now = next(left)
        os.utime(lock, ns=(0, 1 + now // 2))
        return now == 0

    monkeypatch.setattr(locks, "take", take)
    monkeypatch.setattr(locks, "find_waiting", lambda *_: None)
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    with open(tmp_path / "a.img", "w") as file, Locks(tmp_path / "locks").freezing(file.fileno(), file.name):
        assert list(left) == []


def test_one_that_freezes_for_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(0, FREEZE_SECONDS / 4)
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    monkeypatch.setattr(locks, "find_waiting", lambda *_: None)
    with (
        open(tmp_path / "a.img", "w") as file,
        Locks(tmp_path / "locks").freezing(file.fileno(), file.name),
        pytest.raises(InUseError, match=f"process {os.getpid()} .* has been freezing or thawing a file"),
        Locks(tmp_path / "locks").freezing(file.fileno(), file.name),
    ):
        pass


def test_a_writer_of_the_version_before_counts(tmp_path: Path) -> None:
    """Its wipe or import of a device can go on for hours, while the package is upgraded."""
    found = Locks(tmp_path / "locks")
    identity = BackingIdentity("devdax", "7b2c", 0, 0, 0, MIB)
    with open("/dev/null", "rb") as device:
        before = tmp_path / "locks/write-char-1:3"  # its name in that version
        with found.writing(device.fileno(), device.name, identity):
            assert is_taken(before)
        assert not before.exists()
        with open(before, "x") as lock:
            assert take(lock.fileno())
            with pytest.raises(InUseError, match="is being overwritten"):
                found.check_unwritten(device.fileno(), device.name, identity)
            with (
                pytest.raises(InUseError, match="is being overwritten"),
                found.writing(device.fileno(), device.name, identity),
            ):
                pass
