# SPDX-License-Identifier: Apache-2.0
"""The rule for hosts whose guests can have their NVDIMMs cached.

The hypervisor must have the change of ``contrib/xen-write-back``, which also writes the caches back when such a guest
ends. And dom0 must have the same memory cached: a line of the caches with two memory types would be undefined.
"""

from __future__ import annotations

MARK = "direct-mmio-wb"
"""The word that a hypervisor with the change has in XENVER_capabilities."""
_ON = ("", "1", "yes", "on", "true", "enable", "all")
"""The values of mmio-relax that turn it on (xen/arch/x86/mm.c:parse_mmio_relax, xen/common/kernel.c:parse_bool)."""


def find_fault(capabilities: str, command_line: str, dom0: str) -> str:
    """Return why guests' NVDIMMs cannot be cached on a host; empty when they can.

    :param capabilities: the hypervisor's, words with blanks between them.
    :param command_line: the hypervisor's.
    :param dom0: dom0's kind, as in /sys/hypervisor/guest_type.
    """
    if MARK not in capabilities.split():
        return "this Xen maps NVDIMMs uncached: it does not have the change of contrib/xen-write-back"
    if dom0 != "PV":
        return f"dom0 is {dom0 or 'of unknown kind'}: only of a PV dom0 is it known that it has NVDIMMs cached, too"
    if not has_mmio_relax(command_line):
        return "dom0 maps NVDIMMs uncached: mmio-relax is not on Xen's command line (GRUB_CMDLINE_XEN)"
    return ""


def has_mmio_relax(command_line: str) -> bool:
    """Return True when the option is on; the last one counts. Xen takes a value that it does not know for off."""
    on = False
    for word in command_line.split(" "):
        name, _, value = word.partition("=")
        if name == "mmio-relax":
            on = value in _ON
        elif name == "no-mmio-relax":
            on = False
    return on
