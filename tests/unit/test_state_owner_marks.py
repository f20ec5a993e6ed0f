# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.errors import LedgerError
from nvdimm_driver.model import GIB, MIB, Allocation, NvdimmSpec, Record
from nvdimm_driver.state import owner_marks
from nvdimm_driver.state.owner_marks import Mark
from tests.unit.doubles import UUID


@given(
    slot=st.integers(0, 255),
    label_size=st.sampled_from([0, 128 << 10]),
    alignsize=st.none() | st.just(2 * MIB),
    base=st.none() | st.integers(0, 1 << 46),
    pmem=st.booleans(),
    name=st.text(min_size=1),
    dsm=st.sampled_from([None, "aml", "qemu"]),
    cache=st.sampled_from([None, "auto", "uncached"]),
    changed=st.integers(0, 1 << 62),
)
def test_a_mark_is_read_as_it_was_written(
    slot: int,
    label_size: int,
    alignsize: int | None,
    base: int | None,
    pmem: bool,
    name: str,
    dsm: str | None,
    cache: str | None,
    changed: int,
) -> None:
    spec = NvdimmSpec(slot, "/mnt/pmem0/a.img", 64 * MIB, label_size, alignsize, node=0, pmem=pmem)
    record = Record(UUID, name, GIB, dsm, "", (), None, cache=cache)
    item = Allocation(UUID, spec, base=base, changed=changed)
    mark = owner_marks.unpack("/mnt/pmem0/a.img", owner_marks.pack(record, item))
    assert mark == Mark(UUID, name, GIB, dsm, spec, base, changed=changed, cache=cache)


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"{}", b"[]", b"null", json.dumps({"version": 2}).encode(), b"[" * 9999]
)
def test_what_is_no_mark(text: bytes) -> None:
    with pytest.raises(LedgerError, match=r"/a: its mark cannot be read"):
        owner_marks.unpack("/a", text)
