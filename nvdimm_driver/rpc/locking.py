# SPDX-License-Identifier: Apache-2.0
"""The locks of a domain, taken by handlers of calls."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from typing import Any

from nvdimm_driver.errors import InUseError
from nvdimm_driver.lifecycle.domain_locks import DomainLocks
from nvdimm_driver.lock_files import LockFile, describe
from nvdimm_driver.rpc.handler_types import Call, Peer, Work

LOCK_DELAYS = (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
"""Seconds before each attempt to take a lock."""


def changing(locks: DomainLocks, uuid: str, client: Peer | None) -> Generator[Call | Work, Any, LockFile]:
    """Take the lock for a change of a domain, or the start of its saved guest.

    A thread that waited for it would keep the calls of others from theirs.

    :param client: who it is for, to be told to others.
    :raises InUseError: when another still has it at the last attempt.
    """

    def take() -> LockFile:
        return locks.try_changing(uuid, f"{describe(client.pid)} of user {client.uid}" if client else "")

    for delay in LOCK_DELAYS[:-1]:
        with suppress(InUseError):
            early: LockFile = yield Work(take, delay=delay)
            return early
    late: LockFile = yield Work(take, delay=LOCK_DELAYS[-1])
    return late
