# SPDX-License-Identifier: Apache-2.0
"""Wiping of NVDIMMs, and the release of a domain's backings."""

from __future__ import annotations

from contextlib import suppress

from nvdimm_driver.backing.identity import check_identity
from nvdimm_driver.contents import copying
from nvdimm_driver.contents.shared_checks import Checks, reporting_errors_of
from nvdimm_driver.errors import InUseError, NotFoundError
from nvdimm_driver.model import Allocation, BackingIdentity, NvdimmSpec, Record, Watch
from nvdimm_driver.plugins import backing_of
from nvdimm_driver.state import ownership


class Wiper:
    """Wipes NVDIMMs, and releases those of a domain."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def wipe(self, spec: NvdimmSpec, watch: Watch, owner: Record | None = None) -> None:
        """Overwrite an NVDIMM with zeros, its label area too, durably. Its owner keeps it.

        :param owner: the domain that it must still belong to, as it is; None to wipe whatever is at the path.
        :raises RefusedError: when it is in no pool.
        :raises NotFoundError: when there is no such backing.
        :raises BackingError: when it is not the one that was provisioned for the owner.
        :raises InUseError: when a domain runs with it, or it is not the owner's any more.
        """
        self._checks.pools.check_place(spec.path)
        self._check_owner(owner, spec)
        self._checks.check_off(spec.path)  # a running domain's file cannot be opened for writing
        backing = backing_of(self._checks.backings, spec.path)
        with reporting_errors_of(spec.path), backing.open_bytes(spec, write=True) as content:
            self._checks.check_off(spec.path)  # from here on, starts fail while this is open
            self._check_owner(owner, spec, content.identity)
            self._checks.tell_overwritten(spec.path, content)
            copying.wipe(content, watch("wiping"))

    def own(self, record: Record) -> tuple[Allocation, ...]:
        """Return the domain's NVDIMMs without those that :meth:`find_owner` finds another owner for."""
        return tuple(each for each in record.allocations if self.find_owner(record, each) is None)

    def find_owner(self, record: Record, item: Allocation) -> Record | None:
        """Return the other domain that was provisioned with what this domain has only begun to claim, if any.

        A define that was interrupted can leave a claim to another domain's file, by another name of it.
        """
        if item.ready:
            return None
        found = ownership.owners_of_bytes(self._checks.ledger, record, self._checks.identity(item.spec.path))
        return found[0] if found else None

    def to_wipe(self, record: Record) -> tuple[Allocation, ...]:
        """Return the domain's :meth:`own` NVDIMMs that are in pools with ``wipe_on_release``."""
        pools = [(item, self._checks.pools.of(item.spec.path)) for item in self.own(record)]
        return tuple(item for item, pool in pools if pool is not None and pool.wipe_on_release)

    def give_up(self, record: Record, watch: Watch, *, delete: bool) -> None:
        """Release a domain's backings, after wiping those of :meth:`to_wipe`.

        :param record: the domain as the operator has seen it.
        :param delete: delete the :meth:`own` files, too; devices stay.
        :raises InUseError: while the domain runs, when it was changed since, or when what is to be wiped or deleted is
            another domain's, too.
        """
        ownership.check_off(self._find_unchanged(record))
        wiped, deleted = self.to_wipe(record), self.own(record) if delete else ()
        for item in (*wiped, *deleted):  # all, before the first of them is wiped
            self._check_owner(record, item.spec)
        for item in wiped:
            with suppress(NotFoundError):
                self.wipe(item.spec, watch, record)
        for item in deleted:
            self._check_owner(record, item.spec)
            backing_of(self._checks.backings, item.spec.path).discard(item.spec)
        ownership.give_up(
            self._checks.ledger, self._checks.backings, self._checks.ledger.find_domain(record.uuid) or record
        )

    def _check_owner(self, record: Record | None, spec: NvdimmSpec, opened: BackingIdentity | None = None) -> None:
        """Check that an NVDIMM is the domain's, nobody else's, and the one that was provisioned.

        :param record: the domain as the operator has seen it; None accepts everything.
        :param opened: identity of what is open; a symbolic link can be turned before and after it is opened.
        :raises InUseError: when the domain was changed since, or the NVDIMM is another domain's, too.
        :raises BackingError: when it is another backing.
        """
        if record is None:
            return
        self._find_unchanged(record)
        for other in self._others(record, spec):
            raise InUseError(f"{spec.path} belongs to domain {other.name}, too", hint="see 'nvdimmctl check'")
        (identity,) = (item.identity for item in record.allocations if item.spec == spec)
        self._checks.check_same(spec.path, identity)
        if opened is not None and identity is not None:
            check_identity(spec.path, opened, identity)

    def _find_unchanged(self, record: Record) -> Record:
        """Return the domain's record of now.

        :raises InUseError: when its NVDIMMs are others than in this record.
        """
        now = self._checks.ledger.find_domain(record.uuid)
        if now is None or _nvdimms(now) != _nvdimms(record):
            raise InUseError(f"domain {record.name} was changed meanwhile", hint="see 'nvdimmctl list', and try again")
        return now

    def _others(self, record: Record, spec: NvdimmSpec) -> list[Record]:
        return ownership.others(self._checks.ledger, record, spec.path, self._checks.identity(spec.path))


def _nvdimms(record: Record) -> list[tuple[NvdimmSpec, BackingIdentity | None]]:
    return [(item.spec, item.identity) for item in record.allocations]
