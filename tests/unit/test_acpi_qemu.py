# SPDX-License-Identifier: Apache-2.0
"""QemuAcpiBuilder's arguments for QEMU, and its handling of a QEMU that fails, with scripts in QEMU's place."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.acpi.machine import arguments
from nvdimm_driver.acpi.qemu import QemuAcpiBuilder
from nvdimm_driver.acpi.qtest import Qtest
from nvdimm_driver.errors import AcpiError, ConfigError, LayoutError
from nvdimm_driver.model import GIB, KIB, MIB, GuestLayout, Placement
from nvdimm_driver.processes import FIRST_UID
from tests.waiting import wait_until


def layout(*nvdimms: Placement) -> GuestLayout:
    return GuestLayout(GIB, 4 * GIB, 1 << 48, nvdimms)


ONE = layout(Placement(0, 68 * GIB, 64 * MIB))

ROOT = Path(__file__).parent.parent.parent
BUILD_ONE = """
import sys
from nvdimm_driver.acpi.qemu import QemuAcpiBuilder
from nvdimm_driver.acpi.qtest import Qtest
from nvdimm_driver.model import GuestLayout, Placement
nvdimm = Placement(0, 1 << 36, 1 << 26)
QemuAcpiBuilder([sys.argv[1]]).build(GuestLayout(1 << 30, 1 << 32, 1 << 48, (nvdimm,)))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a folder that QEMU's unprivileged user may read and write; pytest's folders are closed to it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def program(place: Path, name: str, script: str) -> str:
    path = place / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def is_running(pid: int) -> bool:
    """Return True unless the process is gone or a zombie: nobody may be there to wait for an orphan."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_arguments_of_plain_nvdimm() -> None:
    words = arguments(ONE)
    assert value(words, "-m") == f"size=32M,slots=1,maxmem={32 * MIB + 64 * GIB + 64 * MIB}"
    assert value(words, "-object").startswith(f"memory-backend-memfd,id=m0,size={64 * MIB},share=on,reserve=off,")
    assert value(words, "-device") == "nvdimm,id=nv0,memdev=m0,slot=0,addr=0x1100000000"
    assert "-numa" not in words


def test_arguments_of_slot_label_and_node() -> None:
    words = arguments(layout(Placement(5, 68 * GIB, 64 * MIB, 128 * KIB, 2)))
    assert "slots=6," in value(words, "-m")
    assert f"memory-backend-memfd,id=m5,size={64 * MIB + 128 * KIB},share=on,reserve=off,prealloc=off,seal=off" in words
    assert value(words, "-device") == "nvdimm,id=nv5,memdev=m5,slot=5,addr=0x1100000000,node=2,label-size=131072"
    assert [words[at + 1] for at, word in enumerate(words) if word == "-numa"] == [
        "node,nodeid=0,memdev=ram",
        "node,nodeid=1",
        "node,nodeid=2",
    ]


def test_label_that_is_no_whole_page_rounds_the_backend_up() -> None:
    words = arguments(layout(Placement(0, 68 * GIB, 64 * MIB, 129 * KIB)))
    assert f",size={64 * MIB + 132 * KIB}," in value(words, "-object")


def test_no_qemu_installed(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    with pytest.raises(ConfigError) as caught:
        QemuAcpiBuilder([missing, "no-such-qemu"]).build(ONE)
    assert f"tried {missing}, no-such-qemu" in caught.value.message
    assert "qemu-system-xen" in caught.value.hint


def test_layout_is_checked_before_any_qemu() -> None:
    with pytest.raises(LayoutError, match="0 NVDIMMs"):
        QemuAcpiBuilder(["no-such-qemu"]).build(layout())


def test_qemu_that_fails_is_quoted_and_the_next_is_tried(place: Path) -> None:
    first = program(place, "first", "echo 'first: cannot' >&2; exit 1")
    second = program(place, "second", "echo 'second: -accel qtest: invalid accelerator qtest' >&2; exit 3")
    with pytest.raises(AcpiError) as caught:
        QemuAcpiBuilder([first, second]).build(ONE)
    ended = "QEMU ended before it answered 'endianness'"
    assert caught.value.message == (
        f"no ACPI tables from QEMU: {first}: {ended}: first: cannot; {second}: {ended}: it wrote nothing to stderr"
    )
    assert "native" in caught.value.hint


def test_file_that_is_no_program(place: Path) -> None:
    path = place / "text"
    path.write_text("\0")
    path.chmod(0o755)
    with pytest.raises(AcpiError, match=f"{path}: QEMU ended"):
        QemuAcpiBuilder([str(path)]).build(ONE)


def test_qemu_that_hangs_is_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = program(
        place, "hanging", f"echo waiting >&2; echo $$ >{place}/new; mv {place}/new {place}/pid; exec sleep infinity"
    )

    def left_once_it_runs(_: Qtest) -> float:
        wait_until((place / "pid").exists)
        return 0.05

    monkeypatch.setattr(Qtest, "_left", left_once_it_runs)
    with pytest.raises(AcpiError, match=r"did not answer .* in time: waiting"):
        QemuAcpiBuilder([hanging]).build(ONE)
    assert not is_running(int((place / "pid").read_text()))


def test_qemu_that_talks_nonsense_is_ended(place: Path) -> None:
    talking = program(place, "talking", f"echo $$ >{place}/pid; echo Hello; exec sleep infinity")
    with pytest.raises(AcpiError, match="with 'Hello'"):
        QemuAcpiBuilder([talking]).build(ONE)
    assert not is_running(int((place / "pid").read_text()))


def test_qemu_has_no_privileges(place: Path) -> None:
    status = program(place, "status", f"cat /proc/$$/status >{place}/status.txt; exit 1")
    with pytest.raises(AcpiError):
        QemuAcpiBuilder([status]).build(ONE)
    lines = dict(line.split(":\t", 1) for line in (place / "status.txt").read_text().splitlines() if ":\t" in line)
    assert lines["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert set(lines["Uid"].split()) == {str(FIRST_UID)}
        assert set(lines["CapEff"]) == set(lines["CapPrm"]) == {"0"}


def test_qemu_dies_when_we_are_killed(place: Path) -> None:
    hanging = program(place, "hanging", f"echo $$ >{place}/new; mv {place}/new {place}/pid; exec sleep infinity")
    with subprocess.Popen([sys.executable, "-c", BUILD_ONE, hanging], cwd=ROOT) as builder:
        wait_until((place / "pid").exists)
        builder.kill()
    pid = int((place / "pid").read_text())
    wait_until(lambda: not is_running(pid))


def test_sandbox_is_asked_for_and_done_without_only_where_it_is_not_built_in(place: Path) -> None:
    without = "case $2 in on,*) echo '-sandbox support is not enabled in this QEMU binary' >&2;; esac"
    recorder = program(place, "recorder", f'echo "$1" >>{place}/log; {without}; exit 1')
    with pytest.raises(AcpiError):
        QemuAcpiBuilder([recorder]).build(ONE)
    assert (place / "log").read_text().splitlines() == ["-sandbox", "-nodefaults"]
    other = program(place, "other", f'echo "$1" >>{place}/log2; exit 1')
    with pytest.raises(AcpiError):
        QemuAcpiBuilder([other]).build(ONE)
    assert (place / "log2").read_text().splitlines() == ["-sandbox"]
