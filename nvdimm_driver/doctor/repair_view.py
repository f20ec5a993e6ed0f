# SPDX-License-Identifier: Apache-2.0
"""Survey what a look for inconsistencies goes by: the ledger, the backings, and their marks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from nvdimm_driver.backing.paths import resolve, same_file_system
from nvdimm_driver.doctor.repair_changes import Changes, exchanged_names
from nvdimm_driver.doctor.repair_files import UnfitFiles
from nvdimm_driver.doctor.repair_marks import Marks
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import ConfigError, NvdimmError
from nvdimm_driver.model import Allocation, DomainSpec, NvdimmSpec, Record, Surveyed
from nvdimm_driver.plugins import Backing, backing_named, backing_of, exists
from nvdimm_driver.state import ownership
from nvdimm_driver.state.owner_marks import Mark

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inconsistency:
    """An inconsistency, and its repair.

    :ivar domain: name of the domain; empty when none is known.
    :ivar uuid: of the domain; empty when none is known. Another domain can have the same name.
    :ivar path: path of the backing; empty when it concerns none.
    :ivar remedy: what the repair does or, when there is none, what the operator can do.
    :ivar mend: repairs it; None when it cannot be repaired.
    :ivar of_guest: True when a running guest lacks something that the ledger says it has: the ledger is right.
    """

    domain: str
    uuid: str
    path: str
    problem: str
    remedy: str
    mend: Callable[[], object] | None = field(default=None, compare=False)
    of_guest: bool = field(default=False, compare=False)


DefinitionOf = Callable[[str], DomainSpec | None]
"""Returns the domain of a uuid as libvirt's definition has it; None when that has no NVDIMMs, or there is none.

