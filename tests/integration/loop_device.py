# SPDX-License-Identifier: Apache-2.0
"""Block devices on loop devices that look like raw namespaces, and partitions of them."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.integration.loop_pmem import run
from tests.unit.fake_sysfs import FakeSysfs

FIRST_SPA, SPA_STEP = 0x1_5000_0000, 0x1000_0000


class Device:
    """A raw namespace, with the device node and the sysfs tree below a folder.

    :param index: N of pmemN and of namespaceN.0.
    :param size: bytes.
    :ivar loop: the loop device, to be detached.
    """

    def __init__(self, folder: Path, index: int, size: int) -> None:
        self.size = size
        self.name = f"pmem{index}"
        self.path = folder / self.name
        self.image = folder / f"{self.name}.image"
        self.image.touch()
        os.truncate(self.image, size)
        self.loop = run("losetup", "--find", "--show", self.image).strip()
        self.sysfs = FakeSysfs(folder / "sys")
        spa = FIRST_SPA + index * SPA_STEP
        uuid = f"7b2c3d4e-0000-4000-8000-{index:012}"
        self.namespace = self.sysfs.namespace(f"namespace{index}.0", mode="raw", spa=spa, size=size, uuid=uuid)
        self._appear(self.path)

    @property
    def number(self) -> int:
        """The device's number."""
        return os.stat(self.loop).st_rdev

    def read(self, count: int, offset: int = 0) -> bytes:
        """Return bytes of the device, whatever its name is."""
        with open(self.loop, "rb") as file:
            return os.pread(file.fileno(), count, offset)

    def write(self, content: bytes, offset: int = 0) -> None:
        """Write bytes to the device."""
        with open(self.loop, "r+b") as file:
            os.pwrite(file.fileno(), content, offset)
            os.fsync(file.fileno())

    def _appear(self, path: Path) -> None:
        self.path = path
        os.mknod(path, stat.S_IFBLK | 0o600, self.number)
        self.disk = self.sysfs.disk(path.name, self.namespace, self.number, self.size)

    def _vanish(self) -> None:
        self.path.unlink()
        number = f"{os.major(self.number)}:{os.minor(self.number)}"
        for link in (f"class/block/{self.path.name}", f"dev/block/{number}"):
            (self.sysfs.root / link).unlink()
        shutil.rmtree(self.disk.parent)


class MakeDevice(Protocol):
    """Makes a device of a number and a size in MiB."""

    def __call__(self, index: int, mib: int = 4) -> Device: ...


class Partition:
    """A partition of a device: another loop device of the same bytes."""

    def __init__(self, device: Device, index: int, start: int, size: int) -> None:
        self.device = device
        self.path = Path(f"{device.path}p{index}")
        self.loop = run("losetup", "--find", "--show", "-o", str(start), "--sizelimit", str(size), device.image).strip()
        number = os.stat(self.loop).st_rdev
        os.mknod(self.path, stat.S_IFBLK | 0o600, number)
        self._sysfs = device.sysfs.partition(device.disk, index, number, start=start, size=size)

    def resize(self, start: int, size: int) -> None:
        """Make it anew, with the same number, in another place."""
        run("losetup", "--detach", self.loop)
        run("losetup", "-o", str(start), "--sizelimit", str(size), self.loop, self.device.image)
        (self._sysfs / "start").write_text(f"{start // 512}\n")
        (self._sysfs / "size").write_text(f"{size // 512}\n")


def rename(devices: dict[Device, Path]) -> None:
    """Give devices other names, as a boot can do."""
    for device in devices:
        device._vanish()
    for device, path in devices.items():
        device._appear(path)


@contextmanager
def detached(made: list[Device | Partition]) -> Iterator[None]:
    """Detach the loop devices at the end."""
    try:
        yield
    finally:
        for each in reversed(made):
            run("losetup", "--detach", each.loop)


def with_paths(xml: str, *paths: Path) -> str:
    """Return a domain's XML with as many copies of its NVDIMM as there are paths, each with one of these."""
    (nvdimm,) = re.findall(r" *<memory model='nvdimm'>.*?</memory>\n", xml, re.DOTALL)
    copies = [re.sub("<path>.*</path>", f"<path>{path}</path>", nvdimm) for path in paths]
    return xml.replace(nvdimm, "".join(copies))
