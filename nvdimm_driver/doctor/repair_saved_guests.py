# SPDX-License-Identifier: Apache-2.0
"""Find the saved guests (``virsh managedsave``) that cannot go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from nvdimm_driver.doctor.libvirt import ASK_TIMEOUT, Connection
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NvdimmError, ProtocolError
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xml.definition_files import DefinitionFiles
from nvdimm_driver.xml.parse_domain import has_nvdimms

LOG = logging.getLogger(__name__)


def look(driver: XenNvdimmDriver, restore: Callable[[str], str], socket: str, save_dir: str) -> list[Inconsistency]:
    """Find the domains that libvirt has a saved guest of which its start would be refused for; change nothing.

    :param restore: restores domain XML that libvirt has.
    :param socket: of libvirt's daemon.
    :param save_dir: libvirt's folder of managed saves.
    """
    return [found for domain in saved(driver.ledger, restore, socket, save_dir) for found in _refused(driver, domain)]


def saved(ledger: Ledger, restore: Callable[[str], str], socket: str, save_dir: str) -> list[DomainRef]:
    """Return the domains with NVDIMMs that have a managed save. For the arguments, see :func:`look`."""
    try:
        with Connection(socket, ASK_TIMEOUT) as connection:
            return list(_saved(ledger, connection, restore, save_dir))
    except (OSError, LibvirtError, ProtocolError) as error:
        LOG.warning("%s: libvirt cannot be asked for saved guests, so %s is read: %s", socket, save_dir, error)
        return list(_stored(ledger, save_dir, restore))


def _saved(ledger: Ledger, connection: Connection, restore: Callable[[str], str], save_dir: str) -> Iterator[DomainRef]:
    for domain in connection.domains():
        if domain.id >= 0 or not connection.has_managed_save(domain.name, domain.uuid, save_dir):
            continue
        known = ledger.find_domain(domain.uuid) is not None
        if known or has_nvdimms(restore(connection.xml(domain, inactive=True))):
            yield domain


def _stored(ledger: Ledger, save_dir: str, restore: Callable[[str], str]) -> Iterator[DomainRef]:
    for image in DefinitionFiles((), restore, str).saved(save_dir):
        known = ledger.find_domain(image.uuid) if image.uuid else next(iter(ledger.named(image.name)), None)  # damaged
        if image.has_any or known:
            yield DomainRef(image.name, known.uuid if known else image.uuid, -1)


def _refused(driver: XenNvdimmDriver, domain: DomainRef) -> Iterator[Inconsistency]:
    try:
        driver.check_restore(domain.uuid)
    except NvdimmError as error:
        yield Inconsistency(domain.name, domain.uuid, "", error.message, error.hint)
