"""Sizes as people write and read them. In the code, a size is an int of bytes."""

from __future__ import annotations

import re

from nvdimm_driver.errors import ConfigError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE = re.compile(r"(\d+)\s*(?:([KMGTP])(?:iB)?|B?)", re.ASCII)


def parse(text: str) -> int:
    """Bytes of ``4096``, ``64GiB`` or, as ndctl takes it, ``64G``; all units are powers of 1024.

    :raises ConfigError: when it is none of these.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"{text!r} is not a size", hint="such as 64GiB, 512M, or a number of bytes")
    number, unit = found.groups()
    return int(number) << 10 * _POWERS[unit or ""]


def human(count: int) -> str:
    """Bytes in the largest binary unit that is not larger: exact where that is short, else with two decimals."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 5)
    for exact in range(power, 0, -1):
        if count % (1 << 10 * exact) == 0 and count >> 10 * exact < 10240:
            power = exact
            break
    whole, rest = divmod(count, 1 << 10 * power)
    unit = "KMGTP"[power - 1] + "iB"
    return f"{whole} {unit}" if not rest else f"{count / (1 << 10 * power):.2f} {unit}"
