# SPDX-License-Identifier: Apache-2.0
"""Calls to libvirtd that handlers make: the client's own, and questions about a domain."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from nvdimm_driver.errors import VIR_ERR_CONFIG_UNSUPPORTED, UnsupportedError
from nvdimm_driver.rpc.handler_types import Call, Pool, Work
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer, RemoteError, Unpacker
from nvdimm_driver.xml import definition_files
from nvdimm_driver.xml.client_xml import ClientDomain

LOG = logging.getLogger(__name__)

NO_DOMAIN, OPERATION_INVALID = 42, 55  # include/libvirt/virterror.h
XML_SECURE, XML_INACTIVE = 1, 2
START_VALIDATE, DEFINE_VALIDATE = 1 << 4, 1 << 0  # include/libvirt/libvirt-domain.h

Steps = Generator[Call | Work, Any, bytes]


class Known(NamedTuple):
    """A domain as libvirt has it.

    :ivar xml: its definition or, of a transient domain, the XML of its guest; None when libvirt has no such domain.
    """

    xml: str | None
    is_persistent: bool


VALIDATE: Mapping[int, int] = {
    Procedure.DOMAIN_CREATE_XML: START_VALIDATE,
    Procedure.DOMAIN_CREATE_XML_WITH_FILES: START_VALIDATE,
    Procedure.DOMAIN_DEFINE_XML_FLAGS: DEFINE_VALIDATE,
}
"""The flag with which a client asks for validation."""


def call(procedure: int, payload: bytes, *, with_fds: bool = False) -> Steps:
    """Make a call, and return the reply."""
    reply: bytes = yield Call(procedure, payload, with_fds)
    return reply


def has_managed_save(domain: DomainRef, save_dir: str) -> Generator[Call | Work, Any, bool]:
    """Return True if a domain has a managed save, from which it would be started.

    libvirt answers by what it has found when it was started, or has saved since. A start takes what is in its folder,
    also that of a domain which libvirt does not know before (src/libxl/libxl_domain.c:libxlDomainStart).
    """
    if (yield from find(domain.uuid)) is None:
        name, uuid = domain.name, domain.uuid
        return bool((yield Work(lambda: definition_files.has_managed_save(save_dir, name, uuid), Pool.HOST)))
    arguments = bytes(Packer().domain(domain).uint32(0))
    if Unpacker((yield from call(Procedure.DOMAIN_HAS_MANAGED_SAVE_IMAGE, arguments))).int32() == 1:
        return True
    known: DomainRef | None = (yield from find(domain.uuid)) if save_dir else None  # whatever the client calls it
    if known is None:
        return False
    name, uuid = known.name, known.uuid
    return bool((yield Work(lambda: definition_files.has_managed_save(save_dir, name, uuid), Pool.HOST)))


def pass_xml(procedure: int, payload: bytes, read: ClientDomain, *, with_fds: bool = False) -> Steps:
    """Make a call with the client's domain XML; if it fails for NVDIMMs of another type of domain, name the type."""
    try:
        return (yield from call(procedure, payload, with_fds=with_fds))
    except LibvirtError as error:
        told = RemoteError.unpack(error.payload)
        if told.code != VIR_ERR_CONFIG_UNSUPPORTED or read.other_type is None:
            raise
        message = f"{told.message} (the domain is of type {read.other_type!r}; for Xen, write <domain type='xen'>)"
        raise LibvirtError(told._replace(message=message).pack()) from error


def ask(procedure: Procedure, domain: DomainRef) -> Generator[Call | Work, Any, bool]:
    """Return the answer to a question of libvirt's about a domain."""
    return Unpacker((yield from call(procedure, bytes(Packer().domain(domain))))).int32() == 1


