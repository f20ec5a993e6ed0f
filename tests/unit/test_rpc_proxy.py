# SPDX-License-Identifier: Apache-2.0
import logging
import os
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from nvdimm_driver.errors import VIR_ERR_CONFIG_UNSUPPORTED
from nvdimm_driver.rpc import wire
from nvdimm_driver.rpc.handler_types import Peer
from nvdimm_driver.rpc.session import BACKLOG_MAX, HANDLERS_MAX, OWN_SERIALS
from nvdimm_driver.rpc.wire import Header, Message, pack
from nvdimm_driver.rpc.xdr import RemoteError
from tests.fuzz.sessions import session
from tests.unit.rpc_peers import (
    BROKEN,
    CHANGED,
    FORGETS,
    GATE,
    LENGTHY,
    OPEN,
    PING,
    PLAIN,
    REFUSED,
    SLOW,
    STUBBORN,
    TABLE,
    TWICE,
    UPPER,
    WAITING,
    WITH_OPEN,
    Line,
    Proxy,
    call,
    open_fds,
    reply_to,
)
from tests.waiting import HANG_SECONDS, wait_until


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    GATE.clear()
    WAITING.clear()
    before = open_fds()
    yield
    assert open_fds() <= before


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    with Proxy(tmp_path, TABLE) as proxy:
        yield proxy


@pytest.fixture
def lines(proxy: Proxy) -> Iterator[tuple[Line, Line]]:
    near, far = proxy.pair()
    with near, far:
        yield near, far


Lines = tuple[Line, Line]


def contents(fd: int) -> bytes:
    """Return the content of a pipe, and close it."""
    with open(fd, "rb") as file:
        return file.read()


def pipes(*texts: bytes) -> list[int]:
    """Return the reading ends of pipes that contain these texts."""
    ends = []
    for text in texts:
        reading, writing = os.pipe()
        os.write(writing, text)
        os.close(writing)
        ends.append(reading)
    return ends


# --- messages that pass ---


@pytest.mark.parametrize(
    "header",
    [
        call(PLAIN, 1),
        call(UPPER, 1)._replace(program=0x20008087),
        call(UPPER, 1)._replace(version=2),
        call(UPPER, 1, wire.STREAM)._replace(status=wire.CONTINUE),
        call(UPPER, 1, wire.STREAM_HOLE),
        call(UPPER, 1, wire.REPLY),
        call(UPPER, 1, 99),
        call(CHANGED, 1),
        PING,
    ],
)
def test_what_is_not_wanted_passes_both_ways(lines: Lines, header: Header) -> None:
    near, far = lines
    for size in (0, 1, 4, 1000, 300_000):
        payload = os.urandom(size)
        assert near.send(header, payload) == far.expect().frame
        assert far.send(header, payload) == near.expect().frame


def test_calls_are_handled_once_a_connection_is_open(tmp_path: Path) -> None:
    """Until then nobody knows which of libvirt's drivers would answer."""
    with ExitStack() as ends:
        proxy = ends.enter_context(Proxy(tmp_path, WITH_OPEN))
        near, far = map(ends.enter_context, proxy.pair())
        near.send(call(UPPER, 1), b"a")
        assert b"connection not open" in near.expect().payload
        near.send(call(OPEN, 2), b"no")
        near.send(call(UPPER, 3), b"a")
        assert near.expect().header == reply_to(call(UPPER, 3), wire.ERROR)
        asked = far.expect()
        far.send(reply_to(asked.header, wire.ERROR), b"refused")
        assert near.expect().header == reply_to(call(OPEN, 2), wire.ERROR)
        near.send(call(UPPER, 4), b"a")
        assert near.expect().header == reply_to(call(UPPER, 4), wire.ERROR)
        near.send(call(OPEN, 5), b"yes")
        asked = far.expect()
        assert asked.payload == b"yes"
        far.send(reply_to(asked.header))
        assert near.expect().header == reply_to(call(OPEN, 5))
        near.send(call(UPPER, 6), b"a")
        assert far.expect().payload == b"A"


def test_a_call_that_is_looked_at_and_not_wanted_passes(lines: Lines) -> None:
    near, far = lines
    assert near.send(call(UPPER, 1), b"-x") == far.expect().frame


