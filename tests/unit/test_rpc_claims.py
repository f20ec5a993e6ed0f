# SPDX-License-Identifier: Apache-2.0
"""What a domain has after a call of libvirt's clients that fails, is repeated, or meets another."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from inspect import GEN_CLOSED, getgeneratorstate
from itertools import count
from pathlib import Path

import pytest

from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, DomainXmlError, InUseError, LedgerError, RefusedError, UnsupportedError
from nvdimm_driver.model import BackingIdentity, DomainSpec, NvdimmSpec, Progress, Record
from nvdimm_driver.plugins import unwatched
from nvdimm_driver.rpc.handler_types import Call, Pool
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer, RemoteError, Unpacker
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import restore
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, domain, make_driver, map_prepared
from tests.unit.test_rpc_intercept import NVDIMM, Libvirtd, Proxy, message, xml
from tests.unit.test_rpc_races import Client
from tests.unit.test_saved_guests import save

A, B = "/mnt/pmem0/a", "/mnt/pmem0/b"
CREATE = Procedure.DOMAIN_CREATE_XML


class Watched(MemoryBacking):
    """Calls something while it writes zeros, once; counts how often it does so."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], None] | None = None
        self.provisioned = 0

    def provision(
        self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
    ) -> BackingIdentity:
        self.provisioned += 1
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            meanwhile()
        return super().provision(spec, progress, identity)


@pytest.fixture
def backing() -> Watched:
    return Watched()


@pytest.fixture
def driver(tmp_path: Path, backing: MemoryBacking) -> XenNvdimmDriver:
    return make_driver(tmp_path, backing, RecordingMapper())


@pytest.fixture
def proxy(tmp_path: Path, backing: MemoryBacking) -> Proxy:
    return Proxy(tmp_path, backing, RecordingMapper({5: UUID}))


def record(driver: XenNvdimmDriver) -> Record:
    found = driver.ledger.find_domain(UUID)
    assert found is not None
    return found


def create(proxy: Proxy, *files: str) -> bytes:
    return proxy.call(CREATE, Packer().string(xml(*files)).uint32(0))


@pytest.mark.parametrize("runs", [False, True], ids=["off", "running"])
@pytest.mark.parametrize("file", ["b", "there"])
def test_a_create_that_libvirt_refuses_takes_nothing(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking, runs: bool, file: str
) -> None:
    """Whether it would have a new file, or one that is there."""
    backing.files["/mnt/pmem0/there"] = (107, 64 << 20)
    proxy.define(xml("a"))
    if runs:
        driver.prepare(domain(A))
        map_prepared(driver.ledger, 5)
    before, marks, files = record(driver), backing.owners(), dict(backing.files)
    proxy.libvirtd.refuse = {CREATE: "domain 'db1' is already active"}
    with pytest.raises(LibvirtError) as refused:
        create(proxy, file)
    assert message(refused.value) == "domain 'db1' is already active"
    assert record(driver) == before
    assert (backing.owners(), backing.files) == (marks, files)
    with pytest.raises(InUseError, match="belongs to domain db1"):
        driver.define(domain(A, uuid=OTHER_UUID, name="stranger"))


@pytest.mark.parametrize(("runs", "name"), [(True, "db1"), (True, "evil"), (False, "evil")])
def test_a_create_that_libvirt_has_to_refuse_changes_nothing_meanwhile(
    proxy: Proxy, driver: XenNvdimmDriver, backing: Watched, runs: bool, name: str
) -> None:
    """Of a domain that runs, or that has another name: its client may never come to read libvirt's error."""
    proxy.define(xml("a"))
    if runs:
        driver.prepare(domain(A))
        map_prepared(driver.ledger, 5)
        proxy.libvirtd.running.add(UUID)
    before, files, provisioned, seen = record(driver), dict(backing.files), backing.provisioned, []
    proxy.libvirtd.refuse = {CREATE: "domain 'db1' is already active"}

    def answer(call: Call) -> bytes:
        if call.procedure == CREATE:
            seen.append((record(driver), dict(backing.files)))
        return answered(call)

    answered = proxy.libvirtd.answer
    proxy.libvirtd.answer = answer  # type: ignore[method-assign]
    with pytest.raises(LibvirtError):
        proxy.call(CREATE, Packer().string(xml("b", ram=1 << 30).replace("<name>db1", f"<name>{name}")).uint32(0))
    assert seen == [(before, files)]
    assert (record(driver), backing.files, backing.provisioned) == (before, files, provisioned)


