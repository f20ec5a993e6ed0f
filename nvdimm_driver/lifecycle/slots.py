# SPDX-License-Identifier: Apache-2.0
"""The slots of a domain's NVDIMMs: an NVDIMM that the domain has had keeps its slot. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count

from nvdimm_driver.errors import LayoutError
from nvdimm_driver.model import MAX_NVDIMMS, Allocation, BackingIdentity, DomainSpec, GuestLayout, NvdimmSpec


def kept(
    domain: DomainSpec, items: Sequence[Allocation], identify: Callable[[str], BackingIdentity | None]
) -> dict[str, int]:
    """Return, by path, the slots that NVDIMMs have had, of those that a domain leaves open.

    An NVDIMM is known by its bytes, and by its path when it has new ones. One that is set aside has lost its slot if
    the domain gives that to another.

    :param items: what the domain has had.
    :param identify: returns the identity of what is at a path now, or None.
    """
    given = {spec.path: spec.slot for spec in domain.nvdimms if spec.path not in domain.unplaced}
    others = [item for item in items if item.spec.path not in given]
    known = [item for item in others if not (item.spec.set_aside and item.spec.own_slot in given.values())]
    found: dict[int, str] = {}
    for set_aside in (False, True):  # what the guest has had keeps its slot before what it has not
        group = [item for item in known if item.spec.set_aside is set_aside]
        for path in sorted(domain.unplaced - {*found.values()}):
            identity = identify(path)
            for item in group:
                if item.identity is not None and item.identity.is_same(identity):
                    found.setdefault(item.spec.own_slot, path)
        for path in sorted(domain.unplaced - {*found.values()}):
            for item in group:
                if item.spec.path == path:
                    found.setdefault(item.spec.own_slot, path)
    return {path: slot for slot, path in found.items()}


def assign(domain: DomainSpec, kept: Mapping[str, int]) -> tuple[NvdimmSpec, ...]:
    """Return the domain's NVDIMMs in slot order, those that it leaves open in the slots that they keep or in free ones.

    :param kept: slot of each NVDIMM that the domain has had and leaves open, by path.
    :raises LayoutError: when the domain gives one of these slots to another NVDIMM.
    """
    given = {spec.slot: spec.path for spec in domain.nvdimms if spec.path not in domain.unplaced}
    for path, slot in kept.items():
        if slot in given:
            raise LayoutError(
                f"{given[slot]}: slot {slot} is taken by {path}, whose guest knows it by that slot",
                hint="leave <address> out, or write another slot; to exchange slots, write the <address> of both",
            )
    free = iter(sorted({*range(MAX_NVDIMMS)} - {*given, *kept.values()}))
    placed = [
        replace(spec, slot=kept[spec.path] if spec.path in kept else next(free))
        if spec.path in domain.unplaced
        else spec
        for spec in domain.nvdimms
    ]
    return tuple(sorted(placed, key=lambda spec: spec.slot))


def set_aside(items: Sequence[Allocation], taken: Collection[int]) -> list[Allocation]:
    """Return NVDIMMs that a domain has besides those of its guest, with numbers that tell the slots that they had.

    :param taken: slots of the guest. Where one has the slot of an item, the item's number is a multiple of 256 more.
    """
    numbers = {*taken, *(item.spec.slot for item in items)}
    moved = []
    for item in items:
        number = item.spec.slot
        if number in taken:
            number = next(each for each in count(number, MAX_NVDIMMS) if each not in numbers)
            numbers.add(number)
        moved.append(replace(item, spec=replace(item.spec, slot=number)))
    return moved


def in_guest(items: Sequence[Allocation]) -> list[Allocation]:
    """Return those of a domain's NVDIMMs that one guest can have, in its slots: one that is set aside goes last."""
    found: dict[int, Allocation] = {}
    for item in sorted(items, key=lambda each: each.spec.set_aside):
        spec = replace(item.spec, slot=item.spec.own_slot)
        found.setdefault(spec.slot, replace(item, spec=spec))
    return [*found.values()]


def all_aside(items: Sequence[Allocation], taken: Collection[int] = ()) -> list[Allocation]:
    """Return all of these NVDIMMs set aside, as :func:`set_aside` does it for those whose slots are taken."""
    return set_aside(items, {*taken, *(item.spec.slot for item in items if not item.spec.set_aside)})


def placed(item: Allocation, guest: GuestLayout) -> Allocation:
    """Return an NVDIMM that the guest does not have now, without its base if the guest has another one there.

    One that is set aside cannot be in a guest together with the others, and keeps its base.
    """
    if item.spec.set_aside:
        return item
    at = item.placement
    overlaps = any(each.base < at.end and at.base < each.end for each in guest.nvdimms)
    return replace(item, base=None) if overlaps else item


def fitted(item: Allocation, others: Iterable[Allocation]) -> Allocation:
    """Return an NVDIMM, without its base if another one of the domain has a part of these addresses."""
    return replace(item, base=None) if any(_overlap(item, each) for each in others) else item


def combined(items: Iterable[Allocation]) -> list[Allocation]:
    """Put together what the ledger and marks say of a domain's NVDIMMs; return them in slot order.

    The later change wins. Of two NVDIMMs in one slot, the earlier one is set aside. Of two with addresses in common,
    the earlier one loses its base, and the next start chooses another.
    """
    found: list[Allocation] = []
    for item in sorted(items, key=lambda each: -each.changed):
        found += set_aside([fitted(item, found)], {each.spec.slot for each in found})
    return sorted(found, key=lambda item: item.spec.slot)


def spread(items: Iterable[Allocation]) -> list[Allocation]:
    """Return NVDIMMs; of two in the guest with addresses in common, the one that was changed earlier has no base."""
    found: list[Allocation] = []
    for item in sorted(items, key=lambda each: (each.spec.set_aside, -each.changed)):
        found.append(item if item.spec.set_aside else fitted(item, found))
    return sorted(found, key=lambda item: item.spec.slot)


def _overlap(one: Allocation, other: Allocation) -> bool:
    """Return True when two NVDIMMs of a domain have guest-physical addresses in common."""
    if one.base is None or other.base is None:
        return False
    return one.base < other.placement.space_end and other.base < one.placement.space_end
