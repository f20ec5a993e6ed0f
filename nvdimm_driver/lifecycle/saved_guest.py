# SPDX-License-Identifier: Apache-2.0
"""The tie between a saved guest and its NVDIMMs: a number in the NFIT in its memory.

Each run of a guest has a number of its own, which is the OEM revision of its NFIT. A saved image has the guest's
memory in it, and so the number, whoever saved it and wherever the image is. The ledger has the number of the domain's
last run, and what NVDIMMs that guest had. A guest goes on only if both are still the same: its memory has parts of the
NVDIMMs' contents in it, and addresses in them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from nvdimm_driver.acpi.tables import Header, Nfit, RegionMapping, SpaRange, seal
from nvdimm_driver.acpi.walk import Read, locate
from nvdimm_driver.errors import RefusedError
from nvdimm_driver.model import Plan, Run
from nvdimm_driver.plugins import Backing

UNNUMBERED = 1
"""OEM revision of an NFIT as QEMU makes it: the guest was started by a version that gave no numbers."""
_REMEDY = "put back what differs, or boot the guest anew: virsh managedsave-remove, then virsh start"


def new_number() -> int:
    """Return a number for a run, which no other run has had."""
    return UNNUMBERED + 1 + secrets.randbelow((1 << 32) - UNNUMBERED - 1)


def numbered(tables: Sequence[bytes], number: int) -> tuple[bytes, ...]:
    """Return ACPI tables with the number in the NFIT among them."""
    return tuple(_numbered(table, number) if table[:4] == b"NFIT" else table for table in tables)


def describe(plan: Plan) -> str:
    """Return what the guest of a plan has, one NVDIMM after the other, as JSON: equal for the same bytes in the same
    places.
    """
    nvdimms = []
    for spec, placement, location in zip(plan.domain.nvdimms, plan.layout.nvdimms, plan.locations, strict=True):
        identity = location.identity
        nvdimms.append(
            {
                "slot": spec.slot,
                "base": hex(placement.base),
                "size": placement.size,
                "label area": spec.label_size,
                "label server": plan.layout.dsm if spec.label_size else "none",
                "label address": hex(placement.label_base) if placement in plan.layout.label_areas else "none",
                "kind": identity.kind,
                "namespace": identity.device,
                "offset in the namespace": identity.start,
                "inode": identity.inode,
                "inode generation": identity.generation,
            }
        )
    return json.dumps(nvdimms)


def times(backings: Sequence[Backing], paths: Sequence[str]) -> str:
    """Return when a program of the host has last written each backing, as JSON."""
    return json.dumps({path: _written_at(backings, path) for path in sorted(paths)})


def check(read: Read, tables: Sequence[bytes], begun: Run, last: Run | None) -> tuple[int, bytes]:
    """Check that a saved guest may go on with the NVDIMMs that a start has prepared.

    :param read: reads the guest's memory.
    :param tables: that the start would deliver to a guest that boots.
    :param begun: the run that the start begins.
    :param last: the domain's last run.
    :returns: an address in the guest's memory, and the bytes to write there, with which the guest's run is ``begun``.
    :raises AcpiError: when the guest's NFIT cannot be found or is malformed.
    :raises RefusedError: when something differs.
    """
    address, nfit = locate(read, b"NFIT")
    (prepared,) = (table for table in tables if table[:4] == b"NFIT")
    _check_places(nfit, prepared)
    number = Header.parse(nfit).oem_revision
    if number != UNNUMBERED or last is not None:
        check_run(begun, last if last is not None and last.number == number else None)
    return address, _numbered(nfit, begun.number)


def check_run(begun: Run, last: Run | None) -> None:
    """Check that a run may follow another: the same NVDIMMs at the same places, and no byte of them written since.

    :param last: None when it is not known.
    :raises RefusedError: when something differs.
    """
    if last is None:
        raise _refused(
            "since it was saved, its domain was started, its NVDIMMs were given up or overwritten by nvdimmctl, or the "
            "ledger was made anew"
        )
    if last.nvdimms != begun.nvdimms:
        raise _refused("; ".join(_differences(json.loads(last.nvdimms), json.loads(begun.nvdimms))))
    before, now = json.loads(last.written), json.loads(begun.written)
    for path in sorted(now):
        if before.get(path) != now[path]:
            raise _refused(f"{path} was written on the host at {_time(now[path])}, after the guest was saved")


def _check_places(saved: bytes, prepared: bytes) -> None:
    had, has = _places(saved), _places(prepared)
    if had != has:
        raise _refused("; ".join(_differences(had, has)))


def _places(nfit: bytes) -> list[dict[str, Any]]:
    """Return where a guest has its NVDIMMs, by its NFIT."""
    table = Nfit.parse(nfit)
    ranges = {each.index: each for each in table.of(SpaRange)}
    found = [(each.handle - 1, ranges.get(each.spa_index)) for each in table.of(RegionMapping)]
    return [
        {"slot": slot, "base": hex(each.base), "visible size": each.length}
        for slot, each in sorted(found, key=lambda pair: pair[0])
        if each is not None
    ]


def _differences(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what differs, for people: ``slot 1: its base is 0x…, the saved guest has it at 0x…``."""
    had, has = ({each["slot"]: each for each in nvdimms} for nvdimms in (before, now))
    for slot in sorted({*had, *has}):
        if slot not in has:
            yield f"the guest has an NVDIMM in slot {slot}, at {had[slot]['base']}, and the domain has none there now"
        elif slot not in had:
            yield f"the domain has an NVDIMM in slot {slot} now, and the guest has none there"
        else:
            for name, value in has[slot].items():
                if had[slot].get(name) != value:
                    yield f"slot {slot}: its {name} is {value}, and the guest knows {had[slot].get(name)}"


def _numbered(table: bytes, number: int) -> bytes:
    return seal(replace(Header.parse(table), oem_revision=number), table[Header.SIZE :])


def _written_at(backings: Sequence[Backing], path: str) -> int:
    return next((backing.written_at(path) for backing in backings if backing.handles(path)), 0)


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _refused(reason: str) -> RefusedError:
    return RefusedError(f"the saved guest cannot go on: {reason}", hint=_REMEDY)
