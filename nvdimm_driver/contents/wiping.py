# SPDX-License-Identifier: Apache-2.0
"""Wiping of NVDIMMs, and the release of a domain's backings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace

from nvdimm_driver.backing.identity import check_none_outside, check_same_bytes
from nvdimm_driver.contents import copying
from nvdimm_driver.contents.shared_checks import Checks, reporting_errors_of
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError, RefusedError
from nvdimm_driver.model import Allocation, BackingIdentity, NvdimmSpec, Record, Watch
from nvdimm_driver.plugins import Backing, ByteRange, backing_named, backing_of
from nvdimm_driver.shell import command
from nvdimm_driver.state import ownership
from nvdimm_driver.state.words import release_of


class Wiper:
    """Wipes NVDIMMs, and releases those of a domain."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def wipe_all(
        self,
        specs: Sequence[NvdimmSpec],
        watched: Callable[[NvdimmSpec], AbstractContextManager[Watch]],
        owner: Record | None = None,
        *,
        owners: Collection[Record] = (),
    ) -> None:
        """Do what :meth:`wipe` does to several NVDIMMs; no guest starts until all are overwritten.

        :param watched: returns the watch of one, which tells that it is done, too.
        """
        if owner is not None:
            chosen = [item for item in owner.allocations if item.spec in specs]
            for item in chosen:
                self._check_not_kept(owner, chosen, item)
        with ExitStack() as opened:
            for spec, content in self._opened_all(opened, specs, owner, owners):
                with watched(spec) as watch:
                    self._overwrite(spec, content, watch)

    def wipe(
        self, spec: NvdimmSpec, watch: Watch, owner: Record | None = None, *, owners: Collection[Record] = ()
    ) -> None:
        """Overwrite all of an NVDIMM's file or device with zeros, durably, whatever its size. Its owner keeps it.

        :param owner: the domain that it must still belong to, as it is; None to wipe whatever is at the path.
        :param owners: without an owner, the domains that may have what is at the path, as :meth:`owners` returns them.
        :raises RefusedError: when it is in no pool.
        :raises NotFoundError: without an owner, when there is no such backing.
        :raises BackingError: when it is not there, or not the one that was provisioned for the owner.
        :raises InUseError: when a domain runs with it, it is not the owner's any more, or another domain has it.
        """
        self.wipe_all([spec], lambda _: nullcontext(watch), owner, owners=owners)

    def wipe_unclaimed(self, spec: NvdimmSpec, watch: Watch) -> None:
        """Do what :meth:`wipe` does to what no domain has, not even one that the ledger has lost, as far as marks tell.

        :raises InUseError: when a domain has it, running or off.
        :raises RefusedError: when it is in no pool, also where domains may have backings outside of them.
        """
        with self._opened(spec, None) as content:
            self._checks.check_unowned(spec.path, content.identity)
            if self._checks.pools.of(spec.path) is None:  # Nova may call this, and must not reach the host's own
                raise RefusedError(f"{spec.path}: is in no pool", hint="leave out --unclaimed, or add it to a pool")
            self._overwrite(spec, content, watch)

    def owners(self, nvdimms: Sequence[NvdimmSpec]) -> list[Record]:
        """Return the domains that have one of these NVDIMMs."""
        found = [
            record
            for spec in nvdimms
            for record in ownership.owners(self._checks.ledger, spec.path, self._checks.identity(spec.path))
        ]
        return list({record.uuid: record for record in found}.values())

    def own(self, record: Record) -> tuple[Allocation, ...]:
        """Return the domain's NVDIMMs without those that :meth:`find_owner` finds another owner for.

        What a define only wanted for it is not among them: the domain never had it, and it may be full of an import.
        """
        return tuple(each for each in record.allocations if self.find_owner(record, each) is None)

    def find_owner(self, record: Record, item: Allocation) -> Record | None:
        """Return the other domain that was provisioned with what this domain has only begun to claim, if any.

        A define that was interrupted can leave a claim to another domain's file, by another name of it.
        """
        if item.ready:
            return None
        found = ownership.owners_of_bytes(self._checks.ledger, record, self._checks.identity(item.spec.path))
        return found[0] if found else None

    def to_wipe(self, record: Record) -> tuple[Allocation, ...]:
        """Return the domain's :meth:`own` NVDIMMs that :meth:`.Pools.wipes` says have to be overwritten."""
        found = [(item, self._checks.identity(item.spec.path)) for item in self.own(record)]
        return tuple(item for item, here in found if self._checks.pools.wipes(item, here))

    def give_up(
        self, record: Record, watch: Watch, *, delete: bool, slot: int | None = None, lost: bool = False
    ) -> None:
        """Release a domain's backings, after wiping those of :meth:`to_wipe`. All is done, or no claim is given up.

        :param record: the domain as the operator has seen it.
        :param delete: delete the :meth:`own` files, too; devices stay.
        :param slot: release only the NVDIMM in this slot.
        :param lost: give up what is not there, too, wherever its bytes may be.
        :raises InUseError: while the domain runs, when it was changed since, or when what is to be wiped or deleted is
            another domain's, too.
        :raises BackingError: when what is to be wiped or deleted is not there, and may exist.
        """
        self._checks.ledger.check_own()
        ownership.check_off(self._find_unchanged(record))
        chosen = in_slot(record, slot)
        self.check_unmapped(chosen)
        wiped, owned = self.to_wipe(chosen), self.own(chosen) if delete else ()
        here = [item for item in {*wiped, *owned} if not self._is_gone(record, item, lost=lost)]
        for item in here:  # all, before the first of them is wiped
            self._check_owner(record, item.spec)
            self._check_not_kept(record, chosen.allocations, item)
        with ExitStack() as opened:  # until the claims are given up, no start can take what is wiped
            wanted = [item.spec for item in wiped if item in here]
            for spec, content in self._opened_all(opened, wanted, record, lost=lost):
                self._overwrite(spec, content, watch)
            if wanted:
                self._checks.ledger.note_overwritten(record.uuid, [spec.slot for spec in wanted])
            for item in owned:
                if item in here:
                    self._checks.pools.check_place(item.spec.path)
                    self._check_owner(record, item.spec)
                    self._delete(item)
            now = self._checks.ledger.find_domain(record.uuid) or record
            ownership.give_up(self._checks.ledger, self._checks.backings, now, in_slot(now, slot).allocations)

    def _delete(self, item: Allocation) -> None:
        """Delete an NVDIMM's file; a device stays. That is noted before: if this is killed, a repair gives it up."""
        backing, ledger = backing_of(self._checks.backings, item.spec.path), self._checks.ledger
        if not ownership.is_device(item):
            ledger.note_deleted(item.uuid, item.spec.slot)
        try:
            backing.discard(item.spec, item.identity)
        except BaseException:
            if backing.exists(item.spec.path):  # nobody may take it for deleted, should it be away one day
                ledger.note_deleted(item.uuid, item.spec.slot, deleted=False)
            raise

    def check_unmapped(self, record: Record) -> None:
        """Check that no guest of Xen's has frames of what was provisioned for a domain: the ledger may be an old one.

        :raises InUseError: when one has.
        """
        for item in record.allocations:
            if ownership.has_bytes([item], self._checks.identity(item.spec.path)):
                self._checks.check_unmapped(item.spec.path)

    def _check_not_kept(self, record: Record, overwritten: Collection[Allocation], item: Allocation) -> None:
        """Check that a domain keeps no other NVDIMM with bytes of one that is overwritten or deleted.

        :raises InUseError: when it does.
        """
        other = ownership.find_other(record, item, item.identity)
        if other is not None and other not in overwritten:
            raise InUseError(
                f"{item.spec.path}: its bytes are those of the NVDIMM in slot {other.spec.slot}, too, which the domain "
                "keeps",
                hint="see 'nvdimmctl check'",
            )

    @contextmanager
    def _opened(
        self, spec: NvdimmSpec, owner: Record | None, owners: Collection[Record] = (), *, lost: bool = False
    ) -> Iterator[ByteRange]:
        """Open all of an NVDIMM's file or device, to overwrite it; no domain can start with it until it is closed.

        What is open is checked: who owns the folder can exchange names before and after.

        :param lost: what is left of the owner's device is enough.
        """
        self._checks.ledger.check_own()
        self._checks.pools.check_place(spec.path)
        self._check_whose(spec, owner, owners)
        self._checks.check_off(spec.path)  # a running domain's file cannot be opened for writing
        self._checks.check_room(spec.path)
        backing = backing_of(self._checks.backings, spec.path)
        with reporting_errors_of(spec.path):
            whole = replace(spec, size=self._size(backing, spec.path, owner))
            with backing.open_bytes(whole, write=True) as content:
                self._checks.check_off(spec.path, opened=content.identity)  # from now on, starts fail while it is open
                self._check_whose(spec, owner, owners, content.identity)
                if owner is not None and not lost:
                    _check_whole(owner, spec, content.identity)
                yield content

    def _opened_all(
        self,
        stack: ExitStack,
        specs: Sequence[NvdimmSpec],
        owner: Record | None,
        owners: Collection[Record] = (),
        *,
        lost: bool = False,
    ) -> list[tuple[NvdimmSpec, ByteRange]]:
        """Open NVDIMMs as :meth:`_opened` does; return them without those that are parts of another one.

        A domain can have a device and a partition of it. The lock of one keeps the other from being opened.
        """
        opened: list[tuple[NvdimmSpec, ByteRange]] = []
        for spec in sorted(specs, key=lambda each: -self._bytes_at(each.path)):
            here = self._checks.identity(spec.path)
            if any(here and each.identity and each.identity.covers(here) for _, each in opened):
                self._check_whose(spec, owner, owners, here)
                if owner is not None and not lost:
                    _check_whole(owner, spec, here)
                continue
            opened.append((spec, stack.enter_context(self._opened(spec, owner, owners, lost=lost))))
        return sorted(opened, key=lambda pair: specs.index(pair[0]))

    def _bytes_at(self, path: str) -> int:
        here = self._checks.identity(path)
        return here.size if here else 0

    def _overwrite(self, spec: NvdimmSpec, content: ByteRange, watch: Watch) -> None:
        """Overwrite what is open, after nothing can refuse it any more: from here on, no saved guest can go on."""
        self._checks.tell_overwritten(spec.path, content)
        with reporting_errors_of(spec.path):
            copying.wipe(content, watch("wiping"))
        backing_of(self._checks.backings, spec.path).trust(spec.path, content.identity)

    def _size(self, backing: Backing, path: str, owner: Record | None) -> int:
        try:
            return backing.size(path)
        except NotFoundError as error:
            if owner is None:
                raise
            # Not exit status 3, which means that there is nothing to wipe: the domain may have other NVDIMMs.
            raise _missing(owner, path, error.message.removeprefix(f"{path}: ")) from error

    def is_replaced(self, item: Allocation) -> bool:
        """Return True when another device or file system has the place of the one that had an NVDIMM."""
        found, had = self._checks.identity(item.spec.path), item.identity
        if found is None or had is None:
            return False
        return not had.shares_bytes(found) and (found.device, found.start) != (had.device, had.start)

    def _is_gone(self, record: Record, item: Allocation, *, lost: bool) -> bool:
        """Return True when nothing of an NVDIMM can be left to wipe or to delete.

        :param lost: it is enough that it is not there, nor at another path; what has its place is not touched.
        :raises BackingError: when it is not there, but it was, or what would hold it is not there either.
        """
        path, pool = item.spec.path, self._checks.pools.of(item.spec.path)
        kind = item.identity.kind if item.identity else pool.kind if pool else ""
        backing = backing_named(self._checks.backings, kind) if kind else backing_of(self._checks.backings, path)
        if backing.exists(path) and not (lost and self.is_replaced(item)):
            return False
        if lost:
            if item.identity is not None and (now := backing.find(item.identity)):
                raise BackingError(f"{path}: it is not lost, but on {now}", hint="define the domain with that device")
            return True
        backing.check_home(path, item.identity)
        if item.ready and not item.overwritten and self._checks.pools.wipes(item, None):
            has = f"pool {pool.name} has" if pool else "its pool had"
            raise _missing(record, path, f"it is not there, and {has} wipe_on_release")
        return True

    def _check_whose(
        self,
        spec: NvdimmSpec,
        owner: Record | None,
        owners: Collection[Record],
        opened: BackingIdentity | None = None,
    ) -> None:
        """Check that an NVDIMM is its owner's or, without one, nobody's but those domains'.

        :param opened: identity of what is open; None for whatever is at the path.
        :raises InUseError: when it is another domain's.
        :raises BackingError: when it is another backing.
        """
        if owner is not None:
            self._check_owner(owner, spec, opened)
            return
        known, here = {each.uuid for each in owners}, opened or self._checks.identity(spec.path)
        found = ownership.owners(self._checks.ledger, spec.path, here)
        for other in [each for each in found if each.uuid not in known]:
            raise InUseError(
                f"{spec.path} belongs to domain {other.name} ({other.uuid}) by now", hint="see 'nvdimmctl list'"
            )
        for other in found:
            for item in other.allocations:
                self._check_meant(spec.path, here, other, item)
        for uuid in [each.uuid for each in found] or [""]:
            self._checks.unknown.check(uuid, {spec.path: opened})

    def _check_meant(self, path: str, here: BackingIdentity | None, owner: Record, item: Allocation) -> None:
        """Check that who names a path to overwrite what is there means an NVDIMM by it, if that concerns the NVDIMM.

        :param here: the identity of what is to be overwritten.
        :raises BackingError: when the ledger has the path for the NVDIMM, and something else is there.
        :raises InUseError: when the NVDIMM has some of the bytes, and is a part of what is there, or the reverse.
        """
        if here is None or item.identity is None:
            return
        wipe = command("nvdimmctl", "wipe", "--slot", str(item.spec.slot), owner.uuid)
        has = item.identity.shares_bytes(here)
        if item.spec.path == path and not has:
            now = backing_named(self._checks.backings, item.identity.kind).find(item.identity)
            raise BackingError(
                f"{path} is the NVDIMM in slot {item.spec.slot} of domain {owner.name} by the ledger, and something "
                f"else is there now{f'; the NVDIMM is {now}' if now else ''}",
                hint=f"'nvdimmctl check' says how to put that right; then: {wipe}",
            )
        if has and not item.identity.begins_as(here):
            raise InUseError(
                f"{path} has bytes of {item.spec.path}, the NVDIMM in slot {item.spec.slot} of domain {owner.name}, "
                "which is another device",
                hint=f"to overwrite that: {wipe}; to overwrite both, first {release_of(owner.uuid, item.spec.slot)}",
            )

    def _check_owner(self, record: Record, spec: NvdimmSpec, opened: BackingIdentity | None = None) -> None:
        """Check that an NVDIMM is the domain's, nobody else's, and the one that was provisioned.

        :param record: the domain as the operator has seen it.
        :param opened: identity of what is open; None for whatever is at the path.
        :raises InUseError: when the domain was changed since, or the NVDIMM is another domain's, too.
        :raises BackingError: when it is another backing.
        """
        self._find_unchanged(record)
        self._checks.unknown.check(record.uuid, {spec.path: opened})
        found = opened or self._checks.identity(spec.path)
        for other in ownership.others(self._checks.ledger, record, spec.path, found):
            raise InUseError(f"{spec.path} belongs to domain {other.name}, too", hint="see 'nvdimmctl check'")
        (identity,) = (item.identity for item in record.allocations if item.spec == spec)
        self._checks.check_same(spec.path, identity)
        if opened is not None and identity is not None:
            check_same_bytes(spec.path, opened, identity)

    def _find_unchanged(self, record: Record) -> Record:
        """Return the domain's record of now.

        :raises InUseError: when its NVDIMMs are others than in this record.
        """
        now = self._checks.ledger.find_domain(record.uuid)
        if now is None or _nvdimms(now) != _nvdimms(record):
            raise InUseError(f"domain {record.name} was changed meanwhile", hint="see 'nvdimmctl list', and try again")
        return now


def in_slot(record: Record, slot: int | None) -> Record:
    """Return a domain with the NVDIMM in that slot only; with all for None."""
    if slot is None:
        return record
    return replace(record, allocations=tuple(item for item in record.allocations if item.spec.slot == slot), intents=())


def _check_whole(owner: Record, spec: NvdimmSpec, found: BackingIdentity | None) -> None:
    """Do what :func:`.check_none_outside` does for what is to be overwritten."""
    (had,) = (item.identity for item in owner.allocations if item.spec == spec)
    release = release_of(owner.uuid, spec.slot, "--lost ")
    check_none_outside(spec.path, found, had, f"; or, to overwrite what is left, and give up all: {release}")


def _missing(record: Record, path: str, problem: str) -> BackingError:
    item = ownership.find_item(record, path, None)
    release = release_of(record.uuid, item.spec.slot if item else 0, "--lost ")
    return BackingError(
        f"{path}: {problem}: nothing was overwritten, and the claim to it stays",
        hint=f"if it was moved, 'nvdimmctl check' finds it; if it is lost for good, give it up: {release}",
    )


def _nvdimms(record: Record) -> list[tuple[NvdimmSpec, BackingIdentity | None]]:
    return [(item.spec, item.identity) for item in record.claims]
