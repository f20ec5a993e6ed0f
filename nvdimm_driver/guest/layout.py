# SPDX-License-Identifier: Apache-2.0
"""Layout of a guest's physical address space: the place of each NVDIMM, and the machine frames mapped there. Pure.

Xen's HVM guests have RAM from 0 to 0xF0000000 and the rest of it from 4 GiB on (xen/include/public/hvm/e820.h:
HVM_BELOW_4G_RAM_END). hvmloader puts 64-bit PCI BARs right above the RAM and ignores pmem, and Linux PV drivers look
for free address space there, too. So NVDIMMs start after a gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nvdimm_driver.errors import LayoutError
from nvdimm_driver.model import GIB, PAGE, SUPERPAGE, Extent, Gfn, GuestLayout, Mapping, Mfn, Placement
from nvdimm_driver.sizes import align_up, human, units

RAM_BELOW_4G_END = 0xF0000000
"""xen/include/public/hvm/e820.h:HVM_BELOW_4G_RAM_END; the PCI hole is from here to 4 GiB."""
MAX_ADDRESS_BITS = 48
"""Address bits that four levels of EPT or NPT translate; Xen builds no fifth."""
MIN_GAP = GIB
"""A gap is not shrunk below this: hvmloader's 64-bit BARs always need some room."""


@dataclass(frozen=True)
class PlacementRequest:
    """A request to place one NVDIMM.

    :ivar size: visible bytes.
    :ivar label_size: bytes of the label area; the place has room for it, whoever serves it.
    :ivar label_gap: bytes of the backing between the visible part and the label area.
    :ivar alignsize: the base is a multiple of it; None when not given.
    :ivar first_spa: SPA of the backing's first byte.
    :ivar base: guest-physical base that the user fixed or that an earlier define chose, or None.
    :ivar node: guest NUMA node, or None.
    """

    slot: int
    size: int
    label_size: int
    label_gap: int
    alignsize: int | None
    first_spa: int
    base: int | None
    node: int | None


def around(ram: int, nvdimms: Sequence[Placement], *, address_bits: int) -> GuestLayout:
    """Return the address space of a guest whose NVDIMMs have their places. Nothing is checked.

    :param ram: guest RAM, bytes.
    :param address_bits: the guest's physical address width.
    """
    return GuestLayout(
        ram=ram,
        highmem_end=4 * GIB + max(0, ram - RAM_BELOW_4G_END),
        limit=1 << min(address_bits, MAX_ADDRESS_BITS),
        nvdimms=tuple(sorted(nvdimms, key=lambda placement: placement.slot)),
    )


def place(ram: int, requests: Sequence[PlacementRequest], *, address_bits: int, gap: int) -> GuestLayout:
    """Choose a base for every NVDIMM that has none, and check the bases of the others.

    The same input gives the same layout. A base is a multiple of ``alignsize`` and, where that allows it, congruent
    modulo 2 MiB to the backing's first SPA, so that Xen can use 2 MiB entries.

    :param ram: guest RAM, bytes.
    :param address_bits: the guest's physical address width.
    :param gap: bytes to leave free above the RAM; halved, down to 1 GiB, while the NVDIMMs do not fit.
    :raises LayoutError: when the NVDIMMs do not fit, or a given base is not possible.
    """
    ordered = sorted(requests, key=lambda request: request.slot)
    given = [request for request in ordered if request.base is not None]
    fixed = around(ram, [_at(request, request.base or 0) for request in given], address_bits=address_bits)
    check(fixed, given, address_bits=address_bits)
    wanted = [request for request in ordered if request.base is None]
    for tried in _gaps(gap):
        chosen = _first_fit(wanted, fixed.nvdimms, start=align_up(fixed.highmem_end + tried, GIB), limit=fixed.limit)
        if chosen is not None:
            layout = around(ram, (*fixed.nvdimms, *chosen), address_bits=address_bits)
            check(layout, ordered, address_bits=address_bits)
            return layout
    raise LayoutError(
        f"{len(wanted)} NVDIMMs, {human(sum(request.size for request in wanted))} in all, do not fit between the end "
        f"of the guest's RAM at {fixed.highmem_end:#x} and the end of its physical address space at {fixed.limit:#x}, "
        f"even with a gap of only {human(tried)} above the RAM",
        hint="give the guest less RAM or smaller NVDIMMs, or run it on a CPU with more physical address bits",
    )


