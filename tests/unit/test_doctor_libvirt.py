# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_UNIX, socket
from threading import Thread

import pytest

from nvdimm_driver.doctor.finding import Result
from nvdimm_driver.doctor.libvirt import check_libvirt, check_nvdimmd, check_service
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.xdr import Packer, RemoteError, Unpacker

DEVICE_MODEL = "/usr/libexec/xen/bin/nvdimm-device-model"
AUTH_LIST, OPEN, LIB_VERSION, TO_NATIVE = 66, 1, 157, 136


@pytest.mark.parametrize(("enabled", "result"), [(True, Result.PASS), (False, Result.WARN), (None, Result.NOTE)])
def test_the_service(enabled: bool | None, result: Result) -> None:
    assert check_service(enabled).result == result


class Daemon:
    """A daemon for one client: a libvirt that takes ACPI tables of one type, or nvdimmd in front of it."""

    def __init__(self, table_type: str = "", device_model: str = "", refuses: int = 0) -> None:
        self.table_type = table_type
        self.device_model = device_model
        self.refuses = refuses
        self.called: list[int] = []

    def serve(self, listener: socket) -> None:
        client, _ = listener.accept()
        reader = wire.Reader()
        with client:
            while data := client.recv(65536):
                reader.receive(data)
                while message := reader.next_message():
                    client.sendall(self.event() + self.reply(message))

    def event(self) -> bytes:
        return wire.pack(wire.Header(wire.PROGRAM, wire.VERSION, 333, wire.EVENT, 0, wire.OK), b"")

    def reply(self, message: wire.Message) -> bytes:
        header = message.header
        self.called.append(header.procedure)
        status, payload = wire.OK, b""
        if header.procedure == self.refuses:
            status, payload = wire.ERROR, RemoteError(1, 0, "no connection driver available").pack()
        elif header.procedure == LIB_VERSION:
            payload = bytes(Packer().uint64(11_003_000))
        elif header.procedure == TO_NATIVE:
            values = Unpacker(message.payload)
            status, payload = self.native(values.string(), values.string())
        return wire.pack(header._replace(kind=wire.REPLY, status=status), payload)

    def native(self, kind: str, xml: str) -> tuple[int, bytes]:
        assert kind == "xen-xl"
        if "<table" in xml and f"type='{self.table_type}'" not in xml.partition("<acpi>")[2]:
            return wire.ERROR, RemoteError(1, 0, "unknown table type").pack()
        firmware = 'acpi_firmware = "/x"\n' if "<table" in xml else ""
        return wire.OK, bytes(Packer().string(f'{firmware}device_model_override = "{self.device_model}"\n'))


@contextmanager
def serving(daemon: Daemon, folder: Path) -> Iterator[str]:
    with socket(AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        thread = Thread(target=daemon.serve, args=(listener,))
        thread.start()
        yield str(folder / "socket")
        thread.join()


@pytest.mark.parametrize("table_type", ["rawset", "slic"])
def test_the_type_of_tables_that_libvirt_takes(tmp_path: Path, table_type: str) -> None:
    with serving(Daemon(table_type), tmp_path) as path:
        version, table = check_libvirt(path)
    assert (version.result, version.message) == (Result.PASS, "11.3.0, with its Xen driver")
    assert (table.result, f"type='{table_type}'" in table.message) == (Result.NOTE, True)


def test_a_libvirt_that_takes_no_tables(tmp_path: Path) -> None:
    with serving(Daemon(), tmp_path) as path:
        _, table = check_libvirt(path)
    assert (table.result, table.message.startswith("libvirt takes no tables")) == (Result.NOTE, True)


def test_a_libvirt_without_its_xen_driver(tmp_path: Path) -> None:
    with serving(Daemon(refuses=OPEN), tmp_path) as path:
        version, table = check_libvirt(path)
    assert (version.result, table.result) == (Result.FAIL, Result.FAIL)
    assert version.message == f"{path}: no connection driver available"


def test_nvdimmd_is_known_by_what_it_does(tmp_path: Path) -> None:
    daemon = Daemon(device_model=DEVICE_MODEL)
    with serving(daemon, tmp_path) as path:
        assert check_nvdimmd(path, DEVICE_MODEL).result == Result.PASS
    assert daemon.called[:3] == [AUTH_LIST, OPEN, TO_NATIVE]


def test_somebody_else_in_its_place(tmp_path: Path) -> None:
    with serving(Daemon(device_model="/usr/bin/qemu"), tmp_path) as path:
        found = check_nvdimmd(path, DEVICE_MODEL)
    assert found.result == Result.FAIL
    assert "not by nvdimmd" in found.message


def test_nobody_is_there(tmp_path: Path) -> None:
    found = check_nvdimmd(str(tmp_path / "none"), DEVICE_MODEL)
    assert found.result == Result.FAIL
    assert "No such file" in found.message
