# SPDX-License-Identifier: Apache-2.0
"""What costs more with 10,000 domains in the ledger, 100 of them running, than with 100, 1 of them running.

Run by hand: ``python -m tests.bench.bench_scale``. The limits: 50 for what concerns one domain (SQLite looks at
all rows for it), and 400 for what concerns all, and for a define in a pool with a quota. Files and Xen are doubles, the
ledger is real.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from nvdimm_driver.doctor import repair
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.model import MIB, Pool
from nvdimm_driver.pools.rules import Pools
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, domain, make_driver, map_prepared
from tests.unit.many_domains import NAMESPACE, fill

ROUNDS = range(9)
FEW, MANY = (100, 1), (10_000, 100)
DOMAIN = domain("/mnt/pmem0/a")


class Host:
    """A host with so many domains, and so many guests."""

    def __init__(self, folder: Path, number: int, running: int, quota: int | None) -> None:
        self.backing, self.mapper = MemoryBacking(), RecordingMapper()
        pools = Pools([Pool("main", "memory", ("/mnt/pmem0",), quota, MIB, 0, False)])
        self.driver = make_driver(folder, self.backing, self.mapper, pools=pools, namespace=NAMESPACE)
        fill(self.driver, self.backing, self.mapper, number, running)

    def seconds(self, step: Callable[[Host], object]) -> float:
        began = time.perf_counter()
        step(self)
        return time.perf_counter() - began

    def start(self) -> None:
        self.driver.prepare(DOMAIN)
        map_prepared(self.driver.ledger, 60_000)
        self.mapper.alive[60_000] = UUID

    def end(self) -> None:
        del self.mapper.alive[60_000]
        self.driver.release(UUID)


def _driver(step: Callable[[XenNvdimmDriver], object]) -> Callable[[Host], object]:
    return lambda host: step(host.driver)


STEPS: dict[str, Callable[[Host], object]] = {
    "define": _driver(lambda driver: driver.define(DOMAIN)),
    "redefine": _driver(lambda driver: driver.define(DOMAIN, driver.check(DOMAIN))),
    "start": Host.start,
    "end": Host.end,
    "forget": _driver(lambda driver: driver.forget(UUID)),
    "reconcile, for all": _driver(lambda driver: driver.reconcile()),
    "list, for all": _driver(lambda driver: driver.ledger.domains()),
    "check, for all": _driver(repair.look),
}


def main() -> None:
    for quota in (None, 1 << 50):
        print("in a pool with a quota" if quota else "in a pool without a quota")
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            few, many = (Host(Path(folder), *size, quota) for folder, size in ((one, FEW), (other, MANY)))
            rounds = [{name: (few.seconds(step), many.seconds(step)) for name, step in STEPS.items()} for _ in ROUNDS]
        for name in STEPS:
            pairs = [each[name] for each in rounds]
            ratio = median(more / less for less, more in pairs)
            print(f"  {name}: {median(more for _, more in pairs) * 1000:.1f} ms, {ratio:.1f} times", flush=True)


if __name__ == "__main__":
    main()
