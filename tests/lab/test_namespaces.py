# SPDX-License-Identifier: Apache-2.0
"""Labels: namespaces that a guest makes with ndctl outlive a reboot, and are in the file where QEMU expects them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.lab import operator
from tests.lab.guest import Conversation, Guest
from tests.lab.host import XenHost
from tests.lab.plain import plain_guest

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
MIB = 1 << 20
NAME, FILE = "labelled", "/mnt/pmem0/labelled.img"
CONF = "/etc/nvdimm-driver/nvdimm-driver.conf"
# ndctl refuses a namespace that does not start at a multiple of 16 MiB, so the data size is such a multiple.
SIZE_MIB, LABEL_BYTES, ALIGN_MIB = 98, 128 << 10, 16
DATA_BYTES, GROWTH_MIB = 96 * MIB, 64
DISK = "/tmp/guest-tools.img"
# the output of 'seq 100000' and 'seq 5000'
LINES, SECTORS = ("".join(f"{number}\n" for number in range(1, last + 1)).encode() for last in (100_000, 5_000))


@pytest.fixture(scope="module", params=["aml", "qemu"])
def guest(driver_host: XenHost, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """Yield a guest with ndctl and an NVDIMM with an empty label area."""
    builder = {"aml": "native", "qemu": "qemu"}[request.param]
    driver_host.write(CONF, f"[acpi]\nbuilder = {builder}\n".encode())
    driver_host.put(driver_host.images.guest_tools_disk, DISK)
    nvdimm = operator.nvdimm(FILE, SIZE_MIB, label_kib=LABEL_BYTES >> 10)
    nvdimm = nvdimm.replace("</source>", f"<alignsize unit='MiB'>{ALIGN_MIB}</alignsize></source>")
    xml = operator.domain_xml(NAME, [nvdimm], ram_mib=256, disk=DISK, dsm=request.param)
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    driver_host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    started = operator.start(driver_host, NAME)
    yield started
    if started.exists():
        driver_host.check(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {CONF} {FILE} {DISK}")


def listed(guest: Conversation) -> list[dict[str, Any]]:
    """Return the guest's namespaces as ndctl lists them."""
    found = json.loads(guest.check("run", "ndctl list -N") or "[]")
    return found if isinstance(found, list) else [found]


def namespaces(guest: Conversation) -> dict[str, tuple[str, int, str]]:
    """Return uuid, size and block device of the guest's namespaces, by mode."""
    return {each["mode"]: (each["uuid"], each["size"], f"/dev/{each['blockdev']}") for each in listed(guest)}


def same_labels(host: XenHost, guest: Guest, size_mib: int = SIZE_MIB) -> bool:
    """Return True if the label area that the guest reads is the end of the file."""
    seen = guest.check("run", "ndctl read-labels nmem0 -o /tmp/labels 2>/dev/null && sha256sum </tmp/labels")
    return seen.split()[0] == operator.host_sha256(host, FILE, size_mib * MIB - LABEL_BYTES, LABEL_BYTES)


def contents(guest: Conversation, fsdax: str, sector: str) -> list[str]:
    """Return the SHA-256 of the file and of the written sectors; the file system stays mounted."""
    sums = guest.check(
        "run",
        f"mkdir -p /mnt && mount -t ext4 -o dax {fsdax} /mnt && sha256sum </mnt/file && "
        f"dd if={sector} bs={len(SECTORS)} count=1 2>/dev/null | sha256sum",
    )
    return [line.split()[0] for line in sums.split("\n")]