def test_a_stream_of_bytes_passes_as_it_is(lines: Lines) -> None:
    """Messages of all sizes, sent in pieces that do not end where they do, arrive as the same stream."""
    near, far = lines
    sizes = [*range(40), 5000, 262120, 1 << 20, 3, 0]
    stream = b"".join(pack(call(PLAIN, serial), os.urandom(size)) for serial, size in enumerate(sizes))
    for sender, receiver in ((near, far), (far, near)):

        def send(line: Line = sender) -> None:
            for start in range(0, len(stream), 9973):
                line.socket.sendall(stream[start : start + 9973])

        thread = threading.Thread(target=send)
        thread.start()
        assert b"".join(receiver.expect().frame for _ in sizes) == stream
        thread.join()


@pytest.mark.parametrize("number", [0, 1, 2, wire.FDS_MAX])
def test_descriptors_pass_both_ways(lines: Lines, number: int) -> None:
    texts = [b"%d" % text for text in range(number)]
    for (sender, receiver), kind in ((lines, wire.CALL_WITH_FDS), (lines[::-1], wire.REPLY_WITH_FDS)):
        fds = pipes(*texts)
        frames = [sender.send(call(PLAIN, 1)), sender.send(call(PLAIN, 2, kind), b"abcd", fds), sender.send(call(3, 3))]
        for fd in fds:
            os.close(fd)
        received = [receiver.expect() for _ in frames]
        assert [message.frame for message in received] == frames
        assert [len(message.fds) for message in received] == [0, number, 0]
        assert [contents(fd) for fd in received[1].fds] == texts


def test_the_longest_message_passes(lines: Lines) -> None:
    near, far = lines
    frame = pack(call(PLAIN, 1), bytes(wire.FRAME_MAX - wire.HEADER_SIZE))
    thread = threading.Thread(target=near.socket.sendall, args=(frame,))
    thread.start()
    assert far.expect().frame == frame
    thread.join()


# --- handlers ---


def test_a_handler_rewrites_both_ways(lines: Lines) -> None:
    near, far = lines
    near.send(call(UPPER, 5), b"abcd")
    asked = far.expect()
    assert asked.header == call(UPPER, OWN_SERIALS)
    assert asked.payload == b"ABCD"
    far.send(reply_to(asked.header), b"1234")
    assert near.expect() == Message(reply_to(call(UPPER, 5)), pack(reply_to(call(UPPER, 5)), b"4321"))


def test_libvirtds_error_goes_to_the_client_as_it_was(lines: Lines) -> None:
    near, far = lines
    near.send(call(UPPER, 5), b"abcd")
    far.send(reply_to(far.expect().header, wire.ERROR), b"an error")
    assert near.expect().frame == pack(reply_to(call(UPPER, 5), wire.ERROR), b"an error")


def test_a_handler_can_go_on_after_libvirtds_error(lines: Lines) -> None:
    near, far = lines
    near.send(call(TWICE, 5))
    far.send(reply_to(far.expect().header, wire.ERROR), b"1234")
    asked = far.expect()
    assert asked.payload == b"error 1234"
    far.send(reply_to(asked.header))
    assert near.expect().payload == b"error 1234"


def test_a_refusal_goes_to_the_client(lines: Lines) -> None:
    near, _ = lines
    near.send(call(REFUSED, 5))
    answer = near.expect()
    assert answer.header == reply_to(call(REFUSED, 5), wire.ERROR)
    error = RemoteError.unpack(answer.payload)
    assert (error.code, error.level) == (VIR_ERR_CONFIG_UNSUPPORTED, 2)
    assert error.message == f"uid {os.getuid()} cannot (do not)"
    near.send(call(REFUSED, 7), b"\0" * (5 << 20))
    quoted = RemoteError.unpack(near.expect().payload).message
    said = f"uid {os.getuid()} cannot"
    assert quoted == said + r"\x00" * (65536 - len(said))
    near.send(call(REFUSED, 8), b"\x1b[2K")
    assert RemoteError.unpack(near.expect().payload).message == rf"{said}\x1b[2K (do not)", "a terminal would obey it"
    near.send(call(REFUSED, 6), b"libvirt")
    assert near.expect().frame == pack(reply_to(call(REFUSED, 6), wire.ERROR), b"as it was")


