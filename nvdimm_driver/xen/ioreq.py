# SPDX-License-Identifier: Apache-2.0
"""An ioreq server: this process, not the guest's device model, serves some of the guest's I/O ports.

Stock Xen puts each access as a request into a page that it shares with this process, one slot per vCPU. The vCPU waits
until its slot has the answer (xen/include/public/hvm/ioreq.h, xen/common/ioreq.c).
"""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from nvdimm_driver.errors import XenError
from nvdimm_driver.model import PAGE
from nvdimm_driver.xen._xen import ffi

PROT_READ_WRITE = 3
NO_BUFFER = 0
"""hvm/dm_op.h: HVM_IOREQSRV_BUFIOREQ_OFF."""
RESOURCE_IOREQ_SERVER, IOREQ_FRAME = 0, 1
"""memory.h: XENMEM_resource_ioreq_server, XENMEM_resource_ioreq_server_frame_ioreq(0)."""
READY, IN_PROCESS, ANSWERED = 1, 2, 3
"""hvm/ioreq.h: STATE_*. Xen crashes a domain whose slot returns to an earlier state (wait_for_io)."""
PORT_IO = 0
"""IOREQ_TYPE_PIO."""
CUT_OFF = (1 << 64) - 1
"""Value of a write whose server died while it put the answer into the guest's memory. No access has 8 bytes, so a guest
cannot write it, and Xen looks at the value of no write that is answered (xen/common/ioreq.c:wait_for_io)."""

OnWrite = Callable[[int, int, int], Callable[[], None] | None]
"""(port, size in bytes, value) → what puts the answer into the guest's memory, if anything does. It is called once the
request is marked as :data:`CUT_OFF`: the server after this one must not take half an answer for the request."""

_SLOT = struct.Struct("<QQIIIHBB")
_STATE_MASK, _POINTER, _READ = 0x0F, 0x10, 0x20
_DATA_OFFSET, _BITS_OFFSET = 8, 30


@dataclass(frozen=True)
class Request:
    """One slot of the shared page.

    :ivar state: STATE_*, such as READY.
    :ivar kind: IOREQ_TYPE_*.
    :ivar address: the I/O port.
    :ivar data: the value written; a guest address when ``is_pointer``.
    :ivar size: bytes of the access.
    :ivar event_port: the guest's end of the slot's event channel; 0 for a slot without a vCPU.
    """

    state: int
    kind: int
    address: int
    data: int
    size: int
    is_read: bool
    is_pointer: bool
    event_port: int

    @classmethod
    def parse(cls, slot: bytes) -> Self:
        """Parse the 32 bytes of a slot; any value of them is valid."""
        address, data, _, size, event_port, _, bits, kind = _SLOT.unpack(slot)
        return cls(
            state=bits & _STATE_MASK,
            kind=kind,
            address=address,
            data=data,
            size=size,
            is_read=bool(bits & _READ),
            is_pointer=bool(bits & _POINTER),
            event_port=event_port,
        )


class Slots:
    """The page that Xen shares with an ioreq server.

    :param page: its bytes.
    """

    def __init__(self, page: Any) -> None:
        self._page = page

    def read(self, slot: int) -> Request:
        return Request.parse(self._page[slot * _SLOT.size : (slot + 1) * _SLOT.size])

    def answer(self, slot: int, on_write: OnWrite, *, left_behind: bool = False) -> bool:
        """Answer the slot's request, if it has one; return True if its vCPU waits to be notified.

        :param left_behind: a process that served the slot has died: also answer a request that it had begun, and notify
            of one that it had answered.
        """
        request = self.read(slot)
        if left_behind and request.state == ANSWERED:
            return True
        if request.state != READY and not (left_behind and request.state == IN_PROCESS):
            return False
        self._set_state(slot, IN_PROCESS)
        # Requests of all other kinds go to every server and need only an answer (INVALIDATE matters to a mapcache).
        if request.kind == PORT_IO and not request.is_pointer:
            if request.is_read:
                self._set_data(slot, 0)
            elif put := on_write(request.address, request.size, request.data):
                self._set_data(slot, CUT_OFF)
                put()
        self._set_state(slot, ANSWERED)
        return True

    def _set_data(self, slot: int, value: int) -> None:
        where = slot * _SLOT.size + _DATA_OFFSET
        self._page[where : where + 8] = value.to_bytes(8, "little")

    def _set_state(self, slot: int, state: int) -> None:
        where = slot * _SLOT.size + _BITS_OFFSET
        (bits,) = self._page[where : where + 1]
        self._page[where : where + 1] = bytes([bits & ~_STATE_MASK | state])


