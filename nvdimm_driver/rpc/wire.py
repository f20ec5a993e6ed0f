# SPDX-License-Identifier: Apache-2.0
"""Wire format of libvirt's RPC: messages and the descriptors that come with them. Pure.

The rules are in libvirt's src/rpc/virnetprotocol.x and virnetmessage.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from nvdimm_driver.errors import ProtocolError

PROGRAM = 0x20008086
VERSION = 1

KEEPALIVE_PROGRAM = 0x6B656570
KEEPALIVE_PING = 1
KEEPALIVE_PONG = 2

CALL = 0
REPLY = 1
EVENT = 2
STREAM = 3
CALL_WITH_FDS = 4
REPLY_WITH_FDS = 5
STREAM_HOLE = 6

CALLS = (CALL, CALL_WITH_FDS)
REPLIES = (REPLY, REPLY_WITH_FDS)
WITH_FDS = (CALL_WITH_FDS, REPLY_WITH_FDS)

OK = 0
ERROR = 1
CONTINUE = 2

HEADER_SIZE = 28
"""Bytes of the length word and the header."""

FRAME_MAX = 33554432 + 4
"""VIR_NET_MESSAGE_MAX does not count the length word (virnetmessage.c:virNetMessageDecodeLength)."""

SMALL = 64 << 10
"""Bytes of a message that counts in no :class:`Budget`."""

FDS_MAX = 32

_HEADER = struct.Struct(">IIIiIII")
_UINT = struct.Struct(">I")


class Header(NamedTuple):
    """The header of a message, which follows the length word."""

    program: int
    version: int
    procedure: int
    kind: int
    serial: int
    status: int


class Message(NamedTuple):
    """One message as it was on the wire.

    :ivar frame: the whole message, from the length word on, without the NUL bytes that carry descriptors.
    :ivar fds: descriptors that came with it; the owner of the message closes them.
    """

    header: Header
    frame: bytes | bytearray
    fds: tuple[int, ...] = ()

    @property
    def payload(self) -> bytes:
        """The bytes after the header; in kinds with descriptors they begin with the count of these."""
        return bytes(self.frame[HEADER_SIZE:])

    @property
    def arguments(self) -> bytes:
        """The bytes after the header and the count of descriptors, if there is one."""
        return bytes(self.frame[HEADER_SIZE + 4 * (self.header.kind in WITH_FDS) :])


def pack(header: Header, payload: bytes) -> bytes:
    """Build a frame.

    :raises ProtocolError: when it is too long for libvirt.
    """
    length = HEADER_SIZE + len(payload)
    if length > FRAME_MAX:
        raise _wrong(header, f"{length} bytes, the limit is {FRAME_MAX}")
    return _HEADER.pack(length, *header) + payload


def _wrong(header: Header, what: str) -> ProtocolError:
    return ProtocolError(f"RPC message of program {header.program:#x}, procedure {header.procedure}: {what}")


def _check_length(length: int) -> None:
    if not HEADER_SIZE <= length <= FRAME_MAX:
        raise ProtocolError(f"RPC message: {length} bytes, the limits are {HEADER_SIZE} and {FRAME_MAX}")


class Budget:
    """The bytes of long messages that may have arrived, of all peers together, and wait for the rest of their message.

    :param size: bytes.
    :param whole: the budget of all, when this is one user's share.
    """

    def __init__(self, size: int, whole: Budget | None = None) -> None:
        self._free = size
        self._whole = whole

    def take(self, size: int) -> None:
        """Take bytes; give them back with a negative size.

        :raises ProtocolError: when there are not so many.
        """
        if size > self._free:
            raise ProtocolError(f"RPC message: {size} bytes more, while other clients' long messages wait to be whole")
        if self._whole is not None:
            self._whole.take(size)
        self._free -= size


class Reader:
    """Splits the bytes received from one peer into messages.

    :param budget: for messages longer than :data:`SMALL`; :meth:`close` gives back what it has.

    Call :meth:`next_message` until it returns None before receiving more: the buffer then never exceeds one message and
    the bytes of the last receive.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self._data = bytearray()
        self._start = 0
        self._fds: tuple[int, ...] = ()
        self._budget = budget
        self._taken = 0

    def receive(self, data: bytes | memoryview, fds: Iterable[int] = ()) -> None:
        """Add the result of one ``recvmsg``: bytes and descriptors; the descriptors belong to the last bytes."""
        self._fds += tuple(fds)
        if self._start == len(self._data):
            self._data = bytearray(data)
        else:
            del self._data[: self._start]
            self._data += data
        self._start = 0

    def next_message(self) -> Message | None:
        """Return the next message with its descriptors; None until all of it has arrived.

        :raises ProtocolError: when it is too short or too long, or its descriptors are not the announced ones.
        """
        data, start = self._data, self._start
        available = len(data) - start
        if not available and not self._fds:
            return None
        if available < HEADER_SIZE:
            if available >= 4:
                _check_length(_UINT.unpack_from(data, start)[0])
            self._check_fds(0)
            return None
        length, *fields = _HEADER.unpack_from(data, start)
        if not HEADER_SIZE <= length <= available:
            _check_length(length)
            self._check_fds(0)
            self._hold(available if length > SMALL else 0)
            return None
        header = Header._make(fields)
        message = self._with_fds(header, length) if header.kind in WITH_FDS else Message(header, self._take(length))
        self._hold(0 if message or length <= SMALL else available)
        return message

    def close(self) -> None:
        """Forget the message that has not arrived."""
        self._data, self._start = bytearray(), 0
        self._hold(0)

    def _hold(self, size: int) -> None:
        """Have that much of the budget. What has not arrived counts for nothing: a length is only a word."""
        if self._budget is not None and size != self._taken:
            self._budget.take(size - self._taken)
            self._taken = size

    def take_fds(self) -> tuple[int, ...]:
        """Return the descriptors of the incomplete message, for the caller to close."""
        fds, self._fds = self._fds, ()
        return fds

    def _with_fds(self, header: Header, length: int) -> Message | None:
        """Return the message, after which one NUL byte carries each descriptor (util/virsocket.c:virSocketSendFD)."""
        end = self._start + length
        if length < HEADER_SIZE + _UINT.size:
            raise _wrong(header, "the count of descriptors is missing")
        (count,) = _UINT.unpack_from(self._data, self._start + HEADER_SIZE)
        if count > FDS_MAX:
            raise _wrong(header, f"{count} descriptors, the limit is {FDS_MAX}")
        carriers = self._data[end : end + count]
        if any(carriers):
            raise _wrong(header, "a byte that is not NUL where its descriptors are")
        if len(carriers) < count:
            self._check_fds(len(carriers))
            return None
        if len(self._fds) < count:
            raise _wrong(header, f"{count} descriptors announced, {len(self._fds)} came")
        fds, self._fds = self._fds[:count], self._fds[count:]
        frame = self._take(length)
        self._start += count
        return Message(header, frame, fds)

    def _take(self, length: int) -> bytearray:
        if len(self._data) == length:
            taken, self._data = self._data, bytearray()
            return taken
        self._start += length
        return self._data[self._start - length : self._start]

    def _check_fds(self, carriers: int) -> None:
        """Check that each carrier has brought one descriptor; call this when all bytes are used.

        Descriptors come with the last bytes of a receive (Linux: net/unix/af_unix.c), so none belong to later bytes.
        """
        if len(self._fds) != carriers:
            raise ProtocolError(f"RPC stream: {len(self._fds)} descriptors where {carriers} belong")
