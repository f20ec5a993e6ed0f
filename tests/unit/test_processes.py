# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.processes import kill, start_time


def test_start_time_is_counted_from_the_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    monkeypatch.setattr(time, "clock_gettime", {time.CLOCK_BOOTTIME: 5000.0}.__getitem__)
    ticks = 100 * os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(f"7 (a ) name) S {' '.join(map(str, range(4, 22)))} {ticks} 0 0\n")
    assert start_time(tmp_path) == 1_700_000_000 - 5000 + 100


def test_a_process_that_has_ended_has_none(tmp_path: Path) -> None:
    assert start_time(tmp_path) is None
    (tmp_path / "stat").write_text("")
    assert start_time(tmp_path) is None


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that ends with status 7 when its input ends."""
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read(); sys.exit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def test_a_killed_process_is_dead_at_once(process: subprocess.Popen[bytes]) -> None:
    kill(process.pid)
    assert process.poll() == -9


def test_it_is_killed_by_one_that_has_many_descriptors(process: subprocess.Popen[bytes]) -> None:
    """nvdimmd has one for each client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        kill(process.pid)
    finally:
        for each in opened:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert process.poll() == -9


def test_one_that_is_not_meant_lives_on(process: subprocess.Popen[bytes]) -> None:
    kill(process.pid, lambda: False)
    assert process.poll() is None


def test_one_may_end_by_itself(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    process.stdin.close()
    kill(process.pid, patience=600)
    assert process.poll() == 7
