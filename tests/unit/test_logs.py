# SPDX-License-Identifier: Apache-2.0
"""The log level: DEBUG logs each step of a define and a start, in order; other levels log none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nvdimm_driver.acpi.cache import TableCache, key_of
from nvdimm_driver.acpi.machine import arguments
from nvdimm_driver.acpi.qemu import QemuAcpiBuilder
from nvdimm_driver.acpi.verify import DSM_ADDRESS
from nvdimm_driver.cmd.device_model import Log, attach
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import ConfigError, XenError
from nvdimm_driver.model import MIB
from nvdimm_driver.state.ledger import Ledger
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, TablesOfNative, domain, make_driver
from tests.waiting import HANG_SECONDS

A = "/mnt/pmem0/a"
LOGGING = """
import logging, sys
from nvdimm_driver import conf, logs
logs.{where}("hook", conf.load([sys.argv[1]]))
for name in "nvdimm_driver.lifecycle", "stevedore":
    for level in "DEBUG", "INFO", "WARNING", "ERROR":
        logging.getLogger(name).log(logging.getLevelName(level), "%s of %s", level, name)
"""
HOOK = """
import sys
from nvdimm_driver.cmd.hook import main
xml = b"<domain><x:y xmlns:x='urn:nvdimm-driver:x'/></domain>"
sys.exit(main(["50-nvdimm", "db1", "prepare", "begin", "-"], xml, sys.argv[1:]))
"""
LOST = """
[DEFAULT]
state_dir = {folder}
log_file = {folder}/missing/log
"""
OLD_SCRIPT = """
import sys
from nvdimm_driver.cmd.device_model import main
main(
    ["nvdimm-device-model", "-xen-domid", "5"],
    state_dir=sys.argv[1],
    log_file=sys.argv[2],
    qemu="/bin/false",
    log_format="text",
    mapper="missing",
)
"""


@pytest.fixture
def mapper() -> RecordingMapper:
    return RecordingMapper(alive={5: UUID})


@pytest.fixture
def driver(tmp_path: Path, mapper: RecordingMapper) -> XenNvdimmDriver:
    return make_driver(tmp_path, MemoryBacking(), mapper)


def steps(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages, without durations."""
    found = [re.sub(r"\d+\.\d{3} s", "N s", record.getMessage()) for record in caplog.records]
    caplog.clear()
    return found


def run_device_model(
    driver: XenNvdimmDriver, mapper: RecordingMapper, folder: Path, level: str, *, served: bool = False
) -> list[str]:
    """Run the device model, whether a start is prepared or not; return levels and messages of its log."""

    def serve(state_dir: str, domid: int, uuid: str) -> None:
        assert served

    log = Log(str(folder / "log"), level=level)
    ledger = Ledger(str(folder / "ledger.sqlite"), log)
    attach(5, ledger, mapper, str(folder), driver.prepare_known, serve, log=log)
    text = (folder / "log").read_text() if (folder / "log").exists() else ""
    return [line.split("] ", 1)[1] for line in text.splitlines()]


