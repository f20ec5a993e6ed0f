# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl monitor`` and ``metrics`` on a host where domains start and fail to start, under the real libvirtd."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nvdimm_driver.state.ledger import Ledger
from tests.integration.bench_host import UUID, Host
from tests.waiting import HANG_SECONDS, wait_until

NVDIMMCTL = Path(sys.executable).with_name("nvdimmctl")
LIFE = ["prepared", "started", "released"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    try:
        host.define("db1", 1)
        yield host
    finally:
        host.libvirtd.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """A host with the domain db1, defined and shut off."""
    yield shared_host
    shared_host.clean()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty ledger, in the state folder that ``conf`` names."""
    (tmp_path / "conf").write_text(f"[DEFAULT]\nstate_dir={tmp_path}\n")
    return Ledger(str(tmp_path / "ledger.sqlite"))


def monitor(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start the command alone, on that ledger."""
    command = [str(NVDIMMCTL), "--config-file", str(folder / "conf"), "monitor", *words]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def all_events(host: Host, *words: str) -> list[dict[str, Any]]:
    done = host.nvdimmctl("monitor", "--no-follow", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return events(done.stdout)


def metrics(host: Host) -> dict[str, float]:
    """Return values by name and labels, without the prefix; from a file, because the stand-in for libxenctrl prints."""
    file = host.folder / "metrics.prom"
    done = host.nvdimmctl("metrics", "-o", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    return values(file.read_text())


def values(text: str) -> dict[str, float]:
    return {
        " ".join([sample.name.removeprefix("nvdimm_driver_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- on a host ---


def test_a_start_from_its_definition_to_its_end(host: Host) -> None:
    host.define("db9", 9)
    number = host.libvirtd.next_domid()
    host.libvirtd.check("start", "db9")
    assert metrics(host)["mapped_bytes"] == 4 * MIB
    host.libvirtd.check("destroy", "db9")
    host.check("undefine", "db9")
    host.nvdimmctl("release", "--yes", "db9")
    seen = all_events(host, "--domain", "db9")
    assert [event["event"] for event in seen] == ["defined", *LIFE, "undefined", "forgotten"]
    assert {event["uuid"] for event in seen} == {UUID.format(9)}
    assert [event["domid"] for event in seen] == [None, None, number, number, None, None]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"]) for event in seen)
    assert seen[4]["kept"] == f"{host.folder}/pmem/db9.img"
    assert metrics(host)["mapped_bytes"] == 0


def test_the_log_has_the_same_events(host: Host) -> None:
    last = all_events(host)[-1]["id"]
    before = len(host.log())
    host.libvirtd.check("start", "db1")
    host.libvirtd.check("destroy", "db1")
    assert [event["event"] for event in all_events(host, "--since", str(last))] == LIFE
    lines = [line.split() for line in host.log()[before:].splitlines()]
    assert [re.sub(r"\[\d+\]", "", line[1]) for line in lines] == ["hook", "device-model", "hook"]
    assert [line[3] for line in lines] == [f"event={kind}" for kind in LIFE]
    assert {tuple(line[4:6]) for line in lines} == {("domain=db1", f"uuid={UUID.format(1)}")}


def test_failed_starts_are_told_and_counted_by_reason(host: Host) -> None:
    before = metrics(host)
    host.fail("xc_domain_memory_mapping", errno.EPERM)
    assert host.libvirtd.virsh("start", "db1").returncode == 1
    host.fail("xc_get_machine_memory_map", errno.EPERM)
    assert host.libvirtd.virsh("start", "db1").returncode == 1
    host.clean_up()
    failed = all_events(host, "--event", "start-failed")[-2:]
    assert [(event["error"], event["domid"] is None) for event in failed] == [("XenError", False), ("XenError", True)]
    assert "xc_domain_memory_mapping: EPERM" in failed[0]["message"]
    assert "xc_get_machine_memory_map: EPERM" in failed[1]["message"]
    after = metrics(host)
    assert after["start_failures_total XenError"] == before.get("start_failures_total XenError", 0) + 2
    assert after["starts_total"] == before["starts_total"]


def test_a_qemu_that_is_not_there_is_a_failed_start(host: Host) -> None:
    qemu = host.folder / "qemu"
    qemu.rename(host.folder / "qemu-away")
    try:
        assert host.libvirtd.virsh("start", "db1").returncode == 1
    finally:
        (host.folder / "qemu-away").rename(qemu)
    (failed,) = all_events(host, "--event", "start-failed", "--domain", UUID.format(1))[-1:]
    assert failed["error"] == "ConfigError"
    assert f"cannot run {qemu}" in failed["message"]


def test_nvdimmd_keeps_a_file_for_prometheus(host: Host) -> None:
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    before, file = conf.read_text(), host.folder / "nvdimm.prom"
    conf.write_text(f"{before}[metrics]\ntextfile = {file}\ninterval = 1\n")
    host.libvirtd.end("nvdimmd")
    host.start_nvdimmd()
    try:
        wait_until(lambda: file.exists() and values(file.read_text())["running_domains"] == 0)
        host.libvirtd.check("start", "db1")
        wait_until(lambda: values(file.read_text())["running_domains"] == 1)
    finally:
        conf.write_text(before)
        host.libvirtd.end("nvdimmd")
        host.start_nvdimmd()


# --- on its own ---


def follow(folder: Path, ledger: Ledger, *words: str) -> subprocess.Popen[str]:
    """Return a monitor that has printed its first event."""
    ledger.record_event("undefined", UUID.format(1))
    process = monitor(folder, "--since", "0", *words)
    assert next_id(process) == 1
    return process


def next_id(process: subprocess.Popen[str]) -> int:
    """Return the id of the next event that it prints."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], HANG_SECONDS)[0], "it printed nothing"
    return int(json.loads(process.stdout.readline())["id"])


def test_it_follows_until_it_is_interrupted(tmp_path: Path, ledger: Ledger) -> None:
    process = follow(tmp_path, ledger)
    for number in (2, 3):
        ledger.record_event("undefined", UUID.format(1))
        assert next_id(process) == number
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out, err) == (0, "", "")


def test_it_ends_when_nobody_reads(tmp_path: Path, ledger: Ledger) -> None:
    """Even when there is nothing more to print."""
    process = follow(tmp_path, ledger)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(HANG_SECONDS) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_without_since_it_begins_now(tmp_path: Path, ledger: Ledger) -> None:
    ledger.record_event("undefined", UUID.format(1))
    process = monitor(tmp_path, "--timeout", "1")
    deadline = time.monotonic() + HANG_SECONDS
    while process.poll() is None:
        assert time.monotonic() < deadline
        ledger.record_event("forgotten", UUID.format(1))
        time.sleep(0.05)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert {event["event"] for event in events(out)} == {"forgotten"}


@pytest.mark.parametrize("words", [["--since", "-1"], ["--since", "x"], ["--event", "lunch"], ["--timeout", "x"]])
def test_bad_usage(tmp_path: Path, ledger: Ledger, words: list[str]) -> None:
    process = monitor(tmp_path, *words)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2
    assert words[0] in err


def test_metrics_that_cannot_be_written(host: Host) -> None:
    done = host.nvdimmctl("metrics", "-o", "/nonexistent/nvdimm.prom")
    assert done.returncode == 1
    assert done.stderr == "nvdimmctl: cannot write /nonexistent/nvdimm.prom: No such file or directory\n"


def test_metrics_in_a_file_are_those_that_are_printed(host: Host) -> None:
    done = host.nvdimmctl("metrics")
    assert (done.returncode, done.stderr) == (0, "")
    assert values(done.stdout) == metrics(host)
