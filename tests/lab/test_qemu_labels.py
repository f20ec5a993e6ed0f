# SPDX-License-Identifier: Apache-2.0
"""A guest's label server: its privileges, its death, and a hostile guest that cannot misuse it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest

from nvdimm_driver import apparmor
from nvdimm_driver.processes import FIRST_UID
from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost

pytestmark = pytest.mark.lab
MIB, GIB = 1 << 20, 1 << 30
NAME, FILE, DEVICE, DISK = "served", "/mnt/pmem0/served.img", "/dev/pmem1", "/tmp/guest-tools.img"
FILE_MIB, DEVICE_MIB, LABEL_KIB = 18, 34, 128
SERVER = "pgrep -f '[n]vdimm_driver.cmd.label_server'"


@pytest.fixture(scope="module")
def guest(driver_host: XenHost) -> Iterator[Guest]:
    """Yield a guest with labels in a file and in a raw namespace, and with an NVDIMM without labels."""
    driver_host.put(driver_host.images.guest_tools_disk, DISK)
    nvdimms = [
        operator.nvdimm(FILE, FILE_MIB, label_kib=LABEL_KIB),
        operator.nvdimm("/mnt/pmem0/unlabelled.img", 16),
        operator.nvdimm(DEVICE, DEVICE_MIB, label_kib=LABEL_KIB),
    ]
    # a save goes through all frames up to the guest's last one: with the usual gap that takes minutes here
    nvdimms = [
        each.replace(
            "</memory>", f"<address type='dimm' slot='{slot}' base='{5 * GIB + slot * 64 * MIB:#x}'/></memory>"
        )
        for slot, each in enumerate(nvdimms)
    ]
    xml = operator.domain_xml(NAME, nvdimms, ram_mib=256, disk=DISK, dsm="qemu")
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    driver_host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    driver_host.check(f"dd if=/dev/zero of={DEVICE} bs=1M count={DEVICE_MIB} oflag=direct status=none")
    driver_host.check("dmesg --clear")
    started = operator.start(driver_host, NAME)
    started.wait_report()
    yield started
    if started.exists():
        driver_host.check(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {FILE} /mnt/pmem0/unlabelled.img {DISK}")


def processes(host: XenHost) -> list[int]:
    """Return the pids of the label server's processes: the watcher and the server."""
    return [int(pid) for pid in host.run(SERVER).stdout.split()]


def wait_for_their_end(host: XenHost) -> None:
    """Wait until no label server runs; it polls for its domain twice a second."""
    host.check(f"for try in $(seq 3000); do {SERVER} >/dev/null || exit 0; sleep 0.1; done; exit 1")


def label_sums(host: XenHost) -> list[str]:
    """Return the SHA-256 of each label area in dom0."""
    label = LABEL_KIB << 10
    return [
        operator.host_sha256(host, path, size * MIB - label, label)
        for path, size in ((FILE, FILE_MIB), (DEVICE, DEVICE_MIB))
    ]


def seen_sums(guest: Guest) -> list[str]:
    """Return the SHA-256 of each label area as the guest reads it, by slot."""
    dimms = sorted(guest.report().dimms, key=lambda dimm: dimm.handle)
    assert [dimm.handle for dimm in dimms] == [1, 2, 3]
    read = "ndctl read-labels {} 2>/dev/null | sha256sum"
    commands = [read.format(dimms[slot].name) for slot in (0, 2)]
    return [line.split()[0] for line in guest.check("run", "; ".join(commands)).split("\n")]


def data_sums(host: XenHost) -> list[str]:
    """Return the SHA-256 of each backing without its last MiB, where the label area is."""
    ends = ((FILE, FILE_MIB), (DEVICE, DEVICE_MIB))
    return [operator.host_sha256(host, path, 0, (size - 1) * MIB) for path, size in ends]


