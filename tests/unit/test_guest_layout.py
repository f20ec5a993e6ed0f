# SPDX-License-Identifier: Apache-2.0
"""Placement of NVDIMMs in guest-physical space."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.errors import LayoutError
from nvdimm_driver.guest import layout, p2m
from nvdimm_driver.guest.layout import PlacementRequest
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, SUPERPAGE, Extent, GuestLayout, Placement


def request(
    slot: int = 0,
    size: int = GIB,
    *,
    label_size: int = 0,
    label_gap: int = 0,
    alignsize: int | None = None,
    base: int | None = None,
    node: int | None = None,
    kept: int | None = None,
) -> PlacementRequest:
    return PlacementRequest(slot, size, label_size, label_gap, alignsize, base, node, kept)


def place(ram: int, requests: list[PlacementRequest], *, address_bits: int, gap: int = 64 * GIB) -> GuestLayout:
    return layout.place(ram, requests, address_bits=address_bits, gap=gap)


def bases(guest: GuestLayout) -> list[int]:
    return [placement.base for placement in guest.nvdimms]


@pytest.mark.parametrize(
    ("ram", "highmem_end"),
    [
        (PAGE, 4 * GIB),
        (0xF0000000, 4 * GIB),
        (0xF0000000 + PAGE, 4 * GIB + PAGE),
        (4 * GIB, 4 * GIB + 256 * MIB),
        (1024 * GIB, 1028 * GIB - 0xF0000000),
    ],
)
def test_ram_above_the_pci_hole_starts_at_4_gib(ram: int, highmem_end: int) -> None:
    guest = place(ram, [], address_bits=46)
    assert guest == GuestLayout(ram, highmem_end, 1 << 46, ())
    assert guest == layout.around(ram, [], address_bits=46)


def test_nvdimms_start_at_the_next_gib_behind_the_gap_in_slot_order() -> None:
    guest = place(4 * GIB, [request(3), request(1, 2 * GIB)], address_bits=40)
    assert [placement.slot for placement in guest.nvdimms] == [1, 3]
    assert bases(guest) == [69 * GIB, 71 * GIB]  # RAM ends at 4.25 GiB


def test_all_that_was_asked_for_is_kept() -> None:
    guest = place(GIB, [request(7, MIB, label_size=128 * KIB, node=1)], address_bits=40)
    assert guest.nvdimms == (Placement(7, 68 * GIB, MIB, 128 * KIB, 1),)


def test_a_label_area_has_its_room_behind_what_is_visible() -> None:
    labelled = request(0, 14 * MIB, label_size=128 * KIB, label_gap=2 * MIB - 128 * KIB, alignsize=2 * MIB)
    guest = place(GIB, [labelled, request(1, MIB)], address_bits=40)
    first, second = guest.nvdimms
    assert first.label_base == first.base + 16 * MIB - 128 * KIB
    assert first.space_end == first.base + 16 * MIB
    assert second.base == 69 * GIB
    beside = request(1, GIB - 14 * MIB, base=68 * GIB + 14 * MIB)
    assert bases(place(GIB, [labelled, beside], address_bits=40))[0] == 69 * GIB
    tight = request(0, GIB, label_size=128 * KIB, label_gap=0)
    assert bases(place(GIB, [tight, request(1)], address_bits=40)) == [68 * GIB, 70 * GIB]


LABEL = 128 * KIB
TOUCHING = [
    request(0, 510 * MIB, label_size=LABEL, label_gap=2 * MIB - LABEL, alignsize=2 * MIB, base=0x100000000),
    request(1, 510 * MIB, label_size=LABEL, label_gap=2 * MIB - LABEL, alignsize=2 * MIB, base=0x11FE00000),
]
"""Bases that QEMU gives to the two NVDIMMs of libvirt's memory-hotplug-nvdimm tests when they have labels."""


def labels_of(guest: GuestLayout, dsm: str = "aml") -> list[int]:
    return [placement.label_base for placement in layout.place_labels(replace(guest, dsm=dsm)).nvdimms]


