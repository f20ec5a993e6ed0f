# SPDX-License-Identifier: Apache-2.0
"""nova's fake libvirt in the shape of libvirt's libxl driver.

What it answers about the host, and what it does not implement, is as in libvirt 9.0 (``tests/data/libxl`` is what that
printed). Definitions and starts reach a :class:`~tests.nova.functional.host.PmemHost`, as they do through nvdimmd and
the hook; an error there is the client's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nova.tests.fixtures import libvirt

from nvdimm_driver.errors import NvdimmError
from tests.nova.functional.host import PmemHost

DATA = Path(__file__).parents[2] / "data/libxl"
LIBVIRT_VERSION = 9_000_000
XEN_VERSION = 4_017_000
VIR_FROM_LIBXL = 40

T = TypeVar("T")


class XenConnection(libvirt.Connection):
    """A connection to ``xen:///system``.

    :ivar defined: the XML of each domain, by uuid, as the client has sent it.
    :ivar failing: starts fail, after the hook.
    """

    def __init__(self, pmem: PmemHost, hostname: str, host_info: libvirt.HostInfo) -> None:
        super().__init__(
            "qemu:///system", version=LIBVIRT_VERSION, hv_version=XEN_VERSION, hostname=hostname, host_info=host_info
        )
        self._uri = "xen:///system"
        self.pmem = pmem
        self.defined: dict[str, str] = {}
        self.failing = False
        dom0 = Domain(self, (DATA / "domain-0.xml").read_text())
        dom0._state = libvirt.VIR_DOMAIN_RUNNING
        dom0._id = 0
        self._vms["Domain-0"] = dom0

    def getType(self) -> str:
        return "Xen"

    def getCapabilities(self) -> str:
        return (DATA / "capabilities.xml").read_text()

    def getDomainCapabilities(self, emulator: str, arch: str, machine: str, virt_type: str, flags: int) -> str:
        if machine not in (None, "xenpv", "xenpvh", "xenfv"):
            raise _error(f"invalid argument: unknown machine {machine}")
        return (DATA / "domain-capabilities.xml").read_text()

    def getCPUMap(self) -> Any:
        raise _unsupported("virNodeGetCPUMap")

    def getCPUModelNames(self, arch: str) -> Any:
        raise _unsupported("virConnectGetCPUModelNames")

    def getCPUStats(self, cpu: int, flags: int) -> Any:
        raise _unsupported("virNodeGetCPUStats")

    def defineXML(self, xml: str) -> Domain:
        _told(lambda: self.pmem.define(xml))
        domain = Domain(self, xml)
        known = self._vms.get(domain.name())
        if known is not None:
            domain._state, domain._id = known._state, known._id
        self._vms[domain.name()] = domain
        self.defined[domain.UUIDString()] = xml
        return domain


class Domain(libvirt.Domain):
    """A domain of a :class:`XenConnection`."""

    def createWithFlags(self, flags: int) -> None:
        connection = self._connection
        _told(lambda: connection.pmem.start(connection.defined[self.UUIDString()]))
        if connection.failing:
            connection.pmem.stop(self.UUIDString())
            raise _error("libxenlight failed to create new domain")
        super().createWithFlags(flags)

    def destroy(self) -> None:
        super().destroy()
        self._connection.pmem.stop(self.UUIDString())

    def shutdown(self) -> None:
        super().shutdown()
        self._state = libvirt.VIR_DOMAIN_SHUTOFF
        self._connection.pmem.stop(self.UUIDString())


def _told(work: Callable[[], T]) -> T:
    """A refusal of nvdimmd or the hook is libvirt's error to its client."""
    try:
        return work()
    except NvdimmError as error:
        raise _error(str(error)) from error


def _error(message: str, code: int = libvirt.VIR_ERR_INTERNAL_ERROR) -> Exception:
    error: Exception = libvirt.make_libvirtError(
        libvirt.libvirtError, message, error_code=code, error_domain=VIR_FROM_LIBXL
    )
    return error


def _unsupported(function: str) -> Exception:
    message = f"this function is not supported by the connection driver: {function}"
    return _error(message, libvirt.VIR_ERR_NO_SUPPORT)
