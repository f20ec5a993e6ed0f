# SPDX-License-Identifier: Apache-2.0
"""A sysfs tree of files, laid out as Linux 6.1 lays out libnvdimm and device-dax."""

import os
from pathlib import Path

REGION = "devices/LNXSYSTM:00/ACPI0012:00/ndbus0/region0"
UUID = "6a1b2c3d-0000-4000-8000-000000000001"
NO_UUID = "00000000-0000-0000-0000-000000000000"


class FakeSysfs:
    """Adds namespaces to a tree below ``root``. Without ``uuid``, a namespace has no such attribute."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.region = root / REGION
        self.region.mkdir(parents=True, exist_ok=True)

    def device(self, path: Path, **attributes: object) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        for name, value in attributes.items():
            (path / name).write_text(f"{value}\n")
        return path

    def link(self, place: str, target: Path) -> None:
        link = self.root / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))

    def namespace(self, name: str, *, mode: str, spa: int, size: int, uuid: str | None = None, node: int = -1) -> Path:
        attributes = {} if uuid is None else {"uuid": uuid}
        path = self.device(
            self.region / name, mode=mode, resource=hex(spa), size=size, numa_node=node, force_raw=0, **attributes
        )
        self.link(f"bus/nd/devices/{name}", path)
        return path

    def holder(self, name: str, namespace: str, *, uuid: str = "", node: int = -1, **attributes: object) -> Path:
        """Add a pfn, dax or btt device."""
        path = self.device(self.region / name, namespace=namespace, uuid=uuid, numa_node=node, **attributes)
        self.link(f"bus/nd/devices/{name}", path)
        return path

    def disk(self, name: str, parent: Path, number: int, size: int = 1 << 30) -> Path:
        path = self.device(parent / "block" / name, size=size // 512)
        (path / "device").symlink_to(os.path.relpath(parent, path))
        self._block(path, number)
        return path

    def partition(self, disk: Path, index: int, number: int, *, start: int, size: int) -> Path:
        path = self.device(disk / f"{disk.name}p{index}", partition=index, start=start // 512, size=size // 512)
        self._block(path, number)
        return path

    def dax(self, name: str, parent: Path, number: int, *, spa: int, size: int, driver: str = "device_dax") -> Path:
        path = self.device(parent / name, resource=hex(spa), size=size, align=2 << 20)
        if driver:
            self.device(self.root / "bus/dax/drivers" / driver)
            (path / "driver").symlink_to(os.path.relpath(self.root / "bus/dax/drivers" / driver, path))
        self.link(f"bus/dax/devices/{name}", path)
        self.link(f"dev/char/{os.major(number)}:{os.minor(number)}", path)
        return path

    def fsdax(self, number: int, *, spa: int = 0x1_4020_0000, size: int = 1 << 40, uuid: str = UUID) -> Path:
        """Add /dev/pmem0, a namespace in fsdax mode with 2 MiB of info block and page structures before its data."""
        before = 2 << 20
        self.namespace("namespace0.0", mode="memory", spa=spa - before, size=size + before, uuid=uuid)
        pfn = self.holder("pfn0.1", "namespace0.0", mode="ram", resource=hex(spa), size=size)
        return self.disk("pmem0", pfn, number)

    def raw(self, number: int, *, spa: int = 0x1_4000_0000, size: int = 1 << 30) -> Path:
        """Add /dev/pmem0, a namespace in raw mode, without labels."""
        return self.disk("pmem0", self.namespace("namespace0.0", mode="raw", spa=spa, size=size), number, size)

    def sector(self, number: int) -> Path:
        """Add /dev/pmem0s, a namespace in sector mode."""
        self.namespace("namespace0.0", mode="safe", spa=0x1_4000_0000, size=1 << 30, uuid=UUID)
        btt = self.holder("btt0.0", "namespace0.0", sector_size=4096, size=(1 << 30) - (8 << 20))
        return self.disk("pmem0s", btt, number)

    def _block(self, path: Path, number: int) -> None:
        self.link(f"class/block/{path.name}", path)
        self.link(f"dev/block/{os.major(number)}:{os.minor(number)}", path)
