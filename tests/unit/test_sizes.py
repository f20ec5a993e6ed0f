# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver import sizes
from nvdimm_driver.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("128KiB", 128 << 10),
        (" 64 GiB ", 64 << 30),
        ("64G", 64 << 30),
        ("1T", 1 << 40),
        ("2PiB", 2 << 50),
        ("34m", 34 << 20),
        ("0x1000", 4096),
        ("0X1fG", 31 << 30),
    ],
)
def test_parse(text: str, count: int) -> None:
    assert sizes.parse(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1.5GiB", "64GB", "64 gib", "1 2", "٣", "0x", "34mib", "1b", "0xg", "k"]
)
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        sizes.parse(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (128 << 10, "128 KiB"),
        (1536 << 20, "1536 MiB"),
        (1 << 40, "1 TiB"),
        ((1 << 40) + 1, "1.00 TiB"),
        (1_000_000, "976.56 KiB"),
        (1022 << 20, "1022 MiB"),
    ],
)
def test_human(count: int, text: str) -> None:
    assert sizes.human(count) == text


@given(st.integers(min_value=0, max_value=1 << 60))
def test_what_is_printed_without_decimals_is_exact(count: int) -> None:
    text = sizes.human(count)
    if "." not in text:
        assert sizes.parse(text) == count
