# SPDX-License-Identifier: Apache-2.0
"""Sessions: one client and its own connection to libvirtd, between which messages pass or are handled."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Generator
from itertools import count
from typing import Any

from nvdimm_driver.errors import VIR_ERR_INTERNAL_ERROR, VIR_ERR_RPC, NvdimmError, ProtocolError
from nvdimm_driver.host_text import printable
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.endpoint import End, close_all
from nvdimm_driver.rpc.handler_types import Call, Context, Entry, ReplyEntry, Table, Work
from nvdimm_driver.rpc.wire import Budget, Header, Message
from nvdimm_driver.rpc.workers import Workers, stopping
from nvdimm_driver.rpc.xdr import LibvirtError, RemoteError

LOG = logging.getLogger(__name__)

OWN_SERIALS = 0xF0000000
OWN_SERIALS_NUMBER = 1 << 28
"""Serials from here on belong to calls of handlers; a client's count up from 0."""

HANDLERS_MAX = 64
"""Most call handlers at work for one client; one reply handler may work besides them. More than the defines that may
wait for zeros: a client can make other calls meanwhile."""

BACKLOG_MAX = wire.FRAME_MAX
"""Most bytes that wait for a client that does not read, while a call of a handler of his waits for libvirtd."""

_REASON_MAX = 65536
"""Characters of an error, which may quote what a client sent and must fit into a libvirt string, also escaped."""

# include/libvirt/virterror.h
_VIR_FROM_RPC = 7
_VIR_FROM_LIBXL = 41

_CLOSED = RemoteError(VIR_ERR_RPC, _VIR_FROM_RPC, "libvirtd closed the connection").pack()
_NOT_OPEN = RemoteError(VIR_ERR_INTERNAL_ERROR, _VIR_FROM_RPC, "internal error: connection not open").pack()
_FAILED = RemoteError(
    VIR_ERR_INTERNAL_ERROR, _VIR_FROM_LIBXL, "internal error: nvdimmd failed, see its log for the reason"
).pack()


