# SPDX-License-Identifier: Apache-2.0
"""An operator's work on a Xen host, in the lab: install the driver, set up pmem, define and start guests."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tests.lab.guest import GUEST_DISK, Guest, Report, disk_arguments, install_guest
from tests.lab.host import XenHost
from tests.package import build_package

LOG = "/var/log/nvdimm-driver.log"
XEN_NAMESPACE = "xmlns:xen='http://libvirt.org/schemas/domain/xen/1.0'"
NVDIMMCTL = "nvdimmctl"
VIRSH = "virsh -q -c xen:///system"
NVDIMMD_PID = "/run/nvdimmd.pid"
# xen/include/public/xen.h and domctl.h
DOMCTL_HYPERCALL, MEMORY_MAPPING = 36, 39
PRIVCMD_HYPERCALL = 0x305000
"""IOCTL_PRIVCMD_HYPERCALL (include/uapi/xen/privcmd.h)."""
# With this alignment, the file systems allocate whole 2 MiB pieces of the namespace where possible.
MAKE_FILE_SYSTEM = {
    "ext4": "mkfs.ext4 -q -F -b 4096 -E stride=512,stripe_width=512 /dev/pmem0",
    "xfs": "mkfs.xfs -q -f -m reflink=0 -d su=2m,sw=1 -l su=4k /dev/pmem0",
}
MAKE_NAMESPACE = {
    "raw": "ndctl create-namespace -f -e namespace1.0 -m raw",
    "devdax": "ndctl create-namespace -f -e namespace1.0 -m devdax --map=mem",
}
# A device-dax device can be mapped but not read; O_DIRECT bypasses the page cache of a block device.
SHA256_DEVDAX = """\
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
offset, length = int(sys.argv[2]), int(sys.argv[3])
with mmap.mmap(fd, offset + length, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
    print(hashlib.sha256(memory[offset : offset + length]).hexdigest())
"""
POOLS = """\
[pool:main]
paths = /mnt/pmem0
[pool:device]
kind = {kind}
paths = {device}
"""
POOL_DEVICES = {"raw": ("pmem", "/dev/pmem1"), "devdax": ("devdax", "/dev/dax1.0")}


def install_driver(host: XenHost) -> None:
    """Install the package in dom0, register, and have libvirtd see the hook."""
    install_package(host)
    host.check(f"{NVDIMMCTL} register")
    restart_libvirtd(host)
    start_nvdimmd(host)


def install_package(host: XenHost) -> None:
    """Install the package in dom0."""
    host.put(build_package(), "/root/nvdimm-driver.deb")
    host.check("dpkg -i /root/nvdimm-driver.deb")


def stop_nvdimmd(host: XenHost) -> None:
    """Stop nvdimmd and its sockets, as 'systemctl stop nvdimmd' does."""
    host.check(f"pid=$(cat {NVDIMMD_PID}); kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.3; done")


def start_nvdimmd(host: XenHost) -> None:
    """Start nvdimmd, as 'systemctl start nvdimmd' does on a host with systemd."""
    host.check(
        f"setsid nvdimmd >>/var/log/nvdimmd.log 2>&1 </dev/null & echo $! >{NVDIMMD_PID}; "
        f"for try in $(seq 600); do [ -S /run/libvirt/virtxend-sock ] && {VIRSH} uri && exit; "
        "kill -0 $! || break; sleep 0.5; done; "
        "cat /var/log/nvdimmd.log >&2; exit 1"
    )


def make_pmem(host: XenHost, file_system: str = "ext4", mode: str = "raw") -> None:
    """Make two pools: /mnt/pmem0, a DAX file system, and /dev/pmem1, a raw namespace, or /dev/dax1.0 in mode devdax."""
    kind, device = POOL_DEVICES[mode]
    host.write("/etc/nvdimm-driver/nvdimm-driver.conf.d/pools.conf", POOLS.format(kind=kind, device=device).encode())
    host.check(
        f"set -e\nndctl create-namespace -f -e namespace0.0 -m fsdax --map=mem\n{MAKE_FILE_SYSTEM[file_system]}\n"
        f"mkdir -p /mnt/pmem0\nmount -o dax,nosuid,nodev,noexec /dev/pmem0 /mnt/pmem0\n{MAKE_NAMESPACE[mode]}"
    )


def nvdimm(path: str, size_mib: int, *, label_kib: int = 0, attributes: str = "access='shared'", more: str = "") -> str:
    """Return one NVDIMM of a domain XML."""
    label = f"<label><size unit='KiB'>{label_kib}</size></label>" if label_kib else ""
    return (
        f"<memory model='nvdimm' {attributes}><source><path>{path}</path></source>"
        f"<target><size unit='MiB'>{size_mib}</size>{label}{more}</target></memory>"
    )


def domain_xml(
    name: str,
    nvdimms: Sequence[str],
    *,
    ram_mib: int = 128,
    on_crash: str = "destroy",
    disk: str = GUEST_DISK,
    dsm: str | None = None,
    cache: str | None = None,
) -> str:
    """Return the XML of a guest that boots from the lab's guest disk; `dsm` and `cache` override the host's options."""
    options = "".join(f" {name}='{value}'" for name, value in (("dsm", dsm), ("cache", cache)) if value)
    return f"""\
<domain type='xen' {XEN_NAMESPACE}>
  <name>{name}</name>
  {f"<metadata><o:options xmlns:o='urn:nvdimm-driver:options:1'{options}/></metadata>" if options else ""}
  <maxMemory slots='8' unit='GiB'>4</maxMemory>
  <memory unit='MiB'>{ram_mib}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='xenfv'>hvm</type><boot dev='hd'/></os>
  <features><acpi/><apic/><pae/></features>
  <clock offset='utc'><timer name='hpet' present='no'/><timer name='tsc' mode='native'/></clock>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>{on_crash}</on_crash>
  <devices>
    <console type='pty'><target type='xen'/></console>
    {"".join(nvdimms)}
  </devices>
  {_commandline(disk)}
</domain>
"""


def with_lab_disk(xml: str, disk: str) -> str:
    """Return the XML of a guest that has a Xen disk with the lab's guest disk instead, from which it boots faster.

    Such a disk is not for guests that do direct I/O from an NVDIMM.
    """
    without, disks = re.subn(r" *<disk .*</disk>\n", "", xml, flags=re.DOTALL)
    assert disks == 1, xml
    return without.replace("<domain type='xen'>", f"<domain type='xen' {XEN_NAMESPACE}>").replace(
        "</domain>", f"  {_commandline(disk)}\n</domain>"
    )


def _commandline(disk: str) -> str:
    arguments = "".join(f"<xen:arg value='{argument}'/>" for argument in disk_arguments(disk))
    return f"<xen:commandline>{arguments}</xen:commandline>"


def define(host: XenHost, name: str, nvdimms: Sequence[str], *, ram_mib: int = 128) -> None:
    """Define a guest with plain virsh."""
    install_guest(host)
    host.write(f"/root/{name}.xml", domain_xml(name, nvdimms, ram_mib=ram_mib).encode())
    host.check(f"{VIRSH} define /root/{name}.xml")


def remove(host: XenHost, name: str) -> None:
    """Undefine a guest that is off, and give up its claim to its NVDIMMs."""
    host.check(f"virsh -q -c xen:///system undefine {name} && {NVDIMMCTL} release --yes {name}")


def start(host: XenHost, name: str) -> Guest:
    """Start a defined guest."""
    guest = Guest(host, name)
    host.check(f"virsh -q -c xen:///system start {name}")
    return guest


def show(host: XenHost, name: str) -> dict[str, Any]:
    """Return what ``nvdimmctl show`` prints for a domain."""
    shown = json.loads(host.check(f"{NVDIMMCTL} show {name} -f json").stdout)
    assert isinstance(shown, dict)
    return shown


def host_sha256(host: XenHost, path: str, offset: int, length: int) -> str:
    """Return the SHA-256 of bytes of a file or device in dom0; offset and length are multiples of 4 KiB."""
    if path.startswith("/dev/dax"):
        host.write("/root/sha256.py", SHA256_DEVDAX.encode())
        return host.check(f"python3 /root/sha256.py {path} {offset} {length}").stdout.strip()
    flags = "direct,skip_bytes,count_bytes"
    command = f"dd if={path} bs=1M skip={offset} count={length} status=none iflag={flags} | sha256sum"
    return host.check(f"set -o pipefail; {command}").stdout.split()[0]


def restart_libvirtd(host: XenHost, uri: str = "xen:///system") -> None:
    """Restart libvirtd, as 'systemctl restart libvirtd' does on a host with systemd."""
    host.check(
        "pid=$(cat /run/libvirtd.pid); kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.3; done; "
        f"libvirtd --daemon --pid-file /run/libvirtd.pid && virsh -q -c '{uri}' list"
    )


def fragment(host: XenHost, folder: str, piece_mib: int) -> None:
    """Fill a file system and free every second piece of it, so that the next file has several extents.

    Pieces that were made one after the other need not be neighbours. Blocks of deleted files are free only after the
    journal is written.
    """
    host.check(
        f"sync {folder}; i=1000; while fallocate -l {piece_mib}M {folder}/filler-$i 2>/dev/null; do i=$((i+1)); done; "
        f"filefrag -v {folder}/filler-* | awk '/^File/ {{ name = $4 }} $1 == \"0:\" {{ print $4 + 0, name }}' | "
        f"sort -n | awk 'NR % 2 {{ print $2 }}' | xargs rm; sync {folder}"
    )


def disks(report: Report) -> list[str]:
    """Return a guest's block devices by slot. Linux numbers them by their place in the NFIT, which has no order."""
    handles = {dimm.name: dimm.handle for dimm in report.dimms}
    by_handle = {handles[region.dimm or ""]: region.name.replace("region", "/dev/pmem") for region in report.regions}
    return [by_handle[handle] for handle in sorted(by_handle)]


def trace(host: XenHost, event: str) -> None:
    """Record an event of dom0's kernel from now on.

    The names of the processes' commands are not recorded: for that, the kernel would patch the scheduler while another
    CPU runs it. QEMU 7.2 may continue with its translation of the old code, and then dom0 hangs.
    """
    host.check(
        f"cd /sys/kernel/tracing && echo 0 >options/record-cmd && echo >trace && "
        f"echo 1 >events/{event}/enable && echo 1 >tracing_on"
    )


def traced(host: XenHost, event: str) -> str:
    """Stop recording; return what was recorded."""
    return host.check(f"cd /sys/kernel/tracing && echo 0 >events/{event}/enable && cat trace").stdout


def count_memory_mappings(host: XenHost) -> None:
    """Record every memory_mapping domctl that dom0's kernel passes to Xen from now on.

    Only ioctls that make a hypercall count. QEMU also makes one without an argument (IOCTL_PRIVCMD_UNIMPLEMENTED, to
    ask what the kernel can do); of that, the probe reads nothing, and the record may have the values of an earlier one.
    """
    host.check(
        "cd /sys/kernel/tracing && echo >kprobe_events && "
        "echo 'p:domctl privcmd_ioctl ioctl=%si:u32 op=+u0(%dx):u64 sub=+u0(+u8(%dx)):u32' >kprobe_events && "
        f"echo 'ioctl == {PRIVCMD_HYPERCALL} && op == {DOMCTL_HYPERCALL} && sub == {MEMORY_MAPPING}' "
        ">events/kprobes/domctl/filter"
    )
    trace(host, "kprobes/domctl")


def memory_mappings_counted(host: XenHost) -> int:
    """Stop recording; print the memory_mapping domctls, and return their number."""
    found = [line for line in traced(host, "kprobes/domctl").splitlines() if "domctl:" in line]
    print(*found, sep="\n")
    return len(found)


def confinement(host: XenHost, pid: str) -> str:
    """Return the AppArmor profile of a process, with its mode; `pid` may be a substitution of the shell."""
    return host.check(f"tr -d '\\0' </proc/{pid}/attr/current").stdout.strip()


def apparmor_denials(host: XenHost) -> str:
    """Return the lines of dom0's kernel log with what AppArmor has denied."""
    return host.check("dmesg | grep 'apparmor=\"DENIED\"' || true").stdout
