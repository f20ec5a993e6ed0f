# SPDX-License-Identifier: Apache-2.0
"""Events and counters that are written when a domain is defined, is started and ends."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from nvdimm_driver.cmd.device_model import Log, attach
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, GuardError, LedgerError, XenError
from nvdimm_driver.model import MIB
from nvdimm_driver.state.database import KEPT_EVENTS
from nvdimm_driver.state.events import Event
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.schema import SCHEMAS
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, domain, make_driver

A = "/mnt/pmem0/a"


@pytest.fixture
def mapper() -> RecordingMapper:
    return RecordingMapper()


@pytest.fixture
def driver(tmp_path: Path, mapper: RecordingMapper) -> XenNvdimmDriver:
    return make_driver(tmp_path, MemoryBacking(), mapper)


def no_server(state_dir: str, domid: int, uuid: str) -> None:
    raise AssertionError("none is needed")


def kinds(driver: XenNvdimmDriver) -> list[tuple[str, str, int | None]]:
    return [(event.kind, event.name, event.domid) for event in driver.ledger.events()]


def run(driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, domid: int = 5) -> None:
    mapper.alive[domid] = UUID
    attach(domid, driver.ledger, mapper, str(tmp_path), driver.prepare_known, no_server)


def counters(driver: XenNvdimmDriver) -> dict[tuple[str, str], float]:
    return {(name, label): value for name, label, value in driver.ledger.counters()}


def test_a_whole_life(driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    run(driver, mapper, tmp_path)
    mapper.alive.clear()
    driver.release(UUID)
    driver.forget(UUID)
    assert kinds(driver) == [
        ("defined", "db1", None),
        ("prepared", "db1", None),
        ("started", "db1", 5),
        ("released", "db1", 5),
        ("forgotten", "db1", None),
    ]
    events = driver.ledger.events()
    assert [event.id for event in events] == [1, 2, 3, 4, 5]
    assert sorted(event.time for event in events) == [event.time for event in events]
    assert {event.uuid for event in events} == {UUID}
    assert events[0].detail == {"nvdimms": 1, "bytes": 64 * MIB}
    assert events[2].detail["acpi_bytes"] == len(mapper.delivered[5])
    assert counters(driver)["starts", ""] == 1
    assert counters(driver)["map_seconds", ""] > 0
    assert driver.ledger.last_event() == 5
    assert driver.ledger.events(4) != driver.ledger.events(5) == []
    assert driver.ledger.last_times()[0] == ("defined", events[0].time)


def test_a_guest_that_ended_unseen_is_put_away(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    run(driver, mapper, tmp_path)
    mapper.alive.clear()
    driver.reconcile()
    assert kinds(driver)[-1] == ("put-away", "db1", 5)


def test_failed_starts_are_counted_by_reason(driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path) -> None:
    """A start fails in the hook, where nothing is prepared yet to be released, and in the device model."""
    driver.define(domain(A))
    mapper.ram_ranges.append((5 << 18, 1 << 20))
    with pytest.raises(GuardError):
        driver.prepare(domain(A))
    mapper.ram_ranges.pop()
    for _ in range(2):
        driver.prepare(domain(A))
        mapper.fail = "map"
        with pytest.raises(XenError):
            run(driver, mapper, tmp_path)
        mapper.alive.clear()
        driver.release(UUID)
    assert [kind for kind, *_ in kinds(driver)] == [
        "defined",
        "start-failed",
        *["prepared", "start-failed", "released"] * 2,
    ]
    first, second, _ = (event for event in driver.ledger.events() if event.kind == "start-failed")
    assert (first.detail["error"], first.domid) == ("GuardError", None)
    assert (second.detail, second.domid) == ({"error": "XenError", "message": "EPERM (no)"}, 5)
    assert counters(driver) == {("start_failures", "GuardError"): 1, ("start_failures", "XenError"): 2}


def test_a_start_without_hook_that_fails_is_counted_once(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    """The error passes through both the driver and the device model."""
    driver.define(domain(A))
    mapper.ram_ranges.append((5 << 18, 1 << 20))
    with pytest.raises(GuardError):
        run(driver, mapper, tmp_path)
    assert counters(driver) == {("start_failures", "GuardError"): 1}


def test_a_failed_start_of_a_domain_that_nobody_knows(driver: XenNvdimmDriver) -> None:
    with pytest.raises(BackingError):
        driver.prepare(domain(A))
    (event,) = driver.ledger.events()
    assert (event.kind, event.uuid, event.name, event.detail["error"]) == ("start-failed", UUID, "", "BackingError")


def test_a_define_that_fails_is_no_event(tmp_path: Path, mapper: RecordingMapper) -> None:
    backing = MemoryBacking()
    backing.fail_provision.add(A)
    driver = make_driver(tmp_path, backing, mapper)
    with pytest.raises(BackingError):
        driver.define(domain(A))
    assert kinds(driver) == []


def test_a_domain_that_is_redefined_without_nvdimms_has_given_them_up(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    run(driver, mapper, tmp_path)
    driver.drop_claims(UUID)
    mapper.alive.clear()
    driver.release(UUID)
    assert [kind for kind, *_ in kinds(driver)][-2:] == ["forgotten", "released"]
    (kept,) = driver.ledger.domains()
    assert kept.allocations == (), "its guest may be saved"
    driver.drop_claims(UUID)
    assert driver.ledger.domains() == ()


def test_what_is_not_written_did_not_happen(tmp_path: Path) -> None:
    """An event is written in the same transaction as the change."""
    told: list[Event] = []
    ledger = Ledger(str(tmp_path / "ledger.sqlite"), told.append)
    ledger.store(UUID, "db1", 5, [], kind="defined")
    (event,) = told
    assert (event.kind, event.name) == ("defined", "db1")
    ledger._write([("CREATE TRIGGER full BEFORE INSERT ON event BEGIN SELECT RAISE(ABORT, 'disk full'); END", ())])
    with pytest.raises(LedgerError, match="disk full"):
        ledger.store(OTHER_UUID, "db2", 5, [], kind="defined")
    assert [record.name for record in ledger.domains()] == ["db1"]
    assert len(told) == 1


def test_the_oldest_events_go(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    many = (
        "INSERT INTO event (time, kind, uuid, name, detail) WITH RECURSIVE n(i) AS "
        "(VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < ?) SELECT i, 'x', '', '', '{}' FROM n"
    )
    ledger._write([(many, (KEPT_EVENTS,))])
    ledger.record_event("undefined", UUID, {"kept": A})
    events = ledger.events()
    assert (len(events), events[0].id, events[-1].id) == (KEPT_EVENTS, 2, KEPT_EVENTS + 1)
    assert events[-1].detail == {"kept": A}


def test_a_ledger_without_events_gets_them(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as old:
        for schema in SCHEMAS[:2]:
            old.executescript(schema)
        old.execute("PRAGMA user_version = 2")
        old.execute("INSERT INTO domain (uuid, name, ram) VALUES (?, 'db1', 5)", (UUID,))
    ledger = Ledger(str(path))
    ledger.forget(UUID, kind="forgotten")
    (event,) = ledger.events()
    assert (event.kind, event.name, event.id) == ("forgotten", "db1", 1)


def test_a_log_that_cannot_be_written_keeps_no_guest_from_starting(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    mapper.alive[5] = UUID
    ledger = Ledger(str(tmp_path / "ledger.sqlite"), Log(str(tmp_path / "no/log")))
    attach(5, ledger, mapper, str(tmp_path), driver.prepare_known, no_server)
    said = capsys.readouterr().err
    assert f"nvdimm-device-model: event=started domain=db1 uuid={UUID} domid=5" in said
    assert "no/log: No such file" in said


@pytest.mark.parametrize(("form", "begins"), [("text", "20"), ("json", '{"time": "20')])
def test_the_device_model_logs_as_the_others_do(tmp_path: Path, form: str, begins: str) -> None:
    log = Log(str(tmp_path / "log"), form)
    log(Event("start-failed", UUID, "db1", 5, {"error": "XenError"}))
    assert log.failed
    assert (tmp_path / "log").read_text().startswith(begins)
