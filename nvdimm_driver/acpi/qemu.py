# SPDX-License-Identifier: Apache-2.0
"""The ACPI builder ``qemu``: takes the NFIT from QEMU.

It starts a QEMU with the guest's NVDIMMs and no guest, reads the files that QEMU has for its firmware, links them as
the firmware would, and ends QEMU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nvdimm_driver.acpi.cache import TableCache, key_of
from nvdimm_driver.acpi.linker import link, split
from nvdimm_driver.acpi.machine import DEFAULT_BINARIES, Machine, arguments, installed
from nvdimm_driver.acpi.native import ssdt
from nvdimm_driver.acpi.qtest import read_fw_cfg
from nvdimm_driver.acpi.tables import Header
from nvdimm_driver.acpi.verify import DSM_ADDRESS, OEM_TABLE_ID, check_layout, check_space, check_tables
from nvdimm_driver.errors import AcpiError
from nvdimm_driver.model import AcpiTables, GuestLayout
from nvdimm_driver.plugins import AcpiBuilder

if TYPE_CHECKING:
    from oslo_config import cfg

LOG = logging.getLogger(__name__)

_SCRIPT = "etc/table-loader"
_DSM_FILE = "etc/acpi/nvdimm-mem"


class QemuAcpiBuilder(AcpiBuilder):
    """Takes the NFIT from a QEMU, byte for byte.

    For label areas with ``dsm`` ``qemu`` it takes the SSDT, too; otherwise the SSDT is :func:`.native.ssdt`.

    :param binaries: names or paths of QEMUs (7.2 or later, i386 or x86_64), tried in order until one gives the tables.
    :param timeout: seconds that each may take.
    :param cache: stores the tables that QEMU gave.
    """

    def __init__(
        self,
        binaries: Sequence[str] = DEFAULT_BINARIES,
        timeout: float = 30.0,
        cache: TableCache | None = None,
    ) -> None:
        self._binaries = tuple(binaries)
        self._timeout = timeout
        self._cache = cache

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        return cls(conf.acpi.qemu, cache=TableCache(Path(conf.state_dir) / "acpi-cache"))

    def describe(self) -> str:
        return "NFIT taken from a stopped QEMU; needs one of " + ", ".join(self._binaries)

    def build(self, layout: GuestLayout) -> AcpiTables:
        """Return the NFIT and the SSDT and, for reference, all other tables that QEMU has for such a machine.

        :raises LayoutError: when tables cannot describe the layout, or do not fit.
        :raises ConfigError: when no QEMU is installed.
        :raises AcpiError: with each QEMU's reason, when none gave tables that match the layout.
        """
        check_layout(layout)
        failures: list[AcpiError] = []
        for binary in installed(self._binaries):
            try:
                tables = self._build(binary, layout)
            except AcpiError as error:
                LOG.warning("%s", error)
                failures.append(error)
            else:
                check_space(tables.tables)
                return tables
        raise AcpiError(
            "no ACPI tables from QEMU: " + "; ".join(failure.message for failure in failures),
            hint="install another QEMU (Debian: qemu-system-xen, qemu-system-x86), or use the ACPI builder 'native'",
        )

    def _build(self, binary: str, layout: GuestLayout) -> AcpiTables:
        key = key_of(binary, [*arguments(layout), hex(DSM_ADDRESS)])
        kept = self._cache.get(key) if self._cache else None
        if kept is not None:
            try:
                tables = _chosen(layout, kept)
                LOG.debug("ACPI tables of %s come from the cache", binary)
                return tables
            except AcpiError as error:
                LOG.warning("ACPI tables in the cache are wrong, and are taken from %s again: %s", binary, error)
        started = time.monotonic()
        harvested = self._harvest(binary, layout)
        seconds = time.monotonic() - started
        LOG.debug("took ACPI tables from %s in %.3f s", binary, seconds)
        tables = _chosen(layout, harvested, seconds)
        if self._cache:
            self._cache.put(key, harvested)
        return tables

    def _harvest(self, binary: str, layout: GuestLayout) -> tuple[bytes, ...]:
        """Return all tables that the QEMU has."""
        with Machine(binary, timeout=self._timeout).run(layout) as qtest:
            files = read_fw_cfg(qtest, "etc/acpi/") | read_fw_cfg(qtest, _SCRIPT)
        return split(link(files.pop(_SCRIPT, b""), files, {_DSM_FILE: DSM_ADDRESS}))


def _chosen(layout: GuestLayout, harvested: Sequence[bytes], seconds: float | None = None) -> AcpiTables:
    """Return a QEMU's tables, checked, those for the guest apart from the others.

    :param seconds: time that the QEMU took; None for tables from the cache.
    """
    chosen = [table for table in harvested if table[:4] == b"NFIT"]
    if layout.label_clients:
        chosen += [table for table in harvested if _is_nvdimm_ssdt(table)]
    else:
        chosen.append(ssdt(layout))
    check_tables(layout, chosen)
    return AcpiTables(tuple(chosen), tuple(table for table in harvested if table not in chosen), seconds)


def _is_nvdimm_ssdt(table: bytes) -> bool:
    """Return True for QEMU's own SSDT (hw/acpi/nvdimm.c:nvdimm_build_ssdt)."""
    header = Header.parse(table)
    return (header.signature, header.oem_table_id) == (b"SSDT", OEM_TABLE_ID)
