# SPDX-License-Identifier: Apache-2.0
"""libpmem, which makes stores durable where no system call does: it writes back the CPU's caches.

The kernel has neither read, write nor a working fsync or msync for device-dax (drivers/dax/device.c: dax_fops has no
fsync): a store there is durable only when the caches are written back from user space. Python has no instruction for
that. ``pmem_persist`` uses CLWB, CLFLUSHOPT or CLFLUSH, or none on a platform that flushes its caches on power loss
(eADR). daxio(1) does the same.
"""

from __future__ import annotations

import mmap
from typing import Any

from cffi import FFI

from nvdimm_driver.errors import UnsupportedError

LIBRARY = "libpmem.so.1"


class Pmdk:
    """libpmem.

    :raises UnsupportedError: when it is not installed.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        self._ffi = FFI()
        self._ffi.cdef("void pmem_persist(const void *address, size_t length);")
        try:
            self._library: Any = self._ffi.dlopen(library)
        except OSError as error:
            raise UnsupportedError(
                f"a device-dax device cannot be written: {library} cannot be loaded",
                hint="install it (Debian: libpmem1): it writes back the CPU's caches, which Linux does not do there",
            ) from error

    def persist(self, memory: mmap.mmap, offset: int, length: int) -> None:
        """Make stores to a mapping durable.

        :param offset: of the first byte in it.
        """
        with self._ffi.from_buffer(memory) as start:
            self._library.pmem_persist(start + offset, length)
