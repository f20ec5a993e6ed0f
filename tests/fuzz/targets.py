# SPDX-License-Identifier: Apache-2.0
"""The targets: each takes any bytes, and raises AssertionError when the code under test misbehaves."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from lxml import etree

from nvdimm_driver.errors import NvdimmError, ProtocolError
from nvdimm_driver.rpc import intercept
from nvdimm_driver.rpc.handler_types import Call, Context, Peer, Work
from nvdimm_driver.rpc.intercept import Interceptor
from nvdimm_driver.rpc.wire import Message, Reader
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer
from nvdimm_driver.xml.client_xml import read_domain
from nvdimm_driver.xml.hooks import XmlHooks
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import NAMESPACE, LibxlXmlHook, restore, rewrite
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, make_driver

DEVICE_MODEL = "/usr/libexec/xen/bin/nvdimm-device-model"
HOOKS = XmlHooks([LibxlXmlHook()], DEVICE_MODEL)
CONTEXT = Context(Peer(0, 0, 1), False)
CALLS_MAX = 20


def reader(data: bytes) -> None:
    """Check that messages do not depend on where the stream is cut, and that each is exactly its frame."""
    cuts, stream = data[:4], data[4:]
    whole = _messages([stream])
    places = sorted(cut * len(stream) // 256 for cut in cuts)
    pieces = [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]
    assert _messages(pieces) == whole
    for message in whole[0]:
        assert len(message.frame) == struct.unpack_from(">I", message.frame)[0]


def _messages(pieces: list[bytes]) -> tuple[list[Message], bool]:
    """Return the messages, and True if the stream stopped being RPC."""
    found: list[Message] = []
    taker = Reader()
    try:
        for piece in pieces:
            taker.receive(piece)
            while message := taker.next_message():
                found.append(message)
    except ProtocolError:
        return found, True
    return found, False


def xml(data: bytes) -> None:
    """Check that only the driver's errors are raised, libxml2 parses what is written, and no record stays hidden."""
    try:
        read = read_domain(data, DEVICE_MODEL)
        rewritten = rewrite(read.text, DEVICE_MODEL)
    except NvdimmError:
        return
    assert NAMESPACE not in (_name_spaces(data) or ()), "hidden from the driver but not from libxml2"
    if rewritten != read.text:
        assert NAMESPACE in (_name_spaces(rewritten.encode()) or ()), "libxml2 does not take it"
        assert extract(restore(rewritten)) == read.domain


def _name_spaces(data: bytes) -> set[str] | None:
    """Return the name spaces that libxml2 finds; None if it cannot parse the data."""
    try:
        root = etree.fromstring(data, etree.XMLParser(resolve_entities=False, no_network=True))
    except (etree.XMLSyntaxError, ValueError):
        return None
    return {uri for element in root.iter(etree.Element) for uri in element.nsmap.values() if uri}


def handlers(data: bytes) -> None:
    """Check that a handler ends with a reply or an error, whatever the arguments and libvirtd's answers are."""
    number = sorted(intercept.TABLE)[data[0] % len(intercept.TABLE)] if data else 11
    size = struct.unpack(">H", data[1:3])[0] if len(data) >= 3 else 0
    payload, answers = data[3 : 3 + size], data[3 + size :]
    with tempfile.TemporaryDirectory() as folder:
        backing = MemoryBacking()
        interceptor = Interceptor(lambda: make_driver(Path(folder), backing, RecordingMapper()), HOOKS)
        try:
            _drive(interceptor.table()[number].handler(CONTEXT, payload), answers)
        except (NvdimmError, LibvirtError):
            return


def _drive(steps: Generator[Call | Work, Any, bytes], answers: bytes) -> None:
    """Run a handler; the first bytes of ``answers`` choose what libvirtd answers to each call."""
    send: Callable[[Any], Call | Work] = steps.send
    value: object = None
    for turn in range(CALLS_MAX):
        try:
            wish = send(value)
        except StopIteration:
            return
        try:
            value = wish.function() if isinstance(wish, Work) else _answer(answers, turn)
            send = steps.send
        except (NvdimmError, LibvirtError, OSError) as error:
            send, value = steps.throw, error
    raise AssertionError(f"a handler made more than {CALLS_MAX} calls")


def _answer(answers: bytes, turn: int) -> bytes:
    choice = answers[turn] if turn < len(answers) else 0
    if choice < 64:
        return bytes(Packer().domain(DomainRef("db1", UUID, -1)))
    if choice < 128:
        return bytes(Packer().string(answers.decode("latin-1").replace("\0", "")))
    if choice < 192:
        return answers
    raise LibvirtError(answers)


TARGETS: dict[str, Callable[[bytes], None]] = {"reader": reader, "xml": xml, "handlers": handlers}
