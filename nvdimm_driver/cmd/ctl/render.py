# SPDX-License-Identifier: Apache-2.0
"""The output of nvdimmctl: text for people, JSON with raw numbers for scripts."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvdimm_driver import caching
from nvdimm_driver.acpi.iasl import decode
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NvdimmError, XenError
from nvdimm_driver.guest import layout, p2m
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.model import MIB, PAGE, Allocation, BackingIdentity, Plan, Record
from nvdimm_driver.pools.usage import PoolUsage
from nvdimm_driver.sizes import human
from nvdimm_driver.xml import direct_io

POOL_COLUMNS = ("Name", "Kind", "Capacity", "Free", "Largest free", "Used", "Health")
LINUX_NAMESPACE_ALIGN = 16 * MIB
"""ndctl rounds namespaces to this (Linux: arch/powerpc and x86 memremap_compat_align() and SUBSECTION_SIZE)."""


def size_column(readable: bool) -> Callable[[int], int | str]:
    """Return the function that formats sizes: with units for people, or in bytes for scripts."""
    return human if readable else int


def xml_diff(before: str, after: str) -> str:
    """Return what the rewriting changes, as a unified diff."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "domain XML", "for libxl", lineterm="", n=1)
    return "\n".join(lines)


def plan_text(plan: Plan, diff: str) -> str:
    """Return a plan as text for people."""
    return "\n".join([diff, "", *_backings(plan), "", *_layout(plan), "", *_mappings(plan), "", *_tables(plan), ""])


def plan_json(plan: Plan) -> str:
    """Return a plan as JSON for scripts; tables are hexadecimal."""
    larger, smaller, hypercalls = p2m.cost(plan.mappings)
    out = asdict(plan)
    out["domain"]["unplaced"] = sorted(plan.domain.unplaced)
    out["mappings"] = [mapping._asdict() for mapping in plan.mappings]
    out["cost"] = {"superpage_entries": larger, "page_entries": smaller, "hypercalls": hypercalls}
    out["tables"] = [table.hex() for table in plan.tables.tables]
    return json.dumps(out, indent=2)


def acpidump(tables: Sequence[bytes]) -> str:
    """Return tables in the text format of acpidump(8), which acpixtract(8) reads."""
    return "".join(_hexdump(table) for table in tables)


