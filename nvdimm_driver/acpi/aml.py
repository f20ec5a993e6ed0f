"""The little of ACPI's byte code (AML) that the driver writes and reads. Pure.

An encoder for each construct, named as in ASL, so that a table reads like its ASL source. Each returns bytes, and
takes what goes inside as bytes. Source: ACPI 6.5, chapter 20.
"""

from __future__ import annotations

import re
import struct

from nvdimm_driver.errors import AcpiError

_NAME_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_PACKAGE_LIMIT = 1 << 28


def name_segment(name: str) -> bytes:
    """Return a NameSeg: one to four characters, filled up with ``_`` (§20.2.2).

    :raises AcpiError: when it is not one.
    """
    if not _NAME_SEGMENT.fullmatch(name):
        raise AcpiError(f"{name!r} is not an ACPI name: 1 to 4 capital letters, digits and _, no digit in front")
    return name.ljust(4, "_").encode("ascii")


def package(content: bytes) -> bytes:
    """Return the content behind its PkgLength, which counts itself too (§20.2.4).

    :raises AcpiError: when the content is 256 MiB or longer.
    """
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    for extra in (1, 2, 3):
        length = len(content) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | length & 0xF]) + (length >> 4).to_bytes(extra, "little") + content
    raise AcpiError(f"AML package of {len(content)} bytes: the limit is {_PACKAGE_LIMIT} with its length")


def integer(value: int) -> bytes:
    """Return an integer of at most 64 bits in its shortest form, as iasl writes it (§20.2.3).

    :raises AcpiError: when it is negative or too large.
    """
    if value in (0, 1):
        return bytes([value])  # ZeroOp, OneOp
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << (8 * size):
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise AcpiError(f"AML integer {value:#x}: 0 to 2^64-1 are possible")


def string(value: str) -> bytes:
    """Return a string of ASCII without NUL (§20.2.3).

    :raises AcpiError: when it has other characters.
    """
    if not value.isascii() or "\0" in value:
        raise AcpiError(f"AML string {value!r}: ASCII without NUL only")
    return b"\x0d" + value.encode("ascii") + b"\0"


def name(identifier: str, value: bytes) -> bytes:
    """Name (identifier, value)"""
    return b"\x08" + name_segment(identifier) + value


def scope(identifier: str, *terms: bytes) -> bytes:
    """Scope (\\identifier) { terms }: always from the root of the name space."""
    return b"\x10" + package(b"\\" + name_segment(identifier) + b"".join(terms))


def device(identifier: str, *terms: bytes) -> bytes:
    """Device (identifier) { terms }"""
    return b"\x5b\x82" + package(name_segment(identifier) + b"".join(terms))


def method(identifier: str, arguments: int, *terms: bytes) -> bytes:
    """Method (identifier, arguments, Serialized) { terms }"""
    return b"\x14" + package(name_segment(identifier) + bytes([arguments | 1 << 3]) + b"".join(terms))


def argument(number: int) -> bytes:
    """Arg0 to Arg6"""
    return bytes([0x68 + number])


def local(number: int) -> bytes:
    """Local0 to Local7"""
    return bytes([0x60 + number])


def call(identifier: str, *arguments: bytes) -> bytes:
    """identifier (arguments)"""
    return name_segment(identifier) + b"".join(arguments)


def store(value: bytes, target: bytes) -> bytes:
    """target = value"""
    return b"\x70" + value + target


