# SPDX-License-Identifier: Apache-2.0
"""Debian's own systemd in dom0: what 'nvdimmctl register' sets up there, and what remains after a power cut.

These tests use the tutorial's host, and remove the driver from it in the end. They use XFS and device-dax, where other
tests use ext4 and a raw namespace. The domain's label server still runs after all of that.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest

from nvdimm_driver.apparmor import NVDIMMD
from tests.lab import operator, tutorial
from tests.lab.guest import Guest
from tests.lab.host import XenHost

pytestmark = pytest.mark.lab
MIB = 1 << 20
NVDIMMS = (("/mnt/xfs/db2.img", 48), ("/dev/dax1.0", 32))
LABEL_MIB = 2
COPY, LIBPMEM = "/root/copy.img", Path("/usr/lib/x86_64-linux-gnu/libpmem.so.1")
SOCKETS = "/run/libvirt/virtxend-sock /run/libvirt/virtxend-sock-ro"
HOOK = "/etc/libvirt/hooks/libxl.d/50-nvdimm"
WRITTEN = f"ls {HOOK} /usr/libexec/xen/bin/nvdimm-device-model /etc/systemd/system/nvdimmd*"
# Prints the errno of each system call that should make stores to a device-dax device durable.
SYNC_DEVDAX = """\
import mmap, os
fd = os.open("/dev/dax1.0", os.O_RDWR)
with mmap.mmap(fd, 2 << 20) as memory:
    memory[0] = 1
    for sync in (lambda: os.fsync(fd), memory.flush):
        try:
            sync()
        except OSError as error:
            print(error.errno)
"""
# Debian 12 has no modular daemons: this one takes virtxend's place and forwards everything to libvirtd.
VIRTXEND = """\
for mode in '' -ro; do
cat >/etc/systemd/system/virtxend$mode.socket <<END
[Socket]
ListenStream=/run/libvirt/virtxend-sock$mode
SocketMode=0666
RemoveOnStop=yes
Service=virtxend.service
[Install]
WantedBy=sockets.target
END
done
cat >/etc/systemd/system/virtxend.service <<END
[Service]
ExecStart=/lib/systemd/systemd-socket-proxyd /run/libvirt/libvirt-sock
END
systemctl daemon-reload
systemctl enable --now virtxend.socket virtxend-ro.socket
"""


@pytest.fixture(scope="module")
def xen(systemd_host: XenHost) -> XenHost:
    """Return the tutorial's host, with a DAX file system mounted at boot and a domain started at boot."""
    host = systemd_host
    if host.run("command -v nvdimmctl").returncode:
        tutorial.prepare(host)
        for title in ("Install", "Make a pool", "Is all well?"):
            tutorial.walk(host, title)
    host.check("nvdimmctl pool create xfs --namespace namespace2.0 --force --file-system xfs")
    host.check("nvdimmctl pool create device --namespace namespace1.0 --force --kind devdax")
    (file, file_mib), device = NVDIMMS
    nvdimms = [operator.nvdimm(file, file_mib + LABEL_MIB, label_kib=LABEL_MIB << 10), operator.nvdimm(*device)]
    xml = operator.domain_xml("db2", nvdimms, ram_mib=256, disk=tutorial.DISK, dsm="qemu")
    host.write("/root/db2.xml", xml.encode())
    return host


def virsh(xen: XenHost, command: str) -> str:
    """Run a virsh command that has to succeed; return its output."""
    return xen.check(f"{operator.VIRSH} {command}").stdout.strip()


def logged(xen: XenHost, unit: str) -> str:
    """Return the journal of a unit."""
    return xen.check(f"journalctl -u {unit} --no-pager").stdout


