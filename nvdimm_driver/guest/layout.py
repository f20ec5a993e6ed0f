# SPDX-License-Identifier: Apache-2.0
"""Layout of a guest's physical address space: the place of each NVDIMM, and the machine frames mapped there. Pure.

Xen's HVM guests have RAM from 0 to 0xF0000000 and the rest of it from 4 GiB on (xen/include/public/hvm/e820.h:
HVM_BELOW_4G_RAM_END). If a guest's PCI BARs do not all fit below 4 GiB, hvmloader puts 64-bit ones right above the RAM
and knows nothing of NVDIMMs (tools/firmware/hvmloader/pci.c:pci_setup). Linux PV drivers look for free address space
there, too. So NVDIMMs start after a gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from nvdimm_driver.errors import LayoutError
from nvdimm_driver.model import GIB, MIB, PAGE, SUPERPAGE, Extent, Gfn, GuestLayout, Mapping, Mfn, Placement
from nvdimm_driver.sizes import align_up, human

RAM_BELOW_4G_END = 0xF0000000
"""xen/include/public/hvm/e820.h:HVM_BELOW_4G_RAM_END; the PCI hole is from here to 4 GiB."""
MAX_ADDRESS_BITS = 48
"""Address bits that four levels of EPT or NPT translate; Xen builds no fifth."""
MIN_GAP = GIB
"""A gap is not shrunk below this: hvmloader's 64-bit BARs always need some room."""
BASE_STEPS = (GIB, 128 * MIB, SUPERPAGE)
"""Alignments of chosen bases, the best first. With 1 GiB, a guest can map an NVDIMM in pages of 1 GiB. With 128 MiB, no
two NVDIMMs share a memory section of Linux, which before 5.3 could use only one of the two."""
HYPERTRANSPORT_SIZE = 12 * GIB
"""Bytes that AMD reserves for HyperTransport."""


@dataclass(frozen=True)
class PlacementRequest:
    """A request to place one NVDIMM.

    :ivar size: visible bytes.
    :ivar label_size: bytes of the label area; the place has room for it, whoever serves it.
    :ivar label_gap: bytes of the backing between the visible part and the label area.
    :ivar alignsize: the base is a multiple of it; None when not given.
    :ivar base: guest-physical base that it must have, or None.
    :ivar node: guest NUMA node, or None.
    :ivar kept: base that an earlier define chose, or None. It stays as long as it is possible.
    :ivar floor: the base must not be below it: a running guest gets it, and has had something there.
    """

    slot: int
    size: int
    label_size: int
    label_gap: int
    alignsize: int | None
    base: int | None
    node: int | None
    kept: int | None = None
    floor: int = 0


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

    The same input gives the same layout. What an earlier define chose stays if it is still possible. Otherwise the new
    base is the same modulo 1 GiB, because the guest's own data may need that alignment (Linux:
    drivers/nvdimm/pfn_devs.c:nd_pfn_validate). Other bases are chosen as :func:`_congruence` says.

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
    for staying in (_staying(wanted, fixed, min(gap, MIN_GAP)), ()):
        chosen = _choose(wanted, (*fixed.nvdimms, *staying), fixed, gap)
        if chosen is not None:
            layout = around(ram, (*fixed.nvdimms, *chosen), address_bits=address_bits)
            check(layout, ordered, address_bits=address_bits)
            return layout
    reserved = " and ".join(map(_span, _hypertransport(fixed.limit)))
    outside = f"outside of {reserved}, which AMD reserves for HyperTransport, " if reserved else ""
    raise LayoutError(
        f"{len(wanted)} NVDIMMs, {human(sum(request.size for request in wanted))} in all, do not fit between the end "
        f"of the guest's RAM at {fixed.highmem_end:#x} and the end of its physical address space at {fixed.limit:#x}, "
        f"{outside}even with a gap of only {human(min(_gaps(gap)))} above the RAM",
        hint="give the guest less RAM or smaller NVDIMMs, or run it on a CPU with more physical address bits",
    )


def place_labels(guest: GuestLayout) -> GuestLayout:
    """Return the layout with a place for each label area that is mapped into the guest.

    That is the place right behind the data, as in the backing. If another NVDIMM has it, as it may with bases that the
    user gave, it is the first free one above the lowest NVDIMM, or else one above the RAM.

    :raises LayoutError: when there is none.
    """
    taken = [(each.base, each.end) for each in guest.nvdimms]
    moved = []
    for placement in guest.label_areas:
        if _obstacle(*placement.label_pages, taken) is None and placement.space_end <= guest.limit:
            taken.append(placement.label_pages)
        else:
            moved.append(placement)
    placed = list(guest.nvdimms)
    for placement in moved:
        base = _label_place(placement, guest, taken)
        found = replace(placement, label_at=base + placement.label_base % PAGE)
        taken.append(found.label_pages)
        placed[placed.index(placement)] = found
    return replace(guest, nvdimms=tuple(placed))


