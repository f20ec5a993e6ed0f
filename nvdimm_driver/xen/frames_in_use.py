# SPDX-License-Identifier: Apache-2.0
"""The machine frames that guests have, as their device models have written them to xenstore.

Xen does not say which frames a guest was given. So each device model writes those of its guest below ``/libxl/DOMID``:
only dom0 may read and write there, and libxl deletes it together with the domain. Unlike the ledger, no copy or backup
of it can be older than the guests that run.
"""

from __future__ import annotations

from nvdimm_driver.errors import XenError
from nvdimm_driver.xen.xenstore import Xenstore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DOMAINS = "/libxl"
"""Folder with a folder for each domain (tools/libs/light/libxl_internal.c:libxl__xs_libxl_path)."""
NODE_RANGES = 64
"""Ranges of frames in one value: 64 of 27 bytes at most. xenstored takes 2048 bytes in a value by default."""


def announce(xenstore: Xenstore, domid: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Write the machine frames of a domain, in place of those written for it before.

    :param ranges: (mfn, count).
    """
    folder, joined = _folder(domid), _joined(ranges)
    values = [joined[at : at + NODE_RANGES] for at in range(0, len(joined), NODE_RANGES)]
    for number, value in enumerate(values):
        xenstore.write(f"{folder}/{number}", " ".join(f"{mfn:#x}+{count:#x}" for mfn, count in value))
    for name in xenstore.names(folder):
        if name not in map(str, range(len(values))):
            xenstore.write(f"{folder}/{name}", "")


def domids(xenstore: Xenstore) -> list[int]:
    """Return the domains that libxl has in xenstore, some of which may be gone."""
    return sorted(int(name) for name in xenstore.names(DOMAINS) if name.isdecimal())


def read(xenstore: Xenstore, domid: int) -> list[tuple[int, int]]:
    """Return the machine frames that were written for a domain, as (mfn, count).

    :raises XenError: when they cannot be read, or somebody else has written something else there.
    """
    folder = _folder(domid)
    return [
        _range(f"{folder}/{name}", word) for name in xenstore.names(folder) for word in _words(xenstore, folder, name)
    ]


def _words(xenstore: Xenstore, folder: str, name: str) -> list[str]:
    return (xenstore.read(f"{folder}/{name}") or "").split()


def _range(path: str, word: str) -> tuple[int, int]:
    first, plus, count = word.partition("+")
    try:
        if not plus:
            raise ValueError
        return int(first, 16), int(count, 16)
    except ValueError as error:
        raise XenError(
            f"{path}: {word!r} is no range of machine frames",
            hint="only nvdimm-device-model writes there: find out what else did, and destroy that domain",
        ) from error


def _joined(ranges: Iterable[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Return ranges in order, with neighbours joined."""
    found: list[tuple[int, int]] = []
    for mfn, count in sorted(ranges):
        if found and sum(found[-1]) == mfn:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((mfn, count))
    return found


def _folder(domid: int) -> str:
    return f"{DOMAINS}/{domid}/nvdimm-driver"
