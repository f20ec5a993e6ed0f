# SPDX-License-Identifier: Apache-2.0
"""NVDIMMs that a redefinition makes larger: their files get longer, and their labels move to the new end.

All of that is behind the old end. So the old NVDIMM is whole, labels included, until the ledger has the new one: a
process that is killed at any moment leaves one of both. What was the label area is data then, with its bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from nvdimm_driver.errors import BackingError, InUseError, RefusedError
from nvdimm_driver.lifecycle.redefine import has_bad_blocks, in_use, kept_nvdimms
from nvdimm_driver.model import BackingIdentity, DomainSpec, Intake, Namespace, NvdimmSpec, Record
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.sizes import human

LOG = logging.getLogger(__name__)

_COPY = "they are behind its end; look whose they are, or give the domain a copy of its own (guide: Changing the size)"


@dataclass(frozen=True)
class Growth:
    """An NVDIMM that gets larger.

    :ivar old: the NVDIMM as it was, at its path of now.
    :ivar identity: of what is there.
    :ivar size: bytes of the backing before.
    :ivar lacking: bytes that the backing is to get.
    :ivar moves: its labels move to the new end.
    :ivar copied: the labels that were copied there, if they were.
    """

    backing: Backing
    old: NvdimmSpec
    new: NvdimmSpec
    identity: BackingIdentity
    size: int
    lacking: int
    moves: bool
    copied: list[bytes] = field(default_factory=list, compare=False, repr=False)

    @property
    def writes(self) -> bool:
        """Return True when something is to be written."""
        return bool(self.lacking or self.moves)

    def examine(self) -> Intake:
        """Do what :meth:`.Backing.examine` does, for the backing as it will be.

        :raises BackingError: when there is no room.
        """
        intake = self.backing.examine(replace(self.new, size=self.new.size - self.lacking))
        free = self.backing.space([os.path.dirname(self.new.path)], ()).free if self.lacking else 0
        if self.lacking > free:
            raise BackingError(
                f"{self.new.path}: needs {human(self.lacking)} more, its file system has {human(free)} free",
                hint="make room, or ask for less",
            )
        return replace(intake, writes=intake.writes + self.lacking)

    def extend(self) -> None:
        """Make the backing as long as the NVDIMM; what is new is zeros, not all of them written."""
        if self.lacking:
            self.backing.extend(self.new, self.identity)

    def move_labels(self, check_strays: Callable[[str, Namespace], None]) -> None:
        """Copy the labels to the new end, durably.

        :param check_strays: refuses a path and its namespace while a guest runs there that the ledger does not know.
        :raises InUseError: when a program may write there, or has.
        """
        if not self.moves:
            return
        check_strays(self.new.path, self.backing.examine(self.new).namespace)
        self.backing.check_unwritten(self.new.path, self.identity)
        with self.backing.open_bytes(self.new, write=True) as content:
            size, start = self.old.label_size, self.new.size - self.new.label_size
            labels, there = content.read(self.old.size - size, size), content.read(start, size)
            if there not in (labels, bytes(size)):
                raise InUseError(f"{self.new.path}: a program has written to its new end meanwhile", hint="try again")
            content.write(start, labels)
            content.sync()
        self.copied.append(labels)

    def check_moved(self) -> None:
        """Check that the labels at the new end are those of now: a guest may have run since they were looked at.

        :raises InUseError: when they are not.
        """
        end, size = self.old.size, self.old.label_size
        if self.moves:
            changed = not self.has_copy()
        else:
            changed = size == self.new.label_size > 0 and in_use(self.backing, self.old, end - size, end)
        if changed:
            raise InUseError(f"{self.new.path}: its labels were changed by its guest meanwhile", hint="try again")

    def undo(self) -> None:
        """Take away what is behind the old end: what was appended, and the copy of the labels."""
        start, size = self.new.size - self.new.label_size, self.new.label_size
        if self.copied or (self.moves and not self.lacking and self.has_copy()):
            with self.backing.open_bytes(self.new, write=True) as content:
                if not self.copied or content.read(start, size) == self.copied[-1]:
                    content.write(start, bytes(size))
                    content.sync()
        if self.lacking:
            self.backing.shorten(self.old.path, self.new.size, self.size, self.identity)

    def has_copy(self) -> bool:
        """Return True when the new end has the labels of now."""
        with self.backing.open_bytes(self.new) as content:
            size = self.old.label_size
            return content.read(self.old.size - size, size) == content.read(self.new.size - size, size)


def find(
    domain: DomainSpec, before: Record | None, backings: Sequence[Backing], bad: Sequence[tuple[int, int]]
) -> dict[str, Growth]:
    """Return, by path, the NVDIMMs that a domain keeps and that get larger.

    :param domain: as it is to be.
    :param before: the domain as the ledger knows it.
    :param bad: as for :func:`.redefine.check_kept`.
    """
    return {
        spec.path: _growth(backing_of(backings, spec.path), replace(item.spec, path=spec.path), spec, identity, bad)
        for item, spec, identity in kept_nvdimms(domain, before, backings)
        if spec.size > item.spec.size
    }


def _growth(
    backing: Backing, old: NvdimmSpec, new: NvdimmSpec, identity: BackingIdentity, bad: Sequence[tuple[int, int]]
) -> Growth:
    size, lacking = backing.size(new.path), backing.lacking(new)
    if size < old.size:  # it has lost bytes: others say that
        lacking = 0
    return Growth(backing, old, new, identity, size, lacking, _moves(backing, old, new, bad))


def _moves(backing: Backing, old: NvdimmSpec, new: NvdimmSpec, bad: Sequence[tuple[int, int]]) -> bool:
    """Return True when labels move: an area of another size does not, and one that is all zeros need not.

    Those in bad blocks, or that cannot be read, stay where they are: the definition is refused.
    """
    start = old.size - old.label_size
    if not old.label_size == new.label_size > 0:
        return False
    try:
        extents = backing.locate(old).extents
        return not has_bad_blocks(extents, bad, start, old.size) and in_use(backing, old, start, old.size)
    except (BackingError, OSError) as error:
        LOG.debug("the labels of %s cannot be read: %s", old.path, error)
        return False


def check(
    domain: DomainSpec,
    before: Record | None,
    growing: Iterable[Growth],
    bad: Sequence[tuple[int, int]],
    is_saved: Callable[[Record], bool],
) -> None:
    """Check that NVDIMMs can get larger.

    :param before: the domain as the ledger knows it.
    :param bad: as for :func:`.redefine.check_kept`.
    :param is_saved: returns True when a domain has a saved guest.
    :raises RefusedError: when they cannot.
    """
    for each in growing:
        if not each.writes:
            continue
        path, size = each.new.path, human(each.new.size)
        if before is not None and before.start is not None:
            problem = f"{path}: domain {domain.name} runs, and its NVDIMM would get {size}"
            raise RefusedError(problem, hint="shut the domain down first")
        if before is not None and is_saved(before):
            raise RefusedError(
                f"{path}: domain {domain.name} has a saved guest, which could not go on with {size}",
                hint="start and shut down the domain first, or discard the saved guest: virsh managedsave-remove",
            )
        if each.moves:
            _check_place(each, bad)


def _check_place(growth: Growth, bad: Sequence[tuple[int, int]]) -> None:
    """Check that the labels of an NVDIMM can move to its new end.

    :raises RefusedError: when they would overlap what they are copied from, or overwrite other bytes.
    """
    path, size, start = growth.new.path, growth.new.label_size, growth.new.size - growth.new.label_size
    if start < growth.old.size:
        raise RefusedError(
            f"{path}: would get {human(growth.new.size - growth.old.size)} more, and its label area has {human(size)}",
            hint="make it larger by at least its label area, or leave its size: its labels move to its new end",
        )
    there = replace(growth.new, size=growth.new.size - growth.lacking)
    if start >= there.size:
        return
    if has_bad_blocks(growth.backing.find_extents(there), bad, start, there.size):
        raise RefusedError(f"{path}: its labels would move to {start:#x}, where the memory has bad blocks")
    if not in_use(growth.backing, there, start, there.size):
        return
    if there.size < growth.new.size or not growth.has_copy():
        raise RefusedError(f"{path}: its labels would move to {start:#x}, where other bytes are", hint=_COPY)
