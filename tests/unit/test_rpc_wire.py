# SPDX-License-Identifier: Apache-2.0
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.errors import ProtocolError
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.wire import Header, Message, Reader, pack

CALL = Header(wire.PROGRAM, wire.VERSION, 11, wire.CALL, 7, wire.OK)
WITH_FDS = CALL._replace(kind=wire.CALL_WITH_FDS)

UINTS = st.integers(0, 0xFFFFFFFF)
HEADERS = st.builds(
    Header,
    UINTS,
    UINTS,
    st.integers(-(1 << 31), (1 << 31) - 1),
    UINTS.filter(lambda kind: kind not in (4, 5)),
    UINTS,
    UINTS,
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[Header, bytes, int]:
    """Draw a header, a payload, and the number of descriptors that come with it."""
    header, payload = draw(HEADERS), draw(st.binary(max_size=100))
    if draw(st.booleans()):
        return header, payload, 0
    number = draw(st.integers(0, wire.FDS_MAX))
    kind = draw(st.sampled_from(wire.WITH_FDS))
    return header._replace(kind=kind), struct.pack(">I", number) + payload, number


class Sender:
    """Delivers a stream of messages as Linux does: a descriptor comes with its NUL, which ends a receive."""

    def __init__(self) -> None:
        self.stream = b""
        self.fds: dict[int, int] = {}
        self.expected: list[Message] = []

    def send(self, header: Header, payload: bytes, number: int = 0) -> None:
        frame = pack(header, payload)
        self.stream += frame
        first = 1000 + len(self.fds)
        for fd in range(first, first + number):
            self.stream += b"\0"
            self.fds[len(self.stream)] = fd
        self.expected.append(Message(header, frame, tuple(range(first, first + number))))

    def deliver(self, reader: Reader, cuts: set[int]) -> list[Message]:
        received: list[Message] = []
        start = 0
        for end in sorted({*cuts, *self.fds, len(self.stream)}):
            reader.receive(self.stream[start:end], [self.fds[end]] if end in self.fds else [])
            received += drain(reader)
            start = end
        return received


def drain(reader: Reader) -> list[Message]:
    return list(iter(reader.next_message, None))


@given(st.lists(messages(), min_size=1, max_size=5), st.data())
def test_messages_arrive_however_the_stream_is_cut(sent: list[tuple[Header, bytes, int]], data: st.DataObject) -> None:
    sender = Sender()
    for header, payload, number in sent:
        sender.send(header, payload, number)
    anywhere = data.draw(st.sets(st.integers(1, len(sender.stream))))
    for cuts in (set[int](), set(range(1, len(sender.stream))), anywhere):
        reader = Reader()
        assert sender.deliver(reader, cuts) == sender.expected
        assert reader.take_fds() == ()


@given(messages(), st.binary(min_size=1, max_size=27))
def test_what_follows_a_message_is_kept(message: tuple[Header, bytes, int], start: bytes) -> None:
    sender = Sender()
    sender.send(*message)
    following = pack(CALL, start)
    sender.stream += following[: len(start)]
    reader = Reader()
    assert sender.deliver(reader, set()) == sender.expected
    reader.receive(following[len(start) :])
    assert drain(reader) == [Message(CALL, following)]


def test_payload_and_arguments() -> None:
    message = Message(CALL, pack(CALL, b"abcd"))
    assert (message.payload, message.arguments) == (b"abcd", b"abcd")
    message = Message(WITH_FDS, pack(WITH_FDS, b"\0\0\0\0abcd"))
    assert (message.payload, message.arguments) == (b"\0\0\0\0abcd", b"abcd")


@pytest.mark.parametrize("length", [0, 27, wire.FRAME_MAX + 1, 0xFFFFFFFF])
def test_a_length_beyond_the_limits_is_refused_as_soon_as_it_is_known(length: int) -> None:
    reader = Reader()
    reader.receive(struct.pack(">I", length))
    with pytest.raises(ProtocolError, match=f"{length} bytes, the limits are 28 and 33554436"):
        reader.next_message()


def test_the_longest_message() -> None:
    frame = pack(CALL, bytes(wire.FRAME_MAX - wire.HEADER_SIZE))
    reader = Reader()
    for start in range(0, len(frame), 1 << 20):
        reader.receive(frame[start : start + (1 << 20)])
        received = drain(reader)
    assert [message.frame == frame for message in received] == [True]
    with pytest.raises(ProtocolError, match="33554437 bytes, the limit is 33554436"):
        pack(CALL, bytes(wire.FRAME_MAX - wire.HEADER_SIZE + 1))


def test_long_messages_of_all_peers_that_have_not_arrived_have_a_budget() -> None:
    """Anybody can connect, and send all of a message but its last byte."""
    frame = pack(CALL, bytes(wire.SMALL))
    budget = wire.Budget(2 * len(frame))
    readers = [Reader(budget) for _ in range(3)]
    for reader in readers[:2]:
        reader.receive(frame[:-1])
        assert drain(reader) == []
    readers[2].receive(frame[:-1])
    with pytest.raises(ProtocolError, match="other clients' long messages wait"):
        drain(readers[2])
    readers[0].receive(frame[-1:])
    assert [message.frame for message in drain(readers[0])] == [frame]
    readers[1].close()
    for reader in (readers[0], readers[2]):
        reader.close()
        reader.receive(frame[:-1])
        assert drain(reader) == []
    budget.take(2)
    with pytest.raises(ProtocolError):
        budget.take(1)


def test_a_message_that_waits_for_its_descriptors_counts() -> None:
    frame = pack(WITH_FDS, bytes([0, 0, 0, 1]) + bytes(wire.SMALL))
    budget = wire.Budget(len(frame))
    waiting, late = Reader(budget), Reader(budget)
    waiting.receive(frame)
    assert drain(waiting) == []
    late.receive(frame)
    with pytest.raises(ProtocolError, match="other clients' long messages wait"):
        drain(late)
    waiting.receive(b"\0", [5])
    assert [message.fds for message in drain(waiting)] == [(5,)]
    late.close()
    late.receive(frame)
    assert drain(late) == []


def test_a_user_has_a_share_of_the_budget() -> None:
    whole = wire.Budget(100)
    one, other = wire.Budget(50, whole), wire.Budget(60, whole)
    one.take(50)
    with pytest.raises(ProtocolError):
        one.take(1)
    other.take(50)
    with pytest.raises(ProtocolError):
        other.take(1)
    one.take(-50)
    other.take(10)


def test_a_length_alone_takes_nothing_from_other_clients() -> None:
    frame = pack(CALL, bytes(wire.SMALL))
    budget = wire.Budget(len(frame))
    reader, announcing = Reader(budget), Reader(budget)
    announcing.receive(frame[:60])
    assert drain(announcing) == []
    reader.receive(frame[:-60])
    assert drain(reader) == []
    reader.receive(frame[-60:])
    assert [message.frame for message in drain(reader)] == [frame]


@pytest.mark.parametrize(
    ("stream", "fds", "message"),
    [
        (pack(WITH_FDS, b""), [], "the count of descriptors is missing"),
        (pack(WITH_FDS, b"\0\0\0\41"), [], "33 descriptors, the limit is 32"),
        (pack(WITH_FDS, b"\0\0\0\1") + b"\1", [5], "not NUL"),
        (pack(WITH_FDS, b"\0\0\0\2") + b"\0\0", [5], "2 descriptors announced, 1 came"),
        (pack(WITH_FDS, b"\0\0\0\2") + b"\0", [5, 6], "2 descriptors where 1 belong"),
        (pack(WITH_FDS, b"\0\0\0\2"), [5], "1 descriptors where 0 belong"),
        (pack(WITH_FDS, b"\0\0\0\1") + b"\0", [5, 6], "1 descriptors where 0 belong"),
        (pack(CALL, b""), [5], "1 descriptors where 0 belong"),
        (pack(CALL, b"abcd")[:-1], [5], "1 descriptors where 0 belong"),
        (pack(CALL, b"abcd")[:3], [5], "1 descriptors where 0 belong"),
        (pack(WITH_FDS, b"\0\0\0\2") + b"\0", [], "0 descriptors where 1 belong"),
    ],
)
def test_descriptors_that_are_not_what_was_announced(stream: bytes, fds: list[int], message: str) -> None:
    reader = Reader()
    reader.receive(stream, fds)
    with pytest.raises(ProtocolError, match=message):
        drain(reader)


def test_descriptors_of_an_incomplete_message_are_handed_over() -> None:
    reader = Reader()
    reader.receive(pack(WITH_FDS, b"\0\0\0\2") + b"\0", [5])
    assert drain(reader) == []
    assert reader.take_fds() == (5,)
    assert reader.take_fds() == ()


@given(st.lists(st.tuples(st.binary(max_size=80), st.lists(st.integers(3, 9), max_size=3))))
def test_any_bytes_are_messages_or_an_error(chunks: list[tuple[bytes, list[int]]]) -> None:
    reader = Reader()
    came: list[int] = []
    handed: list[int] = []
    with suppress(ProtocolError):
        for data, fds in chunks:
            came += fds
            reader.receive(data, fds)
            while message := reader.next_message():
                assert len(message.frame) >= wire.HEADER_SIZE
                handed += message.fds
    assert handed + list(reader.take_fds()) == came