def test_labels_in_a_file_and_in_a_raw_namespace(driver_host: XenHost, guest: Guest) -> None:
    assert guest.report().problems == ()
    data = data_sums(driver_host)
    guest.check("run", "ndctl disable-region all && ndctl init-labels all; ndctl enable-region all")
    assert [dimm.available_slots is not None for dimm in guest.report().dimms].count(True) == 2
    assert seen_sums(guest) == label_sums(driver_host)
    assert data_sums(driver_host) == data


def test_apparmor_confines_all_and_has_denied_nothing(driver_host: XenHost, guest: Guest) -> None:
    assert guest.exists()
    watching, serving = processes(driver_host)
    qemu = driver_host.check(f"pgrep -P {serving}").stdout.strip()
    expected = {
        "$(pidof libvirtd)": "libvirtd",
        f"$(cat {operator.NVDIMMD_PID})": apparmor.NVDIMMD,
        str(watching): apparmor.DEVICE_MODEL,
        str(serving): apparmor.LABEL_SERVER,
        qemu: apparmor.LABEL_SERVER,
    }
    found = {pid: operator.confinement(driver_host, pid) for pid in expected}
    assert found == {pid: f"{profile} (enforce)" for pid, profile in expected.items()}
    assert operator.apparmor_denials(driver_host) == ""


def test_the_one_that_serves_can_do_nothing_else(driver_host: XenHost, guest: Guest) -> None:
    watching, serving = processes(driver_host)
    status = driver_host.check(f"cat /proc/{serving}/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert (fields["PPid"], fields["NoNewPrivs"], fields["Groups"].strip()) == (str(watching), "1", "")
    domid = driver_host.check(f"{operator.VIRSH} domid {NAME}").stdout.strip()
    assert set(fields["Uid"].split()) == {str(FIRST_UID + int(domid))}
    assert {int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
    qemu = driver_host.check(f"pgrep -P {serving}").stdout.strip()
    assert f"\nUid:\t{FIRST_UID + int(domid)}\t" in driver_host.check(f"cat /proc/{qemu}/status").stdout
    for pid, user in itertools.product((serving, qemu), ("nobody", FIRST_UID + int(domid), FIRST_UID + 999)):
        there = f"setpriv --reuid {user} --clear-groups ls /proc/{pid}/fd /proc/{pid}/root"
        assert driver_host.run(there).returncode, "nobody looks into it, not even the same user"
    root = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "usr"}
    for pid in (serving, qemu):
        assert set(driver_host.check(f"ls /proc/{pid}/root").stdout.split()) <= root
    assert "label-size" in driver_host.check(f"tr '\\0' ' ' </proc/{qemu}/cmdline").stdout
    opened = driver_host.check(f"ls -l /proc/{qemu}/fd").stdout
    assert "/mnt/pmem0" not in opened
    assert "/dev/pmem" not in opened
    assert driver_host.check(f"readlink /proc/{watching}/fd/0 /proc/{watching}/cwd").stdout.split() == [
        "/dev/null",
        "/",
    ]
    assert operator.show(driver_host, NAME)["label_server"] == "running"


def test_a_label_is_flushed_before_the_guest_gets_its_answer(driver_host: XenHost, guest: Guest) -> None:
    """For the file, the kernel writes back dom0's caches; the label on the device is in no cache."""
    operator.trace(driver_host, "fs_dax/dax_writeback_one")
    (dimm,) = (dimm.name for dimm in guest.report().dimms if dimm.handle == 1)
    change = f"ndctl zero-labels {dimm} && ndctl init-labels {dimm}"
    guest.check("run", f"ndctl disable-region all && {change} && ndctl enable-region all")
    seen = operator.traced(driver_host, "fs_dax/dax_writeback_one")
    inode = driver_host.check(f"stat -c %i {FILE}").stdout.strip()
    assert f"ino {int(inode):#x}" in seen, seen


@pytest.mark.parametrize(
    "victims", ["serving", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("qemu", "both"))]
)
def test_killed_it_is_replaced_and_the_guest_goes_on(driver_host: XenHost, guest: Guest, victims: str) -> None:
    before = processes(driver_host)
    watching, serving = before
    if victims == "qemu":
        driver_host.check(f"pkill -KILL -P {serving}")
    elif victims == "serving":
        driver_host.check(f"kill -KILL {serving}")
    else:
        driver_host.check(f"kill -KILL {watching} {serving}")
        assert operator.show(driver_host, NAME)["label_server"] == "running"
    assert seen_sums(guest) == label_sums(driver_host)
    after = processes(driver_host)
    assert len(after) == 2
    assert (after == before) is (victims == "qemu")


