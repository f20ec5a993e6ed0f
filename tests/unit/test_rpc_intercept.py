# SPDX-License-Identifier: Apache-2.0
"""The proxy's handlers of calls, driven by hand, with a libvirtd that keeps definitions in a dict."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import (
    BackingError,
    ConfigError,
    DeviceMissingError,
    DomainXmlError,
    InUseError,
    LayoutError,
    ProtocolError,
    RefusedError,
    SchemaError,
    UnsupportedError,
    XenError,
)
from nvdimm_driver.model import GIB, KIB, MIB
from nvdimm_driver.rpc.handler_types import Call, Context, Peer, Pool, ReplyEntry, Work
from nvdimm_driver.rpc.intercept import Interceptor
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer, RemoteError, TypedParam, Unpacker
from nvdimm_driver.xml.document import MAX_WRITTEN, decode
from nvdimm_driver.xml.hooks import XmlHooks
from nvdimm_driver.xml.parse_domain import OPTIONS, extract
from nvdimm_driver.xml.rewrite import NAMESPACE, LibxlXmlHook, restore, rewrite
from nvdimm_driver.xml.schema import check_schema
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, make_driver, map_prepared

DEVICE_MODEL = "/usr/libexec/xen/bin/nvdimm-device-model"
HOOKS = XmlHooks([LibxlXmlHook()], DEVICE_MODEL)
CONTEXT = Context(Peer(0, 0, 1), False)
DEFINE, DEFINE_FLAGS, CREATE_XML, START, GET_XML = 11, 350, 10, 9, 14
NVDIMM = (
    "<memory model='nvdimm'><source><path>/mnt/pmem0/{}</path></source><target><size>65536</size></target></memory>"
)


def xml(*files: str, ram: int = 512 * MIB, uuid: str | None = UUID, more: str = "") -> str:
    nvdimms = "".join(map(NVDIMM.format, files))
    return (
        f"<domain type='xen'><name>db1</name>{f'<uuid>{uuid}</uuid>' if uuid else ''}<memory>{ram // KIB}</memory>"
        f"<os><type>hvm</type></os><features><acpi/></features><devices>{more}{nvdimms}</devices></domain>"
    )


class Libvirtd:
    """A libvirtd with definitions by uuid. It refuses the procedures that a test puts into ``refuse``."""

    def __init__(self) -> None:
        self.defined: dict[str, str] = {}
        self.running: set[str] = set()
        self.saved: set[str] = set()
        self.transient: set[str] = set()
        self.calls: list[int] = []
        self.payloads: list[bytes] = []
        self.refuse: dict[int, str] = {}
        self.code = 1

    def answer(self, call: Call) -> bytes:
        self.calls.append(call.procedure)
        self.payloads.append(call.payload)
        values = Unpacker(call.payload)
        if call.procedure in self.refuse:
            raise LibvirtError(RemoteError(self.code, 41, self.refuse[call.procedure]).pack())
        match call.procedure:
            case 11 | 350 | 10 | 309:
                text = decode(values.encoded())
                spec = extract(restore(text))
                uuid = UUID if spec is None or spec.uuid is None else spec.uuid
                self.defined[uuid] = text
                if call.procedure in (11, 350):
                    self.transient.discard(uuid)
                return bytes(Packer().domain(DomainRef("db1", uuid, -1)))
            case 14:
                return bytes(Packer().string(self.defined.get(values.domain().uuid, "<domain/>")))
            case 24:
                uuid = values.uuid()
                if uuid not in self.defined:
                    raise LibvirtError(RemoteError(42, 20, "Domain not found").pack())
                return bytes(Packer().domain(DomainRef("db1", uuid, -1)))
            case 35 | 231:
                uuid = values.domain().uuid
                if uuid in self.running:
                    self.transient.add(uuid)
                else:
                    del self.defined[uuid]
            case 136:
                return bytes(Packer().string(f"native of {values.string()} {values.string()}"))
            case 183:
                return bytes(Packer().int32(int(values.domain().uuid in self.saved)))
            case 151:
                return bytes(Packer().int32(int(values.domain().uuid not in self.transient)))
            case 150:
                return bytes(Packer().int32(int(values.domain().uuid in self.running)))
        return b""


@pytest.fixture
def backing() -> MemoryBacking:
    return MemoryBacking()


@pytest.fixture
def driver(tmp_path: Path, backing: MemoryBacking) -> XenNvdimmDriver:
    return make_driver(tmp_path, backing, RecordingMapper())


class Proxy:
    """Drives handlers as the real proxy does."""

    def __init__(self, folder: Path, backing: MemoryBacking, mapper: RecordingMapper | None = None) -> None:
        self.libvirtd = Libvirtd()
        mapper = mapper or RecordingMapper()
        self.interceptor = Interceptor(lambda: make_driver(folder, backing, mapper), HOOKS)
        self.pools: list[Pool] = []

    def call(self, procedure: int, packer: Packer, *, read_only: bool = False) -> bytes:
        return self.handle(procedure, bytes(packer), read_only=read_only)

    def handle(self, procedure: int, payload: bytes, *, read_only: bool = False) -> bytes:
        table = self.interceptor.table(read_only=read_only)
        if procedure not in table:
            return self.libvirtd.answer(Call(procedure, payload))
        entry = table[procedure]
        if isinstance(entry, ReplyEntry):
            payload = self.libvirtd.answer(Call(procedure, payload))
            if not entry.wants(payload):
                return payload
        steps: Generator[Call | Work, Any, bytes] = entry.handler(CONTEXT, payload)
        send, value = steps.send, None
        while True:
            try:
                request = send(value)
            except StopIteration as end:
                return bytes(end.value)
            if isinstance(request, Work):
                self.pools.append(request.pool)
            try:
                value = self.libvirtd.answer(request) if isinstance(request, Call) else request.function()
                send = steps.send
            except Exception as error:
                send, value = steps.throw, error

    def define(self, text: str) -> DomainRef:
        return Unpacker(self.call(DEFINE, Packer().string(text))).domain()

    def xml(self, domain: DomainRef, *, read_only: bool = False) -> str:
        return Unpacker(self.call(GET_XML, Packer().domain(domain).uint32(3), read_only=read_only)).string()


@pytest.fixture
def proxy(tmp_path: Path, backing: MemoryBacking) -> Proxy:
    return Proxy(tmp_path, backing)


def message(error: LibvirtError) -> str:
    return RemoteError.unpack(error.payload).message or ""


@pytest.mark.parametrize("procedure", [DEFINE, DEFINE_FLAGS])
def test_define_rewrites_and_provisions(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking, procedure: int
) -> None:
    packer = Packer().string(xml("a", "b"))
    reply = proxy.call(procedure, packer if procedure == DEFINE else packer.uint32(1))
    domain = Unpacker(reply).domain()
    assert domain.uuid == UUID
    in_slots = xml("a", "b")
    for slot in (0, 1):
        in_slots = in_slots.replace("</target></memory>", f"</target><address type='dimm' slot='{slot}'/></memory>", 1)
    assert proxy.libvirtd.defined[UUID] == rewrite(in_slots, DEVICE_MODEL)
    assert set(backing.files) == {"/mnt/pmem0/a", "/mnt/pmem0/b"}
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert all(item.ready for item in record.allocations)


def test_a_domain_without_nvdimms_is_defined_as_it_stands(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    proxy.define(xml())
    assert proxy.libvirtd.defined[UUID] == xml()
    assert driver.ledger.domains() == ()


def test_libvirt_never_sees_what_cannot_be(proxy: Proxy) -> None:
    with pytest.raises(UnsupportedError, match="private"):
        proxy.define(xml("a").replace("model='nvdimm'", "model='nvdimm' access='private'"))
    assert proxy.libvirtd.calls == []


def test_a_failed_provision_undefines(proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    backing.fail_provision = {"/mnt/pmem0/b"}
    with pytest.raises(BackingError, match="no space"):
        proxy.define(xml("a", "b"))
    assert proxy.libvirtd.defined == {}
    assert backing.files == {}
    assert driver.ledger.domains() == ()


def test_a_failed_provision_brings_the_definition_back(proxy: Proxy, backing: MemoryBacking) -> None:
    proxy.define(xml("a"))
    before = proxy.libvirtd.defined[UUID]
    backing.fail_provision = {"/mnt/pmem0/b"}
    with pytest.raises(BackingError, match="no space"):
        proxy.define(xml("a", "b"))
    assert proxy.libvirtd.defined[UUID] == before
    assert set(backing.files) == {"/mnt/pmem0/a"}


def test_a_failed_provision_leaves_a_transient_domain_transient(proxy: Proxy, backing: MemoryBacking) -> None:
    """Its guest's next start has what it had, too."""
    proxy.call(CREATE_XML, Packer().string(xml("a")).uint32(0))
    before = proxy.libvirtd.defined[UUID]
    proxy.libvirtd.running.add(UUID)
    proxy.libvirtd.transient.add(UUID)
    backing.fail_provision = {"/mnt/pmem0/b"}
    with pytest.raises(BackingError, match="no space"):
        proxy.define(xml("a", "b"))
    assert proxy.libvirtd.transient == {UUID}
    assert proxy.libvirtd.defined[UUID] == before


