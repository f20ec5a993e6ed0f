# SPDX-License-Identifier: Apache-2.0
"""Claims that the ledger may not know: those that marks of files tell of, and libvirt's definitions for devices.

A ledger that was lost, rebuilt or restored from a backup knows less than they do. The marks of devices are beside it,
and can be lost with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nvdimm_driver.errors import InUseError
from nvdimm_driver.model import BackingIdentity
from nvdimm_driver.plugins import Backing
from nvdimm_driver.shell import command
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xml.definition_files import StoredDomain

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnknownClaims:
    """Claims to backings, whatever the ledger says.

    :ivar stored: the domains and saved guests with NVDIMMs in libvirt's files. Iterated over only for devices.
    """

    ledger: Ledger
    backings: Sequence[Backing]
    stored: Iterable[StoredDomain] = ()

    def check(self, uuid: str, claims: Mapping[str, BackingIdentity | None]) -> None:
        """Check that no backing is another domain's: by its mark, because it is frozen, or by libvirt's files.

        Of libvirt's files, one that cannot be read has all that its text names. Anybody may have written that text, so
        it takes nothing from a domain that has a device by the ledger and by the mark; 'nvdimmctl check' tells of it.

        :param uuid: of the domain that is to have the backings; empty for none.
        :param claims: the identity of what was opened or located at each path; None for whatever is there.
        :raises InUseError: when one is.
        :raises BackingError: when a file cannot be read, or is not the one with that identity.
        :raises ConfigError: when one is a device, and libvirt's files cannot be read.
        """
        ownership.check_marks(self.ledger, self.backings, uuid, claims)
        devices = [path for path in claims if keeps_no_mark(self.backings, path)]
        for domain in self.stored if devices else ():
            for path in devices:
                if (uuid and domain.uuid == uuid) or not self._has(domain, path, uuid):
                    continue
                if not (domain.text and self._is_own(path, uuid)):
                    raise _owned(path, domain)
                LOG.warning("%s cannot be read as the XML of a domain, and names %s", domain.file, path)

    def _is_own(self, path: str, uuid: str) -> bool:
        """Return True when a device is a domain's by the ledger and by the mark.

        Not by a ledger from elsewhere: the marks of devices may be from the same backup.
        """
        record = self.ledger.find_domain(uuid)
        if record is None or self.ledger.is_from_elsewhere():
            return False
        has = ownership.has_bytes(record.allocations, ownership.identity_at(self.backings, path))
        return has and ownership.is_marked_for(self.backings, path, uuid)

    def _has(self, domain: StoredDomain, path: str, uuid: str) -> bool:
        """Return True when a domain in libvirt's files has a device, by any of its names.

        :param uuid: of the domain that is to have the device.
        """
        if domain.names(path):
            return not self._means_another(domain, path, uuid)
        identity = ownership.identity_at(self.backings, path)
        others = (other for other in domain.paths if not self._means_another(domain, other, uuid))
        found = (ownership.identity_at(self.backings, other) for other in others)
        return identity is not None and any(each is not None and identity.shares_bytes(each) for each in found)

    def _means_another(self, domain: StoredDomain, path: str, uuid: str) -> bool:
        """Return True when a name in libvirt's files is that of another device, which had it before a boot.

        That is so if the domain was provisioned with another one, and what is there now for the domain that is to have
        it. For any third domain, the ledger may be older than the definition; for these, too, while that is doubtful.
        """
        asking = self.ledger.find_domain(uuid) if uuid else None
        if asking is None or not ownership.has_bytes(asking.allocations, ownership.identity_at(self.backings, path)):
            return False
        record = self.ledger.find_domain(domain.uuid)
        items = [
            item
            for item in (record.allocations if record else ())
            if path in (item.spec.path, item.renamed_from) and item.identity and not item.doubtful
        ]
        found = ownership.identity_at(self.backings, path)
        return bool(items) and found is not None and not ownership.has_bytes(items, found)


def keeps_no_mark(backings: Sequence[Backing], path: str) -> bool:
    """Return True for what is there and records no owner on itself: a device."""
    return any(type(each).mark is Backing.mark and each.handles(path) for each in backings)


def _owned(path: str, domain: StoredDomain) -> InUseError:
    """Return the error for a device that a domain in libvirt's files has."""
    if domain.text:
        return InUseError(
            f"{domain.file} cannot be read as the XML of a domain, and may have {path}",
            hint="correct that file, or remove it with its domain",
        )
    uuid = domain.uuid or "UUID"  # virsh takes a name for a uuid first
    if domain.is_saved:
        return InUseError(
            f"{path} is in the saved guest of domain {domain.name}",
            hint=f"start the domain, or discard the saved guest: {command('virsh', 'managedsave-remove', uuid)}",
        )
    return InUseError(
        f"{path} is in libvirt's definition of domain {domain.name}, too",
        hint="'nvdimmctl check' says what to do; if it is not that domain's any more, take it out: "
        + command("virsh", "edit", uuid),
    )
