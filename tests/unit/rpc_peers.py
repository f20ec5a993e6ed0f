# SPDX-License-Identifier: Apache-2.0
"""Both peers of a proxy, with blocking sockets, and the proxy between them in a thread, with handlers for tests."""

from __future__ import annotations

import array
import asyncio
import gc
import os
import socket
import struct
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from nvdimm_driver.errors import UnsupportedError
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.handler_types import Call, Context, Entry, Peer, ReplyEntry, Table, Work
from nvdimm_driver.rpc.proxy import Listener, serve
from nvdimm_driver.rpc.wire import Header, Message, Reader, pack
from nvdimm_driver.rpc.xdr import LibvirtError
from tests.waiting import HANG_SECONDS

Requests = Generator[Call | Work, Any, bytes]

PLAIN, UPPER, REFUSED, BROKEN, SLOW, TWICE, FORGETS, STUBBORN, LENGTHY, CHANGED = 1, 11, 12, 13, 14, 15, 16, 17, 18, 19
OPEN = 1
GATE, WAITING = threading.Event(), threading.Event()
PING = Header(wire.KEEPALIVE_PROGRAM, 1, wire.KEEPALIVE_PING, wire.EVENT, 0, wire.OK)


def upper(context: Context, arguments: bytes) -> Requests:
    """Rewrite both ways: libvirtd gets capitals, the client gets the answer reversed."""
    answer: bytes = yield Call(UPPER, arguments.upper(), with_fds=True)
    return answer[::-1]


def refused(context: Context, arguments: bytes) -> Requests:
    if arguments == b"libvirt":
        raise LibvirtError(b"as it was")
    if arguments == b"long":
        return bytes(wire.FRAME_MAX)
    raise UnsupportedError(f"uid {context.peer.uid} cannot{arguments.decode('latin-1')}", hint="do not")
    yield


def broken(context: Context, arguments: bytes) -> Requests:
    yield Work(lambda: 1 // len(arguments))
    raise ZeroDivisionError


def slow(context: Context, arguments: bytes) -> Requests:
    """Wait for the test in a thread, between two calls."""
    yield Call(SLOW, b"first")
    result: bytes = yield Work(lambda: b"%d" % GATE.wait(HANG_SECONDS))
    yield Call(SLOW, result)
    return b"done"


def twice(context: Context, arguments: bytes) -> Requests:
    """Continue after an error."""
    try:
        answer: bytes = yield Call(TWICE, b"a")
    except LibvirtError as error:
        answer = b"error " + error.payload
    yield Call(TWICE, answer)
    return answer


def forgets(context: Context, arguments: bytes) -> Requests:
    """Call without passing on the descriptors."""
    yield Call(FORGETS, arguments)
    return b""


def stubborn(context: Context, arguments: bytes) -> Requests:
    """Request a call that is too long."""
    with suppress(UnsupportedError):
        yield Call(STUBBORN, bytes(wire.FRAME_MAX))
    return b"never"


def lengthy(context: Context, arguments: bytes) -> Requests:
    """Return a long reply when libvirtd is gone."""
    with suppress(LibvirtError):
        yield Call(LENGTHY, arguments)
    return bytes(8 << 20)


def changed(context: Context, reply: bytes) -> Requests:
    """Reverse a reply: at once, when the test allows it, or never."""
    if reply == b"+unsupported":
        raise UnsupportedError("not that")
    if reply == b"+wait":
        yield Work(lambda: WAITING.set() or GATE.wait(HANG_SECONDS))  # type: ignore[func-returns-value]
    return reply[::-1]


def opens(context: Context, arguments: bytes) -> Requests:
    """Open a connection, unless libvirtd refuses."""
    answer: bytes = yield Call(OPEN, arguments)
    return answer


WITH_OPEN: Table = {OPEN: Entry(opens, opens=True), UPPER: Entry(upper)}

TABLE: Table = {
    UPPER: Entry(upper, lambda arguments: not arguments.startswith(b"-")),
    REFUSED: Entry(refused),
    BROKEN: Entry(broken),
    SLOW: Entry(slow),
    TWICE: Entry(twice),
    FORGETS: Entry(forgets),
    STUBBORN: Entry(stubborn),
    LENGTHY: Entry(lengthy),
    CHANGED: ReplyEntry(changed, lambda reply: reply.startswith(b"+")),
}


def call(procedure: int, serial: int, kind: int = wire.CALL) -> Header:
    return Header(wire.PROGRAM, wire.VERSION, procedure, kind, serial, wire.OK)


def reply_to(header: Header, status: int = wire.OK) -> Header:
    return header._replace(kind=wire.REPLY, status=status)


def open_fds() -> set[tuple[str, str]]:
    """Return the process's descriptors, each with what it refers to."""
    gc.collect()  # of other tests
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found


class Line:
    """One peer's socket. No operation waits longer than ten seconds."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(HANG_SECONDS)
        self.socket = connection
        self._reader = Reader()

    def send(self, header: Header, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a message as libvirt does, with the count of descriptors in front of the payload."""
        if header.kind in wire.WITH_FDS:
            payload = struct.pack(">I", len(fds)) + payload
        frame = pack(header, payload)
        self.socket.sendall(frame)
        for fd in fds:
            socket.send_fds(self.socket, [b"\0"], [fd])
        return frame

    def receive(self) -> Message | None:
        """Return the next message; None at the end."""
        while not (message := self._reader.next_message()):
            data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4 * wire.FDS_MAX))
            if not data:
                return None
            fds = array.array("i")
            for _, _, packed in ancillary:
                fds.frombytes(packed)
            assert len(fds) <= 1, "libvirt takes one descriptor at a time"
            self._reader.receive(data, fds)
        return message

    def expect(self) -> Message:
        message = self.receive()
        assert message
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class ProxyThread:
    """A proxy in a thread.

    :ivar path: path of the socket that it listens on.
    """

    def __init__(
        self, folder: Path, upstream: Path, table: Table, allowed: Callable[[Peer], bool] = lambda peer: True
    ) -> None:
        self.path = folder / "near"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self._listening.listen(100)
        self._listener = Listener(self._listening, str(upstream), False, table, allowed)
        self._started = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._loop.call_soon_threadsafe(self._stop.set)

    def cancel(self) -> None:
        self._stopped = True
        self._loop.call_soon_threadsafe(self._task.cancel)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(serve([self._listener], self._stop))
        self._started.set()
        with suppress(asyncio.CancelledError):
            await self._task

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(HANG_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(HANG_SECONDS)
        self._listening.close()
        assert not self._thread.is_alive()


class Proxy(ProxyThread):
    """A proxy, and the socket that stands for libvirtd's."""

    def __init__(self, folder: Path, table: Table, allowed: Callable[[Peer], bool] = lambda peer: True) -> None:
        self.upstream = socket.socket(socket.AF_UNIX)
        self.upstream.bind(str(folder / "far"))
        self.upstream.listen(100)
        self.upstream.settimeout(HANG_SECONDS)
        super().__init__(folder, folder / "far", table, allowed)

    def client(self) -> Line:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        return Line(connection)

    def pair(self) -> tuple[Line, Line]:
        """Return a client and libvirtd's side of its session."""
        near = self.client()
        return near, Line(self.upstream.accept()[0])

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.upstream.close()
