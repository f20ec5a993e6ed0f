# SPDX-License-Identifier: Apache-2.0
"""Take over a ledger that comes from elsewhere: a backup, or another state folder."""

from __future__ import annotations

from collections.abc import Sequence

from nvdimm_driver.doctor.repair import Inconsistency
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.state.database import FROM_ELSEWHERE


def look(driver: XenNvdimmDriver, found: Sequence[Inconsistency]) -> list[Inconsistency]:
    """Find out whether the ledger comes from elsewhere; change nothing.

    :param found: what the ledger was compared with: what could not be looked at has neither domain nor path.
    """
    if not driver.ledger.is_from_elsewhere():
        return []
    path = driver.ledger.path
    if unseen := [each for each in found if not (each.domain or each.uuid or each.path)]:
        remedy = f"first: {'; '.join(each.remedy or each.problem for each in unseen)}"
        return [Inconsistency("", "", path, f"it {FROM_ELSEWHERE}", remedy)]
    remedy = "take it over, after the other repairs; guests that are saved with devices cannot go on then"
    return [Inconsistency("", "", path, f"it {FROM_ELSEWHERE}", remedy, lambda: take_over(driver))]


def take_over(driver: XenNvdimmDriver) -> None:
    """Take the ledger for the host's own, after what can be mended was.

    A guest that is saved with a device cannot go on: nobody can tell whether something has written that since.
    """
    for uuid, run in driver.ledger.runs().items():
        record = driver.ledger.find_domain(uuid)
        if (record is None or record.start is None) and any(not each.inode for _, each in saved_guest.backings_of(run)):
            driver.ledger.spoil_run(uuid, run.number)
    for record in driver.ledger.domains():
        if record.start is None and any(item.identity and not item.identity.inode for item in record.allocations):
            driver.ledger.spoil_unnumbered(record.uuid)
    driver.ledger.take_over()