def test_a_create_beside_a_definition_leaves_what_that_has(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    proxy.define(xml("a"))
    (before,) = record(driver).allocations
    create(proxy, "b")
    items = {item.spec.path: item for item in record(driver).allocations}
    assert items.keys() == {A, B}
    assert (items[A].identity, items[A].base) == (before.identity, before.base)
    proxy.define(xml("a"))
    assert record(driver).allocations == (before,)


def test_a_create_without_a_definition_gives_up_what_was_before_once_it_runs(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    """Not earlier: if libvirt refuses it, a stranger must not have taken it in between."""
    create(proxy, "a")
    proxy.libvirtd.defined.clear()  # it has ended
    before, marks, tried = record(driver), backing.owners(), []

    def answer(call: Call) -> bytes:
        if call.procedure == CREATE:
            with pytest.raises(InUseError, match="belongs to domain db1"):
                driver.define(domain(A, uuid=OTHER_UUID, name="stranger"))
            tried.append(call)
        return answered(call)

    answered = proxy.libvirtd.answer
    proxy.libvirtd.answer = answer  # type: ignore[method-assign]
    proxy.libvirtd.refuse = {CREATE: "no"}
    with pytest.raises(LibvirtError):
        create(proxy, "b")
    assert (record(driver), backing.owners(), len(tried)) == (before, marks, 1)
    proxy.libvirtd.refuse = {}
    create(proxy, "b")
    assert [item.spec.path for item in record(driver).allocations] == [B]
    assert backing.marks.keys() == {B}


def test_a_define_that_is_repeated_while_it_writes_zeros_is_told_so(
    proxy: Proxy, driver: XenNvdimmDriver, backing: Watched
) -> None:
    """A client's time-out is shorter than the work. The second must not undo what the first is doing."""

    def again() -> None:
        for call in (proxy.define, lambda text: create(proxy, "a")):
            with pytest.raises(
                InUseError,
                match=rf"or released by process {os.getpid()} \(.* for process 1 \(.*user 0",
            ):
                call(xml("a"))

    backing.meanwhile = again
    proxy.define(xml("a"))
    assert backing.provisioned == 1
    assert Procedure.DOMAIN_UNDEFINE not in proxy.libvirtd.calls
    assert record(driver).allocations[0].ready
    proxy.define(xml("a"))
    assert record(driver).allocations[0].ready


def test_the_error_of_a_define_is_told_also_if_libvirt_does_not_take_its_definition_back(
    proxy: Proxy, backing: MemoryBacking
) -> None:
    backing.fail_provision = {A}
    proxy.libvirtd.refuse = {Procedure.DOMAIN_UNDEFINE: "the daemon is tired"}
    with pytest.raises(BackingError, match="no space"):
        proxy.define(xml("a"))


@pytest.mark.parametrize("how", ["works", "fails", "is refused by libvirt"])
@pytest.mark.parametrize("had", [(), ("a", "b")])
def test_check_finds_a_define_that_was_killed_wherever_that_was(tmp_path: Path, had: tuple[str, ...], how: str) -> None:
    """After its repairs, the ledger has what libvirt's definition has."""
    for at in count(1):
        folder, backing = tmp_path / str(at), MemoryBacking()
        folder.mkdir()
        driver, proxy = make_driver(folder, backing, RecordingMapper()), Proxy(folder, backing)
        libvirtd = proxy.libvirtd
        if had:
            proxy.define(xml(*had))
        client = Client(proxy, Procedure.DOMAIN_DEFINE_XML, Packer().string(xml("a", "new")))
        backing.fail_provision = {"/mnt/pmem0/new"} if how == "fails" else set()
        libvirtd.refuse = {Procedure.DOMAIN_DEFINE_XML: "no"} if "refused" in how else {}
        with suppress(StopIteration, LibvirtError, BackingError):
            for _ in range(at):
                client.step()
        is_over = getgeneratorstate(client.steps) == GEN_CLOSED
        client.steps.close()
        backing.fail_provision = set()

        def defined(uuid: str, libvirtd: Libvirtd = libvirtd) -> DomainSpec | None:
            return extract(restore(libvirtd.defined.get(uuid, "<domain/>")))

        for finding in look(driver, defined):
            assert finding.mend
            finding.mend()
        assert look(driver, defined) == []
        wanted, found = defined(UUID), driver.ledger.find_domain(UUID)
        ready = {item.spec.path for item in found.allocations if item.ready} if found else set()
        assert {spec.path for spec in wanted.nvdimms} <= ready if wanted else not ready
        assert not (found and found.intents)
        driver.close()
        if is_over:
            assert at > 10
            break


WITHOUT = [
    (Procedure.DOMAIN_DEFINE_XML, Packer().string(xml())),
    (Procedure.DOMAIN_UNDEFINE, Packer().domain(DomainRef("db1", UUID, -1))),
    (
        Procedure.DOMAIN_DETACH_DEVICE_FLAGS,
        Packer().domain(DomainRef("db1", UUID, -1)).string(NVDIMM.format("a")).uint32(2),
    ),
]


@pytest.mark.parametrize(("procedure", "packer"), WITHOUT, ids=["define", "undefine", "detach"])
def test_a_ledger_from_elsewhere_lets_nothing_be_taken_from_a_definition(
    proxy: Proxy, driver: XenNvdimmDriver, procedure: Procedure, packer: Packer
) -> None:
    """The definition may be all that tells whose a device is: the ledger can be older."""
    proxy.define(xml("a"))
    driver.ledger.forget(UUID)
    driver.ledger.take_over(compared=False)
    before = dict(proxy.libvirtd.defined)
    with pytest.raises(LedgerError, match="is a backup or a copy") as refused:
        proxy.call(procedure, packer)
    assert "check --repair" in refused.value.hint
    assert proxy.libvirtd.defined == before
    driver.ledger.take_over(compared=True)
    proxy.call(procedure, packer)
    assert proxy.libvirtd.defined != before


def test_a_ledger_from_elsewhere_is_nothing_to_a_domain_without_nvdimms(proxy: Proxy, driver: XenNvdimmDriver) -> None:
    driver.ledger.take_over(compared=False)
    defined = proxy.define(xml())
    proxy.define(xml(ram=1 << 30))
    proxy.call(Procedure.DOMAIN_UNDEFINE, Packer().domain(defined))
    assert proxy.libvirtd.defined == {}


def test_a_domain_that_runs_with_nvdimms_cannot_be_migrated_whatever_its_definition(
    proxy: Proxy, driver: XenNvdimmDriver
) -> None:
    proxy.define(xml("a"))
    driver.prepare(domain(A))
    map_prepared(driver.ledger, 5)
    proxy.define(xml())
    assert record(driver).allocations == ()
    for procedure in (Procedure.DOMAIN_MIGRATE_BEGIN3_PARAMS, Procedure.DOMAIN_MIGRATE_PERFORM3_PARAMS):
        with pytest.raises(UnsupportedError, match="cannot be migrated"):
            proxy.call(procedure, Packer().domain(DomainRef("db1", UUID, 5)))


class Restoring(Libvirtd):
    """A libvirtd in which the start of a saved guest with A is prepared, and then refused."""

    def __init__(self, driver: XenNvdimmDriver) -> None:
        super().__init__()
        self.driver = driver

    def answer(self, call: Call) -> bytes:
        if call.procedure == Procedure.DOMAIN_RESTORE:
            self.driver.prepare(domain(A))
            self.driver.ledger.record_failure(UUID, RefusedError("the saved guest cannot go on"), 5)
            raise LibvirtError(RemoteError(1, 41, "libxenlight failed to restore domain").pack())
        return super().answer(call)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return the image of a saved guest."""
    save(tmp_path, "db1", UUID)
    return tmp_path / "db1.save"


@pytest.mark.parametrize("known", ["not at all", "libvirt", "ledger"])
def test_a_refused_restore_leaves_no_claim_that_the_domain_did_not_have(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking, image: Path, known: str
) -> None:
    backing.files[A] = (107, 64 << 20)
    proxy.libvirtd = Restoring(driver)
    if known == "ledger":
        driver.define(domain(B))
    elif known == "libvirt":
        proxy.libvirtd.defined[UUID] = xml()
    with pytest.raises(LibvirtError) as refused:
        proxy.call(Procedure.DOMAIN_RESTORE, Packer().string(str(image)))
    assert "the saved guest cannot go on" in message(refused.value)
    found = driver.ledger.find_domain(UUID)
    if known == "libvirt":
        assert found
        assert A in [item.spec.path for item in found.allocations], "the ledger was lost: it may have had it"
    else:
        assert [item.spec.path for item in (found.allocations if found else ())] == [B] * (known == "ledger")
        assert A not in backing.marks
        driver.define(domain(A, uuid=OTHER_UUID, name="db2"))
    assert A in backing.files


def test_libvirtd_gets_the_image_that_was_read(proxy: Proxy, image: Path) -> None:
    """The client's path may lead to another one by then, or to a FIFO, for which libvirtd would wait."""
    saved = image.read_bytes()
    flags = bytes(Packer().optional_string(None).uint32(2))
    one = Client(proxy, Procedure.DOMAIN_RESTORE_FLAGS, Packer().string(str(image)).optional_string(None).uint32(2))
    one.before(Procedure.DOMAIN_RESTORE_FLAGS)
    image.unlink()
    os.mkfifo(image)
    assert isinstance(one.request, Call)
    values = Unpacker(one.request.payload)
    path = Path(values.string())
    assert path != image
    assert (path.read_bytes(), values.rest()) == (saved, flags)
    one.finish()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("<domain", "<!DOCTYPE domain><domain"), "has a document type declaration"),
        (("<domain", "<?xml version='1.0' encoding='UTF-7'?><domain"), "encoding 'UTF-7' is not supported"),
        ((f"<uuid>{UUID}</uuid>", ""), "has no <uuid>"),
        (("<devices>", "x" * (4 << 20)), "the XML of the saved guest has"),
    ],
)
def test_an_image_that_libvirt_may_read_and_the_driver_does_not_is_refused(
    proxy: Proxy, image: Path, changed: tuple[str, str], says: str
) -> None:
    xml = image.read_bytes()[64:].replace(changed[0].encode(), changed[1].encode())
    image.write_bytes(struct.pack("=16sII40x", b"libvirt-xml\n \0 \r", 1, len(xml)) + xml)
    with pytest.raises(DomainXmlError, match=says):
        proxy.call(Procedure.DOMAIN_RESTORE, Packer().string(str(image)))
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(UnsupportedError, match="is a FIFO, a device or a folder"):
        proxy.call(Procedure.DOMAIN_RESTORE, Packer().string(str(image)))
    assert proxy.libvirtd.calls == []


