# SPDX-License-Identifier: Apache-2.0
"""The machine frames of guests whose namespace is gone: nothing new may be written there while these guests run.

Linux lets root destroy a device-dax namespace that a guest has, and make another of its memory. A file system on that
one takes the guest's frames for free blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nvdimm_driver.errors import InUseError
from nvdimm_driver.model import Namespace
from nvdimm_driver.plugins import Backing
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.start_steps import has_namespace

HINT = (
    "save what is needed from within that guest, and shut it down: its namespace was destroyed or made anew while it "
    "ran; if the ledger does not know that guest, 'nvdimmctl check --repair' writes it there first"
)

Stray = tuple[str, int, int]
"""A guest, for people, and machine frames that it has, as (mfn, count)."""


class StrayFrames:
    """Finds frames of running guests that are in none of the namespaces that these guests were started with.

    :param announced: returns the frames that guests have, as (domid, mfn, count), whatever the ledger says. What the
        ledger knows counts without that, too, as a guest of before an upgrade may have announced none.
    """

    def __init__(
        self, ledger: Ledger, backings: Sequence[Backing], announced: Callable[[], Sequence[tuple[int, int, int]]]
    ) -> None:
        self._ledger = ledger
        self._backings = backings
        self._announced = announced

    def find(self) -> list[Stray]:
        """Return those frames. Of a guest that the ledger does not know, nobody can tell the namespaces: all count.

        :raises XenError: when Xen cannot be asked; without Xen there are no guests.
        """
        starts = self._ledger.frames_of_starts()
        domids = {domid for _, domid, *_ in starts}
        announced = [each for each in self._announced() if each[0] not in domids]
        found = [(f"with domid {domid}", mfn, count) for domid, mfn, count in announced]
        areas = [area for backing in self._backings for area in backing.areas()] if starts else []
        for name, domid, mfn, count, nvdimms in starts:
            if not any(has_namespace(nvdimms, area.uid) and _has(area, mfn, count) for area in areas):
                found.append((f"{name} ({f'domid {domid}' if domid else 'it is starting'})", mfn, count))
        return found

    def check(self, path: str, namespace: Namespace) -> None:
        """Check that new bytes of a backing, wherever in its namespace they get their place, are no guest's.

        :raises InUseError: when they could be.
        """
        check_none(self.find(), path, namespace)


def check_none(strays: Sequence[Stray], path: str, namespace: Namespace) -> None:
    """Do what :meth:`StrayFrames.check` does, with what :meth:`StrayFrames.find` has returned."""
    if found := touching(strays, *namespace.frames):
        raise InUseError(
            f"{path}: is on {namespace.name}, which has memory of the running guest {found[0]}: its machine frames "
            f"{found[1]:#x} to {found[1] + found[2] - 1:#x} are another's, as far as is known; nothing was written",
            hint=HINT,
        )


def touching(strays: Sequence[Stray], mfn: int, count: int) -> Stray | None:
    """Return a guest with frames in a range of the machine; None without one."""
    return next((each for each in strays if each[1] < mfn + count and mfn < each[1] + each[2]), None)


def _has(area: Namespace, mfn: int, count: int) -> bool:
    first, frames = area.frames
    return first <= mfn and mfn + count <= first + frames
