# SPDX-License-Identifier: Apache-2.0
"""The frames of guests in xenstore."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.errors import XenError
from nvdimm_driver.xen import frames_in_use
from nvdimm_driver.xen.domctl import DomctlMapper
from tests.unit.test_xen_domctl import FakeXen, FakeXenstore

RANGES = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 40)), max_size=300)


@given(st.lists(st.integers(0, 2000), unique=True))
def test_what_was_announced_last_is_read(firsts: list[int]) -> None:
    store = FakeXenstore({})
    frames_in_use.announce(store, 7, [(3 * mfn, 2) for mfn in range(1000)])
    frames_in_use.announce(store, 7, [(mfn, 1) for mfn in firsts])
    found = [mfn + each for mfn, count in frames_in_use.read(store, 7) for each in range(count)]
    assert found == sorted(firsts)


@given(RANGES)
def test_no_value_is_longer_than_xenstored_takes(ranges: list[tuple[int, int]]) -> None:
    store = FakeXenstore({})
    frames_in_use.announce(store, 7, ranges)
    assert all(len(value) <= 2048 for value in store.entries.values())


def test_no_domain_has_announced_anything() -> None:
    assert frames_in_use.domids(FakeXenstore({})) == []
    assert frames_in_use.read(FakeXenstore({}), 7) == []


@pytest.mark.parametrize("value", ["x", "0x1", "1+", "0x1+0x2,0x3+0x4"])
def test_what_is_no_range_is_named(value: str) -> None:
    with pytest.raises(XenError, match=r"/libxl/7/nvdimm-driver/0: '.*' is no range"):
        frames_in_use.read(FakeXenstore({"/libxl/7/nvdimm-driver/0": value}), 7)


def test_a_domain_that_is_gone_has_no_frames() -> None:
    class Gone(FakeXen):
        def maximum_gfn(self, domid: int) -> int | None:
            return None if domid == 8 else 1

    mapper = DomctlMapper(Gone(), FakeXenstore({"/libxl/9/type": "pvh"}))
    for domid in (7, 8):
        mapper.announce(domid, [(1, domid, 2)])
    assert mapper.frames_of_guests() == [(7, 7, 2)]
