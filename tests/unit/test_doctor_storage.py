# SPDX-License-Identifier: Apache-2.0
"""The folders that the driver writes to; test_full_disk.py has full ones."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from nvdimm_driver.doctor.finding import Result
from nvdimm_driver.doctor.storage import check_log, check_state
from nvdimm_driver.state.reserve import SIZE, SLICE, Reserve


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    Reserve(f"{tmp_path}/ledger.sqlite-reserve").keep()
    return tmp_path / "ledger.sqlite"


def test_all_is_well(ledger: Path) -> None:
    before = sorted(ledger.parent.iterdir())
    found = check_state(ledger)
    assert (found.result, found.message) == (
        Result.PASS,
        f"{ledger.parent} can be written; 16 MiB are kept for starts on a full disk",
    )
    assert check_log(ledger.parent / "log").result == Result.PASS
    assert sorted(ledger.parent.iterdir()) == before, "nothing is changed"


def test_a_reserve_that_is_partly_used_up(ledger: Path) -> None:
    assert Reserve(f"{ledger}-reserve").give_back()
    assert Reserve(f"{ledger}-reserve").size() == SIZE - SLICE
    found = check_state(ledger)
    assert found.result == Result.WARN
    assert "15 MiB of 16 MiB are kept" in found.message


def test_no_inode_is_free(tmp_path: Path) -> None:
    """The reserve is of bytes, and does not help."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=8", "none", tmp_path], check=True)
    try:
        ledger = tmp_path / "ledger.sqlite"
        Reserve(f"{ledger}-reserve").keep()
        assert check_state(ledger).result == Result.PASS
        with suppress(OSError):
            for number in range(8):
                (tmp_path / str(number)).touch()
        found = check_state(ledger)
        assert (found.result, found.hint) == (
            Result.FAIL,
            f"delete files, or move them away; df -i {tmp_path} counts inodes",
        )
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_reserve_ends() -> None:
    assert not Reserve("/nonexistent/reserve").give_back()
    Reserve("/nonexistent/reserve").keep()


@pytest.mark.parametrize("folder", ["/nonexistent", "/proc"])
def test_a_state_folder_that_cannot_be(folder: str) -> None:
    found = check_state(Path(folder) / "ledger.sqlite")
    assert found.result == Result.FAIL
    assert folder in found.message
    assert found.hint


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing/log", "there is no folder"),
        (".", "it is not a file that this user may write"),
        ("/proc/log", "/proc/log cannot be written: Operation not supported"),
    ],
)
def test_a_log_that_cannot_be_written(tmp_path: Path, file: str, message: str) -> None:
    found = check_log(tmp_path / file)
    assert found.result == Result.WARN
    assert message in found.message
    assert "starts go on" in found.message


def test_a_log_that_everybody_can_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch(0o640)
    assert check_log(log).result == Result.PASS
    log.chmod(0o644)
    found = check_log(log)
    assert (found.result, found.hint) == (Result.WARN, f"repeat 'nvdimmctl register', or: chmod o= {log}")
