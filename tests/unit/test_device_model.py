# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver import conf
from nvdimm_driver.cmd import device_model, label_server
from nvdimm_driver.cmd.device_model import attach, is_run_by_libvirt
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, GuardError, LedgerError, XenError
from nvdimm_driver.labels.servers import MODULE, LabelServers
from nvdimm_driver.model import MIB, BackingIdentity, DomainSpec, NvdimmSpec, Run
from nvdimm_driver.plugins import ByteRange
from tests.unit.doubles import (
    OTHER_UUID,
    UUID,
    MemoryBacking,
    RecordingMapper,
    TablesOfNative,
    domain,
    make_driver,
    started,
)
from tests.waiting import HANG_SECONDS

A = "/mnt/pmem0/a"
TOO_SLOW = {"argparse", "cffi", "ctypes", "dataclasses", "enum", "json", "logging", "lxml", "oslo_config", "pathlib"}
TOO_SLOW |= {"re", "stevedore", "typing"}


@pytest.fixture
def mapper() -> RecordingMapper:
    return RecordingMapper(alive={5: UUID})


@pytest.fixture
def driver(tmp_path: Path, mapper: RecordingMapper) -> XenNvdimmDriver:
    driver = make_driver(tmp_path, MemoryBacking(), mapper)
    driver.define(domain(A))
    return driver


def no_server(state_dir: str, domid: int, uuid: str) -> None:
    raise AssertionError("this guest needs no label server")


def fault(driver: XenNvdimmDriver) -> str:
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    return record.fault


def test_it_maps_delivers_and_names_the_qemu(driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path) -> None:
    driver.prepare(domain(A))
    prepared = started(driver.ledger)
    assert attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server) == "/usr/bin/real-qemu"
    assert mapper.mapped == {5: prepared.mappings}
    assert mapper.copying == {5}
    assert mapper.delivered[5] == driver.tables_file(UUID).read_bytes()
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert record.start is not None
    assert (record.start.state, record.start.domid) == ("mapped", 5)
    (*_, event) = driver.ledger.events()
    assert (event.kind, event.name, event.uuid, event.domid) == ("started", "db1", UUID, 5)
    assert [event.detail[key] for key in ("extents", "superpages", "pages", "hypercalls")] == [1, 32, 0, 1]


def test_a_start_whose_holder_has_died_maps_nothing(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    holders = driver.starts.holders
    holders.kill(UUID, holders.find(UUID))
    with pytest.raises(LedgerError, match="the process that holds the backings of domain db1 has died"):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server, is_held=holders.has)
    assert mapper.mapped == {}


@pytest.mark.parametrize("step", ["map", "deliver"])
def test_a_failure_leaves_nothing_mapped_and_is_kept(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, step: str
) -> None:
    driver.prepare(domain(A))
    mapper.fail = step
    with pytest.raises(XenError, match=r"E\w+"):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert mapper.mapped == {}
    assert mapper.announced[5] == []
    assert fault(driver).startswith("E")


