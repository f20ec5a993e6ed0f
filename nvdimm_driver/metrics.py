# SPDX-License-Identifier: Apache-2.0
"""Metrics for Prometheus.

node_exporter's textfile collector reads the file (https://github.com/prometheus/node_exporter#textfile-collector).
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.model import PAGE, Allocation, Record

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        Metric,
        SummaryMetricFamily,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError(
        f"metrics: {error}", hint="install python3-prometheus-client, or leave [metrics] textfile unset"
    ) from error

PREFIX = "nvdimm_driver_"
STATES = ("provisioning", "free", "preparing", "prepared", "mapping", "mapped")
NO_POOL = ""
"""Pool label of NVDIMMs that are in no pool (allow_any_path)."""


def write(make_driver: Callable[[], XenNvdimmDriver], path: str) -> None:
    """Write the metrics to a file that everybody may read, replacing it atomically.

    :raises OSError: when it cannot be written.
    """
    driver = make_driver()
    with closing(driver):
        driver.reconcile()
        text = render(driver)
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def render(driver: XenNvdimmDriver) -> bytes:
    """Return the metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(DriverCollector(driver))
    return generate_latest(registry)


class DriverCollector(Collector):
    """Reads the metrics from the ledger and the pools."""

    def __init__(self, driver: XenNvdimmDriver) -> None:
        self._driver = driver

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics. Labels are few: doc/monitoring.rst names the metrics that have one for each domain."""
        records = self._driver.ledger.domains()
        yield from self._allocations(records)
        yield from self._pools()
        yield from self._running()
        yield from self._counted()
        yield from self._label_requests(records)
        yield from self._events()

    def _allocations(self, records: tuple[Record, ...]) -> Iterator[Metric]:
        count: Counter[tuple[str, str]] = Counter()
        size: Counter[str] = Counter()
        names = [pool.name for pool in self._driver.pools]
        for name in names:
            size[name] = 0
            count.update({(name, state): 0 for state in STATES})
        places = self._driver.pools.places()
        for record in records:
            for item in record.claims:
                pool = places.pool_of(item.spec.path)
                name = NO_POOL if pool is None else pool.name
                count[name, _state(record, item)] += 1
                size[name] += item.spec.size
        yield _gauge("allocations", "NVDIMMs that domains have, by pool and state.", ("pool", "state"), count)
        yield _gauge(
            "allocated_bytes",
            "Bytes that domains have, label areas included, by pool.",
            ("pool",),
            {(name,): value for name, value in size.items()},
        )

    def _pools(self) -> Iterator[Metric]:
        usages = [self._driver.measure_pool(pool) for pool in self._driver.pools]
        known = {usage.pool.name: usage for usage in usages}
        yield _gauge(
            "pool_capacity_bytes",
            "Capacity of a pool in bytes.",
            ("pool",),
            {(name,): usage.space.capacity for name, usage in known.items() if usage.space},
        )
        yield _gauge(
            "pool_free_bytes",
            "Bytes of a pool that domains can still have, within its quota.",
            ("pool",),
            {(name,): usage.free for name, usage in known.items() if usage.free is not None},
        )
        yield _gauge(
            "pool_problems",
            "Number of problems of a pool ('nvdimmctl pool show' lists them).",
            ("pool",),
            {(name,): len(usage.problems) for name, usage in known.items()},
        )

    def _running(self) -> Iterator[Metric]:
        domains, frames = self._driver.ledger.count_mapped()
        yield _gauge("running_domains", "Domains that have their NVDIMMs mapped.", (), {(): domains})
        unheld = len(self._driver.guest_processes.find_unheld())
        yield _gauge("unheld_domains", "Running domains whose backings nothing holds.", (), {(): unheld})
        yield _gauge("mapped_bytes", "Bytes of persistent memory mapped into domains.", (), {(): frames * PAGE})

    def _counted(self) -> Iterator[Metric]:
        counters = self._driver.ledger.counters()
        total = {name: value for name, label, value in counters if not label}
        starts = CounterMetricFamily(f"{PREFIX}starts", "Starts of domains that got their NVDIMMs.")
        starts.add_metric([], total.get("starts", 0))
        yield starts
        failures = CounterMetricFamily(
            f"{PREFIX}start_failures", "Starts that failed because of NVDIMMs, by error.", labels=["reason"]
        )
        for name, label, value in counters:
            if name == "start_failures":
                failures.add_metric([label], value)
        yield failures
        yield SummaryMetricFamily(
            f"{PREFIX}harvest_seconds",
            "Time that QEMUs took to provide ACPI tables; cached tables are not counted.",
            count_value=int(total.get("harvests", 0)),
            sum_value=total.get("harvest_seconds", 0),
        )
        yield SummaryMetricFamily(
            f"{PREFIX}map_seconds",
            "Time that mapping took in each start.",
            count_value=int(total.get("starts", 0)),
            sum_value=total.get("map_seconds", 0),
        )

    def _label_requests(self, records: tuple[Record, ...]) -> Iterator[Metric]:
        family = CounterMetricFamily(
            f"{PREFIX}label_requests",
            "Requests that a domain's label server answered, or failed to answer (only dsm=qemu has label servers).",
            labels=["domain", "uuid", "result"],
        )
        for record in records:
            counts = self._driver.starts.label_servers.requests(record.uuid)
            for result, value in zip(("answered", "failed"), counts or (), strict=False):
                family.add_metric([record.name, record.uuid, result], value)
        yield family

    def _events(self) -> Iterator[Metric]:
        yield _gauge(
            "last_event_timestamp_seconds",
            "Time of the last event of each kind.",
            ("event",),
            {(kind,): seconds for kind, seconds in self._driver.ledger.last_times()},
        )


def _gauge(
    name: str,
    documentation: str,
    labels: tuple[str, ...],
    values: dict[tuple[str, ...], float] | Counter[tuple[str, str]],
) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, documentation, labels=labels)
    for found, value in sorted(values.items()):
        family.add_metric(list(found), value)
    return family


def _state(record: Record, item: Allocation) -> str:
    if not item.ready:
        return "provisioning"
    return record.start.state if record.start and item in record.started else "free"
