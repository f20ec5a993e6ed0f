# SPDX-License-Identifier: Apache-2.0
"""Libvirt's calls for the metadata of a domain: clients neither write nor see the driver's own."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

from nvdimm_driver.errors import DomainXmlError
from nvdimm_driver.host_text import decode
from nvdimm_driver.rpc.handler_types import Call, Pool, Work
from nvdimm_driver.rpc.libvirt_calls import Steps, call
from nvdimm_driver.rpc.memory_calls import AFFECT_LIVE
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer, RemoteError, Unpacker
from nvdimm_driver.xml.client_xml import Added, cannot_set_options, check_metadata, check_plain, check_text
from nvdimm_driver.xml.parse_domain import OPTIONS
from nvdimm_driver.xml.rewrite import NAMESPACE, PREFIX

METADATA_ELEMENT = 2  # include/libvirt/libvirt-domain.h
FROM_DOMAIN, NO_DOMAIN_METADATA = 20, 80  # include/libvirt/virterror.h

MARK = NAMESPACE.encode()


class Metadata(NamedTuple):
    """Metadata that a client gives a domain.

    :ivar added: None when it removes some.
    """

    domain: DomainRef
    added: Added | None


def new_metadata(payload: bytes) -> Generator[Call | Work, Any, Metadata]:
    """Return what a call sets.

    libvirt writes the name of a namespace into XML as it is.

    :raises DomainXmlError: when it has our namespace in it, which would change NVDIMMs without the driver, sets or
        removes our options, or is something else in XML.
    """
    values = Unpacker(payload)
    domain, is_element, value = values.domain(), values.int32() == METADATA_ELEMENT, values.optional_encoded()
    key, namespace = values.optional_string() or "", values.optional_string() or ""
    if MARK in payload:
        raise DomainXmlError(
            f"metadata of {NAMESPACE} is nvdimm_driver's own",
            hint="change the <memory model='nvdimm'> elements of the domain",
        )
    for name in (key, namespace):
        check_plain(name)
    if namespace == OPTIONS:
        raise cannot_set_options()
    added: Added | None = None
    if is_element and value is not None:
        xml = value
        added = yield Work(lambda: check_metadata(xml, key, namespace), Pool.XML)
    elif value:
        added = check_text(decode(value))
    return Metadata(domain, added)


def set_live_record(domain: DomainRef, record: str) -> Steps:
    """Replace our metadata of a running domain.

    :param record: without the namespace, which libvirt adds.
    """
    arguments = Packer().domain(domain).int32(METADATA_ELEMENT).optional_string(record)
    arguments = arguments.optional_string(PREFIX).optional_string(NAMESPACE).uint32(AFFECT_LIVE)
    return (yield from call(Procedure.DOMAIN_SET_METADATA, bytes(arguments)))


def get_metadata(interceptor: object, procedure: int, payload: bytes) -> Steps:
    """Hide our metadata from clients."""
    del interceptor
    if MARK in payload:
        values = Unpacker(payload)
        values.domain()
        if values.int32() == METADATA_ELEMENT and values.optional_string() == NAMESPACE:
            message = "metadata not found: Requested metadata element is not present"
            raise LibvirtError(RemoteError(NO_DOMAIN_METADATA, FROM_DOMAIN, message).pack())
    return (yield from call(procedure, payload))
