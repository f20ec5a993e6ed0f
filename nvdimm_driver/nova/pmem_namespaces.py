# SPDX-License-Identifier: Apache-2.0
"""The backings that nova.conf names in ``[libvirt] pmem_namespaces``, in the form that nova-compute needs.

Nova calls a backing a namespace, and reports to placement how many it has of each label. It emits an NVDIMM for one in
a fixed form (nova/virt/libvirt/config.py: LibvirtConfigGuestVPMEM): all of the size that it is told, with a label area
of 2 MiB in it, and the alignment that it is told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nvdimm_driver.errors import BackingError, ConfigError, NotFoundError
from nvdimm_driver.model import MIB, SUPERPAGE, NvdimmSpec, Pool
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger

LABEL_SIZE = 2 * MIB
"""Size of the label area that Nova gives every NVDIMM."""
_LABEL = re.compile(r"[A-Z0-9_]+", re.ASCII)
_FORM = "pmem_namespaces = LABEL:NAME|NAME,LABEL:NAME, such as 6GB:ns0|ns1,16GB:main/ns2"


@dataclass(frozen=True)
class Configured:
    """A configured backing.

    :ivar label: that flavors ask for, as in ``hw:pmem``.
    :ivar name: of the backing in its pool, with the pool's and a slash before it where that is needed.
    """

    label: str
    name: str


@dataclass(frozen=True)
class NovaNamespace:
    """A backing in the form that nova-compute needs.

    :ivar resource_class: of placement.
    :ivar path: absolute, as it will be in domain XML.
    :ivar size: bytes that an instance's NVDIMM has, its label area included.
    :ivar align: bytes; of its size and of where the guest has it.
    :ivar domain: uuid of the domain that has it; empty when it is free.
    """

    name: str
    label: str
    resource_class: str
    pool: str
    path: str
    size: int
    align: int
    domain: str


def parse(entries: Iterable[str]) -> tuple[Configured, ...]:
    """Read the entries of ``pmem_namespaces``, each ``LABEL:NAME|NAME…``.

    :raises ConfigError: when one has another form, its label could not be asked for, or a name is there twice.
    """
    found: dict[str, Configured] = {}
    for entry in entries:
        label, colon, names = entry.strip().partition(":")
        if not colon:
            raise ConfigError(f"pmem_namespaces: {entry!r} has no label", hint=_FORM)
        _check_label(label)
        for name in names.split("|"):
            if not name or name != name.strip():
                raise ConfigError(f"pmem_namespaces: {entry!r}: {name!r} is not a name", hint=_FORM)
            if name in found:
                raise ConfigError(
                    f"pmem_namespaces: {name} is there twice, with labels {found[name].label} and {label}",
                    hint="an instance has a namespace for itself: leave it once",
                )
            found[name] = Configured(label, name)
    return tuple(found.values())


def _check_label(label: str) -> None:
    if not _LABEL.fullmatch(label):
        raise ConfigError(
            f"pmem_namespaces: {label!r} is not a label",
            hint="upper-case letters, digits and _ alone, here and in hw:pmem of flavors: Nova makes others into the "
            "same resource class, schedules by that, and then boots the instance without the NVDIMM",
        )


class Inventory:
    """Finds configured backings in the operator's pools.

    :param served: a label server in dom0 has the label areas of domains that do not say (``[acpi] dsm = qemu``).
    """

    def __init__(self, pools: Pools, backings: Sequence[Backing], ledger: Ledger, *, served: bool) -> None:
        self._pools = pools
        self._backings = backings
        self._ledger = ledger
        self._served = served

    def find(self, configured: Iterable[Configured]) -> tuple[NovaNamespace, ...]:
        """Return all configured backings in the form that nova-compute needs; change nothing.

        :raises ConfigError: when a name is in more than one place, or a backing is there by two names.
        :raises NotFoundError: when there is no such pool, or no backing of that name.
        :raises BackingError: when a domain could not have it as it is.
        """
        found: dict[str, NovaNamespace] = {}
        for each in configured:
            namespace = self._look(each)
            real = os.path.realpath(namespace.path)
            if real in found:
                raise ConfigError(
                    f"pmem_namespaces: {found[real].name} and {each.name} are both {real}",
                    hint="an instance has a namespace for itself: leave it once",
                )
            found[real] = namespace
        return tuple(found.values())

    def _look(self, configured: Configured) -> NovaNamespace:
        pool, path = self._place(configured.name)
        backing = backing_of(self._backings, path)
        step = max(SUPERPAGE, pool.alignsize)
        spec = NvdimmSpec(0, path, backing.size(path) // step * step, LABEL_SIZE, SUPERPAGE)
        if spec.size <= LABEL_SIZE:
            raise BackingError(
                f"{path}: is too small for Nova, whose label area alone has 2 MiB",
                hint=f"nvdimmctl provision --pool {pool.name} makes a larger one",
            )
        intake = backing.examine(spec)
        if intake.writes:
            raise BackingError(
                f"{path}: is not provisioned: {intake.writes} bytes are still to be written",
                hint=f"nvdimmctl provision --size {spec.size} --label-size 2MiB {path}",
            )
        if self._served:
            backing.check_labels(spec)
        owners = ownership.owners(self._ledger, path, None)
        return NovaNamespace(
            name=configured.name,
            label=configured.label,
            resource_class=f"CUSTOM_PMEM_NAMESPACE_{configured.label}",
            pool=pool.name,
            path=path,
            size=spec.size,
            align=SUPERPAGE,
            domain=owners[0].uuid if owners else "",
        )

    def _place(self, word: str) -> tuple[Pool, str]:
        """Return the pool and path of ``NAME`` or ``POOL/NAME``."""
        first, slash, last = word.partition("/")
        pools, name = ([self._pools.named(first)], last) if slash else (list(self._pools), first)
        if "/" in name or name in ("", ".", ".."):
            raise ConfigError(f"pmem_namespaces: {word!r} is neither a name in a pool nor POOL/NAME", hint=_FORM)
        places = [(pool, path) for pool in pools for path in _candidates(pool, name) if self._exists(path)]
        if not places:
            raise NotFoundError(f"pmem_namespaces: there is no {name} in {_told(pools)}", hint=_make(pools, name))
        if len(places) > 1:
            raise ConfigError(
                f"pmem_namespaces: {word} may be " + " or ".join(path for _, path in places),
                hint="say POOL/NAME; within one pool, names have to differ",
            )
        return places[0]

    def _exists(self, path: str) -> bool:
        return any(backing.handles(path) and backing.exists(path) for backing in self._backings)


def _candidates(pool: Pool, name: str) -> Iterator[str]:
    for path in pool.paths:
        if os.path.isdir(path):
            yield os.path.join(path, name)
        elif os.path.basename(path) == name:
            yield path


def _told(pools: Sequence[Pool]) -> str:
    if not pools:
        return "a pool: none is configured"
    return ("pool " if len(pools) == 1 else "any of the pools ") + ", ".join(pool.name for pool in pools)


def _make(pools: Sequence[Pool], name: str) -> str:
    if not pools:
        return "'nvdimmctl pool create' makes one"
    return f"nvdimmctl provision --pool {pools[0].name} --size SIZE --label-size 2MiB {name}"
