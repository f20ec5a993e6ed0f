# SPDX-License-Identifier: Apache-2.0
"""One end of a session: a socket, the messages received from it, and the data still to be written to it."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from nvdimm_driver.errors import ProtocolError
from nvdimm_driver.rpc.wire import FDS_MAX, Budget, Reader

CHUNK = 256 << 10
"""Bytes received at once; more than Linux buffers for a unix socket by default (net.core.wmem_default)."""

_UNSENT = 512 << 10
"""Bytes of the socket's send buffer, so that a stream's message of 256 KiB is sent at once."""

_ANCILLARY = socket.CMSG_SPACE(4 * FDS_MAX)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


class End:
    """A non-blocking socket. A write never blocks: what cannot be sent is queued, and the owner checks the queue.

    :param connection: the caller closes it, too.
    :param buffer: of :data:`CHUNK` bytes, shared by all ends of a thread.
    :param readable: called when data has arrived, while :meth:`listen` is on.
    :param writable: called when more can be written, while data is queued.
    :param budget: as for :class:`.wire.Reader`.
    :ivar reader: received messages.
    :ivar output: the queue: pieces of frames and, as ints, descriptors.
    """

    def __init__(
        self,
        connection: socket.socket,
        buffer: memoryview,
        readable: Callable[[], None],
        writable: Callable[[], None],
        budget: Budget | None = None,
    ) -> None:
        self.reader = Reader(budget)
        self.output: deque[memoryview | int] = deque()
        self._bytes = 0
        self.open = True
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)
        self._socket = connection
        self._buffers = (buffer,)
        self._loop = asyncio.get_running_loop()
        self._readable = readable
        self._writable = writable
        self._reading = self._writing = False

    def queued(self) -> int:
        """Return how many bytes are queued; each message counts as 4 KiB more, and each descriptor as that."""
        return self._bytes + 4096 * len(self.output)

    def listen(self, wanted: bool) -> None:
        """Start or stop calling ``readable``."""
        if wanted == self._reading or not self.open:
            return
        self._reading = wanted
        if wanted:
            self._loop.add_reader(self._socket, self._readable)
        else:
            self._loop.remove_reader(self._socket)

    def receive(self) -> bool:
        """Pass what has arrived to the reader; at the end of the stream or on an error, close and return False.

        :raises ProtocolError: when descriptors were lost.
        """
        try:
            size, ancillary, flags, _ = self._socket.recvmsg_into(self._buffers, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except OSError:
            size = 0
        if not size:
            self.close()
            return False
        data = self._buffers[0][:size]
        if not ancillary:
            self.reader.receive(data)
            return True
        fds = [fd for _, _, packed in ancillary for fd in struct.unpack(f"{len(packed) // 4}i", packed)]
        self.reader.receive(data, fds)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"RPC stream: more than {FDS_MAX} descriptors at once, or more than can be open")
        return True

    def write(self, frame: bytes | bytearray, fds: Iterable[int] = ()) -> None:
        """Write a message and its descriptors, which are closed once sent; queue what cannot be written now."""
        if not self.open:
            close_all(fds)
            return
        if self.output or fds:
            sent = 0
        else:
            try:
                sent = self._socket.send(frame)
            except OSError:
                sent = 0
            if sent == len(frame):
                return
        self.output.append(memoryview(frame)[sent:])
        self._bytes += len(frame) - sent
        self.output.extend(fds)
        if not self._writing:
            self.flush()

    def flush(self) -> None:
        """Write what can be written now. If the peer is gone, drop the queue and shut down, so that reading ends."""
        try:
            while self.output:
                self._write(self.output[0])
        except BlockingIOError:
            self._await_writable(True)
        except OSError:
            self._discard()
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            self._await_writable(False)

    def close(self) -> None:
        if not self.open:
            return
        self.listen(False)
        self._discard()
        close_all(self.reader.take_fds())
        self.reader.close()
        self._socket.close()
        self.open = False

    def _write(self, item: memoryview | int) -> None:
        """Write one item; each descriptor gets a NUL and a ``sendmsg``: util/virsocket.c:virSocketRecvFD takes one."""
        if isinstance(item, int):
            socket.send_fds(self._socket, [b"\0"], [item])
            os.close(item)
            self.output.popleft()
            return
        sent = self._socket.send(item)
        self._bytes -= sent
        if sent == len(item):
            self.output.popleft()
        else:
            self.output[0] = item[sent:]

    def _await_writable(self, wanted: bool) -> None:
        if wanted == self._writing:
            return
        self._writing = wanted
        if wanted:
            self._loop.add_writer(self._socket, self._writable)
        else:
            self._loop.remove_writer(self._socket)

    def _discard(self) -> None:
        close_all(item for item in self.output if isinstance(item, int))
        self.output.clear()
        self._bytes = 0
        self._await_writable(False)
