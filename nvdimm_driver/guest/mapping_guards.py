# SPDX-License-Identifier: Apache-2.0
"""The guards: they decide which mappings are allowed.

Pure, and imports little: the device model uses it before its first hypercall.

Xen does not check what XEN_DOMCTL_memory_mapping maps: dom0 may map any frame into any guest, even RAM, Xen's own and
another guest's. This module alone keeps guests apart.

A mapping is a tuple (gfn, mfn, count) and a range of the machine (mfn, count), in 4 KiB frames.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise

from nvdimm_driver.errors import GuardError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FRAME_LIMIT = 1 << 40
"""x86 physical addresses have at most 52 bits (Intel SDM 3A §4.1.4), frame numbers 40."""

_REPORT = "nothing was mapped; this is a bug, or the ledger was tampered with: report it with the driver's log"


def check_mappings(
    mappings: Sequence[tuple[int, int, int]],
    *,
    areas: Iterable[tuple[int, int]],
    ram: Iterable[tuple[int, int]],
    taken: Iterable[tuple[str, int, int]],
    guest_start_gfn: int,
    guest_limit_gfn: int,
) -> None:
    """Check that every frame of a plan may be given to the guest.

    :param mappings: (gfn, mfn, count): everything that the guest gets, for all its NVDIMMs.
    :param areas: persistent memory that the domain's backings hand out; each mapping must be wholly inside one area.
    :param ram: RAM in the machine's memory map.
    :param taken: (owner, mfn, count): frames that other running domains have.
    :param guest_start_gfn: first guest frame above the guest's RAM.
    :param guest_limit_gfn: first guest frame the guest cannot use.
    :raises GuardError: naming the frames and the reason.
    """
    pmem = Ranges("an area of persistent memory", (("", mfn, count) for mfn, count in areas))
    memory = Ranges("RAM", (("RAM", mfn, count) for mfn, count in ram))
    others = Ranges("another domain", taken)
    for mapping in mappings:
        gfn, mfn, count = mapping
        if not (count > 0 and 0 <= mfn <= FRAME_LIMIT - count):
            raise GuardError(f"{_show(mapping)}: not a range of machine frames below {FRAME_LIMIT:#x}", hint=_REPORT)
        if not 0 <= guest_start_gfn <= gfn <= guest_limit_gfn - count:
            raise GuardError(
                f"{_show(mapping)}: outside the guest's frames for NVDIMMs, "
                f"{guest_start_gfn:#x} to {guest_limit_gfn - 1:#x}",
                hint=_REPORT,
            )
        if (hit := memory.touched_by(mfn, count)) is not None:
            raise GuardError(f"{_show(mapping)}: overlaps RAM of the machine, {_span(*hit[1:])}", hint=_REPORT)
        if (hit := others.touched_by(mfn, count)) is not None:
            raise GuardError(
                f"{_show(mapping)}: overlaps {_span(*hit[1:])}, in use by the running domain {hit[0]}",
                hint="two domains cannot use the same persistent memory; shut the other one down first",
            )
        if not pmem.cover(mfn, count):
            raise GuardError(f"{_show(mapping)}: not inside one area of persistent memory", hint=_REPORT)
    _refuse_overlap("guest", sorted(mappings), 0)
    _refuse_overlap("machine", sorted(mappings, key=lambda mapping: mapping[1]), 1)


def first_outside(
    mappings: Iterable[tuple[int, int, int]], areas: Iterable[tuple[int, int]]
) -> tuple[int, int, int] | None:
    """Return a mapping that is not wholly inside one area; None when all are.

    :param mappings: (gfn, mfn, count).
    :param areas: (mfn, count).
    """
    pmem = Ranges("an area of persistent memory", (("", mfn, count) for mfn, count in areas))
    return next((mapping for mapping in mappings if not pmem.cover(*mapping[1:])), None)


def check_not_replaced(mappings: Iterable[tuple[int, int, int]], areas: Iterable[tuple[int, int]]) -> None:
    """Check that the memory of a prepared start is still that of the namespaces which its NVDIMMs are on.

    :param mappings: (gfn, mfn, count).
    :param areas: of these namespaces those that are as they were, as (mfn, count).
    :raises GuardError: naming frames that are not.
    """
    if (found := first_outside(mappings, areas)) is not None:
        raise GuardError(
            f"{_show(found)}: their namespace is gone, or is another one or elsewhere, since the start was prepared; "
            "nothing was mapped",
            hint="was it destroyed or made anew? 'nvdimmctl host' shows the namespaces; start the domain again",
        )


def check_areas(areas: Iterable[tuple[str, str, int, int]]) -> None:
    """Check that no two different areas share a frame: each would hand out the other's bytes.

    :param areas: (uid, name for messages, mfn, count). Two areas with the same uid are the same area.
    :raises GuardError: naming both and the frames.
    """
    furthest: dict[str, tuple[str, int, int]] = {}  # by uid: of the areas so far, the one that ends last
    for uid, what, mfn, count in sorted(areas, key=lambda area: area[2]):
        for other, reach in furthest.items():
            if other != uid and count > 0 and _end(reach) > mfn:
                raise GuardError(
                    f"{reach[0]} and {what} both hand out the machine frames "
                    f"{_span(mfn, min(_end(reach), mfn + count) - mfn)}",
                    hint="remove the plug-in of one of the two, or correct its options",
                )
        if uid not in furthest or mfn + count > _end(furthest[uid]):
            furthest[uid] = (what, mfn, count)


class Ranges:
    """Ranges of machine frames, sorted by start. They may overlap each other."""

    def __init__(self, what: str, ranges: Iterable[tuple[str, int, int]]) -> None:
        self.starts: list[int] = []
        self.reach: list[tuple[str, int, int]] = []  # for each start: of the ranges so far, the one that ends last
        for owner, mfn, count in sorted(ranges, key=lambda entry: entry[1]):
            if mfn < 0 or count < 0:
                raise GuardError(f"{what}: {count} frames from {mfn} on are no range of machine frames", hint=_REPORT)
            if not count:
                continue
            entry = (owner, mfn, count)
            if self.reach and _end(self.reach[-1]) > mfn + count:
                entry = self.reach[-1]
            self.starts.append(mfn)
            self.reach.append(entry)

    def touched_by(self, mfn: int, count: int) -> tuple[str, int, int] | None:
        """Return a range that shares a frame with ``mfn … mfn+count-1``, or None."""
        before = bisect_left(self.starts, mfn + count)  # how many ranges start before the end
        if before and _end(self.reach[before - 1]) > mfn:
            return self.reach[before - 1]
        return None

    def cover(self, mfn: int, count: int) -> bool:
        """Return True when one range has all the frames ``mfn … mfn+count-1``."""
        before = bisect_right(self.starts, mfn)
        return before > 0 and _end(self.reach[before - 1]) >= mfn + count


def _end(entry: tuple[str, int, int]) -> int:
    return entry[1] + entry[2]


def _refuse_overlap(side: str, ordered: Sequence[tuple[int, int, int]], key: int) -> None:
    for one, two in pairwise(ordered):
        if one[key] + one[2] > two[key]:
            raise GuardError(f"{_show(one)} and {_show(two)}: overlap on the {side} side", hint=_REPORT)


def _show(mapping: tuple[int, int, int]) -> str:
    gfn, mfn, count = mapping
    return f"mapping of machine frames {_span(mfn, count)} at guest frame {gfn:#x}"


def _span(mfn: int, count: int) -> str:
    return f"{mfn:#x} to {mfn + count - 1:#x}"
