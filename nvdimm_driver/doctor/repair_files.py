# SPDX-License-Identifier: Apache-2.0
"""Remedies for files that are gone, have not all the bytes of their NVDIMMs, or not in blocks of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection

from nvdimm_driver.backing.paths import others_can_turn
from nvdimm_driver.doctor.repair_changes import Changes
from nvdimm_driver.model import Allocation, BackingIdentity, Record
from nvdimm_driver.plugins import Backing
from nvdimm_driver.shell import NOT_AS_ROOT, command, repair_of
from nvdimm_driver.state import ownership
from nvdimm_driver.state.condition import Condition, Found

Remedy = tuple[str, str, Callable[[], object] | None]
"""A problem, what the repair does or the operator can do about it, and the repair, if there is one."""

MOUNT = "mount the file system that had it there"


class UnfitFiles:
    """The remedies for files that are gone, short, not written in full, or share blocks.

    Bytes that a domain had become zeros only if the operator asks for that, file by file.

    :param zeros: paths of files whose lost bytes the operator wants to be replaced with zeros.
    :param named: paths of which the operator wants what nobody else can decide.
    """

    def __init__(self, changes: Changes, zeros: Collection[str], named: Collection[str]) -> None:
        self.changes = changes
        self.zeros = zeros
        self.named = named

    def remedy(self, record: Record, item: Allocation, backing: Backing, found: Found) -> Remedy | None:
        """Return what to do with what is at an NVDIMM's path; None if it is whole.

        What was provisioned for the NVDIMM is not known to be somewhere else.
        """
        if found.condition in (Condition.ABSENT, Condition.WHOLE):
            return None
        problem = found.problem or "it shares blocks with another file (reflink)"
        if item.ready and not found.own and not on_same_volume(found.identity, item.identity):
            return problem, MOUNT, None
        if found.condition is Condition.SHORT:
            return self._short(record, item, backing, found)
        if record.start is not None:
            return problem, self._of_running(record, item, found), None
        if found.condition is Condition.DOUBTFUL:
            trust = self.changes.of(record, self.changes.trust, backing, item, found.identity)
            return problem, copy_or_trust(item.spec.path), trust if item.spec.path in self.named else None
        if found.condition is Condition.SHARED:
            if guests := self.changes.driver.checks.guests_with_blocks(record.uuid, item.spec.path):
                problem = f"the guest {' and '.join(guests)} has blocks of it: what this file had there is lost"
                return problem, _copy(item.spec.path), None
            if found.own:
                return problem, *self._unshare(record, item, backing)
        if found.condition is Condition.UNWRITTEN and found.own and item.spec.path not in self.zeros:
            return problem, _copy_or_go_on(item.spec.path), None
        remedy = "take it as it is, and write zeros where it reads as zeros"
        if found.condition is Condition.SHARED:
            remedy = "take it as it is, and copy what is shared"
        return problem, remedy, self.changes.of(record, self.changes.fill, backing, item, found.identity)

    def gone(self, record: Record, item: Allocation, backing: Backing) -> Remedy:
        """Return what to do about a file that its file system has no more."""
        problem, path = "it is not there", item.spec.path
        if record.start is not None and path in record.start.paths:
            return (
                problem,
                f"before domain {record.name} is shut down, copy its data from within the guest, which has it still",
                None,
            )
        if path in self.zeros:
            give_up = self.changes.of(record, self.changes.give_up_contents, backing, item)
            return problem, "give up its contents: the next define makes a new file, of zeros", give_up
        return problem, f"restore a backup, if there is one, and repeat this; {go_on(path)}", None

    def _short(self, record: Record, item: Allocation, backing: Backing, found: Found) -> Remedy:
        """Return a file that is too short: a backup may have the bytes, so zeros are only for who asks."""
        path, problem = item.spec.path, found.problem
        if path in self.zeros:
            complete = self.changes.of(record, self.changes.complete, backing, item, found.identity)
            return problem, "replace them with zeros", complete
        return problem, _copy_or_go_on(path), None

    def _of_running(self, record: Record, item: Allocation, found: Found) -> str:
        if found.condition is Condition.SHARED and found.own:
            if others := self._sharers(item.spec.path):
                return (
                    f"that is {' and '.join(others)}: it has what this guest writes, and has lost what it had there: "
                    "keep both files, and copy a backup over that one"
                )
            return (
                "the reader of that copy sees what the guest writes: delete the copy, and not this file; for a backup, "
                "shut the domain down, and make it with 'nvdimmctl export'"
            )
        return f"shut domain {record.name} down first"

    def _unshare(self, record: Record, item: Allocation, backing: Backing) -> tuple[str, Callable[[], object] | None]:
        """Return the remedy and the repair of a file that shares blocks, and whose domain is off.

        If another domain has the other file, its guest may have ended under a version that noted nothing.
        """
        path, unshare = item.spec.path, self.changes.of(record, self.changes.unshare, backing, item)
        others = self._sharers(path)
        if not others or path in self.named:
            return "copy what is shared", unshare
        return (
            f"that is {' and '.join(others)}: if both have the right bytes, copy what is shared: {repair_of(path)}; if "
            "the guest of one has run since they share blocks, copy a backup over the other one first"
        ), None

    def _sharers(self, path: str) -> list[str]:
        """Return the other files with blocks of one that are domains', by ledger or mark, each with its domain."""
        driver = self.changes.driver
        marks = {file.path: ownership.readable_mark(file) for file in self.changes.files.values() if not file.is_device}
        owners = {other: mark.name for other, mark in marks.items() if mark}
        owners |= {item.spec.path: each.name for each in driver.ledger.domains() for item in each.allocations}
        return [
            f"{other} of domain {name}"
            for other, name in sorted(owners.items())
            if other != path and driver.checks.share_blocks(path, other)
        ]


def go_on(path: str) -> str:
    """Return how to go on without the bytes that a file has lost."""
    return "to go on with zeros in place of what is lost: " + command("nvdimmctl", "check", "--repair", "--zeros", path)


def _copy_or_go_on(path: str) -> str:
    return f"{_copy(path)}; {go_on(path)}"


def copy_or_trust(path: str) -> str:
    """Return what to do with a file to which a guest may have written that does not have it."""
    return f"{_copy(path)}; then, or to go on without: {repair_of(path)}"


def _copy(path: str) -> str:
    if others_can_turn(path):
        return f"copy a backup over it, if there is one, {NOT_AS_ROOT}"
    return f"copy a backup over it, if there is one: {command('cp', '--sparse=never', 'BACKUP', path)}"


def on_same_volume(found: BackingIdentity | None, expected: BackingIdentity | None) -> bool:
    """Return True when two files are on one file system, as far as an identity shows that."""
    if found is None or expected is None:
        return False
    return (found.device, found.start) == (expected.device, expected.start)
