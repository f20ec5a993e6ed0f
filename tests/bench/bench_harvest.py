# SPDX-License-Identifier: Apache-2.0
"""The time that tables from a QEMU take, compared with a bare start and quit of the same QEMU. Run by hand.

For each installed QEMU and for 1, 8 and 64 NVDIMMs, it prints the median time to get the tables from QEMU and from the
cache. The unit is the time to start that QEMU with the same machine, get one answer and end it. The limit: 1.5.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nvdimm_driver.acpi.cache import TableCache
from nvdimm_driver.acpi.machine import DEFAULT_BINARIES, Machine
from nvdimm_driver.acpi.native import NativeAcpiBuilder
from nvdimm_driver.acpi.qemu import QemuAcpiBuilder
from nvdimm_driver.model import GIB, GuestLayout, Placement

ROUNDS = 15


def compare(*works: Callable[[], object]) -> list[float]:
    """Return the median seconds of each work, over some rounds in turns."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for seconds, work in zip(taken, works, strict=True):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in taken]


def bare(binary: str, layout: GuestLayout) -> None:
    """Start and end a QEMU."""
    with Machine(binary).run(layout):
        pass


def layout(count: int) -> GuestLayout:
    """Return a layout with so many NVDIMMs of 1 GiB."""
    nvdimms = tuple(Placement(slot, (68 + 2 * slot) * GIB, GIB) for slot in range(count))
    return GuestLayout(GIB, 4 * GIB, 1 << 48, nvdimms)


def bench(binary: str, folder: Path) -> None:
    """Measure and print for one QEMU."""
    harvest, kept = QemuAcpiBuilder([binary]), QemuAcpiBuilder([binary], cache=TableCache(folder))
    for count in (1, 8, 64):
        asked = layout(count)
        kept.build(asked)
        ways = (partial(bare, binary, asked), partial(harvest.build, asked), partial(kept.build, asked))
        start, *others = compare(*ways)
        ratios = ", ".join(f"{seconds / start:.2f}" for seconds in others)
        print(f"{binary}, {count} NVDIMMs: start and quit 1 ({start * 1000:.0f} ms); harvest, from the cache: {ratios}")


def main() -> None:
    """Measure all installed QEMUs, and the builder native."""
    with tempfile.TemporaryDirectory() as folder:
        for binary in filter(None, map(shutil.which, DEFAULT_BINARIES)):
            bench(binary, Path(folder))
    (native,) = compare(partial(NativeAcpiBuilder().build, layout(64)))
    print(f"native, 64 NVDIMMs: {native * 1000:.1f} ms")


if __name__ == "__main__":
    main()
