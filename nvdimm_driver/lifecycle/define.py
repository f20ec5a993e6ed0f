# SPDX-License-Identifier: Apache-2.0
"""Definitions of domains: NVDIMMs are provisioned, placed in the guest, and recorded as the domain's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from nvdimm_driver import logs
from nvdimm_driver.backing import files, paths
from nvdimm_driver.backing.identity import check_none_outside, check_same_bytes
from nvdimm_driver.errors import BackingError, DomainXmlError, InUseError, LedgerError, NvdimmError
from nvdimm_driver.lifecycle import growth, saved_guest, slots
from nvdimm_driver.lifecycle.domain_locks import DomainLocks
from nvdimm_driver.lifecycle.growth import Growth
from nvdimm_driver.lifecycle.plan import Planner, check_distinct
from nvdimm_driver.lifecycle.redefine import check_kept, check_started, still_mapped
from nvdimm_driver.model import Allocation, BackingIdentity, DomainSpec, NvdimmSpec, Plan, Progress, Record, Run
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.shell import repair_of
from nvdimm_driver.sizes import human
from nvdimm_driver.state import condition, ownership
from nvdimm_driver.state.device_claims import UnknownClaims
from nvdimm_driver.state.events import Event
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.words import release_of

LOG = logging.getLogger(__name__)

_MAKES_ZEROS = (
    "nothing is at its path: if it had data, put them there first ('nvdimmctl check' knows where a file was moved); "
    "then define the domain with virsh, through nvdimmd, which makes zeros of what is not there"
)


@dataclass(frozen=True)
class Before:
    """A domain before it is changed or started: if that fails, this is put back.

    :ivar record: the domain as the ledger had it.
    :ivar run: its last run then.
    :ivar event: number of the last event then.
    :ivar marked: path and mark of each file whose mark the ledger did not know. A start that another process prepares
        records its own as events.
    """

    record: Record | None
    run: Run | None
    event: int
    marked: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Made:
    """The backings that a define has created or made larger. To undo it takes that away.

    :ivar created: NVDIMMs whose backings were created.
    :ivar grown: those that got larger.
    """

    created: Sequence[Allocation] = ()
    grown: Sequence[Growth] = ()


class Definitions:
    """The domains that are defined, as the ledger has them."""

    def __init__(
        self,
        ledger: Ledger,
        planner: Planner,
        pools: Pools,
        locks: DomainLocks,
        unknown: UnknownClaims,
        is_saved: Callable[[str, str], bool],
    ) -> None:
        self.locks = locks
        self.is_saved = is_saved
        self.ledger = ledger
        self.backings = unknown.backings
        self.unknown = unknown
        self.planner = planner
        self.pools = pools

    def plan(self, domain: DomainSpec, *, kept: Sequence[Allocation] = (), adopts: bool = False) -> Plan:
        """Return the plan for a define and start of the domain; change nothing.

        :param kept: NVDIMMs that the domain keeps besides.
        :param adopts: for :meth:`adopt`.
        :raises NvdimmError: any error that a define or start would raise.
        """
        LOG.debug("plan domain %s, NVDIMMs: %d; nothing is changed", domain.name, len(domain.nvdimms))
        domain = self.identify_by_name(domain)
        found = self.find_paths(domain.uuid, (spec.path for spec in domain.nvdimms))
        domain = self.keep_slots(domain.with_paths(found))
        uuid = domain.uuid or ""
        before = self.ledger.find_domain(uuid)
        self._check_allowed(domain, self._all_kept(domain, before, kept))
        identities = {spec.path: ownership.identity_at(self.backings, spec.path) for spec in domain.nvdimms}
        self._check_not_moved(domain, before, identities)
        self._check_none_lost(before, identities)
        self._check_started(domain, before, identities)
        growing = {} if adopts else self._find_growing(domain, before)
        moved = [path for path, each in growing.items() if each.moves]
        bad = self.planner.host.bad_ranges()
        check_kept(domain, before, self.ledger.find_run(uuid), self.backings, bad, moved)
        return self.planner.plan_define(domain, before, adopts=adopts, growing=growing)

    def plan_start(self, domain: DomainSpec) -> Plan:
        """Return the plan of a start with this XML; change nothing.

        :raises NvdimmError: any error that :meth:`adopt` or the start would raise.
        """
        domain = self.keep_slots(self.resolve_for_start(domain))
        record = self.ledger.find_domain(uuid_of(domain))
        if record is None or not self._is_current(domain, record):
            return self._plan_adoption(domain, record)
        self.check_unknown(domain)
        return self.planner.plan_start(domain, record)

    def identify_by_name(self, domain: DomainSpec) -> DomainSpec:
        """Return the domain; if the XML has no uuid, with that of the ledger's domain of the same name, if any.

        Another domain may have the name of one that is undefined. It has none of that one's NVDIMMs, and gives up none.

        :raises DomainXmlError: when there are several.
        """
        if domain.uuid is not None:
            return domain
        resolved = [paths.resolve(spec.path) for spec in domain.nvdimms]
        places = [(path, ownership.identity_at(self.backings, path)) for path in resolved]
        known = [
            record.uuid
            for record in self.ledger.named(domain.name)
            if any(ownership.find_item(record, *each) for each in places)
        ]
        if len(known) > 1:
            raise DomainXmlError(
                f"several domains named {domain.name} have NVDIMMs: {', '.join(known)}",
                hint="write the <uuid> of the one that is meant into the XML, or a new one",
            )
        return replace(domain, uuid=known[0]) if known else domain

    def keep_slots(self, domain: DomainSpec) -> DomainSpec:
        """Return a domain with the slots that its NVDIMMs have had, where its XML leaves them open; paths are resolved.

        The slot is in the NVDIMM's serial number, and so in the cookie of each namespace label: in another slot, the
        guest would find no namespace. A new one whose labels were made in a slot that is free gets that one. The others
        get the lowest free slots, in document order as libvirt gives them.

        :raises LayoutError: when the XML gives one of these slots to another NVDIMM.
        """
        if not domain.unplaced:
            return domain
        record = None if domain.uuid is None else self.ledger.find_domain(domain.uuid)
        items = record.allocations if record else ()
        kept = slots.kept(domain, items, partial(ownership.identity_at, self.backings))
        taken = {*kept.values(), *(spec.slot for spec in domain.nvdimms if spec.path not in domain.unplaced)}
        for spec in domain.nvdimms:
            if spec.path in domain.unplaced and spec.path not in kept:
                slot = self.planner.find_slot_of_labels(spec)
                if slot is not None and slot not in taken:
                    kept[spec.path] = slot
                    taken.add(slot)
        return replace(domain, nvdimms=slots.assign(domain, kept), unplaced=frozenset())

    def define(
        self, domain: DomainSpec, plan: Plan | None = None, *, kept: Sequence[Allocation] = (), adopts: bool = False
    ) -> Made:
        """Provision the domain's NVDIMMs and choose their guest addresses. Can be repeated, also with another spec.

        What is wanted is written beside what the domain has, and takes its place in one transaction when all is
        provisioned. Whoever calls this has the lock for that (:meth:`.domain_locks.DomainLocks.storing`).

        :param domain: with its uuid.
        :param plan: returned by :meth:`plan`; None to plan now. Anything that may have changed since is checked again.
        :param kept: NVDIMMs that the domain keeps besides.
        :param adopts: for :meth:`adopt`.
        :returns: for :meth:`put_back`.
        :raises NvdimmError: nothing has changed then, except that unwritten parts of existing files hold real zeros.
        """
        uuid = uuid_of(domain)
        plan = plan or self.plan(domain)
        domain = replace(plan.domain, uuid=uuid)
        state = self.state_of(uuid, domain)
        before = state.record
        LOG.debug("define domain %s, %s", domain.name, uuid)
        growing = {} if adopts else self._find_growing(domain, before)
        found = self._begin(domain, before, kept, adopts=adopts)
        self.ledger.record_marks(uuid, state.marked)
        checked = {intake.namespace for intake in plan.intakes if intake.writes}
        created: list[Allocation] = []
        grown: list[Growth] = []
        provisioned: dict[str, BackingIdentity] = {}
        try:
            for spec in domain.nvdimms:
                backing = self._backing(spec)
                if spec.path in growing:
                    grown.append(growing[spec.path])
                    growing[spec.path].extend()
                intake = backing.examine(spec)
                LOG.debug("provision %s: %s to write", spec.path, human(intake.writes))
                if intake.writes and intake.namespace not in checked:  # another than when it was planned
                    self.planner.strays.check(spec.path, intake.namespace)
                progress = self._progress(domain, spec)
                if intake.creates:
                    provisioned[spec.path] = backing.create(spec, progress)
                    created.append(Allocation(uuid, spec, provisioned[spec.path]))
                else:
                    provisioned[spec.path] = backing.provision(spec, progress, found[spec.path] if adopts else None)
            for each in grown:
                each.move_labels(self.planner.strays.check)
            self._settle(plan, domain, before, kept, provisioned, adopts, grown)
        except BaseException:
            LOG.debug("define of domain %s failed: roll it back", domain.name)
            self.put_back(uuid, state, Made(created, grown))
            raise
        for spec, problem in zip(domain.nvdimms, plan.misplaced_labels, strict=True):
            if problem:
                logs.tell(Event("misplaced-labels", uuid, domain.name, None, {"path": spec.path, "problem": problem}))
        return Made(created, grown)

    def _find_growing(self, domain: DomainSpec, before: Record | None) -> dict[str, Growth]:
        """Return, by path, the NVDIMMs that get larger, after checking that they can."""
        bad = self.planner.host.bad_ranges()
        growing = growth.find(domain, before, self.backings, bad)
        growth.check(domain, before, growing.values(), bad, self._is_saved)
        return growing

    def begin(self, domain: DomainSpec, plan: Plan) -> tuple[NvdimmSpec, ...]:
        """Do what :meth:`define` does first: write what is wanted beside what the domain has.

        :returns: what an earlier define wanted, for :meth:`cancel`.
        """
        before = self.ledger.find_domain(uuid_of(domain))
        self._begin(replace(plan.domain, uuid=domain.uuid), before)
        return tuple(item.spec for item in before.intents) if before else ()

    def cancel(self, domain: DomainSpec, had: Sequence[NvdimmSpec]) -> None:
        """Undo :meth:`begin`: what the domain has stays as it is."""
        if had:
            self.ledger.begin_define(replace(domain, nvdimms=tuple(had)), lambda: None)
        else:
            self.ledger.give_up_intents(uuid_of(domain))

    def _begin(
        self, domain: DomainSpec, before: Record | None, kept: Sequence[Allocation] = (), *, adopts: bool = False
    ) -> dict[str, BackingIdentity | None]:
        """Check that a domain may have its NVDIMMs, and write them into the ledger as wanted.

        :param kept: as for :meth:`define`.
        :returns: the identities of what is at their paths; None where nothing is.
        """
        keeps = self._all_kept(domain, before, kept)
        held = self._check_allowed(domain, keeps)
        found = {spec.path: ownership.identity_at(self.backings, spec.path) for spec in domain.nvdimms}
        self._check_none_lost(before, found)
        if adopts:
            _check_all_there(found)

        def check() -> None:
            ownership.check_paths(self.ledger, domain, held)
            self._check_claims(domain, before, found)
            self._check_pools(domain, before, held, keeps)

        self.ledger.begin_define(domain, check)
        return found

    def state_of(self, uuid: str, domain: DomainSpec | None = None) -> Before:
        """Return what :meth:`put_back` needs to know of a domain, before it is changed.

        :param domain: as it is to be.
        """
        marked = ownership.unknown_marks(self.ledger, self.backings, domain) if domain else ()
        record, run = self.ledger.find_domain(uuid), self.ledger.find_run(uuid)
        return Before(record, run, self.ledger.last_event(), tuple(marked))

    def put_back(self, uuid: str, state: Before, made: Made) -> None:
        """Undo :meth:`define`: take away what it made, and let the domain have what it had before.

        A backing that a start has stays, and the claim to it: a guest may have written to it. So does what a guest has
        run with since, and a file that had the domain's mark: it was the domain's, though the ledger did not know it.
        """
        now = self.ledger.find_domain(uuid)
        if now is None:
            return
        before, last = self._with_marked(uuid, state), state.run
        run = self.ledger.find_run(uuid)
        has_run = run is not None and (last is None or run.number != last.number)  # that may be over, too
        ran = has_run and now.allocations != (before.allocations if before else ())
        paths = {path for path, _ in saved_guest.backings_of(run)} if run is not None and ran else set()
        if ran and not paths:  # nobody knows what the guest has run with
            paths = {item.spec.path for item in now.allocations}
        known = before.start if before else None  # what it has was the domain's, or given up, before this define
        paths |= {*now.start.paths} if now.start and (known is None or known.id != now.start.id) else set()
        had = [each for each in made.grown if each.old.path in paths]  # its guest has written to what it got
        before = before and replace(before, allocations=_as_grown(before.allocations, now, had))
        kept = {
            *(item.spec for item in made.created),
            *(item.spec for item in now.allocations if item.spec.path in paths),
        }
        doomed = [item for item in made.created if item.spec.path not in paths]
        wanted = {item.spec for item in doomed}
        if not wanted.isdisjoint(item.spec for item in now.allocations):  # if killed, it is as a define that is killed
            self._put_back_claims(now, before, kept - wanted, wanted, wanted)
        deleted = {item.spec for item in doomed if self._delete(item, now)}
        self._put_back_claims(now, before, kept - deleted, deleted)
        for each in made.grown:
            if each not in had:
                self._undo_growth(uuid, each)

    def _undo_growth(self, uuid: str, grown: Growth) -> None:
        """Take away what a define has put behind an NVDIMM's end, unless a guest has it, or had."""
        record = self.ledger.find_domain(uuid)
        items = record.allocations if record else ()
        if (record and record.start) or not any(item.spec == grown.old for item in items):
            return
        try:
            grown.undo()
        except (NvdimmError, OSError) as error:
            LOG.error("%s stays larger than its NVDIMM: %s", grown.old.path, error)

    def _with_marked(self, uuid: str, state: Before) -> Record | None:
        """Return a domain as the ledger had it, and as marks said that the ledger did not know."""
        recorded = self.ledger.marks_after(uuid, state.event)
        marked = {**dict(reversed(recorded)), **dict(state.marked)}  # the first of each is what was there before
        record, found = state.record, ownership.record_of_marks(self.backings, uuid, marked.items())
        if found is not None:
            found = replace(found, allocations=tuple(self.pools.noted(item) for item in found.allocations))
        if record is None or found is None:
            return record or found
        others = [item for item in record.allocations if item.spec.path not in marked]
        had = [_with_path_of(each, others) for each in found.allocations]
        others = [item for item in others if not ownership.has_bytes(had, item.identity)]
        newest = found if found.changed > record.changed else record
        items = tuple(slots.combined([*had, *others]))
        return replace(record, name=newest.name, ram=newest.ram, dsm=newest.dsm, cache=newest.cache, allocations=items)

    def _put_back_claims(
        self,
        now: Record,
        before: Record | None,
        kept: Container[NvdimmSpec],
        doomed: Container[NvdimmSpec],
        wanted: Collection[NvdimmSpec] = (),
    ) -> None:
        """Let a domain have what it had before, what is kept besides, what its saved guest has, and what is wanted.

        :param now: the domain as the define has stored it.
        :param doomed: what the define has created, and is to be deleted or was.
        :param wanted: what it has intents for from now on, beside those that it had before.
        """
        had = before.allocations if before else ()
        had_paths = {item.spec.path for item in had}
        others = [item for item in now.allocations if item.spec.path not in had_paths]
        saved = self._in_saved_guest(now, [item for item in others if item.spec not in doomed])
        left = [item for item in others if item.spec in kept or item in saved]
        items = (*had, *slots.set_aside(left, {item.spec.slot for item in had}))
        ownership.unmark_dropped(self.ledger, self.backings, now, items)
        stored = self.ledger.find_domain(now.uuid)
        if not (before or items or wanted):
            return self.ledger.give_up(now.uuid)
        record = replace(before or now, allocations=items)
        intents = [*wanted, *(each.spec for each in (before.intents if before else ()) if each.spec not in wanted)]
        has = [each.spec for each in stored.intents] if stored else []
        same = stored and stored == replace(record, start=stored.start, intents=stored.intents, fault=stored.fault)
        if same and (has == intents or not intents):
            if has != intents:
                self.ledger.give_up_intents(now.uuid)
        else:
            times = {item.spec.path: item.changed for item in now.allocations}
            anew = [item for item in items if times.get(item.spec.path) not in (None, item.changed)]  # by the define
            marked = ownership.times_of_marks(self.backings, now.uuid, anew)
            self.ledger.store(
                *(now.uuid, record.name, record.ram, items),
                intents=intents,
                dsm=record.dsm,
                cache=record.cache,
                hot_slots=record.hot_slots,
                marked=marked,
            )
        self._mark(now.uuid)  # what was to be dropped may have lost its mark

    def _delete(self, item: Allocation, record: Record) -> bool:
        """Delete a backing that a define has created; return False when it cannot be deleted.

        It is not deleted if it is another domain's, which may have created it at the same time by another path.
        """
        spec = item.spec
        if ownership.owners_of_bytes(self.ledger, record, item.identity):
            return True
        LOG.debug("delete %s", spec.path)
        try:
            self._backing(spec).discard(spec, item.identity)
        except (NvdimmError, OSError) as error:
            LOG.error("%s stays, and domain %s has it: %s", spec.path, record.name, error)
            return False
        return True

    def give_up_intents(self, uuid: str) -> None:
        """Give up what a define that was killed wanted for a domain; what the domain has stays as it is."""
        with self.locks.storing(uuid):
            self.ledger.give_up_intents(uuid)

    def drop_claims(self, uuid: str) -> None:
        """Give up the claims of a domain redefined without NVDIMMs; those it runs with stay its own until it ends.

        A claim to what has to be overwritten before others may have it stays until it is released, and one to what a
        saved guest has until that is over.
        """
        record = self.ledger.find_domain(uuid)
        if record is not None:
            kept = self._staying(record, record.allocations)
            given_up = [item for item in record.allocations if item not in kept]
            aside = slots.all_aside(kept)
            if given_up or aside != kept or not kept:
                left = replace(record, allocations=(*given_up, *aside))
                ownership.drop(self.ledger, self.backings, left, given_up)
                ownership.mark_if_possible(self.ledger, self.backings, uuid)  # an error means that nothing is given up

    def adopt(self, domain: DomainSpec) -> Record:
        """Return the domain's record, after taking over NVDIMMs that were added or changed without :meth:`define`.

        Domain XML that was rewritten by hand and then defined or edited never went through :meth:`define`. Provisioned
        backings are taken over as they are; none is created here, because libvirt waits with a lock held.

        The domain keeps what the XML lacks: it may be that of a saved image, and the definition has others.

        :raises BackingError: when a backing is not provisioned.
        """
        uuid = uuid_of(domain)
        record = self.ledger.find_domain(uuid)
        if record and self._is_current(domain, record):
            return record
        if record:  # a saved image has the cache of when it was saved
            domain = replace(domain, cache=record.cache, hot_slots=record.hot_slots)
        plan = self._plan_adoption(domain, record)
        with self.locks.storing(uuid):
            self.define(domain, plan, kept=self.others(domain), adopts=True)
        adopted = self.ledger.find_domain(uuid)
        if adopted is None:
            raise LedgerError(f"domain {uuid} vanished from the ledger", hint="define the domain again")
        return adopted

    def _plan_adoption(self, domain: DomainSpec, record: Record | None) -> Plan:
        """Return the plan for an :meth:`adopt` that changes the record; change nothing."""
        found = {spec.path: ownership.identity_at(self.backings, spec.path) for spec in domain.nvdimms}
        self._check_none_lost(record, found)
        for spec in domain.nvdimms:
            intake = self._backing(spec).examine(spec)
            if intake.creates or intake.writes:
                raise BackingError(
                    f"domain {domain.name}: {spec.path} is not provisioned: {human(intake.writes)} still to be written",
                    hint=_MAKES_ZEROS if intake.creates else "define the domain with virsh, through nvdimmd",
                )
        return self.plan(domain, kept=self._others(domain, record), adopts=True)

    def give_up_others(self, domain: DomainSpec) -> None:
        """Give up the domain's claims to NVDIMMs that are not in its XML, but for those that it cannot give up now."""
        record = self.ledger.find_domain(uuid_of(domain))
        others = self._others(domain, record)
        kept = [item.spec.path for item in self._staying(record, others)]
        paths = {item.spec.path for item in others}.difference(kept)
        if record is not None and paths:
            given_up = [item for item in record.allocations if item.spec.path in paths]
            ownership.drop(self.ledger, self.backings, record, given_up)

    def give_up_path(self, uuid: str, path: str) -> None:
        """Give up the domain's claim to one NVDIMM, unless it cannot be given up now."""
        record = self.ledger.find_domain(uuid)
        items = [item for item in (record.allocations if record else ()) if item.spec.path == path]
        if record is not None and items and not self._staying(record, items):
            ownership.drop(self.ledger, self.backings, record, items)

    def others(self, domain: DomainSpec) -> list[Allocation]:
        """Return the domain's NVDIMMs in the ledger that are not in its XML, to be kept besides."""
        return self._others(domain, self.ledger.find_domain(uuid_of(domain)))

    def _others(self, domain: DomainSpec, record: Record | None) -> list[Allocation]:
        """Return the domain's NVDIMMs in the ledger that are not in its XML, by any path.

        One whose slot the XML has for another is set aside until a definition or a start has it again.
        """
        wanted = {spec.path for spec in domain.nvdimms}
        identities = [ownership.identity_at(self.backings, spec.path) for spec in domain.nvdimms]
        left = [
            item
            for item in (record.allocations if record else ())
            if not any(item.identity and item.identity.is_same(identity) for identity in identities)
        ]
        others = [self._by_its_name(item, wanted, left) for item in left]
        return slots.set_aside([*filter(None, others)], {spec.slot for spec in domain.nvdimms})

    def _by_its_name(self, item: Allocation, taken: Container[str], own: Iterable[Allocation]) -> Allocation | None:
        """Return an NVDIMM; if something else takes its name, a device by the name that a boot has given it, if any.

        :param taken: paths that other NVDIMMs of the domain have now.
        :param own: NVDIMMs whose names it may have now, beside those in the pools.
        """
        if item.spec.path not in taken:
            return item
        if item.identity is None or item.identity.inode:
            return None
        names = [
            *(each.spec.path for each in own),
            *(paths.resolve(path) for pool in self.pools for path in pool.paths),
        ]
        for path in names:
            if path not in taken and ownership.identity_at(self.backings, path) == item.identity:
                return replace(item, spec=replace(item.spec, path=path))
        return None

    def _all_kept(self, domain: DomainSpec, before: Record | None, kept: Sequence[Allocation]) -> Sequence[Allocation]:
        """Return NVDIMMs that the domain keeps besides those of its XML, and the others that it cannot give up now.

        The latter are set aside: no guest gets them until a definition or a start has them again.
        """
        others = [item for item in self._staying(before, self._others(domain, before)) if item not in kept]
        return [*kept, *slots.all_aside(others, {item.spec.slot for item in kept})]

    def _noted(self, item: Allocation, before: Record | None) -> Allocation:
        """Return an NVDIMM with what its pool says of it now or, while it is in none, has said before."""
        had = [each for each in (before.allocations if before else ()) if ownership.has_bytes([each], item.identity)]
        return self.pools.noted(replace(item, wipes=any(each.wipes for each in had)), had)

    def _staying(self, record: Record | None, items: Sequence[Allocation]) -> list[Allocation]:
        """Return those NVDIMMs of a domain that it cannot give up now.

        Their bytes have to be overwritten before anybody else may have them, or its saved guest has them.
        """
        saved = self._in_saved_guest(record, items)

        def stays(item: Allocation) -> bool:
            here = ownership.identity_at(self.backings, item.spec.path)
            return item in saved or ((item.ready or here is not None) and self.pools.wipes(item, here))

        return [item for item in items if stays(item)]

    def _in_saved_guest(self, record: Record | None, items: Sequence[Allocation]) -> list[Allocation]:
        """Return those NVDIMMs of a domain that its saved guest has bytes of."""
        had = self._saved(record)
        return [item for item in items if any(item.identity and item.identity.shares_bytes(each) for each in had)]

    def _check_none_lost(self, before: Record | None, found: Mapping[str, BackingIdentity | None]) -> None:
        """Check that what the domain keeps has all its bytes: those of its NVDIMMs, and those to be wiped one day."""
        condition.check_none_lost(self.backings, before, found)
        for item in before.allocations if before else ():
            here = found.get(item.spec.path)
            if ownership.has_bytes([item], here) and self.pools.wipes(item, here):
                check_none_outside(item.spec.path, here, item.identity)

    def _saved(self, record: Record | None) -> list[BackingIdentity]:
        """Return what the domain's saved guest has; nothing without one.

        Its image says that, too: the ledger may come from a backup, and have an earlier run.
        """
        if record is None or not self._is_saved(record):
            return []
        run = self.ledger.find_run(record.uuid)
        if run is None:  # a version that numbered no runs has started it
            return [item.identity for item in record.allocations if item.identity]
        images = [each for each in self.unknown.stored if each.is_saved and each.uuid == record.uuid]
        found = [ownership.identity_at(self.backings, path) for each in images for path in each.paths]
        return [*(identity for _, identity in saved_guest.backings_of(run)), *filter(None, found)]

    def _is_saved(self, record: Record) -> bool:
        return self.is_saved(record.name, record.uuid)

    def _is_current(self, domain: DomainSpec, record: Record) -> bool:
        """Return True if the ledger has the domain, with all its NVDIMMs, as it is to be started."""
        if (domain.ram, domain.name, domain.dsm) != (record.ram, record.name, record.dsm):
            return False
        items = {item.spec: item for item in record.allocations if item.ready and item.base is not None}
        if not {*domain.nvdimms} <= items.keys():
            return False
        identities = [identity for spec in domain.nvdimms if (identity := items[spec].identity)]
        had = self.planner.bases_of_run(domain, identities)
        if any(items[spec].base != had.get(spec.slot, items[spec].base) for spec in domain.nvdimms):
            return False
        return not ownership.find_own_marks(self.ledger, self.backings, domain)

    def find_paths(self, uuid: str | None, named: Iterable[str]) -> dict[str, str]:
        """Return the paths that these lead to now, by these.

        What a domain has at the end of a path that has become a symbolic link since must be what was provisioned.

        :param uuid: of the domain; None when it is new.
        :raises BackingError: when it is not, or a link leads to nothing.
        """
        record = None if uuid is None else self.ledger.find_domain(uuid)
        had = {item.spec.path: item for item in (record.allocations if record else ()) if item.identity}
        found = {path: paths.resolve_new(path) for path in named}
        for path, real in found.items():
            if real != path and path in had:
                self._check_still([had[path]], path, real)
        return found

    def resolve_for_start(self, domain: DomainSpec) -> DomainSpec:
        """Return the domain with resolved paths, as :meth:`define` has recorded them.

        Domain XML that an earlier version or a user has defined without :meth:`define` can have a symbolic link in a
        path. It must lead to what the domain has, if the ledger knows the domain.

        :raises BackingError: when it leads to something else.
        """
        record = self.ledger.find_domain(domain.uuid or "")
        items = [item for item in (record.allocations if record else ()) if item.identity]
        found = self.find_paths(domain.uuid, (spec.path for spec in domain.nvdimms))
        for path, real in found.items():
            if real != path and items:
                self._check_still(items, path, real)
        return domain.with_paths(found)

    def _check_still(self, items: Sequence[Allocation], path: str, real: str) -> None:
        """Check that what a path leads to now is one of these NVDIMMs; raise BackingError if it is not."""
        if not ownership.has_bytes(items, ownership.identity_at(self.backings, real)):
            raise BackingError(
                f"{path} leads to {real} now, which is not the backing that was provisioned",
                hint=f"turn the symbolic link back; to give the domain the other one, define it with {real}",
            )

    def check_unknown(self, domain: DomainSpec, identities: Mapping[str, BackingIdentity | None] | None = None) -> None:
        """Check that no backing of the domain is another's, whatever the ledger says; raise NvdimmError if one is.

        One that is the domain's own by its mark has to have the slot and the sizes in it.

        :param identities: of what the domain is to have, by path; without them, what is there is checked.
        """
        known = identities or {}
        self.unknown.check(domain.uuid or "", {spec.path: known.get(spec.path) for spec in domain.nvdimms})
        ownership.check_own_marks(self.ledger, self.backings, domain)

    def _check_allowed(self, domain: DomainSpec, kept: Sequence[Allocation]) -> set[str]:
        """Check that the domain may have its paths; return those that it has already.

        :param kept: NVDIMMs that the domain keeps besides: they count in quotas.
        """
        before = self.ledger.find_domain(domain.uuid) if domain.uuid else None
        held = ownership.held(self.backings, before)
        for spec in domain.nvdimms:
            if spec.path not in held:  # 0.1.0 allowed every name
                files.check_name(spec.path)
        check_distinct(domain.nvdimms, lambda one, other: one.path == other.path)
        ownership.check_paths(self.ledger, domain, held)
        self.check_unknown(domain)
        self._check_pools(domain, before, held, kept)
        return held

    def _check_pools(
        self, domain: DomainSpec, before: Record | None, held: Container[str], kept: Sequence[Allocation]
    ) -> None:
        """Check what a domain gets anew against the pools, which may have changed since it got the rest.

        :param held: paths that it has already.
        :param kept: NVDIMMs that it keeps besides those of its XML.
        """
        items = before.allocations if before else ()
        had = {item.spec.path: item.spec.size for item in items if item.spec.path in held}
        new = tuple(spec for spec in domain.nvdimms if spec.size > had.get(spec.path, 0))
        has = [*(spec for spec in domain.nvdimms if spec not in new), *(item.spec for item in kept)]
        started = [(each, self.ledger.find_begun(each.start)) for each in self.ledger.started_domains() if each.start]
        has += still_mapped(domain, kept, started)
        self.pools.check(replace(domain, nvdimms=new), self.ledger.each_domain(), has)

    def _settle(
        self,
        plan: Plan,
        domain: DomainSpec,
        before: Record | None,
        kept: Sequence[Allocation],
        provisioned: Mapping[str, BackingIdentity],
        adopts: bool,
        grown: Collection[Growth],
    ) -> None:
        """Record identities, bases and owners, after everything is provisioned.

        :param kept: as for :meth:`define`.
        :param provisioned: the identities of that, by path; zeros were written for hours since, perhaps.
        """
        uuid = uuid_of(domain)
        settled = self.planner.settle(plan, domain, before, adopts=adopts)
        identities = {spec.path: at.identity for spec, at in zip(domain.nvdimms, settled.locations, strict=True)}
        for path, identity in provisioned.items():
            check_same_bytes(path, identities[path], identity)
        self.check_unknown(domain, identities)
        kept = self._all_kept(domain, before, kept)  # the guest may have been saved meanwhile
        items = [
            *(
                self._noted(Allocation(uuid, spec, location.identity, placement.base), before)
                for spec, location, placement in zip(
                    domain.nvdimms, settled.locations, settled.layout.nvdimms, strict=True
                )
            ),
            *(slots.placed(item, settled.layout) for item in kept),
        ]

        def check() -> None:
            self._check_claims(domain, before, identities)
            for each in grown:
                each.check_moved()

        ownership.unmark_dropped(self.ledger, self.backings, before, items)
        self.ledger.store(
            uuid,
            domain.name,
            domain.ram,
            items,
            dsm=domain.dsm,
            cache=domain.cache,
            hot_slots=domain.hot_slots,
            kind="defined",
            check=check,
            marked=ownership.times_of_marks(
                self.backings, uuid, [each for each in items if each.spec.path in identities]
            ),
        )
        self._mark(uuid)

    def _mark(self, uuid: str) -> None:
        """Record the owner on what a domain has in the ledger, with the times that it has there."""
        record = self.ledger.find_domain(uuid)
        if record is not None:
            ownership.mark(self.ledger, self.backings, record)

    def _check_claims(
        self, domain: DomainSpec, before: Record | None, identities: Mapping[str, BackingIdentity | None]
    ) -> None:
        """Check that no other domain has these bytes, and that nobody has changed this one or moved its bytes.

        :param before: the domain as it was.
        :param identities: of what is at the domain's paths; None where nothing is.
        :raises InUseError: when another has, or somebody did.
        """
        uuid = uuid_of(domain)
        now, had = self.ledger.find_domain(uuid), before.allocations if before else ()
        if (now.allocations if now else ()) != had:
            raise InUseError(f"domain {domain.name} was changed by another process meanwhile", hint="try again")
        self._check_not_moved(domain, before, identities)
        self._check_started(domain, now, identities)
        known = {path: identity for path, identity in identities.items() if identity is not None}
        ownership.check_bytes(self.ledger, uuid, known, had)

    def _check_started(
        self, domain: DomainSpec, record: Record | None, identities: Mapping[str, BackingIdentity | None]
    ) -> None:
        """Do what :func:`.redefine.check_started` does, with the run of the domain's start."""
        begun = self.ledger.find_begun(record.start) if record and record.start else None
        check_started(domain, record, begun, identities)

    def _check_not_moved(
        self, domain: DomainSpec, before: Record | None, identities: Mapping[str, BackingIdentity | None]
    ) -> None:
        """Check that what was provisioned for a domain is at its path still, if the domain is to have that.

        Who owns the folder can move a file aside, and a device can have another's name after a boot. The claim to what
        it had would be given up for that, or for zeros; or the guest would have two of its NVDIMMs in each other's
        slots. One that is at another path of the definition, in its slot, was followed there by whoever wrote that.

        :param domain: as it is to be, with all slots.
        :param identities: of what is at the domain's paths; None where nothing is.
        :raises BackingError: when something else is there, or nothing.
        """
        items = before.allocations if before else ()
        for item in items:
            path = item.spec.path
            if before and item.renamed_from in identities and not _is_own(before, identities[item.renamed_from]):
                raise BackingError(
                    f"{item.renamed_from} is another device since a boot: that of the domain in slot {item.spec.slot} "
                    f"is {path} now",
                    hint=f"define the domain with {path}; to give it the other one instead, first "
                    f"{release_of(before.uuid, item.spec.slot)}",
                )
            if path not in identities or item.identity is None:
                continue
            at = [spec for spec in domain.nvdimms if item.identity.begins_as(identities[spec.path])]
            if any(spec.path == path or item.spec.set_aside or spec.slot == item.spec.slot for spec in at):
                continue
            for spec in at:
                raise BackingError(
                    f"{path}: what the domain has in slot {item.spec.slot} is {spec.path} now, and this definition "
                    f"has that in slot {spec.slot}: two names were exchanged",
                    hint=f"define the domain with {spec.path} in slot {item.spec.slot}, and the others of its NVDIMMs "
                    "by their names of now, too; each keeps its slot if <address> is left out. Then other slots can "
                    "be given",
                )
            if item.spec.set_aside and self._by_its_name(item, identities, items):
                continue
            if found := identities[path]:
                check_same_bytes(path, found, item.identity)
            raise BackingError(
                f"{path}: what was provisioned for the domain is not there",
                hint="if it was moved, 'nvdimmctl check' finds it; if not, restore a backup first, if any: "
                f"this then takes what is there, or lets the next define make zeros: {repair_of(path)}",
            )

    def _progress(self, domain: DomainSpec, spec: NvdimmSpec) -> Progress:
        """Return a callback for the writing of zeros: it tells each percent to the ledger, each tenth to the log."""
        uuid, told = uuid_of(domain), -1

        def tell(done: int, total: int) -> None:
            nonlocal told
            percent = 100 * done // total
            if percent == told:
                return
            if percent // 10 > told // 10:
                news = Event(
                    "provisioning", uuid, domain.name, None, {"path": spec.path, "written": done, "bytes": total}
                )
                logs.tell(news)
            told = percent
            self.ledger.record_progress(uuid, spec.slot, percent)

        return tell

    def _backing(self, spec: NvdimmSpec) -> Backing:
        return backing_of(self.backings, spec.path)


