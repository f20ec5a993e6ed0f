# SPDX-License-Identifier: Apache-2.0
"""The time of the device model before it becomes QEMU, as a multiple of a bare Python start; in the lab.

Run by hand: ``python -m tests.bench.bench_device_model``. The limit is 3: slow work is done in ``prepare``.
"""

from __future__ import annotations

import re
from statistics import median

from tests.lab import operator
from tests.lab.host import XenHost
from tests.lab.image import build

NAME = "bench"
STARTS = 5
# Timed from Python, without a shell.
BARE = """\
import subprocess, time
for _ in range(15):
    began = time.monotonic()
    subprocess.run(["/usr/bin/python3", "-c", "pass"])
    print((time.monotonic() - began) * 1000)
"""


def main() -> None:
    """Start a guest several times; print both times and their ratio."""
    with XenHost(build()) as host:
        operator.install_driver(host)
        operator.make_pmem(host)
        nvdimms = [operator.nvdimm("/mnt/pmem0/bench.img", 256), operator.nvdimm("/dev/pmem1", 128)]
        operator.define(host, NAME, nvdimms)
        for _ in range(STARTS):
            host.check(f"virsh -q -c xen:///system start --paused {NAME}")
            host.check(f"virsh -q -c xen:///system destroy {NAME}")
        host.write("/root/bare.py", BARE.encode())
        bare = median(map(float, host.check("python3 /root/bare.py").stdout.split()))
        log = host.get(operator.LOG).decode()
    own = median(int(found) for found in re.findall(r"age_ms=(\d+)", log))
    print(f"device model {own:.0f} ms, python3 -c pass {bare:.0f} ms: ratio {own / bare:.2f} (limit 3)")
    print(*re.findall(r"event=started .*", log), sep="\n")


if __name__ == "__main__":
    main()
