# SPDX-License-Identifier: Apache-2.0
"""Work in pools: what takes long keeps only its own kind waiting, and only so much of it waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.errors import BusyError
from nvdimm_driver.rpc.handler_types import Call, Context, Entry, Pool, Work
from nvdimm_driver.rpc.workers import THREADS, ZEROS_MAX, Workers
from tests.unit.rpc_peers import Proxy, call
from tests.waiting import HANG_SECONDS


def test_long_work_keeps_only_its_own_kind_waiting() -> None:
    gate = threading.Event()

    async def run() -> None:
        workers = Workers()
        zeros = [workers.submit(Work(gate.wait, Pool.ZEROS)) for _ in range(ZEROS_MAX)]
        with pytest.raises(BusyError, match=f"{ZEROS_MAX} domains are being provisioned, or wait for that"):
            workers.submit(Work(gate.wait, Pool.ZEROS))
        for pool in (Pool.LEDGER, Pool.XML, Pool.HOST):
            assert await workers.submit(Work(lambda: "done", pool)) == "done"
        assert not any(each.done() for each in zeros)
        gate.set()
        assert await asyncio.gather(*zeros) == [True] * ZEROS_MAX
        assert await workers.submit(Work(lambda: "again", Pool.ZEROS)) == "again"
        workers.close()

    asyncio.run(run())


def test_what_waits_for_zeros_is_not_begun_at_the_end() -> None:
    gate = threading.Event()

    async def run() -> None:
        workers = Workers()
        zeros = [workers.submit(Work(gate.wait, Pool.ZEROS)) for _ in range(THREADS[Pool.ZEROS] + 3)]
        workers.stop()
        with pytest.raises(BusyError, match="nvdimmd stops"):
            workers.submit(Work(gate.wait, Pool.ZEROS))
        assert await workers.submit(Work(lambda: "undone", Pool.HOST)) == "undone"
        done = asyncio.gather(*zeros, return_exceptions=True)
        gate.set()
        results = await done
        assert results[:-3] == [True] * THREADS[Pool.ZEROS]
        assert all(isinstance(each, asyncio.CancelledError) for each in results[-3:])
        workers.close()

    asyncio.run(run())


def test_handlers_that_wait_at_the_end_undo_what_they_did(tmp_path: Path) -> None:
    gate, failed = threading.Event(), []
    begun = threading.Semaphore(0)

    def wait() -> None:
        begun.release()
        gate.wait()

    def handler(context: Context, arguments: bytes) -> Generator[Call | Work, Any, bytes]:
        try:
            yield Work(wait, Pool.ZEROS)
        except BusyError as error:
            reason = str(error)
            yield Work(lambda: failed.append(reason))
        return b""

    waiting = 3
    with Proxy(tmp_path, {1: Entry(handler)}) as proxy:
        near, far = proxy.pair()
        with near, far:
            for serial in range(THREADS[Pool.ZEROS] + waiting):
                near.send(call(1, serial))
            near.send(call(2, 99))
            assert far.expect().header.serial == 99, "all calls before it have begun"
            for _ in range(THREADS[Pool.ZEROS]):
                assert begun.acquire(timeout=HANG_SECONDS)
            proxy.stop()
            assert near.receive() is None
            gate.set()
    assert len(failed) == waiting
    assert all("nvdimmd stops" in each for each in failed)