def find(uuid: str) -> Generator[Call | Work, Any, DomainRef | None]:
    """Return libvirt's domain of that uuid, which is defined or runs; None when there is none."""
    try:
        return Unpacker((yield from call(Procedure.DOMAIN_LOOKUP_BY_UUID, bytes(Packer().uuid(uuid))))).domain()
    except LibvirtError as error:
        if RemoteError.unpack(error.payload).code == NO_DOMAIN:
            return None
        raise


def is_idle(uuid: str) -> Generator[Call | Work, Any, bool]:
    """Return True if libvirt neither runs nor starts a domain.

    It answers the second call after it has ended any other job of the domain, such as a start, or gives up after 30 s
    (src/libxl/libxl_driver.c:libxlDomainMemoryStats).
    """
    try:
        domain = yield from find(uuid)
        if domain is not None:
            yield from call(Procedure.DOMAIN_MEMORY_STATS, bytes(Packer().domain(domain).uint32(1).uint32(0)))
    except LibvirtError as error:
        return RemoteError.unpack(error.payload).code in (NO_DOMAIN, OPERATION_INVALID)
    return domain is None


def definition(domain: DomainRef) -> Generator[Call | Work, Any, str]:
    """Return a domain's definition as libvirt has it."""
    arguments = bytes(Packer().domain(domain).uint32(XML_INACTIVE | XML_SECURE))
    return Unpacker((yield from call(Procedure.DOMAIN_GET_XML_DESC, arguments))).string()


def current_xml(domain: DomainRef) -> Generator[Call | Work, Any, str]:
    """Return a domain's XML as libvirt has it: of its guest while that runs, of its definition otherwise."""
    return Unpacker((yield from call(Procedure.DOMAIN_GET_XML_DESC, bytes(Packer().domain(domain).uint32(0))))).string()


def defined_xml(uuid: str | None) -> Generator[Call | Work, Any, str | None]:
    """Return the domain's existing definition; None when there is none."""
    found = None if uuid is None else (yield from find(uuid))
    return None if found is None else (yield from definition(found))


def known_definition(uuid: str) -> Generator[Call | Work, Any, Known]:
    """Return what libvirt has of a domain now."""
    found = yield from find(uuid)
    if found is None:
        return Known(None, False)
    return Known((yield from definition(found)), (yield from ask(Procedure.DOMAIN_IS_PERSISTENT, found)))


def put_back_definition(uuid: str, before: Known) -> Generator[Call | Work, Any, bool]:
    """Let libvirt have what it had of a domain, unless it has that still; return True if it has it then.

    The client gets the error that is the reason. A transient domain that was defined keeps that definition for its
    guest's next start, even undefined: it gets its own first.
    """
    try:
        if (yield from known_definition(uuid)) == before:
            return True
        if before.xml is not None:
            yield from call(Procedure.DOMAIN_DEFINE_XML, bytes(Packer().string(before.xml)))
        now = None if before.is_persistent else (yield from find(uuid))
        if now is not None:
            yield from call(Procedure.DOMAIN_UNDEFINE, bytes(Packer().domain(now)))
    except LibvirtError as error:
        told = RemoteError.unpack(error.payload).message
        LOG.error("domain %s: libvirt does not take its definition of before: %s", uuid, told)
        return False
    return True


def validates(procedure: int, flags: bytes) -> bool:
    """Return True when the client asks for its XML to be validated."""
    flag = VALIDATE.get(procedure, 0)
    return bool(flag and Unpacker(flags).uint32() & flag)


def xml_and_flags(payload: bytes) -> tuple[bytes, bytes]:
    """Return the XML that a call begins with, and its flags as on the wire; domain_define_xml has none."""
    values = Unpacker(payload)
    return values.encoded(), values.rest()


def cannot_migrate(domain: str) -> UnsupportedError:
    """Return the error for a migration of a domain with NVDIMMs."""
    return UnsupportedError(
        f"{domain} has NVDIMMs, and cannot be migrated: their contents are in the host's persistent memory and not in "
        "what Xen sends",
        hint="shut it down, copy the backings, and define it on the other host",
    )
