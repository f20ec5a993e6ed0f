"""Device-dax bytes, which only libpmem can make durable."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from tests.lab import operator
from tests.lab.host import Nvdimm, XenHost

pytestmark = pytest.mark.lab
MIB = 1 << 20
COPY = "/root/copy.img"
LIBPMEM = "/usr/lib/x86_64-linux-gnu/libpmem.so.1"
# What Linux says to whoever wants to make stores to a device-dax device durable.
SYNC_DEVDAX = """\
import mmap, os
fd = os.open("/dev/dax1.0", os.O_RDWR)
with mmap.mmap(fd, 2 << 20) as memory:
    memory[0] = 1
    for sync in (lambda: os.fsync(fd), memory.flush):
        try:
            sync()
        except OSError as error:
            print(error.errno)
"""


def test_device_dax_is_wiped_with_libpmem(fresh_host: Callable[..., XenHost], tmp_path: Path) -> None:
    xen = fresh_host(nvdimms=[Nvdimm(tmp_path / f"pmem{number}.img", 128 * MIB) for number in range(2)])
    xen.start()
    operator.install_driver(xen)
    operator.make_pmem(xen, mode="devdax")
    xen.write("/root/sync.py", SYNC_DEVDAX.encode())
    assert xen.check("python3 /root/sync.py").stdout.split() == ["22", "22"], "EINVAL: neither fsync nor msync"
    assert "install it (Debian: libpmem1)" in xen.run(f"{operator.NVDIMMCTL} wipe -y /dev/dax1.0").stderr
    with open(LIBPMEM, "rb") as file:
        xen.write(LIBPMEM, file.read())
    size = int(xen.check("cat /sys/bus/dax/devices/dax1.0/size").stdout)
    filled = xen.check(f"{operator.NVDIMMCTL} export /dev/dax1.0 {COPY}").stdout.split()[0]
    xen.check(f"{operator.NVDIMMCTL} wipe -y /dev/dax1.0")
    assert operator.host_sha256(xen, "/dev/dax1.0", 0, size) == sha256(bytes(size)).hexdigest()
    xen.check(f"{operator.NVDIMMCTL} import {COPY} --pool device --name dax1.0 --force")
    assert operator.host_sha256(xen, "/dev/dax1.0", 0, size) == filled
