# SPDX-License-Identifier: Apache-2.0
"""The cost of labels: the same guest in the lab with dsm none, aml and qemu.

Run by hand: ``python -m tests.bench.bench_labels``. Seconds are under emulation; only their ratios mean something.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost
from tests.lab.image import build

NAME, FILE, DISK = "labels", "/mnt/pmem0/labels.img", "/tmp/guest-tools.img"
READ = "ndctl read-labels nmem0 >/dev/null 2>&1"
WRITE = "ndctl zero-labels nmem0 >/dev/null 2>&1"
ROUNDS = 3


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that work takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def resident(host: XenHost) -> int:
    """Return the proportional memory of the guest's label server in KiB, its QEMU included."""
    pids = "$(pgrep -f '[n]vdimm_driver.cmd.label_server') $(pgrep -f '[l]abel-size')"
    rollups = host.run(f"for pid in {pids}; do grep -h Pss: /proc/$pid/smaps_rollup; done").stdout
    return sum(int(line.split()[1]) for line in rollups.splitlines())


def measure(host: XenHost, dsm: str) -> None:
    """Measure and print for one dsm."""
    nvdimms = [operator.nvdimm(FILE, 18, label_kib=128)]
    host.write(f"/root/{NAME}.xml", operator.domain_xml(NAME, nvdimms, ram_mib=256, disk=DISK, dsm=dsm).encode())
    host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    guest = Guest(host, NAME)
    started = seconds(lambda: host.check(f"{operator.VIRSH} start {NAME}"))
    booted = seconds(guest.wait_report)
    line = f"dsm {dsm}: virsh start {started:.1f} s, from then to the guest's report {booted:.1f} s"
    if dsm != "none":
        guest.check("run", "ndctl disable-region all")
        reading = min(seconds(lambda: guest.check("run", READ)) for _ in range(ROUNDS))
        writing = min(seconds(lambda: guest.check("run", WRITE)) for _ in range(ROUNDS))
        line += f", 128 KiB of labels read in {reading:.2f} s, written in {writing:.2f} s"
    print(f"{line}; memory of its processes in dom0 {resident(host)} KiB", flush=True)
    host.check(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(host, NAME)
    host.check(f"rm {FILE}")


def main() -> None:
    """Measure each dsm in the lab."""
    with XenHost(build()) as host:
        operator.install_driver(host)
        operator.make_pmem(host)
        host.put(host.images.guest_tools_disk, DISK)
        for dsm in ("none", "aml", "qemu"):
            measure(host, dsm)


if __name__ == "__main__":
    main()
