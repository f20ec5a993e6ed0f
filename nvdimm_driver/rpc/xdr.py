# SPDX-License-Identifier: Apache-2.0
"""XDR values in libvirt's calls. Pure.

The rules are in RFC 4506 and libvirt's src/remote/remote_protocol.x. libvirt decodes with libtirpc, which ignores some
errors (padding that is not zero, a NUL inside a string). This module refuses them: a proxy must not read a message
differently from libvirtd.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from nvdimm_driver.errors import ProtocolError
from nvdimm_driver.host_text import decode, escaped
from nvdimm_driver.rpc.wire import FRAME_MAX

STRING_MAX = 4194304
UUID_SIZE = 16


class DomainRef(NamedTuple):
    """A domain as calls name it (remote_nonnull_domain). The id is -1 when it does not run."""

    name: str
    uuid: str
    id: int


class NetworkRef(NamedTuple):
    """A network as calls name it (remote_nonnull_network)."""

    name: str
    uuid: str


class TypedParam(NamedTuple):
    """A named value of one of libvirt's types (remote_typed_param). A boolean is an int, as on the wire."""

    field: str
    kind: int
    value: int | float | str


TYPED_PARAM_STRING = 7
_TYPED_PARAMS = {kind: struct.Struct(">" + code) for kind, code in enumerate("iIqQdi", start=1)}
"""VIR_TYPED_PARAM_INT, UINT, LLONG, ULLONG, DOUBLE, BOOLEAN."""


