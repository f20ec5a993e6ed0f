# SPDX-License-Identifier: Apache-2.0
"""The condition of an NVDIMM's file, for the domain that has it: a define, a start, a check and a repair ask for it.

Zeros take the place of bytes that a domain has had only when somebody asks for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from nvdimm_driver.errors import BackingError, UnwrittenError
from nvdimm_driver.model import Allocation, BackingIdentity, Record
from nvdimm_driver.plugins import DOUBTFUL, Backing, backing_of, exists
from nvdimm_driver.sizes import human
from nvdimm_driver.state.ownership import has_bytes


class Condition(Enum):
    """The condition of a file or device at a path, whichever it is."""

    ABSENT = auto()
    SHORT = auto()
    """It has less bytes than the NVDIMM; it may be empty."""
    DOUBTFUL = auto()
    """A guest may have written to it that does not have it: its file shared blocks with this one."""
    SHARED = auto()
    """It shares blocks with another file."""
    UNWRITTEN = auto()
    """It is large enough, and parts of it are not allocated, or not written."""
    WHOLE = auto()


@dataclass(frozen=True)
class Found:
    """The file or device at an NVDIMM's path.

    :ivar own: it is what was provisioned for the NVDIMM, whatever its size is now.
    :ivar problem: what is wrong with it, for people; empty for one that is absent, shared or whole.
    """

    condition: Condition
    identity: BackingIdentity | None = None
    own: bool = False
    problem: str = ""


def look(backing: Backing, item: Allocation) -> Found:
    """Find out what is at an NVDIMM's path.

    :param item: what was provisioned is compared with what is there, if anything was.
    :raises BackingError: when nobody can say, or it is not fit for another reason.
    """
    spec = item.spec
    if not backing.exists(spec.path):
        return Found(Condition.ABSENT)
    lacking = backing.lacking(spec)
    file = backing.inspect(spec.path)
    identity = file.identity if file else None
    own = has_bytes([item], identity)
    if lacking:
        which = "the missing bytes are lost" if own else "it is another file, such as a copy that was not finished"
        return Found(Condition.SHORT, identity, own, f"it is {human(lacking)} too short: {which}")
    if file and file.doubtful:
        return Found(Condition.DOUBTFUL, identity, own, DOUBTFUL)
    if backing.is_shared(spec):
        return Found(Condition.SHARED, identity, own)
    try:
        identity = backing.locate(spec).identity
    except UnwrittenError as error:
        return Found(Condition.UNWRITTEN, identity, own, error.message.removeprefix(f"{spec.path}: "))
    return Found(Condition.WHOLE, identity, has_bytes([item], identity))


def check_not_lost(backing: Backing, item: Allocation) -> None:
    """Check that no byte of what was provisioned is missing at an NVDIMM's path.

    All of it was written when it was provisioned. Who has truncated the file and made it larger again has lost bytes.

    :raises BackingError: when one is; other things that are wrong are not looked at.
    """
    if not item.ready:
        return
    found = look(backing, item)
    if found.condition in (Condition.SHORT, Condition.UNWRITTEN):
        raise BackingError(
            f"{item.spec.path}: bytes of the domain are missing: {found.problem}",
            hint="a backup may have what is missing: 'nvdimmctl check' says how to go on",
        )


def check_none_lost(
    backings: Sequence[Backing], before: Record | None, identities: Mapping[str, BackingIdentity | None]
) -> None:
    """Do what :func:`check_not_lost` does for each NVDIMM that a domain is to keep, at its path of now.

    :param before: the domain as the ledger knows it.
    :param identities: of what is at the paths that the domain is to have; None where nothing is that has bytes.
    """
    for item in before.allocations if before else ():
        for path, identity in identities.items():
            if has_bytes([item], identity) or (identity is None and path == item.spec.path and exists(path)):
                check_not_lost(backing_of(backings, path), replace(item, spec=replace(item.spec, path=path)))
