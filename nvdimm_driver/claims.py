"""Whose backing is whose: no two domains may have the same bytes."""

from __future__ import annotations

from collections.abc import Mapping

from nvdimm_driver.errors import InUseError
from nvdimm_driver.ledger import Ledger
from nvdimm_driver.model import BackingIdentity, DomainSpec, Record


def check_paths(ledger: Ledger, domain: DomainSpec) -> None:
    """No other domain has a backing of that path.

    :raises InUseError: when one has, or runs with it, whatever it was redefined to since.
    """
    for record in ledger.domains():
        if record.uuid == domain.uuid:
            continue
        owned = {item.spec.path for item in record.allocations}
        if record.attachment is not None:
            owned.update(record.attachment.paths)
        for spec in domain.nvdimms:
            if spec.path in owned:
                raise _owned(spec.path, record)


def check_bytes(ledger: Ledger, uuid: str, identities: Mapping[str, BackingIdentity]) -> None:
    """No other domain has the same bytes under another path (a bind mount, a second device node).

    :param identities: of the backings of the domain of that uuid, by path.
    :raises InUseError: when one has.
    """
    for record in ledger.domains():
        for item in record.allocations if record.uuid != uuid else ():
            for path, identity in identities.items():
                if item.identity is not None and item.identity.shares_bytes(identity):
                    raise _owned(path, record)


def _owned(path: str, record: Record) -> InUseError:
    return InUseError(
        f"{path} belongs to domain {record.name} ({record.uuid})",
        hint=f"if that domain is gone for good, 'nvdimmctl release {record.name}' gives it up and keeps its data",
    )
