# SPDX-License-Identifier: Apache-2.0
"""Find the saved guests (``virsh managedsave``) that cannot go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from nvdimm_driver.doctor.libvirt import ASK_TIMEOUT, Connection
from nvdimm_driver.doctor.repair import Inconsistency
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NvdimmError, ProtocolError
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError
from nvdimm_driver.xml.parse_domain import has_nvdimms

LOG = logging.getLogger(__name__)


def look(driver: XenNvdimmDriver, restore: Callable[[str], str], socket: str) -> list[Inconsistency]:
    """Find the domains that libvirt has a saved guest of which its start would be refused for; change nothing.

    :param restore: restores domain XML that libvirt has.
    :param socket: of libvirt's daemon; nothing is found when it cannot be asked.
    """
    try:
        with Connection(socket, ASK_TIMEOUT) as connection:
            saved = list(_saved(driver, connection, restore))
    except (OSError, LibvirtError, ProtocolError) as error:
        LOG.info("%s: libvirt cannot be asked for saved guests: %s", socket, error)
        return []
    return [found for domain in saved for found in _refused(driver, domain)]


def _saved(driver: XenNvdimmDriver, connection: Connection, restore: Callable[[str], str]) -> Iterator[DomainRef]:
    """Yield the domains with NVDIMMs that have a managed save."""
    for domain in connection.domains():
        if domain.id >= 0 or not connection.has_managed_save(domain.name, domain.uuid):
            continue
        known = driver.ledger.find_domain(domain.uuid) is not None
        if known or has_nvdimms(restore(connection.xml(domain, inactive=True))):
            yield domain


def _refused(driver: XenNvdimmDriver, domain: DomainRef) -> Iterator[Inconsistency]:
    try:
        driver.check_restore(domain.uuid)
    except NvdimmError as error:
        yield Inconsistency(domain.name, "", error.message, error.hint)