@pytest.mark.thorough
def test_device_dax_is_wiped_with_libpmem(xen: XenHost) -> None:
    xen.write("/root/sync.py", SYNC_DEVDAX.encode())
    assert xen.check("python3 /root/sync.py").stdout.split() == ["22", "22"], "EINVAL: neither fsync nor msync"
    aside = f"{LIBPMEM}.aside"
    has_it = xen.run(f"mv {LIBPMEM} {aside}").returncode == 0  # QEMU of Debian 13 depends on it
    assert "install it (Debian: libpmem1)" in xen.run(f"{operator.NVDIMMCTL} wipe -y /dev/dax1.0").stderr
    if has_it:
        xen.check(f"mv {aside} {LIBPMEM}")
    else:
        xen.put(LIBPMEM, str(LIBPMEM))
    size = int(xen.check("cat /sys/bus/dax/devices/dax1.0/size").stdout)
    filled = xen.check(f"{operator.NVDIMMCTL} export /dev/dax1.0 {COPY}").stdout.split()[0]
    xen.check(f"{operator.NVDIMMCTL} wipe -y /dev/dax1.0")
    assert operator.host_sha256(xen, "/dev/dax1.0", 0, size) == sha256(bytes(size)).hexdigest()
    xen.check(f"{operator.NVDIMMCTL} import {COPY} --pool device --name dax1.0 --force && rm {COPY}")
    assert operator.host_sha256(xen, "/dev/dax1.0", 0, size) == filled


def test_plain_virsh_goes_through_nvdimmd(xen: XenHost) -> None:
    virsh(xen, "define /root/db2.xml")
    assert "model='nvdimm'" in virsh(xen, "dumpxml db2")
    assert xen.check("systemctl is-active nvdimmd.service").stdout.strip() == "active"
    assert re.search(r"event=provisioning domain=db2 .* written=\d+", logged(xen, "nvdimmd"))
    xen.check("echo 'uri_default = \"xen:///system\"' >>/etc/libvirt/libvirt.conf")
    assert "model='nvdimm'" in xen.check("virsh dumpxml db2").stdout
    virsh(xen, "autostart db2")
    guest = Guest(xen, "db2")
    virsh(xen, "start db2")
    assert sorted(disk.size for disk in guest.wait_report().disks) == [32 * MIB, 48 * MIB]
    assert virsh(xen, "-r domstate db2") == "running"


@pytest.mark.thorough
def test_a_guest_is_restored_from_a_file(xen: XenHost) -> None:
    """libvirtd gets a path that leads through nvdimmd's descriptor, whatever nvdimmd is confined to."""
    image = "/tmp/db2.save"
    virsh(xen, f"save db2 {image}")
    assert operator.show(xen, "db2")["state"] == "off"
    virsh(xen, f"restore {image}")
    assert len(Guest(xen, "db2").report().disks) == len(NVDIMMS)
    xen.check(f"rm {image}")


@pytest.mark.thorough
def test_labels_are_written_to_a_frozen_file(xen: XenHost) -> None:
    """On XFS. The labels are zeroed in the end: with labels and no namespaces, the guest would have no disk."""
    (path, mib), _ = NVDIMMS
    guest = Guest(xen, "db2")
    (dimm,) = (dimm.name for dimm in guest.report().dimms if dimm.handle == 1)
    before = operator.host_sha256(xen, path, mib * MIB, LABEL_MIB * MIB)
    assert "i" in xen.check(f"lsattr {path}").stdout.split()[0]
    guest.check("run", f"ndctl disable-region all && ndctl init-labels {dimm}")
    seen = guest.check("run", f"ndctl read-labels {dimm} 2>/dev/null | sha256sum").split()[0]
    assert seen == operator.host_sha256(xen, path, mib * MIB, LABEL_MIB * MIB) != before
    guest.check("run", f"ndctl zero-labels {dimm}")
    assert operator.host_sha256(xen, path, mib * MIB, LABEL_MIB * MIB) == before
    assert len(guest.reboot().disks) == len(NVDIMMS)


