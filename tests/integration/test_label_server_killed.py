# SPDX-License-Identifier: Apache-2.0
"""A label server that is killed at any step of a request, and what the guest gets from the next one. Real QEMUs answer.

The shared page, the guest's memory, the label areas and the count are doubles that stop the server before each of
their changes, and in the middle of a long one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.cmd.label_server import Port
from nvdimm_driver.guest.p2m import DSM_GFN
from nvdimm_driver.labels.qemu import PORT, QemuLabels, failure
from nvdimm_driver.labels.servers import RequestCounter
from nvdimm_driver.model import PAGE
from nvdimm_driver.xen.ioreq import ANSWERED, CUT_OFF, READY, Slots
from tests.integration.test_dsm_qemu import AREAS, GET, LAYOUT, PLAIN_QEMU, SET
from tests.unit.doubles import MemoryBytes

OLD, NEW = b"L" * 8, b"my label"
AT, OTHER = 512, 3 * PAGE
SUCCESS = 0


class Killed(BaseException):
    """SIGKILL: the process does nothing more."""


class Steps:
    """Counts the changes of a server, and kills it before one of them."""

    def __init__(self, fatal: int) -> None:
        self._left = fatal

    def take(self) -> None:
        self._left -= 1
        if not self._left:
            raise Killed


class Shared(bytearray):
    """Memory that Xen or the guest shares with the server."""

    steps = Steps(0)

    def __setitem__(self, where: Any, value: Any) -> None:
        self.steps.take()
        if len(value) > 8:
            half = where.start or 0, (where.start or 0) + len(value) // 2
            super().__setitem__(slice(*half), value[: len(value) // 2])
            self.steps.take()
        super().__setitem__(where, value)


class Medium(MemoryBytes):
    """A label area behind a cache: what was synced is durable."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.durable = content
        self.steps = Steps(0)

    def _write(self, offset: int, data: bytes) -> None:
        self.steps.take()
        super()._write(offset, data[: len(data) // 2])
        self.steps.take()
        super()._write(offset, data)

    def sync(self) -> None:
        self.steps.take()
        super().sync()
        self.durable = bytes(self.content)


class Counter(RequestCounter):
    """A count on a disk."""

    steps = Steps(0)

    def add(self, *, failed: bool) -> None:
        self.steps.take()
        super().add(failed=failed)


class Guest:
    """A guest that has written a request and waits; its label server may die."""

    def __init__(self, folder: Path, function: int) -> None:
        self.areas = {slot: Medium(OLD * (size // len(OLD))) for slot, size in AREAS.items()}
        self.slots, self.page = Shared(PAGE), Shared(PAGE)
        self.counter = Counter(folder / "count")
        self.ask(function)

    def ask(self, function: int, at: int = AT) -> None:
        request = struct.pack("<IIIII", 1, 1, function, at, len(NEW)) + (NEW if function == SET else b"")
        bytearray.__setitem__(self.page, slice(None), request.ljust(PAGE, b"\0"))
        slot = struct.pack("<QQIIIHBB", PORT, DSM_GFN * PAGE, 0, 4, 9, 0, READY, 0)
        bytearray.__setitem__(self.slots, slice(32), slot)

    def serve(self, *, fatal: int = 0, left_behind: bool = False) -> bool:
        """Serve the request as a new server does; return True if the guest's vCPU is notified.

        :raises Killed: at the step of that number.
        """
        labels = QemuLabels(LAYOUT, self.areas, [PLAIN_QEMU])
        labels.start()
        steps = Steps(fatal)
        self.slots.steps = self.page.steps = self.counter.steps = steps
        for area in self.areas.values():
            area.steps = steps
        try:
            port = Port(self.page, labels, self.counter)
            notified = Slots(self.slots).answer(0, port.on_write, left_behind=left_behind)
            steps.take()  # the notification
        finally:
            for area in self.areas.values():
                area.steps = Steps(0)
            labels.close()
        return notified

    @property
    def state(self) -> int:
        return Slots(self.slots).read(0).state

    @property
    def status(self) -> int:
        return int(struct.unpack_from("<I", self.page, 4)[0])


def walk(folder: Path, function: int) -> Iterator[tuple[Guest, bool]]:
    """Yield a guest for each step at which its server was killed, and whether the answer was begun in its memory."""
    for fatal in range(1, 100):
        guest = Guest(folder, function)
        try:
            guest.serve(fatal=fatal)
        except Killed:
            cut_off = guest.state != ANSWERED and Slots(guest.slots).read(0).data == CUT_OFF
            yield guest, cut_off
        else:
            return


@pytest.mark.parametrize("function", [GET, SET], ids=["get", "set"])
def test_a_request_is_answered_once_or_fails(tmp_path: Path, function: int) -> None:
    cut_off = []
    for guest, is_cut_off in walk(tmp_path, function):
        assert guest.serve(left_behind=True), "the vCPU is notified, by the one server or the other"
        assert guest.state == ANSWERED
        assert guest.status == SUCCESS or is_cut_off
        cut_off.append(is_cut_off)
        if guest.status != SUCCESS:
            assert bytes(guest.page) == failure()
        elif function == GET:
            assert guest.page[8:16] == OLD
        area = guest.areas[0]
        assert area.durable == area.content, "what it may read is durable"
        assert area.content[AT : AT + len(NEW)] in ((NEW,) if function == SET else (OLD,))
        assert area.content[:AT] + area.content[AT + len(NEW) :] == OLD * ((AREAS[0] - len(NEW)) // len(OLD))
        assert guest.areas[2].content == OLD * (AREAS[2] // len(OLD)), "and no other area has changed"
    # the mark; half of the answer and all of it are between the mark and the state
    assert sum(cut_off) == 3
    assert len(cut_off) == {GET: 7, SET: 10}[function]


def test_the_next_request_has_nothing_of_the_last(tmp_path: Path) -> None:
    """Neither of one that was answered, nor of one that was cut off."""
    for guest, _ in walk(tmp_path, SET):
        guest.serve(left_behind=True)
        guest.ask(GET, OTHER)
        assert guest.serve()
        assert (guest.status, guest.page[8:16]) == (SUCCESS, bytearray(OLD))


def test_a_guest_cannot_make_its_request_one_that_was_cut_off(tmp_path: Path) -> None:
    """It writes 1, 2 or 4 bytes at a time; even if it could, only its own request would fail."""
    guest = Guest(tmp_path, SET)
    bytearray.__setitem__(guest.slots, slice(8, 16), CUT_OFF.to_bytes(8, "little"))
    assert guest.serve()
    assert bytes(guest.page) == failure()
    assert guest.areas[0].content[AT : AT + len(NEW)] == OLD
