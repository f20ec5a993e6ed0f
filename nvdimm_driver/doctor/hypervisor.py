# SPDX-License-Identifier: Apache-2.0
"""Check Xen, and dom0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nvdimm_driver.doctor.finding import Finding, could_not, failed, noted, passed, warned
from nvdimm_driver.errors import XenError
from nvdimm_driver.host_text import read
from nvdimm_driver.xen import write_back
from nvdimm_driver.xen.libxenctrl import HAP, Xen, dom0_kind, running_version


@dataclass(frozen=True)
class Hypervisor:
    """Xen's report about itself.

    :ivar capabilities: the platform's, XEN_SYSCTL_PHYSCAP_* of xen/include/public/sysctl.h.
    :ivar command_line: Xen's command line at boot.
    :ivar words: for what it can do.
    """

    version: str
    capabilities: int
    command_line: str
    words: str = ""


def check(root: Path = Path("/")) -> Iterator[Finding]:
    """Run all checks of Xen and dom0.

    :param root: folder that has ``sys``, ``proc``, ``dev`` and ``usr``.
    """
    try:
        version = running_version(str(root))
    except (XenError, OSError) as error:
        yield could_not("Xen", error)
        for name in ("dom0", "toolstack library", "HAP", "memory type", "mmio-relax"):
            yield failed(name, "cannot be checked without Xen")
        return
    yield passed("Xen", f"version {version}")
    kind = dom0_kind(str(root))
    yield check_dom0(_text(root / "proc/xen/capabilities"), kind)
    try:
        with Xen(str(root)) as xen:
            found = Hypervisor(version, xen.platform_capabilities(), xen.command_line(), xen.capabilities())
    except XenError as error:
        yield could_not("toolstack library", error)
        for name in ("HAP", "memory type", "mmio-relax"):
            yield failed(name, "cannot be checked without the toolstack library")
        return
    yield passed("toolstack library", f"libxenctrl.so.{version} is that of the running Xen")
    yield check_hap(found)
    yield check_memory_type(found, kind)
    yield check_mmio_relax(found, kind)


def check_dom0(capabilities: str, kind: str) -> Finding:
    """Check that this is dom0, and report its kind.

    :param capabilities: content of /proc/xen/capabilities; empty if that does not exist.
    :param kind: content of /sys/hypervisor/guest_type.
    """
    if "control_d" not in capabilities.split():
        return failed(
            "dom0",
            "this is not dom0: /proc/xen/capabilities has no control_d",
            "run nvdimmctl in dom0; if this is dom0: mount -t xenfs xenfs /proc/xen",
        )
    return passed("dom0", f"{kind or 'of unknown kind'}")


def check_hap(xen: Hypervisor) -> Finding:
    """Check for hardware assisted paging: NVDIMMs are mapped into the second level of page tables."""
    if xen.capabilities & HAP:
        return passed("HAP", "hardware assisted paging is available")
    return failed(
        "HAP",
        "Xen has no hardware assisted paging",
        "turn on EPT (Intel) or NPT (AMD) in the firmware, and remove hap=0 from Xen's command line",
    )


def check_memory_type(xen: Hypervisor, kind: str) -> Finding:
    """Check whether guests can have their NVDIMMs cached."""
    fault = write_back.find_fault(xen.words, xen.command_line, kind)
    if not fault:
        return passed("memory type", "write-back: guests can have their NVDIMMs cached")
    if write_back.MARK in xen.words.split():
        return warned(
            "memory type",
            f"guests have their NVDIMMs uncached, which is slow: {fault}",
            "add mmio-relax to Xen's command line (GRUB_CMDLINE_XEN), and reboot into a PV dom0",
        )
    return warned(
        "memory type",
        "stock Xen maps NVDIMMs uncached into guests: accesses are correct and durable, but slow",
        "nothing to do on this host; contrib/xen-write-back has a change to Xen that makes them cached",
    )


def check_mmio_relax(xen: Hypervisor, kind: str) -> Finding:
    """Check that dom0's own mappings of persistent memory can be cached (xen/arch/x86/mm.c:get_page_from_l1e)."""
    if kind != "PV":
        return noted("mmio-relax", f"makes no difference to a dom0 that is {kind or 'of unknown kind'}")
    if write_back.has_mmio_relax(xen.command_line):
        return passed("mmio-relax", "on: dom0's own mappings of persistent memory can be cached")
    return noted(
        "mmio-relax",
        "off: a PV dom0 maps persistent memory uncacheable, and so writes zeros to new NVDIMMs slowly",
        "add mmio-relax to Xen's command line (GRUB_CMDLINE_XEN) and reboot; guests on stock Xen see no difference",
    )


def _text(path: Path) -> str:
    try:
        return read(path).strip()
    except OSError:
        return ""
