# SPDX-License-Identifier: Apache-2.0
"""Labels served by AML alone: each label area is in the guest's memory, and ``_DSM`` reads and writes it there. Pure.

Linux accesses labels with the Intel family of ``_DSM`` (NVDIMM DSM Interface Example V1.3; functions 4 to 6). It
ignores ``_LSI``, ``_LSR`` and ``_LSW`` without such a ``_DSM`` (drivers/acpi/nfit/core.c:acpi_nfit_add_dimm).
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from nvdimm_driver.acpi.aml import (
    add,
    argument,
    bit_and,
    buffer,
    call,
    concatenate,
    dereference,
    device,
    dword_field,
    either,
    element,
    equal,
    greater,
    if_,
    integer,
    less,
    local,
    memory_region,
    method,
    mid,
    name,
    name_segment,
    qword_field,
    qword_memory,
    resources,
    return_,
    size_of,
    store,
    string,
    subtract,
    unequal,
    while_,
)
from nvdimm_driver.model import PAGE, Placement

FAMILY = UUID("4309ac30-0d11-11e4-9191-0800200c9a66")
"""UUID of the Intel family of NVDIMM functions."""
FUNCTIONS = 0b1110001
"""Bit mask of the supported functions: 0 (get this mask), 4 (size), 5 (get) and 6 (set)."""
NOT_SUPPORTED, INVALID_INPUT = 1, 3
MAX_TRANSFER = PAGE
"""Maximum bytes of a label area that one call reads or writes."""

_EISA_PNP0C02 = 0x020CD041
"""EisaId ("PNP0C02"): motherboard resources, which an operating system leaves alone."""


def methods() -> tuple[bytes, ...]:
    """Return the methods that the ``_DSM`` of every NVDIMM calls, for the NVDIMM root device."""
    return (_read_page(), _write_page(), _read(), _write(), _dword(), _common())


def dsm(placement: Placement) -> bytes:
    """Return the ``_DSM`` of an NVDIMM."""
    # Method (_DSM, 4, Serialized) { Return (LDSM (Arg0, Arg1, Arg2, Arg3, base, size)) }
    arguments = [argument(number) for number in range(4)]
    area = integer(placement.label_base), integer(placement.label_size)
    return method("_DSM", 4, return_(call("LDSM", *arguments, *area)))


def reservation(placements: Sequence[Placement]) -> bytes:
    """Return a device that keeps operating systems from using the label areas' addresses for anything else."""
    # Device (NVRS) {
    #     Name (_HID, EisaId ("PNP0C02"))
    #     Name (_UID, "NVDIMM labels")
    #     Name (_CRS, ResourceTemplate () { QWordMemory (…) … })
    # }
    areas = [qword_memory(start, end - start) for start, end in (placement.label_pages for placement in placements)]
    return device(
        "NVRS",
        name("_HID", integer(_EISA_PNP0C02)),
        name("_UID", string("NVDIMM labels")),
        name("_CRS", resources(*areas)),
    )


def _page(address: bytes) -> bytes:
    # OperationRegion (LREG, SystemMemory, address, 0x1000)
    # Field (LREG, QWordAcc, NoLock, Preserve) { LPAG, 32768 }
    return memory_region("LREG", address, integer(PAGE)) + qword_field("LREG", "LPAG", 8 * PAGE)


def _read_page() -> bytes:
    # Method (RPAG, 1, Serialized) { …; Return (LPAG) }                 address
    return method("RPAG", 1, _page(argument(0)), return_(name_segment("LPAG")))


def _write_page() -> bytes:
    # Method (WPAG, 2, Serialized) { …; LPAG = Arg1 }                   address, buffer of a page
    return method("WPAG", 2, _page(argument(0)), store(argument(1), name_segment("LPAG")))


def _piece(address: bytes, left: bytes) -> bytes:
    """Set Local1 to the address's offset in its page, and Local2 to how many of the ``left`` bytes are in that page."""
    # Local1 = address & 0xFFF
    # Local2 = 0x1000 - Local1
    # If (Local2 > left) { Local2 = left }
    return (
        bit_and(address, integer(PAGE - 1), local(1))
        + subtract(integer(PAGE), local(1), local(2))
        + if_(greater(local(2), left), store(left, local(2)))
    )


def _read() -> bytes:
    # Method (RLAB, 2, Serialized) {                                    address, length
    #     Local0 = Buffer (Zero) {}
    #     Local5 = Arg0
    #     Local6 = Arg1
    #     While (Local6 > 0) {
    #         …
    #         Local3 = RPAG (Local5 - Local1)
    #         Concatenate (Local0, Mid (Local3, Local1, Local2), Local0)
    #         Local5 += Local2
    #         Local6 -= Local2
    #     }
    #     Return (Local0)
    # }
    return method(
        "RLAB",
        2,
        store(buffer(b""), local(0)),
        store(argument(0), local(5)),
        store(argument(1), local(6)),
        while_(
            greater(local(6), integer(0)),
            _piece(local(5), local(6)),
            store(call("RPAG", subtract(local(5), local(1))), local(3)),
            concatenate(local(0), mid(local(3), local(1), local(2)), local(0)),
            add(local(5), local(2), local(5)),
            subtract(local(6), local(2), local(6)),
        ),
        return_(local(0)),
    )


