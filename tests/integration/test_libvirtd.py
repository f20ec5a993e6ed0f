# SPDX-License-Identifier: Apache-2.0
"""Tests of the bench: libvirtd.py's promises about its processes and this machine."""

from __future__ import annotations

import os
import platform
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tried
from tests.integration.libvirtd import DRIVER, PLACES, SOURCES, Libvirtd
from tests.package import PROJECT
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.integration.libvirtd import Libvirtd
libvirtd = Libvirtd(Path(sys.argv[1]))
libvirtd.start()
print(libvirtd.pid, flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def symbols(kind: str, library: Path) -> set[str]:
    done = subprocess.run(["nm", "-D", f"--{kind}-only", library], capture_output=True, text=True, check=True)
    return set(re.findall(r"\b(libxl_\w+)", done.stdout))


def test_the_versions_that_are_tried_here(record_property: tried.Record) -> None:
    here = [name for name in tried.COMMANDS if name not in ("Xen", "Linux", "ndctl", "Python")]
    nova: list[str | Path] = [
        PROJECT / ".venv-nova/bin/python",
        "-c",
        "import importlib.metadata as m; print(m.version('nova'))",
    ]
    tried.record(
        record_property,
        lambda command: subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout,
        here,
        tests="unit and integration, without Xen",
        Python=platform.python_version(),
        Nova=subprocess.run(nova, capture_output=True, text=True, check=True).stdout.strip(),
    )


def test_its_folders_are_in_the_place_of_the_machines(tmp_path: Path) -> None:
    with Libvirtd(tmp_path) as libvirtd:
        libvirtd.start()
        assert libvirtd.check("list", "--all", "--name").split() == ["Domain-0"]
        for name, place in PLACES.items():
            ours = (tmp_path / name).stat()
            assert libvirtd.run("stat", "-c", "%d %i", place).stdout.split() == [str(ours.st_dev), str(ours.st_ino)]
            assert not Path(place).exists() or not Path(place).samefile(tmp_path / name)


def test_every_function_that_stands_in_is_one_that_libvirt_calls(tmp_path: Path) -> None:
    with Libvirtd(tmp_path) as libvirtd:
        stand_ins = symbols("defined", libvirtd.folder / "libxl_stand_in.so")
    assert len(stand_ins) > 30
    assert stand_ins <= symbols("undefined", DRIVER)


def test_libvirtd_ends_with_a_test_run_that_is_killed(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdin is not None
    assert run.stdout is not None
    libvirtd = os.pidfd_open(int(run.stdout.readline()))
    run.communicate(timeout=HANG_SECONDS)
    assert select.select([libvirtd], [], [], HANG_SECONDS)[0], "libvirtd still runs"
    os.close(libvirtd)


def test_a_libvirtd_that_does_not_start_is_an_error_with_its_log(tmp_path: Path) -> None:
    with Libvirtd(tmp_path) as libvirtd:
        (tmp_path / "etc/libvirtd.conf").write_text('nonsense = "yes\n')
        with pytest.raises(RuntimeError, match="libvirtd does not start"):
            libvirtd.start()


def test_a_wait_that_is_too_long_is_an_error_with_the_logs(tmp_path: Path) -> None:
    with Libvirtd(tmp_path) as libvirtd:
        libvirtd.start()
        with pytest.raises(TimeoutError, match=r"no 'create x 1' in 0 s\n(.*\n)+.*libvirt version"):
            libvirtd.wait_for("create x 1", timeout=0.1)


def test_the_c_is_formatted_like_the_rest() -> None:
    for source in SOURCES.glob("*.[ch]"):
        assert not [line for line in source.read_text().splitlines() if len(line) > 120 or line != line.rstrip()]