@pytest.mark.parametrize("dsm", ["none", "qemu", "aml"])
def test_nvdimms_with_labels_may_touch(dsm: str) -> None:
    guest = place(GIB, TOUCHING, address_bits=40)
    assert bases(guest) == [0x100000000, 0x11FE00000]
    assert layout.place_labels(replace(guest, dsm=dsm)).nvdimms[1] == guest.nvdimms[1]


def test_a_label_area_goes_elsewhere_when_its_own_place_is_taken() -> None:
    guest = place(GIB, TOUCHING, address_bits=40)
    second = guest.nvdimms[1]
    assert labels_of(guest) == [second.end, second.label_base]
    assert second.end + LABEL <= second.label_base
    odd = [replace(TOUCHING[0], label_size=LABEL + KIB, label_gap=2 * MIB - LABEL - KIB), TOUCHING[1]]
    moved = layout.place_labels(replace(place(GIB, odd, address_bits=40), dsm="aml"))
    assert moved.nvdimms[0].label_base == second.end + 3 * KIB
    assert layout.label_frames(moved)[0] == (second.end // PAGE, LABEL // PAGE + 1)


def test_the_pages_of_a_moved_label_area_are_those_of_the_backing() -> None:
    first, second = layout.place_labels(replace(place(GIB, TOUCHING, address_bits=40), dsm="aml")).nvdimms
    data, label = layout.mappings(first, [Extent(0, 5 * GIB, 512 * MIB)], labels=True)
    assert data == (first.base // PAGE, 5 * GIB // PAGE, 510 * MIB // PAGE)
    assert label == (second.end // PAGE, (5 * GIB + 512 * MIB - LABEL) // PAGE, LABEL // PAGE)


def test_a_label_area_has_a_place_at_the_end_of_the_address_space() -> None:
    last = request(0, 14 * MIB, label_size=LABEL, base=(1 << 40) - 14 * MIB)
    guest = place(GIB, [last], address_bits=40)
    assert labels_of(guest) == [5 * GIB]
    with pytest.raises(LayoutError, match="beyond the guest's physical address space"):
        place(GIB, [replace(last, base=(1 << 40) - 12 * MIB)], address_bits=40)


def test_a_label_area_without_a_place_is_refused() -> None:
    guest = place(GIB, [request(0, 60 * GIB, label_size=LABEL, base=4 * GIB)], address_bits=36)
    labels_of(guest, "qemu")
    with pytest.raises(LayoutError, match=r"the label area of the NVDIMM in slot 0 .* has no place") as caught:
        labels_of(guest)
    assert "dsm='qemu'" in caught.value.hint


def test_the_pages_of_a_label_area_are_mapped_where_they_are_in_the_backing() -> None:
    """The area has 130 KiB and begins in the middle of a page; the guest does not get the page before."""
    visible, label = 2 * MIB - 136 * KIB, 130 * KIB
    nvdimm = Placement(0, 68 * GIB, visible, label, label_gap=2 * MIB - visible - label)
    extents = (Extent(0, 5 * GIB, MIB), Extent(MIB, 7 * GIB, MIB))
    frame, page = 68 * GIB // PAGE, 2 * MIB // PAGE
    first, second = layout.mappings(nvdimm, extents)
    assert layout.mappings(nvdimm, extents, labels=True) == (
        first,
        second,
        (frame + page - 33, (8 * GIB - GIB + MIB) // PAGE - 33, 33),
    )
    assert second.gfn + second.frames == frame + page - 34
    whole = replace(nvdimm, size=2 * MIB - 128 * KIB, label_size=128 * KIB, label_gap=0)
    assert sum(mapping.frames for mapping in layout.mappings(whole, extents, labels=True)) == page
    assert len(layout.mappings(whole, extents, labels=True)) == 2
    with pytest.raises(LayoutError, match="end at offset 0x100000, and 0x200000 bytes are needed"):
        layout.mappings(nvdimm, extents[:1], labels=True)


@pytest.mark.parametrize(
    ("alignsize", "base"),
    [(None, 68 * GIB), (64 * KIB, 68 * GIB), (2 * MIB, 68 * GIB), (16 * GIB, 80 * GIB)],
)
def test_base_is_aligned(alignsize: int | None, base: int) -> None:
    assert bases(place(GIB, [request(0, alignsize or PAGE, alignsize=alignsize)], address_bits=40)) == [base]


def test_the_gap_shrinks_while_the_nvdimms_do_not_fit() -> None:
    assert bases(place(GIB, [request()], address_bits=36)) == [36 * GIB]
    assert bases(place(GIB, [request(0, 50 * GIB)], address_bits=36)) == [12 * GIB]
    assert bases(place(GIB, [request(0, 59 * GIB)], address_bits=36)) == [5 * GIB]
    assert bases(place(GIB, [request(0, 59 * GIB)], address_bits=36, gap=PAGE)) == [5 * GIB]


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(LayoutError) as caught:
        place(GIB, [request(0, 30 * GIB), request(1, 30 * GIB)], address_bits=36)
    for number in ("2 NVDIMMs, 60 GiB", f"{4 * GIB:#x}", f"{64 * GIB:#x}", "of only 1 GiB"):
        assert number in caught.value.message
    assert caught.value.hint


def test_the_address_space_ends_at_48_bits() -> None:
    assert place(GIB, [], address_bits=52).limit == 1 << 48
    with pytest.raises(LayoutError, match="do not fit"):
        place(GIB, [request(0, 1 << 48)], address_bits=52)


def test_the_users_bases_are_honoured_and_the_others_go_around_them() -> None:
    requests = [request(0), request(1, base=68 * GIB + MIB), request(2), request(3, base=5 * GIB)]
    assert bases(place(GIB, requests, address_bits=40)) == [70 * GIB, 68 * GIB + MIB, 71 * GIB, 5 * GIB]


@pytest.mark.parametrize(("bits", "first", "step"), [(39, 68, GIB), (38, 68, 128 * MIB), (36, 36, 4 * MIB)])
def test_bases_are_multiples_of_1_gib_or_128_mib_where_there_is_room(bits: int, first: int, step: int) -> None:
    small = [request(slot, 4 * MIB) for slot in range(256)]
    assert bases(place(GIB, small, address_bits=bits)) == [first * GIB + slot * step for slot in range(256)]


def test_the_hypertransport_range_stays_free() -> None:
    assert bases(place(GIB, [request(0, 1024 * GIB)], address_bits=46)) == [1024 * GIB]
    assert bases(place(GIB, [request(0, 944 * GIB), request(1)], address_bits=46)) == [68 * GIB, 1024 * GIB]
    assert bases(place(GIB, [request(0, 945 * GIB)], address_bits=40)) == [36 * GIB]  # with a smaller gap
    with pytest.raises(LayoutError, match="outside of 0xfd00000000 - 0xffffffffff, which AMD reserves"):
        place(GIB, [request(0, 1008 * GIB)], address_bits=40)


def test_the_end_of_a_large_address_space_stays_free_too() -> None:
    assert bases(place(GIB, [request(0, 15 * 1024 * GIB - 12 * GIB, kept=GIB)], address_bits=44)) == [1024 * GIB]
    with pytest.raises(LayoutError, match="and 0xffd00000000 - 0xfffffffffff, which AMD reserves"):
        place(GIB, [request(0, 15 * 1024 * GIB - 11 * GIB)], address_bits=44)


def test_the_user_may_give_a_base_in_the_hypertransport_range() -> None:
    guest = place(GIB, [request(0, base=1015 * GIB), request(1, base=1024 * GIB)], address_bits=46)
    assert bases(guest) == [1015 * GIB, 1024 * GIB]
    (line,) = layout.advice(guest)
    assert "slot 0" in line
    assert "HyperTransport" in line


def test_labels_right_behind_the_data_may_be_in_the_hypertransport_range() -> None:
    end = 1012 * GIB
    space = place(GIB, [request(0, 64 * MIB, label_size=2 * MIB, base=end - 64 * MIB)], address_bits=46)
    assert list(layout.advice(space)) == []
    (line,) = layout.advice(layout.place_labels(replace(space, dsm="aml")))
    assert line.startswith("the label area of the NVDIMM in slot 0")
    assert "HyperTransport" in line


def test_advice_says_how_much_room_hvmloader_has() -> None:
    assert [*layout.advice(place(4 * GIB, [request(base=5 * GIB + 256 * MIB)], address_bits=40))] == []
    (line,) = layout.advice(place(GIB, [request(base=4 * GIB)], address_bits=40))
    assert line.startswith("0 B are free between the RAM and the NVDIMMs")
    (line,) = layout.advice(place(4 * GIB, [request()], address_bits=40), pci_devices=1)
    assert line.startswith("64.75 GiB are free")
    assert "from 0x110000000 on" in line


def test_advice_says_that_linux_needs_2_mib() -> None:
    (line,) = layout.advice(place(GIB, [request(kept=68 * GIB + PAGE), request(1)], address_bits=40))
    assert "slot 0" in line
    assert "not at a multiple of 2 MiB" in line
    assert line.endswith("with <alignsize unit='MiB'>2</alignsize>, and no base in the XML, it is")


# --- bases of earlier defines ---


def test_a_base_of_an_earlier_define_stays_whatever_rule_chose_it() -> None:
    kept = [
        request(0, 64 * MIB, kept=68 * GIB + 2 * MIB),
        request(1, 64 * MIB, kept=68 * GIB + 66 * MIB),
        request(2, 1024 * GIB, kept=69 * GIB),  # across the HyperTransport range
    ]
    assert bases(place(GIB, kept, address_bits=46)) == [item.kept for item in kept]
    more = [*kept, request(3, 64 * MIB)]
    assert bases(place(GIB, more, address_bits=46)) == [*(item.kept for item in kept), 1093 * GIB]


def test_a_base_moves_when_the_ram_comes_nearer_than_1_gib_and_is_the_same_modulo_1_gib() -> None:
    kept = [request(0, 64 * MIB, kept=68 * GIB + 6 * MIB), request(1, 64 * MIB, kept=70 * GIB + 256 * MIB)]
    assert bases(place(66 * GIB, kept, address_bits=46)) == [68 * GIB + 6 * MIB, 70 * GIB + 256 * MIB]
    assert bases(place(68 * GIB, kept, address_bits=46)) == [133 * GIB + 6 * MIB, 70 * GIB + 256 * MIB]
    assert bases(place(200 * GIB, kept, address_bits=46)) == [265 * GIB + 6 * MIB, 265 * GIB + 256 * MIB]
    assert bases(place(GIB, [request(0, base=68 * GIB + 6 * MIB), request(1, kept=68 * GIB)], address_bits=46)) == [
        68 * GIB + 6 * MIB,
        70 * GIB,
    ]
    assert bases(place(GIB, [request(0, 2 * MIB, kept=68 * GIB + MIB, alignsize=2 * MIB)], address_bits=46)) == [
        68 * GIB
    ]


def test_bases_move_only_if_all_fit_then() -> None:
    kept = [request(0, 20 * GIB, kept=12 * GIB), request(1, 20 * GIB, kept=32 * GIB)]
    assert bases(place(16 * GIB, kept, address_bits=36)) == [21 * GIB, 41 * GIB]
    with pytest.raises(LayoutError, match="do not fit"):
        place(24 * GIB, kept, address_bits=36)
    with pytest.raises(LayoutError, match="overlaps the guest's RAM"):
        place(16 * GIB, [replace(kept[0], base=12 * GIB), kept[1]], address_bits=36)


def test_a_gap_that_the_operator_has_set_to_0_holds_for_earlier_bases_too() -> None:
    assert bases(place(GIB, [request(kept=4 * GIB)], address_bits=46, gap=0)) == [4 * GIB]
    assert bases(place(GIB, [request(kept=4 * GIB)], address_bits=46)) == [68 * GIB]


def test_an_nvdimm_may_begin_where_another_ends() -> None:
    assert bases(place(GIB, [request(0), request(1, base=68 * GIB), request(2)], address_bits=40)) == [
        69 * GIB,
        68 * GIB,
        70 * GIB,
    ]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([request(base=4 * GIB)], "overlaps the guest's RAM"),  # 4 GiB of RAM end at 4.25 GiB
        ([request(base=0)], "overlaps the guest's RAM"),
        ([request(base=0xF0000000)], "or its PCI hole"),
        ([request(base=5 * GIB + 1)], "not a multiple of 4 KiB"),
        ([request(base=5 * GIB + MIB, alignsize=2 * MIB)], "starts at 0x140100000, which is not a multiple of 2 MiB"),
        ([request(size=3 * MIB, base=5 * GIB, alignsize=2 * MIB)], "ends at"),
        ([request(size=3 * MIB, alignsize=2 * MIB)], "ends at"),
        (
            [request(base=(1 << 40) - MIB)],
            "ends beyond the guest's physical address space, which ends at 0x10000000000",
        ),
        ([request(0, base=5 * GIB), request(1, base=6 * GIB - PAGE)], "overlap from 0x17ffff000 on"),
        ([request(0, base=5 * GIB), request(1, base=5 * GIB)], "overlap"),
        ([request(0), request(0, base=5 * GIB)], "slots 0, 0, its layout"),
        ([request(0), request(0)], "slots 0, 0, its layout"),
        ([request(size=0)], "the guest would see nothing"),
        ([request(size=0, base=5 * GIB)], "the guest would see nothing"),
        ([request(size=PAGE + 1)], "ends at"),
    ],
)
def test_impossible_requests_are_refused(requests: list[PlacementRequest], message: str) -> None:
    with pytest.raises(LayoutError, match=message) as caught:
        place(4 * GIB, requests, address_bits=40)
    assert caught.value.hint


def test_a_remembered_layout_is_checked_against_the_guest_as_it_is_now() -> None:
    requests = [request(0), request(1, label_size=128 * KIB)]
    guest = place(GIB, requests, address_bits=40)
    layout.check(guest, requests, address_bits=40)
    with pytest.raises(LayoutError, match="overlaps the guest's RAM of 100 GiB"):
        layout.check(replace(guest, ram=100 * GIB), requests, address_bits=40)
    with pytest.raises(LayoutError, match="ends beyond"):
        layout.check(guest, requests, address_bits=36)
    with pytest.raises(LayoutError, match="in slots 0, its layout has them in slots 0, 1 "):
        layout.check(guest, requests[:1], address_bits=40)
    for other in (
        replace(requests[0], size=2 * GIB),
        replace(requests[0], label_size=128 * KIB),
        replace(requests[0], node=0),
        replace(requests[0], base=GIB),
    ):
        with pytest.raises(LayoutError, match="is not what is asked for now"):
            layout.check(guest, [other, requests[1]], address_bits=40)


NV = Placement(slot=0, base=0x1000000000, size=16 * PAGE)


def test_mappings_cover_the_visible_bytes_and_merge_neighbours() -> None:
    extents = [Extent(0, 0x140000000, 4 * PAGE), Extent(4 * PAGE, 0x140004000, PAGE), Extent(5 * PAGE, 0, 99 * PAGE)]
    assert layout.mappings(NV, extents) == ((0x1000000, 0x140000, 5), (0x1000005, 0, 11))


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [Extent(PAGE, 0, 16 * PAGE)],
        [Extent(0, 0, 4 * PAGE), Extent(5 * PAGE, 0, 11 * PAGE)],
        [Extent(0, 0, 4 * PAGE), Extent(3 * PAGE, 0, 13 * PAGE)],
        [Extent(0, 0, 8 * PAGE + 512), Extent(8 * PAGE + 512, 0, 8 * PAGE)],
        [Extent(0, 512, 16 * PAGE)],
        [Extent(0, 0, 0), Extent(0, 0, 16 * PAGE)],
        [Extent(0, 0, 15 * PAGE)],
    ],
)
def test_extents_that_do_not_cover_are_refused(extents: list[Extent]) -> None:
    with pytest.raises(LayoutError, match="slot 0") as caught:
        layout.mappings(NV, extents)
    assert caught.value.hint


