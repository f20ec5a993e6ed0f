# SPDX-License-Identifier: Apache-2.0
"""A guest's write of a label, as a label server keeps it, for the crash walk: its QEMU is a double."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nvdimm_driver.backing import inode
from nvdimm_driver.cmd.label_server import open_areas
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.labels.qemu import SET_LABEL, QemuLabels, failure
from nvdimm_driver.labels.servers import LabelServers
from nvdimm_driver.model import PAGE, GuestLayout, Record
from nvdimm_driver.plugins import ByteRange
from tests.integration.crash_world import LABEL, SIZE, World, X

DOMID = 5
SET_LABEL_DATA = struct.Struct("<IIIII")
"""What a guest asks for: handle, revision, function; offset and length. The data follows."""
HALF = 256
LABEL_AT, NEW_LABEL = PAGE - HALF, b"a label.".ljust(16, b".") * (2 * HALF // 16)
"""Where in the label area the guest writes, and what: the halves are in two pages."""
DONE = struct.pack("<II", 8, 0).ljust(PAGE, b"\0")


class CopiedLabels(QemuLabels):
    """The writer of a guest's labels, whose QEMU only copies: the process has the calls of the driver, and no others.

    :param areas: the label areas in the backings, by slot.
    """

    def __init__(self, record: Record, areas: Mapping[int, ByteRange]) -> None:
        placements = tuple(item.placement for item in record.started)
        super().__init__(GuestLayout(record.ram, 0, 0, placements, dsm="qemu"), areas, ["/bin/true"])

    def shown(self, slot: int) -> bytes:
        """Return the labels as QEMU shows them to the guest."""
        descriptor, start = self._copies[slot]
        return os.pread(descriptor, LABEL, start)

    def _ask(self, page: bytes) -> bytes:
        handle, _, _, offset, length = SET_LABEL_DATA.unpack_from(page)
        descriptor, start = self._copies[handle - 1]
        os.pwrite(descriptor, page[SET_LABEL_DATA.size :][:length], start + offset)
        return DONE


@contextmanager
def taking_stores(world: World, name: str) -> Iterator[None]:
    """Let a running guest's file take stores to its mapping: with DAX, it does so although it is immutable."""
    with open(world.path(name), "rb") as file:
        inode._set_immutable(file.fileno(), False)
        yield
        inode._set_immutable(file.fileno(), True)


def write_labels(world: World, driver: XenNvdimmDriver) -> None:
    """Do what a label server does for a guest that writes a label: what is answered is in the file."""
    record = driver.ledger.find_domain(X)
    assert record
    if driver.ledger.find_ioreq_server(X) is None:
        driver.ledger.record_ioreq_server(X, DOMID, 1)
    areas = open_areas(record, driver.backings)
    counter = LabelServers(world.folder).count_requests(X)
    with taking_stores(world, "x0"):
        labels = CopiedLabels(record, areas)
        before = labels.shown(0)
        request = SET_LABEL_DATA.pack(1, 1, SET_LABEL, LABEL_AT, len(NEW_LABEL)) + NEW_LABEL
        reply = labels.answer(request.ljust(PAGE, b"\0"))
        counter.add(failed=reply == failure())
    assert labels.shown(0) == areas[0].read(0, LABEL), "the guest reads labels that its file has not"
    if reply != DONE:
        raise NvdimmError("the guest was told that its label was not written")
    assert labels.shown(0) == before[:LABEL_AT] + NEW_LABEL + before[LABEL_AT + len(NEW_LABEL) :]


def has_whole_pages(world: World) -> None:
    """Check that a guest whose label server was stopped has each page of its labels as it was, or as it wrote it."""
    content, label = world.content("x0"), SIZE - LABEL + LABEL_AT
    old = b"x0's own bytes.".ljust(32, b".") * (SIZE // 32)
    for at in (0, HALF):
        page = content[label + at : label + at + HALF]
        assert page in (old[:HALF], NEW_LABEL[at : at + HALF]), "a page of the labels is neither old nor new"
    assert content[:label] == old[:label]
    assert content[label + 2 * HALF :] == old[label + 2 * HALF :]


def has_the_label(world: World) -> None:
    """Check that a guest has the label that it wrote, and all else as it was."""
    has_whole_pages(world)
    label = SIZE - LABEL + LABEL_AT
    assert world.content("x0")[label : label + len(NEW_LABEL)] == NEW_LABEL
