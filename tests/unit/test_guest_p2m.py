# SPDX-License-Identifier: Apache-2.0
"""Counts of p2m entries and hypercalls, against Xen's loop copied here (Xen 4.17, xen/arch/x86/mm/p2m.c)."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvdimm_driver.guest import p2m

frame = st.integers(0, 1500)
count = st.integers(1, 1100) | st.integers(1, 70_000)
congruent = st.tuples(frame, frame, count).map(lambda m: (m[0], m[0] % 512 + m[1] // 512 * 512, m[2]))
mapping = st.tuples(frame, frame, count) | congruent


def map_mmio_regions(gfn: int, mfn: int, nr: int) -> list[int]:
    """Return the sizes of the entries that one hypercall makes. Its first condition is mmio_order() with HAP, 2 MiB."""
    made: list[int] = []
    done = 0
    while done < nr and len(made) < 64:
        superpage = not (((gfn + done) | (mfn + done)) & 511) and nr - done >= 512
        made.append(512 if superpage else 1)
        done += made[-1]
    return made


def hypercalls(gfn: int, mfn: int, count: int) -> list[list[int]]:
    """Return the entries that each hypercall for a whole mapping makes, as libxc loops over it."""
    calls: list[list[int]] = []
    done = 0
    while done < count:
        calls.append(map_mmio_regions(gfn + done, mfn + done, count - done))
        done += sum(calls[-1])
    return calls


@settings(deadline=None)
@given(mapping)
@example((0, 0, 64 * 512))
@example((0, 0, 64 * 512 + 1))
@example((511, 511, 512))
@example((512, 0, 511))
@example((1, 1, 511))
@example((1, 1, 510))
@example((1, 1, 1023))
def test_entries_count_what_xen_makes(mapping: tuple[int, int, int]) -> None:
    made = [entry for call in hypercalls(*mapping) for entry in call]
    front, superpages, behind = p2m.entries(*mapping)
    assert made == [1] * front + [512] * superpages + [1] * behind


@settings(deadline=None)
@given(st.lists(mapping, max_size=3))
def test_cost_adds_up(mappings: list[tuple[int, int, int]]) -> None:
    calls = [call for mapping in mappings for call in hypercalls(*mapping)]
    made = [entry for call in calls for entry in call]
    assert p2m.cost(mappings) == (made.count(512), made.count(1), len(calls))


def test_a_tebibyte_costs_what_the_design_says() -> None:
    tebibyte = 1 << 28
    assert p2m.cost([(0x140000, 0x140000, tebibyte)]) == (524_288, 0, 8_192)
    assert p2m.cost([(0x140000, 0x140001, tebibyte)]) == (0, tebibyte, 4_194_304)
