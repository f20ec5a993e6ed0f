# SPDX-License-Identifier: Apache-2.0
"""Defines that write zeros for hours keep nobody waiting: nvdimmd, the real libvirtd and its libxl driver."""

from __future__ import annotations

import os
import re
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nvdimm_driver.doctor.libvirt import Connection
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.workers import ZEROS_USER_MAX
from nvdimm_driver.rpc.xdr import LibvirtError, Packer, RemoteError
from nvdimm_driver.xml.document import MAX_PARTS
from tests.integration.bench_host import Host

DEFINES = [f"zeros{number}" for number in range(ZEROS_USER_MAX)]
GOOD = DEFINES[:2]
"""Those that succeed in the end: the file system has no room for all."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    try:
        yield host
    finally:
        with open_gates(host):
            host.libvirtd.close()


class Client:
    """A client that sends calls and does not wait for replies."""

    def __init__(self, host: Host) -> None:
        self.connection = Connection(str(host.libvirtd.folder / "run/libvirt/virtxend-sock"), timeout=3600)
        self._reader = wire.Reader()
        self._serial = 1000

    @property
    def socket(self) -> socket.socket:
        return self.connection._socket

    def send(self, procedure: int, payload: bytes) -> None:
        self._serial += 1
        header = wire.Header(wire.PROGRAM, wire.VERSION, procedure, wire.CALL, self._serial, wire.OK)
        self.socket.sendall(wire.pack(header, payload))

    def answered(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def replies(self, count: int) -> list[wire.Message]:
        found: list[wire.Message] = []
        while len(found) < count:
            while (message := self._reader.next_message()) is None:
                self._reader.receive(self.socket.recv(1 << 16))
            found.append(message)
        return found


def gates(host: Host) -> Path:
    return host.libvirtd.folder / "run/gates"


@contextmanager
def open_gates(host: Host) -> Iterator[None]:
    """Let every define that waits, or comes meanwhile, go on: the good ones succeed, the others fail."""
    with ExitStack() as opened:
        for path in sorted(gates(host).glob("*")):
            gate = opened.enter_context(open(os.open(path, os.O_RDWR), "wb", buffering=0))
            gate.write(b"go" if path.stem in GOOD else b"fail")  # it is there until the define has its turn
        yield


def wait_until_defined(host: Host) -> None:
    while not {*DEFINES} <= {*host.libvirtd.check("list", "--all", "--name").split()}:
        time.sleep(0.1)


def test_zeros_keep_nobody_waiting(host: Host) -> None:
    host.define("db1", 1)
    host.define("db2", 2)
    host.check("undefine", "db2")
    gates(host).mkdir()
    client = Client(host)
    for number, name in enumerate(DEFINES):
        os.mkfifo(gates(host) / f"{name}.img")
        client.send(Procedure.DOMAIN_DEFINE_XML, bytes(Packer().string(host.xml(name, 16 + number).read_text())))
    wait_until_defined(host)

    assert "<memory model='nvdimm'" in host.check("dumpxml", "db1")
    assert "<memory model='nvdimm'" in host.check("dumpxml", DEFINES[-1])
    assert {"db1", *DEFINES} <= {*host.check("list", "--all", "--name").split()}
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    host.check("destroy", "db1")
    host.define("db1", 1)
    host.define("db2", 2)
    assert host.virsh("start", DEFINES[-1]).returncode == 1
    assert "db1" in host.nvdimmctl("list").stdout

    refused = host.virsh("define", host.xml("db3", 3))
    assert f"{ZEROS_USER_MAX} domains of uid 0 are being provisioned, or wait for that" in refused.stderr
    assert "db3" not in host.check("list", "--all", "--name")
    assert not client.answered()
    client.send(Procedure.DOMAIN_DEFINE_XML, bytes(Packer().string(host.xml("db1", 1).read_text())))
    (defined,) = client.replies(1)
    assert defined.header.status == wire.OK

    with open_gates(host):
        assert sorted(reply.header.status for reply in client.replies(ZEROS_USER_MAX)) == [0, 0] + [1] * (
            ZEROS_USER_MAX - 2
        )
    client.socket.close()
    assert {*host.check("list", "--all", "--name").split()} == {"Domain-0", "db1", "db2", *GOOD}
    host.define("db3", 3)


def with_files(host: Host, name: str, number: int, *files: str) -> Path:
    """Return a file with the XML of a domain that has these files of the pool."""
    file = host.xml(name, number)
    one = re.search("<memory model.*?</memory>", file.read_text(), re.DOTALL)
    assert one
    all_of_them = "".join(one[0].replace(f"{name}.img", each) for each in files)
    file.write_text(file.read_text().replace(one[0], all_of_them))
    return file


def test_a_guest_that_is_saved_while_a_define_without_its_nvdimm_writes_zeros_keeps_it(host: Host) -> None:
    """The define asks before it begins if there is a saved guest, and that can be hours before its end."""
    host.check("define", with_files(host, "saved", 9, "kept.img", "more.img"))
    host.check("start", "saved")
    gates(host).mkdir(exist_ok=True)
    gate = gates(host) / "new.img"
    os.mkfifo(gate)
    client = Client(host)
    without = with_files(host, "saved", 9, "kept.img", "new.img").read_text()
    client.send(Procedure.DOMAIN_DEFINE_XML, bytes(Packer().string(without)))
    with gate.open("wb", buffering=0) as zeros:  # when the define has come to it
        host.check("managedsave", "saved")
        zeros.write(b"go")
    (defined,) = client.replies(1)
    assert defined.header.status == wire.OK
    client.socket.close()
    gate.unlink()
    thief = with_files(host, "thief", 10, "more.img")
    assert "belongs to domain saved" in host.virsh("define", thief).stderr
    host.check("start", "saved")
    host.check("destroy", "saved")
    names = {Path(item.spec.path).name for item in host.record("saved").allocations}
    assert names == {"kept.img", "more.img", "new.img"}
    host.check("define", with_files(host, "saved", 9, "kept.img"))  # there is no saved guest any more
    host.check("define", thief)
    for name in ("saved", "thief"):
        host.check("undefine", name)
        assert host.nvdimmctl("release", "--yes", "--delete", "--all", name).returncode == 0


def test_large_xml_is_refused_without_a_word_of_libvirts(host: Host) -> None:
    text = host.xml("large", 4).read_text().replace("<os>", "<a/>" * MAX_PARTS + "<os>")
    with Connection(str(host.libvirtd.folder / "run/libvirt/virtxend-sock"), timeout=3600) as connection:
        for procedure in (Procedure.DOMAIN_DEFINE_XML, Procedure.DOMAIN_CREATE_XML):
            with pytest.raises(LibvirtError) as caught:
                connection.call(procedure, bytes(Packer().string(text).uint32(0)))
            assert "no domain needs that many" in (RemoteError.unpack(caught.value.payload).message or "")