@pytest.mark.parametrize("changed", [False, True])
def test_a_redefine_that_may_read_for_hours_keeps_only_those_like_it_waiting(proxy: Proxy, changed: bool) -> None:
    """What it gives up is read, here the label area: the guest may have written to it."""
    text = xml("a").replace("</target>", "<label><size unit='KiB'>128</size></label></target>", 1)
    proxy.define(text)
    proxy.pools.clear()
    proxy.define(xml("a") if changed else text)
    assert (Pool.ZEROS in proxy.pools) == changed


def test_a_refused_restore_leaves_the_mark_that_was_there_before(
    proxy: Proxy, driver: XenNvdimmDriver, backing: MemoryBacking, image: Path
) -> None:
    """The ledger was lost; a guest that was saved in a file is the domain's only trace, besides the mark."""
    driver.define(replace(domain(A), ram=1 << 30))
    (before,) = record(driver).allocations
    mark = backing.owners()[A]
    driver.ledger.forget(UUID)
    proxy.libvirtd = Restoring(driver)
    with pytest.raises(LibvirtError):
        proxy.call(Procedure.DOMAIN_RESTORE, Packer().string(str(image)))
    assert backing.owners()[A] == mark
    assert (record(driver).allocations, record(driver).start) == ((before,), None)
    with pytest.raises(InUseError):
        driver.define(domain(A, uuid=OTHER_UUID, name="db2"))