@pytest.mark.parametrize("procedure", [REFUSED, STUBBORN])
def test_what_is_too_long_for_libvirt_is_refused(lines: Lines, procedure: int) -> None:
    near, far = lines
    near.send(call(procedure, 5), b"long")
    assert "the limit is 33554436" in str(RemoteError.unpack(near.expect().payload).message)
    near.send(call(PLAIN, 6))
    assert far.expect().header.serial == 6


@pytest.mark.parametrize("arguments", [b"", b"abcd"])
def test_a_handler_that_fails_is_logged(lines: Lines, arguments: bytes, caplog: pytest.LogCaptureFixture) -> None:
    near, _ = lines
    near.send(call(BROKEN, 5), arguments)
    answer = near.expect()
    assert answer.header == reply_to(call(BROKEN, 5), wire.ERROR)
    assert RemoteError.unpack(answer.payload).message == "internal error: nvdimmd failed, see its log for the reason"
    assert f"procedure {BROKEN}, called by uid {os.getuid()}, pid {os.getpid()}" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_reply_is_changed_and_its_call_passes(lines: Lines) -> None:
    near, far = lines
    sent = near.send(call(CHANGED, 1), b"+call")
    assert far.expect().frame == sent
    far.send(reply_to(call(CHANGED, 1)), b"+reply")
    changed = near.expect()
    assert (changed.header, changed.payload) == (reply_to(call(CHANGED, 1)), b"ylper+")


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (reply_to(call(CHANGED, 1)), b"-reply"),
        (reply_to(call(CHANGED, 1), wire.ERROR), b"+reply"),
        (call(CHANGED, 1, wire.EVENT), b"+reply"),
        (reply_to(call(CHANGED, 1))._replace(program=0x20008087), b"+reply"),
    ],
)
def test_a_reply_that_is_not_wanted_passes(lines: Lines, header: Header, payload: bytes) -> None:
    near, far = lines
    assert far.send(header, payload) == near.expect().frame


def test_what_is_wrong_with_a_reply_goes_to_the_client(lines: Lines) -> None:
    near, far = lines
    far.send(reply_to(call(CHANGED, 1)), b"+unsupported")
    refusal = near.expect()
    assert refusal.header == reply_to(call(CHANGED, 1), wire.ERROR)
    assert RemoteError.unpack(refusal.payload).message == "not that"


def test_replies_stay_in_order_while_one_is_changed(lines: Lines) -> None:
    near, far = lines
    far.send(reply_to(call(CHANGED, 1)), b"+wait")
    later = [far.send(reply_to(call(PLAIN, serial)), os.urandom(3000)) for serial in range(2, 5)]
    assert near.send(call(PLAIN, 5)) == far.expect().frame, "calls pass meanwhile"
    near.socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        near.receive()
    near.socket.settimeout(HANG_SECONDS)
    GATE.set()
    assert near.expect().payload == b"tiaw+"
    assert [near.expect().frame for _ in later] == later


@pytest.mark.parametrize("goes", [0, 1])
def test_one_side_goes_while_a_reply_is_changed(lines: Lines, goes: int) -> None:
    """The client still gets its reply; without a client, it is dropped."""
    far = lines[1]
    far.send(reply_to(call(CHANGED, 1)), b"+wait")
    assert WAITING.wait(HANG_SECONDS)
    lines[goes].socket.close()
    time.sleep(0.05)
    GATE.set()
    rest = lines[1 - goes].receive()
    assert (rest.payload if rest else None) == (b"tiaw+" if goes else None)


def test_others_pass_while_a_handler_works(lines: Lines) -> None:
    near, far = lines
    near.send(call(SLOW, 1))
    far.send(reply_to(far.expect().header))
    near.send(call(UPPER, 2), b"abcd")
    asked = far.expect()
    near.send(call(PLAIN, 3))
    far.send(reply_to(far.expect().header))
    assert near.expect().header.serial == 3
    far.send(reply_to(asked.header), b"1234")
    assert near.expect().header.serial == 2
    GATE.set()
    asked = far.expect()
    assert asked.payload == b"1"
    far.send(reply_to(asked.header))
    assert near.expect().frame == pack(reply_to(call(SLOW, 1)), b"done")