# --- properties ---


@st.composite
def requests_of(draw: st.DrawFn, *, fixed: bool) -> list[PlacementRequest]:
    requests = []
    for slot in draw(st.lists(st.integers(0, 255), max_size=6, unique=True)):
        alignsize = draw(st.sampled_from([None, PAGE, 64 * KIB, 2 * MIB, 16 * MIB, GIB]))
        align = alignsize or PAGE
        requests.append(
            request(
                slot,
                draw(st.integers(1, 64 * GIB // align)) * align,
                alignsize=alignsize,
                base=draw(st.integers(0, (1 << 40) // align)) * align if fixed and draw(st.booleans()) else None,
                kept=draw(st.none() | st.integers(0, 1 << 28).map(lambda page: page * PAGE)) if fixed else None,
                **draw(st.sampled_from([{}, {"label_size": 128 * KIB}, {"label_size": 130 * KIB, "label_gap": MIB}])),
            )
        )
    return requests


@given(
    st.integers(1, 256 * GIB // PAGE), requests_of(fixed=True), st.integers(38, 52), st.sampled_from([0, GIB, 64 * GIB])
)
def test_a_layout_is_refused_or_right(ram: int, requests: list[PlacementRequest], bits: int, gap: int) -> None:
    try:
        guest = place(ram * PAGE, requests, address_bits=bits, gap=gap)
    except LayoutError:
        return
    wanted = {item.slot: item for item in requests}
    assert [placement.slot for placement in guest.nvdimms] == sorted(wanted)
    for placement in guest.nvdimms:
        item = wanted[placement.slot]
        assert max(4 * GIB, 4 * GIB + ram * PAGE - 0xF0000000) <= placement.base
        assert placement.end <= 1 << min(bits, 48)
        assert placement.size == item.size
        assert placement.base % (item.alignsize or PAGE) == 0
        if item.base is not None:
            assert placement.base == item.base
        elif item.kept is not None:
            assert placement.base == item.kept or placement.base % SUPERPAGE in (item.kept % SUPERPAGE, 0)
        else:
            assert placement.base % SUPERPAGE == 0
    for left, right in pairwise(sorted(guest.nvdimms, key=lambda placement: placement.base)):
        assert left.end <= right.base
    try:
        labelled = layout.place_labels(replace(guest, dsm="aml"))
    except LayoutError:
        return
    used = [(each.base, each.end) for each in labelled.nvdimms] + [each.label_pages for each in labelled.label_areas]
    for before, after in pairwise(sorted(used)):
        assert before[1] <= after[0]
        assert after[1] <= guest.limit
    for each in labelled.label_areas:
        assert (each.label_base - each.end - each.label_gap) % PAGE == 0


@given(st.integers(1, 256 * GIB // PAGE), requests_of(fixed=False))
def test_what_fits_is_placed_the_same_each_time_and_stays(ram: int, requests: list[PlacementRequest]) -> None:
    guest = place(ram * PAGE, requests, address_bits=46)
    assert place(ram * PAGE, requests[::-1], address_bits=46) == guest
    remembered = [
        replace(item, base=base)
        for item, base in zip(sorted(requests, key=lambda r: r.slot), bases(guest), strict=True)
    ]
    assert place(ram * PAGE, remembered, address_bits=46, gap=0) == guest
    layout.check(guest, requests, address_bits=46)


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 2000)), min_size=1, max_size=20), st.data())
def test_mappings_are_exactly_the_visible_frames(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    extents: list[Extent] = []
    frames_of_file: list[int] = []
    for mfn, count in runs:
        extents.append(Extent(len(frames_of_file) * PAGE, mfn * PAGE, count * PAGE))
        frames_of_file += range(mfn, mfn + count)
    visible = data.draw(st.integers(1, len(frames_of_file)))
    mapped = layout.mappings(Placement(0, 0x1000000000, visible * PAGE), extents)
    assert [gfn + i for gfn, _, count in mapped for i in range(count)] == list(range(0x1000000, 0x1000000 + visible))
    assert [mfn + i for _, mfn, count in mapped for i in range(count)] == frames_of_file[:visible]


@given(st.integers(1, 1 << 21), st.integers(SUPERPAGE // PAGE * 2, 1 << 20))
def test_a_contiguous_backing_at_a_multiple_of_2_mib_is_mapped_in_superpages(number: int, count: int) -> None:
    guest = place(GIB, [request(0, count * PAGE)], address_bits=46)
    mapped = layout.mappings(guest.nvdimms[0], [Extent(0, number * SUPERPAGE, count * PAGE)])
    superpages, pages, _ = p2m.cost(mapped)
    assert superpages == count // 512
    assert pages == count % 512