def advice(guest: GuestLayout, *, pci_devices: int = 0) -> Iterator[str]:
    """Yield what may go wrong with the places of NVDIMMs, on some hosts or in some guests.

    :param pci_devices: number of the host's PCI devices that the guest gets.
    """
    lowest = min(
        *(each.base for each in guest.nvdimms), *(each.label_pages[0] for each in guest.label_areas), guest.limit
    )
    room = lowest - guest.highmem_end
    if room < MIN_GAP or pci_devices:
        yield (
            f"{human(room)} are free between the RAM and the NVDIMMs: if the PCI BARs of the guest do not all fit "
            f"below 4 GiB, hvmloader puts 64-bit ones there, from {guest.highmem_end:#x} on, and does not know where "
            "the NVDIMMs are; if the BARs need more, give the NVDIMMs higher bases"
        )
    labels = guest.label_areas
    for placement in guest.nvdimms:
        parts = {"": (placement.base, placement.end)}
        if placement in labels:
            parts["the label area of "] = placement.label_pages
        for what, part in parts.items():
            for reserved in _hypertransport(guest.limit):
                if _obstacle(*part, [reserved]) is not None:
                    yield (
                        f"{what}{_name(placement)} overlaps {_span(reserved)}, which AMD reserves for HyperTransport: "
                        "on an AMD host the guest may not reach it there; give the NVDIMM another base, or none"
                    )
        if placement.base % SUPERPAGE:
            yield (
                f"{_name(placement)} is not at a multiple of {human(SUPERPAGE)}: Linux since 5.7 neither makes nor "
                "finds a namespace in fsdax or devdax mode on it; with <alignsize unit='MiB'>2</alignsize>, and no "
                "base in the XML, it is"
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
        if placement.base < request.floor:
            raise LayoutError(
                f"{_name(placement)} begins below {request.floor:#x}, and the running guest has, or had, memory there",
                hint="leave its base out, or boot the guest anew",
            )
    for left, right in pairwise(sorted(space.nvdimms, key=lambda placement: placement.base)):
        if right.base < left.end:
            raise LayoutError(
                f"{_name(left)} and {_name(right)} overlap from {right.base:#x} on",
                hint="define the domain again, with another base for one of them, or none",
            )


def label_frames(space: GuestLayout) -> tuple[tuple[Gfn, int], ...]:
    """Return the guest frames (gfn, count) that hold all or part of a label area mapped into the guest.

    They must not be cached: the code that serves label areas there (:mod:`.acpi.label_methods`) flushes no caches.
    """
    pages = [each.label_pages for each in space.label_areas]
    return tuple((Gfn(start // PAGE), (end - start) // PAGE) for start, end in pages)


def mappings(placement: Placement, extents: Sequence[Extent], *, labels: bool = False) -> tuple[Mapping, ...]:
    """Return the mappings of machine frames for exactly the visible bytes of an NVDIMM.

    :param extents: of the backing, in order of offset, from 0 without gaps; bytes beyond the needed ones are ignored.
        Extents that are contiguous in the machine become one mapping.
    :param labels: also map the pages of the label area, which may begin and end inside a page.
    :raises LayoutError: when the extents are not whole pages, have a gap, or do not reach the end.
    """
    wanted = [(0, placement.size, placement.base)]  # from offset, to offset, guest-physical address
    if labels:
        offset = (placement.size + placement.label_gap) // PAGE * PAGE
        wanted.append((offset, placement.space_end - placement.base, placement.label_pages[0]))
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
        for first, last, address in wanted:
            low, high = max(first, extent.offset), min(last, done)
            if low < high:
                gfn, mfn = (address + low - first) // PAGE, (extent.spa + low - extent.offset) // PAGE
                _append(result, Mapping(Gfn(gfn), Mfn(mfn), (high - low) // PAGE))
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


def _staying(requests: Sequence[PlacementRequest], fixed: GuestLayout, gap: int) -> list[Placement]:
    """Return the places that earlier defines chose and that are still possible, with a gap above the RAM."""
    found: list[Placement] = []
    for request in requests:
        if request.kept is None or request.kept % (request.alignsize or PAGE) or request.kept < request.floor:
            continue
        placement = _at(request, request.kept)
        taken = [(each.base, each.end) for each in (*fixed.nvdimms, *found)]
        inside = fixed.highmem_end + gap <= placement.base and placement.end <= fixed.limit
        if inside and _obstacle(placement.base, placement.end, taken) is None:
            found.append(placement)
    return found


def _choose(
    requests: Sequence[PlacementRequest], taken: Sequence[Placement], space: GuestLayout, gap: int
) -> list[Placement] | None:
    """Return a place for each request: that in `taken`, or else a new one; None when they do not fit."""
    staying = {placement.slot: placement for placement in taken}
    new = [request for request in requests if request.slot not in staying]
    for tried in _gaps(gap):
        start = align_up(space.highmem_end + tried, GIB)
        for step in BASE_STEPS:
            chosen = _first_fit(new, taken, start=start, limit=space.limit, step=step)
            if chosen is not None:
                return [*(staying[each.slot] for each in requests if each.slot in staying), *chosen]
    return None


def _first_fit(
    requests: Sequence[PlacementRequest], taken: Sequence[Placement], *, start: int, limit: int, step: int
) -> list[Placement] | None:
    """Place each after the one before it, around those in `taken`; return None if the address space ends first.

    Each gets room for its label area behind it, whoever serves that.
    """
    obstacles = [*_hypertransport(limit), *((each.base, each.space_end) for each in taken)]
    chosen: list[Placement] = []
    for request in requests:
        room = _at(request, 0).space_end
        lowest = max(start, request.floor)
        placement = _at(request, _first_free(lowest, room, *_congruence(request, step), obstacles))
        if placement.space_end > limit:
            return None
        chosen.append(placement)
        start = placement.space_end
    return chosen


def _first_free(start: int, size: int, modulus: int, remainder: int, taken: Sequence[tuple[int, int]]) -> int:
    """Return the first address from `start` on, congruent to `remainder`, with so many bytes that nothing has."""
    base = align_up(start - remainder, modulus) + remainder
    while (end := _obstacle(base, base + size, taken)) is not None:
        base = align_up(end - remainder, modulus) + remainder
    return base


def _hypertransport(limit: int) -> list[tuple[int, int]]:
    """Return the ranges below `limit` that AMD reserves for HyperTransport.

    DMA does not reach the one below 1 TiB, for which QEMU keeps it free (hw/i386/pc.c: AMD_HT_START). CPUs reach no
    memory there before Zen, and none in the last part of their address space since (Linux:
    tools/testing/selftests/kvm/lib/x86/processor.c:vm_compute_max_gfn; xen/arch/x86/dom0_build.c).
    """
    return [(end - HYPERTRANSPORT_SIZE, end) for end in sorted({1 << 40, limit}) if 1 << 40 <= end <= limit]


def _span(part: tuple[int, int]) -> str:
    return f"{part[0]:#x} - {part[1] - 1:#x}"


def _obstacle(start: int, end: int, taken: Sequence[tuple[int, int]]) -> int | None:
    """Return the end of a range that shares an address with ``start … end-1``, or None."""
    return next((stop for first, stop in taken if first < end and start < stop), None)


def _congruence(request: PlacementRequest, step: int) -> tuple[int, int]:
    """Return (modulus, remainder) of a base that is to be chosen.

    It is as far behind a multiple of the step as the base was that an earlier define chose, if ``alignsize`` allows
    that. Else it is a multiple of the step, also where the backing begins elsewhere: Xen then maps entries of 4 KiB,
    and elsewhere the guest would find no namespace (Linux: drivers/nvdimm/pfn_devs.c:nd_pfn_validate).
    """
    align = request.alignsize or PAGE
    modulus = max(align, step)
    remainder = 0 if request.kept is None else request.kept % modulus
    return modulus, remainder if remainder % align == 0 else 0


def _label_place(placement: Placement, guest: GuestLayout, taken: Sequence[tuple[int, int]]) -> int:
    """Return the address of free pages for a label area whose own place is taken."""
    start, end = placement.label_pages
    for lowest in (min(each.base for each in guest.nvdimms), guest.highmem_end + MIN_GAP):
        base = _first_free(lowest, end - start, PAGE, 0, [*_hypertransport(guest.limit), *taken])
        if base + end - start <= guest.limit:
            return base
    raise LayoutError(
        f"the label area of {_name(placement)}, {human(placement.label_size)}, has no place in the guest's physical "
        f"address space, which ends at {guest.limit:#x}",
        hint="define the domain again, with other bases or none, or have its labels served by a QEMU (dsm='qemu')",
    )


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
                hint="define the domain again, with another base or none, or with another <alignsize>",
            )


def _check_range(placement: Placement, space: GuestLayout) -> None:
    if placement.base < space.highmem_end:
        raise LayoutError(
            f"{_name(placement)} overlaps the guest's RAM of {human(space.ram)} or its PCI hole: "
            f"the first address above both is {space.highmem_end:#x}",
            hint="define the domain again, with another base or none, or with less RAM",
        )
    if placement.end > space.limit:
        raise LayoutError(
            f"{_name(placement)} ends beyond the guest's physical address space, which ends at {space.limit:#x}",
            hint="define the domain again, with another base or none, or use a CPU with more physical address bits",
        )


def _name(placement: Placement) -> str:
    return f"the NVDIMM in slot {placement.slot} ({human(placement.size)} at {placement.base:#x})"


def _listed(slots: Sequence[int]) -> str:
    return ", ".join(map(str, slots))
