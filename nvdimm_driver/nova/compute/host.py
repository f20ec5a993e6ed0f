"""libvirt's libxl driver, as Nova asks it."""

from __future__ import annotations

from typing import Any

from nova.virt.libvirt import host

DOM0 = 0
"""Its domid; libvirt lists it with the guests."""
_PVH = "xenpvh"
"""What libvirt calls an OS type that Nova has no name for (nova.objects.fields.VMMode)."""


class XenHost(host.Host):
    """nova.virt.libvirt.host.Host of a Xen host."""

    # Host.get_capabilities: without PVH guests, for whose OS type LibvirtDriver._get_instance_capabilities raises.
    def get_capabilities(self) -> Any:
        caps = super().get_capabilities()
        caps.guests = [guest for guest in caps.guests if guest.ostype != _PVH]
        return caps

    # Host._get_machine_types: libxl knows the machines xenpv and xenfv alone; Nova asks for "pc" (for x86_64), which
    # is an error, and gives up the architecture's capabilities with it. They have no aliases, which Nova asks for, too.
    def _get_machine_types(self, arch: str, domain: Any) -> set[str]:
        return set(domain.machines)

    # Host.get_available_cpus, get_online_cpus: libxl has no virNodeGetCPUMap. It counts the CPUs that Xen has online
    # (libxl_driver.c:libxlNodeGetInfo).
    def get_available_cpus(self) -> set[int]:
        return set(range(self._get_hardware_info()[2]))

    def get_online_cpus(self) -> set[int]:
        return self.get_available_cpus()

    # Host.list_instance_domains: Dom0 is not an instance.
    def list_instance_domains(self, only_running: bool = True) -> list[Any]:
        return [domain for domain in super().list_instance_domains(only_running) if domain.ID() != DOM0]

    # Host.get_memory_mb_used: /proc/meminfo, from which Nova takes it, is of Dom0 alone. All that any domain has is
    # used, Dom0's own memory, too.
    def get_memory_mb_used(self) -> int:
        dom0 = [domain for domain in super().list_instance_domains() if domain.ID() == DOM0]
        of_dom0: int = sum(domain.info()[2] for domain in dom0) // 1024
        guests: int = self._sum_domain_memory_mb()
        return guests + of_dom0
