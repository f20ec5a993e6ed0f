# SPDX-License-Identifier: Apache-2.0
"""The locks of a domain, taken by handlers of calls."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from nvdimm_driver.errors import InUseError
from nvdimm_driver.lifecycle.domain_locks import DomainLocks
from nvdimm_driver.lock_files import LockFile, describe
from nvdimm_driver.rpc.handler_types import Call, Peer, Work

LOCK_DELAYS = (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
"""Seconds before each attempt to take a lock."""


def changing(locks: DomainLocks, uuid: str, client: Peer | None) -> Generator[Call | Work, Any, LockFile]:
    """Take the lock for changes of a domain's claims.

    :param client: who it is for, to be told to others.
    :raises InUseError: when another still has it at the last attempt.
    """
    return (yield from _taken(locks.try_changing, uuid, client))


def restoring(locks: DomainLocks, uuid: str, client: Peer | None) -> Generator[Call | Work, Any, LockFile]:
    """Take the lock for the start of a domain's saved guest, as :func:`changing` takes the other."""
    return (yield from _taken(locks.try_restoring, uuid, client))


def _taken(
    attempt: Callable[[str, str], LockFile], uuid: str, client: Peer | None
) -> Generator[Call | Work, Any, LockFile]:
    """Take a lock. A thread that waited for it would keep the calls of others from theirs."""

    def take() -> LockFile:
        return attempt(uuid, f"{describe(client.pid)} of user {client.uid}" if client else "")

    for delay in LOCK_DELAYS[:-1]:
        with suppress(InUseError):
            early: LockFile = yield Work(take, delay=delay)
            return early
    late: LockFile = yield Work(take, delay=LOCK_DELAYS[-1])
    return late
