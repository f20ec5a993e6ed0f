"""Define a domain with NVDIMMs through libvirt's own API."""

from __future__ import annotations

from dataclasses import replace

import libvirt
from oslo_config import cfg

from nvdimm_driver import domxml
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import ConfigError, NvdimmError


def define(xml: str, conf: cfg.ConfigOpts, driver: XenNvdimmDriver) -> str:
    """Check, define in libvirt, provision. What libvirt had defined before comes back when that fails.

    :param xml: domain XML as the user wrote it; one without NVDIMMs is defined as it stands.
    :returns: the domain's name.
    :raises NvdimmError: nothing is defined and nothing provisioned then.
    """
    domain = domxml.extract(xml)
    if domain is not None:
        driver.reconcile()
        driver.plan(domain)
    rewritten = domxml.rewrite(xml, conf.xen.device_model)
    try:
        connection = libvirt.open(conf.libvirt.uri)
    except libvirt.libvirtError as error:
        raise ConfigError(f"cannot connect to {conf.libvirt.uri}: {error}", hint="is libvirtd running?") from error
    with connection:
        before = _definition(connection, domain.uuid if domain else None)
        try:
            defined = connection.defineXML(rewritten)
        except libvirt.libvirtError as error:
            raise NvdimmError(f"libvirt refuses the definition: {error}") from error
        if domain is not None:
            try:
                driver.define(replace(domain, uuid=defined.UUIDString()))
            except BaseException:
                if before is None:
                    defined.undefine()
                else:
                    connection.defineXML(before)
                raise
        return str(defined.name())


def _definition(connection: libvirt.virConnect, uuid: str | None) -> str | None:
    """The persistent definition that libvirt has now. A domain without uuid in its XML is always new to libvirt."""
    if uuid is None:
        return None
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT):
        if domain.UUIDString() == uuid:
            return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))
    return None
