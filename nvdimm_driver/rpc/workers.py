# SPDX-License-Identifier: Apache-2.0
"""The threads in which the work of handlers runs: some for each kind of work, so that none waits for a longer one.

Clients take turns: what one has waiting keeps another from its next turn, and not from all that are to come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nvdimm_driver.errors import BusyError
from nvdimm_driver.rpc.handler_types import Pool, Work

THREADS: Mapping[Pool, int] = {Pool.LEDGER: 8, Pool.XML: 2, Pool.DUMP: 2, Pool.HOST: 8, Pool.ZEROS: 4}
"""Threads of each pool. Two for XML: it takes the processor, which the loop that forwards messages needs, too."""
CLIENT_MAX: Mapping[Pool, int] = {Pool.LEDGER: 4, Pool.XML: 1, Pool.DUMP: 1, Pool.HOST: 4, Pool.ZEROS: 3}
"""Most threads of each pool that work for one client, so that one is left for another."""
ZEROS_MAX = 64
"""Most defines that write zeros, or wait for that. Others wait for seconds, and there is one for each call at most."""
ZEROS_USER_MAX = 32
"""Most of these for one user: who connects again does not get more of what takes hours, nor more threads."""


def stopping() -> BusyError:
    """Return the error for what cannot be begun any more."""
    return BusyError("nvdimmd stops, and provisions nothing more", hint="try again: it is started for the next client")


class Workers:
    """The threads of all sessions. For the thread of the event loop alone."""

    def __init__(self) -> None:
        self._queues = {pool: _Queue(pool) for pool in Pool}
        self._stopped = False

    def submit(self, client: Hashable, work: Work, uid: int) -> asyncio.Future[Any]:
        """Run a client's work in a thread of its pool, when its turn comes. :meth:`stop` may cancel it before.

        :param uid: the client's user: all clients of one user are one client where zeros are written.
        :raises BusyError: when too much is waiting already, or after :meth:`stop`.
        """
        queue = self._queues[work.pool]
        if work.pool is Pool.ZEROS:
            client = uid
            if self._stopped:
                raise stopping()
            for size, most, whose in (
                (queue.size_of(uid), ZEROS_USER_MAX, f" of uid {uid}"),
                (queue.size, ZEROS_MAX, ""),
            ):
                if size >= most:
                    raise BusyError(
                        f"{size} domains{whose} are being provisioned, or wait for that, which is the most at a time",
                        hint="try again when one is done; 'nvdimmctl list' shows how far each is",
                    )
        future = asyncio.get_running_loop().create_future()
        if work.delay:
            asyncio.get_running_loop().call_later(work.delay, queue.add, client, work.function, future)
        else:
            queue.add(client, work.function, future)
        return future

    def stop(self) -> None:
        """Begin no more writing of zeros, which can take hours; cancel what waits for it."""
        self._stopped = True
        self._queues[Pool.ZEROS].cancel()

    def close(self) -> None:
        """Take no more work. What runs goes on to its end."""
        for queue in self._queues.values():
            queue.close()


@dataclass
class _Share:
    """A client's part of a queue.

    :ivar working: how many threads work for it.
    :ivar has_turn: it is among the clients that have a turn to come, and something waits.
    """

    waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = field(default_factory=deque)
    working: int = 0
    has_turn: bool = False


class _Queue:
    """Work of one pool, and its threads. A client's work is begun in its order.

    :ivar size: how much works or waits.
    """

    def __init__(self, pool: Pool) -> None:
        self.size = 0
        self._closed = False
        self._client_max = CLIENT_MAX[pool]
        self._free = THREADS[pool]
        self._executor = ThreadPoolExecutor(THREADS[pool], f"nvdimmd-{pool.name.lower()}")
        self._shares: dict[Hashable, _Share] = {}
        self._turns: deque[Hashable] = deque()

    def add(self, client: Hashable, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        """Let a client's function have its turn; the future gets what it returns or raises."""
        self.size += 1
        self._shares.setdefault(client, _Share()).waiting.append((function, future))
        self._queue(client)
        self._begin()

    def size_of(self, client: Hashable) -> int:
        """Return how much of a client's works or waits."""
        share = self._shares.get(client)
        return 0 if share is None else share.working + len(share.waiting)

    def cancel(self) -> None:
        """Cancel what waits."""
        self._turns.clear()
        for share in self._shares.values():
            share.has_turn = False
            while share.waiting:
                self.size -= 1
                share.waiting.popleft()[1].cancel()

    def close(self) -> None:
        """Begin nothing more."""
        self._closed = True
        self._executor.shutdown(wait=False)

    def _queue(self, client: Hashable) -> None:
        """Give a client a turn if it has work for one and none to come, and not all the threads that it may have."""
        share = self._shares[client]
        if share.waiting and not share.has_turn and share.working < self._client_max:
            share.has_turn = True
            self._turns.append(client)

    def _begin(self) -> None:
        """Begin work for the clients whose turn it is, as long as a thread is free."""
        while self._free and self._turns and not self._closed:
            client = self._turns.popleft()
            share = self._shares[client]
            share.has_turn = False
            function, future = share.waiting.popleft()
            share.working += 1
            self._free -= 1
            working = asyncio.get_running_loop().run_in_executor(self._executor, function)
            working.add_done_callback(partial(self._done, client, future))
            self._queue(client)

    def _done(self, client: Hashable, future: asyncio.Future[Any], working: asyncio.Future[Any]) -> None:
        share = self._shares[client]
        share.working -= 1
        self.size -= 1
        self._free += 1
        if share.waiting:
            self._queue(client)
        elif not share.working:
            del self._shares[client]
        error = working.exception()
        if error:
            future.set_exception(error)
        else:
            future.set_result(working.result())
        self._begin()
