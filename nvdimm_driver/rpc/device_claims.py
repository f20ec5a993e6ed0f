# SPDX-License-Identifier: Apache-2.0
"""Ask libvirtd, before a domain starts with a device, whether another domain's definition has it.

Devices have no marks: a ledger from a backup may say that one is a domain's which has given it up since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from functools import partial
from typing import Any

from nvdimm_driver.errors import InUseError, NvdimmError
from nvdimm_driver.model import Record
from nvdimm_driver.rpc.handler_types import Call, Pool, Work
from nvdimm_driver.rpc.libvirt_calls import call
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import LibvirtError, Packer, Unpacker
from nvdimm_driver.xml.parse_domain import memory_of

XML_INACTIVE = 2  # VIR_DOMAIN_XML_INACTIVE (include/libvirt/libvirt-domain.h)


def check_uncontested(record: Record, restore: Callable[[str], str]) -> Generator[Call | Work, Any, None]:
    """Check that no other domain that libvirt knows has one of a domain's devices.

    :param restore: restores domain XML that libvirt has.
    :raises InUseError: when one has.
    """
    devices = {item.spec.path for item in record.allocations if item.identity and not item.identity.inode}
    if not devices:
        return
    all_domains = bytes(Packer().int32(1).uint32(0))
    reply = Unpacker((yield from call(Procedure.CONNECT_LIST_ALL_DOMAINS, all_domains)))
    for domain in [reply.domain() for _ in range(reply.uint32())]:
        if domain.uuid == record.uuid:
            continue
        try:
            xml = yield from call(Procedure.DOMAIN_GET_XML_DESC, bytes(Packer().domain(domain).uint32(XML_INACTIVE)))
        except LibvirtError:
            continue  # it has ended or was undefined meanwhile
        found = yield Work(partial(_devices_in, Unpacker(xml).string(), devices, restore), Pool.DUMP)
        for path in sorted(found):
            raise InUseError(
                f"{path} is in libvirt's definition of domain {domain.name}, too",
                hint="'nvdimmctl check' says what to do",
            )


def _devices_in(xml: str, devices: Collection[str], restore: Callable[[str], str]) -> set[str]:
    """Return which of these devices the NVDIMMs of libvirt's XML have."""
    if not any(path in xml for path in devices):
        return set()
    try:
        memory = memory_of(restore(xml))
    except NvdimmError:
        return set()  # it cannot be started either
    return {*devices} & {*(memory.paths if memory else ())}
