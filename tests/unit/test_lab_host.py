# SPDX-License-Identifier: Apache-2.0
"""The lab's host: when it is started again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.lab.errors import LabError
from tests.lab.host import XenHost
from tests.lab.image import Images

PANIC = "Kernel panic - not syncing: Fatal exception in interrupt\n(XEN) Hardware Dom0 crashed: 'noreboot' set\n"
RACE = f"exc_int3+0x118/0x130\nRIP: e030:sched_clock_cpu+0x9/0x1d0\n{PANIC}"


class Host(XenHost):
    """A host without QEMU, whose boots leave these consoles; an empty one is that of a boot that succeeds."""

    def __init__(self, *consoles: str) -> None:
        super().__init__(cast(Images, None), nvdimms=())
        self.consoles = [*consoles]
        self.boots = 0

    def _take_lock(self) -> None:
        self.boots += 1

    def _start_qemu(self) -> None:
        (self.run_folder / "console.log").write_text(self.consoles.pop(0))

    def _wait_for_agent(self) -> None:
        if self.console():
            raise LabError("dom0's kernel has crashed")


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tests.lab.host.require", lambda programs: None)
    yield
    shutil.rmtree(tmp_path)


def test_a_race_of_qemus_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    host = Host(RACE, "")
    host.start()
    assert host.boots == 2
    assert "dom0 is started again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "consoles", [[PANIC, ""], ["exc_int3\n", ""], [RACE, RACE, ""]], ids=["panic", "trap", "again"]
)
def test_other_crashes_are(consoles: list[str]) -> None:
    host = Host(*consoles)
    with pytest.raises(LabError, match="crashed"):
        host.start()
    assert host.consoles == [""]
