# SPDX-License-Identifier: Apache-2.0
"""Wiping of NVDIMMs, and the release of a domain's backings."""

from __future__ import annotations

from contextlib import suppress

from nvdimm_driver.contents import copying
from nvdimm_driver.contents.shared_checks import Checks, reporting_errors_of
from nvdimm_driver.errors import NotFoundError
from nvdimm_driver.model import Allocation, BackingIdentity, NvdimmSpec, Record, Watch
from nvdimm_driver.plugins import backing_of
from nvdimm_driver.state import ownership


class Wiper:
    """Wipes NVDIMMs, and releases those of a domain."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def wipe(self, spec: NvdimmSpec, watch: Watch, identity: BackingIdentity | None = None) -> None:
        """Overwrite an NVDIMM with zeros, its label area too, durably. Its owner keeps it.

        :param identity: identity that it must have; None when it is unknown.
        :raises RefusedError: when it is in no pool.
        :raises NotFoundError: when there is no such backing.
        :raises BackingError: when it has another identity.
        :raises InUseError: when a domain runs with it.
        """
        self._checks.pools.check_place(spec.path)
        self._checks.check_same(spec.path, identity)
        self._checks.check_off(spec.path)  # a running domain's file cannot be opened for writing
        backing = backing_of(self._checks.backings, spec.path)
        with reporting_errors_of(spec.path), backing.open_bytes(spec, write=True) as content:
            self._checks.check_off(spec.path)  # from here on, starts fail while this is open
            copying.wipe(content, watch("wiping"))

    def to_wipe(self, record: Record) -> tuple[Allocation, ...]:
        """Return the domain's NVDIMMs that are in pools with ``wipe_on_release``."""
        pools = [(item, self._checks.pools.of(item.spec.path)) for item in record.allocations]
        return tuple(item for item, pool in pools if pool is not None and pool.wipe_on_release)

    def give_up(self, record: Record, watch: Watch, *, delete: bool) -> None:
        """Release a domain's backings, after wiping those of :meth:`to_wipe`.

        :param delete: delete the files, too; devices stay.
        :raises InUseError: while the domain runs.
        """
        ownership.check_off(record)
        for item in self.to_wipe(record):
            with suppress(NotFoundError):
                self.wipe(item.spec, watch, item.identity)
        for item in record.allocations if delete else ():
            self._checks.check_same(item.spec.path, item.identity)
            backing_of(self._checks.backings, item.spec.path).discard(item.spec)
        ownership.give_up(
            self._checks.ledger, self._checks.backings, self._checks.ledger.find_domain(record.uuid) or record
        )
