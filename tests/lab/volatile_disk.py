# SPDX-License-Identifier: Apache-2.0
"""A disk with a volatile write cache: a plug-in of nbdkit (nbdkit-python-plugin(3)).

When its machine loses power, each sector that was written since the last flush has one of the contents that it had
since then: the cache may have written any of them, in any order. So a write can be torn between sectors.
"""

import os
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

API_VERSION = 2
SECTOR = 4096
"""What a disk writes whole or not at all, in bytes. A torn block of 4 KiB is more than ext4's own journal stands."""
WRITES = 12
"""So many writes are made before the power is cut, on an average."""
_options: dict[str, str] = {}


@dataclass
class Disk:
    """A disk.

    :ivar fd: a file with the newest content.
    :ivar unflushed: all contents since the last flush, by sector, oldest first; the first one is durable.
    :ivar choose: decides what a power loss leaves.
    """

    fd: int
    choose: random.Random
    unflushed: dict[int, list[bytes]] = field(default_factory=dict)

    def write(self, data: bytes, offset: int) -> None:
        """Write sectors into the cache."""
        before = os.pread(self.fd, len(data), offset)
        for at in range(0, len(data), SECTOR):
            contents = self.unflushed.setdefault((offset + at) // SECTOR, [before[at : at + SECTOR]])
            contents.append(data[at : at + SECTOR])
        os.pwrite(self.fd, data, offset)

    def lose_power(self) -> int:
        """Keep what is durable, and of the cache what it happens to have written; return how many sectors are older."""
        chance, older = self.choose.random(), 0
        for sector, contents in self.unflushed.items():
            kept = -1 if self.choose.random() < chance else self.choose.randrange(len(contents))
            if contents[kept] != contents[-1]:
                older += 1
                os.pwrite(self.fd, contents[kept], sector * SECTOR)
        self.unflushed.clear()
        return older


# --- what nbdkit calls ---


def config(key: str, value: str) -> None:
    """Take the options ``image``, a file; ``seed``, a number; and ``cut``.

    ``cut`` is a file. Once it is there, the machine, whose process id it has, loses power at one of its next writes.
    """
    _options[key] = value


def open(readonly: bool) -> Disk:
    """Return the disk, for the machine that connects."""
    del readonly
    return Disk(os.open(_options["image"], os.O_RDWR), random.Random(int(_options["seed"])))


def close(disk: Disk) -> None:
    """Lose power, as the machine is gone; print how many sectors are older than what it wrote."""
    unflushed = len(disk.unflushed)
    print(f"{disk.lose_power()} of {unflushed} sectors are older", file=sys.stderr, flush=True)
    os.close(disk.fd)


def get_size(disk: Disk) -> int:
    """Return the size in bytes."""
    return os.fstat(disk.fd).st_size


def block_size(disk: Disk) -> tuple[int, int, int]:
    """Return the least, the best and the greatest size of a request in bytes."""
    del disk
    return SECTOR, 4096, 32 << 20


def pread(disk: Disk, buffer: bytearray, offset: int, flags: int) -> None:
    """Read into a buffer."""
    del flags
    os.preadv(disk.fd, [buffer], offset)


def pwrite(disk: Disk, buffer: bytearray, offset: int, flags: int) -> None:
    """Write a buffer."""
    del flags
    disk.write(bytes(buffer), offset)
    cut = Path(_options["cut"])
    if cut.exists() and disk.choose.randrange(WRITES) == 0:
        os.kill(int(cut.read_text()), signal.SIGKILL)


def flush(disk: Disk, flags: int) -> None:
    """Make all that was written durable."""
    del flags
    disk.unflushed.clear()
