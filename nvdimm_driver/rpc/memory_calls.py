# SPDX-License-Identifier: Apache-2.0
"""Libvirt's calls that change a domain's RAM: what they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nvdimm_driver.errors import UnsupportedError
from nvdimm_driver.model import KIB
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, Unpacker
from nvdimm_driver.xml.parse_domain import DefinedMemory

# include/libvirt/libvirt-domain.h
AFFECT_LIVE, AFFECT_CONFIG = 1, 2
MEM_MAXIMUM = 4

MEMORY_FLAGS: Mapping[int, int] = {
    Procedure.DOMAIN_SET_MAX_MEMORY: MEM_MAXIMUM,
    Procedure.DOMAIN_SET_MEMORY: AFFECT_LIVE,
}
"""Memory calls without flags, and what they mean."""


@dataclass(frozen=True)
class MemoryCall:
    """A call that changes a domain's RAM, or the part of it that its guest has.

    :ivar size: bytes.
    :ivar flags: VIR_DOMAIN_MEM_*.
    """

    domain: DomainRef
    size: int
    flags: int

    @classmethod
    def unpack(cls, procedure: int, payload: bytes) -> MemoryCall:
        """Return the call with these arguments."""
        values = Unpacker(payload)
        domain, size = values.domain(), values.uint64() * KIB
        flags = MEMORY_FLAGS[procedure] if procedure in MEMORY_FLAGS else values.uint32()
        values.end()
        return cls(domain, size, flags)

    @property
    def is_maximum(self) -> bool:
        """Return True when all of the RAM changes, and not only the part that the guest has."""
        return bool(self.flags & MEM_MAXIMUM)

    def is_live(self, runs: bool) -> bool:
        """Return True when the running guest changes."""
        return bool(self.flags & AFFECT_LIVE) or (runs and not self.flags & AFFECT_CONFIG)

    def is_persistent(self, runs: bool) -> bool:
        """Return True when the definition changes."""
        return bool(self.flags & AFFECT_CONFIG) or not self.is_live(runs)

    def check_populated(self, defined: DefinedMemory) -> None:
        """Check that the guest, which has NVDIMMs, would start with all of its RAM, and no other.

        :param defined: in its definition.
        :raises UnsupportedError: when it would not.
        """
        if self.is_maximum and defined.has_cells and self.size != defined.ram:
            raise UnsupportedError(
                f"domain {self.domain.name} has NVDIMMs and NUMA cells, which have {defined.ram // KIB} KiB together: "
                f"libvirt would start it with {self.size // KIB} KiB",
                hint="change the cells: virsh edit",
            )
        if not self.is_maximum and self.size < defined.ram:
            raise UnsupportedError(
                f"domain {self.domain.name} has NVDIMMs, and {self.size // KIB} KiB is less than its RAM: it would "
                "start with memory populated on demand, which Xen does not do together with mapped frames",
                hint="change the maximum instead: virsh setmaxmem",
            )

    def check_saveable(self, ram: int) -> None:
        """Check that the running guest, which has NVDIMMs, could go on after a save: that starts it with what it has.

        :param ram: bytes that it was started with.
        :raises UnsupportedError: when it could not.
        """
        if self.size < ram:
            raise UnsupportedError(
                f"domain {self.domain.name} runs and has NVDIMMs: saved with {self.size // KIB} KiB, below its RAM, "
                "it would go on with memory populated on demand, which Xen does not do together with mapped frames",
                hint="change the RAM of its next start: virsh setmaxmem --config",
            )

    def check_startable(self, current: int) -> None:
        """Check that a domain that runs could start again with this maximum, as a reboot of its guest makes it do.

        :param current: bytes of ``<currentMemory>`` in its definition. While the domain runs, libvirt raises it no
            further than to the guest's RAM of now (libxl_driver.c:libxlDomainSetMemoryFlags).
        :raises UnsupportedError: when it could not.
        """
        if self.size > current:
            raise UnsupportedError(
                f"domain {self.domain.name} runs and has NVDIMMs: with a maximum above its <currentMemory> of "
                f"{current // KIB} KiB, it would not start again after a reboot",
                hint="shut it down first; or raise <memory> and <currentMemory> together: virsh edit",
            )