def _write() -> bytes:
    # Method (WLAB, 2, Serialized) {                                    address, buffer
    #     Local5 = Arg0
    #     Local6 = SizeOf (Arg1)
    #     Local7 = 0
    #     While (Local6 > 0) {
    #         …
    #         Local3 = RPAG (Local5 - Local1)
    #         Concatenate (Mid (Local3, 0, Local1), Mid (Arg1, Local7, Local2), Local4)
    #         Concatenate (Local4, Mid (Local3, Local1 + Local2, 0x1000), Local4)
    #         WPAG (Local5 - Local1, Local4)
    #         Local5 += Local2
    #         Local6 -= Local2
    #         Local7 += Local2
    #     }
    # }
    return method(
        "WLAB",
        2,
        store(argument(0), local(5)),
        store(size_of(argument(1)), local(6)),
        store(integer(0), local(7)),
        while_(
            greater(local(6), integer(0)),
            _piece(local(5), local(6)),
            store(call("RPAG", subtract(local(5), local(1))), local(3)),
            concatenate(mid(local(3), integer(0), local(1)), mid(argument(1), local(7), local(2)), local(4)),
            concatenate(local(4), mid(local(3), add(local(1), local(2)), integer(PAGE)), local(4)),
            call("WPAG", subtract(local(5), local(1)), local(4)),
            add(local(5), local(2), local(5)),
            subtract(local(6), local(2), local(6)),
            add(local(7), local(2), local(7)),
        ),
    )


def _dword() -> bytes:
    # Method (LD32, 1, Serialized) {                                    integer
    #     Local0 = Buffer (4) {}
    #     CreateDWordField (Local0, 0, LVAL)
    #     LVAL = Arg0
    #     Return (Local0)
    # }
    return method(
        "LD32",
        1,
        store(buffer(b"", 4), local(0)),
        dword_field(local(0), integer(0), "LVAL"),
        store(argument(0), name_segment("LVAL")),
        return_(local(0)),
    )


def _status(value: int) -> bytes:
    return call("LD32", integer(value))


def _common() -> bytes:
    # Method (LDSM, 6, Serialized) {             uuid, revision, function, arguments, base and size of the label area
    #     If ((Arg0 != ToUUID ("4309ac30-…")) || (Arg1 != 1)) { Return (Buffer (1) { 0x00 }) }
    #     If (Arg2 == 0) { Return (Buffer (1) { 0x71 }) }
    #     If (Arg2 == 4) { Return (Concatenate (Concatenate (LD32 (0), LD32 (Arg5)), LD32 (0x1000))) }
    #     If ((Arg2 < 5) || (Arg2 > 6)) { Return (LD32 (1)) }
    #     Local0 = DerefOf (Arg3 [0])
    #     If (SizeOf (Local0) < 8) { Return (LD32 (3)) }
    #     CreateDWordField (Local0, 0, LOFF)
    #     CreateDWordField (Local0, 4, LLEN)
    #     If ((LLEN > 0x1000) || ((LOFF + LLEN) > Arg5)) { Return (LD32 (3)) }
    #     If (Arg2 == 5) { Return (Concatenate (LD32 (0), RLAB (Arg4 + LOFF, LLEN))) }
    #     If (SizeOf (Local0) < (LLEN + 8)) { Return (LD32 (3)) }
    #     WLAB (Arg4 + LOFF, Mid (Local0, 8, LLEN))
    #     Return (LD32 (0))
    # }
    function, area, size = argument(2), argument(4), argument(5)
    offset, length = name_segment("LOFF"), name_segment("LLEN")
    unknown = either(unequal(argument(0), buffer(FAMILY.bytes_le)), unequal(argument(1), integer(1)))
    sizes = concatenate(concatenate(_status(0), call("LD32", size)), call("LD32", integer(MAX_TRANSFER)))
    outside = either(greater(length, integer(MAX_TRANSFER)), greater(add(offset, length), size))
    return method(
        "LDSM",
        6,
        if_(unknown, return_(buffer(b"\0"))),
        if_(equal(function, integer(0)), return_(buffer(bytes([FUNCTIONS])))),
        if_(equal(function, integer(4)), return_(sizes)),
        if_(either(less(function, integer(5)), greater(function, integer(6))), return_(_status(NOT_SUPPORTED))),
        store(dereference(element(argument(3), integer(0))), local(0)),
        if_(less(size_of(local(0)), integer(8)), return_(_status(INVALID_INPUT))),
        dword_field(local(0), integer(0), "LOFF"),
        dword_field(local(0), integer(4), "LLEN"),
        if_(outside, return_(_status(INVALID_INPUT))),
        if_(
            equal(function, integer(5)),
            return_(concatenate(_status(0), call("RLAB", add(area, offset), length))),
        ),
        if_(less(size_of(local(0)), add(length, integer(8))), return_(_status(INVALID_INPUT))),
        call("WLAB", add(area, offset), mid(local(0), integer(8), length)),
        return_(_status(0)),
    )
