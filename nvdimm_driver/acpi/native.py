# SPDX-License-Identifier: Apache-2.0
"""The ACPI builder ``native``, which needs no QEMU, and the SSDT that the builder ``qemu`` uses, too. Pure."""

from __future__ import annotations

from nvdimm_driver.acpi import aml, label_methods, slot_methods
from nvdimm_driver.acpi.tables import (
    NVDIMM_VENDOR,
    PERSISTENT_MEMORY,
    ControlRegion,
    Header,
    Nfit,
    PlatformCapabilities,
    RegionMapping,
    SpaRange,
    Structure,
    seal,
    serial_number,
)
from nvdimm_driver.acpi.verify import OEM_TABLE_ID, check_layout, check_space, check_tables
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.guest.hot_slots import SlotRecord
from nvdimm_driver.model import AcpiTables, GuestLayout, Placement
from nvdimm_driver.plugins import AcpiBuilder

_EFI_MEMORY_WB = 0x8
_EFI_MEMORY_NV = 0x8000
CAPABILITIES = {"memory_controller": 2, "cpu_cache": 3}
"""Platform Capabilities (ACPI 6.5 §5.2.25.9), by persistence domain: what is flushed on power loss."""


def _header(signature: bytes, revision: int) -> Header:
    return Header(signature, 0, revision, 0, b"NVDRV ", OEM_TABLE_ID, 1, b"NVDR", 1)


def ssdt(layout: GuestLayout) -> bytes:
    """Return the SSDT that Linux needs to use an NFIT: the NVDIMM root device with a child device for each NVDIMM.

    Without ``_DSM``, Linux makes one label-less namespace of each region and logs no errors. (QEMU's own SSDT causes
    dozens of ACPI errors when nothing answers its ``_DSM``.) With ``dsm`` ``aml``, the NVDIMMs with a label area get a
    ``_DSM`` that serves it.

    :raises AcpiError: when a handle is not 1 to 256, as QEMU's are.
    """
    # Revision 2: integers have 64 bits.
    #
    # Scope (\_SB) {
    #     Device (NVDR) {                  ACPI 6.5 §9.19.2: the NVDIMM root device
    #         Name (_HID, "ACPI0012")
    #         …                            methods that serve labels
    #         Device (NV00) {              named by slot, as QEMU does
    #             Name (_ADR, 1)           the handle
    #             …
    #         } …
    #
    # With hot-plug slots, each NVDIMM is in a slot of its own instead (:mod:`.slot_methods`).
    served = layout.label_areas
    if layout.slots:
        labels = layout.dsm == "aml"
        shared = [*label_methods.methods()] if labels else []
        requests = {placement.slot: 1 for placement in layout.nvdimms}
        terms = [*shared, *slot_methods.terms(layout.slots, requests, labels=labels)]
        terms += [label_methods.reservation(served)] if served else []
        return seal(_header(b"SSDT", 2), aml.scope("_SB", *terms))
    devices = [
        _device(placement, label_methods.dsm(placement)) if served and placement.label_size else _device(placement)
        for placement in layout.nvdimms
    ]
    name = aml.name("_HID", aml.string("ACPI0012"))
    if served:
        terms = [aml.device("NVDR", name, *label_methods.methods(), *devices), label_methods.reservation(served)]
    else:
        terms = [aml.device("NVDR", name, *devices)]
    return seal(_header(b"SSDT", 2), aml.scope("_SB", *terms))


def slot_records(layout: GuestLayout, table: bytes) -> dict[int, SlotRecord]:
    """Return the records of a guest's NVDIMMs when it starts, by slot; empty for a guest without hot-plug slots.

    :param table: the guest's NFIT.
    :raises AcpiError: when an NVDIMM is not in it.
    """
    found, served = Nfit.parse(table), layout.label_areas
    return {
        placement.slot: SlotRecord(
            plugs=1,
            requests=1,
            label_size=placement.label_size if placement in served else 0,
            label_base=placement.label_base if placement in served else 0,
            structures=found.of_nvdimm(placement.handle),
        )
        for placement in (layout.nvdimms if layout.slots else ())
    }


def _device(placement: Placement, *terms: bytes) -> bytes:
    return aml.device(f"NV{placement.slot:02X}", aml.name("_ADR", aml.integer(placement.handle)), *terms)


def nfit(layout: GuestLayout) -> bytes:
    """Return an NFIT with QEMU's structures (hw/acpi/nvdimm.c), in slot order, with the driver's own header."""
    structures: list[Structure] = []
    for placement in layout.nvdimms:
        structures += _structures(placement)
    if capabilities := CAPABILITIES.get(layout.persistence_domain):
        structures.append(PlatformCapabilities(1, reserved=bytes(3), capabilities=capabilities, reserved2=0))
    return Nfit(_header(b"NFIT", 1), tuple(structures)).to_bytes()


def _structures(placement: Placement) -> tuple[Structure, ...]:
    spa_index = placement.handle * 2
    control_index = spa_index + 1
    return (
        SpaRange(
            index=spa_index,
            flags=3,
            reserved=0,
            proximity_domain=placement.node or 0,
            guid=PERSISTENT_MEMORY.bytes_le,
            base=placement.base,
            length=placement.size,
            attributes=_EFI_MEMORY_WB | _EFI_MEMORY_NV,
        ),
        RegionMapping(
            handle=placement.handle,
            physical_id=0,
            region_id=0,
            spa_index=spa_index,
            control_index=control_index,
            size=placement.size,
            offset=0,
            dpa=0,
            interleave_index=0,
            interleave_ways=1,
            flags=0,
            reserved=0,
        ),
        ControlRegion(
            index=control_index,
            vendor=NVDIMM_VENDOR,
            device=1,
            revision=1,
            subsystem_vendor=0,
            subsystem_device=0,
            subsystem_revision=0,
            valid_fields=0,
            manufacturing_location=0,
            manufacturing_date=0,
            reserved=0,
            serial=serial_number(placement.slot),
            interface_code=0x301,  # byte addressable, energy backed
            block_windows=0,
            window=bytes(48),
        ),
    )


class NativeAcpiBuilder(AcpiBuilder):
    """Builds the tables in this process, in about a millisecond."""

    def describe(self) -> str:
        return "NFIT and SSDT built by the driver itself; needs nothing"

    def build(self, layout: GuestLayout) -> AcpiTables:
        check_layout(layout)
        if layout.label_clients:
            raise ConfigError(
                "a QEMU cannot serve the label areas (dsm = qemu) when the ACPI builder is 'native'",
                hint="use dsm 'aml', or the builder 'qemu'",
            )
        tables = (nfit(layout), ssdt(layout))
        check_tables(layout, tables)
        check_space(tables)
        return AcpiTables(tables)