def test_nvdimmd_can_do_no_more_than_it_needs(xen: XenHost) -> None:
    status = xen.check("cat /proc/$(systemctl show -P MainPID nvdimmd)/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["CapBnd"], 16) == int(fields["CapEff"], 16)
    everything = int(xen.check("grep CapBnd /proc/1/status").stdout.split()[1], 16)
    for number in (1 << 12, 1 << 16, 1 << 19, 1 << 22):  # NET_ADMIN, SYS_MODULE, SYS_PTRACE, SYS_BOOT
        assert everything & number
        assert not int(fields["CapEff"], 16) & number


@pytest.mark.parametrize(("service", "profile"), [("libvirtd", "libvirtd"), ("nvdimmd", NVDIMMD)])
def test_apparmor_confines_the_services(xen: XenHost, service: str, profile: str) -> None:
    """With Debian's own profile of libvirtd, and what the package and 'register' add: nothing is done by hand."""
    label = xen.check(f"tr -d '\\0' </proc/$(systemctl show -P MainPID {service})/attr/current").stdout.strip()
    assert label == f"{profile} (enforce)"


def test_a_killed_nvdimmd_is_there_again(xen: XenHost) -> None:
    before = xen.check("systemctl show -P MainPID nvdimmd").stdout
    xen.check("systemctl kill --signal KILL nvdimmd")
    assert virsh(xen, "domstate db2") == "running"
    assert xen.check("systemctl show -P MainPID nvdimmd").stdout != before


@pytest.mark.thorough
def test_without_nvdimmd_clients_talk_to_libvirtd(xen: XenHost) -> None:
    xen.check("systemctl stop nvdimmd.socket nvdimmd-ro.socket nvdimmd.service")
    assert xen.run(f"ls {SOCKETS}").stdout == ""
    assert "nvdimm-device-model" in virsh(xen, "dumpxml db2")
    xen.check("systemctl start nvdimmd.socket nvdimmd-ro.socket")
    assert "model='nvdimm'" in virsh(xen, "dumpxml db2")


@pytest.mark.thorough
def test_a_guest_is_started_at_boot_with_nobody_connected(xen: XenHost) -> None:
    """After a power cut, with the bytes that the guest wrote before."""
    guest = Guest(xen, "db2")
    before = operator.disks(guest.report())
    for seed, disk in enumerate(before):
        guest.write(disk, seed * MIB, 8 * MIB, seed)
    seen = [guest.sha256(disk, 0, 16 * MIB) for disk in before]
    xen.check("sync")

    def lose_power() -> None:
        xen.power_cut()
        xen.start()

    report = guest.next_boot(lose_power, timeout=400)
    assert report.problems == ()
    assert sorted((dimm.handle, bool(dimm.available_slots)) for dimm in report.dimms) == [(1, True), (2, False)]
    holder = xen.check("pgrep -x nvdimm-holder").stdout
    xen.check("systemctl restart libvirtd")
    assert xen.check("pgrep -x nvdimm-holder").stdout == holder
    assert operator.show(xen, "db2")["label_server"] == "running"
    assert xen.run("systemctl is-active nvdimmd.service").stdout.strip() == "inactive"
    assert [guest.sha256(disk, 0, 16 * MIB) for disk in operator.disks(report)] == seen
    assert [operator.host_sha256(xen, path, 0, 16 * MIB) for path, _ in NVDIMMS] == seen
    guest.poweroff()


@pytest.mark.thorough
def test_bad_blocks_are_told_and_warned_of(xen: XenHost) -> None:
    """The kernel is told of bad blocks 1 MiB into the file."""
    plan = json.loads(xen.check(f"{operator.NVDIMMCTL} plan --json /root/db2.xml").stdout)
    namespaces = json.loads(xen.check(f"{operator.NVDIMMCTL} host").stdout)["namespaces"]
    (start,) = (each["data_spa"] for each in namespaces if each["device"] == "pmem2")
    sector = (plan["locations"][0]["extents"][0]["spa"] + MIB - start) // 512
    xen.check(f"echo '{sector} 8' >/sys/block/pmem2/badblocks")
    printed = xen.check(f"{operator.NVDIMMCTL} plan /root/db2.xml").stdout
    assert "warning: bad blocks at offset 0x100000, 4 KiB" in printed
    first, second = operator.show(xen, "db2")["nvdimms"]
    assert (first["bad_blocks"], first["problem"]) == ([{"offset": MIB, "length": 4096}], None)
    assert (second["bad_blocks"], second["problem"]) == ([], None)
    virsh(xen, "start db2")
    assert "db2.img bytes=4096 first=0x100000" in xen.get(operator.LOG).decode()


@pytest.mark.thorough
def test_a_holder_outlives_the_unit_that_has_started_it(xen: XenHost) -> None:
    """systemd kills what the processes of a unit, such as that of a timer, have left."""
    xen.check("pkill -KILL -x nvdimm-holder")
    shown = xen.check(f"systemd-run --quiet --wait --pipe $(command -v {operator.NVDIMMCTL}) show db2 -c holder").stdout
    assert "running" in shown
    (holder,) = xen.check("pgrep -x nvdimm-holder").stdout.split()
    assert "/nvdimm-driver" in xen.check(f"cat /proc/{holder}/cgroup").stdout


@pytest.mark.thorough
def test_the_package_is_not_removed_under_a_running_domain(xen: XenHost) -> None:
    assert Guest(xen, "db2").exists()
    assert "db2 (shut them down first)" in xen.run("dpkg --remove nvdimm-driver").stderr
    assert "model='nvdimm'" in virsh(xen, "dumpxml db2")
    virsh(xen, "destroy db2")


@pytest.mark.thorough
def test_an_upgrade_restarts_nvdimmd_and_keeps_the_ledger(xen: XenHost) -> None:
    before = xen.check("systemctl show -P MainPID nvdimmd").stdout
    assert before != "0\n"
    shown = operator.show(xen, "db2")
    operator.install_package(xen)
    assert xen.check("systemctl show -P MainPID nvdimmd").stdout not in (before, "0\n")
    assert operator.show(xen, "db2") == shown


@pytest.mark.thorough
def test_unregister_puts_everything_back(xen: XenHost) -> None:
    assert xen.run(WRITTEN).stdout.split() == WRITTEN.split()[1:3], "the units are the package's"
    said = xen.check(f"{operator.NVDIMMCTL} unregister").stdout
    assert f"kept {NVDIMMS[0][0]}, of domain db2" in said
    assert xen.run(WRITTEN).stdout == ""
    assert xen.run(f"ls {SOCKETS}").stdout == ""
    for unit in ("nvdimmd.service", "nvdimmd.socket", "nvdimmd-ro.socket"):
        assert xen.run(f"systemctl is-active {unit}").stdout.strip() == "inactive"
        assert xen.run(f"systemctl is-enabled {unit}").stdout.strip() in ("disabled", "static")
    assert "nvdimm-device-model" in virsh(xen, "dumpxml db2")
    assert xen.run("systemctl list-units --failed --plain --no-legend 'nvdimm*'").stdout == ""


@pytest.mark.thorough
def test_the_socket_of_a_modular_daemon_is_moved_and_brought_back(xen: XenHost) -> None:
    xen.check(VIRTXEND)
    assert "nvdimm-device-model" in virsh(xen, "dumpxml db2")
    said = xen.check(f"{operator.NVDIMMCTL} register").stdout
    assert "installed /etc/systemd/system/virtxend.socket.d/nvdimmd.conf" in said
    assert "installed /etc/systemd/system/nvdimmd.service" in said, "the package's is for libvirtd"
    assert "model='nvdimm'" in virsh(xen, "dumpxml db2")
    assert "model='nvdimm'" in virsh(xen, "-r dumpxml db2")
    assert xen.check("systemctl is-active virtxend.service").stdout.strip() == "active"
    xen.check(f"{operator.NVDIMMCTL} unregister")
    assert xen.run("ls /run/libvirt/virtxend-direct-sock*").stdout == ""
    xen.check(f"ls {SOCKETS}")
    assert "nvdimm-device-model" in virsh(xen, "dumpxml db2")


@pytest.mark.thorough
def test_purge_leaves_the_data_and_libvirtd(xen: XenHost) -> None:
    before = operator.host_sha256(xen, NVDIMMS[0][0], 0, MIB)
    files = xen.check("ls /mnt/main").stdout
    xen.check(f"test -e {HOOK} || {operator.NVDIMMCTL} register")
    said = tutorial.walk(xen, "Remove the driver")
    for line in (f"kept {NVDIMMS[0][0]}, of domain db2", "nvdimm-driver: kept /var/lib/nvdimm-driver", files):
        assert line in said
    assert operator.host_sha256(xen, NVDIMMS[0][0], 0, MIB) == before
    assert "not be found" in xen.run("systemctl status nvdimmd.service nvdimmd.socket").stderr
    left = "-name '*nvdimmd*' -o -name '*nvdimm-d*' -o -name nvdimmctl -o -name 50-nvdimm"
    assert xen.run(f"find /etc /usr /lib/systemd {left}").stdout == ""
    xen.check("ls /var/lib/nvdimm-driver/ledger.sqlite")
    assert "nvdimm-device-model" in virsh(xen, "dumpxml db2")
