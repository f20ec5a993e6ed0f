# SPDX-License-Identifier: Apache-2.0
"""nvdimmd's listening sockets: every client that connects gets a session with libvirtd."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nvdimm_driver.rpc.endpoint import CHUNK
from nvdimm_driver.rpc.handler_types import Context, Peer, Table
from nvdimm_driver.rpc.session import Session
from nvdimm_driver.rpc.wire import Budget
from nvdimm_driver.rpc.workers import Workers

LOG = logging.getLogger(__name__)

_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h


@dataclass(frozen=True)
class Listener:
    """A listening socket, and the handling of the clients that connect to it.

    :ivar upstream: path of libvirtd's socket.
    :ivar allowed: returns True for a peer that may use the socket.
    """

    socket: socket.socket
    upstream: str
    read_only: bool
    table: Table
    allowed: Callable[[Peer], bool]


LONG_MESSAGES = {True: 64 << 20, False: 256 << 20}
"""Bytes of long messages that have not arrived, of all clients of the read-only socket, and of the other one: anybody
may use the first, and the service has 1 GiB (cmd/systemd_units.py). A message has 32 MiB at most."""


async def serve(listeners: Sequence[Listener], stop: asyncio.Event) -> None:
    """Serve until `stop` is set, and then until the handlers at work have finished.

    The listening sockets stay open; the caller closes them.
    """
    server = _Server()
    try:
        for listener in listeners:
            listener.socket.setblocking(False)
            server.listen(listener)
        await stop.wait()
        server.stop_listening(listeners)
        await server.finish()
    finally:
        server.stop_listening(listeners)
        server.abort()
        server.workers.close()


def peer_of(connection: socket.socket) -> Peer:
    """Return the peer of a connection; without groups if it is in more than 256, the limit of Python's getsockopt."""
    pid, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:
        groups = b""
    return Peer(uid, gid, pid, struct.unpack(f"{len(groups) // 4}I", groups))


async def _connect(path: str) -> socket.socket:
    """Connect to libvirtd.

    :raises OSError: when libvirtd is not there, or its queue of connections has been full for five seconds.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        for _ in range(100):
            with suppress(BlockingIOError):
                connection.connect(path)
                return connection
            await asyncio.sleep(0.05)
        raise TimeoutError(errno.ETIMEDOUT, "its queue of connections is full")
    except BaseException:
        connection.close()
        raise


class _Server:
    """All sessions of the process."""

    def __init__(self) -> None:
        self.workers = Workers()
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(CHUNK))
        self._budgets = {read_only: Budget(size) for read_only, size in LONG_MESSAGES.items()}
        self._shares: dict[tuple[bool, int], Budget] = {}
        self._sessions: set[Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def listen(self, listener: Listener) -> None:
        if not self._stopped:
            self._loop.add_reader(listener.socket, self._accept, listener)

    def stop_listening(self, listeners: Iterable[Listener]) -> None:
        self._stopped = True
        for listener in listeners:
            self._loop.remove_reader(listener.socket)

    async def finish(self) -> None:
        """Disconnect the clients, and wait for their handlers; those that wait for zeros to be written fail."""
        self.workers.stop()
        for session in self._sessions:
            session.near.close()
            session.settle()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def abort(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _accept(self, listener: Listener) -> None:
        try:
            connection, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            LOG.error("cannot accept clients, next try in a second: %s", error)
            self._loop.remove_reader(listener.socket)
            self._loop.call_later(1, self.listen, listener)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._attend(listener, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attend(self, listener: Listener, connection: socket.socket) -> None:
        """Serve one client."""
        with connection:
            peer = peer_of(connection)
            if not listener.allowed(peer):
                LOG.warning("client with uid %d, pid %d: may not use this socket", peer.uid, peer.pid)
                return
            try:
                upstream = await _connect(listener.upstream)
            except OSError as error:
                LOG.error("client with uid %d, pid %d: %s: %s", peer.uid, peer.pid, listener.upstream, error)
                return
            with upstream:
                context = Context(peer, listener.read_only)
                budget = self._share_of(peer.uid, read_only=listener.read_only)
                session = Session(context, listener.table, connection, upstream, self._buffer, self.workers, budget)
                await self._converse(session)

    def _share_of(self, uid: int, *, read_only: bool) -> Budget:
        """Return a user's share of a socket's budget for long messages: half of it, so that nobody spends it alone."""
        whole = self._budgets[read_only]
        return self._shares.setdefault((read_only, uid), Budget(LONG_MESSAGES[read_only] // 2, whole))

    async def _converse(self, session: Session) -> None:
        self._sessions.add(session)
        try:
            if self._stopped:
                session.near.close()
            session.settle()
            await session.ended
        finally:
            self._sessions.discard(session)
            session.abort()
