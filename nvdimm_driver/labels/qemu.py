# SPDX-License-Identifier: Apache-2.0
"""Labels served by a QEMU: a guest's ``_DSM`` requests go to a QEMU that has the same NVDIMMs and no guest.

QEMU's SSDT writes a request to a page and the page's address to a port, then reads the answer from the page (QEMU:
docs/specs/acpi_nvdimm.rst). This QEMU has a copy of each label area. The driver writes its changes to the backing
before the guest gets the answer. So QEMU needs no access to persistent memory and can harm nothing but labels.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from nvdimm_driver.acpi.machine import DEFAULT_BINARIES, Machine, backend_size, installed
from nvdimm_driver.acpi.qtest import Qtest
from nvdimm_driver.errors import AcpiError, NvdimmError
from nvdimm_driver.model import MIB, PAGE, GuestLayout
from nvdimm_driver.plugins import ByteRange

LOG = logging.getLogger(__name__)

PORT = 0xA18
"""QEMU: include/hw/mem/nvdimm.h:NVDIMM_ACPI_IO_BASE, 4 bytes long (NVDIMM_ACPI_IO_LEN)."""
PORT_SIZE = 4
GET_LABEL, SET_LABEL = 5, 6
INVALID_INPUT, HARDWARE_ERROR = 3, 4
"""NVDIMM DSM Interface Example V1.3, table 3-B."""
_PAGE_OF_QEMU = 16 * MIB
"""Address of the requests in that QEMU's RAM."""
# QEMU: hw/acpi/nvdimm.c:NvdimmDsmIn: handle, revision, function; then NvdimmFuncGetLabelDataIn: offset, length
_REQUEST = struct.Struct("<IIIII")
_ANSWER = struct.Struct("<II")  # NvdimmDsmFuncNoPayloadOut: length of all, status


def failure(status: int = HARDWARE_ERROR) -> bytes:
    """Return the answer page for a function that failed."""
    return _ANSWER.pack(_ANSWER.size, status).ljust(PAGE, b"\0")


class QemuLabels:
    """Answers label requests. Replaces a QEMU that dies or hangs; a request that QEMU cannot answer fails.

    :param layout: the guest's layout.
    :param areas: label areas, by slot.
    :param binaries: QEMUs, tried in order until one starts.
    :param timeout: seconds for the start of a QEMU and for each request.
    :param confined: as for :class:`.Machine`.
    :ivar programs: the paths of those that are installed, without symbolic links.
    """

    def __init__(
        self,
        layout: GuestLayout,
        areas: Mapping[int, ByteRange],
        binaries: Sequence[str] = DEFAULT_BINARIES,
        timeout: float = 10.0,
        *,
        confined: bool = False,
    ) -> None:
        self.programs = [os.path.realpath(path) for path in installed(binaries)]
        self._machines = [Machine(path, confined, timeout) for path in self.programs]
        self._layout = layout
        self._areas = areas
        self._running = ExitStack()
        self._qtest: Qtest | None = None
        self._known: dict[int, bytes] = {}  # by slot: what the backing has
        self._unsynced: set[int] = set()  # slots whose last write may be incomplete or not durable
        self._copies: dict[int, tuple[int, int]] = {}  # by slot: a descriptor, and the label area's offset in it
        for placement in layout.nvdimms:
            if placement.slot in areas:
                self._copies[placement.slot] = self._copy(placement.slot, backend_size(placement))

    def start(self) -> Qtest:
        """Start a QEMU.

        :raises AcpiError: with the stderr of each, when none can be started.
        """
        memory = {slot: descriptor for slot, (descriptor, _) in self._copies.items()}
        failures: list[AcpiError] = []
        for machine in self._machines:
            try:
                self._qtest = self._running.enter_context(machine.run(self._layout, memory))
            except AcpiError as error:
                failures.append(error)
            else:
                return self._qtest
        raise AcpiError(
            "; ".join(failure.message for failure in failures),
            hint="dsm 'aml' needs no QEMU; a label server sees /usr, its QEMU and the libraries beside that, and no "
            "other files of the host",
        )

    def close(self) -> None:
        """End QEMU and discard the copies."""
        self._running.close()
        for descriptor, _ in self._copies.values():
            os.close(descriptor)
        self._copies.clear()

    def answer(self, page: bytes) -> bytes:
        """Answer a request: 4096 bytes in, 4096 bytes out. Labels that it set are durable on return."""
        if kills_qemu(page):
            return failure(INVALID_INPUT)
        for _ in range(2):
            try:
                reply = self._ask(page)
                self._keep(page)
            except (NvdimmError, OSError) as error:
                LOG.error("a label request failed: %s", error)
                self._stop(error)
            else:
                return reply
        return failure()

    def _ask(self, page: bytes) -> bytes:
        qtest = self._qtest or self.start()
        qtest.give_time()
        qtest.write(_PAGE_OF_QEMU, page)
        qtest.outl(PORT, _PAGE_OF_QEMU)
        return qtest.read(_PAGE_OF_QEMU, PAGE)

    def _keep(self, page: bytes) -> None:
        """Write QEMU's changes in its copy to the backing."""
        handle, _, function, *_ = _REQUEST.unpack_from(page)
        slot = handle - 1
        if function != SET_LABEL or slot not in self._copies:
            return
        descriptor, start = self._copies[slot]
        before = self._known[slot]
        after = os.pread(descriptor, len(before), start)
        changed = range(len(after)) if slot in self._unsynced else difference(before, after)
        if not changed:
            return
        self._unsynced.add(slot)
        try:
            self._areas[slot].write(changed.start, after[changed.start : changed.stop])
            self._areas[slot].sync()
        except OSError:
            self._known[slot] = self._areas[slot].read(0, len(after))  # which the guest shall read, too
            raise
        self._unsynced.remove(slot)
        self._known[slot] = after

    def _copy(self, slot: int, size: int) -> tuple[int, int]:
        """Make an anonymous file that ends with a copy of a label area; return its descriptor and the area's offset.

        A server that was killed may have written the area and not synced it, and its guest's request comes again.
        """
        self._areas[slot].sync()
        self._known[slot] = self._areas[slot].read(0, self._areas[slot].size)
        descriptor = os.memfd_create(f"labels-{slot}")
        os.truncate(descriptor, size)
        start = size - len(self._known[slot])
        os.pwrite(descriptor, self._known[slot], start)
        return descriptor, start

    def _stop(self, error: Exception) -> None:
        """End QEMU after an error, and undo in the copies what it changed and the backings do not have."""
        self._qtest = None
        try:
            self._running.__exit__(type(error), error, error.__traceback__)
        except (NvdimmError, OSError) as complaint:
            LOG.error("%s", complaint)
        for slot, (descriptor, start) in self._copies.items():
            os.pwrite(descriptor, self._known[slot], start)


def kills_qemu(page: bytes) -> bool:
    """Return True for a request that would abort QEMU.

    QEMU asserts that there are label bytes to transfer, but the guest chooses their number
    (hw/mem/nvdimm.c:nvdimm_validate_rw_label_data; tried with 7.2).
    """
    _, _, function, _, length = _REQUEST.unpack_from(page)
    return function in (GET_LABEL, SET_LABEL) and length == 0


def difference(before: bytes, after: bytes) -> range:
    """Return the range of bytes from the first to the last changed page; both have the same length."""
    starts = range(0, len(before), PAGE)
    changed = [start for start in starts if before[start : start + PAGE] != after[start : start + PAGE]]
    return range(changed[0], min(changed[-1] + PAGE, len(before))) if changed else range(0)
