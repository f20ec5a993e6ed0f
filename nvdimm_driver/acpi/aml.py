"""The little of ACPI's byte code (AML) that the driver writes and reads. Pure.

An encoder for each construct, named as in ASL, so that a table reads like its ASL source. Each returns bytes, and
takes what goes inside as bytes. Source: ACPI 6.5, chapter 20.
"""

from __future__ import annotations

import re

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
