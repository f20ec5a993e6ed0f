# SPDX-License-Identifier: Apache-2.0
"""Find claims to devices that libvirt knows otherwise than the ledger, which was lost or is from a backup.

The marks of devices are beside the ledger: they can be lost with it, and an earlier version wrote none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from nvdimm_driver.backing.paths import resolve
from nvdimm_driver.doctor.libvirt import Connection
from nvdimm_driver.doctor.repair_nvdimms import remedy_of_name
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import ConfigError, InUseError, NvdimmError, ProtocolError
from nvdimm_driver.lifecycle.define import uuid_of
from nvdimm_driver.model import Allocation, DomainSpec, NvdimmSpec, Record
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.rpc.xdr import LibvirtError, RemoteError
from nvdimm_driver.shell import command, repair_of
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


def look(
    driver: XenNvdimmDriver, restore: Callable[[str], str], socket: str, named: Collection[str] = ()
) -> list[Inconsistency]:
    """Find the claims to devices that libvirt and the ledger do not agree on; change nothing.

    :param restore: restores domain XML that libvirt has.
    :param socket: of libvirt's daemon.
    :param named: paths that the operator has named.
    :raises ConfigError: when the host has such memory, and libvirt cannot be asked.
    """
    if not any(_is_unmarked(backing) and backing.areas() for backing in driver.backings):
        return []
    ask = partial(_ask, restore, socket)
    return list(_unreadable(driver)) + [
        found
        for domain in ask()
        for check in (
            partial(_claims, driver, ask),
            partial(_kept_by_guest, driver, ask),
            partial(_starts, driver),
            partial(_contested, driver, named),
        )
        for found in check(domain)
    ]


def _unreadable(driver: XenNvdimmDriver) -> Iterator[Inconsistency]:
    """Yield the files of libvirt's that nobody can read, and paths in the others that nobody can follow."""
    for domain in driver.checks.unknown.stored:
        inconsistency = partial(Inconsistency, domain.name, domain.uuid, "")
        if domain.text:
            yield inconsistency(
                f"{domain.file} cannot be read as the XML of a domain: no domain gets a device anew that it names",
                "correct that file, or remove it with its domain",
            )
        for problem in domain.unfollowed:
            remedy = "turn the link back, or correct the path: " + command("virsh", "edit", domain.uuid or "UUID")
            yield inconsistency(f"in {domain.file}, {problem}", remedy)


def _ask(restore: Callable[[str], str], socket: str) -> list[_Known]:
    """Return the domains with NVDIMMs that libvirt knows.

    :raises ConfigError: when it cannot be asked.
    """
    try:
        with Connection(socket) as connection:
            return list(_domains(connection, restore))
    except (OSError, LibvirtError, ProtocolError) as error:
        reason = RemoteError.unpack(error.payload).message if isinstance(error, LibvirtError) else error
        raise ConfigError(
            f"{socket}: libvirt cannot be asked whose the devices are: {reason}",
            hint="start libvirtd (or virtxend), and run 'nvdimmctl check --repair' again before any domain is defined",
        ) from error


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


def _claims(driver: XenNvdimmDriver, ask: Callable[[], list[_Known]], domain: _Known) -> Iterator[Inconsistency]:
    owned = {item.spec.path for record in driver.ledger.domains() for item in record.allocations}
    renamed = {item.renamed_from: item for item in _devices_of(driver, domain.defined.uuid or "")}
    for spec in domain.defined.nvdimms:
        if spec.path in owned or not _is_device(driver, spec.path):
            continue
        if spec.path in renamed:
            yield Inconsistency(
                domain.defined.name,
                domain.defined.uuid or "",
                spec.path,
                f"libvirt's definition has it, and since a boot, this is another device; the domain's is "
                f"{renamed[spec.path].spec.path} now",
                _remedy_of_renamed(driver, domain, renamed[spec.path]),
            )
        else:
            yield Inconsistency(
                domain.defined.name,
                domain.defined.uuid or "",
                spec.path,
                "libvirt's definition has it, and the ledger does not know whose it is",
                "write it into the ledger",
                partial(_adopt, driver, ask, domain.defined),
            )


