# SPDX-License-Identifier: Apache-2.0
"""Random requests of a hostile guest to a label server: ``python -m tests.fuzz.labels --requests 1000000``."""

from __future__ import annotations

import argparse
import random
import struct
import time
from pathlib import Path

from nvdimm_driver.acpi.machine import DEFAULT_BINARIES
from nvdimm_driver.labels.qemu import QemuLabels
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, GuestLayout, Placement
from tests.unit.doubles import MemoryBytes

AREA = 128 * KIB
SLOTS = (0, 1, 3)
GET, FUNCTIONS = 5, 9
LIMITS = (0, 1, 4076, 4084, 4096, AREA, 1 << 31, 1 << 32)
LOOK_EVERY = 1000


class Guest:
    """Makes random requests, most of them about label areas, at and beyond their limits."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self) -> int:
        """Return a number at a limit, or a random one."""
        chosen = self._random.choice(LIMITS) + self._random.randrange(-2, 3)
        return chosen if 0 <= chosen < 1 << 32 and self._random.random() < 0.8 else self._random.randrange(1 << 32)

    def request(self) -> bytes:
        """Return a request, as a page."""
        likely = self._random.random() < 0.8
        handle = self._random.randrange(6) if likely else self.number()
        function = self._random.randrange(FUNCTIONS) if likely else self.number()
        offset = self._random.randrange(AREA) if likely else self.number()
        length = self._random.randrange(PAGE) if likely else self.number()
        head = struct.pack("<IIIII", handle, self._random.choice((1, 1, 1, 0, 2)), function, offset, length)
        return head + self._random.randbytes(PAGE - len(head))


def resident(pid: int | str) -> int:
    """Return the resident memory of a process in KiB."""
    status = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1]
    return int(status.split()[0])


def run(requests: int, seed: int = 1) -> str:
    """Make so many requests; return a line with the result.

    :raises AssertionError: when an answer is malformed, an area differs from what the guest was told, or QEMU was
        replaced.
    """
    areas = {slot: MemoryBytes(bytes(AREA)) for slot in SLOTS if slot != 1}
    placements = tuple(Placement(slot, (68 + 2 * slot) * GIB, 64 * MIB, AREA if slot in areas else 0) for slot in SLOTS)
    labels = QemuLabels(GuestLayout(GIB, 4 * GIB, 1 << 48, placements, dsm="qemu"), areas, DEFAULT_BINARIES)
    labels.start()
    qemu = Path("/proc/thread-self/children").read_text().split()[-1]
    guest, began, before, writes = Guest(seed), time.monotonic(), (0, 0), 0
    for number in range(requests):
        answer = labels.answer(guest.request())
        (length,) = struct.unpack_from("<I", answer)
        if len(answer) != PAGE or length > PAGE:
            raise AssertionError(f"request {number}: an answer of {len(answer)} bytes that says it has {length}")
        if number % LOOK_EVERY == 0:
            look(labels, areas)
            writes += sum(len(area.writes) for area in areas.values())
            for area in areas.values():
                area.writes.clear()
            if number <= requests // 10:
                before = resident("self"), resident(qemu)
    look(labels, areas)
    if Path("/proc/thread-self/children").read_text().split()[-1] != qemu:
        raise AssertionError("QEMU was replaced")
    grown = [now - then for now, then in zip((resident("self"), resident(qemu)), before, strict=True)]
    labels.close()
    seconds = time.monotonic() - began
    return (
        f"{requests} requests in {seconds:.0f} s, {writes} of them changed labels; since the first tenth the server "
        f"has grown by {grown[0]} KiB, its QEMU by {grown[1]} KiB"
    )


def look(labels: QemuLabels, areas: dict[int, MemoryBytes]) -> None:
    """Check that the guest reads the content of the label areas."""
    for slot, area in areas.items():
        for offset in range(0, AREA, 4 * KIB):
            page = struct.pack("<IIIII", slot + 1, 1, GET, offset, 4000)
            answer = labels.answer(page.ljust(PAGE, b"\0"))
            if answer[8:4008] != area.content[offset : offset + 4000]:
                raise AssertionError(f"slot {slot}: not what is in its area at {offset:#x}")


def main() -> None:
    """Parse the command line, run, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(run(arguments.requests, arguments.seed))


if __name__ == "__main__":
    main()
