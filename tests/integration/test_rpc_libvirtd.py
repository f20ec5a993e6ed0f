# SPDX-License-Identifier: Apache-2.0
"""virsh and the real libvirtd with the proxy between them: neither can tell the difference.

Every session runs twice, straight and through the proxy, and is recorded at the client; its output and all messages
must be the same. libvirtd's test driver has domains, networks and events without a hypervisor, its storage driver
streams.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.handler_types import Call, Context, Entry, Table, Work
from nvdimm_driver.rpc.wire import Header, Reader
from tests.integration.private_libvirtd import PrivateLibvirtd
from tests.unit.rpc_peers import ProxyThread
from tests.waiting import HANG_SECONDS, wait_until

DOMAIN = """\
<domain type='test'>
  <name>guest</name>
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <title>Gäste 客</title>
  <memory unit='GiB'>1</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64'>hvm</type></os>
  <devices><disk type='file'><source file='/guest.img'/><target dev='vda'/></disk></devices>
</domain>
"""
POOL = """\
<pool type='dir'>
  <name>pool</name>
  <uuid>11111111-2222-3333-4444-666666666666</uuid>
  <target><path>{folder}</path></target>
</pool>
"""
READING = [
    *("version", "uri", "hostname", "nodeinfo", "capabilities", "sysinfo", "freecell --all", "list --all --title"),
    *("dominfo test", "domid test", "domuuid test", "domstate test --reason", "dumpxml test", "vcpuinfo test"),
    *("domstats", "domblklist test", "domiflist test", "schedinfo test", "vcpucount test", "dominfo 1"),
    *("net-list --all", "net-dumpxml default", "net-info default", "pool-list --all --details", "iface-list --all"),
    *("pool-dumpxml default-pool", "vol-list default-pool", "nodedev-list", "secret-list", "nwfilter-list"),
]
WRITING = [
    *("define {domain}", "list --all --name", "dumpxml guest", "start guest", "domstate guest", "suspend guest"),
    *("domstate guest", "resume guest", "setmem guest 512M", "setvcpus guest 1", "dumpxml guest", "reboot guest"),
    *("attach-disk guest /other.img vdb --config", "detach-disk guest vdb --config", "autostart guest", "desc guest x"),
    *(
        "snapshot-create-as guest first",
        "snapshot-list guest --name",
        "screenshot test {folder}/screen",
        "destroy guest",
    ),
    *("managedsave test", "snapshot-delete guest first", "undefine guest", "create {domain}", "destroy guest"),
    *("dumpxml guest", "define /dev/null", "start test", "migrate test qemu+unix:///x"),
]
STORAGE = [
    *(
        "pool-define {pool}",
        "pool-start pool",
        "vol-create-as pool volume 16M",
        "vol-upload --pool pool volume {input}",
    ),
    *("vol-download --pool pool volume {folder}/output", "vol-dumpxml --pool pool volume"),
    *(
        "vol-download --pool pool volume {folder}/part --offset 5000001 --length 3000003",
        "vol-delete --pool pool volume",
    ),
    *("vol-download --pool pool volume {folder}/output", "pool-destroy pool", "pool-undefine pool"),
]
DOMAIN_GET_INFO, DOMAIN_GET_VCPUS, STORAGE_VOL_GET_XML_DESC, DOMAIN_SNAPSHOT_GET_XML_DESC = 16, 20, 99, 186
EVENTS = 316  # REMOTE_PROC_CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY
WITH_XML = (8, 10, 11, 13, 14, 160, 161, 174, 350)


TIMES = re.compile(r"CPU time: .*|time=\d+|\d{10}\.\d+")


class Recorded(NamedTuple):
    header: Header
    payload: bytes


class Recorder:
    """Stands in front of a socket and records the messages of one connection after the other."""

    def __init__(self, path: Path, upstream: Path) -> None:
        self.path = path
        self.sent: list[Recorded] = []
        self.received: list[Recorded] = []
        self._upstream = upstream
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(HANG_SECONDS)
        self._listening.close()

    def wait_for_reply(self, procedure: int) -> None:
        wait_until(lambda: any(message.header.procedure == procedure for message in self.received), "the reply")

    def _start(self, function: Any, *arguments: object) -> threading.Thread:
        self._threads.append(thread := threading.Thread(target=function, args=arguments))
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            with near, socket.socket(socket.AF_UNIX) as far:
                far.connect(str(self._upstream))
                thread = self._start(self._pass, far, near, self.received)
                self._pass(near, far, self.sent)
                thread.join()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, record: list[Recorded]) -> None:
        reader = Reader()
        while data := source.recv(1 << 20):
            reader.receive(data)
            while message := reader.next_message():
                record.append(Recorded(message.header, message.payload))
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Outcome(NamedTuple):
    """Everything visible of a session."""

    status: int
    stdout: str
    stderr: str
    sent: list[Recorded]
    received: list[Recorded]


def joined(messages: list[Recorded]) -> list[Recorded]:
    """Return the messages with the data of each stream in one piece at the end.

    The size of libvirtd's reads from a file varies, and it may send data before its reply to the call.
    """
    data: dict[Header, bytes] = {}
    others = []
    for header, payload in messages:
        if header.kind == wire.STREAM and header.status == wire.CONTINUE:
            data[header] = data.get(header, b"") + payload
        else:
            others.append(Recorded(header, payload))
    return others + [Recorded(header, payload) for header, payload in data.items()]


def as_it_was(procedure: int) -> Entry:
    """Return an entry whose handler changes nothing."""

    def handler(context: Context, arguments: bytes) -> Generator[Call | Work, Any, bytes]:
        same = yield Work(lambda: arguments)
        answer: bytes = yield Call(procedure, same, with_fds=True)
        return answer

    return Entry(handler)


@pytest.fixture(scope="module")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateLibvirtd]:
    with PrivateLibvirtd(tmp_path_factory.mktemp("libvirtd")) as libvirtd:
        yield libvirtd


class Host:
    """virsh, with a recorder, in front of libvirtd or of a proxy in front of it."""

    def __init__(self, folder: Path, libvirtd: PrivateLibvirtd, upstream: Path, names: dict[str, str]) -> None:
        folder.mkdir()
        self._folder = folder
        self._libvirtd = libvirtd
        self._upstream = upstream
        self._names = names

    def virsh(self, driver: str, path: str, commands: list[str]) -> Outcome:
        with Recorder(self._folder / "recorder", self._upstream) as recorder:
            uri = self._libvirtd.uri(driver, path, recorder.path)
            result = self._run(uri, commands)
        recorder.path.unlink()
        stdout, stderr = (text.replace(uri, "URI") for text in (result.stdout, result.stderr))
        return Outcome(result.returncode, stdout, stderr, joined(recorder.sent), joined(recorder.received))

    def _run(self, uri: str, commands: list[str]) -> subprocess.CompletedProcess[str]:
        script = ";".join(commands).format(**self._names)
        return subprocess.run(["virsh", "-q", "-c", uri, script], capture_output=True, text=True, timeout=HANG_SECONDS)

    def events(self, commands: list[str]) -> str:
        """Return the events that one virsh prints while another runs commands."""
        with Recorder(self._folder / "recorder", self._upstream) as recorder:
            uri = self._libvirtd.uri("test", "/default", recorder.path)
            command = ["virsh", "-c", uri, "event", "--event", "lifecycle", "--loop", "--timeout", "20"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
                recorder.wait_for_reply(EVENTS)
                self._run(self._libvirtd.uri("test", "/default", self._upstream), commands)
                assert listener.stdout
                lines = [listener.stdout.readline() for _ in range(4)]
                listener.terminate()
        recorder.path.unlink()
        return "".join(lines)


Hosts = tuple[Host, Host]


@pytest.fixture(params=[(), WITH_XML], ids=["passed", "handled"])
def hosts(request: pytest.FixtureRequest, tmp_path: Path, libvirtd: PrivateLibvirtd) -> Iterator[Hosts]:
    """Return hosts straight and through the proxy, where calls with domain XML pass or are handled."""
    table: Table = {procedure: as_it_was(procedure) for procedure in request.param}
    names = {name: str(tmp_path / name) for name in ("domain", "pool", "input", "folder")}
    for name in ("folder", "storage"):
        (tmp_path / name).mkdir()
    Path(names["domain"]).write_text(DOMAIN)
    Path(names["pool"]).write_text(POOL.format(folder=tmp_path / "storage"))
    Path(names["input"]).write_bytes(os.urandom(9_999_999))
    with ProxyThread(tmp_path, libvirtd.socket, table) as proxy:
        yield (
            Host(tmp_path / "straight", libvirtd, libvirtd.socket, names),
            Host(tmp_path / "through", libvirtd, proxy.path, names),
        )


def compare(straight: Outcome, through: Outcome, timed: set[int]) -> None:
    """Check that two sessions are the same.

    :param timed: procedures whose replies contain times.
    """
    assert TIMES.sub("TIME", through.stdout).splitlines() == TIMES.sub("TIME", straight.stdout).splitlines()
    assert (through.status, through.stderr) == (straight.status, straight.stderr)
    assert through.sent == straight.sent
    assert [message.header for message in through.received] == [message.header for message in straight.received]
    pairs = zip(through.received, straight.received, strict=True)
    assert {ours.header.procedure for ours, theirs in pairs if ours != theirs} <= timed


def test_a_long_session(hosts: Hosts) -> None:
    straight, through = (host.virsh("test", "/default", READING + WRITING + READING) for host in hosts)
    assert len(straight.received) > 150
    assert "Gäste 客" in straight.stdout
    assert "failed to get domain 'guest'" in straight.stderr
    compare(straight, through, {DOMAIN_GET_INFO, DOMAIN_GET_VCPUS, DOMAIN_SNAPSHOT_GET_XML_DESC})


def test_streams(hosts: Hosts, tmp_path: Path) -> None:
    straight, through = (host.virsh("storage", "/system", STORAGE) for host in hosts)
    assert "no storage vol with matching path" in straight.stderr
    content = (tmp_path / "input").read_bytes() + bytes((16 << 20) - 9_999_999)
    assert (tmp_path / "folder" / "output").read_bytes() == content
    assert (tmp_path / "folder" / "part").read_bytes() == content[5_000_001:8_000_004]
    compare(straight, through, {STORAGE_VOL_GET_XML_DESC})


def test_events(hosts: Hosts) -> None:
    straight, through = (
        host.events(["define {domain}", "start guest", "destroy guest", "undefine guest"]) for host in hosts
    )
    assert through == straight
    assert [line.split(": ")[1] for line in straight.splitlines()] == [
        "Defined Added",
        "Started Booted",
        "Stopped Destroyed",
        "Undefined Removed",
    ]
