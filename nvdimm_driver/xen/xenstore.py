# SPDX-License-Identifier: Apache-2.0
"""Access to xenstore through libxenstore."""

from __future__ import annotations

import errno
import os

from nvdimm_driver.errors import XenError
from nvdimm_driver.host_text import decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    ffi: Any
else:
    from nvdimm_driver.xen._xen import ffi

NO_TRANSACTION = 0
"""xenstore.h: XBT_NULL."""


class Xenstore:
    """An open connection to xenstore, without transactions: nobody else writes the same paths meanwhile."""

    def __init__(self) -> None:
        """Connect.

        :raises XenError: without libxenstore.so.4 or without a running xenstored.
        """
        try:
            self._lib: Any = ffi.dlopen("libxenstore.so.4")
        except OSError as error:
            raise XenError(f"{error}", hint="install the package with libxenstore.so.4") from error
        self._libc: Any = ffi.dlopen(None)
        ffi.errno = 0
        self._handle: Any = self._lib.xs_open(0)
        if not self._handle:
            raise _error("xs_open", "/run/xenstored/socket", hint="start xenstored, and run this as root")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Can be repeated."""
        handle, self._handle = self._handle, ffi.NULL
        self._lib.xs_close(handle)

    def read(self, path: str) -> str | None:
        """Return the value at the path, or None when there is none.

        :raises XenError: when it cannot be read.
        """
        length = ffi.new("unsigned *")
        ffi.errno = 0
        value = self._lib.xs_read(self._handle, NO_TRANSACTION, path.encode(), length)
        if not value:
            if ffi.errno == errno.ENOENT:
                return None
            raise _error("xs_read", path)
        try:
            return decode(bytes(ffi.buffer(value, length[0])))
        finally:
            self._libc.free(value)

    def names(self, path: str) -> list[str]:
        """Return the names of what is directly below the path; none when there is no such path.

        :raises XenError: when it cannot be read.
        """
        number = ffi.new("unsigned *")
        ffi.errno = 0
        found = self._lib.xs_directory(self._handle, NO_TRANSACTION, path.encode(), number)
        if not found:
            if ffi.errno == errno.ENOENT:
                return []
            raise _error("xs_directory", path)
        try:
            return [ffi.string(found[each]).decode(errors="replace") for each in range(number[0])]
        finally:
            self._libc.free(found)

    def write(self, path: str, value: str) -> None:
        """Set the value at the path; create missing parents.

        :raises XenError: when it cannot be written.
        """
        data = value.encode()
        ffi.errno = 0
        if not self._lib.xs_write(self._handle, NO_TRANSACTION, path.encode(), data, len(data)):
            raise _error("xs_write", path)


def _error(name: str, path: str, *, hint: str = "") -> XenError:
    number = ffi.errno
    code = errno.errorcode.get(number, str(number))
    return XenError(f"{name}: {code} ({os.strerror(number)}): {path}", hint=hint)
