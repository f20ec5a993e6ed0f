# SPDX-License-Identifier: Apache-2.0
"""The slot that the labels of an NVDIMM's namespaces were made for. Pure.

Each label has the interleave-set cookie of its region, a checksum of the NVDIMM's serial number and so of its slot.
Linux ignores labels with another cookie (drivers/nvdimm/namespace_devs.c:select_pmem_id).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from nvdimm_driver.acpi.tables import NVDIMM_VENDOR, serial_number
from nvdimm_driver.labels.index_block import fletcher64, used_labels
from nvdimm_driver.model import MAX_NVDIMMS

_COOKIE = struct.Struct("<Q")
_COOKIE_AT = 88
"""Offset of the interleave-set cookie in a label of either version (UEFI 2.10 §13.19.2; Linux: drivers/nvdimm/label.h).
"""


def slots_of(area: bytes) -> frozenset[int] | None:
    """Return the slots in which a guest finds the namespaces of a label area.

    :param area: the whole label area.
    :returns: None when it has no namespaces; none at all when they were made on an NVDIMM of another make.
    """
    cookies = {cookie for label in used_labels(area) for (cookie,) in [_COOKIE.unpack_from(label, _COOKIE_AT)]}
    if not cookies:
        return None
    return frozenset(slot for slot in range(MAX_NVDIMMS) if cookies & {*_cookies(slot)})


def _cookies(slot: int) -> Iterator[int]:
    """Yield the cookies of labels of version 1.1 and 1.2, as Linux does (drivers/acpi/nfit/core.c:
    acpi_nfit_init_interleave_set), for a region of one NVDIMM with the driver's, and QEMU's, control region.
    """
    serial = serial_number(slot)
    yield fletcher64(struct.pack("<QII", 0, serial, 0))
    yield fletcher64(struct.pack("<QIHHB31x", 0, serial, NVDIMM_VENDOR, 0, 0))
