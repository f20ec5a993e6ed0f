"""What stands between the proxy and the handlers of calls. Pure: a handler is tested without a socket."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a socket, as the kernel says."""

    uid: int
    gid: int
    pid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Context:
    """Whom a handler works for.

    :ivar read_only: the client is on the read-only socket; libvirtd refuses what such a one may not do.
    """

    peer: Peer
    read_only: bool


@dataclass(frozen=True)
class Call:
    """A handler's wish: make this call to libvirtd as the client. It gets the reply's payload, or a LibvirtError.

    :ivar payload: the arguments, without a count of descriptors.
    :ivar with_fds: pass on the descriptors that came with the client's call.
    """

    procedure: int
    payload: bytes
    with_fds: bool = False


@dataclass(frozen=True)
class Work:
    """A handler's wish: run this in a thread. It gets what the function returns or raises."""

    function: Callable[[], Any]


Handler = Callable[[Context, bytes], Generator[Call | Work, Any, bytes]]
"""A generator function: takes a call's arguments, yields its wishes, and returns the reply's payload.

What it raises goes to the client: NvdimmError and LibvirtError as they are, all else as an internal error.
It runs to its end even when the client is gone.
"""


def always(arguments: bytes) -> bool:
    """Want every call."""
    del arguments
    return True


@dataclass(frozen=True)
class Entry:
    """What is done to the calls of one procedure.

    :ivar wants: looks at a call's arguments; the call passes untouched when it gives False. Cheap, and raises nothing.
    """

    handler: Handler
    wants: Callable[[bytes], bool] = always


@dataclass(frozen=True)
class ReplyEntry:
    """What is done to libvirtd's replies to the calls of one procedure; the calls pass as they came.

    While the handler of a reply works, nothing else from libvirtd reaches the client, nor any other handler of its.

    :ivar handler: takes the reply's payload, and returns the one that the client gets. It makes no calls.
    :ivar wants: looks at the payload; the reply passes untouched when it gives False. Cheap, and raises nothing.
    """

    handler: Handler
    wants: Callable[[bytes], bool]


Table = Mapping[int, Entry | ReplyEntry]
"""Entries by the procedure's number in the remote protocol, program 0x20008086, version 1."""
