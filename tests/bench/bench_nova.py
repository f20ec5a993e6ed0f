# SPDX-License-Identifier: Apache-2.0
"""The effect of a cloud's size on a scheduling decision with ``hw:pmem``, and on this driver's work in nova-compute.

Run by hand, as root, in the environment of Nova's tests: ``python -m tests.bench.bench_nova``; takes ten minutes.
The parts of Nova that are real are listed in :mod:`tests.nova.functional.base`. The hosts are simulated: each has a
nova-compute of its own with this driver. All have the same namespaces; the first one has one more.

Printed for each size of cloud, as a multiple of the smallest:

* a decision: the scheduler's ``select_destinations`` for one instance, up to the claim in placement; for a flavor that
  every host has, and for one that only the first has,
* placement's share of that: the candidates and the claim,
* the number of ``nvdimmctl`` runs during all of this,
* this driver's ``update_provider_tree`` of one host, also as a multiple of Nova's own driver, in turns with it,
* the periodic task around it (``update_available_resource``), with all updates of placement and the database.
"""

from __future__ import annotations

import gc
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import nova.tests.functional  # noqa: F401
from nova import context, objects
from nova.scheduler.client import report
from nova.virt.libvirt import driver as libvirt_driver
from oslo_utils import uuidutils

from tests.integration.loop_pmem import FileSystem
from tests.nova.functional.base import NovaTestBase

SIZES = (1, 50, 500)
ROUNDS = 11
EVERYWHERE = "6GB:pool/ns0|pool/ns1|pool/ns2"
FIRST = f"{EVERYWHERE},16GB:pool/ns3"


class Cloud(NovaTestBase):
    """A cloud that grows, and is measured at each size."""

    LEDGERS = (("pool",),)

    def runTest(self) -> None:
        self.pmem.provision("pool", "ns0", "ns1", "ns2", "ns3", size="4M")
        everywhere, first_only = (
            objects.Flavor.get_by_flavor_id(context.get_admin_context(), self.make_flavor(label))
            for label in ("6GB", "16GB")
        )
        first: dict[str, float] = {}
        for size in SIZES:
            self.grow(size)
            self.pmem.forget_calls()
            gc.collect()
            gc.freeze()
            print(f"{size} hosts:")
            found = {
                **self.decisions("every host has it", everywhere),
                **self.decisions("one host has it", first_only),
                **self.periodic(),
            }
            first = first or found
            for what, seconds in found.items():
                print(f"  {what}: {seconds * 1000:.2f} ms, {seconds / first[what]:.2f} times", flush=True)
            print(f"  nvdimmctl runs: {len(self.pmem.calls())}", flush=True)

    def grow(self, size: int) -> None:
        """Add hosts. All share one process, unlike in a cloud, so only the first runs its periodic tasks."""
        self.flags(service_down_time=10**6)
        for number in range(len(self.computes), size):
            self.start_host(f"host{number}", EVERYWHERE if number else FIRST)
            if number:
                self.computes[f"host{number}"].stop()

    def decisions(self, which: str, flavor: objects.Flavor) -> dict[str, float]:
        rounds = [self.decide(flavor) for _ in range(ROUNDS + 1)][1:]
        return {
            f"decision, {which}": median(whole for whole, _ in rounds),
            f"decision, {which}, in placement": median(placement for _, placement in rounds),
            f"decision, {which}, in the scheduler": median(whole - placement for whole, placement in rounds),
        }

    def decide(self, flavor: objects.Flavor) -> tuple[float, float]:
        """Return the seconds of one decision, and of its part in placement."""
        admin = context.get_admin_context()
        uuid = uuidutils.generate_uuid()
        spec = objects.RequestSpec.from_components(
            admin, uuid, objects.ImageMeta(properties=objects.ImageMetaProps()), flavor, None, None, {}, None, None
        )
        spec.project_id = spec.user_id = self.api.project_id
        spec.is_bfv = False
        client = report.SchedulerReportClient
        with Timer(client, "get_allocation_candidates") as candidates, Timer(client, "claim_resources") as claim:
            began = time.perf_counter()
            self.scheduler.manager.select_destinations(admin, spec_obj=spec, instance_uuids=[uuid], return_objects=True)
            whole = time.perf_counter() - began
        report.report_client_singleton().delete_allocation_for_instance(admin, uuid, force=True)
        return whole, candidates.seconds + claim.seconds

    def periodic(self) -> dict[str, float]:
        """Measure the periodic task of the first host."""
        compute = self.computes["host0"]
        driver = compute.driver
        admin = context.get_admin_context()

        def update(of: type[libvirt_driver.LibvirtDriver]) -> float:
            tree = compute.rt.provider_tree
            return timed(lambda: of.update_provider_tree(driver, tree, "host0"))

        tasks = [timed(lambda: compute.manager.update_available_resource(admin)) for _ in range(ROUNDS + 1)][1:]
        rounds = [(update(type(driver)), update(libvirt_driver.LibvirtDriver)) for _ in range(ROUNDS + 1)][1:]
        ratio = median(ours / stock for ours, stock in rounds)
        print(f"  update_provider_tree, in times of nova's own: {ratio:.2f}")
        return {
            "periodic task of one host": median(tasks),
            "update_provider_tree of one host": median(ours for ours, _ in rounds),
        }


class Timer:
    """Counts the seconds that are spent in a method."""

    def __init__(self, owner: type, name: str) -> None:
        self.seconds = 0.0
        method: Callable[..., Any] = getattr(owner, name)

        def measured(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

        self.patch = mock.patch.object(owner, name, measured)

    def __enter__(self) -> Timer:
        self.patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.stop()


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Make the persistent memory, and run the measurement."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pmem").mkdir()
        fs = FileSystem(folder / "pmem", "ext4")
        try:
            cloud = Cloud()
            cloud.use_pmem(fs, folder)
            unittest.TextTestRunner().run(cloud)
        finally:
            fs.close()


if __name__ == "__main__":
    main()