class Session:
    """Passes whole messages, never part of one, and runs handlers.

    Reading from one side stops while anything is unwritten to the other. So a session buffers, in each direction, one
    message (32 MiB) and one read (256 KiB), and one more message for each handler at work (at most 65). But a handler
    may hold the lock of a domain: its call is answered though the client does not read. Up to :data:`BACKLOG_MAX` more
    is then kept for the client, and it is disconnected when that is not enough.

    :param budget: of the clients of its socket, for long messages.
    :ivar near: the client. When it disconnects, its handlers run to their end before libvirtd is disconnected.
    :ivar far: libvirtd. When it disconnects, the client gets what libvirtd has sent, and is disconnected.
    :ivar ended: done when nothing is left to do.
    """

    def __init__(
        self,
        context: Context,
        table: Table,
        client: socket.socket,
        libvirtd: socket.socket,
        buffer: memoryview,
        workers: Workers,
        budget: Budget,
    ) -> None:
        self.near = End(client, buffer, self._client_readable, self._client_writable, budget)
        self.far = End(libvirtd, buffer, self._libvirtd_readable, self._libvirtd_writable)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.context = context
        self.workers = workers
        self._table = table
        self._is_open = not any(isinstance(entry, Entry) and entry.opens for entry in table.values())
        self._calls = count()
        self._held: Message | None = None
        self._handlings: set[_Handling] = set()
        self._changing: _Handling | None = None
        self._waiting: dict[int, _Handling] = {}

    def settle(self) -> None:
        """Advance the session; call it after every event."""
        self._guard(self.far, self._from_libvirtd)
        self._guard(self.near, self._from_client)
        if not self.far.open:
            while self._waiting:
                self._waiting.popitem()[1].fail(LibvirtError(_CLOSED))
            if not (self.near.output or self._changing):
                self.near.close()
        elif not (self.near.open or self._handlings or self.far.output):
            self.far.close()
        self.near.listen(self.far.open and not self.far.output and not self._held)
        self.far.listen(self._takes_from_libvirtd())
        if not (self.near.open or self.far.open or self._handlings or self.ended.done()):
            self.ended.set_result(None)

    def abort(self) -> None:
        """Close everything now."""
        self.near.close()
        self.far.close()
        if self._held:
            close_all(self._held.fds)
            self._held = None

    def call(self, handling: _Handling, request: Call, fds: tuple[int, ...]) -> None:
        """Make a handler's call, and close the descriptors once they are sent, unless it raises.

        :raises LibvirtError: when libvirtd is gone.
        :raises ProtocolError: when the call is too long.
        """
        if not self.far.open:
            raise LibvirtError(_CLOSED)
        serial = OWN_SERIALS + next(self._calls) % OWN_SERIALS_NUMBER
        kind = wire.CALL_WITH_FDS if fds else wire.CALL
        payload = len(fds).to_bytes(4, "big") + request.payload if fds else request.payload
        header = Header(wire.PROGRAM, wire.VERSION, request.procedure, kind, serial, wire.OK)
        self.far.write(wire.pack(header, payload), fds)
        self._waiting[serial] = handling

    def opened(self) -> None:
        """Handle the client's calls from now on."""
        self._is_open = True

    def finish(self, handling: _Handling, reply: bytes) -> None:
        """Send a handler's reply to the client."""
        self._handlings.remove(handling)
        if handling is self._changing:
            self._changing = None
        self.near.write(reply)

    def _client_readable(self) -> None:
        try:
            if self.near.receive():
                self._from_client()
        except ProtocolError as error:
            self._drop(self.near, error)
        if not self._flowing():
            self.settle()

    def _libvirtd_readable(self) -> None:
        try:
            if self.far.receive():
                self._from_libvirtd()
        except ProtocolError as error:
            self._drop(self.far, error)
        if not self._flowing():
            self.settle()

    def _flowing(self) -> bool:
        """Return True when nothing waits and nothing ends, so that :meth:`settle` has nothing to do."""
        waits = self.near.output or self.far.output or self._held or self._changing
        return self.near.open and self.far.open and not waits

    def _client_writable(self) -> None:
        self.near.flush()
        self.settle()

    def _libvirtd_writable(self) -> None:
        self.far.flush()
        self.settle()

    def _guard(self, end: End, step: Callable[[], None]) -> None:
        """Process what an end has sent; close that end if it is not RPC."""
        if not end.open:
            return
        try:
            step()
        except ProtocolError as error:
            self._drop(end, error)

    def _drop(self, end: End, error: ProtocolError) -> None:
        peer, who = self.context.peer, "the client" if end is self.near else "libvirtd"
        LOG.warning("client with uid %d, pid %d: disconnected, %s sent: %s", peer.uid, peer.pid, who, error)
        end.close()

    def _from_libvirtd(self) -> None:
        while self._takes_from_libvirtd() and (message := self.far.reader.next_message()):
            header = message.header
            if header.serial >= OWN_SERIALS and header.program == wire.PROGRAM and header.kind in wire.REPLIES:
                close_all(message.fds)
                if header.serial not in self._waiting:
                    raise ProtocolError(f"RPC reply with serial {header.serial:#x}: no call has this serial")
                self._waiting.pop(header.serial).answer(message)
                continue
            self._check_backlog()
            if not self.near.open:
                self._stand_in(message)
            elif entry := self._reply_entry(message):
                self._changing = _Handling(self, message, entry.handler(self.context, message.arguments))
                self._begin(self._changing)
            else:
                self.near.write(message.frame, message.fds)

    def _takes_from_libvirtd(self) -> bool:
        """Return True when the client can take a message of libvirtd's, or a handler waits for one."""
        return not self._changing and (not self.near.output or bool(self._waiting))

    def _check_backlog(self) -> None:
        """Disconnect a client that does not read, before what is kept for it takes too much memory."""
        if self._waiting and self.near.output and self.near.queued() > BACKLOG_MAX:
            peer = self.context.peer
            LOG.warning("client with uid %d, pid %d: disconnected, it reads no replies", peer.uid, peer.pid)
            self.near.close()

    def _stand_in(self, message: Message) -> None:
        """Answer for a client that is gone: otherwise libvirtd would close the connection that its handlers use."""
        close_all(message.fds)
        if message.header.program == wire.KEEPALIVE_PROGRAM and message.header.procedure == wire.KEEPALIVE_PING:
            self.far.write(wire.pack(message.header._replace(procedure=wire.KEEPALIVE_PONG), b""))

    def _from_client(self) -> None:
        while not self.far.output and (message := self._held or self.near.reader.next_message()):
            self._held = None
            if message.header.serial >= OWN_SERIALS:
                close_all(message.fds)
                raise ProtocolError(f"RPC message with serial {message.header.serial:#x}: it is reserved for the proxy")
            entry = self._entry(message)
            if not entry:
                self.far.write(message.frame, message.fds)
            elif len(self._handlings) < HANDLERS_MAX and not self.near.output:
                may_handle = self._is_open or entry.opens
                steps = entry.handler(self.context, message.arguments) if may_handle else _refuse()
                self._begin(_Handling(self, message, steps, opens=entry.opens))
            else:
                self._held = message
                return

    def _entry(self, message: Message) -> Entry | None:
        header = message.header
        if header.program != wire.PROGRAM or header.version != wire.VERSION or header.kind not in wire.CALLS:
            return None
        entry = self._table.get(header.procedure)
        return entry if isinstance(entry, Entry) and entry.wants(message.arguments) else None

    def _reply_entry(self, message: Message) -> ReplyEntry | None:
        header = message.header
        if header.program != wire.PROGRAM or header.kind not in wire.REPLIES or header.status != wire.OK:
            return None
        entry = self._table.get(header.procedure)
        return entry if isinstance(entry, ReplyEntry) and entry.wants(message.arguments) else None

    def _begin(self, handling: _Handling) -> None:
        self._handlings.add(handling)
        handling.start()


