# SPDX-License-Identifier: Apache-2.0
"""Devices of a guest that may lose what they transfer to and from an NVDIMM. Pure.

A program transfers directly with O_DIRECT and a buffer that is a mapping of a file on a DAX file system. QEMU knows the
guest's RAM alone: a device that it emulates reads zeros from an NVDIMM and writes nothing to it, and reports no error.
NVDIMMs are above 4 GiB: for a device with 32-bit addresses, Linux copies through RAM, or fails with EIO.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

WIDE = ("virtio-", "vhost-", "nvme", "ahci", "ich9-ahci", "lsi53c895a", "megasas", "mptsas", "pvscsi")
"""Beginnings of QEMU's names of devices that transfer to addresses above 4 GiB."""
NARROW = ("piix3-ide", "lsi53c810")
"""Beginnings of QEMU's names of those with 32-bit addresses."""
INTERFACES = {"virtio": "virtio-blk", "scsi": "lsi53c895a", "ide": "piix3-ide"}
"""Devices that QEMU makes for a ``-drive`` with ``if=``."""
DISKS = {"sd": "lsi53c895a", "hd": "piix3-ide"}
"""What libxl has QEMU emulate for a disk, such as sda, by the beginning of its name."""
IDE_CDROM = ("hd", "cdrom")
"""Reads that fail lose nothing, and nearly every guest has one."""


def devices(arguments: Sequence[str]) -> Iterator[str]:
    """Yield QEMU's names of the devices in its arguments that do not reach the NVDIMMs."""
    for option, value in pairwise(arguments):
        fields = value.split(",")
        if option in ("-device", "--device"):
            name = fields[0].removeprefix("driver=")
            if name.startswith((*WIDE, *NARROW)) or name == "lsi":
                yield name
        elif option in ("-drive", "--drive"):
            yield from (INTERFACES[each[3:]] for each in fields if each[:3] == "if=" and each[3:] in INTERFACES)


def advice(names: Sequence[str]) -> Iterator[str]:
    """Yield what may go wrong with these devices of a guest."""
    narrow = {name: None for name in names if name.startswith(NARROW)}
    if wide := {name: None for name in names if name not in narrow}:
        yield (
            f"QEMU emulates {', '.join(wide)} and does not reach the NVDIMMs: direct I/O (O_DIRECT) "
            "with a buffer in one loses bytes without an error; use Xen disks (bus='xen'), or boot the guest's Linux "
            "with swiotlb=force"
        )
    if narrow:
        yield (
            f"QEMU emulates {', '.join(narrow)} with 32-bit addresses and does not reach the NVDIMMs: direct I/O "
            "(O_DIRECT) with a buffer in one fails with EIO, unless the guest's Linux copies through RAM, or has Xen "
            "drivers and so removes that disk; use Xen disks (bus='xen')"
        )
