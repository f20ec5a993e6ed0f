# SPDX-License-Identifier: Apache-2.0
"""Two clients' calls for one domain, step by step: the ledger has what libvirt's definition has, whoever is first."""

from __future__ import annotations

import errno
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import DomainXmlError, InUseError, NvdimmError
from nvdimm_driver.rpc.handler_types import Call, Entry, Work
from nvdimm_driver.rpc.locking import LOCK_DELAYS
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer, RemoteError
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import restore
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, domain, make_driver, map_prepared
from tests.unit.test_rpc_intercept import CONTEXT, NVDIMM, Libvirtd, Proxy, xml

OPERATION_INVALID, OPERATION_TIMEOUT = 55, 68  # include/libvirt/virterror.h


class Client:
    """A call that is at work."""

    def __init__(self, proxy: Proxy, procedure: Procedure, packer: Packer) -> None:
        self.proxy = proxy
        entry = proxy.interceptor.table()[procedure]
        assert isinstance(entry, Entry)
        self.steps = entry.handler(CONTEXT, bytes(packer))
        self.request = next(self.steps)

    def step(self) -> None:
        request = self.request
        try:
            value = self.proxy.libvirtd.answer(request) if isinstance(request, Call) else request.function()
        except (LibvirtError, NvdimmError) as error:
            self.request = self.steps.throw(error)
        else:
            self.request = self.steps.send(value)

    def before(self, procedure: Procedure) -> None:
        """Work until a call of that procedure is to be answered."""
        while not (isinstance(self.request, Call) and self.request.procedure == procedure):
            self.step()

    def until(self, procedure: Procedure) -> None:
        """Work until a call of that procedure was answered."""
        self.before(procedure)
        self.step()

    def finish(self) -> None:
        try:
            while True:
                self.step()
        except StopIteration:
            pass


def claims(folder: Path, backing: MemoryBacking) -> list[str]:
    record = make_driver(folder, backing, RecordingMapper()).ledger.find_domain(UUID)
    return [item.spec.path for item in record.allocations] if record else []


def test_a_define_without_nvdimms_leaves_those_of_a_define_that_came_after_it(tmp_path: Path) -> None:
    backing = MemoryBacking()
    proxy = Proxy(tmp_path, backing)
    proxy.define(xml("a"))
    del proxy.libvirtd.defined[UUID]  # undefined: its NVDIMMs stay its own
    one = Client(proxy, Procedure.DOMAIN_DEFINE_XML, Packer().string(xml()))
    one.until(Procedure.DOMAIN_DEFINE_XML)
    with pytest.raises(InUseError):
        proxy.define(xml("a"))
    one.finish()
    proxy.define(xml("a"))
    assert claims(tmp_path, backing) == ["/mnt/pmem0/a"]


@pytest.mark.parametrize("is_locked", [True, False])
def test_a_define_without_nvdimms_that_is_refused_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_locked: bool
) -> None:
    """Its NVDIMMs stay its own while it is undefined. They are wiped, or their file system is read-only just now."""

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    backing = MemoryBacking()
    proxy, driver = Proxy(tmp_path, backing), make_driver(tmp_path, backing, RecordingMapper())
    proxy.define(xml("a"))
    for defined in (dict(proxy.libvirtd.defined), {}):
        proxy.libvirtd.defined = dict(defined)
        with ExitStack() as stack:
            if is_locked:
                stack.enter_context(driver.locks.changing(UUID))
            else:
                stack.enter_context(monkeypatch.context()).setattr(type(driver.definitions), "drop_claims", fail)
            with pytest.raises((InUseError, OSError)):
                proxy.define(xml())
        assert proxy.libvirtd.defined == defined
        assert claims(tmp_path, backing) == ["/mnt/pmem0/a"]


