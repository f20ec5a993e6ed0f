# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nvdimm_driver.errors import GuardError
from nvdimm_driver.guest import mapping_guards

Mapping = tuple[int, int, int]
Range = tuple[int, int]

START, LIMIT = 0x100, 0x200
AREAS = [(0x1000, 0x100), (0x1100, 0x100)]
RAM = [(0, 0x800), (0x900, 0x100)]


def check(mappings: list[Mapping], *, ram: list[Range] = RAM, taken: list[tuple[str, int, int]] | None = None) -> None:
    mapping_guards.check_mappings(
        mappings, areas=AREAS, ram=ram, taken=taken or [], guest_start_gfn=START, guest_limit_gfn=LIMIT
    )


@pytest.mark.parametrize(
    "mappings",
    [
        [],
        [(START, 0x1000, 1)],
        [(START, 0x1000, 0x100)],
        [(LIMIT - 1, 0x11FF, 1)],
        [(START + 8, 0x1000, 8), (START, 0x1008, 8)],
    ],
)
def test_allowed(mappings: list[Mapping]) -> None:
    check(mappings)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ((START, 0x1000, 0), "not a range of machine frames"),
        ((START, 0x1000, -1), "not a range of machine frames"),
        ((START, -1, 1), "not a range of machine frames"),
        ((START, (1 << 40) - 1, 2), "not a range of machine frames below 0x10000000000"),
        ((START, 1 << 64, 1), "not a range of machine frames"),
        ((START - 1, 0x1000, 1), "outside the guest's frames for NVDIMMs, 0x100 to 0x1ff"),
        ((-1, 0x1000, 1), "outside the guest's frames"),
        ((LIMIT - 1, 0x1000, 2), "outside the guest's frames"),
        ((LIMIT, 0x1000, 1), "outside the guest's frames"),
        ((START, 0x900, 1), "machine frames 0x900 to 0x900 at guest frame 0x100: overlaps RAM .*, 0x900 to 0x9ff"),
        ((START, 0x7FF, 1), "overlaps RAM of the machine, 0x0 to 0x7ff"),
        ((START, 0xFFF, 2), "not inside one area of persistent memory"),
        ((START, 0x11FF, 2), "not inside one area"),
        ((START, 0x10FF, 2), "not inside one area"),
        ((START, 0x2000, 1), "not inside one area"),
    ],
)
def test_refused(mapping: Mapping, message: str) -> None:
    with pytest.raises(GuardError, match=message):
        check([(START + 0x20, 0x1020, 1), mapping])


def test_ram_inside_an_area_is_still_ram() -> None:
    with pytest.raises(GuardError, match="overlaps RAM"):
        check([(START, 0x1000, 0x20)], ram=[*RAM, (0x1010, 1)])


def test_ranges_of_the_machine_may_overlap() -> None:
    check([(START, 0x1040, 1)], ram=[(0x1000, 0x20), (0x1010, 0x30)])
    with pytest.raises(GuardError, match="overlaps RAM of the machine, 0x1000 to 0x107f"):
        check([(START, 0x1040, 1)], ram=[(0x1000, 0x80), (0x1010, 1)])
    mapping_guards.check_mappings(
        [(START, 0x1040, 1)],
        areas=[(0x1000, 0x80), (0x1010, 1)],
        ram=[],
        taken=[],
        guest_start_gfn=START,
        guest_limit_gfn=LIMIT,
    )


def test_what_another_domain_has() -> None:
    taken = [("db1", 0x1000, 0x10), ("db2", 0x1020, 0x10)]
    check([(START, 0x1010, 0x10)], taken=taken)
    with pytest.raises(GuardError, match="overlaps 0x1020 to 0x102f, in use by the running domain db2"):
        check([(START, 0x1010, 0x11)], taken=taken)


@pytest.mark.parametrize(("two", "side"), [((START + 1, 0x1080, 2), "guest"), ((START + 0x10, 0x1001, 2), "machine")])
def test_overlap_within_a_plan(two: Mapping, side: str) -> None:
    for mappings in ([(START, 0x1000, 2), two], [two, (START, 0x1000, 2)]):
        with pytest.raises(GuardError, match=f"overlap on the {side} side"):
            check(mappings)


