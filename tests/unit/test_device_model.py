from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvdimm_driver.cmd.device_model import Log, attach
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import GuardError, LedgerError, XenError
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, domain, make_driver, started

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


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(str(tmp_path / "log"))


def fault(driver: XenNvdimmDriver) -> str:
    record = driver.ledger.domain(UUID)
    assert record is not None
    return record.fault


def test_it_maps_delivers_and_names_the_qemu(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    prepared = started(driver.ledger)
    assert attach(5, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known) == "/usr/bin/real-qemu"
    assert mapper.mapped == {5: prepared.mappings}
    assert mapper.delivered[5] == driver.tables_file(UUID).read_bytes()
    record = driver.ledger.domain(UUID)
    assert record is not None
    assert record.attachment is not None
    assert (record.attachment.state, record.attachment.domid) == ("mapped", 5)
    assert "mapped 1 extents, 32 entries of 2 MiB, 0 of 4 KiB" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("step", ["map", "deliver"])
def test_a_failure_leaves_nothing_mapped_and_is_kept(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path, step: str
) -> None:
    driver.prepare(domain(A))
    mapper.fail = step
    with pytest.raises(XenError, match=r"E\w+"):
        attach(5, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known)
    assert mapper.mapped == {}
    assert fault(driver).startswith("E")


def test_the_guards_run_before_anything_is_mapped(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    mapper.ram_ranges.append((started(driver.ledger).mappings[0][1], 1))
    with pytest.raises(GuardError):
        attach(5, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known)
    assert mapper.mapped == {}
    assert "RAM" in fault(driver)


def test_frames_of_another_start_are_refused(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    mappings = started(driver.ledger).mappings
    driver.ledger.replace(OTHER_UUID, "db2", 1, [])
    driver.ledger.attach(OTHER_UUID, [])
    driver.ledger.prepared(OTHER_UUID, "/q", (0, 1), [mappings[0]], [], label_server=False)
    with pytest.raises(GuardError, match="db2"):
        attach(5, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known)
    assert mapper.mapped == {}


def test_a_restored_guest_has_its_tables_already(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    attach(5, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known, restored=True)
    assert list(mapper.mapped) == [5]
    assert mapper.delivered == {}


def test_a_start_of_which_no_hook_has_told_is_prepared_now(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path
) -> None:
    """xl runs no hooks."""
    assert attach(5, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known) == "/usr/bin/real-qemu"
    assert mapper.delivered[5] == driver.tables_file(UUID).read_bytes()


def test_a_domain_that_was_never_defined_has_no_start(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path
) -> None:
    mapper.alive[6] = OTHER_UUID
    with pytest.raises(LedgerError, match=f"no NVDIMMs are known for domain {OTHER_UUID}"):
        attach(6, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known)


def test_a_guest_that_has_memory_where_the_nvdimm_goes_is_refused(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    mapper.guest_frames = started(driver.ledger).mappings[0][0] + 1
    with pytest.raises(GuardError):
        attach(5, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known)
    assert mapper.mapped == {}


def test_missing_tables_are_an_error_with_their_path(
    driver: XenNvdimmDriver, mapper: RecordingMapper, log: Log, tmp_path: Path
) -> None:
    driver.prepare(domain(A))
    driver.tables_file(UUID).unlink()
    with pytest.raises(XenError, match=str(driver.tables_file(UUID))):
        attach(5, driver.ledger, mapper, str(tmp_path), log, driver.prepare_known)
    assert mapper.mapped == {}


def test_a_run_without_a_domain_becomes_qemu(tmp_path: Path) -> None:
    """libvirt asks the emulator for -help; no ledger is needed for that."""
    script = (
        "from nvdimm_driver.cmd.device_model import main\n"
        f"main(['nvdimm-device-model', 'hello'], state_dir='/nonexistent', log_file={str(tmp_path / 'log')!r}, "
        "qemu='/bin/echo')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "hello\n"


def test_it_imports_little() -> None:
    """Of what takes long to import, nothing (the whole of it is to start in less than three bare interpreters)."""
    script = (
        "import sys; before = set(sys.modules)\n"
        "import nvdimm_driver.cmd.device_model, nvdimm_driver.xen.domctl\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & TOO_SLOW == set()
    assert "nvdimm_driver.ledger" in done.stdout
