# SPDX-License-Identifier: Apache-2.0
"""Checks before the bytes of a backing are made, overwritten, copied or given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nvdimm_driver.backing.files import check_name
from nvdimm_driver.backing.identity import check_same_bytes
from nvdimm_driver.backing.paths import HINTS
from nvdimm_driver.errors import BackingError, InUseError, NvdimmError
from nvdimm_driver.guest.mapping_guards import Ranges
from nvdimm_driver.model import PAGE, SUPERPAGE, BackingIdentity, NvdimmSpec, Run
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.shell import repair_of
from nvdimm_driver.state import ownership
from nvdimm_driver.state.device_claims import UnknownClaims
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.stray_frames import StrayFrames, check_none

LastRuns = dict[str, Run | None]
"""The last run of each domain that has a backing, by uuid."""


class Checks:
    """The checks that import, export and wiping share.

    Reconcile the ledger with the running domains before each call.

    :param overwritten: called with the identity of what is about to be overwritten.
    :ivar unknown: claims that the ledger may not know.
    :param frames_of_guests: returns the frames that guests have, as (domid, mfn, count), whatever the ledger says.
    """

    def __init__(
        self,
        ledger: Ledger,
        backings: Sequence[Backing],
        pools: Pools,
        overwritten: Callable[[BackingIdentity], None],
        frames_of_guests: Callable[[], Sequence[tuple[int, int, int]]],
        unknown: UnknownClaims,
    ) -> None:
        self.unknown = unknown
        self._overwritten = overwritten
        self._frames_of_guests = frames_of_guests
        self._strays = StrayFrames(ledger, backings, frames_of_guests)
        self.ledger = ledger
        self.backings = backings
        self.pools = pools

    def check_new(self, spec: NvdimmSpec) -> None:
        """Check that the pools allow an NVDIMM that no domain owns.

        :raises RefusedError: when it is in no pool, or a pool's rules forbid it.
        :raises InUseError: when a domain owns its path or its bytes, or as :meth:`check_room` does.
        """
        self.ledger.check_own()
        check_name(spec.path)
        self.pools.check_new([spec], self.ledger.domains())
        self.check_unowned(spec.path)
        self.check_room(spec.path)

    def check_room(self, path: str, size: int = 0) -> None:
        """Check that what is written to a backing, which need not exist, gets no place where a guest has its bytes.

        One whose bytes all have their places gets no others, and :meth:`check_unmapped` has compared those.

        :param size: that it is to have; 0: the one that it has.
        :raises InUseError: when a running guest has frames in its namespace that are not of that namespace.
        """
        strays = self._strays.find()
        if not strays or self._is_located(path, size):
            return
        backing, identity = backing_of(self.backings, path), self.identity(path)
        if identity is None:
            found = [backing.examine(NvdimmSpec(0, path, SUPERPAGE)).namespace]
        else:
            found = [area for area in backing.areas() if area.uid == identity.device]
        for namespace in found:
            check_none(strays, path, namespace)

    def _is_located(self, path: str, size: int) -> bool:
        """Return True when all bytes of what is at a path have their places."""
        try:
            backing = backing_of(self.backings, path)
            backing.locate(NvdimmSpec(0, path, size or backing.size(path) // PAGE * PAGE))
        except NvdimmError:
            return False
        return True

    def check_unowned(self, path: str, opened: BackingIdentity | None = None) -> None:
        """Check that no domain owns what is at a path, if anything.

        :param opened: identity of what is open; None for whatever is at the path.
        :raises InUseError: when one does.
        :raises BackingError: when what is open is not at the path any more.
        """
        ownership.check_free(self.ledger, path, opened or self.identity(path))
        self.unknown.check("", {path: opened})
        self.check_unmapped(path)

    def check_off(
        self, path: str, hint: str = "shut it down first", *, opened: BackingIdentity | None = None
    ) -> LastRuns:
        """Check that no domain runs with a backing.

        :param hint: of the error.
        :param opened: identity of what is open; None for whatever is at the path.
        :returns: for :meth:`check_off_since`.
        :raises InUseError: when one does.
        """
        records = ownership.owners(self.ledger, path, opened or self.identity(path))
        for record in records:
            ownership.check_off(record, hint)
        self.check_unmapped(path)
        return {record.uuid: self.ledger.find_run(record.uuid) for record in records}

    def check_off_since(self, last: LastRuns, path: str, hint: str) -> None:
        """Check that no domain has run with a backing since :meth:`check_off`: a copy of it is of one moment.

        :param last: what that has returned.
        :raises InUseError: when one has.
        """
        if self.check_off(path, hint) != last:
            raise InUseError(
                f"{path}: a domain ran with it while it was copied, or it was overwritten", hint="copy it again"
            )

    def check_unmapped(self, path: str) -> None:
        """Check that no guest of Xen's has frames of a backing; the mark of a device does not say so.

        :raises InUseError: when one does.
        """
        if not (guests := self.guests_with_blocks("", path)):
            return
        if backing_of(self.backings, path).is_shared(NvdimmSpec(0, path, PAGE)):
            raise InUseError(
                f"{path}: the guest {' and '.join(guests)} has blocks of it, which it shares with another file",
                hint="'nvdimmctl check' says what is lost, and how to go on",
            )
        if known := self.guests_with(path):
            raise InUseError(
                f"{path}: the guest with domid {known[0]} has it, and the ledger does not know that",
                hint=f"shut that guest down first, or write that into the ledger: {repair_of(path)}",
            )

    def guests_with(self, path: str) -> list[int]:
        """Return the domids of the guests that have frames of a backing, as their device models have announced."""
        guests = self._frames_of_guests()
        own = self._ranges(path) if guests else Ranges(path, ())
        return sorted({domid for domid, *has in guests if own.touched_by(*has)})

    def check_unshared(self, uuid: str, path: str) -> None:
        """Check that a backing shares nothing with one that a guest has, of another domain than that one.

        :raises InUseError: when it does.
        """
        if backing_of(self.backings, path).is_shared(NvdimmSpec(0, path, PAGE)):
            self.check_no_guests_blocks(uuid, path)

    def check_no_guests_blocks(self, uuid: str, path: str) -> None:
        """Check that no guest of another domain has blocks of a file: what the file had there is lost then.

        :raises InUseError: when one has.
        """
        if guests := self.guests_with_blocks(uuid, path):
            raise InUseError(
                f"{path}: the guest {' and '.join(guests)} has blocks of it, and may have written to them: what "
                "the file had there is lost then",
                hint="copy a backup over it",
            )

    def guests_with_blocks(self, uuid: str, path: str) -> list[str]:
        """Return which other guests have blocks of a domain's file, by the ledger or as they have announced.

        :param uuid: of the domain; empty if it is nobody's.
        """
        own = self._ranges(path)
        named = {f"of domain {name}" for name, *has in self.ledger.frames_of_others(uuid) if own.touched_by(*has)}
        record = self.ledger.find_domain(uuid) if uuid else None
        itself = record.start.domid if record and record.start else None
        return sorted(named) or [f"with domid {domid}" for domid in self.guests_with(path) if domid != itself]

    def share_blocks(self, path: str, other: str) -> bool:
        """Return True when two files have blocks in common."""
        own = self._ranges(path)
        return any(own.touched_by(*each) for each in self.frames(other))

    def _ranges(self, path: str) -> Ranges:
        return Ranges(path, ((path, *each) for each in self.frames(path)))

    def frames(self, path: str) -> list[tuple[int, int]]:
        """Return the machine frames of the bytes at a path, as (mfn, count), also of blocks that are shared.

        :returns: nothing when they are no backing's that a guest could have.
        """
        try:
            backing = backing_of(self.backings, path)
            found = backing.find_extents(NvdimmSpec(0, path, backing.size(path) // PAGE * PAGE))
        except NvdimmError:
            return []
        return [(each.spa // PAGE, each.length // PAGE) for each in found]

    def check_same(self, path: str, identity: BackingIdentity | None) -> None:
        """Check that a backing, if it exists, has that identity, whatever its size is now.

        :param identity: None accepts every backing.
        :raises BackingError: when it has another, or none.
        """
        backing = backing_of(self.backings, path)
        if identity is not None and backing.exists(path):
            check_same_bytes(path, backing.identify(path), identity)

    def tell_overwritten(self, path: str, content: ByteRange) -> None:
        """Tell that all bytes of an open range are about to be overwritten: no saved guest may go on with them."""
        if identity := content.identity or self.identity(path):
            self._overwritten(identity)

    def identity(self, path: str) -> BackingIdentity | None:
        """Return the identity of the backing at a path; None when there is none that a domain can have."""
        return ownership.identity_at(self.backings, path)


@contextmanager
def reporting_errors_of(path: str) -> Iterator[None]:
    """Turn an error of the block that does not name the path into one that does.

    :raises BackingError: for an OSError, and for one of its own kind.
    """
    try:
        yield
    except BackingError as error:
        if error.message.startswith("/"):  # it names a path
            raise
        raise BackingError(f"{path}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}", hint=HINTS.get(error.errno or 0, "")) from error
