# SPDX-License-Identifier: Apache-2.0
"""The rules of the operator's pools: domains may have backings in them, within their quotas."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from nvdimm_driver.backing.paths import resolve, resolve_new
from nvdimm_driver.errors import NotFoundError, RefusedError
from nvdimm_driver.model import Allocation, BackingIdentity, DomainSpec, NvdimmSpec, Pool, Record
from nvdimm_driver.pools.places import Places
from nvdimm_driver.sizes import human


class Pools:
    """The operator's pools.

    :param any_path: domains may also have backings outside them.
    """

    def __init__(self, pools: Sequence[Pool], *, any_path: bool = False) -> None:
        self._pools = pools
        self._any_path = any_path

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools)

    def named(self, name: str) -> Pool:
        """Return the pool of that name.

        :raises NotFoundError: when there is none.
        """
        if pool := self._by_name(name):
            return pool
        raise NotFoundError(f"no pool {name!r}", hint="'nvdimmctl pool list' shows all")

    def of(self, path: str) -> Pool | None:
        """Return the pool that a resolved path is in, as :meth:`.Places.pool_of` does."""
        return self.places().pool_of(path)

    def places(self) -> Places:
        """Return where the pools are now, to ask :meth:`.Places.pool_of` of many paths."""
        return Places(self._pools)

    def wipes(self, item: Allocation, here: BackingIdentity | None) -> bool:
        """Return True when the bytes of a domain's NVDIMM have to be overwritten before another domain may have them.

        The pool tells from which the domain got a device, whatever name a boot gives that, and else the pool that it is
        in. While that is not configured, or not there, because a bind mount or a device's link is missing or another
        file system is mounted over it, what its pool told last counts, too.

        :param here: the identity of what is at its path.
        """
        if item.pool:
            pool = self._by_name(item.pool)
            return pool.wipe_on_release if pool else item.wipes
        pool = self.of(item.spec.path)
        is_there = item.identity is None or (here is not None and item.identity.shares_bytes(here))
        return pool.wipe_on_release if pool and is_there else item.wipes or bool(pool and pool.wipe_on_release)

    def noted(self, item: Allocation, had: Sequence[Allocation] = (), *, places: Places | None = None) -> Allocation:
        """Return an NVDIMM with what is known of its pool now.

        :param item: has what is at its path.
        :param had: what its domain had before with bytes of it. A device that it had as a whole stays in the pool that
            it was in; one that is larger now must be overwritten if either pool says so.
        :param places: where the pools are; None to look now.
        """
        identity = item.identity
        here = self._naming(item.renamed_from) or (places or self.places()).pool_of(item.spec.path)
        is_device = identity is not None and not identity.inode
        now = replace(
            item, pool=here.name if here and is_device else "", wipes=here.wipe_on_release if here else item.wipes
        )
        known = [each for each in (item, *had) if each.pool and is_device]
        whole = any(identity and each.identity and each.identity.covers(identity) for each in known)
        found = [self._told(each) for each in (known if whole else [*known, now])]
        first = next(iter([each for each in found if each.wipes] or found))
        return replace(item, pool=first.pool, wipes=first.wipes)

    def _naming(self, path: str) -> Pool | None:
        """Return the pool that names a device so itself. A link in another pool leads to what has the name by now."""
        return next((pool for pool in self._pools if path in pool.paths), None)

    def _told(self, item: Allocation) -> Allocation:
        """Return an NVDIMM with what the pool says of it now that it is noted for, if that is configured."""
        pool = self._by_name(item.pool)
        return replace(item, wipes=pool.wipe_on_release) if pool else item

    def _by_name(self, name: str) -> Pool | None:
        return next((pool for pool in self._pools if pool.name == name), None)

    def check(self, domain: DomainSpec, records: Iterable[Record], kept: Sequence[NvdimmSpec] = ()) -> None:
        """Check that a domain may have its backings.

        :param records: records of all domains, asked for only if a quota counts; that of this one does not count.
        :param kept: NVDIMMs that the domain has besides.
        :raises RefusedError: when a backing is in no pool, its size is no multiple of its pool's alignsize, or a quota
            is exceeded.
        """
        self.check_new(domain.nvdimms, (record for record in records if record.uuid != domain.uuid), kept)

    def check_new(
        self, nvdimms: Sequence[NvdimmSpec], records: Iterable[Record], kept: Sequence[NvdimmSpec] = ()
    ) -> None:
        """Check that these NVDIMMs may be had in addition to those in the records, and to those that are kept.

        :raises RefusedError: as :meth:`check` does.
        """
        wanted = self._by_pool(nvdimms)
        for spec in wanted.pop(None, []):
            self.check_place(spec.path)
        used: dict[Pool | None, list[NvdimmSpec]] = {}
        if any(pool and pool.quota is not None for pool in wanted):
            used = self._by_pool([*kept, *(item.spec for record in records for item in record.claims)])
        for pool, specs in wanted.items():
            self._check_pool(pool, specs, sum(spec.size for spec in used.get(pool, [])))

    def allow(self, path: str) -> bool:
        """Return True for a path in a pool, or if any path is allowed."""
        return self._any_path or self.of(path) is not None

    def check_place(self, path: str) -> None:
        """Check that a path is in a pool.

        :raises RefusedError: when it is not.
        """
        if not self.allow(path):
            raise RefusedError(f"{path} is in none of the host's pools", hint=self._where())

    def place(self, pool: Pool, name: str) -> str:
        """Return the resolved path of a file or device of that name in a pool.

        :raises NotFoundError: when the pool has devices, and none of that name.
        """
        for path in pool.paths:
            if os.path.isdir(path):
                return resolve_new(os.path.join(path, name))
        for path in pool.paths:
            if name in (os.path.basename(path), os.path.basename(resolve(path))):
                return resolve_new(path)
        raise NotFoundError(
            f"pool {pool.name} has no device {name!r}",
            hint=f"it has {', '.join(os.path.basename(path) for path in pool.paths)}",
        )

    def _check_pool(self, pool: Pool | None, specs: Sequence[NvdimmSpec], used: int) -> None:
        if pool is None:
            return
        for spec in specs:
            if spec.size % pool.alignsize:
                raise RefusedError(
                    f"{spec.path}: {human(spec.size)} is not a multiple of {human(pool.alignsize)}, the alignsize of "
                    f"pool {pool.name}",
                    hint="change <target><size>",
                )
        size = sum(spec.size for spec in specs)
        if pool.quota is not None and used + size > pool.quota:
            raise RefusedError(
                f"pool {pool.name}: domains have {human(used)} of its quota of {human(pool.quota)}; {human(size)} more "
                "is too much",
                hint=f"'nvdimmctl pool show {pool.name}' shows what each domain has",
            )

    def _by_pool(self, specs: Iterable[NvdimmSpec]) -> dict[Pool | None, list[NvdimmSpec]]:
        places = self.places()  # once: there may be thousands of NVDIMMs
        found: dict[Pool | None, list[NvdimmSpec]] = {}
        for spec in specs:
            found.setdefault(places.pool_of(spec.path), []).append(spec)
        return found

    def _where(self) -> str:
        if not self._pools:
            return "none is configured: 'nvdimmctl pool create' makes one; allow_any_path=true allows any path"
        return "pools are: " + ", ".join(f"{pool.name} ({', '.join(pool.paths)})" for pool in self._pools)
