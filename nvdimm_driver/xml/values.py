# SPDX-License-Identifier: Apache-2.0
"""Numbers, sizes and units in domain XML, read as libvirt reads them. Pure."""

from __future__ import annotations

from nvdimm_driver.errors import DomainXmlError
from nvdimm_driver.model import KIB
from nvdimm_driver.sizes import align_up, human
from nvdimm_driver.xml.document import Element

MAX_SCALED = (1 << 63) - 1
"""The largest size that libvirt takes, in bytes."""

_UNITS: dict[str, int] = {"": KIB, "b": 1, "byte": 1, "bytes": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgtpe", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
"""src/util/virutil.c:virScaleInteger, ignoring case; KiB is the default."""


def scaled(element: Element, what: str) -> int:
    """Return the size that an element has, as :func:`scale` does."""
    return scale(element.text, element.attributes.get("unit", ""), what)


def scale(number: str, unit: str, what: str) -> int:
    """Return the bytes of a size with a unit, rounded up to whole KiB as libvirt does (virDomainParseMemory).

    :param what: name of the size in messages.
    :raises DomainXmlError: when number or unit is invalid, or libvirt would not take the size.
    """
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise DomainXmlError(
            f"the unit of {what} is {unit!r}", hint="units are bytes, KB, KiB, MB, MiB, GB, GiB and so on"
        )
    size = align_up(integer(number, what) * factor, KIB)
    if size > MAX_SCALED:
        raise DomainXmlError(
            f"{what} is {number.strip()} {unit}", hint=f"libvirt takes less than {human(MAX_SCALED + 1)}"
        )
    return size


def integer(text: str, what: str, *, base: int = 10, limit: int = MAX_SCALED) -> int:
    """Return a number from 0 to `limit`.

    :param what: name of the number in messages.
    :raises DomainXmlError: when the text is no such number.
    """
    digits = text.strip().lower()
    if base == 16:
        digits = digits.removeprefix("0x")
    # check the length first: Python is slow to read long numbers
    valid = 0 < len(digits) <= 20 and set(digits) <= set("0123456789abcdef"[:base])
    if not valid or int(digits, base) > limit:
        raise DomainXmlError(
            f"{what} is {text[:40]!r}",
            hint=f"it is a {'hexa' if base == 16 else ''}decimal number from 0 to {limit}",
        )
    return int(digits, base)
