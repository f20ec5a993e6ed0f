# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nvdimm_driver.processes import start_time


def test_start_time_is_counted_from_the_boot(tmp_path: Path) -> None:
    ticks = 100 * os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(f"7 (a ) name) S {' '.join(map(str, range(4, 22)))} {ticks} 0 0\n")
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    assert start_time(tmp_path) == pytest.approx(booted + 100, abs=1)


def test_a_process_that_has_ended_has_none(tmp_path: Path) -> None:
    assert start_time(tmp_path) is None
    (tmp_path / "stat").write_text("")
    assert start_time(tmp_path) is None
