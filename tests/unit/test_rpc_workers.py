# SPDX-License-Identifier: Apache-2.0
"""Work in pools: what takes long keeps only its own kind waiting, and only so much of it waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from nvdimm_driver.errors import BusyError
from nvdimm_driver.rpc.handler_types import Call, Context, Entry, Pool, Work
from nvdimm_driver.rpc.workers import CLIENT_MAX, THREADS, ZEROS_MAX, ZEROS_USER_MAX, Workers
from tests.unit.rpc_peers import Proxy, call
from tests.waiting import HANG_SECONDS


def submit(workers: Workers, client: str, work: Work) -> asyncio.Future[Any]:
    """Submit the work of a client that has a user of its own."""
    return workers.submit(client, work, crc32(client.encode()))


def test_long_work_keeps_only_its_own_kind_waiting() -> None:
    gate = threading.Event()

    async def run() -> None:
        workers = Workers()
        zeros = [workers.submit("a client", Work(gate.wait, Pool.ZEROS), 1) for _ in range(ZEROS_USER_MAX)]
        said = f"{ZEROS_USER_MAX} domains of uid 1 are being provisioned, or wait for that"
        for client in ("a client", "that user's next one"):
            with pytest.raises(BusyError, match=said):
                workers.submit(client, Work(gate.wait, Pool.ZEROS), 1)
        assert await workers.submit("another user", Work(lambda: "done", Pool.ZEROS), 2) == "done"
        rest = ZEROS_MAX - ZEROS_USER_MAX
        zeros += [workers.submit("another user", Work(gate.wait, Pool.ZEROS), 2) for _ in range(rest)]
        with pytest.raises(BusyError, match=f"{ZEROS_MAX} domains are being provisioned, or wait for that"):
            workers.submit("a third user", Work(gate.wait, Pool.ZEROS), 3)
        for pool in (Pool.LEDGER, Pool.XML, Pool.DUMP, Pool.HOST):
            assert await workers.submit("a client", Work(lambda: "done", pool), 1) == "done"
        assert not any(each.done() for each in zeros)
        gate.set()
        assert await asyncio.gather(*zeros) == [True] * ZEROS_MAX
        assert await workers.submit("a client", Work(lambda: "again", Pool.ZEROS), 1) == "again"
        workers.close()

    asyncio.run(run())


@pytest.mark.parametrize("pool", Pool)
def test_one_client_leaves_threads_to_the_others(pool: Pool) -> None:
    gate = threading.Event()

    async def run() -> None:
        workers = Workers()
        one = [submit(workers, "one", Work(gate.wait, pool)) for _ in range(CLIENT_MAX[pool] + 3)]
        assert await submit(workers, "other", Work(lambda: "done", pool)) == "done"
        assert not any(each.done() for each in one)
        gate.set()
        assert await asyncio.gather(*one) == [True] * len(one)
        assert await submit(workers, "one", Work(lambda: "again", pool)) == "again"
        workers.close()

    asyncio.run(run())


@pytest.mark.parametrize("pool", Pool)
def test_clients_take_turns_and_each_keeps_its_order(pool: Pool) -> None:
    """What a client has sent does not wait for all that others have sent before it."""
    one, rest = threading.Event(), threading.Event()
    begun: list[str] = []

    async def run() -> None:
        workers = Workers()
        busy = [submit(workers, "busy 0", Work(one.wait, pool))]
        busy += [submit(workers, f"busy {n}", Work(rest.wait, pool)) for n in range(1, THREADS[pool])]
        names = ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"]
        waiting = [submit(workers, name[0], Work(partial(begun.append, name), pool)) for name in names]
        assert begun == []
        one.set()  # one thread is free
        await asyncio.gather(*waiting)
        rest.set()
        await asyncio.gather(*busy)
        workers.close()

    asyncio.run(run())
    assert begun == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def test_work_with_a_delay_waits_without_a_thread() -> None:
    async def run() -> None:
        workers = Workers()
        late = submit(workers, "one", Work(lambda: None, Pool.XML, delay=3600))
        await asyncio.gather(*(submit(workers, "one", Work(lambda: None, Pool.XML)) for _ in range(10)))
        assert not late.done()
        await submit(workers, "one", Work(lambda: None, Pool.XML, delay=0.001))
        workers.close()

    asyncio.run(run())


def test_what_waits_for_zeros_is_not_begun_at_the_end() -> None:
    gate = threading.Event()

    async def run() -> None:
        workers = Workers()
        zeros = [submit(workers, "a client", Work(gate.wait, Pool.ZEROS)) for _ in range(CLIENT_MAX[Pool.ZEROS] + 3)]
        workers.stop()
        with pytest.raises(BusyError, match="nvdimmd stops"):
            submit(workers, "a client", Work(gate.wait, Pool.ZEROS))
        assert await submit(workers, "a client", Work(lambda: "undone", Pool.HOST)) == "undone"
        done = asyncio.gather(*zeros, return_exceptions=True)
        gate.set()
        results = await done
        assert results[:-3] == [True] * CLIENT_MAX[Pool.ZEROS]
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
            for serial in range(CLIENT_MAX[Pool.ZEROS] + waiting):
                near.send(call(1, serial))
            near.send(call(2, 99))
            assert far.expect().header.serial == 99, "all calls before it have begun"
            for _ in range(CLIENT_MAX[Pool.ZEROS]):
                assert begun.acquire(timeout=HANG_SECONDS)
            proxy.stop()
            assert near.receive() is None
            gate.set()
    assert len(failed) == waiting
    assert all("nvdimmd stops" in each for each in failed)