def _kept_by_guest(driver: XenNvdimmDriver, ask: Callable[[], list[_Known]], domain: _Known) -> Iterator[Inconsistency]:
    """Yield the devices of a guest that its definition has given up, and that no domain has in the ledger."""
    if domain.running is None:
        return
    defined = {spec.path for spec in domain.defined.nvdimms}
    for path in (spec.path for spec in domain.running.nvdimms if spec.path not in defined):
        is_device = _is_device(driver, path)
        if is_device and not ownership.owners(driver.ledger, path, ownership.identity_at(driver.backings, path)):
            yield Inconsistency(
                domain.running.name,
                domain.running.uuid or "",
                path,
                f"the guest with domid {domain.domid} has it, though libvirt's definition has not, and the ledger does "
                "not know whose it is",
                "write it into the ledger",
                partial(_adopt, driver, ask, domain.running),
            )


def _adopt(driver: XenNvdimmDriver, ask: Callable[[], list[_Known]], has: DomainSpec) -> None:
    """Write what a domain has by libvirt's definition, or its guest, into the ledger, unless that is another by now."""
    uuid = uuid_of(has)
    with driver.locks.changing(uuid):
        if not any(has in (each.defined, each.running) for each in ask()):
            raise InUseError(f"domain {has.name} was changed meanwhile", hint="repeat 'nvdimmctl check'")
        driver.definitions.adopt(has)


def _starts(driver: XenNvdimmDriver, domain: _Known) -> Iterator[Inconsistency]:
    if domain.running is None or domain.domid is None:
        return
    record = driver.ledger.find_domain(domain.running.uuid or "")
    if record is None:
        return  # until its claims are in the ledger
    known = {*record.start.paths} if record.start else set()
    owned = {item.spec.path for item in record.allocations}
    devices = [spec for spec in domain.running.nvdimms if spec.path in owned and _is_device(driver, spec.path)]
    has = {spec.path for spec in devices}
    inconsistency = partial(Inconsistency, record.name, record.uuid)
    if elsewhere := [spec for spec in devices if spec.path not in known and not _is_as_in_guest(record, spec)]:
        for spec in elsewhere:
            problem = f"the guest with domid {domain.domid} has it in slot {spec.slot}, and the ledger otherwise"
            yield inconsistency(spec.path, problem, f"shut domain {record.name} down, and define it again")
        return
    for path in sorted(has - known):
        problem = f"the guest with domid {domain.domid} has it, and the ledger does not know that"
        take_up = partial(_take_up, driver, record.uuid, domain.domid, devices, known)
        yield inconsistency(path, problem, "write its start into the ledger", take_up)


def _is_as_in_guest(record: Record, spec: NvdimmSpec) -> bool:
    """Return True when the ledger has an NVDIMM as the XML of the guest has it, in which a base may not be told."""
    return any(
        (item.spec.slot, item.spec.size, item.spec.label_size) == (spec.slot, spec.size, spec.label_size)
        and spec.base in (None, item.base)
        for item in record.allocations
        if item.spec.path == spec.path
    )


def _take_up(
    driver: XenNvdimmDriver, uuid: str, domid: int, devices: Sequence[NvdimmSpec], known: Collection[str]
) -> None:
    """Write into the ledger that a guest has these devices; a repair of one does it for all.

    :param known: what its start in the ledger has already.
    """
    paths = {*known, *(spec.path for spec in devices)}
    with driver.locks.changing(uuid), driver.locks.storing(uuid):
        now = driver.ledger.find_domain(uuid)
        if driver.has_taken_up(now, domid, paths):
            return
        if now is None or not all(_is_as_in_guest(now, spec) for spec in devices):
            raise InUseError(f"domain {uuid} was changed meanwhile", hint="repeat 'nvdimmctl check'")
        driver.take_up_running(now, domid, paths)