def _refuse() -> Generator[Call | Work, Any, bytes]:
    """Refuse a call of a client that has opened no connection, as libvirtd does."""
    yield from ()
    raise LibvirtError(_NOT_OPEN)


class _Handling:
    """A handler at work on a call of the client, or on the reply to one."""

    def __init__(
        self,
        session: Session,
        message: Message,
        generator: Generator[Call | Work, Any, bytes],
        *,
        opens: bool = False,
    ) -> None:
        self._session = session
        self._opens = opens
        self._header = message.header
        self._fds = message.fds
        self._generator = generator

    def start(self) -> None:
        self._resume(self._generator.send, None)

    def fail(self, error: BaseException) -> None:
        self._resume(self._generator.throw, error)

    def answer(self, reply: Message) -> None:
        if reply.header.status == wire.OK:
            self._resume(self._generator.send, reply.arguments)
        else:
            self.fail(LibvirtError(reply.arguments))

    def _resume(self, step: Callable[[Any], Call | Work], value: object) -> None:
        """Run the handler until it waits or ends; send its reply when it ends."""
        peer = self._session.context.peer
        try:
            reply = self._run(step, value)
        except LibvirtError as error:
            reply = self._pack(wire.ERROR, error.payload)
        except NvdimmError as error:
            reason = printable(str(error)[:_REASON_MAX])  # virsh shows it in a terminal
            LOG.info("procedure %d, called by uid %d, pid %d: %s", self._header.procedure, peer.uid, peer.pid, reason)
            reply = self._pack(wire.ERROR, RemoteError(error.libvirt_code, _VIR_FROM_LIBXL, reason).pack())
        except Exception:
            LOG.exception("procedure %d, called by uid %d, pid %d", self._header.procedure, peer.uid, peer.pid)
            reply = self._pack(wire.ERROR, _FAILED)
        if reply is not None:
            close_all(self._fds)
            self._session.finish(self, reply)

    def _run(self, step: Callable[[Any], Call | Work], value: object) -> bytes | None:
        """Run the handler; return its reply, or None when it waits."""
        while True:
            try:
                request = step(value)
            except StopIteration as stop:
                if self._opens:
                    self._session.opened()
                return self._pack(wire.OK, stop.value)
            try:
                self._begin(request)
            except (LibvirtError, NvdimmError) as error:
                step, value = self._generator.throw, error
            else:
                return None

    def _begin(self, request: Call | Work) -> None:
        if isinstance(request, Work):
            uid = self._session.context.peer.uid
            self._session.workers.submit(self._session, request, uid).add_done_callback(self._worked)
            return
        self._session.call(self, request, self._fds if request.with_fds else ())
        if request.with_fds:
            self._fds = ()

    def _worked(self, future: asyncio.Future[Any]) -> None:
        error = stopping() if future.cancelled() else future.exception()
        if error:
            self.fail(error)
        else:
            self._resume(self._generator.send, future.result())
        self._session.settle()

    def _pack(self, status: int, payload: bytes) -> bytes:
        return wire.pack(self._header._replace(kind=wire.REPLY, status=status), payload)
