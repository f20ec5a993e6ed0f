# SPDX-License-Identifier: Apache-2.0
"""The host file: a description of a host, so that ``nvdimmctl plan`` can plan for it on another machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nvdimm_driver.backing.inventory import (
    MODES,
    SYSFS,
    has_dax,
    mounts,
    namespaces,
    physical_address_bits,
    volume_if_pmem,
)
from nvdimm_driver.errors import BackingError, ConfigError
from nvdimm_driver.model import PERSISTENCE_DOMAINS, Namespace


@dataclass(frozen=True)
class HostDescription:
    """The facts about a host that a plan needs.

    :ivar physical_address_bits: of its CPUs.
    :ivar mounts: (directory, namespace name) of each DAX file system; empty when they are not described.
    """

    namespaces: tuple[Namespace, ...]
    physical_address_bits: int
    mounts: tuple[tuple[str, str], ...] = ()

    def namespace_of(self, path: str) -> Namespace:
        """Return the namespace of a device node, or the one that a file would be on.

        :raises BackingError: when the description does not have it.
        """
        by_name = {each.name: each for each in self.namespaces}
        for each in self.namespaces:
            if path == f"/dev/{each.device}":
                return each
        over = [(directory, name) for directory, name in self.mounts if Path(path).is_relative_to(directory)]
        if over:
            return by_name[max(over, key=lambda mount: len(mount[0]))[1]]
        fsdax = [each for each in self.namespaces if each.mode == "fsdax"]
        if not self.mounts and len(fsdax) == 1:
            return fsdax[0]
        raise BackingError(
            f"{path}: the described host has no such device and no DAX file system there",
            hint="devices: "
            + (", ".join(f"/dev/{each.device}" for each in self.namespaces) or "none")
            + "; file systems: "
            + (", ".join(directory for directory, _ in self.mounts) or "none"),
        )

    def to_json(self) -> str:
        """Return a host file, as :meth:`from_json` reads it."""
        return json.dumps({**asdict(self), "mounts": dict(self.mounts)}, indent=2)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "host file") -> HostDescription:
        """Read a host file.

        A JSON object: ``namespaces``, a list of objects with the fields of :class:`model.Namespace` (addresses and
        sizes are numbers of bytes; ``numa_node`` and ``persistence_domain`` may be left out);
        ``physical_address_bits``, 32 to 52; and ``mounts``, which may be left out, an object from directories where DAX
        file systems are mounted to the names of the namespaces they are on. Without ``mounts`` every file is taken to
        be on the one fsdax namespace.

        :param source: name of the file, for errors.
        :raises ConfigError: naming what is missing, unknown or wrong.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source}: not JSON: {error}") from error
        _keys(content, source, required={"namespaces", "physical_address_bits"}, optional={"mounts"})
        bits = content["physical_address_bits"]
        if type(bits) is not int or not 32 <= bits <= 52:
            raise ConfigError(
                f"{source}: physical_address_bits: expected a number from 32 to 52, found {json.dumps(bits)}"
            )
        if not isinstance(content["namespaces"], list):
            raise ConfigError(f"{source}: namespaces: expected a list, found {json.dumps(content['namespaces'])}")
        found = tuple(_parse(each, f"{source}: namespaces[{i}]", bits) for i, each in enumerate(content["namespaces"]))
        names = [each.name for each in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{source}: two namespaces are called {twice[0]}")
        places = content.get("mounts", {})
        if not isinstance(places, dict):
            raise ConfigError(f"{source}: mounts: expected an object, found {json.dumps(places)}")
        for directory, name in places.items():
            if not directory.startswith("/"):
                raise ConfigError(f"{source}: mounts: {directory!r} is not an absolute path")
            if name not in names:
                raise ConfigError(
                    f"{source}: mounts: {directory} is on {json.dumps(name)}, which is not among the namespaces"
                )
        return cls(found, bits, tuple(places.items()))


def read_host(sysfs: Path = SYSFS, proc: Path = Path("/proc")) -> HostDescription:
    """Describe this machine.

    :raises BackingError: when sysfs or proc cannot be read.
    """
    found = namespaces(sysfs)
    bits = physical_address_bits(proc)
    places = []
    for mount in mounts(proc / "self/mountinfo"):
        volume = volume_if_pmem(mount.device, sysfs) if has_dax(mount.options) else None
        if volume is not None:
            places.append((mount.directory, volume.namespace.name))
    return HostDescription(found, bits, tuple(places))


def _parse(entry: Any, where: str, bits: int) -> Namespace:
    known = {field.name for field in fields(Namespace)}
    optional = {"numa_node", "persistence_domain"}
    _keys(entry, where, required=known - optional, optional=optional)
    for key in ("name", "mode", "device", "uid"):
        if not isinstance(entry[key], str) or not entry[key]:
            raise ConfigError(f"{where}: {key}: expected a non-empty string, found {json.dumps(entry[key])}")
    if entry["mode"] not in MODES:
        raise ConfigError(f"{where}: mode: expected one of {', '.join(MODES)}, found {entry['mode']!r}")
    limit = 1 << bits
    for key, least in (("data_spa", 0), ("data_size", 1)):
        if type(entry[key]) is not int or not least <= entry[key] <= limit:
            raise ConfigError(
                f"{where}: {key}: expected a number from {least} to {limit}, found {json.dumps(entry[key])}"
            )
    if entry["data_spa"] + entry["data_size"] > limit:
        raise ConfigError(f"{where}: ends beyond {limit:#x}, the limit of {bits} physical address bits")
    node = entry.get("numa_node")
    if node is not None and (type(node) is not int or node < 0):
        raise ConfigError(f"{where}: numa_node: expected a number or null, found {json.dumps(node)}")
    domain = entry.get("persistence_domain", "")
    if domain not in PERSISTENCE_DOMAINS:
        expected = ", ".join(map(json.dumps, PERSISTENCE_DOMAINS))
        raise ConfigError(f"{where}: persistence_domain: expected one of {expected}, found {json.dumps(domain)}")
    return Namespace(**entry)


def _keys(entry: Any, where: str, *, required: set[str], optional: set[str]) -> None:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: expected an object, found {json.dumps(entry)}")
    if missing := sorted(required - entry.keys()):
        raise ConfigError(f"{where}: {missing[0]} is missing")
    if unknown := sorted(entry.keys() - required - optional):
        raise ConfigError(
            f"{where}: {unknown[0]!r} is not known", hint=f"known: {', '.join(sorted(required | optional))}"
        )