def test_the_guards_run_before_anything_is_mapped(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    mapper.ram_ranges.append((started(driver.ledger).mappings[0][1], 1))
    with pytest.raises(GuardError):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert mapper.mapped == {}
    assert "RAM" in fault(driver)


def test_frames_of_another_start_are_refused(driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path) -> None:
    driver.prepare(domain(A))
    mappings = started(driver.ledger).mappings
    driver.ledger.store(OTHER_UUID, "db2", 1, [])
    start = driver.ledger.begin_start(OTHER_UUID, [])
    driver.ledger.finish_preparing(start, "/q", (0, 1), [mappings[0]], [], run=Run(2, "[]", "{}"))
    with pytest.raises(GuardError, match="db2"):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert mapper.mapped == {}


@pytest.mark.parametrize("uuid", [OTHER_UUID, UUID])
def test_frames_of_a_guest_that_the_ledger_does_not_know_are_refused(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, uuid: str
) -> None:
    """The ledger was lost, or is that of another state_dir; or it is the same domain, twice."""
    driver.prepare(domain(A))
    mapper.alive[3] = uuid
    mapper.announce(3, started(driver.ledger).mappings[:1])
    with pytest.raises(GuardError, match="in use by the running domain with domid 3"):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert mapper.mapped == {}
    assert not mapper.announced.get(5)
    del mapper.alive[3]
    driver.prepare(domain(A))
    attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert mapper.announced[5] == [each[1:] for each in mapper.mapped[5]]


def test_of_two_device_models_at_once_one_sees_the_other(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.prepare(domain(A))
    announce = mapper.announce

    def both(domid: int, mappings: list[tuple[int, int, int]]) -> None:
        mapper.alive[3] = OTHER_UUID
        announce(3, mappings)
        announce(domid, mappings)

    monkeypatch.setattr(mapper, "announce", both)
    with pytest.raises(GuardError, match="in use by the running domain with domid 3"):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert mapper.mapped == {}
    assert mapper.announced[5] == []


def test_a_restored_guest_has_its_tables_already(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    image = saved(driver, mapper, tmp_path)
    mapper.restore(6, UUID, image)
    driver.prepare(domain(A))
    attach(6, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server, restored=True)
    assert list(mapper.mapped) == [6]
    assert mapper.delivered == {}


def test_a_start_of_which_no_hook_has_told_is_prepared_now(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    """xl runs no hooks."""
    assert attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server) == "/usr/bin/real-qemu"
    assert mapper.delivered[5] == driver.tables_file(UUID).read_bytes()


@pytest.mark.parametrize(
    ("line", "is_libvirt"),
    [
        (b"/usr/sbin/libvirtd\0--timeout\0120\0", True),
        (b"virtxend\0", True),
        (b"xl\0create\0/etc/xen/libvirtd\0", False),
        (b"", False),
    ],
)
def test_libvirt_is_known_by_its_command(tmp_path: Path, line: bytes, is_libvirt: bool) -> None:
    (tmp_path / "cmdline").write_bytes(line)
    assert is_run_by_libvirt(str(tmp_path / "cmdline")) == is_libvirt
    assert not is_run_by_libvirt(str(tmp_path / "no process"))


def test_a_domain_that_was_never_defined_has_no_start(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    mapper.alive[6] = OTHER_UUID
    with pytest.raises(LedgerError, match=f"no NVDIMMs are known for domain {OTHER_UUID}"):
        attach(6, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)


def test_a_guest_that_has_memory_where_the_nvdimm_goes_is_refused(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    mapper.guest_frames = started(driver.ledger).mappings[0][0] + 1
    with pytest.raises(GuardError):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert mapper.mapped == {}


def test_missing_tables_are_an_error_with_their_path(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    driver.tables_file(UUID).unlink()
    with pytest.raises(XenError, match=str(driver.tables_file(UUID))):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert mapper.mapped == {}


def saved(driver: XenNvdimmDriver, mapper: RecordingMapper, folder: Path) -> dict[int, bytes]:
    """Start the domain, save its guest, and return the guest's memory."""
    (domid,) = mapper.alive
    driver.prepare_known(UUID)
    attach(domid, driver.ledger, mapper, str(folder), driver.prepare_known, lambda *_: None)
    mapper.boot(domid)
    mapper.alive.clear()
    driver.release(UUID)
    mapper.mapped.clear()
    mapper.delivered.clear()
    mapper.dsm_pages.clear()
    return mapper.memory.pop(domid)


def on_node(domain: DomainSpec) -> DomainSpec:
    """Return a domain, redefined with its NVDIMMs on another NUMA node: that can be done while it runs."""
    return replace(domain, nvdimms=tuple(replace(each, node=0) for each in domain.nvdimms))


@pytest.mark.parametrize("restored", [False, True])
def test_a_guest_with_labels_gets_its_page_and_a_label_server(
    tmp_path: Path, mapper: RecordingMapper, restored: bool
) -> None:
    """A restored guest has its page already. The ledger records the labels that the guest was started with."""
    driver = make_driver(tmp_path, MemoryBacking(), mapper, dsm="qemu", acpi=TablesOfNative())
    labelled = domain(A, label_size=MIB)
    driver.define(labelled)
    if restored:
        mapper.restore(5, UUID, saved(driver, mapper, tmp_path))
    driver.prepare(labelled)
    started: list[tuple[str, int, str, set[int]]] = []

    def serve(state_dir: str, domid: int, uuid: str) -> None:
        started.append((state_dir, domid, uuid, set(mapper.dsm_pages)))

    attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, serve, restored=restored)
    assert started == [(str(tmp_path), 5, UUID, set() if restored else {5})]
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert record.start is not None
    assert record.start.served == record.labels
    driver.define(on_node(labelled))
    redefined = driver.ledger.find_domain(UUID)
    assert redefined is not None
    assert redefined.start == record.start
    assert redefined.labels != record.labels


def test_without_its_label_server_a_guest_does_not_start(tmp_path: Path, mapper: RecordingMapper) -> None:
    driver = make_driver(tmp_path, MemoryBacking(), mapper, dsm="qemu", acpi=TablesOfNative())
    labelled = domain(A, label_size=MIB)
    driver.define(labelled)
    driver.prepare(labelled)

    def serve(state_dir: str, domid: int, uuid: str) -> None:
        raise XenError("no label server: no QEMU")

    with pytest.raises(XenError, match="no QEMU"):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, serve)
    assert mapper.mapped == {}
    assert "no QEMU" in fault(driver)


def test_a_run_without_a_domain_becomes_qemu(tmp_path: Path) -> None:
    """libvirt runs the emulator with -help, which needs no ledger."""
    script = (
        "from nvdimm_driver.cmd.device_model import main\n"
        f"main(['nvdimm-device-model', 'hello'], state_dir='/nonexistent', log_file={str(tmp_path / 'log')!r}, "
        "qemu='/bin/echo')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "hello\n"


def test_it_imports_little() -> None:
    """Nothing that is slow to import: the program has to start in less time than three bare interpreters."""
    script = (
        "import sys; before = set(sys.modules)\n"
        "import nvdimm_driver.cmd.device_model, nvdimm_driver.xen.domctl\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & TOO_SLOW == set()
    assert "nvdimm_driver.state.ledger" in done.stdout


def test_a_guest_whose_label_server_was_killed_gets_another(
    tmp_path: Path, mapper: RecordingMapper, caplog: pytest.LogCaptureFixture
) -> None:
    """A guest that has a server gets no other. There is no Xen here: that is logged and raises nothing."""
    driver = make_driver(tmp_path, MemoryBacking(), mapper, dsm="qemu", acpi=TablesOfNative())
    labelled = domain(A, label_size=MIB)
    driver.define(labelled)
    driver.prepare(labelled)
    attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, lambda *_: None)
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    lock = driver.starts.label_servers.lock(UUID)
    assert lock is not None
    driver.restart_lost()
    assert (caplog.text, driver.label_server_state(record)) == ("", "running")
    os.close(lock)
    driver.restart_lost()
    assert f"event=label-server-gone domain=db1 uuid={UUID} domid=5" in caplog.text
    assert "event=label-server-failed" in caplog.text
    assert "no label server for domid 5" in caplog.text
    assert driver.label_server_state(record) == "gone"
    mapper.alive.clear()
    caplog.clear()
    driver.restart_lost()
    assert caplog.text == ""


class OldServers(LabelServers):
    """Label servers that are all older than the code. A start does first what the real process does first."""

    def is_older_than(self, uuid: str, moment: float) -> bool:
        return super().is_older_than(uuid, math.inf)

    def start(self, domid: int, uuid: str) -> None:
        options = conf.load([])
        options.set_override("state_dir", str(self.state_dir))
        try:
            label_server._record(options, uuid)
        except LedgerError as error:
            raise XenError(str(error)) from error


class BrokenLabels(MemoryBacking):
    """A backing whose label areas cannot be opened, when it is told so."""

    broken_labels = ""

    def open_labels(self, spec: NvdimmSpec, identity: BackingIdentity) -> ByteRange:
        if self.broken_labels:
            raise BackingError(self.broken_labels)
        return super().open_labels(spec, identity)


def test_a_server_that_no_other_can_follow_is_not_killed(
    tmp_path: Path, mapper: RecordingMapper, caplog: pytest.LogCaptureFixture
) -> None:
    """Another one would refuse to serve a domain that was redefined since its start, and the guest would hang.

    It could not serve one either whose label areas cannot be opened.
    """
    backing = BrokenLabels()
    driver = make_driver(tmp_path, backing, mapper, dsm="qemu", acpi=TablesOfNative())
    driver.starts.label_servers = OldServers(tmp_path)
    labelled = domain(A, label_size=MIB)
    driver.define(labelled)
    driver.prepare(labelled)
    attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, lambda *_: None)
    lock = tmp_path / "domains" / UUID / "label-server"
    hold = f"import fcntl, signal; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True)"
    command = [sys.executable, "-c", f"{hold}; signal.pause()", MODULE]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout
        assert server.stdout.readline() == b"\n"
        try:
            backing.broken_labels = "the pool is mounted elsewhere"
            assert [(each.name, renewed) for each, renewed in driver.renew_label_servers()] == [("db1", False)]
            assert server.poll() is None
            assert "the pool is mounted elsewhere" in caplog.text
            backing.broken_labels = ""
            driver.define(on_node(labelled))
            assert [(each.name, renewed) for each, renewed in driver.renew_label_servers()] == [("db1", False)]
            assert server.poll() is None
            driver.define(labelled)
            assert [(each.name, renewed) for each, renewed in driver.renew_label_servers()] == [("db1", False)]
            assert server.wait(HANG_SECONDS) == -signal.SIGKILL, (
                "and it is only said to be renewed when another one serves"
            )
        finally:
            server.kill()


def start_labelled(
    tmp_path: Path, mapper: RecordingMapper, wanted: str | None, host: str = "auto"
) -> tuple[str, list[tuple[int, int]]]:
    """Start a domain that wants this cache; return what the ledger says, and what is uncached, from the first frame."""
    driver = make_driver(tmp_path, MemoryBacking(), mapper, dsm="aml", cache=host)
    labelled = replace(domain(A, label_size=MIB), cache=wanted)
    driver.define(labelled)
    driver.prepare(labelled)
    attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    ((gfn, _, count),) = mapper.mapped[5]
    assert count == 64 * MIB // 4096
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert record.start is not None
    (started,) = (event for event in driver.ledger.events() if event.kind == "started")
    assert started.detail["cache"] == record.start.cache
    return record.start.cache, [(first - gfn, frames) for first, frames in mapper.uncached[5]]


LABELS = [(63 * MIB // 4096, MIB // 4096)]
WHOLE = [(0, 64 * MIB // 4096)]


@pytest.mark.parametrize(
    ("wanted", "host", "fault", "refuses", "cache", "uncached"),
    [
        (None, "auto", "stock", False, "uncached", WHOLE),
        (None, "auto", "", False, "write-back", LABELS),
        (None, "auto", "", True, "uncached", WHOLE),
        (None, "write-back", "", False, "write-back", LABELS),
        (None, "uncached", "", False, "uncached", WHOLE),
        ("uncached", "auto", "", False, "uncached", WHOLE),
        ("uncached", "write-back", "stock", False, "uncached", WHOLE),
        ("write-back", "uncached", "", False, "write-back", LABELS),
        ("auto", "write-back", "stock", False, "uncached", WHOLE),
    ],
)
def test_label_areas_that_the_guest_writes_by_itself_are_never_cached(
    tmp_path: Path,
    mapper: RecordingMapper,
    wanted: str | None,
    host: str,
    fault: str,
    refuses: bool,
    cache: str,
    uncached: list[tuple[int, int]],
) -> None:
    mapper.fault, mapper.refuses_pins = fault, refuses
    assert start_labelled(tmp_path, mapper, wanted, host) == (cache, uncached)


def test_what_must_be_cached_does_not_start_where_it_cannot(tmp_path: Path, mapper: RecordingMapper) -> None:
    with pytest.raises(XenError, match="this Xen is stock"):
        start_labelled(tmp_path, mapper, "write-back")
    assert (mapper.mapped, mapper.announced) == ({}, {5: []})


@pytest.mark.parametrize("change", [{"fault": "this Xen is stock"}, {"refuses_pins": True}])
def test_the_device_model_decides(tmp_path: Path, mapper: RecordingMapper, change: dict[str, str | bool]) -> None:
    mapper.fault = ""
    driver = make_driver(tmp_path, MemoryBacking(), mapper)
    wanted = replace(domain(A), cache="write-back")
    driver.define(wanted)
    driver.prepare(wanted)
    vars(mapper).update(change)
    with pytest.raises(XenError):
        attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    assert (mapper.mapped, mapper.announced) == ({}, {5: []})


def test_a_start_that_failed_after_the_mapping_is_unmapped_as_it_was_mapped(
    tmp_path: Path, mapper: RecordingMapper
) -> None:
    for fault in ("", "stock"):
        mapper.fault, mapper.fail = fault, "deliver"
        (tmp_path / f"x{fault}").mkdir()
        driver = make_driver(tmp_path / f"x{fault}", MemoryBacking(), mapper)
        driver.define(domain(A))
        driver.prepare(domain(A))
        with pytest.raises(XenError):
            attach(5, driver.ledger, mapper, str(driver.state_dir), driver.prepare_known, no_server)
        assert (mapper.mapped, mapper.uncached) == ({}, {})


@pytest.mark.parametrize("name", ["-incoming", "-xen-domid", "-help", "--version", "-S"])
def test_a_domain_that_is_called_like_an_option(name: str) -> None:
    words = ["dm", "-xen-domid", "7", "-no-shutdown", "-name", name, "-vnc", "none"]
    assert (device_model._domid(words), device_model._is_restored(words)) == (7, False)
    assert device_model._is_restored([*words, "-incoming", "fd:11", "-m", "512"])
    assert not device_model._is_restored([*words, "-incoming"])
