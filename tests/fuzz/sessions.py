# SPDX-License-Identifier: Apache-2.0
"""Sessions of the proxy in which both sides send random bytes: ``python -m tests.fuzz.sessions --cases 200000``."""

from __future__ import annotations

import argparse
import logging
import random
import resource
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.endpoint import close_all
from nvdimm_driver.rpc.session import OWN_SERIALS
from nvdimm_driver.rpc.wire import pack
from tests.unit.rpc_peers import CHANGED, FORGETS, PLAIN, REFUSED, TABLE, TWICE, UPPER, Line, Proxy, call, open_fds

WARM_UP = 2000
"""After so many sessions, a process that does not leak needs no more memory."""


def mutated(random_: random.Random) -> bytes:
    """Return some messages, perhaps with bytes changed or left out, or bytes that are no RPC."""
    if random_.random() < 0.1:
        return random_.randbytes(random_.randrange(1, 100))
    stream = bytearray()
    for _ in range(random_.randrange(1, 6)):
        kind = random_.choice([0, 0, 0, 1, 2, 3, 4, 5, 6, 9])
        header = call(
            random_.choice([PLAIN, UPPER, REFUSED, TWICE, FORGETS, CHANGED]), random_.choice([1, 2, OWN_SERIALS]), kind
        )
        count = struct.pack(">I", random_.choice([0, 0, 1, 32, 33])) if kind in wire.WITH_FDS else b""
        stream += pack(header, count + random_.choice([b"", b"+"]) + random_.randbytes(random_.choice([0, 4, 7, 60])))
    for _ in range(random_.choice([0, 0, 1, 3])):
        stream[random_.randrange(len(stream))] = random_.choice([0, 0, 1, 4, 255])
    if random_.random() < 0.3:
        del stream[random_.randrange(len(stream)) :]
    return bytes(stream)


def send_cut(random_: random.Random, line: Line, stream: bytes, fd: int) -> None:
    """Send a stream in up to four pieces, some with a descriptor. A peer may disconnect."""
    cuts = sorted(random_.sample(range(len(stream) + 1), min(len(stream), random_.randrange(4))))
    with suppress(BrokenPipeError, ConnectionResetError):
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            if random_.random() < 0.1:
                socket.send_fds(line.socket, [stream[start:end] or b"\0"], [fd])
            else:
                line.socket.sendall(stream[start:end])


def received(line: Line) -> bytes:
    """Return everything that comes until the end; close descriptors."""
    data = b""
    with suppress(ConnectionResetError):
        while True:
            piece, fds, _, _ = socket.recv_fds(line.socket, 1 << 16, wire.FDS_MAX)
            close_all(fds)
            if not piece:
                break
            data += piece
    return data


def is_whole(stream: bytes) -> bool:
    """Return True for whole messages, each with a NUL byte for each descriptor that it announces, and nothing else."""
    at = 0
    while at < len(stream):
        if len(stream) - at < wire.HEADER_SIZE:
            return False
        length, *_, kind, _, _ = struct.unpack_from(">IIIiIII", stream, at)
        carriers = struct.unpack_from(">I", stream, at + wire.HEADER_SIZE)[0] if kind in wire.WITH_FDS else 0
        end = at + length + carriers
        if end > len(stream) or any(stream[at + length : end]):
            return False
        at = end
    return True


def session(proxy: Proxy, random_: random.Random, fd: int) -> None:
    """Run one session, and check that it ends and that neither side gets part of a message.

    :raises AssertionError: when one side does.
    :raises TimeoutError: when the session does not end.
    """
    lines = list(proxy.pair())
    with lines[0], lines[1]:
        for line in random_.choices(lines, k=random_.randrange(1, 4)):
            send_cut(random_, line, mutated(random_), fd)
        random_.shuffle(lines)
        for line in lines:
            with suppress(OSError):  # already disconnected
                line.socket.shutdown(socket.SHUT_WR)
            stream = received(line)
            assert is_whole(stream), f"a part of a message: {stream.hex()}"


class Faults(logging.Handler):
    """Collects what the proxy logs above WARNING. A disconnected peer is a warning."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def main(argv: Sequence[str] | None = None) -> int:
    """Run many sessions and print time and memory; return 1 when there was a fault, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    faults = Faults()
    logging.getLogger().addHandler(faults)
    random_ = random.Random(arguments.seed)
    began, memory, fds = time.monotonic(), 0, open_fds()
    with tempfile.TemporaryDirectory() as folder, open("/dev/null") as null:
        with Proxy(Path(folder), TABLE) as proxy:
            for case in range(arguments.cases):
                session(proxy, random_, null.fileno())
                if case == WARM_UP:
                    memory = _peak_kib()
        left = open_fds() - fds - {(str(null.fileno()), "/dev/null")}
    grown = _peak_kib() - memory
    print(f"{arguments.cases} sessions in {time.monotonic() - began:.0f} s, {grown} KiB more than after {WARM_UP}")
    for fault in (*faults.lines, *(f"left open: {fd}" for fd in sorted(left))):
        print(fault)
    return 1 if faults.lines or left else 0


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
