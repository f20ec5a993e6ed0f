# SPDX-License-Identifier: Apache-2.0
"""The usage of pools: their room, the NVDIMMs in them, and where these are in the host's memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvdimm_driver.backing.inventory import SYSFS, namespaces, problems, regions
from nvdimm_driver.backing.paths import check_not_read_only, resolve
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import Allocation, Namespace, Pool, Record, Space
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolUsage:
    """The current state of a pool.

    :ivar space: None when it cannot be measured.
    :ivar owned: the NVDIMMs in it, with their domains.
    :ivar problems: problems of the pool, for people; empty without any.
    """

    pool: Pool
    space: Space | None
    owned: tuple[tuple[Record, Allocation], ...]
    problems: tuple[str, ...]

    @property
    def used(self) -> int:
        """Bytes of the NVDIMMs in it."""
        return sum(item.spec.size for _, item in self.owned)

    @property
    def free(self) -> int | None:
        """Bytes that domains may still get: the free ones, within the quota; None when they cannot be measured."""
        if self.space is None:
            return None
        return self.space.free if self.pool.quota is None else max(0, min(self.space.free, self.pool.quota - self.used))


@dataclass(frozen=True)
class Piece:
    """An extent of an NVDIMM; SPA and length in bytes.

    :ivar state: state of its domain: ``off``, or the state of its start.
    """

    spa: int
    length: int
    domain: str
    slot: int
    path: str
    state: str


@dataclass(frozen=True)
class Region:
    """A region of the host's persistent memory, with its namespaces and extents, by SPA; SPA and size in bytes."""

    name: str
    spa: int
    size: int
    namespaces: tuple[Namespace, ...]
    pieces: tuple[Piece, ...]


def host_map(ledger: Ledger, backings: Sequence[Backing], sysfs: Path = SYSFS) -> tuple[Region, ...]:
    """Return a map of the host's persistent memory. A backing that cannot be located is logged and left out.

    :raises BackingError: when sysfs cannot be read.
    """
    pieces = sorted(_pieces(ledger, backings), key=lambda piece: piece.spa)
    found = namespaces(sysfs)
    return tuple(
        Region(
            name,
            spa,
            size,
            tuple(each for each in found if spa <= each.data_spa < spa + size),
            tuple(each for each in pieces if spa <= each.spa < spa + size),
        )
        for name, spa, size in regions(sysfs)
    )


def _pieces(ledger: Ledger, backings: Sequence[Backing]) -> Iterator[Piece]:
    for record in ledger.domains():
        state = record.start.state if record.start else "off"
        for item in record.allocations:
            if not item.ready:
                continue
            try:
                extents = backing_of(backings, item.spec.path).locate(item.spec).extents
            except BackingError as error:
                LOG.warning("%s", error)
                continue
            for extent in extents:
                yield Piece(extent.spa, extent.length, record.name, item.spec.slot, item.spec.path, state)


def usage_of(pool: Pool, pools: Pools, ledger: Ledger, backings: Sequence[Backing]) -> PoolUsage:
    """Measure a pool. That it cannot be measured is a problem of this pool's, and of no other's."""
    places = pools.places()
    owned = tuple(
        (record, item)
        for record in ledger.domains()
        for item in record.claims
        if places.pool_of(item.spec.path) == pool
    )
    backing = next((each for each in backings if each.name == pool.kind), None)
    if backing is None:
        kinds = ", ".join(each.name for each in backings)
        return PoolUsage(pool, None, owned, (f"there is no backing {pool.kind!r} ('kind' is one of: {kinds})",))
    try:
        taken = [item.spec.path for _, item in owned]
        claims = [item for record in ledger.domains() for item in record.allocations]
        devices = [resolve(path) for path in pool.paths]
        taken += [path for path in devices if ownership.has_bytes(claims, ownership.identity_at(backings, path))]
        space = backing.space(pool.paths, taken)
        found = tuple(problem for namespace in space.namespaces for problem in problems(namespace))
    except BackingError as error:
        return PoolUsage(pool, None, owned, (str(error),))
    return PoolUsage(pool, space, owned, (*found, *_read_only(pool), *_shared(pool, pools, backings)))


def _read_only(pool: Pool) -> Iterator[str]:
    """Yield the file systems of a pool on which no guest can start, and nothing can be defined or released."""
    for path in pool.paths:
        try:
            check_not_read_only(path)
        except BackingError as error:
            yield f"{error}"


def _shared(pool: Pool, pools: Pools, backings: Sequence[Backing]) -> Iterator[str]:
    """Yield the devices of a pool that share bytes with another one in a pool, such as a device and a partition of it.

    Within the pool, each pair is told once.
    """
    devices = [(each, path, ownership.identity_at(backings, resolve(path))) for each in pools for path in each.paths]
    own = [(path, identity) for each, path, identity in devices if each == pool]
    for number, (path, here) in enumerate(own):
        others = [(its, there, f", which is in pool {each.name}") for each, its, there in devices if each != pool]
        others += [(its, there, ", which is in the pool, too") for its, there in own[:number]]
        for its, there, where in others:
            if here and there and not (here.inode or there.inode) and here.shares_bytes(there):
                yield f"{path} has bytes of {its}{where}"
