"""How long a harvest takes, against what merely starting that QEMU takes. Run by hand.

Prints for each QEMU that is installed the median time of a harvest for 1, 8 and 64 NVDIMMs as a multiple of
``QEMU -version``: a ratio means the same on any machine.
"""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable

from nvdimm_driver.acpi.native import NativeAcpiBuilder
from nvdimm_driver.acpi.qemu import DEFAULT_BINARIES, QemuAcpiBuilder
from nvdimm_driver.model import GIB, GuestLayout, Placement

ROUNDS = 11


def median(run: Callable[..., object], *arguments: object) -> float:
    """Seconds that a call takes, the median of some."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run(*arguments)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def version(binary: str) -> None:
    subprocess.run([binary, "-version"], check=True, capture_output=True)


def layout(count: int) -> GuestLayout:
    nvdimms = tuple(Placement(slot, (68 + 2 * slot) * GIB, GIB) for slot in range(count))
    return GuestLayout(GIB, 4 * GIB, 1 << 48, nvdimms)


def main() -> None:
    for name in DEFAULT_BINARIES:
        binary = shutil.which(name)
        if binary is None:
            continue
        start = median(version, binary)
        build = QemuAcpiBuilder([binary]).build
        ratios = ", ".join(f"{median(build, layout(count)) / start:.1f}" for count in (1, 8, 64))
        print(f"{binary}: -version 1 ({start * 1000:.0f} ms); harvest of 1, 8, 64 NVDIMMs {ratios}")
    native = median(NativeAcpiBuilder().build, layout(64))
    print(f"native, 64 NVDIMMs: {native * 1000:.1f} ms")


if __name__ == "__main__":
    main()
