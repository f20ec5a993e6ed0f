# SPDX-License-Identifier: Apache-2.0
"""Devices of a guest that may lose what they transfer to and from an NVDIMM. Pure.

A program transfers directly with O_DIRECT and a buffer that is a mapping of a file on a DAX file system. QEMU knows the
guest's RAM alone: a device that it emulates reads zeros from an NVDIMM and writes nothing to it, and reports no error.
NVDIMMs are above 4 GiB: for a device with 32-bit addresses, Linux copies through RAM, or fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

WIDE = ("virtio-", "vhost-", "nvme", "ahci", "ich9-ahci", "lsi53c895a", "megasas", "mptsas", "pvscsi")
"""Beginnings of QEMU's names of devices that transfer to addresses above 4 GiB."""
WIDE_INTERFACES = {"virtio": "virtio-blk", "scsi": "lsi53c895a"}
"""Devices that QEMU makes for a ``-drive`` with ``if=``."""
SCSI = "lsi53c895a"
"""What libxl has QEMU emulate for a disk sda."""


def devices(arguments: Sequence[str]) -> Iterator[str]:
    """Yield QEMU's names of the devices in its arguments that transfer to addresses above 4 GiB."""
    for option, value in pairwise(arguments):
        fields = value.split(",")
        if option in ("-device", "--device"):
            name = fields[0].removeprefix("driver=")
            if name.startswith(WIDE) or name == "lsi":
                yield name
        elif option in ("-drive", "--drive"):
            yield from (
                WIDE_INTERFACES[each[3:]] for each in fields if each[:3] == "if=" and each[3:] in WIDE_INTERFACES
            )


def advice(names: Sequence[str]) -> Iterator[str]:
    """Yield what may go wrong with these devices of a guest."""
    if names:
        yield (
            f"QEMU emulates {', '.join(dict.fromkeys(names))} and does not reach the NVDIMMs: direct I/O (O_DIRECT) "
            "with a buffer in one loses bytes without an error; use Xen disks (bus='xen'), or boot the guest's Linux "
            "with swiotlb=force"
        )
