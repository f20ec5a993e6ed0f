# SPDX-License-Identifier: Apache-2.0
"""Files that share blocks, as XFS lets them: after a reflink, or root's deduplication.

A guest does not start with such a file. If it comes to share blocks while its guest runs, the other file has what that
guest writes, in place of its own bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.model import PAGE, Allocation, NvdimmSpec
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger


def is_shared(backings: Sequence[Backing], path: str) -> bool:
    """Return True when a file shares blocks with another.

    :raises BackingError: when that cannot be determined.
    """
    return backing_of(backings, path).is_shared(NvdimmSpec(0, path, PAGE))


def frames(backings: Sequence[Backing], path: str) -> list[tuple[int, int]]:
    """Return the machine frames of the bytes at a path, as (mfn, count), also of blocks that are shared.

    :raises NvdimmError: when they are no backing's that a guest could have, or nobody can say.
    """
    backing = backing_of(backings, path)
    found = backing.find_extents(NvdimmSpec(0, path, backing.size(path) // PAGE * PAGE))
    return [(each.spa // PAGE, each.length // PAGE) for each in found]


def overlap(frames_of_one: Sequence[int], others: Sequence[tuple[int, int]]) -> bool:
    """Return True when frames, (mfn, count), are among others."""
    first, count = frames_of_one
    return any(first < mfn + number and mfn < first + count for mfn, number in others)


def find_sharers(ledger: Ledger, backings: Sequence[Backing], path: str) -> list[tuple[str, Allocation]]:
    """Return the NVDIMMs whose files share blocks with another one, by the ledger, each with the name of its domain.

    One that cannot be looked at, on the same file system, may share them.

    :param path: of the other one.
    :raises NvdimmError: when that one's blocks cannot be determined.
    """
    if not is_shared(backings, path):
        return []
    here, own = ownership.identity_at(backings, path), frames(backings, path)

    def shares(item: Allocation) -> bool:
        if here is None or item.identity is None or item.identity.device != here.device or not item.identity.inode:
            return False
        try:
            if not ownership.has_bytes([item], ownership.identity_at(backings, item.spec.path)):
                return False
            return not here.shares_bytes(item.identity) and any(
                overlap(each, own) for each in frames(backings, item.spec.path)
            )
        except NvdimmError:
            return True

    return [(record.name, item) for record in ledger.domains() for item in record.allocations if shares(item)]
