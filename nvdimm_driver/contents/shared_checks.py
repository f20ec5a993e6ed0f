# SPDX-License-Identifier: Apache-2.0
"""Checks before the bytes of a backing are made, overwritten, copied or given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nvdimm_driver.backing.files import check_name
from nvdimm_driver.backing.identity import check_same_bytes
from nvdimm_driver.backing.paths import HINTS
from nvdimm_driver.errors import BackingError, InUseError, NvdimmError
from nvdimm_driver.model import PAGE, SUPERPAGE, Allocation, BackingIdentity, NvdimmSpec, Run
from nvdimm_driver.plugins import Backing, ByteRange, backing_of
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.shell import repair_of
from nvdimm_driver.state import condition, ownership, shared_blocks
from nvdimm_driver.state.device_claims import UnknownClaims
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.shared_blocks import overlap
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
        if shared_blocks.is_shared(self.backings, path):
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
        frames = self.frames(path) if guests else []
        return sorted({domid for domid, *has in guests if overlap(has, frames)})

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
        """Return which guests have blocks of a file of a domain that is off, by the ledger or as they have announced.

        :param uuid: of the domain.
        """
        frames = self.frames(path)
        named = {f"of domain {name}" for name, *has in self.ledger.frames_of_others(uuid) if overlap(has, frames)}
        return sorted(named) or [f"with domid {domid}" for domid in self.guests_with(path)]

    def frames(self, path: str) -> list[tuple[int, int]]:
        """Return what :func:`.shared_blocks.frames` does; nothing when no guest could have the bytes."""
        try:
            return shared_blocks.frames(self.backings, path)
        except NvdimmError:
            return []

    def check_not_doubtful(self, path: str) -> None:
        """Check that no guest of another domain may have written to a domain's file.

        :raises BackingError: when one may have.
        """
        condition.check_not_doubtful(self._items_at(self.identity(path)))

    def tell_sound(self, identity: BackingIdentity | None) -> None:
        """Note that all bytes that domains have there are known, whatever another domain's guest has written before."""
        sound = [(item.uuid, item.spec.slot) for item in self._items_at(identity) if condition.is_doubtful(item)]
        if sound:
            self.ledger.doubt(sound, doubtful=False)

    def _items_at(self, identity: BackingIdentity | None) -> list[Allocation]:
        records = self.ledger.domains() if identity else ()
        items = [item for record in records for item in record.allocations]
        return [item for item in items if ownership.has_bytes([item], identity)]

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