def _as_grown(items: Sequence[Allocation], now: Record, grown: Sequence[Growth]) -> tuple[Allocation, ...]:
    """Return NVDIMMs, those that have grown as a domain has them now."""
    paths = {each.old.path for each in grown}
    larger = {item.spec.path: item for item in now.allocations if item.spec.path in paths}
    return tuple(larger.get(item.spec.path, item) for item in items)


def _is_own(record: Record, identity: BackingIdentity | None) -> bool:
    """Return True for what a domain has."""
    return ownership.has_bytes(record.allocations, identity)


def _check_all_there(found: Mapping[str, BackingIdentity | None]) -> None:
    """Check that something is at each path; raise BackingError if not: an :meth:`Definitions.adopt` makes nothing."""
    for path, identity in found.items():
        if identity is None:
            raise BackingError(f"{path}: is not there any more", hint=_MAKES_ZEROS)


def _with_path_of(item: Allocation, others: Iterable[Allocation]) -> Allocation:
    """Return what a mark tells of, with the path that the ledger has for the same bytes: its file was moved since."""
    path = next((each.spec.path for each in others if ownership.has_bytes([each], item.identity)), item.spec.path)
    return replace(item, spec=replace(item.spec, path=path))


def uuid_of(domain: DomainSpec) -> str:
    """Return the domain's uuid.

    :raises LedgerError: when it has none.
    """
    if domain.uuid is None:
        raise LedgerError(f"domain {domain.name} has no uuid", hint="define it in libvirt, which gives it one")
    return domain.uuid
