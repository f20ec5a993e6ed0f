# SPDX-License-Identifier: Apache-2.0
"""The output of ``ndctl list -RNi`` (ndctl: util/json.c, ndctl/list.c): regions, and the namespaces in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nvdimm_driver.errors import BackingError


@dataclass(frozen=True)
class NdNamespace:
    """A namespace, with or without a driver.

    :ivar mode: ``fsdax``, ``devdax``, ``raw`` or ``sector``.
    :ivar size: bytes for data in its mode; 0 for a seed, from which a new namespace is made.
    :ivar device: path of its block or character device; empty when it has none now.
    :ivar uuid: empty without one.
    """

    name: str
    mode: str
    size: int
    device: str
    uuid: str


@dataclass(frozen=True)
class NdRegion:
    """A region of persistent memory.

    :ivar size: bytes.
    :ivar largest_free: bytes of the largest namespace that still fits in it.
    """

    name: str
    size: int
    largest_free: int
    namespaces: tuple[NdNamespace, ...]


def regions(listed: str) -> tuple[NdRegion, ...]:
    """Parse the output of ``ndctl list -RNi``.

    :raises BackingError: when it is something else.
    """
    try:
        found = json.loads(listed or "[]")
        items = found.get("regions", [found]) if isinstance(found, dict) else found
        return tuple(_region(item) for item in items)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackingError(
            f"'ndctl list -RNi' printed {listed[:80]!r}, which is not the expected JSON",
            hint="is it a newer version of ndctl?",
        ) from error


def namespace(printed: str) -> NdNamespace:
    """Parse the output of ``ndctl create-namespace``: the namespace that it made.

    :raises BackingError: when it is something else.
    """
    try:
        return _namespace(json.loads(printed))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackingError(
            f"'ndctl create-namespace' printed {printed[:80]!r}, which is not the expected JSON",
            hint="is it a newer version of ndctl?",
        ) from error


def _region(item: dict[str, Any]) -> NdRegion:
    free = item.get("max_available_extent", item.get("available_size", 0))
    return NdRegion(item["dev"], item["size"], free, tuple(map(_namespace, item.get("namespaces", ()))))


def _namespace(item: dict[str, Any]) -> NdNamespace:
    device = item.get("blockdev") or item.get("chardev") or ""
    if not device and item.get("daxregion"):
        device = item["daxregion"].get("devices", [{}])[0].get("chardev", "")
    return NdNamespace(
        item["dev"],
        item.get("mode", "raw"),
        item.get("size", 0),
        f"/dev/{device}" if device else "",
        item.get("uuid", ""),
    )