class Packer:
    """Appends XDR values. Every method returns the packer, for chaining."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)

    def _pack(self, code: str, value: int) -> Packer:
        self._parts.append(struct.pack(code, value))
        return self

    def int32(self, value: int) -> Packer:
        return self._pack(">i", value)

    def uint32(self, value: int) -> Packer:
        return self._pack(">I", value)

    def int64(self, value: int) -> Packer:
        return self._pack(">q", value)

    def uint64(self, value: int) -> Packer:
        return self._pack(">Q", value)

    def fixed(self, value: bytes) -> Packer:
        """Append opaque bytes; their number is known to the other side."""
        self._parts.append(value + bytes(-len(value) % 4))
        return self

    def opaque(self, value: bytes) -> Packer:
        return self.uint32(len(value)).fixed(value)

    def string(self, value: str) -> Packer:
        """Append a string. What is not UTF-8 in it is escaped.

        :raises ProtocolError: when libvirt would not take it.
        """
        encoded = escaped(value).encode()
        if len(encoded) > STRING_MAX or b"\0" in encoded:
            raise ProtocolError(
                f"RPC string {value[:40]!r} of {len(encoded)} bytes: the limit is {STRING_MAX}, without NULs"
            )
        return self.opaque(encoded)

    def optional_string(self, value: str | None) -> Packer:
        return self.uint32(0) if value is None else self.uint32(1).string(value)

    def uuid(self, value: str) -> Packer:
        data = bytes.fromhex(value.replace("-", ""))
        if len(data) != UUID_SIZE:
            raise ValueError(f"{value!r} is not a uuid")
        return self.fixed(data)

    def domain(self, value: DomainRef) -> Packer:
        return self.string(value.name).uuid(value.uuid).int32(value.id)

    def optional_domain(self, value: DomainRef | None) -> Packer:
        return self.uint32(0) if value is None else self.uint32(1).domain(value)

    def network(self, value: NetworkRef) -> Packer:
        return self.string(value.name).uuid(value.uuid)

    def optional_network(self, value: NetworkRef | None) -> Packer:
        return self.uint32(0) if value is None else self.uint32(1).network(value)

    def typed_params(self, values: Sequence[TypedParam]) -> Packer:
        self.uint32(len(values))
        for field, kind, value in values:
            self.string(field).int32(kind)
            if isinstance(value, str):
                self.string(value)
            else:
                self._parts.append(_TYPED_PARAMS[kind].pack(value))
        return self


class Unpacker:
    """Reads XDR values from a payload, one after the other.

    Every method raises ProtocolError when the next bytes are not such a value.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._at = 0

    def _wrong(self, what: str) -> ProtocolError:
        return ProtocolError(f"RPC payload of {len(self._payload)} bytes, at byte {self._at}: {what}")

    def _take(self, size: int) -> bytes:
        if size > len(self._payload) - self._at:
            raise self._wrong(f"{size} bytes wanted, {len(self._payload) - self._at} left")
        self._at += size
        return self._payload[self._at - size : self._at]

    def int32(self) -> int:
        return int.from_bytes(self._take(4), "big", signed=True)

    def uint32(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def int64(self) -> int:
        return int.from_bytes(self._take(8), "big", signed=True)

    def uint64(self) -> int:
        return int.from_bytes(self._take(8), "big")

    def fixed(self, size: int) -> bytes:
        """Return opaque bytes; the protocol defines their number."""
        value = self._take(size)
        if any(self._take(-size % 4)):
            raise self._wrong("padding that is not zero")
        return value

    def opaque(self, limit: int = FRAME_MAX) -> bytes:
        size = self.uint32()
        if size > limit:
            raise self._wrong(f"{size} bytes, the limit is {limit}")
        return self.fixed(size)

    def string(self) -> str:
        """Return a string, which need not be UTF-8: libvirtd's errors quote names of files."""
        return decode(self.encoded())

    def encoded(self) -> bytes:
        """Return a string that declares its own encoding, as XML does."""
        value = self.opaque(STRING_MAX)
        if b"\0" in value:
            raise self._wrong("a string with a NUL in it")
        return value

    def _present(self) -> bool:
        present = self.uint32()
        if present > 1:
            raise self._wrong(f"{present} where a boolean belongs")
        return bool(present)

    def optional_string(self) -> str | None:
        return self.string() if self._present() else None

    def optional_encoded(self) -> bytes | None:
        return self.encoded() if self._present() else None

    def uuid(self) -> str:
        digits = self._take(UUID_SIZE).hex()
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    def domain(self) -> DomainRef:
        return DomainRef(self.string(), self.uuid(), self.int32())

    def optional_domain(self) -> DomainRef | None:
        return self.domain() if self._present() else None

    def network(self) -> NetworkRef:
        return NetworkRef(self.string(), self.uuid())

    def optional_network(self) -> NetworkRef | None:
        return self.network() if self._present() else None

    def typed_params(self, limit: int) -> list[TypedParam]:
        """Return typed parameters.

        :param limit: the most that the call may have.
        """
        count = self.uint32()
        if count > limit:
            raise self._wrong(f"{count} typed parameters, the limit is {limit}")
        return [self._typed_param() for _ in range(count)]

    def _typed_param(self) -> TypedParam:
        field, kind = self.string(), self.int32()
        if kind == TYPED_PARAM_STRING:
            return TypedParam(field, kind, self.string())
        if kind not in _TYPED_PARAMS:
            raise self._wrong(f"a typed parameter {field[:40]!r} of type {kind}")
        layout = _TYPED_PARAMS[kind]
        return TypedParam(field, kind, layout.unpack(self._take(layout.size))[0])

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        rest, self._at = self._payload[self._at :], len(self._payload)
        return rest

    def end(self) -> None:
        """Check that the payload ends here."""
        if self._at != len(self._payload):
            raise self._wrong(f"{len(self._payload) - self._at} bytes too many")


class RemoteError(NamedTuple):
    """An error in a reply (virNetMessageError). For the numbers see include/libvirt/virterror.h."""

    code: int
    domain: int
    message: str | None
    level: int = 2
    dom: DomainRef | None = None
    str1: str | None = None
    str2: str | None = None
    str3: str | None = None
    int1: int = 0
    int2: int = 0
    net: NetworkRef | None = None

    def pack(self) -> bytes:
        packer = Packer().int32(self.code).int32(self.domain).optional_string(self.message).int32(self.level)
        packer.optional_domain(self.dom)
        packer.optional_string(self.str1).optional_string(self.str2).optional_string(self.str3)
        return bytes(packer.int32(self.int1).int32(self.int2).optional_network(self.net))

    @classmethod
    def unpack(cls, payload: bytes) -> RemoteError:
        """Return the error in a payload.

        :raises ProtocolError: when the payload is not exactly such an error.
        """
        values = Unpacker(payload)
        error = cls(
            values.int32(),
            values.int32(),
            values.optional_string(),
            values.int32(),
            values.optional_domain(),
            values.optional_string(),
            values.optional_string(),
            values.optional_string(),
            values.int32(),
            values.int32(),
            values.optional_network(),
        )
        values.end()
        return error


class LibvirtError(Exception):
    """Error that libvirtd returned for a call.

    :ivar payload: the error as received, a packed :class:`RemoteError`.
    """

    def __init__(self, payload: bytes) -> None:
        super().__init__(payload)
        self.payload = payload
