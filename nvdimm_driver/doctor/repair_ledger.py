# SPDX-License-Identifier: Apache-2.0
"""Take over a ledger that comes from elsewhere: a backup, or another state folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

from nvdimm_driver.doctor.repair_changes import exchanged_names
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError
from nvdimm_driver.state.database import FROM_ELSEWHERE


def look(
    driver: XenNvdimmDriver, found: Sequence[Inconsistency], accepted: Collection[str] = ()
) -> list[Inconsistency]:
    """Find out whether the ledger comes from elsewhere; change nothing.

    :param found: what the ledger was compared with: what could not be looked at has neither domain nor path. It is only
        taken over when nothing is left of that which can be repaired. What only a running guest lacks does not count.
    :param accepted: paths, and uuids of domains for what concerns no path, whose repair it does not wait for: that can
        fail until a definition is changed, which is refused until the ledger is taken over.
    """
    if not driver.ledger.is_from_elsewhere():
        return []
    path = driver.ledger.path
    if unseen := [each for each in found if not (each.domain or each.uuid or each.path)]:
        remedy = f"first: {'; '.join(each.remedy or each.problem for each in unseen)}"
        return [Inconsistency("", "", path, f"it {FROM_ELSEWHERE}", remedy)]
    remedy = "take it over, after the other repairs; guests that were saved with devices before cannot go on then"
    waits = [each for each in found if each.mend and not each.of_guest and (each.path or each.uuid) not in accepted]
    if waits:
        remedy += (
            "; with --accept PATH, or --accept DOMAIN for a repair without a path, also if that fails each time: you "
            "have to know whose it is then"
        )
    mend = None if waits else partial(take_over, driver, accepted)
    return [Inconsistency("", "", path, f"it {FROM_ELSEWHERE}", remedy, mend)]


def take_over(driver: XenNvdimmDriver, accepted: Collection[str] = ()) -> None:
    """Take the ledger for the host's own, after what can be mended was.

    Whether it is right about devices that have each other's names now, or had other ones before a boot, only the
    operator can say, also after this.

    :param accepted: as for :func:`look`.
    :raises InUseError: while the ledger has a start under way, which may be from the backup: after this, nobody could
        tell that its guest has run since. That of a domain which is accepted lets no saved guest go on.
    """
    starting = [each for each in driver.ledger.started_domains() if each.start and each.start.state != "mapped"]
    if waits := [each.name for each in starting if each.uuid not in accepted]:
        raise InUseError(
            f"starting, now or when the ledger's backup was made: {', '.join(waits)}",
            hint="wait until each runs, or has failed, and repeat this",
        )
    for record in starting:
        if record.start:
            driver.ledger.spoil_saved(record.start)
    driver.distrust_saved_guests()
    records = driver.ledger.domains()
    renamed = [(each.uuid, each.spec.slot) for record in records for each in record.allocations if each.renamed_from]
    driver.ledger.doubt_names([*exchanged_names(driver.backings, records), *renamed])
    driver.ledger.take_over(compared=True)