def test_who_changes_a_domain_or_starts_its_saved_guest_has_its_lock_in_the_call_to_libvirt(tmp_path: Path) -> None:
    backing = MemoryBacking()
    proxy, driver = Proxy(tmp_path, backing), make_driver(tmp_path, backing, RecordingMapper())
    proxy.define(xml("a"))
    driver.prepare_known(UUID)
    map_prepared(driver.ledger, 5)
    driver.release(UUID)
    proxy.libvirtd.saved.add(UUID)
    saved = DomainRef("db1", UUID, -1)
    calls = [
        (Procedure.DOMAIN_DEFINE_XML, Packer().string(xml())),
        (Procedure.DOMAIN_DEFINE_XML, Packer().string(xml("a"))),
        (Procedure.DOMAIN_CREATE, Packer().domain(saved)),
        (Procedure.DOMAIN_CREATE_XML, Packer().string(xml("a")).uint32(0)),
        (Procedure.DOMAIN_CREATE_XML, Packer().string(xml()).uint32(0)),
        (Procedure.DOMAIN_UNDEFINE, Packer().domain(saved)),
    ]
    for procedure, packer in calls:
        proxy.define(xml("a"))
        one = Client(proxy, procedure, packer)
        one.before(procedure)
        with pytest.raises(InUseError, match="defined, created, started from a saved guest or released by"):
            driver.locks.try_changing(UUID, "")
        one.finish()


def test_what_calls_add_at_once_is_counted_together(tmp_path: Path) -> None:
    """Each is checked with the XML before the others: without their sum, it could be more than anybody reads."""
    proxy = Proxy(tmp_path, MemoryBacking())
    defined = proxy.define(xml())
    value = f"<a>{'<b/>' * 1000}</a>"
    arguments = Packer().domain(defined).int32(2).optional_string(value).optional_string("k").optional_string("urn:x")
    arguments.uint32(0)
    begun = [Client(proxy, Procedure.DOMAIN_SET_METADATA, arguments) for _ in range(50)]
    for one in begun[:49]:
        one.before(Procedure.DOMAIN_SET_METADATA)
    with pytest.raises(DomainXmlError, match="would have more than 50000 elements"):
        begun[49].before(Procedure.DOMAIN_SET_METADATA)
    for one in begun[:49]:
        one.finish()
    proxy.call(Procedure.DOMAIN_SET_METADATA, arguments)  # libvirt's double has added nothing


def test_a_start_without_nvdimms_leaves_those_of_a_define_meanwhile(tmp_path: Path) -> None:
    backing = MemoryBacking()
    proxy = Proxy(tmp_path, backing)
    proxy.define(xml("b"))
    proxy.libvirtd.saved.add(UUID)
    proxy.define(xml())  # the claim stays for the saved guest
    proxy.libvirtd.saved.clear()
    one = Client(proxy, Procedure.DOMAIN_CREATE, Packer().domain(DomainRef("db1", UUID, -1)))
    one.until(Procedure.DOMAIN_GET_XML_DESC)
    proxy.define(xml("a"))
    one.finish()
    assert claims(tmp_path, backing) == ["/mnt/pmem0/a"]


def test_who_waits_for_a_domain_has_no_thread_meanwhile(tmp_path: Path) -> None:
    """Each attempt ends at once, and the next one comes after a delay, for which no thread is kept."""
    proxy = Proxy(tmp_path, MemoryBacking())
    driver = make_driver(tmp_path, MemoryBacking(), RecordingMapper())
    driver.locks.seconds = 3600.0
    delays = []
    with driver.locks.changing(UUID):
        one = Client(proxy, Procedure.DOMAIN_DEFINE_XML, Packer().string(xml("a")))
        with suppress(InUseError):
            while True:
                delays += [one.request.delay] if isinstance(one.request, Work) else []
                one.step()
    assert [delay for delay in delays if delay] == [delay for delay in LOCK_DELAYS if delay]
    proxy.define(xml("a"))


def test_who_waits_for_a_domain_gets_it_when_it_is_free(tmp_path: Path) -> None:
    backing = MemoryBacking()
    proxy = Proxy(tmp_path, backing)
    with make_driver(tmp_path, backing, RecordingMapper()).locks.changing(UUID):
        one = Client(proxy, Procedure.DOMAIN_DEFINE_XML, Packer().string(xml("a")))
        while not (isinstance(one.request, Work) and one.request.delay):
            one.step()
    one.finish()
    assert claims(tmp_path, backing) == ["/mnt/pmem0/a"]


class Started(Libvirtd):
    """A libvirtd that another client asks to start the domain just before it refuses a create."""

    def __init__(self, driver: XenNvdimmDriver) -> None:
        super().__init__()
        self.driver = driver

    def answer(self, call: Call) -> bytes:
        if call.procedure == Procedure.DOMAIN_CREATE_XML:
            self.driver.prepare(domain("/mnt/pmem0/a"))
            raise LibvirtError(RemoteError(55, 10, "domain 'db1' is already active").pack())
        return super().answer(call)