def check(layout: GuestLayout, requests: Sequence[PlacementRequest], *, address_bits: int) -> None:
    """Check that a layout, such as one kept from an earlier define, is right for the guest as it is now.

    :param layout: only ``ram`` (the guest's RAM now) and ``nvdimms`` are used; the rest is computed again.
    :raises LayoutError: when it does not hold exactly these NVDIMMs, or one of them overlaps RAM, the PCI hole or
        another one, is misaligned, or ends beyond the guest's physical address space.
    """
    slots = sorted(request.slot for request in requests)
    if len(set(slots)) != len(slots) or slots != sorted(placement.slot for placement in layout.nvdimms):
        raise LayoutError(
            f"the guest has NVDIMMs in slots {_listed(slots)}, its layout has them in slots "
            f"{_listed(sorted(placement.slot for placement in layout.nvdimms))}",
            hint="give each NVDIMM a slot of its own and define the domain again",
        )
    space = around(layout.ram, layout.nvdimms, address_bits=address_bits)
    for placement, request in zip(space.nvdimms, sorted(requests, key=lambda request: request.slot), strict=True):
        _check_request(placement, request)
        _check_range(placement, space)
    for left, right in pairwise(sorted(space.nvdimms, key=lambda placement: placement.base)):
        if right.base < left.space_end:
            raise LayoutError(
                f"{_name(left)} and {_name(right)} overlap from {right.base:#x} on",
                hint="change or leave out the base of one of them",
            )