def test_a_hostile_guest_does_no_harm(driver_host: XenHost, guest: Guest) -> None:
    data, others = data_sums(driver_host), driver_host.check("ls -l --time-style=+ /mnt/pmem0").stdout
    before = processes(driver_host)
    qemu = driver_host.check(f"pgrep -P {before[1]}").stdout
    memory = f"grep VmRSS /proc/{before[1]}/status"
    guest.check("run", "hostile 200 1")
    size = int(driver_host.check(memory).stdout.split()[1])
    print(guest.check("run", "time hostile 2000 2", timeout=600))
    assert processes(driver_host) == before
    assert driver_host.check(f"pgrep -P {before[1]}").stdout == qemu
    assert data_sums(driver_host) == data
    assert driver_host.check("ls -l --time-style=+ /mnt/pmem0").stdout == others
    assert int(driver_host.check(memory).stdout.split()[1]) < size + 2048
    assert seen_sums(guest) == label_sums(driver_host)


@pytest.mark.thorough
def test_a_restored_guest_has_a_label_server(driver_host: XenHost, guest: Guest) -> None:
    before, seen = processes(driver_host), seen_sums(guest)
    driver_host.check(f"{operator.VIRSH} save {NAME} /tmp/{NAME}.save")
    wait_for_their_end(driver_host)
    driver_host.check(f"{operator.VIRSH} restore /tmp/{NAME}.save && rm /tmp/{NAME}.save")
    assert len(processes(driver_host)) == 2
    assert not set(before) & set(processes(driver_host))
    assert seen_sums(guest) == seen == label_sums(driver_host)


@pytest.mark.thorough
def test_it_comes_with_the_next_boot(driver_host: XenHost, guest: Guest) -> None:
    before = processes(driver_host)
    guest.reboot()
    after = processes(driver_host)
    assert len(after) == 2
    assert not set(before) & set(after)
    assert seen_sums(guest) == label_sums(driver_host)


@pytest.mark.thorough
def test_an_upgrade_renews_the_label_server(driver_host: XenHost, guest: Guest) -> None:
    """One that runs the code of before could not start another process when one of its own dies."""
    before, seen = processes(driver_host), seen_sums(guest)
    assert "label server" not in driver_host.check(f"{operator.NVDIMMCTL} register").stdout
    assert processes(driver_host) == before
    operator.install_package(driver_host)
    _, serving = processes(driver_host)
    assert set(before).isdisjoint(processes(driver_host))
    assert seen_sums(guest) == seen == label_sums(driver_host)
    driver_host.check(f"kill -KILL {serving}")
    assert seen_sums(guest) == seen


def test_it_goes_with_its_domain(driver_host: XenHost, guest: Guest) -> None:
    assert guest.exists()
    driver_host.check(f"{operator.VIRSH} destroy {NAME}")
    wait_for_their_end(driver_host)
    assert "(null)" not in driver_host.check("xl list").stdout
    listed = json.loads(driver_host.check(f"{operator.NVDIMMCTL} list -f json").stdout)
    assert {row["State"] for row in listed if row["Domain"] == NAME} == {"free"}
    assert "i" not in driver_host.check(f"lsattr {FILE}").stdout.split()[0]
