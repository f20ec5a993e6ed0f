# SPDX-License-Identifier: Apache-2.0
"""Find claims to devices that libvirt knows otherwise than the ledger, which was lost or is from a backup.

Devices have no marks that would say whose they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from nvdimm_driver.backing.paths import resolve
from nvdimm_driver.doctor.libvirt import Connection
from nvdimm_driver.doctor.repair import Inconsistency
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import ConfigError, NvdimmError, ProtocolError
from nvdimm_driver.model import DomainSpec
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.rpc.xdr import LibvirtError, RemoteError
from nvdimm_driver.state import ownership
from nvdimm_driver.state.words import release_of
from nvdimm_driver.xml.parse_domain import extract

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Known:
    """A domain that libvirt knows.

    :ivar domid: None while it is off.
    :ivar defined: its definition.
    :ivar running: the XML of its guest; None while it is off.
    """

    domid: int | None
    defined: DomainSpec
    running: DomainSpec | None


def look(driver: XenNvdimmDriver, restore: Callable[[str], str], socket: str) -> list[Inconsistency]:
    """Find the claims to memory without marks that libvirt and the ledger do not agree on; change nothing.

    :param restore: restores domain XML that libvirt has.
    :param socket: of libvirt's daemon.
    :raises ConfigError: when the host has such memory, and libvirt cannot be asked.
    """
    if not any(_is_unmarked(backing) and backing.areas() for backing in driver.backings):
        return []
    try:
        with Connection(socket) as connection:
            known = list(_domains(connection, restore))
    except (OSError, LibvirtError, ProtocolError) as error:
        reason = RemoteError.unpack(error.payload).message if isinstance(error, LibvirtError) else error
        raise ConfigError(
            f"{socket}: libvirt cannot be asked whose the devices are: {reason}",
            hint="start libvirtd (or virtxend), and run 'nvdimmctl check --repair' again before any domain is defined",
        ) from error
    checks = (_claims, _starts, _contested)
    return [found for domain in known for check in checks for found in check(driver, domain)]


def _domains(connection: Connection, restore: Callable[[str], str]) -> Iterator[_Known]:
    """Yield the domains with NVDIMMs."""
    for domain in connection.domains():
        try:
            defined = _extract(restore(connection.xml(domain, inactive=True)))
            running = _extract(restore(connection.xml(domain, inactive=False))) if domain.id >= 0 else None
        except (NvdimmError, LibvirtError) as error:  # it may have ended meanwhile, or cannot be started either
            LOG.warning("domain %s: %s", domain.name, error)
            continue
        wanted = defined or running
        if wanted:
            yield _Known(domain.id if running else None, wanted, running)


def _claims(driver: XenNvdimmDriver, domain: _Known) -> Iterator[Inconsistency]:
    owned = {item.spec.path for record in driver.ledger.domains() for item in record.allocations}
    for spec in domain.defined.nvdimms:
        if spec.path not in owned and _is_device(driver, spec.path):
            yield Inconsistency(
                domain.defined.name,
                domain.defined.uuid or "",
                spec.path,
                "libvirt's definition has it, and the ledger does not know whose it is",
                "write it into the ledger",
                partial(driver.definitions.adopt, domain.defined),
            )


def _starts(driver: XenNvdimmDriver, domain: _Known) -> Iterator[Inconsistency]:
    if domain.running is None or domain.domid is None:
        return
    record = driver.ledger.find_domain(domain.running.uuid or "")
    if record is None:
        return  # until its claims are in the ledger
    known = {*record.start.paths} if record.start else set()
    owned = {item.spec.path for item in record.allocations}
    has = {spec.path for spec in domain.running.nvdimms if _is_device(driver, spec.path)} & owned
    for path in sorted(has - known):
        yield Inconsistency(
            record.name,
            record.uuid,
            path,
            f"the guest with domid {domain.domid} has it, and the ledger does not know that",
            "write its start into the ledger",
            partial(driver.take_up_running, record, domain.domid, has | known),
        )


def _contested(driver: XenNvdimmDriver, domain: _Known) -> Iterator[Inconsistency]:
    """Yield what libvirt says is one domain's, and the ledger another's: the operator has to say which is true."""
    name, uuid = domain.defined.name, domain.defined.uuid or ""
    defined, running = (
        {spec.path for spec in each.nvdimms} if each else set() for each in (domain.defined, domain.running)
    )
    for path in sorted(defined | running):
        if not _is_device(driver, path):
            continue
        who = f"the guest with domid {domain.domid}" if path in running else "libvirt's definition"
        identity = ownership.identity_at(driver.backings, path)
        for record in ownership.owners(driver.ledger, path, identity):
            if record.uuid != uuid:
                item = ownership.find_item(record, path, identity)
                release = release_of(record.uuid, item.spec.slot) if item else "end what has it"
                yield Inconsistency(
                    name,
                    uuid,
                    path,
                    f"{who} has it, and the ledger says that it is domain {record.name}'s ({record.uuid})",
                    f"if it is {record.name}'s: take it out of {name}'s definition: virsh edit {uuid}; if it is "
                    f"{name}'s: {release}, without wipe_on_release in the pool's section",
                )


def _extract(xml: str) -> DomainSpec | None:
    """Return the domain of libvirt's XML with resolved paths: an earlier version let it have others."""
    domain = extract(xml)
    return domain and domain.with_paths({spec.path: resolve(spec.path) for spec in domain.nvdimms})


def _is_device(driver: XenNvdimmDriver, path: str) -> bool:
    try:
        return _is_unmarked(backing_of(driver.backings, path))
    except NvdimmError:
        return False


def _is_unmarked(backing: Backing) -> bool:
    """Return True for a kind of backing that records no owner."""
    return type(backing).mark is Backing.mark
