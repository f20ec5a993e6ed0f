# SPDX-License-Identifier: Apache-2.0
"""Encoders, and one search, for the part of ACPI's byte code (AML) that the driver uses. Pure.

There is an encoder for each construct, named as in ASL, so that a table reads like its ASL source. Each takes its
operands as encoded bytes and returns bytes. Source: ACPI 6.5, chapter 20.
"""

from __future__ import annotations

import re
import struct

from nvdimm_driver.errors import AcpiError
from nvdimm_driver.sizes import human

_NAME_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_PACKAGE_LIMIT = 1 << 28


def name_segment(name: str) -> bytes:
    """Return a NameSeg: one to four characters, padded with ``_`` (§20.2.2).

    :raises AcpiError: when ``name`` is not valid.
    """
    if not _NAME_SEGMENT.fullmatch(name):
        raise AcpiError(f"{name!r} is not an ACPI name: 1 to 4 capital letters, digits or _, no digit first")
    return name.ljust(4, "_").encode("ascii")


def package(content: bytes) -> bytes:
    """Return the content after its PkgLength, which includes its own length (§20.2.4).

    :raises AcpiError: when both together have 256 MiB or more.
    """
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    for extra in (1, 2, 3):
        length = len(content) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | length & 0xF]) + (length >> 4).to_bytes(extra, "little") + content
    raise AcpiError(
        f"AML package of {human(len(content))}: with its PkgLength, it must be smaller than {human(_PACKAGE_LIMIT)}"
    )


def integer(value: int) -> bytes:
    """Return an integer of at most 64 bits in its shortest form, as iasl does (§20.2.3).

    :raises AcpiError: when it is negative or longer.
    """
    if value in (0, 1):
        return bytes([value])  # ZeroOp, OneOp
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << (8 * size):
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise AcpiError(f"AML integer {value:#x} is not in the range 0 to 2^64-1")


def string(value: str) -> bytes:
    """Return an ASCII string without NUL characters (§20.2.3).

    :raises AcpiError: when it has other characters.
    """
    if not value.isascii() or "\0" in value:
        raise AcpiError(f"AML string {value!r} is not ASCII without NUL")
    return b"\x0d" + value.encode("ascii") + b"\0"


def name(identifier: str, value: bytes) -> bytes:
    """Encode ``Name (identifier, value)``."""
    return b"\x08" + name_segment(identifier) + value


def scope(identifier: str, *terms: bytes) -> bytes:
    """Encode ``Scope (\\identifier) { terms }``, always from the root of the namespace."""
    return b"\x10" + package(b"\\" + name_segment(identifier) + b"".join(terms))


def device(identifier: str, *terms: bytes) -> bytes:
    """Encode ``Device (identifier) { terms }``."""
    return b"\x5b\x82" + package(name_segment(identifier) + b"".join(terms))


def method(identifier: str, arguments: int, *terms: bytes) -> bytes:
    """Encode ``Method (identifier, arguments, Serialized) { terms }``."""
    return b"\x14" + package(name_segment(identifier) + bytes([arguments | 1 << 3]) + b"".join(terms))


def argument(number: int) -> bytes:
    """Encode ``Arg0`` to ``Arg6``."""
    return bytes([0x68 + number])


def local(number: int) -> bytes:
    """Encode ``Local0`` to ``Local7``."""
    return bytes([0x60 + number])


def call(identifier: str, *arguments: bytes) -> bytes:
    """Encode ``identifier (arguments)``."""
    return name_segment(identifier) + b"".join(arguments)


def store(value: bytes, target: bytes) -> bytes:
    """Encode ``target = value``."""
    return b"\x70" + value + target


