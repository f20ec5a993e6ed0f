# SPDX-License-Identifier: Apache-2.0
"""The interface between the proxy and the handlers of calls. Pure: a handler is tested without a socket."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a socket, as the kernel reports it."""

    uid: int
    gid: int
    pid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Context:
    """The client that a handler works for.

    :ivar read_only: the client is on the read-only socket; libvirtd refuses calls that it may not make.
    """

    peer: Peer
    read_only: bool


@dataclass(frozen=True)
class Call:
    """A handler's request: make this call to libvirtd as the client. It gets the reply's payload, or a LibvirtError.

    :ivar payload: the arguments, without a count of descriptors.
    :ivar with_fds: pass on the descriptors that came with the client's call.
    """

    procedure: int
    payload: bytes
    with_fds: bool = False


class Pool(Enum):
    """A kind of work. Each has threads of its own, so that none waits for one that takes longer."""

    LEDGER = "reads or writes the ledger"
    XML = "parses or writes XML that clients send"
    DUMP = "restores XML that libvirt has, for dumpxml"
    HOST = "looks at backings, asks Xen, runs QEMU"
    ZEROS = "writes zeros into backings, or reads what a redefinition gives up of them"


@dataclass(frozen=True)
class Work:
    """A handler's request: run this function in a thread. It gets what the function returns or raises.

    :ivar delay: seconds to wait before, without a thread.
    """

    function: Callable[[], Any]
    pool: Pool = Pool.LEDGER
    delay: float = 0.0


Handler = Callable[[Context, bytes], Generator[Call | Work, Any, bytes]]
"""A generator function: takes a call's arguments, yields its requests, and returns the reply's payload.

Exceptions go to the client: NvdimmError and LibvirtError as they are, all others as an internal error.
It runs to its end even when the client is gone.
"""


def always(arguments: bytes) -> bool:
    """Return True: handle every call."""
    del arguments
    return True


@dataclass(frozen=True)
class Entry:
    """Handling of the calls of one procedure.

    :ivar wants: gets a call's arguments; if it returns False, the call passes unchanged. Cheap, and raises nothing.
    :ivar opens: it opens the connection. Other calls are handled when that has succeeded, and refused before.
    """

    handler: Handler
    wants: Callable[[bytes], bool] = always
    opens: bool = False


@dataclass(frozen=True)
class ReplyEntry:
    """Handling of libvirtd's replies to the calls of one procedure; the calls pass unchanged.

    While the handler of a reply works, nothing else from libvirtd reaches the client or its other handlers.

    :ivar handler: takes the reply's payload, and returns the one that the client gets. It makes no calls.
    :ivar wants: gets the payload; if it returns False, the reply passes unchanged. Cheap, and raises nothing.
    """

    handler: Handler
    wants: Callable[[bytes], bool]


Table = Mapping[int, Entry | ReplyEntry]
"""Entries by procedure number in the remote protocol, program 0x20008086, version 1."""