class IoreqServer:
    """The serving end of one ioreq server of a domain.

    Plain reads give 0; string accesses (REP INS, REP OUTS) are acknowledged and transfer nothing.
    """

    def __init__(self, domid: int) -> None:
        """Open Xen's libraries.

        :raises XenError: when one is missing, or outside dom0.
        """
        self.domid = domid
        self._model = _Library("xendevicemodel", "libxendevicemodel.so.1")
        self._memory = _Library("xenforeignmemory", "libxenforeignmemory.so.1")
        self._events = _Library("xenevtchn", "libxenevtchn.so.1")
        self._toolcore = _load("libxentoolcore.so.1")
        self._slots = Slots(b"")
        self._slot_of_port: dict[int, int] = {}
        self._id = 0

    def create(self) -> int:
        """Create a server, which has no ports yet; return its id."""
        found = ffi.new("ioservid_t *")
        self._model.call("create_ioreq_server", self.domid, NO_BUFFER, found)
        return int(found[0])

    def take_over(self, server: int, first: int, last: int) -> None:
        """Serve the ports ``first`` to ``last`` as the server with this id, whose last process may have died.

        :raises XenError: when Xen refuses, as it does for a dying domain.
        """
        self._id = server
        address = ffi.new("void **")
        self._memory.call(
            *("map_resource", self.domid, RESOURCE_IOREQ_SERVER, server, IOREQ_FRAME, 1, address, PROT_READ_WRITE, 0)
        )
        self._slots = Slots(ffi.buffer(address[0], PAGE))
        self._model.call(*("map_io_range_to_ioreq_server", self.domid, server, 0, first, last), allowed=(errno.EEXIST,))
        self._model.call("set_ioreq_server_state", self.domid, server, 1)
        for slot in range(PAGE // _SLOT.size):
            if remote := self._slots.read(slot).event_port:
                port = self._events.call("bind_interdomain", self.domid, remote)
                self._slot_of_port[port] = slot

    def map_page(self, gfn: int) -> Any:
        """Map a page of the guest's RAM; return a buffer of 4096 bytes, which the guest can change at any time."""
        error = ffi.new("int *")
        where = self._memory.call("map", self.domid, PROT_READ_WRITE, 1, ffi.new("xen_pfn_t[]", [gfn]), error)
        if error[0]:
            raise _error("xenforeignmemory_map", -error[0], f"domain {self.domid}, gfn {gfn:#x}")
        return ffi.buffer(where, PAGE)

    def restrict(self) -> None:
        """Restrict all open Xen handles of this process to this domain, for good."""
        ffi.errno = 0
        if self._toolcore.xentoolcore_restrict_all(self.domid):
            raise _error("xentoolcore_restrict_all", ffi.errno, f"domain {self.domid}")

    def exists(self, server: int) -> bool:
        """Return True while the domain has that server; a dying domain has none."""
        nothing = ffi.NULL
        asked = ("get_ioreq_server_info", self.domid, server, nothing, nothing, nothing)
        return int(self._model.call(*asked, allowed=(errno.ENOENT, errno.ESRCH))) >= 0

    def serve(self, on_write: OnWrite, idle_seconds: float) -> None:
        """Answer requests until the domain dies; check that it lives after every ``idle_seconds`` without a request.

        :param on_write: called for each plain write to one of its ports.
        """
        for port in self._slot_of_port:
            self._answer(port, on_write, left_behind=True)
        descriptor = self._events.call("fd")
        while True:
            if not select.select([descriptor], [], [], idle_seconds)[0]:
                if not self.exists(self._id):
                    return
                continue
            port = self._events.call("pending")
            self._events.call("unmask", port)
            self._answer(port, on_write)

    def _answer(self, port: int, on_write: OnWrite, *, left_behind: bool = False) -> None:
        if self._slots.answer(self._slot_of_port[port], on_write, left_behind=left_behind):
            self._events.call("notify", port)


class _Library:
    """A Xen library with an open handle; the prefix begins the names of its functions."""

    def __init__(self, prefix: str, soname: str) -> None:
        self._prefix = prefix
        self._lib = _load(soname)
        ffi.errno = 0
        self._handle = getattr(self._lib, f"{prefix}_open")(ffi.NULL, 0)
        if not self._handle:
            raise _error(f"{prefix}_open", ffi.errno, soname)

    def call(self, name: str, *arguments: object, allowed: tuple[int, ...] = ()) -> Any:
        """Call a function and return its result, which is negative only for an errno in ``allowed``.

        :raises XenError: with the arguments, when it fails.
        """
        ffi.errno = 0
        result = getattr(self._lib, f"{self._prefix}_{name}")(self._handle, *arguments)
        failed = result < 0 if isinstance(result, int) else not result
        if failed and ffi.errno not in allowed:
            known = ", ".join(str(argument) for argument in arguments if isinstance(argument, int))
            raise _error(f"{self._prefix}_{name}", ffi.errno, known)
        return result


def _load(soname: str) -> Any:
    try:
        return ffi.dlopen(soname)
    except OSError as error:
        raise XenError(f"{error}", hint=f"install the package with {soname}") from error


def _error(name: str, number: int, what: str) -> XenError:
    code = errno.errorcode.get(number, str(number))
    return XenError(f"{name}: {code} ({os.strerror(number)}): {what}")