def add(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    """Encode ``left + right`` or, with a target, ``target = left + right``."""
    return b"\x72" + left + right + target


def subtract(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    """Encode ``left - right``."""
    return b"\x74" + left + right + target


def bit_and(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    """Encode ``left & right``."""
    return b"\x7b" + left + right + target


def concatenate(left: bytes, right: bytes, target: bytes = b"\0") -> bytes:
    """Encode ``Concatenate (left, right, target)``."""
    return b"\x73" + left + right + target


def mid(source: bytes, index: bytes, length: bytes, target: bytes = b"\0") -> bytes:
    """Encode ``Mid (source, index, length, target)``."""
    return b"\x9e" + source + index + length + target


def element(source: bytes, index: bytes) -> bytes:
    """Encode ``source [index]``."""
    return b"\x88" + source + index + b"\0"


def dereference(reference: bytes) -> bytes:
    """Encode ``DerefOf (reference)``."""
    return b"\x83" + reference


def size_of(value: bytes) -> bytes:
    """Encode ``SizeOf (value)``."""
    return b"\x87" + value


def equal(left: bytes, right: bytes) -> bytes:
    """Encode ``left == right``."""
    return b"\x93" + left + right


def unequal(left: bytes, right: bytes) -> bytes:
    """Encode ``left != right``."""
    return b"\x92" + equal(left, right)


def greater(left: bytes, right: bytes) -> bytes:
    """Encode ``left > right``."""
    return b"\x94" + left + right


def less(left: bytes, right: bytes) -> bytes:
    """Encode ``left < right``."""
    return b"\x95" + left + right


def either(left: bytes, right: bytes) -> bytes:
    """Encode ``left || right``."""
    return b"\x91" + left + right


def if_(condition: bytes, *terms: bytes) -> bytes:
    """Encode ``If (condition) { terms }``."""
    return b"\xa0" + package(condition + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    """Encode ``Else { terms }``, right behind an ``If``."""
    return b"\xa1" + package(b"".join(terms))


def notify(identifier: str, value: int) -> bytes:
    """Encode ``Notify (identifier, value)``."""
    return b"\x86" + name_segment(identifier) + integer(value)


def while_(condition: bytes, *terms: bytes) -> bytes:
    """Encode ``While (condition) { terms }``."""
    return b"\xa2" + package(condition + b"".join(terms))


def return_(value: bytes) -> bytes:
    """Encode ``Return (value)``."""
    return b"\xa4" + value


def buffer(content: bytes, size: int | None = None) -> bytes:
    """Encode ``Buffer (size) { content }``; zeros pad shorter content."""
    return b"\x11" + package(integer(len(content) if size is None else size) + content)


def elements(*values: bytes) -> bytes:
    """Encode ``Package (len (values)) { values }``."""
    return b"\x12" + package(bytes([len(values)]) + b"".join(values))


def dword_field(source: bytes, index: bytes, identifier: str) -> bytes:
    """Encode ``CreateDWordField (source, index, identifier)``."""
    return b"\x8a" + source + index + name_segment(identifier)


def memory_region(identifier: str, address: bytes, length: bytes) -> bytes:
    """Encode ``OperationRegion (identifier, SystemMemory, address, length)``."""
    return b"\x5b\x80" + name_segment(identifier) + b"\0" + address + length


def qword_field(region: str, identifier: str, bits: int) -> bytes:
    """Encode ``Field (region, QWordAcc, NoLock, Preserve) { identifier, bits }``."""
    return b"\x5b\x81" + package(name_segment(region) + b"\x04" + name_segment(identifier) + _field_length(bits))


def fields(region: str, *parts: tuple[str, int]) -> bytes:
    """Encode ``Field (region, DWordAcc, NoLock, Preserve) { identifier, bits, … }``.

    :param parts: identifier and bits of each field; an empty identifier leaves the bits out, as ``Offset`` does.
    """
    encoded = b"".join((name_segment(each) if each else b"\0") + _field_length(bits) for each, bits in parts)
    return b"\x5b\x81" + package(name_segment(region) + b"\x03" + encoded)


def interrupt(number: int) -> bytes:
    """Encode ``Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { number }`` (§6.4.3.6)."""
    return struct.pack("<BHBBI", 0x89, 6, 0x0D, 1, number)


def qword_memory(base: int, length: int) -> bytes:
    """Encode a QWordMemory descriptor (§6.4.3.5.1).

    ``QWordMemory (ResourceConsumer, …, Cacheable, ReadWrite, 0, base, base + length - 1, 0, length)``
    """
    return struct.pack("<BHBBBQQQQQ", 0x8A, 0x2B, 0, 0x0D, 0x03, 0, base, base + length - 1, 0, length)


def resources(*descriptors: bytes) -> bytes:
    """Encode ``ResourceTemplate () { descriptors }``."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def _field_length(bits: int) -> bytes:
    """Return a PkgLength that counts bits, without its own length (§20.2.5.2)."""
    if bits < 1 << 6:
        return bytes([bits])
    for extra in (1, 2, 3):
        if bits < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | bits & 0xF]) + (bits >> 4).to_bytes(extra, "little")
    raise AcpiError(f"AML field of {bits} bits: it must have fewer than {_PACKAGE_LIMIT}")


def named_integers(aml: bytes, identifier: str) -> tuple[int, ...]:
    """Return the value of every ``Name (identifier, integer)`` in the byte code, in order.

    It searches the code and does not interpret it: use it only for tables of a known form.
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
