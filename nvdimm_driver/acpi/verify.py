# SPDX-License-Identifier: Apache-2.0
"""Checks of a layout before tables are built, and of the tables before a guest gets them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from nvdimm_driver.acpi.aml import named_integers, string
from nvdimm_driver.acpi.tables import PERSISTENT_MEMORY, Header, Nfit, RegionMapping, SpaRange, text, verify_table
from nvdimm_driver.errors import AcpiError, LayoutError
from nvdimm_driver.guest.p2m import DSM_GFN
from nvdimm_driver.model import GIB, MAX_NVDIMMS, PAGE, GuestLayout
from nvdimm_driver.sizes import human

MAX_NODES = 128
"""QEMU: include/sysemu/numa.h:MAX_NODES."""
MAX_TABLE_BYTES = 63 * PAGE
"""Size of the delivery area: a quarter of the 1 MiB of slack that libxl leaves a domain, less one page."""
MAX_SECONDARY_TABLES = 15
"""tools/libacpi/build.c: ACPI_MAX_SECONDARY_TABLES is 16 including the end mark; excess tables are dropped silently."""
OEM_TABLE_ID = b"NVDIMM\0\0"
"""OEM table ID of the NFIT and the SSDT, both QEMU's and the driver's."""
DSM_ADDRESS = DSM_GFN * PAGE
"""Guest-physical address of the page for requests to a label server (MEMA)."""
STOCK_TABLES = 6
"""Number of secondary tables that hvmloader always makes: MADT, HPET, WAET and three SSDTs (power, S3, S4)."""


def check_layout(layout: GuestLayout) -> None:
    """Check that an NFIT like QEMU's can describe the layout.

    :raises LayoutError: when it cannot.
    """
    if not 1 <= len(layout.nvdimms) <= MAX_NVDIMMS:
        raise LayoutError(f"{len(layout.nvdimms)} NVDIMMs: 1 to {MAX_NVDIMMS} are possible")
    end = 4 * GIB
    before = "the first 4 GiB, which are for RAM and devices"
    for placement in sorted(layout.nvdimms, key=lambda placement: placement.base):
        what = f"NVDIMM in slot {placement.slot}"
        if not 0 <= placement.slot < MAX_NVDIMMS:
            raise LayoutError(f"{what}: slots are 0 to {MAX_NVDIMMS - 1}")
        if placement.size <= 0 or placement.base % PAGE or placement.size % PAGE:
            raise LayoutError(
                f"{what}: base {placement.base:#x} and size {placement.size:#x} must be multiples of {human(PAGE)}, "
                "size not 0"
            )
        if placement.base < end:
            raise LayoutError(f"{what}: base {placement.base:#x} overlaps {before}")
        if placement.end > layout.limit:
            raise LayoutError(f"{what}: end {placement.end:#x} is beyond the guest's address limit, {layout.limit:#x}")
        if not 0 <= (placement.node or 0) < MAX_NODES:
            raise LayoutError(f"{what}: NUMA node {placement.node}; 0 to {MAX_NODES - 1} are possible")
        end, before = placement.end, f"the {what}"
    slot, count = Counter(placement.slot for placement in layout.nvdimms).most_common(1)[0]
    if count > 1:
        raise LayoutError(f"{count} NVDIMMs are in slot {slot}")


def check_tables(layout: GuestLayout, tables: Sequence[bytes]) -> None:
    """Check that the tables are one valid NFIT and one valid SSDT that match the layout exactly.

    NVDIMMs are matched by handle, because QEMU lists them in the order of a hash table.

    :raises AcpiError: at the first mismatch.
    """
    signatures = [verify_table(table).signature for table in tables]
    if sorted(signatures) != [b"NFIT", b"SSDT"]:
        found = ", ".join(map(text, signatures)) or "none"
        raise AcpiError(f"one NFIT and one SSDT are needed; the tables are: {found}")
    _check_nfit(layout, Nfit.parse(tables[signatures.index(b"NFIT")]))
    _check_ssdt(layout, tables[signatures.index(b"SSDT")])


def check_space(tables: Sequence[bytes], other_tables_count: int = 0) -> None:
    """Check that the tables fit the delivery area and hvmloader's list.

    :param other_tables_count: number of the user's own tables, which hvmloader gets besides these.
    :raises LayoutError: when they do not.
    """
    size = sum(len(table) for table in tables)
    if size > MAX_TABLE_BYTES:
        raise LayoutError(
            f"the ACPI tables have {human(size)}; {human(MAX_TABLE_BYTES)} fit", hint="give the guest fewer NVDIMMs"
        )
    count = len(tables) + other_tables_count
    if count > MAX_SECONDARY_TABLES - STOCK_TABLES:
        raise LayoutError(
            f"{len(tables)} ACPI tables of the driver and {other_tables_count} of the domain's own: "
            f"hvmloader takes {MAX_SECONDARY_TABLES - STOCK_TABLES} and drops the rest silently",
            hint="put fewer tables into <os><acpi><table>",
        )


def _check_nfit(layout: GuestLayout, nfit: Nfit) -> None:
    ranges = {found.index: found for found in nfit.of(SpaRange)}
    mappings = {found.handle: found for found in nfit.of(RegionMapping)}
    if len(ranges) != len(nfit.of(SpaRange)) or len(mappings) != len(nfit.of(RegionMapping)):
        raise AcpiError("NFIT: an SPA range index or a device handle occurs twice")
    asked = {placement.handle for placement in layout.nvdimms}
    if set(mappings) != asked or len(ranges) != len(asked):
        raise AcpiError(
            f"NFIT: {len(ranges)} SPA ranges and handles {_joined(mappings)}; expected handles {_joined(asked)}, "
            "with one range each"
        )
    for placement in layout.nvdimms:
        mapping = mappings[placement.handle]
        found = ranges.get(mapping.spa_index)
        if found is None:
            raise AcpiError(
                f"NFIT: handle {mapping.handle} is mapped to SPA range {mapping.spa_index}, which does not exist"
            )
        want = (placement.base, placement.size, placement.node or 0, PERSISTENT_MEMORY, placement.size, 0)
        got = (found.base, found.length, found.proximity_domain, found.kind, mapping.size, mapping.offset)
        if got != want:
            raise AcpiError(
                f"NFIT: handle {mapping.handle} has {found}; {mapping}; expected persistent memory at "
                f"{placement.base:#x}, length {placement.size:#x}, proximity domain {placement.node or 0}"
            )


def _check_ssdt(layout: GuestLayout, ssdt: bytes) -> None:
    body = ssdt[Header.SIZE :]
    if string("ACPI0012") not in body:
        raise AcpiError("SSDT: no ACPI0012 device, without which Linux ignores the NFIT")
    missing = {placement.handle for placement in layout.nvdimms} - set(named_integers(body, "_ADR"))
    if missing:
        raise AcpiError(f"SSDT: no device with _ADR {_joined(missing)}")
    if layout.label_clients and (addresses := named_integers(body, "MEMA")) != (DSM_ADDRESS,):
        raise AcpiError(f"SSDT: MEMA is {', '.join(map(hex, addresses)) or 'missing'}, not {DSM_ADDRESS:#x}")


def _joined(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