def write_tables(tables: Sequence[bytes], folder: Path) -> Iterator[Path]:
    """Write one file per table, ``nfit.dat``, ``ssdt1.dat``, …; yield their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[str, int] = {}
    for table in tables:
        name = table[:4].decode("ascii", "replace").lower()
        seen[name] = seen.get(name, 0) + 1
        path = folder / f"{name}{seen[name] if seen[name] > 1 or name == 'ssdt' else ''}.dat"
        path.write_bytes(table)
        yield path


def state(record: Record, item: Allocation) -> str:
    """Return the state of an NVDIMM, as the column State has it."""
    if not item.ready:
        wanted = item.written or any(each.spec.path == item.spec.path for each in record.intents)
        return f"provisioning {item.written}%" if wanted else "lost"
    return record.start.state if record.start and item in record.started else "free"


def advice(visible: int) -> Iterator[str]:
    """Yield advice on the size, in bytes, that a guest sees."""
    if visible % LINUX_NAMESPACE_ALIGN:
        yield f"advice: Linux makes namespaces only in multiples of {human(LINUX_NAMESPACE_ALIGN)}"


def fate(driver: XenNvdimmDriver, item: Record, *, delete: bool) -> str:
    """Return what happens to each backing when the domain gives up its claim."""
    wiped = {each.spec.path for each in driver.wiper.to_wipe(item)}
    own = {each.spec.path for each in driver.wiper.own(item)}
    lines = []
    for allocation in item.claims:
        path, owner = allocation.spec.path, driver.wiper.find_owner(item, allocation)
        steps = ["overwritten with zeros (wipe_on_release)"] if path in wiped else []
        steps += ["deleted"] if delete and path in own and os.path.isfile(path) else []
        steps += [f"kept as it is, because it belongs to domain {owner.name}"] if owner else []
        if driver.wiper.is_replaced(allocation):
            steps = ["another device or file system has its place, which is kept as it is"]
        done = " and ".join(steps) or "kept as it is"
        if not os.path.exists(path):
            has_mark = allocation.identity is not None and allocation.identity.inode
            done = "missing" + (f"; by its mark, it is {item.name}'s again if it comes back" if has_mark else "")
        lines.append(f"{path}: {done}")
    return "; ".join(lines)


def record(
    driver: XenNvdimmDriver, item: Record, size: Callable[[int], int | str]
) -> tuple[Sequence[str], Sequence[Any]]:
    """Return names and values of everything that is known of a domain; addresses are in bytes."""
    start = item.start
    wanted = [(each.spec.slot, each.spec.visible_size, each.identity) for each in item.claims if each.identity]
    bases = saved_guest.bases(driver.ledger.find_run(item.uuid) if start else None, wanted)
    nvdimms = [
        {
            "slot": allocation.spec.slot,
            "path": allocation.spec.path,
            "size": size(allocation.spec.size),
            "label_size": size(allocation.spec.label_size),
            "base": allocation.base,
            "guest_base": bases.get(allocation.spec.slot),
            "identity": _identity(allocation.identity, size),
            **_health(driver, allocation),
        }
        for allocation in item.claims
    ]
    values = {
        "name": item.name,
        "uuid": item.uuid,
        "ram": size(item.ram),
        "dsm": item.dsm,
        "cache": start.cache or None if start and start.state == "mapped" else None,
        "label_server": driver.label_server_state(item),
        "holder": driver.holder_state(item),
        "state": start.state if start else "off",
        "domid": start.domid if start else None,
        "frozen": list(start.paths) if start else [],
        "last_fault": item.fault,
        "nvdimms": nvdimms,
    }
    return tuple(values), tuple(values.values())


def _identity(identity: BackingIdentity | None, size: Callable[[int], int | str]) -> dict[str, Any] | None:
    return None if identity is None else {**asdict(identity), "size": size(identity.size)}


def pool_row(usage: PoolUsage, size: Callable[[int], int | str]) -> tuple[Any, ...]:
    """Return a pool's values for :data:`POOL_COLUMNS`."""
    values = dict(zip(*pool(usage, size), strict=True))
    return (
        *(values[name] for name in ("name", "kind", "capacity", "free", "largest_free", "used")),
        "; ".join(usage.problems) or "ok",
    )


def pool(usage: PoolUsage, size: Callable[[int], int | str]) -> tuple[Sequence[str], Sequence[Any]]:
    """Return names and values of everything that is known of a pool."""
    pool, space = usage.pool, usage.space

    def size_or_none(count: int | None) -> int | str | None:
        return None if count is None else size(count)

    values = {
        "name": pool.name,
        "kind": pool.kind,
        "paths": list(pool.paths),
        "capacity": size_or_none(space.capacity if space else None),
        "free": size_or_none(usage.free),
        "largest_free": size_or_none(space.largest_free if space else None),
        "used": size(usage.used),
        "quota": size_or_none(pool.quota),
        "alignment": size_or_none(space.alignment if space else None),
        "alignsize": size(pool.alignsize),
        "label_size": size(pool.label_size),
        "wipe_on_release": pool.wipe_on_release,
        "problems": list(usage.problems),
        "namespaces": [
            {"name": each.name, "mode": each.mode, "device": each.device, "size": size(each.data_size)}
            for each in (space.namespaces if space else ())
        ],
        "nvdimms": [
            {
                "domain": record.name,
                "uuid": record.uuid,
                "slot": item.spec.slot,
                "path": item.spec.path,
                "size": size(item.spec.size),
                "state": state(record, item),
            }
            for record, item in usage.owned
        ],
    }
    return tuple(values), tuple(values.values())