def test_debug_has_each_step_of_a_define(driver: XenNvdimmDriver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        driver.define(domain(A))
    assert steps(caplog) == [
        "plan domain db1, NVDIMMs: 1; nothing is changed",
        f"assumed {A} at SPA 0x140000000: it is not written yet",
        "placed slot 0 at 0x1100000000, 64 MiB",
        "ACPI tables are ready: 302 B, after N s",
        "guards passed, mappings: 0",
        f"define domain db1, {UUID}",
        f"provision {A}: 64 MiB to write",
        f"event=provisioning domain=db1 uuid={UUID} domid=- path={A} written=33554432 bytes=67108864",
        f"located {A}: first SPA 0x140000000, extents: 1",
        "placed slot 0 at 0x1100000000, 64 MiB",
        "guards passed, mappings: 1",
        f"event=defined domain=db1 uuid={UUID} domid=- nvdimms=1 bytes=67108864",
    ]


def test_debug_has_each_step_of_a_start_that_follows_a_crash(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    run_device_model(driver, mapper, tmp_path, "INFO")
    mapper.alive.clear()
    caplog.clear()
    with caplog.at_level("DEBUG"):
        driver.prepare(domain(A))
    assert steps(caplog) == [
        "reconcile: starts to put away: 1",
        "put away the last start of domain db1, which is over",
        f"thaw {A}",
        f"event=put-away domain=db1 uuid={UUID} domid=5",
        f"freeze {A}",
        f"located {A}: first SPA 0x140000000, extents: 1",
        "placed slot 0 at 0x1100000000, 64 MiB",
        "ACPI tables are ready: 302 B, after N s",
        "guards passed, mappings: 1",
        "hold the backings of domain db1: 0 descriptors",
        f"event=prepared domain=db1 uuid={UUID} domid=- nvdimms=1 extents=1 superpages=32 pages=0 hypercalls=1",
    ]


def test_debug_says_that_a_failed_define_is_undone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backing = MemoryBacking()
    backing.fail_provision = {"/mnt/pmem0/b"}
    with caplog.at_level("DEBUG"), pytest.raises(Exception, match="no space"):
        make_driver(tmp_path, backing, RecordingMapper()).define(domain(A, "/mnt/pmem0/b"))
    assert steps(caplog)[-2:] == ["define of domain db1 failed: roll it back", f"delete {A}"]


def test_info_has_events_alone(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        driver.define(domain(A))
        driver.prepare(domain(A))
    assert [line.split()[0] for line in steps(caplog)] == ["event=provisioning", "event=defined", "event=prepared"]
    (line,) = run_device_model(driver, mapper, tmp_path, "INFO")
    assert line.startswith("INFO event=started ")


def test_debug_has_each_step_of_the_device_model(
    tmp_path: Path, mapper: RecordingMapper, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = make_driver(tmp_path, MemoryBacking(), mapper, dsm="qemu", acpi=TablesOfNative())
    labelled = domain(A, label_size=MIB)
    driver.define(labelled)
    driver.prepare(labelled)
    capsys.readouterr()
    *lines, event = run_device_model(driver, mapper, tmp_path, "DEBUG", served=True)
    assert lines == [
        'DEBUG msg="found the prepared start of domain db1, domid 5"',
        'DEBUG msg="guards passed, mappings: 1"',
        'DEBUG msg="map gfn 0x1100000 to mfn 0x140000, 16128 frames"',
        'DEBUG msg="ACPI tables delivered: 302 bytes"',
        'DEBUG msg="label server started"',
    ]
    assert event.startswith("INFO event=started ")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.partition(": ")[2] for line in printed.err.splitlines()] == [
        line.partition(" ")[2] for line in [*lines, event]
    ], "libxl's log has the same"


def test_the_device_model_says_that_no_hook_has_prepared(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    driver.define(domain(A))
    first, *_ = run_device_model(driver, mapper, tmp_path, "DEBUG")
    assert first == f'DEBUG msg="no hook has prepared a start of domain {UUID}: prepare it now"'


def test_error_leaves_out_what_went_well(driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path) -> None:
    driver.define(domain(A))
    assert run_device_model(driver, mapper, tmp_path, "ERROR") == []
    mapper.alive.clear()
    driver.reconcile()
    mapper.announced.clear()
    mapper.alive[5] = UUID
    mapper.fail = "map"
    with pytest.raises(XenError):
        run_device_model(driver, mapper, tmp_path, "ERROR")
    assert " ERROR event=start-failed " in (tmp_path / "log").read_text()


def test_debug_says_when_tables_come_from_the_cache(
    driver: XenNvdimmDriver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = driver.plan(domain(A))
    cache = TableCache(tmp_path / "cache")
    cache.put(key_of("/bin/true", [*arguments(plan.layout), hex(DSM_ADDRESS)]), plan.tables.tables)
    with caplog.at_level("DEBUG"):
        QemuAcpiBuilder(("/bin/true",), cache=cache).build(plan.layout)
    assert steps(caplog) == ["ACPI tables of /bin/true come from the cache"]


@pytest.mark.parametrize(
    ("level", "own", "others"),
    [
        ("DEBUG", ["DEBUG", "INFO", "WARNING", "ERROR"], ["INFO", "WARNING", "ERROR"]),
        ("INFO", ["INFO", "WARNING", "ERROR"], ["INFO", "WARNING", "ERROR"]),
        ("WARNING", ["WARNING", "ERROR"], ["WARNING", "ERROR"]),
        ("ERROR", ["ERROR"], ["ERROR"]),
    ],
)
@pytest.mark.parametrize("where", ["to_file", "to_journal"])
def test_the_option_says_how_much_is_logged(
    tmp_path: Path, where: str, level: str, own: list[str], others: list[str]
) -> None:
    """Libraries, which log much at DEBUG, log from INFO on at most."""
    options = tmp_path / "nvdimm-driver.conf"
    options.write_text(f"[DEFAULT]\nlog_file = {tmp_path}/log\nlog_level = {level}\n")
    command: list[str | Path] = [sys.executable, "-c", LOGGING.format(where=where), options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = (tmp_path / "log").read_text() if where == "to_file" else done.stderr
    found = re.findall(r'(\w+) msg="\1 of (\S+)"$', text, re.MULTILINE)
    assert found == [(each, "nvdimm_driver.lifecycle") for each in own] + [(each, "stevedore") for each in others]
    assert done.stdout == ""


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_the_hook_says_that_it_is_called(tmp_path: Path, level: str) -> None:
    options = tmp_path / "nvdimm-driver.conf"
    options.write_text(f"[DEFAULT]\nlog_file = {tmp_path}/log\nlog_level = {level}\n")
    done = subprocess.run([sys.executable, "-c", HOOK, str(options)], check=True, capture_output=True)
    found = (tmp_path / "log").read_text()
    assert done.stdout == b""
    assert ('DEBUG msg="the hook is called: prepare of domain db1"' in found) == (level == "DEBUG")


def test_a_script_of_an_earlier_version_runs(tmp_path: Path) -> None:
    """The script passes no log level, so it is INFO."""
    command: list[str | Path] = [sys.executable, "-c", OLD_SCRIPT, tmp_path, tmp_path / "log"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (ConfigError.exit_code, "")
    assert " ERROR event=start-failed " in (tmp_path / "log").read_text()


def test_a_log_whose_folder_is_missing_fails_nothing(tmp_path: Path) -> None:
    """The lines go to stderr: libvirt and libxl keep that."""
    (tmp_path / "conf").write_text(LOST.format(folder=tmp_path))
    command = [sys.executable, "-c", LOGGING.format(where="to_file"), str(tmp_path / "conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"cannot log to {tmp_path}/missing/log: No such file or directory\n" in done.stderr
    assert "ERROR of nvdimm_driver.lifecycle" in done.stderr


def test_a_log_is_for_its_owner_and_group_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        options = tmp_path / "conf"
        options.write_text(f"[DEFAULT]\nlog_file = {tmp_path}/hook\n")
        command = [sys.executable, "-c", LOGGING.format(where="to_file"), str(options)]
        subprocess.run(command, check=True, timeout=HANG_SECONDS)
        Log(str(tmp_path / "device-model"), level="DEBUG").debug("a step")
    finally:
        os.umask(before)
    for name in "hook", "device-model":
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
