# SPDX-License-Identifier: Apache-2.0
"""Devices of a guest that may lose what they transfer to and from an NVDIMM. Pure.

A program transfers directly with O_DIRECT and a buffer that is a mapping of a file on a DAX file system. QEMU knows the
guest's RAM alone: a device that it emulates reads zeros from an NVDIMM and writes nothing to it, and reports no error.
NVDIMMs are above 4 GiB: for a device with 32-bit addresses, Linux copies through RAM, or fails with EIO.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

WIDE = ("virtio-", "vhost-", "nvme", "ahci", "ich9-ahci", "lsi53c895a", "megasas", "mptsas", "pvscsi")
"""Beginnings of QEMU's names of devices that transfer to addresses above 4 GiB."""
NARROW = ("piix3-ide", "lsi53c810", "am53c974", "dc390")
"""Beginnings of QEMU's names of those with 32-bit addresses."""
INTERFACES = {"virtio": "virtio-blk", "scsi": "lsi53c895a", "ide": "piix3-ide"}
"""Devices that QEMU makes for a ``-drive`` with ``if=``."""
DISKS = {"sd": "lsi53c895a", "hd": "piix3-ide"}
"""What libxl has QEMU emulate for a disk, such as sda, by the beginning of its name."""
_IDE_DISKS = ("-hda", "-hdb", "-hdc", "-hdd")
"""QEMU's options that make an IDE disk."""
IDE_CDROM = ("hd", "cdrom")
"""Reads that fail lose nothing, and nearly every guest has one."""


def devices(arguments: Sequence[str]) -> Iterator[str]:
    """Yield QEMU's names of the devices in its arguments that do not reach the NVDIMMs."""
    for option, value in pairwise(arguments):
        name = option.removeprefix("-") if option.startswith("--") else option  # QEMU takes one or two hyphens
        if name == "-device":
            driver = _fields(value).get("driver", "")
            if driver.startswith((*WIDE, *NARROW)) or driver == "lsi":
                yield driver
        elif name == "-drive":
            interface = _fields(value).get("if", "ide")
            if interface in INTERFACES:
                yield INTERFACES[interface]
        elif name in _IDE_DISKS:
            yield INTERFACES["ide"]


def _fields(value: str) -> dict[str, str]:
    """Return the properties in an argument of QEMU's: text, where the first may lack its name, or JSON."""
    if value.startswith("{"):
        with suppress(ValueError, RecursionError):  # the latter for what is nested deeply
            return {name: str(each) for name, each in json.loads(value).items()}
        return {}
    first, *rest = value.split(",")
    pairs = [field.partition("=") for field in (first if "=" in first else f"driver={first}", *rest)]
    return {name: each for name, _, each in pairs}


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
