# SPDX-License-Identifier: Apache-2.0
"""Handling of libvirt's domain calls in the proxy: one table, and a handler for each kind of call.

Arguments and results are those of libvirt's ``src/remote/remote_protocol.x``. Procedures that are not in the
table pass byte for byte. Handlers are generators that do no I/O: they yield calls to libvirtd and work to do, and
return the reply.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from nvdimm_driver import logs
from nvdimm_driver.backing.paths import resolve
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import (
    DomainXmlError,
    LedgerError,
    NvdimmError,
    RefusedError,
    UnansweredError,
    UnsupportedError,
    hint_of,
)
from nvdimm_driver.host_text import escaped
from nvdimm_driver.lifecycle.define import Before, Made
from nvdimm_driver.lifecycle.domain_locks import DomainLocks
from nvdimm_driver.lifecycle.plan import check_distinct
from nvdimm_driver.lifecycle.redefine import may_read
from nvdimm_driver.lock_files import LockFile
from nvdimm_driver.model import DomainSpec, NvdimmSpec, Plan, Record
from nvdimm_driver.rpc import metadata_calls, opening
from nvdimm_driver.rpc.additions import Additions
from nvdimm_driver.rpc.handler_types import Call, Context, Entry, Peer, Pool, ReplyEntry, Table, Work
from nvdimm_driver.rpc.libvirt_calls import (
    Known,
    Steps,
    ask,
    call,
    cannot_migrate,
    current_xml,
    defined_xml,
    definition,
    find,
    has_managed_save,
    is_idle,
    known_definition,
    pass_xml,
    put_back_definition,
    validates,
    xml_and_flags,
)
from nvdimm_driver.rpc.locking import changing
from nvdimm_driver.rpc.memory_calls import AFFECT_CONFIG, AFFECT_LIVE, MemoryCall
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer, RemoteError, Unpacker
from nvdimm_driver.state.events import Event
from nvdimm_driver.xml.client_xml import Added, ClientDevice, ClientDomain, check_room, read_device, read_domain
from nvdimm_driver.xml.definition_files import open_save, uuid_of_save, xml_of_save
from nvdimm_driver.xml.document import decode, parse
from nvdimm_driver.xml.edit_devices import (
    Edit,
    as_named,
    attach,
    by_real_paths,
    detach,
    in_slot,
    paths_in,
    update,
    with_paths,
    with_slots,
    with_uuid,
    without_max_memory,
)
from nvdimm_driver.xml.hooks import XmlHooks
from nvdimm_driver.xml.parse_domain import DefinedMemory, check_started_ram, extract, has_nvdimms, memory_of
from nvdimm_driver.xml.rewrite import record_with, record_without

LOG = logging.getLogger(__name__)

MIGRATE_PARAMS_MAX = 64
"""REMOTE_DOMAIN_MIGRATE_PARAM_LIST_MAX."""

# include/libvirt/libvirt-domain.h
START_FORCE_BOOT = 1 << 3
MIGRATE_DEST_XML = "destination_xml"

WAIT_SECONDS = 0.2
"""Between two looks at what a guest has done."""
PLUG_WAITS, EJECT_WAITS = 50, 100
"""Most looks after an NVDIMM was plugged, and after the guest was asked to eject one."""

T = TypeVar("T")


class Interceptor:
    """The handlers of calls.

    :param driver: makes a driver, in the thread that uses it; its ledger is closed afterwards.
    :param save_dir: libvirt's folder of managed saves; empty when nobody knows it.
    :param client: whose call is handled.
    :param additions: what the calls of all clients add.
    """

    def __init__(
        self,
        driver: Callable[[], XenNvdimmDriver],
        hooks: XmlHooks,
        save_dir: str = "",
        client: Peer | None = None,
        additions: Additions | None = None,
    ) -> None:
        self._make_driver = driver
        self._hooks = hooks
        self._save_dir = save_dir
        self._client = client
        self._additions = additions or Additions()

    def table(self, *, read_only: bool = False) -> Table:
        """Return the table for clients of the read-only socket, or of the other one."""
        return {number: self._entry(row, number) for number, row in TABLE.items() if row.read_only or not read_only}

    def _entry(self, row: Row, number: int) -> Entry | ReplyEntry:
        handler = partial(self._handle, row, number)
        return ReplyEntry(handler, self._hooks.may_restore) if row.is_reply else Entry(handler, opens=row.opens)

    def _handle(self, row: Row, procedure: int, context: Context, payload: bytes) -> Steps:
        LOG.debug("%s, called by uid %d, pid %d", Procedure(procedure).name.lower(), context.peer.uid, context.peer.pid)
        for_client = Interceptor(self._make_driver, self._hooks, self._save_dir, context.peer, self._additions)
        return row.handler(for_client, procedure, payload)

    # --- XML that comes in ---

    def define(self, procedure: int, payload: bytes) -> Steps:
        """Rewrite the XML, and provision the NVDIMMs before the reply; if that fails, nothing is defined."""
        return (yield from self._define(procedure, payload))

    def create(self, procedure: int, payload: bytes) -> Steps:
        """Provision the NVDIMMs before libvirt gets the rewritten XML: the guest runs before the reply."""
        xml, flags = xml_and_flags(payload)
        read = yield from self._read(xml, validate=validates(procedure, flags))
        wanted = read.domain
        if wanted is None:
            payload = yield from self._without_remains(payload, read)
            started = pass_xml(procedure, payload, read, with_fds=True)
            created = DomainRef(read.name, read.uuid, -1) if read.uuid else None
            if created is None or not (yield from has_managed_save(created, self._save_dir)):
                return (yield from started)
            # its saved guest, which libvirt starts instead, may have some
            return (yield from self._started_from_save(created, started))
        resolved, wanted = yield from self._resolved_domain(read.text, wanted)
        domain: DomainSpec = yield self._work(lambda driver: driver.identify(wanted), Pool.HOST)
        with (yield from self._changing(domain.uuid or "")):
            plan = yield from self._plan(domain)
            rewritten = yield from self._rewritten(resolved, domain.uuid, plan)
            saved: bool = yield from self._check_saved(plan)
            arguments = bytes(Packer().string(rewritten)) + flags
            return (yield from self._create(procedure, arguments, domain, plan, saved=saved))

    def _create(self, procedure: int, arguments: bytes, domain: DomainSpec, plan: Plan, *, saved: bool) -> Steps:
        """Provision the NVDIMMs, and make the call; if that fails, put back what the domain had before.

        :param saved: the domain has a managed save, which libvirt starts.
        """
        uuid = domain.uuid or ""
        yield self._work(lambda driver: driver.clear_fault(uuid))
        before: Before = yield self._work(lambda driver: driver.state_of(uuid, domain))
        found = yield from find(uuid)
        if found and (found.name != domain.name or (yield from ask(Procedure.DOMAIN_IS_ACTIVE, found))):
            return (yield from call(procedure, arguments, with_fds=True))  # libvirt refuses it: nothing is changed
        made = yield self._work(lambda driver: driver.create(domain, plan), _provisioning(plan))
        try:
            if saved:
                yield from self._try_restore(DomainRef(domain.name, uuid, -1))
            reply = yield from call(procedure, arguments, with_fds=True)
        except Exception as error:
            explained = (yield from self._explained(error, uuid)) if isinstance(error, LibvirtError) else error
            try:
                over = yield from self._find_abandoned(uuid, before.record)
                yield self._work(lambda driver: driver.undo(uuid, before, made, over), Pool.HOST)
            except (NvdimmError, OSError) as failed:
                LOG.error("domain %s: what it had before its create failed cannot be put back: %s", uuid, failed)
            raise explained from error
        if found is None:  # no definition has NVDIMMs of its own
            try:
                yield self._work(lambda driver: driver.give_up_others(domain), Pool.HOST)
            except (NvdimmError, OSError) as failed:
                LOG.error("domain %s keeps NVDIMMs that it was created without: %s", uuid, failed)
        return reply

    def to_native(self, procedure: int, payload: bytes) -> Steps:
        """Rewrite the XML: the configuration in the reply names the device model, for xl to run."""
        values = Unpacker(payload)
        kind, xml, flags = values.string(), values.encoded(), values.uint32()
        values.end()
        read = yield from self._read(xml)
        if read.domain is not None:
            rewritten: str = yield Work(lambda: self._hooks.rewrite(read.text), Pool.XML)
            payload = bytes(Packer().string(kind).string(rewritten).uint32(flags))
        return (yield from pass_xml(procedure, payload, read))

    # --- XML that goes out ---

    def got_xml(self, procedure: int, reply: bytes) -> Steps:
        """Restore the XML in the reply."""
        del procedure
        values = Unpacker(reply)
        xml = values.string()
        values.end()
        return bytes(Packer().string((yield from self._restored(xml))))

    # --- devices ---

    def attach_device(self, procedure: int, payload: bytes) -> Steps:
        """Add an NVDIMM to the definition or to the running guest, or to both, and provision it."""
        return (yield from self._change(procedure, payload, "attached to", as_named(attach), self._plug))

    def detach_device(self, procedure: int, payload: bytes) -> Steps:
        """Remove an NVDIMM from the definition, or have the running guest eject it, or both; keep its data."""
        return (yield from self._change(procedure, payload, "detached from", by_real_paths(detach), self._unplug))

    def update_device(self, procedure: int, payload: bytes) -> Steps:
        """Change an NVDIMM in the definition; refuse to change a running domain."""
        return (yield from self._change(procedure, payload, "changed in", by_real_paths(update)))

    def _change(
        self,
        procedure: int,
        payload: bytes,
        what: str,
        edit: Edit,
        change_guest: Callable[[DomainRef, str, bool], Steps] | None = None,
    ) -> Steps:
        """Change an NVDIMM of a domain.

        :param change_guest: does it in the running guest and, if the last argument is true, in the definition.
        """
        values = Unpacker(payload)
        domain, xml = values.domain(), values.encoded()
        flags = AFFECT_LIVE if procedure in LIVE_DEVICE_CALLS else values.uint32()
        values.end()
        device: ClientDevice = yield Work(lambda: read_device(xml), Pool.XML)
        if not device.is_nvdimm:
            passed = call(procedure, payload)
            return (yield from (passed if procedure in DETACH_CALLS else self._added(domain, device.added, passed)))
        active = yield from ask(Procedure.DOMAIN_IS_ACTIVE, domain)
        live = bool(flags & AFFECT_LIVE) or (active and not flags & AFFECT_CONFIG)
        persistent = yield from ask(Procedure.DOMAIN_IS_PERSISTENT, domain)
        if (live and not active) or (flags & AFFECT_CONFIG and not persistent):
            return (yield from call(procedure, payload))  # libvirtd refuses it, whatever the device
        if live and change_guest and (yield self._work(lambda driver: driver.has_slots(domain.uuid), Pool.HOST)):
            return (yield from change_guest(domain, device.text, bool(flags & AFFECT_CONFIG)))
        if live:
            raise UnsupportedError(
                f"an NVDIMM cannot be {what} the running domain {domain.name}",
                hint="--config changes the definition, which its next start takes",
            )
        with (yield from self._changing(domain.uuid)):
            before = yield from self._restored((yield from definition(domain)))
            named: list[str] = yield Work(lambda: [*paths_in(before), *paths_in(device.text)], Pool.XML)
            found = yield from self._find_paths(domain.uuid, named)
            changed: str = yield Work(lambda: edit(before, device.text, found), Pool.XML)
            yield from self._define(Procedure.DOMAIN_DEFINE_XML, bytes(Packer().string(changed)), locked=domain.uuid)
        return b""

    def _plug(self, domain: DomainRef, device: str, persistent: bool) -> Steps:
        """Provision an NVDIMM and plug it into the running guest; wait a little for the guest to take it.

        libvirt's XML of the guest lacks nothing that the guest has: it is changed before that, or after an ejection.

        :param persistent: add it to the definition, too.
        """
        uuid = domain.uuid
        with (yield from self._changing(uuid)):
            raw = yield from self._settled(domain)
            before = yield from self._restored(raw)
            defined = (yield from self._restored((yield from definition(domain)))) if persistent else ""
            named: list[str] = yield Work(lambda: [*paths_in(before), *paths_in(device)], Pool.XML)
            found = yield from self._find_paths(uuid, named)
            real: str = yield Work(
                lambda: with_paths(device, {each: found[each] for each in paths_in(device)}), Pool.XML
            )
            (path,) = yield Work(lambda: paths_in(real), Pool.XML)
            wanted: DomainSpec = yield Work(lambda: _extracted(attach(before, real)), Pool.XML)
            others: tuple[int, ...] = yield Work(lambda: _slots_of(defined), Pool.XML)
            guest: DomainSpec = yield self._work(
                lambda driver: driver.check_plug(uuid, wanted, path, others), Pool.HOST
            )
            (slot,) = (spec.slot for spec in guest.nvdimms if spec.path == path)
            placed: str = yield Work(lambda: in_slot(real, slot), Pool.XML)
            known = yield from known_definition(uuid)
            state: Before = yield self._work(lambda driver: driver.state_of(uuid, guest), Pool.HOST)
            made = Made()
            try:
                if persistent:
                    changed: str = yield Work(lambda: attach(defined, placed), Pool.XML)
                    arguments, place = bytes(Packer().string(changed)), (path, guest.plugged_above)
                    _, made = yield from self._defined(Procedure.DOMAIN_DEFINE_XML, arguments, uuid, place)
                else:
                    plan = yield from self._plan(guest)
                    made = yield self._work(lambda driver: driver.create(guest, plan), _provisioning(plan))
                record: str = yield Work(lambda: record_with(raw, parse(placed).root), Pool.XML)
                yield from metadata_calls.set_live_record(domain, record)
                yield self._work(lambda driver: driver.plug(uuid, guest, path), Pool.HOST)
            except Exception:
                yield from self._take_back(domain, known if persistent else None, state, made)
                raise
            for _ in range(PLUG_WAITS):
                if (yield self._work(lambda driver: driver.has_taken(uuid, slot), Pool.HOST, WAIT_SECONDS)):
                    return b""
        event = Event("plug-unanswered", uuid, domain.name, None, {"path": path, "slot": slot})
        yield Work(lambda: logs.tell(event))
        return b""

    def _take_back(
        self, domain: DomainRef, known: Known | None, state: Before, made: Made
    ) -> Generator[Call | Work, Any, None]:
        """Undo what :meth:`_plug` has done before the guest got the NVDIMM."""
        uuid = domain.uuid
        try:
            if known is not None:
                yield from put_back_definition(uuid, known)
            yield self._work(lambda driver: driver.undo(uuid, state, made, None), Pool.HOST)
            yield from self._settled(domain)
        except (NvdimmError, OSError, LibvirtError) as failed:
            LOG.error("domain %s: what it had before an NVDIMM was attached cannot be put back: %s", uuid, failed)

    def _unplug(self, domain: DomainRef, device: str, persistent: bool) -> Steps:
        """Have the running guest eject an NVDIMM, and wait for that.

        :param persistent: remove it from the definition, too.
        :raises UnansweredError: when the guest has not ejected it in time; it may do so later.
        """
        uuid, edit = domain.uuid, by_real_paths(detach)
        with (yield from self._changing(uuid)):
            before = yield from self._restored((yield from current_xml(domain)))
            defined = (yield from self._restored((yield from definition(domain)))) if persistent else ""
            named: list[str] = yield Work(lambda: [*paths_in(before), *paths_in(device)], Pool.XML)
            found = yield from self._find_paths(uuid, named)
            left: str = yield Work(lambda: edit(before, device, found), Pool.XML)
            changed: str = yield Work(lambda: edit(defined, device, found) if persistent else "", Pool.XML)
            has: list[str] = yield Work(lambda: paths_in(left), Pool.XML)
            had: list[str] = yield Work(lambda: [found[each] for each in paths_in(before)], Pool.XML)
            (real,) = {*had}.difference(has)
            gone: bool = yield self._work(lambda driver: driver.put_away_ejected(uuid, real), Pool.HOST)
            if not gone:
                yield self._work(lambda driver: driver.ask_to_eject(uuid, real), Pool.HOST)
            for _ in range(EJECT_WAITS):
                if gone:
                    break
                gone = yield self._work(lambda driver: driver.put_away_ejected(uuid, real), Pool.HOST, WAIT_SECONDS)
            if not gone:
                raise UnansweredError(
                    f"the guest of domain {domain.name} has been asked to eject the NVDIMM {real}, and has not done so "
                    f"within {EJECT_WAITS * WAIT_SECONDS:.0f} s",
                    hint="in the guest, unmount what is on it and eject it; then detach it again",
                )
            yield from self._settled(domain)
            if persistent:
                yield from self._define(Procedure.DOMAIN_DEFINE_XML, bytes(Packer().string(changed)), locked=uuid)
            else:
                now = yield from defined_xml(uuid)
                if now is None or real not in (yield Work(lambda: paths_in(self._hooks.restore(now)), Pool.DUMP)):
                    yield self._work(lambda driver: driver.give_up_claim(uuid, real), Pool.HOST)
        return b""

    def save(self, procedure: int, payload: bytes) -> Steps:
        """Pass the call; first let libvirt's XML of the guest, which goes into the image, have what the guest has.

        A guest is saved all the same if that fails: its host may be going down.
        """
        domain = Unpacker(payload).domain()
        try:
            record = yield from self._record(domain)
            if record is not None and record.start is not None and record.start.hot_slots:
                with (yield from self._changing(domain.uuid)):
                    yield from self._settled(domain)
        except (NvdimmError, OSError, LibvirtError) as failed:
            LOG.warning("domain %s is saved, and what its guest has ejected is not put away: %s", domain.name, failed)
        return (yield from call(procedure, payload))

    def _settled(self, domain: DomainRef) -> Generator[Call | Work, Any, str]:
        """Put away what a running guest has ejected; return libvirt's XML of it, in which only what it has is left."""
        uuid = domain.uuid
        has: tuple[str, ...] | None = yield self._work(lambda driver: driver.settle_guest(uuid), Pool.HOST)
        raw = yield from current_xml(domain)
        if has is None:
            return raw
        known = has
        gone: list[str] = yield Work(
            lambda: [each for each in paths_in(self._hooks.restore(raw)) if resolve(each) not in known], Pool.DUMP
        )
        less: str | None = yield Work(lambda: record_without(raw, gone) if gone else None, Pool.XML)
        if less is not None:
            yield from metadata_calls.set_live_record(domain, less)
            raw = yield from current_xml(domain)
        return raw

    def set_metadata(self, procedure: int, payload: bytes) -> Steps:
        """Pass metadata that are not ours, if the domain's XML has room for them."""
        new = yield from metadata_calls.new_metadata(payload)
        passed = call(procedure, payload)
        return (yield from (passed if new.added is None else self._added(new.domain, new.added, passed)))

    def _added(self, domain: DomainRef, added: Added, passed: Steps) -> Steps:
        """Make the call that adds to a domain's XML, if that of its definition and of its guest has room for it.

        There has to be room for what all calls add that have begun before it, too.
        """
        with self._additions.count(domain.uuid, added) as all_added:
            for ask_xml in (definition, current_xml):
                xml = yield from ask_xml(domain)
                yield Work(partial(check_room, xml, all_added), Pool.XML)
            return (yield from passed)

    # --- a domain's life ---

    def start(self, procedure: int, payload: bytes) -> Steps:
        """Pass the call; if the start fails because of the NVDIMMs, add the reason to the error.

        libvirt removes a managed save before it restores it: what would keep the guest from going on is asked first.
        """
        values = Unpacker(payload)
        domain = values.domain()
        uuid, flags = domain.uuid, values.uint32() if procedure == Procedure.DOMAIN_CREATE_WITH_FLAGS else 0
        record: Record | None = yield self._work(lambda driver: driver.clear_fault(uuid))
        saved = not flags & START_FORCE_BOOT and (yield from has_managed_save(domain, self._save_dir))
        start = call(procedure, payload)
        if record is None:
            return (yield from (self._started_from_save(domain, start) if saved else start))
        is_plain = not saved and not (yield from self._has_nvdimms((yield from definition(domain))))
        try:
            reply = yield from (self._started_from_save(domain, start) if saved else start)
        except LibvirtError as error:
            raise (yield from self._explained(error, uuid)) from error
        if is_plain:
            try:
                with (yield from self._changing(uuid)):
                    record = yield from self._record(domain)
                    if record is not None and record.start is None:  # they were kept for a saved guest
                        yield from self._drop_claims(uuid, uuid)
            except (NvdimmError, OSError, LibvirtError) as failed:
                LOG.error("domain %s keeps NVDIMMs that it was started without: %s", uuid, failed)
        return reply

    def _started_from_save(self, domain: DomainRef, start: Steps) -> Steps:
        """Make the call that starts a domain from its managed save, if it still has one, and can go on.

        libvirt removes the save before the hook prepares the start. So the domain has to be as it was tried until the
        reply: neither a change of it nor another trial may come between.
        """
        with (yield from self._changing(domain.uuid)):
            if (yield from has_managed_save(domain, self._save_dir)):
                yield from self._try_restore(domain)
            return (yield from start)

    def has_managed_save(self, procedure: int, payload: bytes) -> Steps:
        """Answer as a start goes: libvirt does not know of each image that it would start from.

        virsh asks this before it removes one.
        """
        domain = Unpacker(payload).domain()
        reply = yield from call(procedure, payload)
        if Unpacker(reply).int32() == 1:
            return reply
        return bytes(Packer().int32(int((yield from has_managed_save(domain, self._save_dir)))))

    def _try_restore(self, domain: DomainRef) -> Generator[Call | Work, Any, None]:
        """Check that a saved guest can go on, with the XML in its image: that is what libvirt gives the hook.

        :raises NvdimmError: when it cannot.
        """
        known = (yield from find(domain.uuid)) or domain
        file = Path(self._save_dir, f"{known.name}.save")  # the client's word for it can be any path
        is_name = self._save_dir and "/" not in known.name
        xml: str | None = yield Work(lambda: xml_of_save(file) if is_name else None, Pool.HOST)
        saved: DomainSpec | None = None
        if xml is not None:
            text = xml
            saved = yield Work(lambda: self._saved_domain(text), Pool.DUMP)
        elif (yield from self._record(domain)) or (yield from self._has_nvdimms((yield from definition(domain)))):
            yield self._work(lambda driver: driver.try_restore(domain.uuid), Pool.HOST)
        if saved is not None:
            guest = saved
            yield self._work(lambda driver: driver.try_restore(domain.uuid, guest), Pool.HOST)

    def _saved_domain(self, xml: str) -> DomainSpec | None:
        """Return the domain in an image; None without NVDIMMs. What the hook checks of its XML is checked here."""
        saved = extract(self._hooks.restore(xml), stored=True)
        if saved is not None:
            check_started_ram(parse(xml).root)
        return saved

    def restore(self, procedure: int, payload: bytes) -> Steps:
        """Pass the call; if it fails because of NVDIMMs, add the reason to the error.

        A start takes over the NVDIMMs of the image. One that fails gives them up, unless their marks say that they were
        the domain's. The image says which domain that is: others may be started, and fail, meanwhile.

        What cannot be read here is refused: libvirtd would read what is at the path by then.
        libvirtd gets a path that leads to the file that was read. The client's could lead to another one by then: to
        another domain's image, or to a FIFO, for which libvirtd waits, and the domain stays locked.
        """
        values = Unpacker(payload)
        file, flags = Path(values.string()), values.rest()
        try:
            image: BinaryIO = yield Work(lambda: open_save(file), Pool.HOST)
        except OSError as error:
            leased = "a program has a lease on it: try again" if isinstance(error, BlockingIOError) else ""
            raise RefusedError(f"{escaped(str(file))}: {error.strerror}", hint=leased or hint_of(error)) from error
        with image:
            uuid: str = yield Work(lambda: uuid_of_save(image), Pool.HOST)
            if not uuid:
                no_image = f"{escaped(str(file))}: is no image of a saved guest that libvirt can read"
                raise RefusedError(no_image, hint="is it whole?")
            same_file = Packer().string(f"/proc/{os.getpid()}/fd/{image.fileno()}")
            return (yield from self._restored_guest(uuid, call(procedure, bytes(same_file) + flags)))

    def _restored_guest(self, uuid: str, restored: Steps) -> Steps:
        """Make the call that restores a domain's guest; if it fails, undo what its start has done."""
        with (yield from self._changing(uuid)):
            yield self._work(lambda driver: driver.clear_fault(uuid))
            before: Before = yield self._work(lambda driver: driver.state_of(uuid))
            try:
                return (yield from restored)
            except LibvirtError as error:
                explained = yield from self._explained(error, uuid)
                try:
                    yield from self._undo_restore(uuid, before)
                except (NvdimmError, OSError, LibvirtError) as failed:
                    LOG.error("domain %s keeps the NVDIMMs of a saved guest that was refused: %s", uuid, failed)
                raise explained from error

    def _undo_restore(self, uuid: str, before: Before) -> Generator[Call | Work, Any, None]:
        """Give up what the start of a saved guest took over, but for files that had the domain's mark before."""
        over = yield from self._find_abandoned(uuid, before.record)
        if before.record is not None or (yield from find(uuid)) is None:
            yield self._work(lambda driver: driver.undo(uuid, before, Made(), over), Pool.HOST)

    def undefine(self, procedure: int, payload: bytes) -> Steps:
        """Pass the call, and record an event: the domain's data stay, and so does its claim to them."""
        domain = Unpacker(payload).domain()
        yield from self._check_known(domain.uuid)
        record = yield from self._record(domain)
        if record is None:
            return (yield from call(procedure, payload))
        with (yield from self._changing(record.uuid)):
            reply = yield from call(procedure, payload)
            paths = ", ".join(item.spec.path for item in record.allocations)
            yield self._work(lambda driver: driver.ledger.record_event("undefined", record.uuid, {"kept": paths}))
        return reply

    def migrate(self, procedure: int, payload: bytes) -> Steps:
        """Refuse to migrate a domain with NVDIMMs."""
        domain = Unpacker(payload).domain()
        record = yield from self._record(domain)
        known = record is not None and (record.claims or record.start)
        if known or (yield from self._runs_with_nvdimms(domain)):
            raise cannot_migrate(f"domain {domain.name}")
        return (yield from call(procedure, payload))

    def _runs_with_nvdimms(self, domain: DomainRef) -> Generator[Call | Work, Any, bool]:
        """Return True if a domain has NVDIMMs now by libvirt's XML, whatever the ledger says, which may be lost."""
        return (yield from self._has_nvdimms((yield from current_xml(domain))))

    def migrate_in(self, procedure: int, payload: bytes) -> Steps:
        """Refuse a migration to this host of a domain with NVDIMMs, or with XML that no domain may be defined with."""
        values = Unpacker(payload)
        for param in values.typed_params(MIGRATE_PARAMS_MAX):
            if param.field != MIGRATE_DEST_XML:
                continue
            xml = str(param.value).encode(errors="surrogateescape")
            if (yield Work(partial(self._comes_with_nvdimms, xml), Pool.XML)):
                raise cannot_migrate("the domain that comes")
            yield from self._read(xml)
        return (yield from call(procedure, payload))

    def set_memory(self, procedure: int, payload: bytes) -> Steps:
        """Refuse RAM that leaves no room for the NVDIMMs, or would be populated on demand at the next start."""
        asked = MemoryCall.unpack(procedure, payload)
        record = yield from self._record(asked.domain)
        if record is None or not (record.allocations or record.start):
            if (yield from self._runs_with_nvdimms(asked.domain)):
                raise LedgerError(
                    f"domain {asked.domain.name} has NVDIMMs that the ledger does not know: nobody knows whether that "
                    "RAM leaves them room",
                    hint="'nvdimmctl check --repair' writes them into it",
                )
            return (yield from call(procedure, payload))
        runs = record.start is not None
        if asked.is_maximum and asked.is_live(runs):
            yield self._work(lambda driver: driver.check_running_ram(record.uuid, asked.size), Pool.HOST)
        elif runs and asked.is_live(runs):
            asked.check_saveable(record.ram)
        if asked.is_persistent(runs):
            yield from self._check_next_ram(asked, runs)
        return (yield from call(procedure, payload))

    def _check_next_ram(self, asked: MemoryCall, runs: bool) -> Generator[Call | Work, Any, None]:
        """Check the RAM of a domain's next start with its definition: the ledger may have more NVDIMMs than that."""
        xml = yield from self._restored((yield from definition(asked.domain)))
        defined: DefinedMemory | None = yield Work(lambda: memory_of(xml), Pool.XML)
        if defined is None:
            return
        asked.check_populated(defined)
        if asked.is_maximum:
            uuid, paths, size = asked.domain.uuid, defined.paths, asked.size
            yield self._work(lambda driver: driver.check_ram(uuid, paths, size), Pool.HOST)
            if runs:
                asked.check_startable(defined.current)

    def _comes_with_nvdimms(self, xml: bytes) -> bool:
        return has_nvdimms(self._hooks.restore(decode(xml)))

    # --- shared by handlers ---

    def _work(self, run: Callable[[XenNvdimmDriver], T], pool: Pool = Pool.LEDGER, delay: float = 0.0) -> Work:
        def with_driver() -> T:
            driver = self._make_driver()
            with closing(driver):
                return run(driver)

        return Work(with_driver, pool, delay)

    def _record(self, domain: DomainRef) -> Generator[Call | Work, Any, Record | None]:
        return (yield from self._record_of(domain.uuid))

    def _record_of(self, uuid: str) -> Generator[Call | Work, Any, Record | None]:
        record: Record | None = yield self._work(lambda driver: driver.ledger.find_domain(uuid))
        return record

    def _read(self, xml: bytes, *, validate: bool = False) -> Generator[Call | Work, Any, ClientDomain]:
        """Return what :func:`.client_xml.read_domain` does for a client's XML."""
        device_model = self._hooks.device_model
        read: ClientDomain = yield Work(lambda: read_domain(xml, device_model, validate=validate), Pool.XML)
        return read

    def _plan(self, domain: DomainSpec) -> Generator[Call | Work, Any, Plan]:
        """Return the plan for a define; raise any error that a define raises before it changes anything."""

        def reads(driver: XenNvdimmDriver) -> bool:
            before = driver.ledger.find_domain(driver.identify(domain).uuid or "")
            return may_read(domain, before, driver.backings)

        is_long: bool = yield self._work(reads, Pool.HOST)
        plan: Plan = yield self._work(lambda driver: driver.check(domain), Pool.ZEROS if is_long else Pool.HOST)
        return plan

    def _rewritten(self, xml: str, uuid: str | None, plan: Plan) -> Generator[Call | Work, Any, str]:
        """Return a client's XML as libvirt gets it, with the slots of its plan and, if it has none, with a uuid."""

        def rewrite() -> str:
            identified = with_uuid(xml, uuid) if uuid else xml
            return self._hooks.rewrite(with_slots(identified, plan.domain))

        rewritten: str = yield Work(rewrite, Pool.XML)
        return rewritten

    def _restored(self, xml: str) -> Generator[Call | Work, Any, str]:
        """Return libvirt's XML as its user wrote it."""
        restored: str = yield Work(lambda: self._hooks.restore(xml), Pool.DUMP)
        return restored

    def _has_nvdimms(self, xml: str) -> Generator[Call | Work, Any, bool]:
        """Return True if libvirt's XML is of a domain with NVDIMMs."""
        found: bool = yield Work(lambda: has_nvdimms(self._hooks.restore(xml)), Pool.DUMP)
        return found

    def _check_known(self, uuid: str | None) -> Generator[Call | Work, Any, None]:
        """Check that a call may take a domain's NVDIMMs from libvirt's definition: perhaps only that knows of them.

        :raises LedgerError: when it has some, and the ledger comes from elsewhere.
        """
        if uuid is None or not (yield self._work(lambda driver: driver.ledger.is_from_elsewhere())):
            return
        defined = yield from defined_xml(uuid)
        if defined is not None and (yield from self._has_nvdimms(defined)):
            yield self._work(lambda driver: driver.ledger.check_own())

    def _find_abandoned(self, uuid: str, before: Record | None) -> Generator[Call | Work, Any, Record | None]:
        """Return a domain that has a start since then, if nobody goes on with it: libvirt does not start the domain.

        It can be that of another call, which libvirt may have begun as soon as ours had failed.
        """
        now: Record | None = yield self._work(lambda driver: driver.ledger.find_domain(uuid))
        if now is None or now.start is None or (before and before.start and before.start.id == now.start.id):
            return None
        return now if (yield from is_idle(uuid)) else None

    def _changing(self, uuid: str) -> Generator[Call | Work, Any, LockFile]:
        """Take the lock of a domain: no other client changes it, or starts it from a save, until this call is done."""
        locks: DomainLocks = yield self._work(lambda driver: driver.locks)
        return (yield from changing(locks, uuid, self._client))

    def _drop_claims(self, uuid: str, locked: str | None = None) -> Generator[Call | Work, Any, None]:
        """Give up the domain's claims, unless another client has defined it with NVDIMMs meanwhile.

        :param locked: uuid of the domain whose lock the caller has.
        """
        with nullcontext() if uuid == locked else (yield from self._changing(uuid)):
            now = yield from defined_xml(uuid)
            if now is not None and not (yield from self._has_nvdimms(now)):
                yield self._work(lambda driver: driver.drop_claims(uuid), Pool.HOST)

    def _define(self, procedure: int, payload: bytes, locked: str | None = None) -> Steps:
        """Do what :meth:`_defined` does, and return libvirtd's reply."""
        return (yield from self._defined(procedure, payload, locked))[0]

    def _defined(
        self, procedure: int, payload: bytes, locked: str | None, plugged: tuple[str, int] = ("", 0)
    ) -> Generator[Call | Work, Any, tuple[bytes, Made]]:
        """Define a domain, with its lock from before libvirt's definition is read.

        :param locked: uuid of the domain whose lock the caller has.
        :param plugged: as in :class:`.model.DomainSpec`: the path, and the address that it goes behind.
        """
        xml, flags = xml_and_flags(payload)
        read = yield from self._read(xml, validate=validates(procedure, flags))
        domain = read.domain
        if domain is None:
            yield from self._check_known(read.uuid)
            return (yield from self._define_plain(procedure, payload, read, locked)), Made()
        resolved, domain = yield from self._resolved_domain(read.text, domain)
        domain = replace(domain, plugged=plugged[0], plugged_above=plugged[1])
        uuid: str = yield self._work(lambda driver: driver.identify(domain).uuid, Pool.HOST)
        with nullcontext() if uuid == locked else (yield from self._changing(uuid)):
            plan = yield from self._plan(domain)
            yield from self._check_saved(plan)
            before = yield from known_definition(uuid)
            if before.xml is not None and domain.uuid is None:
                raise DomainXmlError(
                    f"domain {domain.name} already exists with uuid {uuid}", hint="write its <uuid> into the XML"
                )
            rewritten = yield from self._rewritten(resolved, uuid, plan)
            identified = replace(domain, uuid=uuid)
            had: tuple[NvdimmSpec, ...] = yield self._work(lambda driver: driver.begin(identified, plan), Pool.HOST)
            try:
                reply = yield from call(procedure, bytes(Packer().string(rewritten)) + flags)
                made: Made = yield self._work(lambda driver: driver.define(identified, plan), _provisioning(plan))
            except Exception:
                if (yield from put_back_definition(uuid, before)):
                    yield from self._cancel(identified, had)
                raise
            return reply, made

    def _define_plain(self, procedure: int, payload: bytes, read: ClientDomain, locked: str | None) -> Steps:
        """Define a domain without NVDIMMs, which gives up those that it had, with its lock if the ledger knows it."""
        uuid = read.uuid if read.uuid and (yield from self._record_of(read.uuid)) else None
        with nullcontext() if uuid is None or uuid == locked else (yield from self._changing(uuid)):
            before = None if uuid is None else (yield from known_definition(uuid))
            reply = yield from pass_xml(procedure, (yield from self._without_remains(payload, read)), read)
            defined = Unpacker(reply).domain()
            try:
                known = yield from self._record(defined)
                # a saved guest has them still
                if known is not None and not (yield from has_managed_save(defined, self._save_dir)):
                    yield from self._drop_claims(defined.uuid, uuid or locked)
            except (NvdimmError, OSError, LibvirtError) as failed:
                if uuid is not None and before is not None:
                    yield from put_back_definition(uuid, before)
                    raise
                # of another client, who defines it with NVDIMMs meanwhile
                LOG.error("domain %s keeps NVDIMMs that it was defined without: %s", defined.uuid, failed)
            return reply

    def _cancel(self, domain: DomainSpec, had: Sequence[NvdimmSpec]) -> Generator[Call | Work, Any, None]:
        """Give up what a define wants that has failed; the client gets the error that is the reason."""
        try:
            yield self._work(lambda driver: driver.cancel(domain, had))
        except (NvdimmError, OSError) as failed:
            LOG.error(
                "domain %s: what its define wanted stays until 'nvdimmctl check --repair': %s", domain.uuid, failed
            )

    def _resolved_domain(self, xml: str, domain: DomainSpec) -> Generator[Call | Work, Any, tuple[str, DomainSpec]]:
        """Return a client's XML, and its domain, with the paths that those of its NVDIMMs lead to now.

        libvirt keeps them: a user can turn a symbolic link of his own at any moment.
        """
        known: DomainSpec = yield self._work(lambda driver: driver.definitions.identify_by_name(domain), Pool.HOST)
        found = yield from self._find_paths(known.uuid, [spec.path for spec in domain.nvdimms])
        check_distinct(domain.nvdimms, lambda one, other: found[one.path] == found[other.path])  # as they are written
        resolved: str = yield Work(lambda: with_paths(xml, found), Pool.XML)
        return resolved, domain.with_paths(found)

    def _find_paths(self, uuid: str | None, named: Iterable[str]) -> Generator[Call | Work, Any, dict[str, str]]:
        """Return the paths that these of a domain lead to now, by these."""
        found: dict[str, str] = yield self._work(lambda driver: driver.definitions.find_paths(uuid, named), Pool.HOST)
        return found

    def _without_remains(self, payload: bytes, read: ClientDomain) -> Generator[Call | Work, Any, bytes]:
        """Return a call with XML without NVDIMMs; if the domain had some, without the ``<maxMemory>`` of that time.

        The libxl driver takes no domain with ``<maxMemory>``. For a domain that never had NVDIMMs, it says so.
        """
        _, flags = xml_and_flags(payload)
        uuid = read.uuid if read.is_limited else None
        if uuid is None:
            return payload
        if (yield self._work(lambda driver: driver.ledger.find_domain(uuid))) is None:
            before = yield from defined_xml(uuid)  # the claim may be released, or the ledger lost
            if before is None or not (yield from self._has_nvdimms(before)):
                return payload
        xml: str = yield Work(lambda: without_max_memory(read.text), Pool.XML)
        return bytes(Packer().string(xml)) + flags

    def _check_saved(self, plan: Plan) -> Generator[Call | Work, Any, bool]:
        """Check what is defined or created in place of a domain; return True if that has a managed save.

        :raises UnsupportedError: when it has one and other NVDIMMs, or the same in other places: its guest goes on with
            those that it had.
        """
        uuid = plan.domain.uuid
        if uuid is None:
            return False
        known = DomainRef(plan.domain.name, uuid, -1)
        if not (yield from has_managed_save(known, self._save_dir)):
            return False
        if (yield from self._record(known)) is not None:
            yield self._work(lambda driver: driver.check_redefinition(plan))
        return True

    def _explained(self, error: LibvirtError, uuid: str) -> Generator[Call | Work, Any, LibvirtError]:
        """Return the error, with the reason why the start failed if the ledger has one that is not in it yet."""
        try:
            record: Record | None = yield self._work(lambda driver: driver.ledger.find_domain(uuid))
        except LedgerError:
            return error
        told = RemoteError.unpack(error.payload)
        if record is None or not record.fault or record.fault in (told.message or ""):
            return error
        return LibvirtError(told._replace(message=f"{told.message}: {record.fault}").pack())


