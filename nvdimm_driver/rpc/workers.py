# SPDX-License-Identifier: Apache-2.0
"""The threads in which the work of handlers runs: some for each kind of work, so that none waits for a longer one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nvdimm_driver.errors import BusyError
from nvdimm_driver.rpc.handler_types import Pool, Work

THREADS: Mapping[Pool, int] = {Pool.LEDGER: 8, Pool.XML: 2, Pool.HOST: 8, Pool.ZEROS: 4}
"""Threads of each pool. Two for XML: it takes the processor, which the loop that forwards messages needs, too."""
ZEROS_MAX = 32
"""Most defines that write zeros, or wait for that. Others wait for seconds, and there is one for each call at most."""


def stopping() -> BusyError:
    """Return the error for what cannot be begun any more."""
    return BusyError("nvdimmd stops, and provisions nothing more", hint="try again: it is started for the next client")


class Workers:
    """The threads of all sessions. For the thread of the event loop alone."""

    def __init__(self) -> None:
        self._executors = {pool: ThreadPoolExecutor(THREADS[pool], f"nvdimmd-{pool.name.lower()}") for pool in Pool}
        self._zeros = 0
        self._stopped = False

    def submit(self, work: Work) -> asyncio.Future[Any]:
        """Run work in a thread of its pool, as soon as one is free. It is cancelled if :meth:`stop` comes first.

        :raises BusyError: when too much is waiting already, or after :meth:`stop`.
        """
        if work.pool is Pool.ZEROS:
            if self._stopped:
                raise stopping()
            if self._zeros >= ZEROS_MAX:
                raise BusyError(
                    f"{self._zeros} domains are being provisioned, or wait for that, which is the most at a time",
                    hint="try again when one is done; 'nvdimmctl list' shows how far each is",
                )
            self._zeros += 1
        future = asyncio.get_running_loop().run_in_executor(self._executors[work.pool], work.function)
        if work.pool is Pool.ZEROS:
            future.add_done_callback(self._written)
        return future

    def stop(self) -> None:
        """Begin no more writing of zeros, which can take hours; cancel what waits for it."""
        self._stopped = True
        self._executors[Pool.ZEROS].shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Take no more work. What runs goes on to its end."""
        for executor in self._executors.values():
            executor.shutdown(wait=False)

    def _written(self, future: asyncio.Future[Any]) -> None:
        del future
        self._zeros -= 1