def label_frames(space: GuestLayout) -> tuple[tuple[Gfn, int], ...]:
    """Return the guest frames (gfn, count) that hold all or part of a label area mapped into the guest.

    They must not be cached: the code that serves label areas there (:mod:`.acpi.label_methods`) flushes no caches.
    """
    return tuple(
        (Gfn(each.label_base // PAGE), units(each.space_end, PAGE) - each.label_base // PAGE)
        for each in space.label_areas
    )


def mappings(placement: Placement, extents: Sequence[Extent], *, labels: bool = False) -> tuple[Mapping, ...]:
    """Return the mappings of machine frames for exactly the visible bytes of an NVDIMM.

    :param extents: of the backing, in order of offset, from 0 without gaps; bytes beyond the needed ones are ignored.
        Extents that are contiguous in the machine become one mapping.
    :param labels: also map the pages of the label area, which may begin and end inside a page.
    :raises LayoutError: when the extents are not whole pages, have a gap, or do not reach the end.
    """
    wanted = [(0, placement.size)]
    if labels:
        wanted.append(((placement.label_base - placement.base) // PAGE * PAGE, placement.space_end - placement.base))
    end = wanted[-1][1]
    result: list[Mapping] = []
    done = 0
    for extent in extents:
        if done >= end:
            break
        if extent.offset != done or extent.length <= 0 or extent.spa % PAGE or extent.length % PAGE:
            raise LayoutError(
                f"the backing of {_name(placement)} has an extent of {extent.length:#x} bytes at offset "
                f"{extent.offset:#x}, SPA {extent.spa:#x}; an extent of whole {human(PAGE)} pages must begin at offset "
                f"{done:#x}",
                hint="the backing has a hole or is not aligned to pages of the persistent memory: create it again",
            )
        done += extent.length
        for first, last in wanted:
            low, high = max(first, extent.offset), min(last, done)
            if low < high:
                mfn = (extent.spa + low - extent.offset) // PAGE
                _append(result, Mapping(Gfn((placement.base + low) // PAGE), Mfn(mfn), (high - low) // PAGE))
    if done < end:
        raise LayoutError(
            f"the extents of the backing of {_name(placement)} end at offset {done:#x}, and {end:#x} bytes are needed",
            hint="the backing is too short: create it again, or give the NVDIMM a smaller <target><size>",
        )
    return tuple(result)


def _append(mappings: list[Mapping], new: Mapping) -> None:
    """Add a mapping, or extend the last one if the two are contiguous in the machine and in the guest."""
    last = mappings[-1] if mappings else None
    if last and (last.gfn + last.frames, last.mfn + last.frames) == (new.gfn, new.mfn):
        mappings[-1] = last._replace(frames=last.frames + new.frames)
    else:
        mappings.append(new)


def _gaps(gap: int) -> Iterator[int]:
    yield gap
    while gap // 2 >= MIN_GAP:
        gap //= 2
        yield gap


def _first_fit(
    requests: Sequence[PlacementRequest], taken: Sequence[Placement], *, start: int, limit: int
) -> list[Placement] | None:
    """Place each after the one before it, around the fixed ones; return None if the address space ends first."""
    chosen: list[Placement] = []
    for request in requests:
        modulus, remainder = _congruence(request)
        placement = _at(request, align_up(start - remainder, modulus) + remainder)
        while (obstacle := _overlapped(placement, taken)) is not None:
            placement = _at(request, align_up(obstacle.space_end - remainder, modulus) + remainder)
        if placement.space_end > limit:
            return None
        chosen.append(placement)
        start = placement.space_end
    return chosen


def _overlapped(placement: Placement, others: Sequence[Placement]) -> Placement | None:
    return next(
        (other for other in others if other.base < placement.space_end and placement.base < other.space_end), None
    )


def _congruence(request: PlacementRequest) -> tuple[int, int]:
    """Return (modulus, remainder) of a base that is to be chosen."""
    align = request.alignsize or PAGE
    remainder = request.first_spa % SUPERPAGE
    return max(align, SUPERPAGE), 0 if remainder % align else remainder


def _at(request: PlacementRequest, base: int) -> Placement:
    return Placement(request.slot, base, request.size, request.label_size, request.node, request.label_gap)


def _check_request(placement: Placement, request: PlacementRequest) -> None:
    if placement != _at(request, placement.base if request.base is None else request.base):
        raise LayoutError(
            f"{_name(placement)} is not what is asked for now: {human(request.size)}, a label area of "
            f"{human(request.label_size)} after a gap of {human(request.label_gap)}, "
            f"node {'none' if request.node is None else request.node}, "
            f"base {'any' if request.base is None else hex(request.base)}",
            hint="define the domain again",
        )
    if request.size <= 0:
        raise LayoutError(
            f"the guest would see nothing of the NVDIMM in slot {request.slot}",
            hint="its <target><size>, without the label area, must be at least one <alignsize>",
        )
    align = request.alignsize or PAGE
    for what, value in (("starts", placement.base), ("ends", placement.end)):
        if value % align:
            raise LayoutError(
                f"{_name(placement)} {what} at {value:#x}, which is not a multiple of {human(align)}",
                hint="change or leave out its base, or give it another <alignsize>",
            )


def _check_range(placement: Placement, space: GuestLayout) -> None:
    if placement.base < space.highmem_end:
        raise LayoutError(
            f"{_name(placement)} overlaps the guest's RAM of {human(space.ram)} or its PCI hole: "
            f"the first address above both is {space.highmem_end:#x}",
            hint="change or leave out its base, or give the guest less RAM",
        )
    if placement.space_end > space.limit:
        raise LayoutError(
            f"{_name(placement)} ends beyond the guest's physical address space, which ends at {space.limit:#x}",
            hint="change or leave out its base, or run the guest on a CPU with more physical address bits",
        )


def _name(placement: Placement) -> str:
    return f"the NVDIMM in slot {placement.slot} ({human(placement.size)} at {placement.base:#x})"


def _listed(slots: Sequence[int]) -> str:
    return ", ".join(map(str, slots))
