# SPDX-License-Identifier: Apache-2.0
"""Bytes stay where they were: an NVDIMM keeps its slot when another goes, and a saved guest gets only what it had."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
NAME, FIRST, FILE = "kept", "/mnt/pmem0/kept-first.img", "/mnt/pmem0/kept.img"
SIZE_MIB, LABEL_KIB, ALIGN_MIB = 34, 128, 16
BASE = 5 << 30  # a save goes through all frames up to the guest's last one
DISK = "/tmp/guest-tools.img"
SAVE = f"/tmp/{NAME}.save"


def virsh(host: XenHost, command: str) -> str:
    """Run a virsh command that has to succeed; return its output."""
    return host.check(f"{operator.VIRSH} {command}").stdout


def labelled() -> str:
    """Return an NVDIMM with a label area, whose slot its XML leaves open."""
    nvdimm = operator.nvdimm(FILE, SIZE_MIB, label_kib=LABEL_KIB)
    return nvdimm.replace("</source>", f"<alignsize unit='MiB'>{ALIGN_MIB}</alignsize></source>")


@pytest.fixture(scope="module")
def guest(driver_host: XenHost) -> Iterator[Guest]:
    """Yield a guest with ndctl and two NVDIMMs, the second with a label area."""
    driver_host.put(driver_host.images.guest_tools_disk, DISK)
    nvdimms = [operator.nvdimm(FIRST, 16), labelled()]
    xml = operator.domain_xml(NAME, nvdimms, ram_mib=256, disk=DISK, dsm="aml")
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    virsh(driver_host, f"define /root/{NAME}.xml")
    started = operator.start(driver_host, NAME)
    started.wait_report()
    yield started
    if started.exists():
        virsh(driver_host, f"destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {FIRST} {FILE} {DISK}")


def namespaces(guest: Guest) -> list[tuple[str, str, int]]:
    """Return mode, uuid and size of the guest's namespaces with a uuid, which are those with labels."""
    found = json.loads(guest.check("run", "ndctl list -N") or "[]")
    listed = found if isinstance(found, list) else [found]
    return sorted((each["mode"], each["uuid"], each["size"]) for each in listed if "uuid" in each)


def test_a_labelled_nvdimm_keeps_its_slot(driver_host: XenHost, guest: Guest) -> None:
    number = json.loads(guest.check("run", "ndctl list -R -D -i"))["regions"]
    (region,) = (each["dev"] for each in number if each["size"] == 32 << 20)
    dimm = "nmem1"
    guest.check("run", f"ndctl disable-region {region} && ndctl init-labels {dimm} && ndctl enable-region {region}")
    guest.check("run", f"ndctl create-namespace -r {region} -m fsdax --map=mem", timeout=300)
    made = namespaces(guest)
    assert len(made) == 1
    guest.poweroff()

    driver_host.write("/root/first.xml", operator.nvdimm(FIRST, 16).encode())
    virsh(driver_host, f"detach-device --config {NAME} /root/first.xml")
    shown = virsh(driver_host, f"dumpxml --inactive {NAME}")
    assert "<address type='dimm' slot='1'/>" in shown
    driver_host.write("/root/moved.xml", shown.replace("slot='1'/>", "slot='0'/>").encode())
    planned = driver_host.check(f"{operator.NVDIMMCTL} plan /root/moved.xml").stdout
    assert f"warning: {FILE}: its labels were made in slot 1, and in slot 0 the guest finds none" in planned
    assert "warning:" not in driver_host.check(f"{operator.NVDIMMCTL} plan /root/{NAME}.xml").stdout
    assert FILE not in driver_host.run(f"{operator.NVDIMMCTL} check").stdout
    driver_host.write(
        "/root/other.xml", shown.replace("<size unit='KiB'>128</size>", "<size unit='KiB'>256</size>").encode()
    )
    refused = driver_host.run(f"{operator.VIRSH} define /root/other.xml")
    assert f"{FILE}: its label area, 128 KiB at 0x21e0000, is in use" in refused.stderr
    assert [item["slot"] for item in operator.show(driver_host, NAME)["nvdimms"]] == [1]
    operator.start(driver_host, NAME)
    assert guest.wait_report(boot=2).problems == ()
    assert namespaces(guest) == made
    guest.poweroff()


def test_a_saved_guest_goes_on_only_with_what_it_had(driver_host: XenHost, guest: Guest) -> None:
    """The host writes to the file, which is put back then; and an image that was restored is not good any more."""
    shown = virsh(driver_host, f"dumpxml --inactive {NAME}")
    low = shown.replace("<address type='dimm' slot='1'/>", f"<address type='dimm' slot='1' base='{BASE:#x}'/>")
    driver_host.write(f"/root/{NAME}.xml", low.encode())
    virsh(driver_host, f"define /root/{NAME}.xml")
    operator.start(driver_host, NAME)
    guest.wait_report(boot=3)
    made = namespaces(guest)
    assert len(made) == 1
    virsh(driver_host, f"save {NAME} {SAVE}")
    time = driver_host.check(f"stat -c %y {FILE}").stdout.strip()
    driver_host.check(f"touch {FILE}")
    refused = driver_host.run(f"{operator.VIRSH} restore {SAVE}")
    assert refused.returncode == 1
    assert f"the saved guest cannot go on: {FILE} was written on the host at" in refused.stderr
    assert operator.show(driver_host, NAME)["state"] == "off"
    driver_host.check(f"touch -d '{time}' {FILE}")
    driver_host.check(f"cp {SAVE} {SAVE}.copy")
    virsh(driver_host, f"restore {SAVE}")
    assert namespaces(guest) == made
    virsh(driver_host, f"destroy {NAME}")
    refused = driver_host.run(f"{operator.VIRSH} restore {SAVE}.copy")
    assert "since it was saved, its domain was started" in refused.stderr
    driver_host.check(f"rm -f {SAVE} {SAVE}.copy")