def test_replies_find_their_handlers_in_any_order(lines: Lines) -> None:
    near, far = lines
    for serial in range(HANDLERS_MAX):
        near.send(call(UPPER, serial), b"%04d" % serial)
    asked = [far.expect() for _ in range(HANDLERS_MAX)]
    assert len({message.header.serial for message in asked}) == HANDLERS_MAX
    random.Random(1).shuffle(asked)
    for message in asked:
        far.send(reply_to(message.header), message.payload[::-1])
    answers = [near.expect() for _ in asked]
    assert all(answer.payload == b"%04d" % answer.header.serial for answer in answers)
    assert {answer.header.serial for answer in answers} == set(range(HANDLERS_MAX))


def test_one_handler_too_many_waits_and_lets_others_pass_before_it(lines: Lines) -> None:
    near, far = lines
    for serial in range(HANDLERS_MAX):
        near.send(call(UPPER, serial), b"%04d" % serial)
    near.send(call(PLAIN, 100))
    near.send(call(UPPER, 101), b"last")
    near.send(call(PLAIN, 102))
    asked = [far.expect() for _ in range(HANDLERS_MAX + 1)]
    assert asked[-1].header.serial == 100
    far.socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        far.receive()
    far.socket.settimeout(HANG_SECONDS)
    far.send(reply_to(asked[0].header))
    assert far.expect().payload == b"LAST"
    assert far.expect().header.serial == 102


def test_descriptors_go_with_the_handlers_call(lines: Lines) -> None:
    near, far = lines
    fds = pipes(b"x", b"y")
    near.send(call(UPPER, 5, wire.CALL_WITH_FDS), b"abcd", fds)
    asked = far.expect()
    assert asked.header == call(UPPER, OWN_SERIALS, wire.CALL_WITH_FDS)
    assert (asked.arguments, [contents(fd) for fd in asked.fds]) == (b"ABCD", [b"x", b"y"])
    far.send(reply_to(asked.header)._replace(kind=wire.REPLY_WITH_FDS), b"1234", fds)
    assert near.expect() == Message(reply_to(call(UPPER, 5)), pack(reply_to(call(UPPER, 5)), b"4321"))
    near.send(call(FORGETS, 6, wire.CALL_WITH_FDS), b"abcd", fds)
    asked = far.expect()
    assert (asked.header.kind, asked.payload, asked.fds) == (wire.CALL, b"abcd", ())
    far.send(reply_to(asked.header))
    assert near.expect().header.serial == 6
    for fd in fds:
        os.close(fd)


# --- clients that do not read ---


def test_a_handler_goes_on_though_its_client_does_not_read(lines: Lines) -> None:
    """It may hold the lock of a domain, which others need."""
    near, far = lines
    near.send(call(TWICE, 1))
    asked = far.expect()
    events = [far.send(call(PLAIN, 0, wire.EVENT), bytes(300_000)) for _ in range(40)]
    far.send(reply_to(asked.header), b"a")
    asked = far.expect()
    far.send(reply_to(asked.header))
    assert [near.expect().frame for _ in events] == events
    assert near.expect().header == reply_to(call(TWICE, 1))


