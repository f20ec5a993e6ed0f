# SPDX-License-Identifier: Apache-2.0
"""Nova's view of a Xen host, through libvirt's libxl driver."""

from __future__ import annotations

from typing import Any

from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import host

from nvdimm_driver.nova.compute.compatibility import ASSIGNED, expect, overridden, overrides

DOM0 = 0
"""Dom0's domid; libvirt lists Dom0 with the guests."""
_PVH = "xenpvh"
"""libvirt's name for the OS type PVH, which nova.objects.fields.VMMode does not have."""


class XenHost(host.Host):
    """nova.virt.libvirt.host.Host for a Xen host, without the calls that libxl does not have."""

    @overrides("(self)")
    def get_capabilities(self) -> Any:
        """Return libvirt's capabilities without PVH guests.

        LibvirtDriver._get_instance_capabilities raises an exception for an OS type that Nova does not know.
        """
        caps = super().get_capabilities()
        caps.guests = [guest for guest in caps.guests if guest.ostype != _PVH]
        return caps

    @overrides("(self, arch, domain)")
    def _get_machine_types(self, arch: str, domain: Any) -> set[str]:
        """Return the machine types that libxl has, xenpv and xenfv.

        For x86_64 Nova asks for "pc", for which libxl returns an error, and Nova then drops the capabilities of the
        whole architecture. Nova asks for the aliases of machine types, too; libxl has none.
        """
        return set(domain.machines)

    @overrides("(self)")
    def get_available_cpus(self) -> set[int]:
        """Return the numbers of the CPUs that are online in Xen.

        libxl has no virNodeGetCPUMap, which Nova calls; libxlNodeGetInfo (libxl_driver.c) counts the CPUs.
        """
        return set(range(self._get_hardware_info()[2]))

    @overrides("(self)")
    def get_online_cpus(self) -> set[int]:
        """Return the same as get_available_cpus, and for the same reason."""
        return self.get_available_cpus()

    @overrides("(self, only_running=True)")
    def list_instance_domains(self, only_running: bool = True) -> list[Any]:
        """Return the domains without Dom0, which is not an instance."""
        return [domain for domain in super().list_instance_domains(only_running) if domain.ID() != DOM0]

    @overrides("(self)")
    def get_memory_mb_used(self) -> int:
        """Return the memory of all domains, Dom0 included.

        Nova reads /proc/meminfo, which describes Dom0's memory alone.
        """
        dom0 = [domain for domain in super().list_instance_domains() if domain.ID() == DOM0]
        of_dom0: int = sum(domain.info()[2] for domain in dom0) // 1024
        guests: int = self._sum_domain_memory_mb()
        return guests + of_dom0


EXPECTED = (
    *overridden(XenHost, host.Host),
    *expect(
        host.Host,
        {
            "__init__": "(self, uri, read_only=False, conn_event_handler=None, lifecycle_event_handler=None)",
            "_get_hardware_info": "(self)",
            "_sum_domain_memory_mb": "(self)",
        },
    ),
    *expect(
        vconfig,
        {
            "LibvirtConfigCaps.guests": ASSIGNED,
            "LibvirtConfigCapsGuest.ostype": ASSIGNED,
            "LibvirtConfigCapsGuestDomain.machines": ASSIGNED,
        },
    ),
)
