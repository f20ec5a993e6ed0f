# SPDX-License-Identifier: Apache-2.0
"""Hot-plug slots in AML: each is a container with an NVDIMM root device of its own, which can come and go. Pure.

What is in a slot, the code reads from the slot's record (:mod:`.guest.hot_slots`). dom0 changes the record and raises
an interrupt; a Generic Event Device (ACPI 6.5 §5.6.9) then notifies the container of each slot with a new request:
with 1, Device Check, or with 3, Eject Request.

One root device for all slots, as QEMU has it, could only gain NVDIMMs: Linux refuses a ``_FIT`` in which one is missing
or has changed (drivers/acpi/nfit/core.c:acpi_nfit_check_deletions). It takes a root device of its own away with its
container. The NFIT's structures are then not used: a ``_FIT`` comes before them (acpi_nfit_add).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nvdimm_driver.acpi.aml import (
    add,
    argument,
    buffer,
    call,
    device,
    else_,
    equal,
    fields,
    if_,
    integer,
    interrupt,
    local,
    memory_region,
    method,
    mid,
    name,
    name_segment,
    notify,
    resources,
    return_,
    store,
    string,
    unequal,
)
from nvdimm_driver.guest import hot_slots
from nvdimm_driver.guest.hot_slots import ADDRESS, EJECT, EVENTS_OFFSET, GSI, RECORD, STRUCTURES_MAX

_DEVICE_CHECK, _EJECT_REQUEST = 1, 3
_THERE = 0x0F
"""``_STA``: present, enabled, shown, functioning."""


def terms(slots: Iterable[int], requests: Mapping[int, int], *, labels: bool) -> list[bytes]:
    """Return what the scope ``\\_SB`` has for these slots.

    :param requests: the count of requests in each slot's record when the guest starts, if that is not 0.
    :param labels: the label methods are in the scope, and serve the label areas of the slots.
    """
    slots = list(slots)
    return [
        *_events(),
        *(each for slot in slots for each in _record(slot)),
        *(_container(slot, labels=labels) for slot in slots),
        _event_device(slots, requests),
    ]


def _named(kind: str, slot: int) -> str:
    return f"{kind}{slot:02X}"


def _field(kind: str, slot: int) -> bytes:
    return name_segment(_named(kind, slot))


def _events() -> tuple[bytes, bytes]:
    # OperationRegion (HPRG, SystemMemory, ADDRESS, 16)
    # Field (HPRG, DWordAcc, NoLock, Preserve) { Offset (8), HPEV, 32 }    interrupts handled
    return (
        memory_region("HPRG", integer(ADDRESS), integer(16)),
        fields("HPRG", ("", 8 * EVENTS_OFFSET), ("HPEV", 32)),
    )


def _record(slot: int) -> tuple[bytes, bytes]:
    # OperationRegion (HRss, SystemMemory, address, 512)
    # Field (HRss, DWordAcc, NoLock, Preserve) {
    #     HWss, 32, HPss, 32, HAss, 32, HEss, 32, HOss, 32, HSss, 32, HLss, 32, HZss, 32, HBss, 64, HXss, 32,
    #     Offset (64), HFss, 3584
    # }      plugs, requests, taken, ejected, answer's event and status, length, label's size and base, request, FIT
    region = _named("HR", slot)
    words = [(_named(kind, slot), 32) for kind in ("HW", "HP", "HA", "HE", "HO", "HS", "HL", "HZ")]
    return (
        memory_region(region, integer(hot_slots.address_of(slot)), integer(RECORD)),
        fields(
            region,
            *words,
            (_named("HB", slot), 64),
            (_named("HX", slot), 32),
            ("", 20 * 8),
            (_named("HF", slot), 8 * STRUCTURES_MAX),
        ),
    )


def _container(slot: int, *, labels: bool) -> bytes:
    # Device (NCss) {
    #     Name (_HID, "ACPI0004")
    #     Name (_UID, slot + 1)
    #     Method (_STA, 0, Serialized) { If (HWss == HEss) { Return (0) } Return (0x0F) }
    #     Method (_EJ0, 1, Serialized) { HEss = HWss }
    #     Method (_OST, 3, Serialized) { HOss = Arg0; HSss = Arg1 }
    #     Device (NVDR) {
    #         Name (_HID, "ACPI0012")
    #         Name (_UID, slot + 1)
    #         Method (_FIT, 0, Serialized) { HAss = HWss; Local0 = HFss; Return (Mid (Local0, 0, HLss)) }
    #         Device (NVss) { Name (_ADR, slot + 1); Method (_DSM, 4, Serialized) { … } }
    #     }
    # }
    plugs, ejected, handle = _field("HW", slot), _field("HE", slot), integer(slot + 1)
    nvdimm = device(_named("NV", slot), name("_ADR", handle), *([_dsm(slot)] if labels else []))
    return device(
        _named("NC", slot),
        name("_HID", string("ACPI0004")),
        name("_UID", handle),
        method("_STA", 0, if_(equal(plugs, ejected), return_(integer(0))), return_(integer(_THERE))),
        method("_EJ0", 1, store(plugs, ejected)),
        method("_OST", 3, store(argument(0), _field("HO", slot)), store(argument(1), _field("HS", slot))),
        device(
            "NVDR",
            name("_HID", string("ACPI0012")),
            name("_UID", handle),
            method(
                "_FIT",
                0,
                store(plugs, _field("HA", slot)),
                store(_field("HF", slot), local(0)),
                return_(mid(local(0), integer(0), _field("HL", slot))),
            ),
            nvdimm,
        ),
    )


def _dsm(slot: int) -> bytes:
    # Method (_DSM, 4, Serialized) {
    #     If (HZss == 0) { Return (Buffer (1) { 0x00 }) }
    #     Return (LDSM (Arg0, Arg1, Arg2, Arg3, HBss, HZss))
    # }
    base, size = _field("HB", slot), _field("HZ", slot)
    arguments = [argument(number) for number in range(4)]
    return method(
        "_DSM",
        4,
        if_(equal(size, integer(0)), return_(buffer(b"\0"))),
        return_(call("LDSM", *arguments, base, size)),
    )


def _event_device(slots: Iterable[int], requests: Mapping[int, int]) -> bytes:
    # Device (NVGE) {
    #     Name (_HID, "ACPI0013")
    #     Name (_UID, "NVDIMM hot-plug")
    #     Name (_CRS, ResourceTemplate () { Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 47 } })
    #     Name (HQss, requests) …
    #     Method (_EVT, 1, Serialized) {
    #         HPEV += 1
    #         If (HPss != HQss) {
    #             HQss = HPss
    #             If (HXss == 3) { Notify (NCss, 3) } Else { Notify (NCss, 1) }
    #         } …
    #     }
    # }
    slots = list(slots)
    count = name_segment("HPEV")
    return device(
        "NVGE",
        name("_HID", string("ACPI0013")),
        name("_UID", string("NVDIMM hot-plug")),
        name("_CRS", resources(interrupt(GSI))),
        *(name(_named("HQ", slot), integer(requests.get(slot, 0))) for slot in slots),
        method("_EVT", 1, add(count, integer(1), count), *map(_notice, slots)),
    )


def _notice(slot: int) -> bytes:
    asked, seen, container = _field("HP", slot), _field("HQ", slot), _named("NC", slot)
    return if_(
        unequal(asked, seen),
        store(asked, seen),
        if_(equal(_field("HX", slot), integer(EJECT)), notify(container, _EJECT_REQUEST)),
        else_(notify(container, _DEVICE_CHECK)),
    )
