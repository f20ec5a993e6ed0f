# SPDX-License-Identifier: Apache-2.0
"""The identity of a backing: what an operator reads when it is another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nvdimm_driver.backing.identity import check_identity, describe_differences
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import GIB, MIB, BackingIdentity

BEFORE = BackingIdentity("fsdax", "ns-0", 0, 12, 7, 64 * GIB)


def test_the_same_backing_passes() -> None:
    check_identity("/p", BEFORE, replace(BEFORE))


def test_another_backing_is_refused_with_what_differs_and_what_to_do() -> None:
    with pytest.raises(BackingError) as caught:
        check_identity("/p", replace(BEFORE, inode=15), BEFORE)
    assert str(caught.value) == (
        "/p is not the backing that was provisioned: its inode is 15, it was 12 "
        "('nvdimmctl check' says where it is, and how to go on)"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "pmem"}, "its kind is pmem, it was fsdax"),
        ({"device": "ns-1"}, "its namespace is ns-1, it was ns-0"),
        ({"start": 16 * MIB}, "its offset in the namespace is 16 MiB, it was 0 B"),
        ({"generation": 8}, "its inode generation is 8, it was 7"),
        ({"size": 32 * GIB}, "its size is 32 GiB, it was 64 GiB"),
        ({"inode": 15, "generation": 8}, "its inode is 15, it was 12; its inode generation is 8, it was 7"),
    ],
)
def test_each_field_that_differs_is_named_with_both_values(changes: dict[str, Any], expected: str) -> None:
    assert describe_differences(replace(BEFORE, **changes), BEFORE) == expected


@pytest.mark.parametrize("size", [64 * GIB - 4096, 64 * GIB + 4096])
def test_sizes_that_round_to_the_same_are_in_bytes(size: int) -> None:
    told = describe_differences(replace(BEFORE, size=size), BEFORE)
    assert told == f"its size is {size} bytes, it was 68719476736 bytes"


def test_a_backing_that_was_never_provisioned() -> None:
    with pytest.raises(BackingError, match="no backing was provisioned"):
        check_identity("/p", BEFORE, None)


@pytest.mark.parametrize(
    ("other", "shares"),
    [
        (BackingIdentity("plug-in", "ns", 0, 0, 0, GIB), True),
        (BackingIdentity("plug-in", "another", 0, 0, 0, GIB), False),
        (BackingIdentity("fsdax", "ns", 0, 12, 1, MIB), True),
        (BackingIdentity("fsdax", "ns", 0, 12, 2, MIB), False),
    ],
)
def test_a_file_shares_bytes_with_itself_and_with_the_device_it_is_on(other: BackingIdentity, shares: bool) -> None:
    file = BackingIdentity("fsdax", "ns", 0, 12, 1, MIB)
    assert (file.shares_bytes(other), other.shares_bytes(file)) == (shares, shares)
