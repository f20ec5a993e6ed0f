# SPDX-License-Identifier: Apache-2.0
"""Rounding, and conversion of sizes to and from text for people. In the code, a size is an int of bytes.

Imports nothing heavy: the device model, which has to start fast, uses it.
"""

from __future__ import annotations

from itertools import takewhile

from nvdimm_driver.errors import ConfigError

_POWERS = "KMGTP"
_DIGITS = frozenset("0123456789")
_HEX_DIGITS = _DIGITS | frozenset("abcdefABCDEF")


def align_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not less than `value`."""
    return -(-value // multiple) * multiple


def units(value: int, unit: int) -> int:
    """Return how many units of that size hold `value`, rounded up: a page and one byte need two pages."""
    return -(-value // unit)


def whole_units(start: int, size: int, unit: int) -> tuple[int, int]:
    """Return the units that are wholly in a range, as (number of the first one, count)."""
    first = units(start, unit)
    return first, max(0, (start + size) // unit - first)


def parse(text: str) -> int:
    """Parse ``4096``, ``64GiB`` or, as ndctl takes them, ``64G``, ``64g`` and ``0x1000``, into bytes.

    All units are powers of 1024.

    :raises ConfigError: when the text is none of these.
    """
    stripped = text.strip()
    base, digits = (16, _HEX_DIGITS) if stripped[:2] in ("0x", "0X") else (10, _DIGITS)
    number = "".join(takewhile(digits.__contains__, stripped[2 if base == 16 else 0 :]))
    unit = stripped[len(number) + (2 if base == 16 else 0) :].lstrip()
    power = _power(unit)
    if not number or power is None:
        raise ConfigError(f"{text!r} is not a size", hint="write 64GiB, 512M, or a number of bytes")
    return int(number, base) << 10 * power


def human(count: int) -> str:
    """Format bytes in a binary unit: exactly where that is short (``1536 MiB``), else with two decimals."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 5)
    for exact in range(power, 0, -1):
        if count % (1 << 10 * exact) == 0 and count >> 10 * exact < 10240:
            power = exact
            break
    whole, rest = divmod(count, 1 << 10 * power)
    unit = _POWERS[power - 1] + "iB"
    return f"{whole} {unit}" if not rest else f"{count / (1 << 10 * power):.2f} {unit}"


def _power(unit: str) -> int | None:
    """Return the power of 1024 that a unit stands for; None when it is not a unit."""
    if unit in ("", "B"):
        return 0
    letter = unit.upper() if len(unit) == 1 else unit[0]
    return _POWERS.index(letter) + 1 if letter in _POWERS and unit[1:] in ("", "iB") else None