It raises ConfigError when libvirt cannot be asked."""


def nobody_to_ask(uuid: str) -> DomainSpec | None:
    """Be a :data:`DefinitionOf` without a libvirt."""
    raise ConfigError(f"there is no libvirt to ask for domain {uuid}")


class View:
    """Ledger, backings and marks, as a look has seen them; its findings and repairs go by that.

    :ivar records: the domains in the ledger.
    :ivar running: those that have a start.
    :ivar owners: who has a path in the ledger, by path.
    :ivar files: the files in the pools, and the devices that somebody has or has named, by path.
    :ivar exchanged: as :func:`.exchanged_names` returns them.
    :ivar unseen: the pools and devices that could not be looked at.
    :ivar marks: of the files that are no NVDIMM of the ledger.
    :ivar named: paths of which the operator wants what nobody else can decide.
    """

    def __init__(
        self, driver: XenNvdimmDriver, definition_of: DefinitionOf, zeros: Collection[str], named: Collection[str]
    ) -> None:
        self.driver = driver
        self.named = named
        self.definition_of = definition_of
        self.records = driver.ledger.domains()
        self.running = ownership.Running(self.records)
        self.owners = {item.spec.path: (record, item) for record in self.records for item in record.allocations}
        self.files: dict[str, Surveyed] = {}
        self.changes = Changes(driver, self.records, self.files)
        self.exchanged = exchanged_names(driver.backings, self.records)
        self.unfit = UnfitFiles(self.changes, zeros, named)
        self.unseen: list[Inconsistency] = []
        for pool in driver.pools:
            device = ""
            try:
                backing = self.backing(pool.kind)
                of_devices = type(backing).mark is Backing.mark  # which keep no mark on themselves
                if of_devices:  # one that is away keeps none of the others from being seen
                    self.files |= {file.path: file for file in backing.survey(pool.paths)}
                for path in pool.paths:
                    device = path if of_devices else ""
                    backing.check_home(resolve(path))
                if not of_devices:
                    self.files |= {file.path: file for file in backing.survey(pool.paths)}
            except NvdimmError as error:
                self.unseen.append(Inconsistency("", "", device, f"pool {pool.name}: {error.message}", error.hint))
        self._see_devices()
        self.marks = Marks(self.files.values(), self.owners)

    def _see_devices(self) -> None:
        """Look at devices that a domain has or the operator has named, and at doubtful files that he has named."""
        devices = [item.spec.path for each in self.records for item in each.allocations if ownership.is_device(item)]
        for path in {*devices, *self.named}.difference(self.files):
            with suppress(NvdimmError):  # of what a domain has, the finding is there
                file = backing_of(self.driver.backings, path).inspect(path)
                if file and (file.is_device or file.doubtful):
                    self.files[path] = file
        for file in [*self.files.values()]:
            with suppress(NvdimmError):
                self.files[file.path] = self._as_before(file)

    def _as_before(self, file: Surveyed) -> Surveyed:
        """Return what was surveyed; a device that was made larger has the mark of what it was, unless it has an owner.

        Its bytes are where its guest looks for them.
        """
        here = file.identity
        if here is None or file.owner is not None or self.owner_at(file):
            return file
        for part in self.parts_of(file):
            is_its = part.identity and part.identity.begins_as(here) and here.covers(part.identity)
            if is_its and ownership.readable_mark(part):
                return replace(file, owner=part.owner)
        return file

    def owner_at(self, file: Surveyed) -> tuple[Record, Allocation] | None:
        """Return who has a path in the ledger; None for a device that a boot has given another one's name."""
        found = self.owners.get(file.path)
        if found and file.is_device and found[1].ready and not has_bytes(found[1], file):
            return None
        return found

    def parts_of(self, file: Surveyed) -> list[Surveyed]:
        """Return the parts of a device, and what it is a part of, that have marks."""
        if file.identity is None or not file.is_device:
            return []
        return [*self.backing(file.identity.kind).inspect_parts(file.path, file.identity)]

    def backing(self, kind: str) -> Backing:
        return backing_named(self.driver.backings, kind)

    def is_file(self, path: str) -> bool:
        """Return True for a file in a pool, which is frozen for a guest that has it."""
        file = self.files.get(path)
        return file is not None and not file.is_device

    def frozen_of(self, uuid: str) -> set[str]:
        """Return the frozen files that have the mark of a domain."""
        marks = {file.path: ownership.readable_mark(file) for file in self.files.values() if file.frozen}
        return {path for path, mark in marks.items() if mark and mark.uuid == uuid}

    def find(self, uuid: str, slot: int) -> Allocation | None:
        """Return the NVDIMM that a domain has in a slot in the ledger."""
        items = [item for record in self.records if record.uuid == uuid for item in record.allocations]
        return next((item for item in items if item.spec.slot == slot), None)

    def file_at(self, path: str) -> Surveyed | None:
        """Return the file at a path, also in no pool; None when none is there.

        :raises BackingError: when it cannot be read.
        """
        if path in self.files or not exists(path):
            return self.files.get(path)
        return backing_of(self.driver.backings, path).inspect(path)

    def is_still(self, item: Allocation) -> bool:
        """Return True when what is at an NVDIMM's path is its backing, by its bytes or by its mark, whatever its size.

        A file that has no bytes any more can only be known by its mark.
        """
        found = ownership.identity_at(self.driver.backings, item.spec.path)
        if found is not None:
            return item.identity is not None and item.identity.shares_bytes(found)
        return self.has_mark_of(item)

    def is_later(self, file: Surveyed, item: Allocation) -> bool:
        """Return True when a file with the mark of an NVDIMM is another one, which the domain was given since."""
        mark = ownership.readable_mark(file)
        return mark is not None and mark.is_original(file.identity) and not has_bytes(item, file)

    def has_mark_of(self, item: Allocation) -> bool:
        """Return True when an NVDIMM's file has its mark."""
        file = self.file_at(item.spec.path)
        return file is not None and is_marked(file, item)

    def is_made_by(self, spec: NvdimmSpec) -> bool:
        """Return True when a define would make a new file for an NVDIMM; False also when it would fail."""
        with suppress(NvdimmError):
            return backing_of(self.driver.backings, spec.path).examine(spec).creates
        return False

    def moved_from(self, record: Record) -> dict[str, str]:
        """Return where a define that was killed wants files that can be moved there, by their paths of now.

        The ledger's backup was made within the define, and the file, which has the mark, was moved since. In a ledger
        that is no backup, a file with the mark is one that the domain had before.
        """
        found = {}
        for item in record.intents if self.driver.ledger.is_from_elsewhere() else ():
            path, marked = item.spec.path, self.marks.files_of(record.uuid, item.spec.slot)
            if len(marked) != 1 or record.start is not None or exists(path):
                continue
            file = self.files[marked[0]]
            if not (file.is_device or file.frozen) and same_file_system(file.path, path):
                found[file.path] = path
        return found

    def is_defined_with(self, uuid: str, path: str) -> bool:
        """Return True when libvirt's definition of a domain has a path; False also when libvirt cannot be asked."""
        try:
            defined = self.definition_of(uuid)
        except NvdimmError as error:
            LOG.info("the definition of domain %s is not known: %s", uuid, error)
            return False
        return defined is not None and path in {resolve(spec.path) for spec in defined.nvdimms}


def about(whose: Record | Mark | None, path: str) -> partial[Inconsistency]:
    """Return an inconsistency that lacks a problem and a remedy."""
    return partial(Inconsistency, whose.name if whose else "", whose.uuid if whose else "", path)


def is_marked(file: Surveyed, item: Allocation) -> bool:
    """Return True when a file has the mark of an NVDIMM, whatever its bytes are."""
    mark = ownership.readable_mark(file)
    return mark is not None and (mark.uuid, mark.spec.slot) == (item.uuid, item.spec.slot)


def has_bytes(item: Allocation, file: Surveyed) -> bool:
    """Return True when a file is what an NVDIMM was provisioned with."""
    return ownership.has_bytes([item], file.identity)


def runs_without(record: Record, file: Surveyed) -> bool:
    """Return True while a domain runs, or is starting, with other files than that one."""
    return record.start is not None and not file.frozen
