# SPDX-License-Identifier: Apache-2.0
"""The frames of guests, compared with where the bytes of their files are now.

A start maps the blocks that its files have then, and makes these immutable, so that no file system moves them. If
something has moved them all the same, as root can (chattr -i, then a defragmentation), the guest has blocks that the
file system takes for free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from nvdimm_driver.errors import LayoutError
from nvdimm_driver.guest import layout
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.model import Mapping, Start
from nvdimm_driver.plugins import Backing, backing_named
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.ownership import identity_at


def find_elsewhere(
    ledger: Ledger, backings: Sequence[Backing], start: Start, announced: Sequence[tuple[int, int]] = ()
) -> list[str]:
    """Return the paths of a start's files of which bytes are not in the frames that its guest has for them.

    A file that is not at its path is not among them; a device does not move. Of a guest that an earlier version has
    started, the places are not known.

    :param announced: the guest's frames, as its device model has announced them, as (mfn, count); empty if they are not
        known. The ledger has those of now, and not the guest's, if a repair has written the start into it.
    :raises NvdimmError: when nobody can say where a file's bytes are.
    """
    run = ledger.find_begun(start)
    mapped = {*ledger.mappings_of(start)}
    found = []
    for spec, identity, placement, has_labels in saved_guest.placed(run) if run and mapped else ():
        here = identity_at(backings, spec.path) if identity.inode else None
        if here is None or not here.shares_bytes(identity):
            continue
        extents = backing_named(backings, identity.kind).find_extents(spec)
        try:
            now = layout.mappings(placement, extents, labels=has_labels)
        except LayoutError:  # a part of it is nowhere
            now = ()
        if not now or not mapped.issuperset(now) or not (not announced or _are_in(announced, now)):
            found.append(spec.path)
    return found


def _are_in(frames: Iterable[tuple[int, int]], mappings: Iterable[Mapping]) -> bool:
    """Return True when all machine frames of these mappings are among those, which are joined with their neighbours."""
    ranges = sorted(frames)
    at = [(bisect_right(ranges, (each.mfn, 1 << 64)) - 1, each) for each in mappings]
    return all(place >= 0 and each.mfn + each.frames <= sum(ranges[place]) for place, each in at)