def test_xml_without_the_uuid_of_a_domain_that_exists_is_refused(proxy: Proxy) -> None:
    """As libvirt does; it would make another domain of it where it knows ours by another name."""
    proxy.define(xml("a"))
    proxy.libvirtd.calls.clear()
    with pytest.raises(DomainXmlError, match=f"db1 already exists with uuid {UUID}"):
        proxy.define(xml("a", "b", uuid=None))
    assert DEFINE not in proxy.libvirtd.calls


def test_a_domain_that_is_redefined_without_nvdimms_gives_them_up(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    proxy.define(xml("a"))
    proxy.define(xml())
    assert driver.ledger.domains() == ()
    assert set(backing.files) == {"/mnt/pmem0/a"}


@pytest.mark.parametrize("read_only", [False, True])
def test_the_client_gets_back_what_it_wrote(proxy: Proxy, read_only: bool) -> None:
    domain = proxy.define(xml("a"))
    assert proxy.xml(domain, read_only=read_only) == restore(proxy.libvirtd.defined[UUID])
    assert "model='nvdimm'" in proxy.xml(domain, read_only=read_only)
    assert NAMESPACE not in proxy.xml(domain, read_only=read_only)


def test_forged_metadata_is_refused(proxy: Proxy) -> None:
    with pytest.raises(DomainXmlError, match="own metadata"):
        proxy.define(rewrite(xml("a"), DEVICE_MODEL))
    assert proxy.libvirtd.calls == []


def test_a_forged_emulator_is_refused(proxy: Proxy) -> None:
    with pytest.raises(DomainXmlError, match="names the device model"):
        proxy.define(xml(more=f"<emulator>{DEVICE_MODEL}</emulator>"))
    assert proxy.libvirtd.calls == []


@pytest.mark.parametrize("colon", [":", "&#58;", "&#x3a;"])
def test_forged_metadata_is_refused_however_it_is_written(proxy: Proxy, colon: str) -> None:
    forged = rewrite(xml("a"), DEVICE_MODEL).replace(NAMESPACE, NAMESPACE.replace(":", colon))
    with pytest.raises(DomainXmlError, match="own metadata"):
        proxy.define(forged)
    metadata = f"<nvdimm:domain xmlns:nvdimm='{NAMESPACE.replace(':', colon)}'/>"
    arguments = Packer().domain(DomainRef("x", UUID, -1)).int32(2).optional_string(metadata)
    with pytest.raises(DomainXmlError, match="own"):
        proxy.call(264, arguments.optional_string("k").optional_string("urn:x").uint32(0))
    assert proxy.libvirtd.calls == []


def test_forged_metadata_is_refused_in_an_encoding_that_hides_it(proxy: Proxy) -> None:
    forged = rewrite(xml("a"), DEVICE_MODEL).replace(NAMESPACE, NAMESPACE.replace(":", "+ADo-"))
    with pytest.raises(DomainXmlError, match="UTF-7"):
        proxy.define(f"<?xml version='1.0' encoding='UTF-7'?>{forged}")
    assert proxy.libvirtd.calls == []


def test_xml_in_latin_1_is_taken_as_libvirt_takes_it(proxy: Proxy) -> None:
    declaration = b"<?xml version='1.0' encoding='ISO-8859-1'?>"
    plain = declaration + xml(more="<!-- ä -->").encode("latin-1")
    arguments = bytes(Packer().opaque(plain))
    proxy.handle(DEFINE, arguments)
    assert proxy.libvirtd.payloads == [arguments]
    proxy.handle(DEFINE, bytes(Packer().opaque(declaration + xml("ä").encode("latin-1"))))
    assert "/mnt/pmem0/ä" in proxy.libvirtd.defined[UUID]


def test_another_domains_file_is_refused_by_name(proxy: Proxy) -> None:
    proxy.define(xml("a"))
    thief = xml("a", uuid="7c7b0e2e-4a6e-4f0e-9a3b-000000000009").replace("db1", "thief")
    with pytest.raises(Exception, match=f"/mnt/pmem0/a belongs to domain db1 .{UUID}"):
        proxy.define(thief)
    assert set(proxy.libvirtd.defined) == {UUID}


def test_a_payload_that_cannot_be_read_is_never_forwarded(proxy: Proxy) -> None:
    with pytest.raises(ProtocolError):
        proxy.call(DEFINE, Packer().uint32(77))
    assert proxy.libvirtd.calls == []


def test_a_transient_domain_is_provisioned_before_it_runs(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    reply = proxy.call(CREATE_XML, Packer().string(xml("a", uuid=None)).uint32(0))
    (record,) = driver.ledger.domains()
    assert Unpacker(reply).domain().uuid == record.uuid
    assert f"<uuid>{record.uuid}</uuid>" in proxy.libvirtd.defined[record.uuid]
    assert set(backing.files) == {"/mnt/pmem0/a"}


def test_a_transient_domain_that_libvirt_refuses_leaves_nothing(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    proxy.libvirtd.refuse[CREATE_XML] = "no memory"
    with pytest.raises(LibvirtError) as caught:
        proxy.call(CREATE_XML, Packer().string(xml("a")).uint32(0))
    assert message(caught.value) == "no memory"
    assert driver.ledger.domains() == ()
    assert backing.files == {}


def test_a_transient_domain_that_cannot_be_rewritten_leaves_nothing(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    with pytest.raises(DomainXmlError):
        proxy.call(CREATE_XML, Packer().string(xml("a").replace("<source>", "text<source>")).uint32(0))
    assert driver.ledger.domains() == ()
    assert backing.files == {}
    assert proxy.libvirtd.defined == {}


def test_a_failed_start_says_why(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    domain = proxy.define(xml("a"))
    driver.ledger.record_failure(UUID, XenError("an old reason"))
    proxy.libvirtd.refuse[START] = "libxenlight failed"
    with pytest.raises(LibvirtError) as caught:
        proxy.call(START, Packer().domain(domain))
    assert message(caught.value) == "libxenlight failed"

    answer = proxy.libvirtd.answer

    def fail(call: Call) -> bytes:
        if call.procedure != START:
            return answer(call)
        driver.ledger.record_failure(UUID, XenError("xc_domain_memory_mapping: EPERM (look at xl dmesg)"))
        raise LibvirtError(RemoteError(1, 41, "libxenlight failed").pack())

    proxy.libvirtd.answer = fail  # type: ignore[method-assign]
    with pytest.raises(LibvirtError) as caught:
        proxy.call(START, Packer().domain(domain))
    assert message(caught.value) == "libxenlight failed: xc_domain_memory_mapping: EPERM (look at xl dmesg)"


def test_a_managed_save_is_looked_at_before_libvirt_removes_it(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    domain = proxy.define(xml("a"))
    driver.prepare_known(UUID)
    map_prepared(driver.ledger, 5)
    driver.release(UUID)
    proxy.libvirtd.saved.add(UUID)
    proxy.call(START, Packer().domain(domain))
    backing.times["/mnt/pmem0/a"] = 1
    proxy.libvirtd.calls.clear()
    for call, packer in ((START, Packer().domain(domain)), (CREATE_XML, Packer().string(xml("a")).uint32(0))):
        with pytest.raises(RefusedError, match="a was written on the host"):
            proxy.call(call, packer)
    assert not {START, CREATE_XML} & {*proxy.libvirtd.calls}


def test_a_saved_guest_is_started_once_at_a_time(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    """What a second client tries would put away the start that the hook has prepared for the first."""
    domain = proxy.define(xml("a"))
    driver.prepare_known(UUID)
    map_prepared(driver.ledger, 5)
    driver.release(UUID)
    proxy.libvirtd.saved.add(UUID)
    proxy.libvirtd.calls.clear()
    with driver.locks.try_changing(UUID, "the first"):
        for call, packer in ((START, Packer().domain(domain)), (CREATE_XML, Packer().string(xml("a")).uint32(0))):
            with pytest.raises(InUseError, match=r"started from a saved guest or released by .* for the first"):
                proxy.call(call, packer)
        assert not {START, CREATE_XML} & {*proxy.libvirtd.calls}
    proxy.call(START, Packer().domain(domain))


def test_a_domain_with_a_managed_save_keeps_its_nvdimms(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    domain = proxy.define(xml("a", "b"))
    proxy.libvirtd.saved.add(UUID)
    proxy.define(xml("a", "b"))
    for changed in (xml("a"), xml("a", "b", "c"), xml("a", "c")):
        with pytest.raises(UnsupportedError, match="managed save, whose guest has other NVDIMMs"):
            proxy.define(changed)
    with pytest.raises(UnsupportedError, match="managed save"):
        proxy.call(CREATE_XML, Packer().string(xml("a")).uint32(0))
    with pytest.raises(UnsupportedError, match="managed save"):
        proxy.call(Procedure.DOMAIN_DETACH_DEVICE_FLAGS, Packer().domain(domain).string(NVDIMM.format("a")).uint32(2))
    proxy.define(xml())
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert [item.spec.path for item in record.allocations] == ["/mnt/pmem0/a", "/mnt/pmem0/b"]
    proxy.libvirtd.saved.clear()
    proxy.define(xml("a"))


def test_a_domain_with_a_managed_save_keeps_the_places_of_its_nvdimms(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    proxy.define(xml("a"))
    driver.prepare_known(UUID)
    map_prepared(driver.ledger, 5)
    driver.release(UUID)
    proxy.libvirtd.saved.add(UUID)
    proxy.define(xml("a", ram=2 * GIB))
    with pytest.raises(UnsupportedError, match="slot 0: its base is 0x4240000000, and the guest knows 0x1100000000"):
        proxy.define(xml("a", ram=200 * GIB))
    proxy.libvirtd.saved.clear()
    proxy.define(xml("a", ram=200 * GIB))
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert record.allocations[0].base == 265 * GIB


def test_a_reason_that_is_in_the_error_is_not_said_twice(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    domain = proxy.define(xml("a"))

    answer = proxy.libvirtd.answer

    def fail(call: Call) -> bytes:
        if call.procedure != START:
            return answer(call)
        driver.ledger.record_failure(UUID, XenError("/mnt/pmem0/a is gone"))
        raise LibvirtError(RemoteError(70, 41, "hook failed: nvdimm-driver: /mnt/pmem0/a is gone").pack())

    proxy.libvirtd.answer = fail  # type: ignore[method-assign]
    with pytest.raises(LibvirtError) as caught:
        proxy.call(START, Packer().domain(domain))
    assert message(caught.value).count("is gone") == 1


LIVE, CONFIG = 1, 2


def test_config_attach_and_detach_change_the_definition(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    domain = proxy.define(xml("a"))
    proxy.libvirtd.running.add(UUID)
    proxy.call(160, Packer().domain(domain).string(NVDIMM.format("b")).uint32(CONFIG))
    assert [item.spec.path for item in domxml_specs(driver)] == ["/mnt/pmem0/a", "/mnt/pmem0/b"]
    assert proxy.xml(domain).count("model='nvdimm'") == 2
    larger = NVDIMM.format("b").replace("65536", "98304")
    proxy.call(174, Packer().domain(domain).string(larger).uint32(CONFIG))
    assert [item.spec.size for item in domxml_specs(driver)] == [64 * MIB, 96 * MIB]
    proxy.call(161, Packer().domain(domain).string(NVDIMM.format("a")).uint32(CONFIG))
    assert [item.spec.path for item in domxml_specs(driver)] == ["/mnt/pmem0/b"]
    assert set(backing.files) == {"/mnt/pmem0/a", "/mnt/pmem0/b"}
    for procedure in (161, 174):
        with pytest.raises(DeviceMissingError, match="device not found: the domain has no NVDIMM with") as caught:
            proxy.call(procedure, Packer().domain(domain).string(NVDIMM.format("c")).uint32(CONFIG))
        assert caught.value.libvirt_code == 99


def domxml_specs(driver: XenNvdimmDriver) -> list[Any]:
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    return list(record.allocations)


@pytest.mark.parametrize(
    ("procedure", "flags", "running"),
    [(8, None, True), (13, None, True), (160, LIVE, True), (161, LIVE | CONFIG, True), (174, 0, True)],
)
def test_live_changes_are_refused(proxy: Proxy, procedure: int, flags: int | None, running: bool) -> None:
    domain = proxy.define(xml("a"))
    proxy.libvirtd.running.add(UUID)
    packer = Packer().domain(domain).string(NVDIMM.format("a"))
    with pytest.raises(UnsupportedError, match=r"running domain db1.*--config"):
        proxy.call(procedure, packer if flags is None else packer.uint32(flags))


@pytest.mark.parametrize(
    ("procedure", "flags"), [(8, None), (13, None), (160, LIVE), (161, LIVE | CONFIG), (174, LIVE)]
)
def test_a_live_change_of_a_domain_that_is_off_is_libvirtds_to_refuse(
    proxy: Proxy, procedure: int, flags: int | None
) -> None:
    domain = proxy.define(xml("a"))
    proxy.libvirtd.refuse[procedure] = "Requested operation is not valid: domain is not running"
    packer = Packer().domain(domain).string(NVDIMM.format("a"))
    with pytest.raises(LibvirtError) as caught:
        proxy.call(procedure, packer if flags is None else packer.uint32(flags))
    assert message(caught.value) == "Requested operation is not valid: domain is not running"


def test_a_transient_domain_does_not_get_a_definition_by_a_change(proxy: Proxy) -> None:
    proxy.call(CREATE_XML, Packer().string(xml("a")).uint32(0))
    proxy.libvirtd.running.add(UUID)
    proxy.libvirtd.transient.add(UUID)
    proxy.libvirtd.refuse[160] = "transient domains do not have any persistent config"
    domain = DomainRef("db1", UUID, 1)
    with pytest.raises(LibvirtError) as caught:
        proxy.call(160, Packer().domain(domain).string(NVDIMM.format("b")).uint32(CONFIG))
    assert "transient" in message(caught.value)
    assert 11 not in proxy.libvirtd.calls


LIMIT = "<maxMemory slots='2' unit='GiB'>4</maxMemory>"


def test_the_last_nvdimm_takes_max_memory_with_it(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    limited = xml("a").replace("<memory>", LIMIT + "<memory>", 1)
    domain = proxy.define(limited)
    assert "<maxMemory" in proxy.xml(domain)
    proxy.call(161, Packer().domain(domain).string(NVDIMM.format("a")).uint32(CONFIG))
    assert "maxMemory" not in proxy.libvirtd.defined[UUID]
    assert driver.ledger.find_domain(UUID) is None
    for procedure in (CREATE_XML, DEFINE, DEFINE_FLAGS):
        proxy.define(limited)
        proxy.call(procedure, Packer().string(limited.replace(NVDIMM.format("a"), "")).uint32(0))
        assert "maxMemory" not in proxy.libvirtd.defined[UUID]


def test_max_memory_of_a_domain_that_never_had_nvdimms_is_libvirts_to_refuse(proxy: Proxy) -> None:
    text = xml().replace("<memory>", LIMIT + "<memory>", 1)
    proxy.define(text)
    assert proxy.libvirtd.defined[UUID] == text


@pytest.mark.parametrize(("procedure", "flag"), [(CREATE_XML, 16), (309, 16), (DEFINE_FLAGS, 1)])
def test_xml_is_validated_when_the_client_asks_for_it(proxy: Proxy, procedure: int, flag: int) -> None:
    wrong = xml("a").replace("</target>", "<lable><size>128</size></lable></target>")
    with pytest.raises(SchemaError, match=r"^XML document failed to validate against schema: Unable to") as caught:
        proxy.call(procedure, Packer().string(wrong).uint32(flag))
    assert caught.value.libvirt_code == 92
    with pytest.raises(DomainXmlError, match="<target> has <lable>"):
        proxy.call(procedure, Packer().string(wrong).uint32(0))
    assert proxy.libvirtd.defined == {}
    proxy.call(procedure, Packer().string(xml("a")).uint32(flag))
    assert proxy.libvirtd.defined


def test_xml_without_nvdimms_is_libvirts_to_validate(proxy: Proxy) -> None:
    wrong = xml().replace("<devices>", "<devices><nvdimm/>")
    proxy.call(DEFINE_FLAGS, Packer().string(wrong).uint32(1))
    assert proxy.libvirtd.defined[UUID] == wrong


@pytest.mark.parametrize("procedure", [DEFINE, CREATE_XML])
def test_a_type_that_was_left_in_is_named(proxy: Proxy, procedure: int) -> None:
    proxy.libvirtd.refuse[procedure] = "memory devices are not supported by this driver"
    proxy.libvirtd.code = 67
    with pytest.raises(LibvirtError) as caught:
        proxy.call(procedure, Packer().string(xml("a").replace("'xen'", "'kvm'")).uint32(0))
    assert message(caught.value) == (
        "memory devices are not supported by this driver (the domain is of type 'kvm'; for Xen, write <domain "
        "type='xen'>)"
    )
    for text, code in ((xml("a").replace("'xen'", "'kvm'"), 1), (xml().replace("'xen'", "'kvm'"), 67)):
        proxy.libvirtd.code = code
        with pytest.raises(LibvirtError) as caught:
            proxy.call(procedure, Packer().string(text).uint32(0))
        assert message(caught.value) == "memory devices are not supported by this driver"


def test_a_schema_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read /nonexistent\.rng"):
        check_schema(xml("a"), Path("/nonexistent.rng"))


def test_the_current_state_of_a_domain_that_is_off_is_its_definition(proxy: Proxy) -> None:
    domain = proxy.define(xml("a"))
    proxy.call(160, Packer().domain(domain).string(NVDIMM.format("b")).uint32(0))
    assert proxy.xml(domain).count("model='nvdimm'") == 2


def test_a_new_domain_needs_no_uuid(proxy: Proxy) -> None:
    proxy.define(xml("a", uuid=None))


def test_other_devices_pass(proxy: Proxy) -> None:
    domain = proxy.define(xml("a"))
    proxy.libvirtd.calls.clear()
    for device in ("<disk/>", "<disk><!-- nvdimm --></disk>"):
        for procedure in (160, 161):
            proxy.call(procedure, Packer().domain(domain).string(device).uint32(LIVE))
    assert [each for each in proxy.libvirtd.calls if each in (160, 161)] == [160, 161, 160, 161]
    full = f"<disk path='{'x' * (MAX_WRITTEN - 200)}'/>"
    with pytest.raises(DomainXmlError, match="may have 2 MiB"):
        proxy.call(160, Packer().domain(domain).string(full).uint32(LIVE))
    proxy.call(161, Packer().domain(domain).string(full).uint32(LIVE))
    assert proxy.libvirtd.calls[-1] == 161


@pytest.mark.parametrize(
    ("text", "uri"), [("<a/>", NAMESPACE), (f"<n:domain xmlns:n='{NAMESPACE}'/>", "urn:x"), (None, None)]
)
def test_metadata_of_ours_is_not_for_clients(proxy: Proxy, text: str | None, uri: str | None) -> None:
    domain = proxy.define(xml("a"))
    uri = uri or NAMESPACE
    arguments = Packer().domain(domain).int32(2).optional_string(text).optional_string("k").optional_string(uri)
    with pytest.raises(DomainXmlError, match="own"):
        proxy.call(264, arguments.uint32(0))
    with pytest.raises(LibvirtError) as caught:
        proxy.call(265, Packer().domain(domain).int32(2).optional_string(NAMESPACE).uint32(0))
    assert RemoteError.unpack(caught.value.payload).code == 80


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("<options dsm='none'/>", OPTIONS),
        (None, OPTIONS),
        (f"<o:options xmlns:o='{OPTIONS}'/>", "urn:x"),
        (f"<options xmlns='{OPTIONS.replace(':', '&#58;')}'/>", "urn:x"),
    ],
)
def test_options_are_no_metadata_that_clients_set(proxy: Proxy, text: str | None, uri: str) -> None:
    domain = proxy.define(xml("a"))
    proxy.libvirtd.calls.clear()
    arguments = Packer().domain(domain).int32(2).optional_string(text).optional_string("k").optional_string(uri)
    with pytest.raises(DomainXmlError, match="change only with the definition"):
        proxy.call(264, arguments.uint32(0))
    assert proxy.libvirtd.calls == []
    proxy.call(265, Packer().domain(domain).int32(2).optional_string(OPTIONS).uint32(0))
    assert proxy.libvirtd.calls == [265]


@pytest.mark.parametrize(
    "uri",
    [
        *("urn:nvdimm-driver:domain&#58;1", "urn:nvdimm-driver:domain&#x3a;1", "x<y", "x>y", "x'y", 'x"y', "x&amp;y"),
        *("x\ny", "x\x01y", "x\x7fy", "x\ufffey", " x", "x "),
    ],
)
def test_no_name_that_is_another_one_in_xml_reaches_libvirt(proxy: Proxy, uri: str) -> None:
    """libvirt writes it as it is, and whoever reads that reads something else, or cannot read the domain any more."""
    domain = proxy.define(xml("a"))
    for key, name in (("k", uri), (uri, "urn:x")):
        arguments = Packer().domain(domain).int32(2).optional_string("<a/>").optional_string(key)
        with pytest.raises(DomainXmlError, match="has a character that means something else in XML"):
            proxy.call(264, arguments.optional_string(name).uint32(0))


def test_no_title_that_xml_cannot_have_reaches_libvirt(proxy: Proxy) -> None:
    domain = proxy.define(xml("a"))
    for kind in (0, 1):
        for text in ("x\x01y", "x\ufffey", "x\uffffy"):
            arguments = Packer().domain(domain).int32(kind).optional_string(text)
            with pytest.raises(DomainXmlError, match="has a character that XML cannot have"):
                proxy.call(264, arguments.optional_string(None).optional_string(None).uint32(0))
        arguments = Packer().domain(domain).int32(kind).optional_string("a & <b> 'ä' \u5ba2 \U0001f600")
        proxy.call(264, arguments.optional_string(None).optional_string(None).uint32(0))
        assert proxy.libvirtd.calls[-1] == 264


def test_other_metadata_pass(proxy: Proxy) -> None:
    domain = proxy.define(xml("a"))
    arguments = Packer().domain(domain).int32(2).optional_string("<a/>").optional_string("k").optional_string("urn:x")
    proxy.call(264, arguments.uint32(0))
    proxy.call(265, Packer().domain(domain).int32(2).optional_string("urn:x").uint32(0))
    assert proxy.libvirtd.calls[-2:] == [264, 265]


def test_what_is_opened_is_told_in_a_line_that_a_log_takes(proxy: Proxy) -> None:
    with pytest.raises(UnsupportedError) as caught:
        proxy.call(Procedure.CONNECT_OPEN, Packer().uint32(1).opaque(b"test:///\xf6\n" + b"x" * 100_000).uint32(0))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


def test_an_image_that_is_not_there_is_refused(proxy: Proxy) -> None:
    """Something else could be there by the time that libvirtd looks."""
    with pytest.raises(RefusedError) as info:
        proxy.call(Procedure.DOMAIN_RESTORE, Packer().opaque(b"/missing\xf6/image"))
    assert info.value.message == r"/missing\udcf6/image: No such file or directory"
    assert proxy.libvirtd.calls == []


def test_to_native_names_the_device_model(proxy: Proxy) -> None:
    reply = proxy.call(136, Packer().string("xen-xl").string(xml("a")).uint32(0))
    assert DEVICE_MODEL in Unpacker(reply).string()
    reply = proxy.call(136, Packer().string("xen-xl").string(xml()).uint32(0))
    assert Unpacker(reply).string() == f"native of xen-xl {xml()}"


def test_migration_is_refused_at_both_ends(proxy: Proxy) -> None:
    domain = proxy.define(xml("a"))
    for procedure in (302, 305):
        with pytest.raises(UnsupportedError, match="domain db1 has NVDIMMs, and cannot be migrated"):
            proxy.call(procedure, Packer().domain(domain))
    comes = TypedParam("destination_xml", 7, rewrite(xml("a"), DEVICE_MODEL))
    for procedure in (303, 304):
        with pytest.raises(UnsupportedError, match="the domain that comes has NVDIMMs"):
            proxy.call(procedure, Packer().typed_params([TypedParam("bandwidth", 4, 9), comes]).opaque(b"").uint32(0))
    other = domain._replace(uuid="7c7b0e2e-4a6e-4f0e-9a3b-000000000009")
    proxy.call(302, Packer().domain(other))
    proxy.call(303, Packer().typed_params([TypedParam("destination_xml", 7, xml())]).opaque(b"").uint32(0))
    assert proxy.libvirtd.calls[-2:] == [302, 303]


@pytest.mark.parametrize("procedure", [303, 304])
def test_a_forged_emulator_is_refused_in_a_domain_that_comes(proxy: Proxy, procedure: int) -> None:
    comes = TypedParam("destination_xml", 7, xml(more=f"<emulator>{DEVICE_MODEL}</emulator>"))
    with pytest.raises(DomainXmlError, match="names the device model"):
        proxy.call(procedure, Packer().typed_params([comes]).opaque(b"").uint32(0))
    assert proxy.libvirtd.calls == []


ADDRESS = "<address type='dimm' slot='0' base='0x1400000000'/>"


def test_ram_of_the_next_start_may_move_nvdimms_and_that_of_a_running_guest_may_not(
    proxy: Proxy, driver: XenNvdimmDriver
) -> None:
    domain = proxy.define(xml("a"))

    def set_maximum(procedure: int, *flags: int) -> bytes:
        packer = Packer().domain(domain).uint64(200 * GIB // KIB)
        return proxy.call(procedure, packer.uint32(4 | flags[0]) if flags else packer)

    set_maximum(30)
    set_maximum(204, CONFIG)
    spec = extract(xml("a"))
    assert spec is not None
    driver.prepare(spec)
    with pytest.raises(UnsupportedError, match="it would not start again after a reboot"):
        set_maximum(204, CONFIG)
    for arguments in ((30,), (204, 0), (204, LIVE), (204, LIVE | CONFIG)):
        with pytest.raises(LayoutError, match="domain db1 runs: RAM of 200 GiB reaches up to") as caught:
            set_maximum(*arguments)
        assert "virsh edit" in caught.value.hint
    assert [each for each in proxy.libvirtd.calls if each != Procedure.DOMAIN_GET_XML_DESC][-2:] == [30, 204]


def test_ram_stays_clear_of_the_nvdimms_and_is_never_populated_on_demand(proxy: Proxy) -> None:
    domain = proxy.define(xml("a").replace("</memory></devices>", f"{ADDRESS}</memory></devices>"))
    with pytest.raises(LayoutError, match="overlaps the guest's RAM of 200 GiB"):
        proxy.call(30, Packer().domain(domain).uint64(200 * GIB // KIB))
    with pytest.raises(LayoutError, match="overlaps the guest's RAM of 200 GiB"):
        proxy.call(204, Packer().domain(domain).uint64(200 * GIB // KIB).uint32(4 | CONFIG))
    proxy.call(30, Packer().domain(domain).uint64(GIB // KIB))
    for flags in (CONFIG, 0):
        with pytest.raises(UnsupportedError, match="populated on demand"):
            proxy.call(204, Packer().domain(domain).uint64(256 * KIB).uint32(flags))
    proxy.call(31, Packer().domain(domain).uint64(256 * KIB))
    proxy.call(204, Packer().domain(domain).uint64(512 * KIB).uint32(CONFIG))
    other = domain._replace(uuid="7c7b0e2e-4a6e-4f0e-9a3b-000000000009")
    proxy.call(204, Packer().domain(other).uint64(1).uint32(CONFIG))
    assert [each for each in proxy.libvirtd.calls if each != Procedure.DOMAIN_GET_XML_DESC][-4:] == [30, 31, 204, 204]


def test_undefine_keeps_claim_and_data(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking, caplog: pytest.LogCaptureFixture
) -> None:
    domain = proxy.define(xml("a"))
    with caplog.at_level("INFO"):
        proxy.call(231, Packer().domain(domain).uint32(0))
    assert f"event=undefined domain=db1 uuid={UUID} domid=- kept=/mnt/pmem0/a" in caplog.text
    assert driver.ledger.find_domain(UUID) is not None
    assert set(backing.files) == {"/mnt/pmem0/a"}
    proxy.define(xml("a"))
    assert set(backing.files) == {"/mnt/pmem0/a"}


def test_the_next_domain_of_that_name_takes_up_the_nvdimms(proxy: Proxy, backing: MemoryBacking) -> None:
    first = proxy.define(xml("a", uuid="7c7b0e2e-4a6e-4f0e-9a3b-000000000007"))
    proxy.call(35, Packer().domain(first))
    assert proxy.define(xml("a", uuid=None)).uuid == first.uuid
    assert set(backing.files) == {"/mnt/pmem0/a"}


def test_a_client_that_only_reads_is_left_to_libvirtd() -> None:
    """Only reading calls are intercepted: a handler must not do what libvirtd would refuse."""
    interceptor = Interceptor(lambda: pytest.fail("no driver is needed"), HOOKS)
    assert set(interceptor.table(read_only=True)) == {
        Procedure.CONNECT_OPEN,
        Procedure.DOMAIN_GET_XML_DESC,
        Procedure.DOMAIN_GET_METADATA,
        Procedure.DOMAIN_HAS_MANAGED_SAVE_IMAGE,
    }


@pytest.mark.parametrize("uri", ["xen:///system", "xen:///", "xen://", "xen:/"])
def test_a_connection_to_xen_is_opened(proxy: Proxy, uri: str) -> None:
    arguments = Packer().optional_string(uri).uint32(0)
    proxy.call(Procedure.CONNECT_OPEN, arguments)
    assert (proxy.libvirtd.calls, proxy.libvirtd.payloads) == ([Procedure.CONNECT_OPEN], [bytes(arguments)])


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "",
        "test:///default",
        "qemu:///system",
        "lxc:///",
        "xen+tcp://127.0.0.1/system",
        "xen+ext:///system?command=/run/me",
        "xen://other/system",
        "xen:///system?a=b",
        "XEN:///system",
        "xen:///system ",
        "remote:///?name=xen:///system",
    ],
)
def test_no_other_driver_is_opened(proxy: Proxy, uri: str | None) -> None:
    with pytest.raises(UnsupportedError, match="is for xen:///system"):
        proxy.call(Procedure.CONNECT_OPEN, Packer().optional_string(uri).uint32(0))


def test_no_connection_to_xen_stays_open(tmp_path: Path, backing: MemoryBacking) -> None:
    made: list[RecordingMapper] = []

    def mapped_by() -> XenNvdimmDriver:
        made.append(RecordingMapper())
        return make_driver(tmp_path, backing, made[-1])

    proxy = Proxy(tmp_path, backing)
    proxy.interceptor = Interceptor(mapped_by, HOOKS)
    domain = proxy.define(xml("a.img"))
    proxy.call(START, Packer().domain(domain))
    assert made
    assert all(mapper.closed for mapper in made)
