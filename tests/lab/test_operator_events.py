# SPDX-License-Identifier: Apache-2.0
"""A guest's life as an operator observes it: events, log, metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.lab import operator
from tests.lab.guest import install_guest
from tests.lab.host import XenHost

pytestmark = pytest.mark.lab
MIB, GIB = 1 << 20, 1 << 30
NAME, FILE, SEEN, PID = "watched", "/mnt/pmem0/watched.img", "/tmp/watched.events", "/run/watched.pid"
SIZE_MIB, LABEL_KIB = 18, 128


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the host with a monitor that runs, and a domain with a label server."""
    driver_host.check(
        f"setsid /usr/bin/nvdimmctl monitor --domain {NAME} >{SEEN} 2>&1 </dev/null & echo $! >{PID}; sleep 3"
    )
    install_guest(driver_host)
    xml = operator.domain_xml(NAME, [operator.nvdimm(FILE, SIZE_MIB, label_kib=LABEL_KIB)], dsm="qemu")
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    driver_host.check("rm -rf /var/lib/nvdimm-driver/acpi-cache")  # another test may have had these tables built
    driver_host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    yield driver_host
    operator.remove(driver_host, NAME)
    driver_host.check(f"kill $(cat {PID}); rm -f {FILE} {SEEN} {PID}")


def metrics(xen: XenHost) -> dict[str, float]:
    """Return the values of metrics by name and labels, without the prefix and without uuids."""
    text = xen.check(f"{operator.NVDIMMCTL} metrics -o /tmp/nvdimm.prom && cat /tmp/nvdimm.prom").stdout
    return {
        " ".join(
            [sample.name.removeprefix("nvdimm_driver_"), *(v for k, v in sample.labels.items() if k != "uuid")]
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.thorough
def test_a_guests_life_is_seen_by_all_who_watch(xen: XenHost) -> None:
    before = metrics(xen)
    guest = operator.start(xen, NAME)
    guest.wait_report()
    during = metrics(xen)
    domid = operator.show(xen, NAME)["domid"]
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    xen.check(f"for try in $(seq 1500); do grep -q released {SEEN} && exit; sleep 0.2; done; cat {SEEN}; exit 1")
    after = metrics(xen)

    seen = [json.loads(line) for line in xen.get(SEEN).splitlines()]
    life = ["defined", "prepared", "label-server-started", "started", "released"]
    assert [event["event"] for event in seen] == life
    assert [event["domid"] for event in seen] == [None, None, domid, domid, domid]
    assert seen[0]["bytes"] == SIZE_MIB * MIB
    assert (seen[3]["label_server"], seen[3]["hypercalls"] > 0) == ("yes", True)

    log = [line for line in xen.get(operator.LOG).decode().splitlines() if f"domain={NAME} " in line]
    logged = [line.split("event=")[1].split()[0] for line in log]
    assert [kind for kind in logged if kind in life] == life[1:]
    assert "event=defined" in xen.get("/var/log/nvdimmd.log").decode()

    grown = SIZE_MIB * MIB - LABEL_KIB * 1024
    assert grown <= during["mapped_bytes"] - before["mapped_bytes"] < grown + 2 * MIB
    assert during["running_domains"] == before["running_domains"] + 1
    assert during["starts_total"] == before["starts_total"] + 1
    assert during["map_seconds_count"] == during["starts_total"]
    assert during["map_seconds_sum"] > before["map_seconds_sum"]
    assert during["harvest_seconds_count"] >= 1
    assert during["allocations main mapped"] == before["allocations main mapped"] + 1
    assert during[f"label_requests_total {NAME} answered"] > 5
    assert during[f"label_requests_total {NAME} failed"] == 0
    for name in ("mapped_bytes", "running_domains", "allocations main mapped"):
        assert after[name] == before[name]


@pytest.mark.thorough
def test_a_start_that_fails_is_counted(xen: XenHost) -> None:
    before = metrics(xen)
    xen.check(f"chattr -i {FILE}; mv {FILE} {FILE}.away")
    try:
        assert xen.run(f"{operator.VIRSH} start {NAME}").returncode == 1
    finally:
        xen.check(f"mv {FILE}.away {FILE}")
    (failed,) = xen.check(
        f"{operator.NVDIMMCTL} monitor --no-follow --domain {NAME} --event start-failed"
    ).stdout.splitlines()
    event = json.loads(failed)
    assert (event["error"], FILE in event["message"]) == ("BackingError", True)
    key = "start_failures_total BackingError"
    assert metrics(xen)[key] == before.get(key, 0) + 1
