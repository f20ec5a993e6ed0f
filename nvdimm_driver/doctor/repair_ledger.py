# SPDX-License-Identifier: Apache-2.0
"""Take over a ledger that comes from elsewhere: a backup, or another state folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nvdimm_driver.doctor.repair import Inconsistency
from nvdimm_driver.doctor.repair_changes import exchanged_names
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.state.database import FROM_ELSEWHERE


def look(driver: XenNvdimmDriver, found: Sequence[Inconsistency]) -> list[Inconsistency]:
    """Find out whether the ledger comes from elsewhere; change nothing.

    :param found: what the ledger was compared with: what could not be looked at has neither domain nor path. It is only
        taken over when nothing is left that can be repaired.
    """
    if not driver.ledger.is_from_elsewhere():
        return []
    path = driver.ledger.path
    if unseen := [each for each in found if not (each.domain or each.uuid or each.path)]:
        remedy = f"first: {'; '.join(each.remedy or each.problem for each in unseen)}"
        return [Inconsistency("", "", path, f"it {FROM_ELSEWHERE}", remedy)]
    remedy = "take it over, after the other repairs; guests that were saved with devices before cannot go on then"
    mend = None if any(each.mend for each in found) else partial(take_over, driver)
    return [Inconsistency("", "", path, f"it {FROM_ELSEWHERE}", remedy, mend)]


def take_over(driver: XenNvdimmDriver) -> None:
    """Take the ledger for the host's own, after what can be mended was.

    Whether it is right about devices that have each other's names now, only the operator can say, also after this.
    """
    driver.distrust_saved_guests()
    driver.ledger.doubt_names(exchanged_names(driver.backings, driver.ledger.domains()))
    driver.ledger.take_over(compared=True)