def test_namespaces_last(driver_host: XenHost, guest: Guest) -> None:
    report = guest.wait_report()
    assert report.problems == ()
    assert (report.regions[0].size, len(report.dimms)) == (DATA_BYTES, 1)
    guest.check("run", "ndctl disable-region region0 && ndctl init-labels nmem0 && ndctl enable-region region0")
    guest.check("run", "ndctl create-namespace -m fsdax --map=mem -s 48M", timeout=300)
    guest.check("run", "ndctl create-namespace -m sector -s 32M", timeout=300)
    made = namespaces(guest)
    assert sorted(made) == ["fsdax", "sector"]
    assert same_labels(driver_host, guest)
    fsdax, sector = made["fsdax"][2], made["sector"][2]
    guest.check(
        "run",
        f"mkdir /mnt && mkfs.ext4 -q -b 4096 {fsdax} && mount -t ext4 -o dax {fsdax} /mnt && "
        f"seq 100000 >/mnt/file && umount /mnt && seq 5000 | dd of={sector} conv=fsync 2>/dev/null",
        timeout=300,
    )
    again = guest.reboot()
    assert again.problems == ()
    assert namespaces(guest) == made
    assert same_labels(driver_host, guest)
    assert contents(guest, fsdax, sector) == [sha256(data).hexdigest() for data in (LINES, SECTORS)]


def test_the_file_goes_to_a_plain_qemu_and_comes_back(driver_host: XenHost, guest: Guest, tmp_path: Path) -> None:
    """Both see the same namespaces, and the lab's guest sees the one that the plain QEMU's guest makes."""
    made = namespaces(guest)
    guest.poweroff()
    moved = tmp_path / "moved.img"
    moved.write_bytes(driver_host.get(FILE))
    with plain_guest(driver_host.images, moved, SIZE_MIB * MIB, LABEL_BYTES, ALIGN_MIB * MIB) as plain:
        assert plain.wait_report().problems == ()
        assert namespaces(plain) == made
        assert contents(plain, made["fsdax"][2], made["sector"][2]) == [
            sha256(data).hexdigest() for data in (LINES, SECTORS)
        ]
        name = next(each["dev"] for each in listed(plain) if each["mode"] == "sector")
        plain.check("run", f"umount /mnt && ndctl destroy-namespace -f {name}")
        plain.check("run", "ndctl create-namespace -m sector -s 32M", timeout=300)
        changed = namespaces(plain)
        plain.check("run", f"seq 5000 | dd of={changed['sector'][2]} conv=fsync 2>/dev/null")
        plain.poweroff()
    assert changed["fsdax"] == made["fsdax"]
    assert changed["sector"] != made["sector"]
    driver_host.put(moved, "/tmp/moved.img")
    driver_host.check(f"dd if=/tmp/moved.img of={FILE} bs=1M conv=notrunc,fsync status=none && rm /tmp/moved.img")
    operator.start(driver_host, NAME)
    assert guest.wait_report(boot=3).problems == ()
    # the kernel numbers block devices in the order of their discovery, so compare uuids and sizes
    seen = namespaces(guest)
    assert {mode: known[:2] for mode, known in seen.items()} == {mode: known[:2] for mode, known in changed.items()}
    assert contents(guest, seen["fsdax"][2], seen["sector"][2]) == [
        sha256(data).hexdigest() for data in (LINES, SECTORS)
    ]


def test_it_grows_and_keeps_its_namespaces(driver_host: XenHost, guest: Guest) -> None:
    before = namespaces(guest)
    guest.poweroff()
    larger = SIZE_MIB + GROWTH_MIB
    driver_host.check(f"{operator.NVDIMMCTL} resize {NAME} {larger}MiB")
    assert driver_host.check(f"stat -c %s {FILE}").stdout.strip() == str(larger * MIB)
    report = guest.next_boot(lambda: operator.start(driver_host, NAME))
    assert report.problems == ()
    assert report.regions[0].size == DATA_BYTES + GROWTH_MIB * MIB
    seen = namespaces(guest)
    assert {mode: known[:2] for mode, known in seen.items()} == {mode: known[:2] for mode, known in before.items()}
    assert contents(guest, seen["fsdax"][2], seen["sector"][2]) == [
        sha256(data).hexdigest() for data in (LINES, SECTORS)
    ]
    guest.check("run", f"ndctl create-namespace -m raw -s {GROWTH_MIB}M", timeout=300)
    assert namespaces(guest)["raw"][1] == GROWTH_MIB * MIB
    assert same_labels(driver_host, guest, larger)