def _extracted(xml: str) -> DomainSpec:
    """Return the domain of XML that has NVDIMMs."""
    domain = extract(xml)
    if domain is None:
        raise DomainXmlError("the domain has no NVDIMMs", hint="define it with one, and boot it anew")
    return domain


def _slots_of(xml: str) -> tuple[int, ...]:
    """Return the slots of a definition's NVDIMMs; none for an empty text."""
    domain = extract(xml, stored=True) if xml else None
    return tuple(spec.slot for spec in domain.nvdimms) if domain else ()


def _provisioning(plan: Plan) -> Pool:
    """Return the pool in which a define with this plan runs."""
    return Pool.ZEROS if any(intake.creates or intake.writes for intake in plan.intakes) else Pool.HOST


class Row(NamedTuple):
    """A procedure of the table.

    :ivar handler: gets the procedure, and the arguments of the call or, with ``is_reply``, what libvirtd replied.
    :ivar opens: as of :class:`.Entry`.
    :ivar read_only: it is intercepted for clients of the read-only socket, too. What such a client may not call is left
        to libvirtd to refuse.
    """

    handler: Callable[[Interceptor, int, bytes], Steps]
    read_only: bool = False
    is_reply: bool = False
    opens: bool = False


LIVE_DEVICE_CALLS = (Procedure.DOMAIN_ATTACH_DEVICE, Procedure.DOMAIN_DETACH_DEVICE)
"""Device calls without flags."""

