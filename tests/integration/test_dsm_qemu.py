# SPDX-License-Identifier: Apache-2.0
"""A real QEMU as label server: its answers, its changes to the label area, and their limits."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvdimm_driver.errors import AcpiError
from nvdimm_driver.labels.qemu import QemuLabels, difference, failure
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, GuestLayout, Placement
from nvdimm_driver.processes import FIRST_UID
from tests.fuzz.labels import run
from tests.unit.doubles import MemoryBytes

XEN_QEMU = "/usr/libexec/xen-qemu-system-i386"
PLAIN_QEMU = "/usr/bin/qemu-system-x86_64"
SIZE, GET, SET = 4, 5, 6
AREAS = {0: 128 * KIB, 2: 129 * KIB}
LAYOUT = GuestLayout(
    GIB,
    4 * GIB,
    1 << 48,
    (
        Placement(0, 68 * GIB, 64 * MIB, AREAS[0]),
        Placement(1, 70 * GIB, 64 * MIB),
        Placement(2, 72 * GIB, 64 * MIB - 132 * KIB, AREAS[2]),
    ),
    dsm="qemu",
)
LARGEST = PAGE - 20  # a request's header has 12 bytes, a label's offset and length 8


class Served:
    """A label server and the areas behind it."""

    def __init__(self, binary: str, kind: type[QemuLabels] = QemuLabels, area: type[MemoryBytes] = MemoryBytes) -> None:
        self.areas = {slot: area(bytes(range(256)) * (size // 256)) for slot, size in AREAS.items()}
        self.labels = kind(LAYOUT, self.areas, [binary])
        self.labels.start()

    def ask(self, handle: int, function: int, payload: bytes = b"", revision: int = 1) -> tuple[int, bytes]:
        """Return the status and the rest of an answer."""
        page = struct.pack("<III", handle, revision, function) + payload
        answer = self.labels.answer(page.ljust(PAGE, b"\0"))
        assert len(answer) == PAGE
        length, status = struct.unpack_from("<II", answer)
        assert 4 < length <= PAGE
        return status, answer[8:length]

    def set(self, handle: int, offset: int, data: bytes) -> int:
        return self.ask(handle, SET, struct.pack("<II", offset, len(data)) + data)[0]

    def get(self, handle: int, offset: int, length: int) -> tuple[int, bytes]:
        return self.ask(handle, GET, struct.pack("<II", offset, length))

    def qemu(self) -> int:
        """Return QEMU's pid: the youngest child of this process."""
        return int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1])


