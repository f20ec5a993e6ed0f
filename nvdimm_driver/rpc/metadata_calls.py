# SPDX-License-Identifier: Apache-2.0
"""Libvirt's calls for the metadata of a domain: clients neither write nor see the driver's own."""

from __future__ import annotations

from nvdimm_driver.errors import DomainXmlError
from nvdimm_driver.host_text import decode
from nvdimm_driver.rpc.handler_types import Pool, Work
from nvdimm_driver.rpc.libvirt_calls import Steps, call
from nvdimm_driver.rpc.xdr import LibvirtError, RemoteError, Unpacker
from nvdimm_driver.xml.client_xml import check_metadata, check_plain, check_text
from nvdimm_driver.xml.rewrite import NAMESPACE

METADATA_ELEMENT = 2  # include/libvirt/libvirt-domain.h
FROM_DOMAIN, NO_DOMAIN_METADATA = 20, 80  # include/libvirt/virterror.h

MARK = NAMESPACE.encode()


def set_metadata(interceptor: object, procedure: int, payload: bytes) -> Steps:
    """Refuse metadata with our namespace in it: it would change NVDIMMs without the driver.

    libvirt writes the name of a namespace into XML as it is.
    """
    del interceptor
    values = Unpacker(payload)
    values.domain()
    is_element, value = values.int32() == METADATA_ELEMENT, values.optional_encoded()
    names = values.optional_string(), values.optional_string()
    if MARK in payload:
        raise DomainXmlError(
            f"metadata of {NAMESPACE} is nvdimm_driver's own",
            hint="change the <memory model='nvdimm'> elements of the domain",
        )
    for name in names:
        check_plain(name or "")
    if is_element and value is not None:
        yield Work(lambda: check_metadata(value), Pool.XML)
    elif value is not None:
        check_text(decode(value))
    return (yield from call(procedure, payload))


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