def known_by_its_mark(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    """Define the domain with B; A is its own by a mark that the ledger, from a backup, does not know."""
    driver.define(domain(A, B))
    mark = backing.marks[A]
    driver.define(domain(B))
    backing.marks[A] = mark


@pytest.mark.parametrize("way", ["restore", "create", "define"])
def test_a_call_that_fails_leaves_a_mark_that_the_ledger_does_not_know(
    proxy: Proxy,
    driver: XenNvdimmDriver,
    backing: MemoryBacking,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    known_by_its_mark(driver, backing)
    (had,) = record(driver).allocations
    if way == "restore":
        proxy.libvirtd = Restoring(driver)
        with pytest.raises(LibvirtError):
            proxy.call(Procedure.DOMAIN_RESTORE, Packer().string(str(image)))
    elif way == "create":
        proxy.libvirtd.refuse = {CREATE: "a network is missing"}
        with pytest.raises(LibvirtError):
            create(proxy, "a")
    else:
        monkeypatch.setattr(driver.definitions, "_settle", _fail)
        with pytest.raises(OSError, match="full"):
            driver.define(domain(A, B))
        monkeypatch.undo()
    assert had in record(driver).allocations
    assert A in backing.marks
    with pytest.raises(InUseError):
        driver.define(domain(A, uuid=OTHER_UUID, name="db2"))


def _fail(*_: object) -> None:
    raise OSError("full")


@pytest.mark.parametrize("fails", [False, True])
def test_a_start_without_nvdimms_gives_up_what_was_kept_only_if_it_succeeds(
    proxy: Proxy, driver: XenNvdimmDriver, fails: bool
) -> None:
    """What a saved guest has had is kept beside a definition without it."""
    proxy.define(xml("a"))
    had = record(driver).allocations
    proxy.libvirtd.defined[UUID] = xml()
    if fails:
        proxy.libvirtd.refuse = {Procedure.DOMAIN_CREATE: "a network is missing"}
        with pytest.raises(LibvirtError):
            proxy.call(Procedure.DOMAIN_CREATE, Packer().domain(DomainRef("db1", UUID, -1)))
    else:
        proxy.call(Procedure.DOMAIN_CREATE, Packer().domain(DomainRef("db1", UUID, -1)))
    found = driver.ledger.find_domain(UUID)
    assert (found.allocations if found else ()) == (had if fails else ())
