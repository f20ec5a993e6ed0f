"""What each pool has, and who has what of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvdimm_driver.backing.inventory import problems
from nvdimm_driver.errors import BackingError, ConfigError
from nvdimm_driver.ledger import Ledger
from nvdimm_driver.model import Allocation, Pool, Record, Space
from nvdimm_driver.plugins import Backing
from nvdimm_driver.pools import is_in


@dataclass(frozen=True)
class PoolUsage:
    """A pool as it is now.

    :ivar space: None when it cannot be told.
    :ivar owned: the NVDIMMs in it, with their domains.
    :ivar problems: what is wrong with it; empty when all is well.
    """

    pool: Pool
    space: Space | None
    owned: tuple[tuple[Record, Allocation], ...]
    problems: tuple[str, ...]

    @property
    def used(self) -> int:
        """Bytes that domains have of it."""
        return sum(item.spec.size for _, item in self.owned)

    @property
    def free(self) -> int | None:
        """Bytes that domains may still have: what is free, as far as the quota goes."""
        if self.space is None:
            return None
        return self.space.free if self.pool.quota is None else max(0, min(self.space.free, self.pool.quota - self.used))


def usage_of(pool: Pool, ledger: Ledger, backings: Sequence[Backing]) -> PoolUsage:
    """Look at a pool.

    :raises ConfigError: when no plug-in is for its kind.
    """
    backing = next((each for each in backings if each.name == pool.kind), None)
    if backing is None:
        raise ConfigError(
            f"pool {pool.name}: there is no backing {pool.kind!r}",
            hint=f"'kind' is one of: {', '.join(each.name for each in backings)}",
        )
    owned = tuple(
        (record, item) for record in ledger.domains() for item in record.allocations if is_in(item.spec.path, pool)
    )
    try:
        space = backing.space(pool.paths, [item.spec.path for _, item in owned])
        found = tuple(problem for namespace in space.namespaces for problem in problems(namespace))
    except BackingError as error:
        return PoolUsage(pool, None, owned, (str(error),))
    return PoolUsage(pool, space, owned, found)
