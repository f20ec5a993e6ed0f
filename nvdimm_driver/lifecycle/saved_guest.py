# SPDX-License-Identifier: Apache-2.0
"""The tie between a saved guest and its NVDIMMs: a number in the NFIT in its memory.

Each run of a guest has a number of its own, which is the OEM revision of its NFIT. A saved image has the guest's
memory in it, and so the number, whoever saved it and wherever the image is. The ledger has the number of the domain's
last run, and what NVDIMMs that guest had. A guest goes on only if both are still the same: its memory has parts of the
NVDIMMs' contents in it, and addresses in them.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from nvdimm_driver.acpi.tables import Header, Nfit, RegionMapping, SpaRange, seal
from nvdimm_driver.acpi.walk import Read, locate
from nvdimm_driver.errors import BackingError, NvdimmError, RefusedError
from nvdimm_driver.guest import hot_slots
from nvdimm_driver.guest.hot_slots import SlotRecord
from nvdimm_driver.model import (
    MAX_NVDIMMS,
    Allocation,
    BackingIdentity,
    DomainSpec,
    GuestLayout,
    Location,
    NvdimmSpec,
    Placement,
    Plan,
    Run,
)
from nvdimm_driver.plugins import Backing, backing_named, exists
from nvdimm_driver.state.ownership import identity_at

LOG = logging.getLogger(__name__)

UNNUMBERED = 1
"""OEM revision of an NFIT as QEMU makes it: the guest was started by a version that gave no numbers."""
NO_TIME = (-1,)
"""Times of a backing that has none of them: it is not known what time it gets."""
UNCOMPARED = ("path", "backing size", "domain", "definition")
"""What may differ: the same bytes may be found at another path, and more behind them. How the domain was defined does
not matter to its guest."""
_SPOILED = (
    "since it was saved, its domain was started, its NVDIMMs were given up, overwritten by nvdimmctl or had by another "
    "guest, or the ledger was made anew"
)
_REMEDY = "put back what differs, or boot the guest anew: virsh managedsave-remove, then virsh start"


def new_number() -> int:
    """Return a number for a run, which no other run has had."""
    return UNNUMBERED + 1 + secrets.randbelow((1 << 32) - UNNUMBERED - 1)


def numbered(tables: Sequence[bytes], number: int) -> tuple[bytes, ...]:
    """Return ACPI tables with the number in the NFIT among them."""
    return tuple(_numbered(table, number) if table[:4] == b"NFIT" else table for table in tables)


def describe(domain: DomainSpec, layout: GuestLayout, locations: Sequence[Location]) -> str:
    """Return what the guest of a plan has, as JSON: its domain, and its NVDIMMs with their bytes and places."""
    nvdimms = []
    for spec, placement, location in zip(domain.nvdimms, layout.nvdimms, locations, strict=True):
        nvdimms.append(
            {
                "slot": spec.slot,
                "path": spec.path,
                "base": hex(placement.base),
                "size": placement.size,
                "label area": spec.label_size,
                "label server": layout.dsm if spec.label_size else "none",
                "label address": hex(placement.label_base) if placement in layout.label_areas else "none",
                "backing size": location.identity.size,
                "domain": {
                    name: getattr(domain, name) for name in ("name", "ram", "dsm", "emulator", "cache", "hot_slots")
                },
                "definition": {name: value for name, value in asdict(spec).items() if name != "path"},
                **_bytes(location.identity),
            }
        )
    return json.dumps(nvdimms)


def with_nvdimm(run: Run, nvdimms: str, backings: Sequence[Backing]) -> Run:
    """Return a run whose guest has more NVDIMMs.

    :param nvdimms: what it has besides, as :func:`describe` returns it.
    """
    had = _nvdimms(run.nvdimms)
    all_of_it = sorted([*had, *_nvdimms(nvdimms)], key=lambda each: int(each["slot"]))
    written = {**json.loads(run.written), **json.loads(times(backings, nvdimms))}
    return run._replace(nvdimms=json.dumps(all_of_it), written=json.dumps(written))


def without_slot(run: Run, slot: int) -> Run:
    """Return a run whose guest has no NVDIMM in a slot."""
    left = [each for each in _nvdimms(run.nvdimms) if each["slot"] != slot]
    written = {key: value for key, value in json.loads(run.written).items() if key != str(slot)}
    return run._replace(nvdimms=json.dumps(left), written=json.dumps(written))


def domain_of(run: Run, uuid: str) -> DomainSpec | None:
    """Return the domain of a run as it was started: a saved guest of this run comes back with the same XML.

    :returns: None when an earlier version has begun the run, and did not record that.
    """
    found = _nvdimms(run.nvdimms)
    if not found or not all("domain" in each for each in found):
        return None
    nvdimms = tuple(NvdimmSpec(path=each["path"], **each["definition"]) for each in found)
    domain = found[0]["domain"]
    # earlier versions did not record these
    emulator, cache, count = domain.get("emulator"), domain.get("cache"), domain.get("hot_slots", 0)
    return DomainSpec(
        domain["name"], uuid, domain["ram"], emulator, nvdimms, domain["dsm"], cache=cache, hot_slots=count
    )


def has_had(run: Run, spec: NvdimmSpec, identity: BackingIdentity, written: int | None) -> bool:
    """Return True if the guest of a run had exactly this NVDIMM, at whatever path, and no one else has written it.

    :param written: when a program of the host has last written it; None while a guest has it.
    """
    domain = domain_of(run, "")
    sizes = (spec.slot, spec.size, spec.label_size, spec.visible_size)
    nvdimms = domain.nvdimms if domain else ()
    had = {(each.slot, each.size, each.label_size, each.visible_size) for each in nvdimms}
    same = any(_bytes(identity).items() <= each.items() for each in _nvdimms(run.nvdimms) if each["slot"] == spec.slot)
    unwritten = written is None or written == _written(run, spec.slot)[-1]
    return run.number != 0 and unwritten and sizes in had and same


def times(backings: Sequence[Backing], nvdimms: str) -> str:
    """Return when a program of the host has last written each backing, by slot, as JSON.

    :param nvdimms: as :func:`describe` returns them.
    """
    return json.dumps({str(each["slot"]): _written_at(backings, each["path"]) for each in _nvdimms(nvdimms)})


def times_at_end(run: Run, found: Mapping[str, Iterable[int]]) -> str:
    """Return the :func:`times` of a run that is over; for a backing that is not among these, that of its begin.

    The file system may not be mounted yet, and its file is immutable still.

    :param found: the times of backings, by path: of each the one that it has, or several if it is not known which; the
        last is what it has once it is thawed.
    """
    by_slot = {str(slot): [*dict.fromkeys(found[path])] for path, slot in paths_of(run).items() if path in found}
    packed = {slot: times if len(times) > 1 else times[0] for slot, times in by_slot.items()}
    return json.dumps({**json.loads(run.written), **packed})


def times_of(run: Run) -> dict[str, tuple[int, ...]]:
    """Return the :func:`times` of a run that are known, by path, as :func:`times_at_end` takes them."""
    found = {path: _written(run, slot) for path, slot in paths_of(run).items()}
    known = {path: tuple(time for time in times if time is not None) for path, times in found.items()}
    return {path: times for path, times in known.items() if times}


def bases(last: Run | None, wanted: Sequence[tuple[int, int, BackingIdentity]]) -> dict[int, int]:
    """Return, by slot, the bases of those of these NVDIMMs that the guest of the last run has.

    :param wanted: slot, visible bytes and identity of each.
    """
    had = {} if last is None else {each["slot"]: each for each in _nvdimms(last.nvdimms)}
    return {
        slot: int(had[slot]["base"], 16)
        for slot, size, identity in wanted
        if slot in had and had[slot]["size"] == size and _bytes(identity).items() <= had[slot].items()
    }


def places(run: Run) -> list[tuple[int, int]]:
    """Return base and slot of each NVDIMM that the guest of a run has."""
    return [(int(each["base"], 16), each["slot"]) for each in _nvdimms(run.nvdimms)]


def paths_of(run: Run) -> dict[str, int]:
    """Return the slot of each backing of a run, by path."""
    return {each["path"]: each["slot"] for each in _nvdimms(run.nvdimms)}


def path_of(run: Run, identity: BackingIdentity | None) -> str:
    """Return the path by which the guest of a run had a backing; empty when it had not."""
    had = (path for path, each in backings_of(run) if identity and each.shares_bytes(identity))
    return next(had, "")


def backings_of(run: Run) -> list[tuple[str, BackingIdentity]]:
    """Return path and identity of each backing that the guest of a run has."""
    return [(each["path"], _identity(each)) for each in _nvdimms(run.nvdimms)]


def placed(run: Run) -> Iterator[tuple[NvdimmSpec, BackingIdentity, Placement, bool]]:
    """Yield each NVDIMM that the guest of a run has: as it is defined, its backing, its place, and True if its label
    area is in the guest's memory; nothing of a run that an earlier version has begun, and of which that is not known.
    """
    for each in _nvdimms(run.nvdimms):
        if "definition" in each and "label address" in each:
            spec, label_at = NvdimmSpec(path=each["path"], **each["definition"]), each["label address"]
            place = Placement(
                slot=each["slot"],
                base=int(each["base"], 16),
                size=each["size"],
                label_size=each["label area"],
                label_gap=spec.label_gap,
                label_at=None if label_at == "none" else int(label_at, 16),
            )
            yield spec, _identity(each), place, label_at != "none"


def missing(had: Mapping[str, BackingIdentity | None], backings: Sequence[Backing]) -> str:
    """Return which path of a saved guest no longer leads to its bytes; empty when all do.

    :param had: by path, the backings of the guest, whose image has these paths.
    """
    for path, identity in had.items():
        found = identity_at(backings, path)
        if identity is None or found is None or not found.shares_bytes(identity):
            return f"it has one by the path {path}, which is not there any more"
    return ""


def has_bytes_of(run: Run, identity: BackingIdentity) -> bool:
    """Return True if the guest of a run may have bytes of a backing."""
    return any(_identity(each).shares_bytes(identity) for each in _nvdimms(run.nvdimms))


def check_available(last: Run, backings: Sequence[Backing], dsm: str) -> dict[str, BackingIdentity]:
    """Check that the NVDIMMs of a run are still there, with the same bytes; return their identities, by path.

    :param dsm: server of the label areas from now on.
    :raises RefusedError: when something differs.
    """
    found: dict[str, BackingIdentity] = {}
    now = []
    for each in _nvdimms(last.nvdimms):
        identity = identity_at(backings, each["path"])
        if identity is None:
            _check_home(each["path"], _identity(each), backings)
            raise refused(f"{each['path']} is not there, or is not fit any more")
        found[each["path"]] = identity
        served = {"label server": dsm} if each["label area"] else {}
        now.append({**each, **served, **_bytes(identity)})
    nvdimms = json.dumps(now)
    check_run(Run(last.number, nvdimms, times(backings, nvdimms)), last if last.number else None)
    return found


def _check_home(path: str, identity: BackingIdentity, backings: Sequence[Backing]) -> None:
    """Check that a backing which is not at its path is not merely away: its file system is not mounted there.

    :raises RefusedError: when it is: the saved guest can go on once it is back.
    """
    if exists(path):
        return
    try:
        backing_named(backings, identity.kind).check_home(path, identity)
    except BackingError as error:
        raise RefusedError(f"the saved guest cannot go on yet: {error.message}", hint=error.hint) from error


def check_plan(last: Run, plan: Plan) -> None:
    """Check that the guest of a plan has the NVDIMMs of the last run, at the same places.

    :raises RefusedError: when something differs.
    """
    if differing := differences(last, plan):
        raise refused(differing)


def differences(last: Run, plan: Plan) -> str:
    """Return what the guest of a plan has otherwise than that of the last run; empty when nothing."""
    return "; ".join(_differences(_nvdimms(last.nvdimms), _nvdimms(describe(plan.domain, plan.layout, plan.locations))))


def not_as_stored(items: Sequence[Allocation], plan: Plan) -> str:
    """Return what the NVDIMMs of a plan have otherwise than these, but for their paths; empty when nothing."""
    had = [(replace(item.spec, path=""), item.base, item.identity) for item in items]
    now = [
        (replace(spec, path=""), at.base, location.identity)
        for spec, at, location in zip(plan.domain.nvdimms, plan.layout.nvdimms, plan.locations, strict=True)
    ]
    return "" if had == now else "they are not those of the ledger"


def check(
    read: Read, tables: Sequence[bytes], begun: Run, last: Run | None, *, is_unnumbered: bool = False
) -> tuple[int, bytes]:
    """Check that a saved guest may go on with the NVDIMMs that a start has prepared.

    :param read: reads the guest's memory.
    :param tables: that the start would deliver to a guest that boots.
    :param begun: the run that the start begins.
    :param last: the domain's last run.
    :param is_unnumbered: a version that numbered no runs has started the domain's last guest, and nothing has written
        its NVDIMMs since.
    :returns: an address in the guest's memory, and the bytes to write there, with which the guest's run is ``begun``.
    :raises AcpiError: when the guest's NFIT cannot be found or is malformed.
    :raises RefusedError: when something differs.
    """
    address, nfit = locate(read, b"NFIT")
    (prepared,) = (table for table in tables if table[:4] == b"NFIT")
    _check_places(read, nfit, prepared)
    number = Header.parse(nfit).oem_revision
    if number != UNNUMBERED or last is not None or not is_unnumbered:
        check_run(begun, last if last is not None and last.number == number > UNNUMBERED else None)
    return address, _numbered(nfit, begun.number)


def run_of_guest(read: Read, nvdimms: str, last: Run | None, backings: Sequence[Backing]) -> tuple[Run | None, bool]:
    """Return which run of its domain a running guest is in, by the NFIT in its memory, and False if that has no number.

    :param read: reads the guest's memory.
    :param nvdimms: what the guest has, as far as the ledger knows: see :func:`describe`.
    :param last: the last run that the ledger has.
    :returns: no run when it cannot be read, or the guest has other NVDIMMs than these.
    """
    try:
        _, nfit = locate(read, b"NFIT")
        number, places = Header.parse(nfit).oem_revision, _places_in(read, nfit)
    except NvdimmError as error:  # the firmware has not made the tables yet, or the guest has overwritten them
        LOG.warning("the number of a guest's run cannot be read in its memory: %s", error)
        return None, True
    if number == UNNUMBERED:
        return None, False
    known = last is not None and last.number == number
    if last is not None and known and paths_of(last) == {each["path"]: each["slot"] for each in _nvdimms(nvdimms)}:
        return last, True
    found = [{"slot": each["slot"], "base": each["base"], "visible size": each["size"]} for each in _nvdimms(nvdimms)]
    if places != found:
        LOG.warning("a running guest has its NVDIMMs at %s, and its domain at %s", places, found)
        return (last if known else None), True
    written = json.loads(times(backings, nvdimms)) | (json.loads(last.written) if last is not None and known else {})
    return Run(
        number, nvdimms, json.dumps({each: written[each] for each in written if int(each) in _slots(nvdimms)})
    ), True


def check_known(last: Run | None, *, is_unnumbered: bool, is_spoiled: bool) -> None:
    """Check that the ledger has the run in which a guest was saved, or that no version has numbered it.

    :param is_unnumbered: as :meth:`.StartSteps.is_unnumbered` returns it.
    :param is_spoiled: as :meth:`.StartSteps.is_spoiled` returns it.
    :raises RefusedError: when it has not, or the guest's NVDIMMs are not as they were.
    """
    if last is None and is_spoiled:
        raise refused(_SPOILED)
    if last is None and not is_unnumbered:
        raise RefusedError(
            "the saved guest cannot go on: the ledger does not have the run that it was saved in; it was lost or made "
            "anew, or the domain's NVDIMMs were released",
            hint="boot the guest anew: virsh managedsave-remove, then virsh start",
        )


def check_run(begun: Run, last: Run | None) -> None:
    """Check that a run may follow another: the same NVDIMMs at the same places, and no byte of them written since.

    :param last: None when it is not known.
    :raises RefusedError: when something differs.
    """
    if last is None:
        raise refused(_SPOILED)
    if differing := "; ".join(_differences(_nvdimms(last.nvdimms), _nvdimms(begun.nvdimms))):
        raise refused(differing)
    now = json.loads(begun.written)
    for path, slot in paths_of(begun).items():
        time = now[str(slot)]
        if time != _written(last, slot)[-1]:
            when = f" at {_time(time)}" if time else ""
            raise refused(f"{path} was written on the host{when}, after the guest was saved")


def _slots(nvdimms: str) -> set[int]:
    return {each["slot"] for each in _nvdimms(nvdimms)}


def _places_in(read: Read, nfit: bytes) -> list[dict[str, Any]]:
    """Return where a guest has its NVDIMMs: by its slots for hot-plug, if it has some, else by its NFIT."""
    slots = _plugged(read)
    return _places(nfit) if slots is None else slots


def _plugged(read: Read) -> list[dict[str, Any]] | None:
    """Return what is in the slots of a guest; None when it has none."""
    try:
        head = read(hot_slots.ADDRESS, hot_slots.EVENTS_OFFSET)
    except NvdimmError:  # it has no such pages
        return None
    if not head.startswith(hot_slots.SIGNATURE):
        return None
    count = min(int.from_bytes(head[hot_slots.SLOTS_OFFSET :], "little"), MAX_NVDIMMS)
    records = [SlotRecord.parse(read(hot_slots.address_of(slot), hot_slots.RECORD)) for slot in range(count)]
    return [place for each in records if not each.is_empty for place in _places_of(Nfit.of_structures(each.structures))]


def _check_places(read: Read, saved: bytes, prepared: bytes) -> None:
    plugged, has = _plugged(read), _places(prepared)
    had = _places(saved) if plugged is None else plugged
    if plugged is not None:  # what it has ejected since is put away once it runs
        has = [each for each in has if each in had or each["slot"] in {one["slot"] for one in had}]
    if had != has:
        raise refused("; ".join(_differences(had, has)) or "its NFIT has an NVDIMM twice")


def _places(nfit: bytes) -> list[dict[str, Any]]:
    """Return where a guest has its NVDIMMs, by its NFIT."""
    return _places_of(Nfit.parse(nfit))


def _places_of(table: Nfit) -> list[dict[str, Any]]:
    ranges = {each.index: each for each in table.of(SpaRange)}
    mappings = table.of(RegionMapping)
    if len(mappings) > MAX_NVDIMMS:
        raise refused(f"its NFIT has {len(mappings)} NVDIMMs, and {MAX_NVDIMMS} are possible")
    found = [(each.handle - 1, ranges.get(each.spa_index)) for each in mappings]
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
                if name not in UNCOMPARED and had[slot].get(name) != value:
                    yield f"slot {slot}: its {name} is {value}, and the guest knows {had[slot].get(name)}"


def _numbered(table: bytes, number: int) -> bytes:
    return seal(replace(Header.parse(table), oem_revision=number), table[Header.SIZE :])


def _nvdimms(description: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] | None = json.loads(description or "null")
    return found or []  # of a start of before version 4, nobody knows


def _bytes(identity: BackingIdentity) -> dict[str, Any]:
    """Return what tells a backing's bytes from others, whatever its size."""
    return {
        "kind": identity.kind,
        "namespace": identity.device,
        "offset in the namespace": identity.start,
        "inode": identity.inode,
        "inode generation": identity.generation,
    }


def _identity(nvdimm: dict[str, Any]) -> BackingIdentity:
    return BackingIdentity(
        nvdimm["kind"],
        nvdimm["namespace"],
        nvdimm["offset in the namespace"],
        nvdimm["inode"],
        nvdimm["inode generation"],
        nvdimm["backing size"],
    )


def _written(run: Run, slot: int) -> tuple[int | None, ...]:
    """Return the times of which the backing in a slot has one if only the guest of the run has written it.

    Once it is not frozen for that run any more, it is the last.
    """
    found = json.loads(run.written).get(str(slot))
    return tuple(found) if isinstance(found, list) else (found,)


def _written_at(backings: Sequence[Backing], path: str) -> int | None:
    return next((backing.written_at(path) for backing in backings if backing.handles(path)), 0)


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def refused(reason: str) -> RefusedError:
    """Return the error that says why a saved guest cannot go on."""
    return RefusedError(f"the saved guest cannot go on: {reason}", hint=_REMEDY)