def _health(driver: XenNvdimmDriver, item: Allocation) -> dict[str, Any]:
    """Return a backing's bad blocks, or the reason why they cannot be found."""
    if not item.ready:
        return {"bad_blocks": [], "problem": None}
    try:
        bad = driver.find_bad_blocks(item)
    except NvdimmError as error:
        return {"bad_blocks": [], "problem": str(error)}
    return {"bad_blocks": [{"offset": offset, "length": length} for offset, length in bad], "problem": None}


def _backings(plan: Plan) -> Iterator[str]:
    yield "Backings:"
    columns = zip(plan.domain.nvdimms, plan.locations, plan.intakes, plan.bad_blocks, strict=True)
    for spec, location, intake, bad in columns:
        todo = "create, " if intake.creates else ""
        todo += f"write {human(intake.writes)} of zeros" if intake.writes else "as it is"
        yield (
            f"  slot {spec.slot}: {spec.path}: {human(spec.size)}, label {human(spec.label_size)}; "
            f"{intake.kind} on {intake.namespace.name} ({intake.namespace.device}): {todo}"
        )
        assumed = " (assumed: not written yet)" if intake.assumed else ""
        for extent in location.extents:
            yield f"    offset {extent.offset:#x}: SPA {extent.spa:#x}, {human(extent.length)}{assumed}"
        yield from (f"    warning: bad blocks at offset {offset:#x}, {human(length)}" for offset, length in bad)


def _layout(plan: Plan) -> Iterator[str]:
    yield f"Guest-physical layout: RAM {human(plan.layout.ram)}, up to {plan.layout.highmem_end:#x}"
    for item in plan.layout.nvdimms:
        yield f"  {item.base:#x} - {item.end - 1:#x}: slot {item.slot}, handle {item.handle:#x}, {human(item.size)}"
        yield from (f"    {line}" for line in advice(item.size))
    yield f"  cache: {_cache(plan)}"
    for spec, problem in zip(plan.domain.nvdimms, plan.misplaced_labels, strict=False):
        if problem:
            yield f"  warning: {spec.path}: {problem}"
    yield from (f"  advice: {line}" for line in layout.advice(plan.layout, pci_devices=plan.domain.pci_devices))
    yield from (f"  advice: {line}" for line in direct_io.advice(plan.domain.emulated))


def _cache(plan: Plan) -> str:
    try:
        found = caching.choose(plan.cache, lambda: plan.cache_fault)
    except XenError as error:
        return f"the guest does not boot: {error.message}"
    return f"{found}: {plan.cache_fault}" if plan.cache == caching.AUTO and plan.cache_fault else found


def _mappings(plan: Plan) -> Iterator[str]:
    larger, smaller, hypercalls = p2m.cost(plan.mappings)
    yield (
        f"Mapping calls: {len(plan.mappings)} extents, {larger} entries of 2 MiB, {smaller} of 4 KiB, "
        f"{hypercalls} memory_mapping hypercalls"
    )
    for mapping in plan.mappings:
        length = human(mapping.frames * PAGE)
        yield f"  gfn {mapping.gfn:#x} <- mfn {mapping.mfn:#x}, {mapping.frames:#x} frames ({length})"


def _tables(plan: Plan) -> Iterator[str]:
    yield "ACPI tables:"
    for table in plan.tables.tables:
        yield from (f"  {line}" for line in decode(table).splitlines())


def _hexdump(table: bytes) -> str:
    lines = [f"{table[:4].decode('ascii', 'replace')} @ 0x0000000000000000"]
    for offset in range(0, len(table), 16):
        row = table[offset : offset + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"    {offset:04X}: {' '.join(f'{byte:02X}' for byte in row):<48} {text}")
    return "\n".join(lines) + "\n\n"
