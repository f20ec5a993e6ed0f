# SPDX-License-Identifier: Apache-2.0
"""Client of QEMU's qtest protocol, and fw_cfg over it.

qtest (QEMU: softmmu/qtest.c) sends one line of text each way: a command, then ``OK`` with its result. It reads and
writes the memory and ports of a machine whose CPU need not run. fw_cfg (QEMU: docs/specs/fw_cfg) is the device through
which QEMU gives files to its firmware.
"""

from __future__ import annotations

import base64
import binascii
import socket
import struct
import time

from nvdimm_driver.acpi.tables import text
from nvdimm_driver.errors import AcpiError
from nvdimm_driver.sizes import human

_MAX_REPLY = 32 << 20

_DMA_PORT_LOW = 0x518
_DMA_READ, _DMA_SELECT = 0x02, 0x08
_KEY_SIGNATURE, _KEY_DIRECTORY = 0x00, 0x19
_MAX_FILE = 16 << 20
_DESCRIPTOR = 0x100000
"""Address of the DMA descriptor in the machine's RAM, which nothing else uses; the data is one page further."""


class Qtest:
    """One connection to a QEMU.

    :param stream: connected to QEMU's qtest character device; the caller closes it.
    :param timeout: seconds from now in which all answers must arrive; :meth:`give_time` restarts the count.
    """

    def __init__(self, stream: socket.socket, timeout: float) -> None:
        self._stream = stream
        self._timeout = timeout
        self.give_time()
        self._buffer = bytearray()

    def give_time(self) -> None:
        """Restart the timeout."""
        self._deadline = time.monotonic() + self._timeout

    def command(self, line: str) -> str:
        """Send one command and return the text after ``OK`` in the answer, which may be empty.

        :raises AcpiError: when QEMU refuses it, has ended, or misses the deadline.
        """
        try:
            self._stream.settimeout(self._left())
            self._stream.sendall(line.encode("ascii") + b"\n")
            reply = self._line()
            while reply.startswith("IRQ "):  # an interrupt line changed; QEMU can report this at any time
                reply = self._line()
        except TimeoutError as error:
            raise AcpiError(f"QEMU did not answer {_short(line)!r} in time") from error
        except ConnectionError as error:
            raise AcpiError(f"QEMU ended before it answered {_short(line)!r}") from error
        status, _, result = reply.partition(" ")
        if status != "OK":
            raise AcpiError(f"QEMU answered {_short(line)!r} with {reply[:80]!r}")
        return result

    def outl(self, port: int, value: int) -> None:
        self.command(f"outl {port:#x} {value:#x}")

    def read(self, address: int, size: int) -> bytes:
        """Return ``size`` bytes of guest-physical memory.

        :raises AcpiError: as :meth:`command` does, and when the answer has another size.
        """
        result = self.command(f"b64read {address:#x} {size:#x}")
        try:
            data = base64.b64decode(result, validate=True)
        except binascii.Error as error:
            raise AcpiError(f"QEMU answered a read of memory with {result[:80]!r}, not base64") from error
        if len(data) != size:
            raise AcpiError(f"QEMU answered a read of {size} bytes of memory with {len(data)} bytes")
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write guest-physical memory."""
        self.command(f"b64write {address:#x} {len(data):#x} {base64.b64encode(data).decode()}")

    def _line(self) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            self._stream.settimeout(self._left())
            received = self._stream.recv(1 << 18)
            if not received:
                raise ConnectionError("end of file")
            self._buffer += received
            if len(self._buffer) > _MAX_REPLY:
                raise AcpiError(f"QEMU sent more than {human(_MAX_REPLY)} without an end of line")
        line = self._buffer[:end].decode("ascii", errors="replace")
        del self._buffer[: end + 1]
        return line

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def read_fw_cfg(qtest: Qtest, prefix: str) -> dict[str, bytes]:
    """Return every file of fw_cfg whose name starts with ``prefix``, by name.

    :raises AcpiError: when fw_cfg does not follow its specification.
    """
    signature = _read_key(qtest, _KEY_SIGNATURE, 4)
    if signature != b"QEMU":
        raise AcpiError(f"fw_cfg has signature '{text(signature)}', not 'QEMU'")
    (count,) = struct.unpack(">I", _read_key(qtest, _KEY_DIRECTORY, 4))
    directory = _read_key(qtest, _KEY_DIRECTORY, 4 + 64 * count)
    found: dict[str, bytes] = {}
    for size, key, name in struct.iter_unpack(">IH2x56s", directory[4:]):
        path = name.split(b"\0", 1)[0].decode("ascii", errors="replace")
        if path.startswith(prefix):
            found[path] = _read_key(qtest, key, size)
    return found


def _read_key(qtest: Qtest, key: int, size: int) -> bytes:
    """Read an item by DMA; reading a port takes one command per byte."""
    if size > _MAX_FILE:
        raise AcpiError(f"fw_cfg item {key:#x} has {human(size)}; at most {human(_MAX_FILE)} is plausible")
    data = _DESCRIPTOR + 0x1000
    qtest.write(_DESCRIPTOR, struct.pack(">IIQ", key << 16 | _DMA_SELECT | _DMA_READ, size, data))
    # The register is big endian, and an outl little endian. Writing the low half starts the transfer.
    qtest.outl(_DMA_PORT_LOW, int.from_bytes(_DESCRIPTOR.to_bytes(4, "big"), "little"))
    (control,) = struct.unpack(">I", qtest.read(_DESCRIPTOR, 4))
    if control:
        raise AcpiError(f"fw_cfg did not read item {key:#x}: control {control:#x}")
    return qtest.read(data, size)


def _short(line: str) -> str:
    """Return a command without its data."""
    return " ".join(line.split()[:2])[:80]