@pytest.mark.parametrize("bad", [(-1, 4), (4, -1)])
def test_nonsense_about_the_machine_is_refused(bad: Range) -> None:
    with pytest.raises(GuardError, match=r"RAM: -?\d frames from -?\d on are no range"):
        check([], ram=[bad])


frames = st.integers(0, 40)
ranges = st.lists(st.tuples(frames, st.integers(0, 12)), max_size=4)
area_lists = st.one_of(st.just([(0, 60)]), ranges)  # one area for everything exposes the other faults
mapping_lists = st.one_of(
    st.lists(st.tuples(st.integers(10, 40), frames, st.integers(1, 5)), max_size=3),
    st.lists(st.tuples(st.integers(-2, 40), st.integers(-2, 40), st.integers(-1, 12)), max_size=4),
)
taken_lists = st.lists(st.tuples(st.just("other"), frames, st.integers(0, 6)), max_size=3)


def spread(mfn: int, count: int) -> set[int]:
    return set(range(mfn, mfn + count))


def is_safe(
    mappings: list[Mapping],
    areas: list[Range],
    ram: list[Range],
    taken: list[tuple[str, int, int]],
    start: int,
    limit: int,
) -> bool:
    """Apply the rule frame by frame."""
    forbidden: set[int] = set().union(*(spread(*each) for each in ram), *(spread(*each[1:]) for each in taken))
    guest: list[int] = []
    machine: list[int] = []
    for gfn, mfn, count in mappings:
        if count < 1 or mfn < 0:
            return False
        guest += spread(gfn, count)
        machine += spread(mfn, count)
        if not any(spread(mfn, count) <= spread(*area) for area in areas):
            return False
    return (
        forbidden.isdisjoint(machine)
        and len(machine) == len(set(machine))
        and len(guest) == len(set(guest))
        and all(start <= gfn < limit for gfn in guest)
    )


def passes(run: Callable[[], None]) -> bool:
    try:
        run()
    except GuardError:
        return False
    return True


@settings(max_examples=1000, deadline=None)
@given(mapping_lists, area_lists, ranges, taken_lists, st.integers(0, 10), st.integers(20, 50))
def test_what_passes_is_what_is_safe(
    mappings: list[Mapping],
    areas: list[Range],
    ram: list[Range],
    taken: list[tuple[str, int, int]],
    start: int,
    limit: int,
) -> None:
    passed = passes(
        lambda: mapping_guards.check_mappings(
            mappings, areas=areas, ram=ram, taken=taken, guest_start_gfn=start, guest_limit_gfn=limit
        )
    )
    assert passed == is_safe(mappings, areas, ram, taken, start, limit)


@st.composite
def legitimate(draw: st.DrawFn) -> tuple[list[Mapping], list[Range], list[Range], list[tuple[str, int, int]]]:
    """Draw a machine made of runs of RAM, free pmem, others' pmem and ours, with ours mapped in any order of gfns."""
    kinds = draw(st.lists(st.tuples(st.sampled_from("rfto"), st.integers(1, 1 << 20)), min_size=1, max_size=30))
    areas: list[Range] = []
    ram: list[Range] = []
    taken: list[tuple[str, int, int]] = []
    ours: list[Range] = []
    mfn = 0
    for kind, count in kinds:
        if kind == "r":
            ram.append((mfn, count))
        else:
            areas.append((mfn, count))
        if kind == "t":
            taken.append(("other", mfn, count))
        if kind == "o":
            ours.append((mfn, count))
        mfn += count
    gfn = START
    mappings = []
    for first, count in draw(st.permutations(ours)):
        mappings.append((gfn, first, count))
        gfn += count
    return draw(st.permutations(mappings)), areas, ram, taken


@given(legitimate())
def test_legitimate_plans_pass(
    plan: tuple[list[Mapping], list[Range], list[Range], list[tuple[str, int, int]]],
) -> None:
    mappings, areas, ram, taken = plan
    mapping_guards.check_mappings(
        mappings, areas=areas, ram=ram, taken=taken, guest_start_gfn=START, guest_limit_gfn=1 << 36
    )