@pytest.fixture(scope="module", params=[XEN_QEMU, PLAIN_QEMU], ids=["xen", "plain"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    found = Served(request.param)
    yield found
    found.labels.close()


def test_sizes_are_those_of_the_areas(served: Served) -> None:
    for slot, size in AREAS.items():
        status, payload = served.ask(slot + 1, SIZE)
        assert (status, struct.unpack("<II", payload)) == (0, (size, LARGEST))


def test_a_guest_reads_what_is_in_the_area(served: Served) -> None:
    for slot, area in served.areas.items():
        for offset in (0, 100, area.size - LARGEST):
            assert served.get(slot + 1, offset, LARGEST) == (0, bytes(area.content[offset : offset + LARGEST]))


def test_what_a_guest_sets_is_in_the_area_and_nowhere_else(served: Served) -> None:
    for slot, area in served.areas.items():
        others = {other: bytes(each.content) for other, each in served.areas.items() if other != slot}
        for offset, data in (
            (0, b"first"),
            (PAGE - 2, b"across"),
            (area.size - 4, b"last"),
            (300, os.urandom(LARGEST)),
        ):
            wanted = bytearray(area.content)
            wanted[offset : offset + len(data)] = data
            area.writes.clear()
            assert served.set(slot + 1, offset, data) == 0
            assert area.content == wanted
            assert sum(length for _, length in area.writes) <= 2 * PAGE
            assert served.get(slot + 1, offset, len(data)) == (0, data)
        assert {other: bytes(served.areas[other].content) for other in others} == others


@pytest.mark.parametrize(("offset", "length"), [(AREAS[0], 1), (AREAS[0] - 1, 2), (0xFFFFFFFF, 2), (0, LARGEST + 1)])
def test_outside_of_an_area_is_nothing(served: Served, offset: int, length: int) -> None:
    before = bytes(served.areas[0].content)
    payload = struct.pack("<II", offset, length)
    assert served.ask(1, GET, payload)[0] == 3
    assert served.ask(1, SET, payload)[0] == 3
    assert served.areas[0].content == before


@pytest.mark.parametrize("function", [GET, SET])
def test_no_bytes_of_a_label_would_kill_qemu(served: Served, function: int) -> None:
    before = served.qemu()
    assert served.ask(1, function, struct.pack("<II", 5, 0))[0] == 3
    assert served.qemu() == before


def test_an_nvdimm_without_labels_and_one_that_is_not_there_have_none(served: Served) -> None:
    for handle in (2, 4, 0xFFFFFFFF):
        assert served.set(handle, 0, b"x") != 0


@settings(max_examples=300, deadline=None)
@given(
    handle=st.one_of(st.integers(0, 5), st.integers(0, (1 << 32) - 1)),
    function=st.one_of(st.integers(0, 8), st.integers(0, (1 << 32) - 1)),
    revision=st.sampled_from([0, 1, 2, 0xFFFFFFFF]),
    numbers=st.lists(st.one_of(st.integers(0, 2 * AREAS[0]), st.integers(0, (1 << 32) - 1)), max_size=4),
)
def test_whatever_is_asked_is_answered_and_reads_back(
    served: Served, handle: int, function: int, revision: int, numbers: list[int]
) -> None:
    before = served.qemu()
    page = struct.pack(f"<III{len(numbers)}I", handle, revision, function, *numbers).ljust(PAGE, b"\xa5")
    served.labels.answer(page)
    assert served.qemu() == before
    for slot, area in served.areas.items():
        assert served.get(slot + 1, 0, LARGEST)[1] == area.content[:LARGEST]


def test_a_killed_qemu_is_replaced_and_nothing_is_lost(served: Served) -> None:
    served.set(1, 10, b"before")
    killed = served.qemu()
    os.kill(killed, signal.SIGKILL)
    assert served.get(1, 10, 6) == (0, b"before")
    assert served.qemu() != killed
    os.kill(served.qemu(), signal.SIGKILL)
    assert served.set(1, 10, b"after!") == 0
    assert served.areas[0].content[10:16] == b"after!"


def test_what_cannot_be_made_durable_fails_and_is_not_read(served: Served) -> None:
    before = bytes(served.areas[0].content[:8])
    served.areas[0].broken = OSError(5, "Input/output error")
    try:
        assert served.set(1, 0, b"8 bytes!") == 4
    finally:
        served.areas[0].broken = None
    assert served.get(1, 0, 8) == (0, before)
    assert served.set(1, 0, b"8 bytes!") == 0
    assert served.areas[0].content[:8] == b"8 bytes!"


class Unsynced(MemoryBytes):
    """A label area whose next syncs fail, after the bytes were stored."""

    failures = 0

    def sync(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")
        super().sync()


@pytest.mark.parametrize(("failures", "status"), [(1, 0), (2, 4)])
def test_labels_that_were_stored_and_not_synced_are_read_as_they_are(failures: int, status: int) -> None:
    served = Served(PLAIN_QEMU, area=Unsynced)
    area = served.areas[0]
    assert isinstance(area, Unsynced)
    try:
        area.failures = failures
        assert served.set(1, 0, b"stored") == status
        assert (area.synced == len(area.writes)) is (status == 0), "success means that they are durable"
        assert served.get(1, 0, 6) == (0, bytes(area.content[:6]))
        assert served.set(1, 2 * PAGE, b"later") == 0
        assert area.synced == len(area.writes)
        assert served.get(1, 0, 6) == (0, bytes(area.content[:6]))
        assert area.content[2 * PAGE : 2 * PAGE + 5] == b"later"
        written = len(area.writes)
        assert served.set(1, 0, b"again!") == 0
        assert area.writes[written:] == [(0, PAGE)], "and the whole area is written once only"
    finally:
        served.labels.close()


class Cached(MemoryBytes):
    """Bytes behind a cache, which lose what was not synced when the power fails."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.durable = content
        self.killed = False

    def sync(self) -> None:
        if self.killed:
            raise KeyboardInterrupt  # the process does nothing more
        super().sync()
        self.durable = bytes(self.content)


def test_labels_that_a_killed_server_wrote_and_did_not_sync_are_durable_when_the_guest_is_told() -> None:
    served = Served(PLAIN_QEMU, area=Cached)
    area = served.areas[0]
    assert isinstance(area, Cached)
    area.killed = True
    with pytest.raises(KeyboardInterrupt):
        served.set(1, 512, b"label")
    served.labels.close()
    area.killed = False
    assert area.content[512:517] == b"label"
    assert area.durable[512:517] != b"label"
    served.labels = QemuLabels(LAYOUT, served.areas, [PLAIN_QEMU])
    try:
        assert served.set(1, 512, b"label") == 0, "the next server gets the same request"
        assert area.durable[512:517] == b"label"
    finally:
        served.labels.close()


class Unanswered(QemuLabels):
    """Loses the answers of QEMU, when it is told to."""

    lost = False

    def _ask(self, page: bytes) -> bytes:
        answer = super()._ask(page)
        if self.lost:
            raise AcpiError("no answer")
        return answer


def test_labels_whose_answer_was_lost_are_neither_read_nor_written_later() -> None:
    served = Served(PLAIN_QEMU, Unanswered)
    try:
        before = bytes(served.areas[0].content[:16])
        served.labels.lost = True  # type: ignore[attr-defined]
        assert served.set(1, 0, b"lost") == 4
        served.labels.lost = False  # type: ignore[attr-defined]
        assert served.get(1, 0, 16) == (0, before)
        assert served.set(1, 8, b"kept") == 0
        assert served.areas[0].content[:16] == before[:8] + b"kept" + before[12:]
    finally:
        served.labels.close()


def test_without_any_qemu_each_request_fails(tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    labels = QemuLabels(LAYOUT, {0: MemoryBytes(bytes(AREAS[0]))}, [str(broken)])
    assert labels.answer(bytes(PAGE)) == failure()
    labels.close()


def test_another_qemu_is_taken_when_the_first_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    labels = QemuLabels(LAYOUT, {0: MemoryBytes(bytes(AREAS[0]))}, [str(broken), XEN_QEMU])
    page = struct.pack("<III", 1, 1, SIZE).ljust(PAGE, b"\0")
    assert struct.unpack_from("<III", labels.answer(page)) == (16, 0, AREAS[0])
    labels.close()


def test_nothing_is_left_behind() -> None:
    descriptors = set(os.listdir("/proc/self/fd"))
    served = Served(XEN_QEMU)
    pid = served.qemu()
    assert os.readlink(f"/proc/{pid}/exe").endswith("qemu-system-i386")
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert (status["NoNewPrivs"], int(status["CapEff"], 16), status["Uid"].split()[0]) == ("1", 0, str(FIRST_UID))
    served.labels.close()
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert not Path(f"/proc/{pid}").exists()


def test_difference_is_in_whole_pages_and_within_the_area() -> None:
    before = bytes(3 * PAGE + 100)
    assert difference(before, before) == range(0)
    for first, last, expected in ((0, 0, range(PAGE)), (PAGE, 3 * PAGE + 99, range(PAGE, len(before)))):
        after = bytearray(before)
        after[first] = after[last] = 1
        assert difference(before, bytes(after)) == expected


def test_thousands_of_hostile_requests() -> None:
    """``python -m tests.fuzz.labels`` sends any number of them."""
    assert run(3000).startswith("3000 requests in")
