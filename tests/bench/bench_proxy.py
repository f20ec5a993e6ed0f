# SPDX-License-Identifier: Apache-2.0
"""The cost of the proxy: the same work directly and through it, in turns, with the real libvirtd.

Run by hand, as root: ``python -m tests.bench.bench_proxy``. The limits: 1.5 for a small call, 1.1 for bulk, 100 KiB for
an idle client. The cost of the bare proxy is the price of any proxy in Python; what exceeds it is nvdimmd's own.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import libvirt

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.rpc.endpoint import CHUNK
from nvdimm_driver.rpc.intercept import Interceptor
from nvdimm_driver.rpc.proxy import Listener, serve
from nvdimm_driver.xml.hooks import XmlHooks
from nvdimm_driver.xml.rewrite import LibxlXmlHook
from tests.integration.private_libvirtd import PrivateLibvirtd

ROUNDS = 15
DOMAINS = 1000
IDLE = 500
BUSY = 200
VOLUME = 64 << 20
PIECE = 1 << 18
DOMAIN = """\
<domain type='test'><name>guest{0}</name><uuid>11111111-2222-3333-4444-{0:012}</uuid><memory unit='MiB'>64</memory>
<vcpu>2</vcpu><os><type>hvm</type></os><devices>
<disk type='file'><source file='/images/guest{0}.img'/><target dev='vda'/></disk>
<interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>
</devices></domain>
"""
POOL = "<pool type='dir'><name>pool</name><target><path>{}</path></target></pool>"
VOLUME_XML = "<volume><name>volume</name><capacity>{}</capacity></volume>"


def run_proxy(near: str, far: str, kind: str) -> None:
    """Run a proxy until killed: with an empty table, with nvdimmd's (``handled``), or without parsing (``bare``)."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(near)
    listening.listen(1000)
    if kind == "bare":
        asyncio.run(_pass_blindly(listening, far))
    else:
        table = (
            Interceptor(_no_driver, XmlHooks([LibxlXmlHook()], "/device-model")).table() if kind == "handled" else {}
        )
        asyncio.run(_serve(Listener(listening, far, False, table, lambda peer: True)))


def _no_driver() -> XenNvdimmDriver:
    raise AssertionError("no domain here has NVDIMMs")


async def _serve(listener: Listener) -> None:
    await serve([listener], asyncio.Event())


async def _pass_blindly(listening: socket.socket, far: str) -> None:
    """Forward bytes without parsing them: the least that a proxy in Python does."""
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(CHUNK))

    def accept() -> None:
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(far)
        ends = listening.accept()[0], upstream
        loop.add_reader(ends[0], move, *ends)
        loop.add_reader(ends[1], move, *ends[::-1])

    def move(source: socket.socket, target: socket.socket) -> None:
        size, _, _, _ = source.recvmsg_into([buffer], 144, socket.MSG_CMSG_CLOEXEC)
        if size:
            target.sendall(buffer[:size])
        else:
            loop.remove_reader(source)
            target.shutdown(socket.SHUT_WR)

    loop.add_reader(listening, accept)
    await asyncio.Event().wait()


@contextmanager
def proxy(near: Path, far: Path, kind: str) -> Iterator[int]:
    """Start a proxy; yield its pid."""
    with subprocess.Popen([sys.executable, "-m", __spec__.name, str(near), str(far), kind]) as process:
        while not near.exists():
            time.sleep(0.01)
        yield process.pid
        process.kill()


def compare(what: str, work: Callable[[Any], object], **ends: Any) -> None:
    """Print how long the work takes at the first end, and at the others as a multiple of that."""
    rounds: list[list[float]] = []
    for _ in range(ROUNDS + 1):
        rounds.append([])
        for end in ends.values():
            began = time.perf_counter()
            work(end)
            rounds[-1].append(time.perf_counter() - began)
    straight, *others = zip(*rounds[1:], strict=True)
    print(f"{what}: {median(straight) * 1000:.1f} ms straight", flush=True)
    for name, seconds in zip(list(ends)[1:], others, strict=True):
        ratios = sorted(ours / theirs for ours, theirs in zip(seconds, straight, strict=True))
        print(f"    {name:8} {median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def small_calls(connection: Any) -> None:
    """Make 200 small calls."""
    for _ in range(200):
        connection.getLibVersion()


def all_xml(connection: Any) -> None:
    """Get the XML of all domains."""
    domains = connection.listAllDomains()
    assert len(domains) == DOMAINS
    assert sum(len(domain.XMLDesc()) for domain in domains) > 500 * DOMAINS


def upload(connection: Any) -> None:
    """Upload the volume."""
    stream = connection.newStream()
    connection.storagePoolLookupByName("pool").storageVolLookupByName("volume").upload(stream, 0, VOLUME)
    piece = bytes(PIECE)
    sent = 0
    while sent < VOLUME:
        sent += stream.send(piece)
    stream.finish()


def download(connection: Any) -> None:
    """Download the volume."""
    stream = connection.newStream()
    connection.storagePoolLookupByName("pool").storageVolLookupByName("volume").download(stream, 0, VOLUME)
    received = 0
    while piece := stream.recv(PIECE):
        received += len(piece)
    stream.finish()
    assert received == VOLUME


def busy(connections: list[Any]) -> None:
    """Make calls on all connections at once."""

    def calls(connection: Any) -> None:
        for _ in range(10):
            connection.getLibVersion()

    threads = [threading.Thread(target=calls, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def bench(folder: Path, libvirtd: PrivateLibvirtd) -> None:
    """Measure and print everything."""
    paths = {kind: folder / kind for kind in ("through", "handled", "bare")}
    far = libvirtd.socket
    with (
        proxy(paths["through"], far, "") as pid,
        proxy(paths["handled"], far, "handled"),
        proxy(paths["bare"], far, "bare"),
    ):

        def connect(driver: str, path: str, *kinds: str) -> dict[str, Any]:
            ends = {"straight": far} | {kind: paths[kind] for kind in kinds}
            return {kind: libvirt.open(libvirtd.uri(driver, path, end)) for kind, end in ends.items()}

        first = connect("test", "/default", "through")
        before = resident(pid)
        idle = [connect("test", "/default", "through") for _ in range(IDLE)]
        print(f"idle client: {(resident(pid) - before) / IDLE / 1024:.1f} KiB")
        for connection in (connection for ends in (first, *idle) for connection in ends.values()):
            connection.close()
        compare("200 small calls", small_calls, **connect("test", "/default", "through", "bare"))
        node = folder / "node.xml"
        node.write_text(f"<node>{''.join(map(DOMAIN.format, range(DOMAINS)))}</node>")
        compare(f"XML of {DOMAINS} domains", all_xml, **connect("test", str(node), "through", "handled", "bare"))
        storage = connect("storage", "/system", "through", "bare")
        pool = storage["straight"].storagePoolCreateXML(POOL.format(folder))
        pool.createXML(VOLUME_XML.format(VOLUME))
        compare(f"upload of {VOLUME >> 20} MiB", upload, **storage)
        compare(f"download of {VOLUME >> 20} MiB", download, **storage)
        many = [connect("test", "/default", "through", "bare") for _ in range(BUSY)]
        compare(f"{BUSY} busy clients", busy, **{kind: [ends[kind] for ends in many] for kind in many[0]})


def main() -> None:
    """Start libvirtd and measure."""
    with tempfile.TemporaryDirectory() as name, PrivateLibvirtd(Path(name)) as libvirtd:
        bench(Path(name), libvirtd)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_proxy(*sys.argv[1:])
    else:
        main()
