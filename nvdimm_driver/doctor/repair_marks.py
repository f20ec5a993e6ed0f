# SPDX-License-Identifier: Apache-2.0
"""The marks of files in the pools: which of several files with one mark is the NVDIMM, and which are copies of it."""

from __future__ import annotations

from collections.abc import Container, Iterable

from nvdimm_driver.doctor.repair_changes import Changes
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NotFoundError, RefusedError
from nvdimm_driver.model import Surveyed
from nvdimm_driver.plugins import backing_of
from nvdimm_driver.state import owner_marks, ownership
from nvdimm_driver.state.owner_marks import Mark

WHICH = f"find the guest's own, and take the mark from each copy: {owner_marks.unmark_command('COPY')}"
"""What the operator can do about several files with one mark."""


def several(paths: Iterable[str]) -> str:
    """Return, for people, that files have the same mark."""
    return f"{' and '.join(paths)} have the same mark"


def unmark_copy(driver: XenNvdimmDriver, path: str) -> None:
    """Take the mark from a file of which the operator says that it is a copy, as ``cp -a`` makes it.

    :raises NotFoundError: when nothing with a mark is there.
    :raises RefusedError: when the mark was written on this file.
    :raises InUseError: when a domain has it.
    """
    backing = backing_of(driver.backings, path)
    file = backing.inspect(path)
    if file is None or file.owner is None:
        raise NotFoundError(f"{path} has no mark", hint="'nvdimmctl check' names the files to take it from")
    mark = ownership.readable_mark(file)
    if mark is not None and mark.is_original(file.identity):
        raise RefusedError(
            f"{path} is no copy: its mark, of domain {mark.name} ({mark.uuid}), was written on it",
            hint="'nvdimmctl check' says what to do with it",
        )
    Changes(driver, (), {}).unmark(backing, file)


class Marks:
    """The files that are no NVDIMM of the ledger and have a mark.

    A mark says on which file it was written, but one of an earlier version does not. A file with a mark that was
    written on another file is a copy, as ``cp -a`` makes it, and nothing takes it for the NVDIMM: only the operator
    knows of what day it is. A frozen file is no copy: a guest has it.

    :param known: paths of the NVDIMMs in the ledger.
    """

    def __init__(self, files: Iterable[Surveyed], known: Container[str]) -> None:
        self._found: dict[tuple[str, int], list[tuple[Surveyed, Mark]]] = {}
        for file in files:
            if file.path not in known and (mark := ownership.readable_mark(file)):
                self._found.setdefault((mark.uuid, mark.spec.slot), []).append((file, mark))

    def uuids(self) -> set[str]:
        """Return the uuids of the domains in the marks."""
        return {uuid for uuid, _ in self._found}

    def files_of(self, uuid: str, slot: int) -> list[str]:
        """Return the files of which one is a domain's NVDIMM in that slot; nothing when there are only copies.

        Several whose marks were written on them are NVDIMMs of the domain, each at another time: the first one that a
        guest has, if any, is returned, and the domain can have the others besides.
        """
        found = self._found.get((uuid, slot), [])
        own = [file for file, mark in found if mark.is_original(file.identity)]
        sure = [file for file, mark in found if file.frozen or mark.is_original(file.identity)]
        if own and own == sure:
            return [min(own, key=lambda file: not file.frozen).path]
        return [file.path for file in sure or [file for file, mark in found if not mark.is_copied(file.identity)]]

    def all_of(self, uuid: str, slot: int) -> list[str]:
        """Return the files with the mark of a domain's NVDIMM in that slot, copies too."""
        return [file.path for file, _ in self._found.get((uuid, slot), [])]