@pytest.mark.parametrize("procedure", [PLAIN, CHANGED])
def test_a_client_that_never_reads_is_disconnected_and_its_handler_goes_on(
    lines: Lines, procedure: int, caplog: pytest.LogCaptureFixture
) -> None:
    near, far = lines
    near.send(call(TWICE, 1))
    asked = far.expect()
    for _ in range(2 * BACKLOG_MAX // (1 << 20)):
        far.send(call(procedure, 5, wire.REPLY), b"+" + bytes(1 << 20))
    assert ping(far) == PING._replace(procedure=wire.KEEPALIVE_PONG)
    assert "disconnected, it reads no replies" in caplog.text
    far.send(reply_to(asked.header), b"a")
    far.send(reply_to(far.expect().header))
    assert far.receive() is None


# --- disconnects ---


def ping(far: Line) -> Header:
    """Return the answer to a ping; one that arrives before the proxy knows that its client is gone is lost."""
    far.socket.settimeout(1)
    for _ in range(int(HANG_SECONDS)):
        far.send(PING)
        with suppress(TimeoutError):
            return far.expect().header
    raise TimeoutError


def test_a_handler_runs_to_its_end_when_its_client_goes(lines: Lines) -> None:
    near, far = lines
    near.send(call(SLOW, 1))
    far.send(reply_to(far.expect().header))
    near.socket.close()
    far.send(call(PLAIN, 0, wire.EVENT), b"nobody is there")
    assert ping(far) == PING._replace(procedure=wire.KEEPALIVE_PONG)
    GATE.set()
    asked = far.expect()
    assert asked.payload == b"1"
    far.send(reply_to(asked.header))
    assert far.receive() is None


def test_what_a_client_sent_before_it_went_arrives(lines: Lines) -> None:
    near, far = lines
    near.send(call(UPPER, 1), b"abcd")
    sent = near.send(call(PLAIN, 2))
    near.socket.close()
    asked = far.expect()
    assert asked.payload == b"ABCD"
    assert far.expect().frame == sent
    far.send(reply_to(asked.header))
    assert far.receive() is None


def test_what_libvirtd_sent_before_it_went_arrives(lines: Lines) -> None:
    near, far = lines
    sent = [far.send(call(PLAIN, serial, wire.EVENT), bytes(50_000)) for serial in range(4)]
    far.socket.close()
    assert [near.expect().frame for _ in sent] == sent
    assert near.receive() is None


def test_handlers_that_wait_for_libvirtd_are_told_when_it_goes(lines: Lines) -> None:
    near, far = lines
    near.send(call(UPPER, 1), b"abcd")
    near.send(call(TWICE, 2))
    for _ in range(2):
        far.expect()
    far.socket.close()
    errors = [RemoteError.unpack(near.expect().payload).message for _ in range(2)]
    assert errors == ["libvirtd closed the connection"] * 2
    assert near.receive() is None


def test_what_handlers_say_then_arrives_though_the_client_is_slow(lines: Lines) -> None:
    near, far = lines
    near.send(call(LENGTHY, 1))
    far.expect()
    far.socket.close()
    time.sleep(0.05)
    assert near.expect().payload == bytes(8 << 20)
    assert near.receive() is None


def test_a_handler_at_work_goes_on_when_libvirtd_goes(proxy: Proxy) -> None:
    near, far = proxy.pair()
    with near, far:
        near.send(call(SLOW, 1))
        far.send(reply_to(far.expect().header))
        far.socket.close()
        assert near.receive() is None
    GATE.set()


def test_stopping_waits_for_handlers(proxy: Proxy) -> None:
    near, far = proxy.pair()
    idle_near, idle_far = proxy.pair()
    with near, far, idle_near, idle_far:
        near.send(call(UPPER, 1), b"abcd")
        asked = far.expect()
        proxy.stop()
        assert near.receive() is None
        assert idle_far.receive() is None
        far.send(reply_to(asked.header))
        assert far.receive() is None


def test_stopping_waits_for_a_slow_libvirtd(proxy: Proxy) -> None:
    near, far = proxy.pair()
    with near, far:
        sent = near.send(call(PLAIN, 1), bytes(8 << 20))
        proxy.stop()
        assert near.receive() is None
        assert far.expect().frame == sent
        assert far.receive() is None


def test_libvirtd_is_not_there(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.upstream.close()
    with proxy.client() as near:
        assert near.receive() is None
    assert f"client with uid {os.getuid()}, pid {os.getpid()}: " in caplog.text
    assert "Connection refused" in caplog.text


def test_libvirtds_queue_of_connections_is_full_for_a_while(proxy: Proxy) -> None:
    proxy.upstream.listen(0)  # holds one connection
    clients = [proxy.client() for _ in range(3)]
    for number, near in enumerate(clients):
        near.send(call(PLAIN, number))
    for _ in clients:
        with Line(proxy.upstream.accept()[0]) as far:
            number = far.expect().header.serial
            far.send(reply_to(call(PLAIN, number)))
            assert clients[number].expect().header.serial == number
        clients[number].socket.close()


def test_a_client_that_waits_for_libvirtd_is_disconnected_when_nvdimmd_stops(tmp_path: Path) -> None:
    attended = threading.Event()

    def allowed(peer: Peer) -> bool:
        attended.set()
        return True

    with Proxy(tmp_path, TABLE, allowed) as proxy, socket.socket(socket.AF_UNIX) as other:
        proxy.upstream.listen(0)
        other.connect(proxy.upstream.getsockname())  # the queue is full
        with proxy.client() as near:
            assert attended.wait(HANG_SECONDS)
            proxy.stop()
            proxy.upstream.accept()[0].close()
            with Line(proxy.upstream.accept()[0]) as far:
                assert far.receive() is None
            assert near.receive() is None


def test_a_cancelled_server_leaves_nothing_open(tmp_path: Path) -> None:
    with Proxy(tmp_path, TABLE) as proxy:
        near, far = proxy.pair()
        with near, far:
            near.send(call(UPPER, 1), b"abcd")
            far.expect()
            proxy.cancel()
            assert near.receive() is None
            assert far.receive() is None


def test_who_may_not_is_disconnected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peers: list[Peer] = []

    def nobody(peer: Peer) -> bool:
        peers.append(peer)
        return False

    with Proxy(tmp_path, TABLE, nobody) as proxy, proxy.client() as near:
        assert near.receive() is None
    assert peers == [Peer(os.getuid(), os.getgid(), os.getpid(), tuple(os.getgroups()))]
    assert "may not use this socket" in caplog.text


# --- invalid RPC ---


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "1195725856 bytes, the limits are"),
        (b"\0\0\0\33", "27 bytes, the limits are"),
        (pack(call(PLAIN, OWN_SERIALS), b""), "serial 0xf0000000: it is reserved for the proxy"),
        (pack(call(UPPER, 0xFFFFFFFF), b""), "serial 0xffffffff: it is reserved for the proxy"),
        (pack(call(UPPER, 1, wire.CALL_WITH_FDS), b"\0\0\0\41"), "33 descriptors"),
    ],
)
def test_a_client_that_sends_no_rpc_is_disconnected(
    proxy: Proxy, stream: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    near, far = proxy.pair()
    other_near, other_far = proxy.pair()
    with near, far, other_near, other_far:
        sent = near.send(call(PLAIN, 1))
        near.socket.sendall(stream)
        assert near.receive() is None
        assert far.expect().frame == sent
        assert far.receive() is None
        assert other_near.send(call(PLAIN, 1)) == other_far.expect().frame
    assert f"client with uid {os.getuid()}, pid {os.getpid()}: disconnected, the client sent: RPC " in caplog.text
    assert reason in caplog.text


def test_libvirtd_that_sends_no_rpc_is_disconnected(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    near, far = lines
    far.send(reply_to(call(PLAIN, OWN_SERIALS)))
    assert near.receive() is None
    assert far.receive() is None
    assert "libvirtd sent: RPC reply with serial 0xf0000000: no call has this serial" in caplog.text


@pytest.mark.parametrize(("number", "passes"), [(1, True), (wire.FDS_MAX, True), (wire.FDS_MAX + 8, False)])
def test_descriptors_that_nobody_announced(lines: Lines, number: int, passes: bool) -> None:
    near, far = lines
    fds = pipes(*[b""] * number)
    socket.send_fds(near.socket, [pack(call(PLAIN, 1), b"")], fds)
    assert near.receive() is None
    assert [message.header.serial for message in iter(far.receive, None)] == [1] * passes
    for fd in fds:
        os.close(fd)


def test_descriptors_of_one_who_goes_are_closed(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    near, far = lines
    fds = pipes(b"")
    near.socket.sendall(pack(call(PLAIN, 1, wire.CALL_WITH_FDS), b"\0\0\0\2"))
    socket.send_fds(near.socket, [b"\0"], fds)
    near.socket.close()
    assert far.receive() is None
    assert not caplog.records
    os.close(fds[0])


def test_descriptors_that_wait_to_be_written_are_closed(lines: Lines) -> None:
    near, far = lines
    fds = pipes(b"", b"")
    number = len(open_fds())
    far.send(call(PLAIN, 1, wire.REPLY_WITH_FDS), bytes(8 << 20), fds)
    wait_until(lambda: len(open_fds()) == number + len(fds))
    near.socket.close()
    assert far.receive() is None
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("cancelled", [True, False])
def test_descriptors_of_a_call_that_waits_are_closed(proxy: Proxy, cancelled: bool) -> None:
    near, far = proxy.pair()
    fds = pipes(b"")
    with near, far:
        for serial in range(HANDLERS_MAX + 1):
            near.send(call(UPPER, serial, wire.CALL_WITH_FDS), b"", fds)
        for fd in fds + [fd for _ in range(HANDLERS_MAX) for fd in far.expect().fds]:
            os.close(fd)
        if cancelled:
            proxy.cancel()
        else:
            far.socket.shutdown(socket.SHUT_RDWR)
        while near.receive():
            pass


# --- limits ---


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_slow_reader_stops_its_writer(lines: Lines, reverse: bool) -> None:
    sender, receiver = lines[::-1] if reverse else lines
    frame = pack(call(PLAIN, 1, wire.STREAM), bytes(1 << 18))
    sender.socket.settimeout(0.1)
    before = resident()
    sent = 0
    with suppress(TimeoutError):
        while sent < 400 << 20:
            sent += sender.socket.send(frame[sent % len(frame) :])
    assert sent < 4 << 20
    assert resident() - before < 8 << 20
    whole, rest = divmod(sent, len(frame))
    sender.socket.settimeout(HANG_SECONDS)
    thread = threading.Thread(target=sender.socket.sendall, args=(frame[rest:] if rest else b"",))
    thread.start()
    assert all(receiver.expect().frame == frame for _ in range(whole + bool(rest)))
    thread.join()


def test_one_who_reads_no_replies_gets_no_more_handlers(lines: Lines) -> None:
    near, _ = lines
    near.socket.settimeout(0.2)
    sent = 0
    with suppress(TimeoutError):
        while sent < 100_000:
            near.send(call(REFUSED, sent))
            sent += 1
    assert sent < 10_000
    near.socket.settimeout(HANG_SECONDS)
    near.socket.shutdown(socket.SHUT_WR)
    assert [near.expect().header.serial for _ in range(100)] == list(range(100))


def test_many_clients(proxy: Proxy) -> None:
    pairs = [proxy.pair() for _ in range(150)]
    for number, (near, _) in enumerate(pairs):
        near.send(call(UPPER, number), b"%04d" % number)
    for _, far in pairs:
        asked = far.expect()
        far.send(reply_to(asked.header), asked.payload[::-1])
    for number, (near, far) in enumerate(pairs):
        assert near.expect().payload == b"%04d" % number
        near.socket.close()
        assert far.receive() is None
        far.socket.close()


def test_no_descriptors_left_is_not_a_busy_loop(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = socket.socket(socket.AF_UNIX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(fd) for fd, _ in open_fds()) + 1, hard))
    try:
        filled = []
        with suppress(OSError):
            while True:
                filled.append(os.dup(0))
        waiting.connect(str(proxy.path))
        wait_until(lambda: "cannot accept clients, next try in a second" in caplog.text)
        time.sleep(0.2)
        for fd in filled:
            os.close(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with Line(waiting) as near, Line(proxy.upstream.accept()[0]) as far:
        assert near.send(call(PLAIN, 1)) == far.expect().frame
    assert caplog.text.count("cannot accept clients") == 1


# --- random data ---


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(proxy: Proxy, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever either side sends, with or without descriptors, cut anywhere, ends the session but not the proxy."""
    random_ = random.Random(seed)
    with open("/dev/null") as null:
        for _ in range(750):
            session(proxy, random_, null.fileno())
    near, far = proxy.pair()
    with near, far:
        assert near.send(call(PLAIN, 1)) == far.expect().frame
    assert "disconnected, the client sent" in caplog.text
    assert "disconnected, libvirtd sent" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]
