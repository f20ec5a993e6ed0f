# SPDX-License-Identifier: Apache-2.0
"""Metrics, as Prometheus' own parser reads them."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nvdimm_driver.acpi.native import NativeAcpiBuilder
from nvdimm_driver.cmd.device_model import attach
from nvdimm_driver.cmd.nvdimmd import repeat
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import XenError
from nvdimm_driver.metrics import render, write
from nvdimm_driver.model import GIB, MIB, SUPERPAGE, AcpiTables, GuestLayout, Pool
from nvdimm_driver.pools.rules import Pools
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, domain, make_driver

POOL = Pool("main", "memory", ("/mnt/pmem0/main",), GIB // 2, SUPERPAGE, 0, False)
A, B = "/mnt/pmem0/main/a", "/mnt/pmem0/elsewhere"
Sample = dict[tuple[str, frozenset[tuple[str, str]]], float]


class SlowBuilder(NativeAcpiBuilder):
    """Builds tables as if a QEMU had provided them the first time."""

    def __init__(self) -> None:
        self.seconds: Iterator[float | None] = iter([0.25])

    def build(self, layout: GuestLayout) -> AcpiTables:
        return replace(super().build(layout), seconds=next(self.seconds, None))


@pytest.fixture
def mapper() -> RecordingMapper:
    return RecordingMapper({5: UUID})


@pytest.fixture
def driver(tmp_path: Path, mapper: RecordingMapper) -> XenNvdimmDriver:
    """Return a driver with a running domain, and one that is off and in no pool."""
    backing = MemoryBacking()
    driver = make_driver(tmp_path, backing, mapper, pools=Pools([POOL], any_path=True), acpi=SlowBuilder())
    driver.define(domain(A))
    driver.define(domain(B, uuid=OTHER_UUID, name='d"b\n2'))
    driver.prepare(domain(A))
    attach(5, driver.ledger, mapper, str(tmp_path), driver.prepare_known, lambda *_: None)
    return driver


def samples(text: bytes) -> Sample:
    return {
        (sample.name.removeprefix("nvdimm_driver_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(found: Sample, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def test_allocations_and_pools(driver: XenNvdimmDriver) -> None:
    found = samples(render(driver))
    assert value(found, "allocations", pool="main", state="mapped") == 1
    assert value(found, "allocations", pool="main", state="free") == 0
    assert value(found, "allocations", pool="", state="free") == 1
    assert value(found, "allocated_bytes", pool="main") == 64 * MIB
    assert value(found, "pool_capacity_bytes", pool="main") == GIB
    assert value(found, "pool_free_bytes", pool="main") == GIB // 2 - 64 * MIB
    assert value(found, "pool_problems", pool="main") == 0


def test_a_pool_that_cannot_be_read_has_a_problem_and_no_size(driver: XenNvdimmDriver) -> None:
    (backing,) = driver.backings
    assert isinstance(backing, MemoryBacking)
    backing.fail_space = "not mounted"
    found = samples(render(driver))
    assert value(found, "pool_problems", pool="main") == 1
    assert value(found, "pool_capacity_bytes", pool="main") is None
    assert value(found, "pool_free_bytes", pool="main") is None


def test_what_runs_and_what_was_counted(driver: XenNvdimmDriver) -> None:
    driver.ledger.record_failure(OTHER_UUID, XenError("no"))
    driver.ledger.record_failure(OTHER_UUID, XenError("no"))
    found = samples(render(driver))
    assert value(found, "running_domains") == 1
    assert value(found, "mapped_bytes") == 64 * MIB
    assert value(found, "starts_total") == 1
    assert value(found, "start_failures_total", reason="XenError") == 2
    assert value(found, "harvest_seconds_count") == 1
    assert value(found, "harvest_seconds_sum") == 0.25
    assert value(found, "map_seconds_count") == 1
    assert (value(found, "map_seconds_sum") or 0) > 0
    (started,) = (event for event in driver.ledger.events() if event.kind == "started")
    assert value(found, "last_event_timestamp_seconds", event="started") == pytest.approx(started.time)


def test_a_guest_that_nothing_holds_is_counted(driver: XenNvdimmDriver) -> None:
    assert value(samples(render(driver)), "unheld_domains") == 0
    driver.starts.holders.kill(UUID, driver.starts.holders.find(UUID))
    assert value(samples(render(driver)), "unheld_domains") == 1


def test_label_requests_are_those_of_domains_that_have_a_server(driver: XenNvdimmDriver) -> None:
    counter = driver.starts.label_servers.count_requests(UUID)
    counter.add(failed=False)
    found = samples(render(driver))
    assert value(found, "label_requests_total", domain="db1", uuid=UUID, result="answered") == 1
    assert value(found, "label_requests_total", domain="db1", uuid=UUID, result="failed") == 0
    assert len([name for name, _ in found if name == "label_requests_total"]) == 2
    driver.tables_file(OTHER_UUID).parent.mkdir(parents=True)
    driver.starts.label_servers.count_requests(OTHER_UUID)
    found = samples(render(driver))
    assert value(found, "label_requests_total", domain='d"b\n2', uuid=OTHER_UUID, result="failed") == 0


def test_a_host_on_which_nothing_happened_has_all_counters(tmp_path: Path) -> None:
    found = samples(render(make_driver(tmp_path, MemoryBacking(), RecordingMapper())))
    assert found == dict.fromkeys(
        [
            (name, frozenset())
            for name in (
                "running_domains",
                "unheld_domains",
                "mapped_bytes",
                "starts_total",
                "harvest_seconds_count",
                "harvest_seconds_sum",
            )
        ]
        + [("map_seconds_count", frozenset()), ("map_seconds_sum", frozenset())],
        0,
    )


def test_the_file_is_whole_and_for_all_to_read(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path
) -> None:
    """A guest that has ended meanwhile is not counted as running."""
    file = tmp_path / "out/nvdimm.prom"
    file.parent.mkdir()
    file.write_text("old")
    mapper.alive.clear()
    write(lambda: driver, str(file))
    assert value(samples(file.read_bytes()), "running_domains") == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [each.name for each in file.parent.iterdir()] == ["nvdimm.prom"]


def test_a_folder_that_is_not_there_is_an_error(driver: XenNvdimmDriver, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(lambda: driver, str(tmp_path / "no/nvdimm.prom"))


def test_without_the_library_the_error_names_its_package() -> None:
    """The library is installed here, so an interpreter runs that does not find it."""
    script = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from nvdimm_driver.errors import ConfigError\n"
        "try:\n    import nvdimm_driver.metrics\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "python3-prometheus-client" in done.stdout


def test_nvdimmd_writes_until_it_stops_and_tells_an_error_once(caplog: pytest.LogCaptureFixture) -> None:
    stop = asyncio.Event()
    runs: list[int] = []

    def write() -> None:
        runs.append(1)
        if len(runs) == 6:
            stop.set()
        if len(runs) in (2, 3, 5):
            raise OSError("disk full")

    asyncio.run(repeat(write, 0.001, stop))
    assert len(runs) == 6
    assert [record.getMessage() for record in caplog.records] == ["metrics: disk full"] * 2
    asyncio.run(repeat(None, 0.001, stop))
