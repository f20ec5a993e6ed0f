# SPDX-License-Identifier: Apache-2.0
"""Inconsistencies between the ledger, the backings, their marks and Xen, and how each is repaired."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from nvdimm_driver.backing.identity import describe_differences
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, LedgerError
from nvdimm_driver.model import Allocation, Record, Surveyed
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.state import owner_marks, ownership
from nvdimm_driver.state.owner_marks import Mark

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inconsistency:
    """An inconsistency.

    :ivar domain: name of the domain; empty when none is known.
    :ivar path: of the backing; empty when it is about none.
    :ivar remedy: what mending does or, when it cannot be mended, what the operator can do.
    :ivar mend: mends it; None when that cannot be done.
    """

    domain: str
    path: str
    problem: str
    remedy: str
    mend: Callable[[], object] | None = field(default=None, compare=False)


def look(driver: XenNvdimmDriver) -> list[Inconsistency]:
    """Find every inconsistency; change nothing.

    A moved file and one that the ledger does not know are the same file: what is found first is mended first, and then
    it is looked again.
    """
    return list(_Look(driver).findings())


class _Look:
    def __init__(self, driver: XenNvdimmDriver) -> None:
        self.driver = driver
        self.records = driver.ledger.domains()
        self.owners = {
            os.path.realpath(item.spec.path): (record, item) for record in self.records for item in record.allocations
        }
        self.files: dict[str, Surveyed] = {}
        self.unseen: list[Inconsistency] = []
        for pool in driver.pools:
            try:
                self.files |= {file.path: file for file in self._named(pool.kind).survey(pool.paths)}
            except BackingError as error:
                self.unseen.append(Inconsistency("", "", f"pool {pool.name}: {error.message}", error.hint))

    def findings(self) -> Iterator[Inconsistency]:
        yield from self.unseen
        for record in self.driver.starts.find_stale():
            domid = record.start.domid if record.start else None
            problem = f"its start as domid {domid} is over, and not put away"
            yield Inconsistency(record.name, "", problem, "put it away", self.driver.reconcile)
        for record in self.driver.starts.find_unserved():
            yield Inconsistency(record.name, "", "its label server is gone", "start another", self.driver.serve_labels)
        for record in self.records:
            for item in record.allocations:
                if item.ready:
                    yield from self._allocation(record, item)
                else:
                    yield _unfinished(record, item)
        for file in self.files.values():
            yield from self._file(file)

    # --- what the ledger has ---

    def _allocation(self, record: Record, item: Allocation) -> Iterator[Inconsistency]:
        path = item.spec.path
        told = partial(Inconsistency, record.name, path)
        try:
            backing = self._named(item.identity.kind if item.identity else "")
            if not backing.exists(path):
                yield self._gone(record, item)
                return
            lacking = backing.lacking(item.spec)
            if lacking:
                problem = f"it is {lacking} bytes too short: they are lost"
                yield told(problem, "put zeros in their place", partial(self._complete, backing, record, item))
                return
            found = backing.locate(item.spec).identity
        except BackingError as error:
            yield told(error.message.removeprefix(f"{path}: "), error.hint or "see what has changed it")
            return
        if found != item.identity:
            problem = f"it is not the backing that was provisioned: {describe_differences(found, item.identity)}"
            yield told(problem, "take it as it is now", partial(self._adopt, backing, record, item))
            return
        file = self.files.get(os.path.realpath(path))
        if file is not None and file.owner != owner_marks.pack(record, item):
            problem = (
                "its own mark does not say whose it is" if file.owner is None else "its own mark is not up to date"
            )
            yield told(problem, "mark it", partial(backing.mark, path, owner_marks.pack(record, item)))

    def _named(self, kind: str) -> Backing:
        for backing in self.driver.backings:
            if backing.name == kind:
                return backing
        raise BackingError(f"there is no backing {kind!r}", hint="install the plug-in that it was made with")

    def _gone(self, record: Record, item: Allocation) -> Inconsistency:
        told = partial(Inconsistency, record.name, item.spec.path)
        for file in self.files.values():
            mark = self._mark(file)
            if mark and (mark.uuid, mark.spec.slot) == (record.uuid, item.spec.slot) and file.path not in self.owners:
                backing = self._named(item.identity.kind if item.identity else "")
                move = partial(backing.move, file.path, item.spec.path)
                return told(f"it is not there; it was moved to {file.path}", "move it back", move)
        return told(
            "it is not there",
            "give up what was in it: the next define makes a new one, of zeros; or bring it back from a backup",
            partial(self._replace, record, replace(item, identity=None, written=0)),
        )

    def _complete(self, backing: Backing, record: Record, item: Allocation) -> None:
        backing.extend(item.spec)
        self._adopt(backing, record, item)

    def _adopt(self, backing: Backing, record: Record, item: Allocation) -> None:
        """Take a backing as it is: complete it, check that nobody else owns it, mark it, and record it."""
        identity = backing.provision(item.spec)
        ownership.check_bytes(self.driver.ledger, record.uuid, {item.spec.path: identity})
        changed = replace(item, identity=identity)
        self._replace(record, changed)
        backing.mark(item.spec.path, owner_marks.pack(record, changed))

    def _replace(self, record: Record, item: Allocation) -> None:
        """Record an NVDIMM in the ledger in place of the one in its slot."""
        known = self.driver.ledger.find_domain(record.uuid)
        others = [each for each in (known.allocations if known else ()) if each.spec.slot != item.spec.slot]
        self.driver.ledger.store(record.uuid, record.name, record.ram, [*others, item], dsm=record.dsm)

    # --- what the files have ---

    def _file(self, file: Surveyed) -> Iterator[Inconsistency]:
        owner = self.owners.get(file.path)
        mark = self._mark(file)
        started = {os.path.realpath(path) for each in self.records if each.start for path in each.start.paths}
        if file.frozen and file.path not in started:
            yield self._frozen(file, owner[0].name if owner else mark.name if mark else "", mark)
        if owner is None and file.owner is not None:
            yield from self._unknown(file, mark)

    @cached_property
    def _guests(self) -> list[tuple[int, str | None]]:
        """Xen's guests, asked for once, as Xen is asked for every possible domid."""
        return self.driver.starts.mapper.guests()

    def _frozen(self, file: Surveyed, name: str, mark: Mark | None) -> Inconsistency:
        told = partial(Inconsistency, name, file.path, "it is frozen, and no start that is known has it")
        for domid, uuid in self._guests:
            if mark is None or uuid in (None, mark.uuid):
                return told(f"shut the guest with domid {domid} down first: it may be its own")
        return told("thaw it", partial(backing_of(self.driver.backings, file.path).thaw, file.path))

    def _unknown(self, file: Surveyed, mark: Mark | None) -> Iterator[Inconsistency]:
        backing = backing_of(self.driver.backings, file.path)
        unmark = partial(backing.mark, file.path, None)
        if mark is None:
            yield Inconsistency("", file.path, "its mark cannot be read", "take the mark away", unmark)
            return
        known = next((each for each in self.records if each.uuid == mark.uuid), None)
        slots = {item.spec.slot: item for item in known.allocations} if known else {}
        told = partial(Inconsistency, mark.name, file.path)
        if mark.spec.slot in slots:
            kept = slots[mark.spec.slot].spec.path
            if backing.exists(kept):  # else it was moved, of which _gone tells
                yield told(f"its mark says slot {mark.spec.slot}, which is {kept}", "take the mark away", unmark)
            return
        record = known or Record(mark.uuid, mark.name, mark.ram, mark.dsm, "", (), None)
        item = Allocation(mark.uuid, mark.spec, base=mark.base)
        problem = f"its mark says slot {mark.spec.slot} of {mark.name} ({mark.uuid}), which the ledger does not know"
        yield told(problem, "write it into the ledger", partial(self._adopt, backing, record, item))

    def _mark(self, file: Surveyed) -> Mark | None:
        if file.owner is None:
            return None
        try:
            return owner_marks.unpack(file.path, file.owner)
        except LedgerError as error:
            LOG.warning("%s", error)
            return None


def _unfinished(record: Record, item: Allocation) -> Inconsistency:
    """Report an NVDIMM that is not provisioned: a define is at work or was interrupted, or its backing is gone."""
    return Inconsistency(
        record.name,
        item.spec.path,
        f"it is not provisioned ({item.written}% of it is written), and no other domain can have its path",
        "unless a define is at work on it now, define the domain again, or 'nvdimmctl release' the domain",
    )
