# SPDX-License-Identifier: Apache-2.0
"""The model of domains that share a pool: which of them has which bytes, in which slot and at which base."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition

from nvdimm_driver.backing import inode
from tests.integration.crash_world import Hypervisor, World
from tests.integration.loop_pmem import FileSystem
from tests.unit.doubles import RecordingMapper

UUIDS = tuple(f"7c7b0e2e-4a6e-4f0e-9a3b-00000000000{digit}" for digit in "123")
SLOTS = {"f0": 0, "f1": 1, "f2": 2, "f3": 0}
"""The slot of each file. A domain has one file in a slot."""
NAMES = tuple(SLOTS)

Places = dict[str, tuple[int, int | None]]
"""Slot and base of NVDIMMs, by the name of the file. One whose base a restored guest has taken has none until its next
start."""


@dataclass
class Guest:
    """A domain, as the model knows it.

    :ivar claims: what it is defined with.
    :ivar prepared: what a start that has not come has.
    :ivar running: what its guest has.
    :ivar domid: of its guest.
    :ivar last: what its last guest had. It has the first right to its places.
    :ivar saved: what its saved guest had, the contents of that, and its memory.
    """

    claims: Places = field(default_factory=dict)
    prepared: Places | None = None
    running: Places | None = None
    domid: int = 0
    last: Places = field(default_factory=dict)
    saved: tuple[Places, dict[str, bytes], dict[int, bytes]] | None = None

    def has(self) -> set[str]:
        return {*self.claims, *(self.prepared or ()), *(self.running or ())}


class Xen(RecordingMapper):
    """Does something of another process while it maps, if it is told to."""

    meanwhile: Callable[[], object] | None = None

    def deliver(self, domid: int, tables: bytes) -> None:
        if self.meanwhile is not None:
            self.meanwhile()
        super().deliver(domid, tables)


class OneXen(World):
    """A world whose processes all share one double of Xen, and whose pool can be unmounted.

    :ivar own: where the pool's file system stays mounted.
    """

    def __init__(self, folder: Path, fs: FileSystem, own: Path) -> None:
        super().__init__(folder, fs)
        self.shared = Xen({})
        self.own = own

    def xen(self) -> Hypervisor:
        return self.shared  # type: ignore[return-value]

    def content(self, name: str) -> bytes:
        return (self.own / name).read_bytes()

    def is_immutable(self, name: str) -> bool:
        with open(self.own / name, "rb") as file:
            return inode.is_immutable(file.fileno())

    def write(self, name: str, data: bytes) -> None:
        """Do what a guest's stores do: they need no permission, and the file's times stay."""
        path = self.own / name
        with open(path, "rb") as reader:
            stamps = os.fstat(reader.fileno())
            inode._set_immutable(reader.fileno(), False)
            with open(path, "r+b") as file:
                file.write(data)
            os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
            inode._set_immutable(reader.fileno(), True)


def some_names(most: int) -> st.SearchStrategy[set[str]]:
    """Return sets of files that a domain can have, of at most so many."""
    sets = st.sets(st.sampled_from(NAMES), min_size=1, max_size=most)
    return sets.filter(lambda names: len({SLOTS[name] for name in names}) == len(names))


WHICH = st.integers(0, 5)
"""Which of the domains that something can happen to."""


def is_off(guest: Guest) -> bool:
    return bool(guest.claims) and guest.running is None and guest.prepared is None


def is_prepared(guest: Guest) -> bool:
    return guest.prepared is not None


def runs(guest: Guest) -> bool:
    return guest.running is not None


def is_saved(guest: Guest) -> bool:
    return guest.saved is not None and guest.running is None


def happens_to(which: Callable[[Guest], bool], *, away: bool = False) -> Callable[[Any], Any]:
    """Return the condition of a rule that something can happen to a domain of that kind.

    :param away: while the pool is not mounted.
    """
    return precondition(lambda machine: machine.away is away and any(which(guest) for guest in machine.guests.values()))


def while_mounted(rule: Any) -> Any:
    """Have a rule apply while the pool is mounted."""
    return precondition(lambda machine: not machine.away)(rule)
