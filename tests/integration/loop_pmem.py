# SPDX-License-Identifier: Apache-2.0
"""A loop device, which a fake sysfs presents as a pmem namespace in fsdax mode: for tests on real ext4 and XFS."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.model import MIB, Location
from tests.unit.fake_sysfs import FakeSysfs

SPA = 0x1_4020_0000
IMAGE = 640 * MIB  # the minimum for a striped file system of mkfs.xfs
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-b", "4096", "-E", "stride=512,stripe_width=512"],
    "xfs": ["mkfs.xfs", "-q", "-d", "su=2m,sw=1", "-l", "su=4k"],
}


def run(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def mount_points() -> list[str]:
    """Return where file systems are mounted, those too that have failed: os.path.ismount says False of them."""
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


class FileSystem:
    """A mounted file system in an image, and a backing that takes it for one on a pmem namespace.

    :ivar memory: the folder of all else, which is in memory: hundreds of tests would write tens of GiB to the disk.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self.memory = folder / "memory"
        self.memory.mkdir()
        run("mount", "-t", "tmpfs", "none", self.memory)
        self.image = self.memory / "image"
        self.image.touch()
        os.truncate(self.image, IMAGE)
        run(*MKFS[kind], self.image)
        self.root = folder / "mnt"
        self.root.mkdir()
        self.mountinfo = self.memory / "mountinfo"
        self._insert()
        self.backing = FsdaxBacking(
            locks=Locks(self.memory / "locks"),
            sysfs=self.memory / "sys",
            mountinfo=self.mountinfo,
            cross_check=lambda fd, found: None,
        )
        # Free space that is not zero shows what was not written.
        self.path.write_bytes(b"stale" * (64 * MIB // 5))
        run("sync", "-f", self.path)
        self.clear()

    @property
    def path(self) -> Path:
        return self.root / "file"

    def _insert(self, options: str = "loop") -> None:
        """Mount the image; the namespace has the number that its loop device has now."""
        run("mount", "-o", options, self.image, self.root)
        self.device = os.stat(self.root).st_dev
        shutil.rmtree(self.memory / "sys", ignore_errors=True)
        FakeSysfs(self.memory / "sys").fsdax(self.device, spa=SPA, size=IMAGE)
        self.mount("rw,dax=always")

    def replace(self, image: Path) -> None:
        """Mount another image instead of the one until now, which is deleted."""
        run("umount", self.root)
        self.image.unlink()
        self.image = image
        # another process may have the one until now in a mount namespace still
        self._insert("loop,nouuid" if self.kind == "xfs" else "loop")

    def mount(self, options: str) -> None:
        number = f"{os.major(self.device)}:{os.minor(self.device)}"
        self.mountinfo.write_text(f"1 0 {number} / {self.root} rw - {self.kind} /dev/pmem0 {options}\n")

    def stored(self, location: Location) -> bytes:
        """Return the image's bytes at the places where a location has the file's bytes."""
        run("sync", "-f", self.root)
        with open(self.image, "rb", buffering=0) as image:
            parts = [os.pread(image.fileno(), each.length, each.spa - SPA) for each in location.extents]
        return b"".join(parts)

    def close(self) -> None:
        """Unmount it, if it still is mounted, and give its memory back."""
        if str(self.root) in mount_points():
            run("umount", self.root)
        run("umount", "-l", self.memory)

    def files(self) -> list[Path]:
        return [each for each in self.root.iterdir() if each.is_file()]

    def clear(self) -> None:
        for each in self.files():
            self.backing.thaw(str(each))
            each.unlink()


@contextmanager
def lease_break_time(seconds: int) -> Iterator[None]:
    """Have the kernel end a lease after that time."""
    setting = Path("/proc/sys/fs/lease-break-time")
    before = setting.read_text()
    setting.write_text(str(seconds))
    try:
        yield
    finally:
        setting.write_text(before)
