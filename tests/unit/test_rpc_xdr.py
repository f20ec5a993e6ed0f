# SPDX-License-Identifier: Apache-2.0
import os
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.errors import ProtocolError
from nvdimm_driver.rpc.xdr import STRING_MAX, DomainRef, NetworkRef, Packer, RemoteError, TypedParam, Unpacker

INT32 = st.integers(-(1 << 31), (1 << 31) - 1)
UINT32 = st.integers(0, (1 << 32) - 1)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
UINT64 = st.integers(0, (1 << 64) - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
UUIDS = st.uuids().map(str)
DOMAINS = st.builds(DomainRef, TEXT, UUIDS, INT32)
NETWORKS = st.builds(NetworkRef, TEXT, UUIDS)
PARAMS = st.one_of(
    *(
        st.builds(TypedParam, TEXT, st.just(kind), values)
        for kind, values in enumerate((INT32, UINT32, INT64, UINT64, st.floats(allow_nan=False), INT32, TEXT), start=1)
    )
)
ERRORS = st.builds(
    RemoteError,
    *(INT32, INT32, st.none() | TEXT, INT32, st.none() | DOMAINS, *[st.none() | TEXT] * 3, INT32, INT32),
    st.none() | NETWORKS,
)

Value = tuple[Callable[[Packer, Any], Packer], Callable[[Unpacker], Any], st.SearchStrategy[Any]]
VALUES: dict[str, Value] = {
    "int32": (Packer.int32, Unpacker.int32, INT32),
    "uint32": (Packer.uint32, Unpacker.uint32, UINT32),
    "int64": (Packer.int64, Unpacker.int64, INT64),
    "uint64": (Packer.uint64, Unpacker.uint64, UINT64),
    "string": (Packer.string, Unpacker.string, TEXT),
    "optional string": (Packer.optional_string, Unpacker.optional_string, st.none() | TEXT),
    "fixed": (Packer.fixed, lambda values: values.fixed(7), st.binary(min_size=7, max_size=7)),
    "opaque": (Packer.opaque, Unpacker.opaque, st.binary(max_size=40)),
    "uuid": (Packer.uuid, Unpacker.uuid, UUIDS),
    "domain": (Packer.domain, Unpacker.domain, DOMAINS),
    "optional domain": (Packer.optional_domain, Unpacker.optional_domain, st.none() | DOMAINS),
    "network": (Packer.network, Unpacker.network, NETWORKS),
    "optional network": (Packer.optional_network, Unpacker.optional_network, st.none() | NETWORKS),
    "typed params": (Packer.typed_params, lambda values: values.typed_params(9), st.lists(PARAMS, max_size=9)),
}


@given(st.lists(st.sampled_from(sorted(VALUES)), max_size=6), st.data())
def test_values_come_back(names: list[str], data: st.DataObject) -> None:
    values = [data.draw(VALUES[name][2]) for name in names]
    packer = Packer()
    for name, value in zip(names, values, strict=True):
        VALUES[name][0](packer, value)
    assert len(bytes(packer)) % 4 == 0
    unpacker = Unpacker(bytes(packer))
    assert [VALUES[name][1](unpacker) for name in names] == values
    unpacker.end()


@given(st.binary(max_size=200), st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=6))
def test_any_bytes_are_values_or_an_error(payload: bytes, names: list[str]) -> None:
    unpacker = Unpacker(payload)
    with suppress(ProtocolError):
        for name in names:
            VALUES[name][1](unpacker)
        unpacker.end()


@given(ERRORS, st.data())
def test_errors_come_back_and_are_refused_when_cut(error: RemoteError, data: st.DataObject) -> None:
    packed = error.pack()
    assert RemoteError.unpack(packed) == error
    with pytest.raises(ProtocolError):
        RemoteError.unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])


def test_what_is_on_the_wire() -> None:
    packer = Packer().domain(DomainRef("abc", "00112233-4455-6677-8899-aabbccddeeff", -1)).optional_string(None)
    packer.typed_params([TypedParam("x", 6, 1), TypedParam("y", 7, "z")]).uint64(1)
    expected = b"\0\0\0\3abc\0" + bytes.fromhex("00112233445566778899aabbccddeeff") + b"\xff\xff\xff\xff\0\0\0\0"
    expected += b"\0\0\0\2\0\0\0\1x\0\0\0\0\0\0\6\0\0\0\1\0\0\0\1y\0\0\0\0\0\0\7\0\0\0\1z\0\0\0\0\0\0\0\0\0\0\1"
    assert bytes(packer) == expected


@pytest.mark.parametrize(
    ("payload", "take", "message"),
    [
        (b"\0\0\0", Unpacker.int32, "of 3 bytes, at byte 0: 4 bytes wanted, 3 left"),
        (b"\0\0\0\4abc", Unpacker.string, "of 7 bytes, at byte 4: 4 bytes wanted, 3 left"),
        (b"\0\0\0\3abcd", Unpacker.string, "padding that is not zero"),
        (b"\0\0\0\4a\0bc", Unpacker.string, "a NUL"),
        (b"\0\x40\0\1", Unpacker.string, "4194305 bytes, the limit is 4194304"),
        (b"\xff\xff\xff\xff", Unpacker.opaque, "4294967295 bytes, the limit is "),
        (b"\0\0\0\2\0\0\0\0", Unpacker.optional_string, "2 where a boolean belongs"),
        (b"\0\0\0\3", lambda values: values.typed_params(2), "3 typed parameters, the limit is 2"),
        (b"\0\0\0\1\0\0\0\1x\0\0\0\0\0\0\10", lambda values: values.typed_params(2), "'x' of type 8"),
        (b"\0\0\0\0", Unpacker.end, "4 bytes too many"),
    ],
)
def test_what_is_refused(payload: bytes, take: Callable[[Unpacker], object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        take(Unpacker(payload))


def test_a_length_that_lies_takes_no_memory() -> None:
    tracemalloc.start()
    for payload in (b"\0\x40\0\0", b"\x02\0\0\0", b"\0\0\x40\0"):
        for take in (Unpacker.string, Unpacker.opaque, lambda values: values.typed_params(1 << 30)):
            with pytest.raises(ProtocolError):
                take(Unpacker(payload))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("value", ["x" * (STRING_MAX + 1), "a\0b"])
def test_strings_that_libvirt_would_not_take(value: str) -> None:
    with pytest.raises(ProtocolError, match="the limit is 4194304"):
        Packer().string(value)


def test_what_is_not_unicode_still_gets_to_the_client() -> None:
    """Libvirtd's errors quote names of files, which need not be UTF-8."""
    found = Unpacker(b"\0\0\0\x0a/mnt/\xff.img\0\0").string()
    assert os.fsencode(found) == b"/mnt/\xff.img"
    assert Unpacker(bytes(Packer().string(found))).string() == r"/mnt/\udcff.img"