DETACH_CALLS = (Procedure.DOMAIN_DETACH_DEVICE, Procedure.DOMAIN_DETACH_DEVICE_FLAGS)

TABLE: Mapping[Procedure, Row] = {
    Procedure.CONNECT_OPEN: Row(opening.open_connection, read_only=True, opens=True),
    Procedure.DOMAIN_ATTACH_DEVICE: Row(Interceptor.attach_device),
    Procedure.DOMAIN_CREATE: Row(Interceptor.start),
    Procedure.DOMAIN_CREATE_XML: Row(Interceptor.create),
    Procedure.DOMAIN_DEFINE_XML: Row(Interceptor.define),
    Procedure.DOMAIN_DETACH_DEVICE: Row(Interceptor.detach_device),
    Procedure.DOMAIN_GET_XML_DESC: Row(Interceptor.got_xml, read_only=True, is_reply=True),
    Procedure.DOMAIN_RESTORE: Row(Interceptor.restore),
    Procedure.DOMAIN_SAVE: Row(Interceptor.save),
    Procedure.DOMAIN_SAVE_FLAGS: Row(Interceptor.save),
    Procedure.DOMAIN_MANAGED_SAVE: Row(Interceptor.save),
    Procedure.DOMAIN_SET_MAX_MEMORY: Row(Interceptor.set_memory),
    Procedure.DOMAIN_SET_MEMORY: Row(Interceptor.set_memory),
    Procedure.DOMAIN_UNDEFINE: Row(Interceptor.undefine),
    Procedure.CONNECT_DOMAIN_XML_TO_NATIVE: Row(Interceptor.to_native),
    Procedure.DOMAIN_ATTACH_DEVICE_FLAGS: Row(Interceptor.attach_device),
    Procedure.DOMAIN_DETACH_DEVICE_FLAGS: Row(Interceptor.detach_device),
    Procedure.DOMAIN_UPDATE_DEVICE_FLAGS: Row(Interceptor.update_device),
    Procedure.DOMAIN_CREATE_WITH_FLAGS: Row(Interceptor.start),
    Procedure.DOMAIN_SET_MEMORY_FLAGS: Row(Interceptor.set_memory),
    Procedure.DOMAIN_UNDEFINE_FLAGS: Row(Interceptor.undefine),
    Procedure.DOMAIN_HAS_MANAGED_SAVE_IMAGE: Row(Interceptor.has_managed_save, read_only=True),
    Procedure.DOMAIN_RESTORE_FLAGS: Row(Interceptor.restore),
    Procedure.DOMAIN_SET_METADATA: Row(Interceptor.set_metadata),
    Procedure.DOMAIN_GET_METADATA: Row(metadata_calls.get_metadata, read_only=True),
    Procedure.DOMAIN_MIGRATE_BEGIN3_PARAMS: Row(Interceptor.migrate),
    Procedure.DOMAIN_MIGRATE_PREPARE3_PARAMS: Row(Interceptor.migrate_in),
    Procedure.DOMAIN_MIGRATE_PREPARE_TUNNEL3_PARAMS: Row(Interceptor.migrate_in),
    Procedure.DOMAIN_MIGRATE_PERFORM3_PARAMS: Row(Interceptor.migrate),
    Procedure.DOMAIN_CREATE_XML_WITH_FILES: Row(Interceptor.create),
    Procedure.DOMAIN_DEFINE_XML_FLAGS: Row(Interceptor.define),
}

PASSED: Mapping[str, str] = {
    "connect_domain_xml_from_native": "a configuration of xl has no NVDIMMs",
    "connect_get_domain_capabilities": "its XML is about the host",
    "domain_migrate_confirm3_params": "it ends a migration, and a domain with NVDIMMs cannot begin one",
    "domain_migrate_finish3_params": "it ends a migration, and a domain with NVDIMMs cannot begin one",
}
"""Procedures that can carry domain XML, that the libxl driver implements, and that pass all the same: why.

Procedures that the libxl driver does not implement pass, too, and libvirtd refuses them."""
