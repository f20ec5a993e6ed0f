# SPDX-License-Identifier: Apache-2.0
"""nvdimmctl doctor on a real Xen host: a healthy one, and one on which something is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost

pytestmark = pytest.mark.lab
NAME, FILE = "doctor", "/mnt/pmem0/doctor.img"
HOOK = "/etc/libvirt/hooks/libxl.d/50-nvdimm"
NOTES = {"mmio-relax", "namespace0.0, power loss", "namespace1.0, power loss", "ACPI table type"}
NOTES |= {"access", "nvdimmd, boot"}
"""PV without the option; an emulated NVDIMM whose platform says nothing; libvirt's way; its defaults; no systemd."""
HAS_DAX = "from nvdimm_driver.doctor.dax import has_dax; print(has_dax('/mnt/pmem0'), has_dax('/root'))"


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the host with a domain and the driver, registered, with libvirtd restarted as the documentation says."""
    driver_host.check(f"{operator.NVDIMMCTL} register")
    operator.restart_libvirtd(driver_host)
    operator.define(driver_host, NAME, [operator.nvdimm(FILE, 16)])
    yield driver_host
    if Guest(driver_host, NAME).exists():
        driver_host.check(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm -f {FILE}")


def doctor(xen: XenHost, status: int) -> dict[str, dict[str, str]]:
    """Run doctor, which must end with that status; return its rows by check."""
    done = xen.run(f"{operator.NVDIMMCTL} doctor -f json")
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    return {row["Check"]: row for row in json.loads(done.stdout)}


def having(found: dict[str, dict[str, str]], result: str) -> set[str]:
    """Return the names of the checks with that result."""
    return {name for name, row in found.items() if row["Result"] == result}


def test_a_healthy_host_while_a_guest_runs(xen: XenHost) -> None:
    operator.start(xen, NAME)
    found = doctor(xen, 0)
    listed = json.loads(xen.check(f"{operator.NVDIMMCTL} list -f json").stdout)
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    assert having(found, "FAIL") == set()
    assert having(found, "WARN") == {"memory type"}
    assert having(found, "NOTE") == NOTES | {"cache"}
    assert found["cache"]["Message"] == f"uncached: {NAME}"
    assert {"HAP", "toolstack library", "pool main, DAX", "pool main, file system", "pool device"} <= having(
        found, "PASS"
    )
    assert found["Xen"]["Message"] == f"version {xen.images.release.xen}"
    assert found["dom0"]["Message"] == "PV"
    assert found["namespace0.0"]["Message"].startswith("pmem0, fsdax")
    assert found["ledger, backings"]["Message"].startswith(f"{len(listed)} NVDIMMs")
    assert found["ledger, Xen"]["Message"] == "1 domains run, according to both"


def test_lines_for_people(xen: XenHost) -> None:
    lines = xen.check(f"{operator.NVDIMMCTL} doctor").stdout.splitlines()
    assert lines[1].split() == ["Xen", "PASS", "version", xen.images.release.xen]
    assert any(line.split()[:3] == ["memory", "type", "WARN"] for line in lines)


def test_dax_is_not_there_for_the_asking(xen: XenHost) -> None:
    assert xen.check(f'python3 -c "{HAS_DAX}"').stdout.split() == ["True", "False"]


def test_what_is_taken_away_is_missed(xen: XenHost) -> None:
    """The hook, nvdimmd and the QEMU for the tables are missing, and a backing was replaced by another file."""
    conf = "/etc/nvdimm-driver/nvdimm-driver.conf.d/doctor.conf"
    xen.check(f"mv {HOOK} /root/hook && mv {FILE} /mnt/pmem0/doctor.away && cp /mnt/pmem0/doctor.away {FILE}")
    xen.write(conf, b"[acpi]\nqemu = /bin/false\n")
    operator.stop_nvdimmd(xen)
    found = doctor(xen, 1)
    xen.check(f"mv /root/hook {HOOK} && mv /mnt/pmem0/doctor.away {FILE} && rm {conf}")
    operator.start_nvdimmd(xen)
    assert having(found, "FAIL") == {"hook", "hook, libvirt", "nvdimmd", "ledger, backings", "ACPI tables"}
    assert "nvdimmctl register" in found["hook"]["Hint"]
    assert NAME in found["ledger, backings"]["Message"]


def test_a_hook_that_libvirtd_has_not_seen(xen: XenHost) -> None:
    xen.check(f"rm {HOOK} && {operator.NVDIMMCTL} register")
    assert having(doctor(xen, 0), "WARN") == {"memory type", "hook, libvirt"}
    operator.restart_libvirtd(xen)
    assert having(doctor(xen, 0), "WARN") == {"memory type"}
