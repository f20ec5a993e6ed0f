# SPDX-License-Identifier: Apache-2.0
import base64
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from nvdimm_driver.acpi.qtest import Qtest, read_fw_cfg
from nvdimm_driver.errors import AcpiError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def client(stream: socket.socket, seconds: float = 5.0) -> Qtest:
    return Qtest(stream, seconds)


Pair = tuple[socket.socket, socket.socket]


def test_command_and_result(pair: Pair) -> None:
    pair[1].sendall(b"OK 0x12\nOK\n")
    qtest = client(pair[0])
    assert (qtest.command("inb 0x510"), qtest.command("outb 0x1 0x2")) == ("0x12", "")
    assert pair[1].recv(100) == b"inb 0x510\noutb 0x1 0x2\n"


def test_answer_in_pieces_and_interrupts_between(pair: Pair) -> None:
    def answer() -> None:
        for byte in b"IRQ raise 4\nIRQ lower 4\nOK 0x1\n":
            pair[1].sendall(bytes([byte]))

    thread = threading.Thread(target=answer)
    thread.start()
    assert client(pair[0]).command("inb 0x1") == "0x1"
    thread.join()


def test_memory(pair: Pair) -> None:
    pair[1].sendall(b"OK AQID\nOK\n")
    qtest = client(pair[0])
    assert qtest.read(0x1000, 3) == b"\1\2\3"
    qtest.write(0x2000, b"\1\2\3")
    assert pair[1].recv(100) == b"b64read 0x1000 0x3\nb64write 0x2000 0x3 AQID\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"FAIL Unknown command\n", "with 'FAIL Unknown command'"),
        (b"\n", "with ''"),
        (b"OKAY\n", "with 'OKAY'"),
        (b"\xff\n", "with "),
        (b"OK A\n", "not base64"),
        (b"OK AQ==\n", "3 bytes of memory with 1 bytes"),
    ],
)
def test_bad_answer(pair: Pair, answer: bytes, message: str) -> None:
    pair[1].sendall(answer)
    with pytest.raises(AcpiError, match=message):
        client(pair[0]).read(0, 3)


def test_silence_ends_at_the_deadline(pair: Pair) -> None:
    with pytest.raises(AcpiError, match="did not answer 'clock_step' in time"):
        client(pair[0], 0.05).command("clock_step")


def test_trickle_ends_at_the_deadline(pair: Pair) -> None:
    """A byte now and then does not extend the deadline."""
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.02):
            pair[1].sendall(b"O")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(AcpiError, match="in time"):
            client(pair[0], 0.2).command("clock_step")
    finally:
        stop.set()
        thread.join()


def test_end_of_file(pair: Pair) -> None:
    pair[1].shutdown(socket.SHUT_WR)
    with pytest.raises(AcpiError, match="ended before it answered 'clock_step'"):
        client(pair[0]).command("clock_step")


class FwCfgMachine(threading.Thread):
    """QEMU's end: a machine's memory, and a fw_cfg with DMA reads as in its specification."""

    def __init__(self, stream: socket.socket, items: dict[int, bytes], control: int = 0) -> None:
        super().__init__()
        self._stream = stream
        self._items = items
        self._control = control
        self._memory = bytearray(4 << 20)
        self._do: dict[str, Callable[..., str]] = {"b64read": self._read, "b64write": self._write, "outl": self._dma}

    def run(self) -> None:
        with self._stream.makefile("r", encoding="ascii") as lines:
            for line in lines:
                verb, *arguments = line.split()
                result = self._do[verb](*arguments)
                self._stream.sendall(f"OK {result}".strip().encode() + b"\n")

    def _read(self, address: str, size: str) -> str:
        start = int(address, 16)
        return base64.b64encode(self._memory[start : start + int(size, 16)]).decode()

    def _write(self, address: str, size: str, data: str) -> str:
        decoded = base64.b64decode(data)
        assert len(decoded) == int(size, 16)
        start = int(address, 16)
        self._memory[start : start + len(decoded)] = decoded
        return ""

    def _dma(self, port: str, value: str) -> str:
        assert int(port, 16) == 0x518
        start = int.from_bytes(int(value, 16).to_bytes(4, "little"), "big")
        control, length, address = struct.unpack_from(">IIQ", self._memory, start)
        assert control & 0xFFFF == 0x0A  # select, read
        self._memory[address : address + length] = self._items[control >> 16][:length].ljust(length, b"\0")
        struct.pack_into(">I", self._memory, start, self._control)
        return ""


def directory(*entries: tuple[int, int, bytes]) -> bytes:
    packed = [struct.pack(">IHH56s", size, key, 0, name) for size, key, name in entries]
    return struct.pack(">I", len(entries)) + b"".join(packed)


@pytest.fixture
def machine(pair: Pair) -> Iterator[Callable[..., Qtest]]:
    threads: list[FwCfgMachine] = []

    def start(items: dict[int, bytes], control: int = 0) -> Qtest:
        threads.append(FwCfgMachine(pair[1], items, control))
        threads[0].start()
        return client(pair[0])

    yield start
    pair[0].close()
    threads[0].join()


def test_files_by_prefix(machine: Callable[..., Qtest]) -> None:
    entries = ((3, 0x20, b"etc/acpi/rsdp"), (5, 0x21, b"bootorder"), (70000, 0x22, b"etc/acpi/tables"))
    items = {0: b"QEMU", 0x19: directory(*entries), 0x20: b"abc", 0x22: bytes(range(250)) * 280}
    assert read_fw_cfg(machine(items), "etc/acpi/") == {"etc/acpi/rsdp": b"abc", "etc/acpi/tables": items[0x22]}


@pytest.mark.parametrize(
    ("items", "control", "message"),
    [
        ({0: b"QEMV"}, 0, "signature 'QEMV'"),
        ({0: b"QEMU"}, 1, "did not read item 0x0: control 0x1"),
        ({0: b"QEMU", 0x19: directory((1 << 30, 0x20, b"f"))}, 0, "0x20 has 1 GiB; at most 16 MiB is plausible"),
        ({0: b"QEMU", 0x19: struct.pack(">I", 1 << 30)}, 0, "0x19 has 64.00 GiB; at most 16 MiB is plausible"),
    ],
)
def test_fw_cfg_that_is_wrong(
    machine: Callable[..., Qtest], items: dict[int, bytes], control: int, message: str
) -> None:
    with pytest.raises(AcpiError, match=message):
        read_fw_cfg(machine(items, control), "f")