@given(legitimate(), st.data())
def test_one_bad_frame_spoils_a_legitimate_plan(
    plan: tuple[list[Mapping], list[Range], list[Range], list[tuple[str, int, int]]], data: st.DataObject
) -> None:
    mappings, areas, ram, taken = plan
    assume(mappings)
    _, mfn, count = data.draw(st.sampled_from(mappings))
    frame = data.draw(st.integers(mfn, mfn + count - 1))
    hole = [(start, end - start) for start, end in _without(areas, frame) if end > start]
    for spoiled in (
        (hole, ram, taken),
        (areas, [*ram, (frame, 1)], taken),
        (areas, ram, [*taken, ("other", frame, 1)]),
    ):
        with pytest.raises(GuardError):
            mapping_guards.check_mappings(
                mappings,
                areas=spoiled[0],
                ram=spoiled[1],
                taken=spoiled[2],
                guest_start_gfn=START,
                guest_limit_gfn=1 << 36,
            )


def _without(areas: list[Range], frame: int) -> list[Range]:
    """Return the areas as (start, end), with the frame cut out."""
    cut = []
    for mfn, count in areas:
        if mfn <= frame < mfn + count:
            cut += [(mfn, frame), (frame + 1, mfn + count)]
        else:
            cut.append((mfn, mfn + count))
    return cut


def test_a_hundred_thousand_extents() -> None:
    count = 100_000
    mapping_guards.check_mappings(
        [(START + 2 * i, 0x10000 + 3 * (count - i), 1) for i in range(count)],
        areas=[(0x10000, 4 * count)],
        ram=[(i, 1) for i in range(0, 0x10000, 2)],
        taken=[("other", 0x10000 + 3 * i + 1, 1) for i in range(count)],
        guest_start_gfn=START,
        guest_limit_gfn=1 << 36,
    )


def test_imports_nothing_slow() -> None:
    script = "import sys; import nvdimm_driver.guest.mapping_guards; print(*sys.modules)"
    root = str(Path(mapping_guards.__file__).parents[2])
    command = [sys.executable, "-S", "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": root})
    assert "nvdimm_driver.guest.mapping_guards" in loaded.stdout
    assert {"dataclasses", "typing", "re", "json"}.isdisjoint(loaded.stdout.split())


Area = tuple[str, str, int, int]


def area(uid: str, mfn: int, count: int) -> Area:
    return uid, f"area {uid}", mfn, count


@pytest.mark.parametrize(
    "areas",
    [
        [],
        [area("a", 0x1000, 0x100), area("b", 0x1100, 0x100), area("c", 0xF00, 0x100)],
        [area("a", 0x1000, 0x100), area("a", 0x1000, 0x100)],
        [area("a", 0x1000, 0x100), area("b", 0x1080, 0)],
    ],
)
def test_areas_may_touch_and_may_be_the_same(areas: list[Area]) -> None:
    mapping_guards.check_areas(areas)


@pytest.mark.parametrize(
    ("areas", "message"),
    [
        ([area("a", 0x1000, 0x100), area("b", 0x10FF, 1)], "area a and area b both .* 0x10ff to 0x10ff"),
        (
            [area("b", 0x1000, 0x100), area("b", 0x1200, 1), area("a", 0xFFF, 2)],
            "area a and area b .* 0x1000 to 0x1000",
        ),
        ([area("a", 0, 0x1000), area("a", 8, 1), area("b", 0x20, 4)], "area a and area b .* 0x20 to 0x23"),
    ],
)
def test_two_areas_never_hand_out_the_same_frame(areas: list[Area], message: str) -> None:
    with pytest.raises(GuardError, match=message):
        mapping_guards.check_areas(areas)
    with pytest.raises(GuardError):
        mapping_guards.check_areas(areas[::-1])


@given(st.lists(st.builds(area, st.sampled_from("abc"), st.integers(0, 40), st.integers(0, 10)), max_size=8))
def test_overlapping_areas_are_found(areas: list[Area]) -> None:
    owners: dict[int, set[str]] = {}
    for uid, _, mfn, count in areas:
        for frame in range(mfn, mfn + count):
            owners.setdefault(frame, set()).add(uid)
    expected = all(len(uids) == 1 for uids in owners.values())
    assert passes(lambda: mapping_guards.check_areas(areas)) == expected