def _remedy_of_renamed(
    driver: XenNvdimmDriver, domain: _Known, item: Allocation, first: str = "", others: Sequence[Allocation] = ()
) -> str:
    """Return what helps if a domain's device has another name by the ledger than in libvirt's definition.

    :param first: a command that comes before the domain is defined.
    :param others: what other domains have by the ledger, and this one by libvirt's definition.
    """
    follow = remedy_of_name(driver, domain.defined.name, item.uuid, item.spec.path)
    if not item.doubtful:
        return follow
    releases = " and ".join(release_of(each.uuid, each.spec.slot) for each in (item, *others))
    return (
        f"if the ledger, which is from a backup, is right: {first}{follow}; if libvirt's definition is right: "
        f"{releases}, without wipe_on_release in the pool's section, and then nvdimmctl check --repair"
    )


def _contested(driver: XenNvdimmDriver, named: Collection[str], domain: _Known) -> Iterator[Inconsistency]:
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
        own = _devices_of(driver, uuid)
        if any(item.spec.path == path for item in own):
            continue  # what is there is another device now: the finding is at the domain's own
        now = next((item for item in own if item.renamed_from == path), None)
        for record in ownership.owners(driver.ledger, path, identity):
            if record.uuid != uuid:
                item = ownership.find_item(record, path, identity)
                release = release_of(record.uuid, item.spec.slot) if item else "end what has it"
                remedy = (
                    f"if it is {record.name}'s: take it out of {name}'s definition: virsh edit {uuid}; if it is "
                    f"{name}'s: {release}, without wipe_on_release in the pool's section"
                )
                believe = None
                if now:
                    others = [item] if item else []
                    instead = _remedy_of_renamed(driver, domain, now, f"{repair_of(path)}, and ", others)
                    remedy = f"{name} has {now.spec.path} instead, by the ledger: {instead}"
                    if now.doubtful and path in named:
                        believe = partial(_believe_name, driver, now)
                yield Inconsistency(
                    name,
                    uuid,
                    path,
                    f"{who} has it, and the ledger says that it is domain {record.name}'s ({record.uuid})",
                    remedy,
                    believe,
                )


def _believe_name(driver: XenNvdimmDriver, item: Allocation) -> None:
    """Take the name that the ledger has for a device for right, by the operator's word.

    :raises InUseError: when the domain has something else in its slot by now.
    """

    def check() -> None:
        now = driver.ledger.find_domain(item.uuid)
        if now is None or item not in now.allocations:
            raise InUseError(f"{item.spec.path} was given up meanwhile", hint="repeat 'nvdimmctl check'")

    with driver.locks.changing(item.uuid), driver.locks.storing(item.uuid):
        driver.ledger.rename_devices({(item.uuid, item.spec.slot): item.spec.path}, check)


def _devices_of(driver: XenNvdimmDriver, uuid: str) -> list[Allocation]:
    """Return the devices that a domain has in the ledger."""
    record = driver.ledger.find_domain(uuid)
    return [item for item in (record.allocations if record else ()) if item.identity and not item.identity.inode]


def _extract(xml: str) -> DomainSpec | None:
    """Return the domain of libvirt's XML with resolved paths: an earlier version let it have others."""
    domain = extract(xml, stored=True)
    return domain and domain.with_paths({spec.path: resolve(spec.path) for spec in domain.nvdimms})


def _is_device(driver: XenNvdimmDriver, path: str) -> bool:
    try:
        return _is_unmarked(backing_of(driver.backings, path))
    except NvdimmError:
        return False


def _is_unmarked(backing: Backing) -> bool:
    """Return True for a kind of backing that records no owner on itself."""
    return type(backing).mark is Backing.mark
