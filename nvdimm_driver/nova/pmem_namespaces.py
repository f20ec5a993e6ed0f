# SPDX-License-Identifier: Apache-2.0
"""The backings that nova.conf names in ``[libvirt] pmem_namespaces``, as Nova's compute service needs them.

Nova calls a backing a namespace, and reports to placement how many it has of each label. The NVDIMM that it emits for
one has a fixed form (nova/virt/libvirt/config.py: LibvirtConfigGuestVPMEM): the size and the alignment that the compute
driver reports, and 2 MiB of that size as a label area.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nvdimm_driver.backing.paths import resolve
from nvdimm_driver.errors import BackingError, ConfigError, NotFoundError
from nvdimm_driver.model import MIB, SUPERPAGE, NvdimmSpec, Pool, Record
from nvdimm_driver.plugins import Backing, backing_of
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.shell import command
from nvdimm_driver.sizes import human
from nvdimm_driver.state import ownership
from nvdimm_driver.state.ledger import Ledger

LABEL_SIZE = 2 * MIB
"""Size of the label area that Nova gives every NVDIMM."""
_LABEL = re.compile(r"[A-Z0-9_]+", re.ASCII)
_FORM = "pmem_namespaces = LABEL:NAME|NAME,LABEL:NAME, such as 6GB:ns0|ns1,16GB:main/ns2"


@dataclass(frozen=True)
class Configured:
    """A configured backing.

    :ivar label: the label that flavors ask for with ``hw:pmem``.
    :ivar name: name of the backing in its pool, or ``POOL/NAME``.
    """

    label: str
    name: str


@dataclass(frozen=True)
class NovaNamespace:
    """A backing as Nova needs it.

    :ivar resource_class: resource class in placement.
    :ivar path: absolute path, as it will be in domain XML.
    :ivar size: bytes of an instance's NVDIMM, its label area included.
    :ivar align: bytes; alignment of its size and of its address in the guest.
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

    :raises ConfigError: when one has another form, no flavor could ask for its label, or a name is there twice.
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
                    hint="list it once: each namespace is for one instance",
                )
            found[name] = Configured(label, name)
    return tuple(found.values())


def _check_label(label: str) -> None:
    if not _LABEL.fullmatch(label):
        raise ConfigError(
            f"pmem_namespaces: {label!r} is not a label",
            hint="use only upper-case letters, digits and _, here and in hw:pmem of flavors: Nova maps other labels to "
            "the same resource class, schedules by that, and then boots the instance without the NVDIMM",
        )


class Inventory:
    """The configured backings in the operator's pools.

    :param served: True when a domain gets a label server in dom0 unless its XML says otherwise (``[acpi] dsm = qemu``).
    """

    def __init__(self, pools: Pools, backings: Sequence[Backing], ledger: Ledger, *, served: bool) -> None:
        self._pools = pools
        self._backings = backings
        self._ledger = ledger
        self._served = served

    def find(self, configured: Iterable[Configured]) -> tuple[NovaNamespace, ...]:
        """Return the configured backings as Nova needs them; nothing is changed.

        :raises ConfigError: when a name is in more than one place, or two names are the same backing.
        :raises NotFoundError: when there is no such pool, or no backing of that name.
        :raises BackingError: when a domain could not use a backing as it is.
        """
        found: dict[str, NovaNamespace] = {}
        for each in configured:
            namespace = self._look(each)
            real = resolve(namespace.path)
            if real in found:
                raise ConfigError(
                    f"pmem_namespaces: {found[real].name} and {each.name} are both {real}",
                    hint="list it once: each namespace is for one instance",
                )
            found[real] = namespace
        return tuple(found.values())

    def _look(self, configured: Configured) -> NovaNamespace:
        pool, path = self._place(configured.name)
        owners = self._owners(path)
        known = [item.spec for owner in owners for item in owner.claims if item.spec.path == resolve(path)]
        # A device that is gone is its instance's trouble: it is taken, and the others are as they are.
        spec = known[0] if known and not self._exists(path) else self._measure(pool, path)
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

    def _measure(self, pool: Pool, path: str) -> NvdimmSpec:
        """Return the NVDIMM that an instance would have of a backing, or has.

        :raises BackingError: when a domain could not use the backing as it is.
        """
        backing = backing_of(self._backings, path)
        step = max(SUPERPAGE, pool.alignsize)
        spec = NvdimmSpec(0, path, backing.size(path) // step * step, LABEL_SIZE, SUPERPAGE)
        if spec.size <= LABEL_SIZE:
            raise BackingError(
                f"{path}: is too small for Nova, which makes 2 MiB of it a label area",
                hint=f"make a larger one: {_provision(pool)} NAME",
            )
        intake = backing.examine(spec)
        if intake.writes:
            raise BackingError(
                f"{path}: is not provisioned: {human(intake.writes)} still to be written",
                hint=command("nvdimmctl", "provision", "--size", spec.size, "--label-size", "2MiB", path),
            )
        if self._served:
            backing.check_labels(spec)
        return spec

    def _place(self, word: str) -> tuple[Pool, str]:
        """Return the pool and the path of ``NAME`` or ``POOL/NAME``."""
        first, slash, last = word.partition("/")
        pools, name = ([self._pools.named(first)], last) if slash else (list(self._pools), first)
        if "/" in name or name in ("", ".", ".."):
            raise ConfigError(f"pmem_namespaces: {word!r} is neither a name in a pool nor POOL/NAME", hint=_FORM)
        candidates = [(pool, path) for pool in pools for path in _candidates(pool, name)]
        places = [place for place in candidates if self._exists(place[1])] or [
            place for place in candidates if self._owners(place[1])
        ]
        if not places:
            raise NotFoundError(
                f"pmem_namespaces: there is no {name} in {_names(pools)}", hint=_how_to_make(pools, name)
            )
        if len(places) > 1:
            raise ConfigError(
                f"pmem_namespaces: {word} is ambiguous: it may be " + " or ".join(path for _, path in places),
                hint="write POOL/NAME; within a pool, names must differ",
            )
        return places[0]

    def _owners(self, path: str) -> Sequence[Record]:
        """Return the domains that have what is at a path, those with its bytes before those with its name only."""
        real = resolve(path)
        here = ownership.identity_at(self._backings, real)
        found = ownership.owners(self._ledger, real, here)
        return sorted(found, key=lambda record: not ownership.has_bytes(record.allocations, here))

    def _exists(self, path: str) -> bool:
        return any(backing.handles(path) and backing.exists(path) for backing in self._backings)


def _candidates(pool: Pool, name: str) -> Iterator[str]:
    for path in pool.paths:
        if os.path.isdir(path):
            yield os.path.join(path, name)
        elif os.path.basename(path) == name:
            yield path


def _names(pools: Sequence[Pool]) -> str:
    if not pools:
        return "a pool: none is configured"
    return ("pool " if len(pools) == 1 else "any of the pools ") + ", ".join(pool.name for pool in pools)


def _how_to_make(pools: Sequence[Pool], name: str) -> str:
    if not pools:
        return "'nvdimmctl pool create' makes one"
    return f"{_provision(pools[0])} {name}"


def _provision(pool: Pool) -> str:
    return f"nvdimmctl provision --pool {pool.name} --size SIZE --label-size 2MiB"