def add(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    """left + right; with a target, target = left + right"""
    return b"\x72" + left + right + target


def subtract(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    """left - right"""
    return b"\x74" + left + right + target


def bit_and(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    """left & right"""
    return b"\x7b" + left + right + target


def concatenate(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    """Concatenate (left, right, target)"""
    return b"\x73" + left + right + target


def mid(source: bytes, index: bytes, length: bytes, target: bytes = b"\0") -> bytes:
    """Mid (source, index, length, target)"""
    return b"\x9e" + source + index + length + target


def element(source: bytes, index: bytes) -> bytes:
    """source [index]"""
    return b"\x88" + source + index + b"\0"


def dereference(reference: bytes) -> bytes:
    """DerefOf (reference)"""
    return b"\x83" + reference


def size_of(value: bytes) -> bytes:
    """SizeOf (value)"""
    return b"\x87" + value


def equal(left: bytes, right: bytes) -> bytes:
    """left == right"""
    return b"\x93" + left + right


def unequal(left: bytes, right: bytes) -> bytes:
    """left != right"""
    return b"\x92" + equal(left, right)


def greater(left: bytes, right: bytes) -> bytes:
    """left > right"""
    return b"\x94" + left + right


def less(left: bytes, right: bytes) -> bytes:
    """left < right"""
    return b"\x95" + left + right


def either(left: bytes, right: bytes) -> bytes:
    """left || right"""
    return b"\x91" + left + right


def if_(condition: bytes, *terms: bytes) -> bytes:
    """If (condition) { terms }"""
    return b"\xa0" + package(condition + b"".join(terms))


def while_(condition: bytes, *terms: bytes) -> bytes:
    """While (condition) { terms }"""
    return b"\xa2" + package(condition + b"".join(terms))


def return_(value: bytes) -> bytes:
    """Return (value)"""
    return b"\xa4" + value


def buffer(content: bytes, size: int | None = None) -> bytes:
    """Buffer (size) { content }; zeros follow a content that is shorter."""
    return b"\x11" + package(integer(len(content) if size is None else size) + content)


def elements(*values: bytes) -> bytes:
    """Package (len (values)) { values }"""
    return b"\x12" + package(bytes([len(values)]) + b"".join(values))


def dword_field(source: bytes, index: bytes, identifier: str) -> bytes:
    """CreateDWordField (source, index, identifier)"""
    return b"\x8a" + source + index + name_segment(identifier)


def memory_region(identifier: str, address: bytes, length: bytes) -> bytes:
    """OperationRegion (identifier, SystemMemory, address, length)"""
    return b"\x5b\x80" + name_segment(identifier) + b"\0" + address + length


def qword_field(region: str, identifier: str, bits: int) -> bytes:
    """Field (region, QWordAcc, NoLock, Preserve) { identifier, bits }"""
    return b"\x5b\x81" + package(name_segment(region) + b"\x04" + name_segment(identifier) + _field_length(bits))


def qword_memory(base: int, length: int) -> bytes:
    """QWordMemory (ResourceConsumer, …, Cacheable, ReadWrite, 0, base, base + length - 1, 0, length) (§6.4.3.5.1)"""
    return struct.pack("<BHBBBQQQQQ", 0x8A, 0x2B, 0, 0x0D, 0x03, 0, base, base + length - 1, 0, length)


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors }"""
    return buffer(b"".join(descriptors) + b"\x79\0")


def _field_length(bits: int) -> bytes:
    """A PkgLength that counts bits and not itself (§20.2.5.2)."""
    if bits < 1 << 6:
        return bytes([bits])
    for extra in (1, 2, 3):
        if bits < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | bits & 0xF]) + (bits >> 4).to_bytes(extra, "little")
    raise AcpiError(f"AML field of {bits} bits: {_PACKAGE_LIMIT} is the limit")


def named_integers(aml: bytes, identifier: str) -> tuple[int, ...]:
    """Return the value of every ``Name (identifier, integer)`` in the byte code, in order.

    The code is searched, not interpreted: good for tables of a known form, not for any table.
    """
    found: list[int] = []
    for match in re.finditer(re.escape(name(identifier, b"")), aml):
        rest = aml[match.end() :]
        size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}.get(rest[0] if rest else -1, 0)
        if size and len(rest) > size:
            found.append(int.from_bytes(rest[1 : 1 + size], "little"))
        elif rest[:1] in (b"\0", b"\1"):
            found.append(rest[0])
    return tuple(found)