def test_the_undo_of_a_refused_create_leaves_the_start_of_another_client(tmp_path: Path) -> None:
    backing = MemoryBacking()
    driver = make_driver(tmp_path, backing, RecordingMapper())
    proxy = Proxy(tmp_path, backing)
    proxy.libvirtd = Started(driver)
    proxy.define(xml("a"))
    with suppress(LibvirtError):
        proxy.call(Procedure.DOMAIN_CREATE_XML, Packer().string(xml("a")).uint32(0))
    prepared = driver.ledger.find_prepared(UUID)
    assert prepared
    driver.ledger.begin_mapping(prepared, 5)


class Failed(Libvirtd):
    """A libvirtd in which a create fails after its hook, and another client starts the domain, or nobody does.

    :ivar answers: number of the error with which it says whether the domain is being started.
    """

    def __init__(self, driver: XenNvdimmDriver, answers: int) -> None:
        super().__init__()
        self.driver = driver
        self.answers = answers

    def answer(self, call: Call) -> bytes:
        if call.procedure == Procedure.DOMAIN_MEMORY_STATS:
            raise LibvirtError(RemoteError(self.answers, 10, "an answer").pack())
        if call.procedure == Procedure.DOMAIN_CREATE_XML:
            self.driver.prepare(domain("/mnt/pmem0/a"))
            raise LibvirtError(RemoteError(1, 10, "network is not active").pack())
        return super().answer(call)


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_undo_of_a_failed_create_puts_away_what_nobody_goes_on_with(tmp_path: Path, *, goes_on: bool) -> None:
    backing = MemoryBacking()
    driver = make_driver(tmp_path, backing, RecordingMapper())
    proxy = Proxy(tmp_path, backing)
    proxy.libvirtd = Failed(driver, OPERATION_TIMEOUT if goes_on else OPERATION_INVALID)
    proxy.define(xml("a"))
    with pytest.raises(LibvirtError, match="network is not active"):
        proxy.call(Procedure.DOMAIN_CREATE_XML, Packer().string(xml("a")).uint32(0))
    assert (driver.ledger.find_prepared(UUID) is not None) == goes_on
    assert (backing.frozen == {"/mnt/pmem0/a"}) == goes_on


def test_of_two_nvdimms_that_are_attached_at_once_both_stay(tmp_path: Path) -> None:
    backing = MemoryBacking()
    proxy = Proxy(tmp_path, backing)
    proxy.define(xml("c"))
    attach = Procedure.DOMAIN_ATTACH_DEVICE_FLAGS
    devices = [Packer().domain(DomainRef("db1", UUID, -1)).string(NVDIMM.format(each)).uint32(2) for each in "ab"]
    one = Client(proxy, attach, devices[0])
    one.until(Procedure.DOMAIN_GET_XML_DESC)
    refused = False
    try:
        Client(proxy, attach, devices[1]).finish()
    except InUseError:
        refused = True
    one.finish()
    if refused:
        Client(proxy, attach, devices[1]).finish()
    defined = extract(restore(proxy.libvirtd.defined[UUID]))
    assert defined
    assert {each.path for each in defined.nvdimms} == {f"/mnt/pmem0/{each}" for each in "abc"}
    assert {*claims(tmp_path, backing)} == {f"/mnt/pmem0/{each}" for each in "abc"}


def test_a_define_without_a_uuid_has_the_lock_when_libvirt_is_asked(tmp_path: Path) -> None:
    backing = MemoryBacking()
    proxy = Proxy(tmp_path, backing)
    proxy.define(xml("a"))
    del proxy.libvirtd.defined[UUID]  # undefined: its NVDIMMs stay its own
    one = Client(proxy, Procedure.DOMAIN_DEFINE_XML, Packer().string(xml("a", "b", uuid=None)))
    one.until(Procedure.DOMAIN_DEFINE_XML)
    with suppress(InUseError):
        proxy.define(xml("c"))
    one.finish()
    defined = extract(restore(proxy.libvirtd.defined[UUID]))
    assert defined
    assert [each.path for each in defined.nvdimms] == claims(tmp_path, backing) == ["/mnt/pmem0/a", "/mnt/pmem0/b"]
