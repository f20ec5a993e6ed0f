# SPDX-License-Identifier: Apache-2.0
"""Check the ledger against Xen and against the backings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from nvdimm_driver import host_files
from nvdimm_driver.backing.identity import check_identity
from nvdimm_driver.doctor.finding import Finding, could_not, failed, noted, passed, warned
from nvdimm_driver.errors import LedgerError, NvdimmError
from nvdimm_driver.model import Allocation, Record
from nvdimm_driver.plugins import Backing, Mapper, backing_of
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.start_steps import host_boot_id

_XEN, _BACKINGS, _SERVERS, _HOLDERS = "ledger, Xen", "ledger, backings", "label servers", "holders"


def check(
    path: Path,
    backings: Sequence[Backing],
    mapper: Mapper,
    label_server: Callable[[str], bool],
    held: Callable[[], Collection[str]],
) -> Iterator[Finding]:
    """Check that the ledger can be read, and that it is right.

    :param path: path of the ledger.
    :param label_server: returns True when the label server of the domain with that uuid runs.
    :param held: returns the uuids of the domains that have a holder.
    """
    if not host_files.exists(path):
        yield failed("ledger", f"there is no {path}", "'nvdimmctl register' makes it")
    else:
        try:
            with closing(Ledger(str(path))) as ledger:
                ledger.check_integrity()
                records = ledger.domains()
                elsewhere = _elsewhere(ledger)
        except NvdimmError as error:
            yield could_not("ledger", error)
        else:
            nvdimms = sum(len(record.allocations) for record in records)
            has = f"{len(records)} domains, {nvdimms} NVDIMMs"
            if elsewhere:
                yield warned("ledger", f"{has}; {elsewhere.message}", elsewhere.hint)
            else:
                yield passed("ledger", has)
            yield from check_starts(records, mapper)
            yield from check_backings(records, backings)
            guests = _with_guest(records, mapper)
            yield from check_label_servers(guests, label_server)
            yield from check_holders(guests, held())
            yield from check_caches(guests)
            return
    for name in (_XEN, _BACKINGS, _SERVERS, _HOLDERS):
        yield failed(name, "cannot be checked without the ledger")


def _elsewhere(ledger: Ledger) -> LedgerError | None:
    """Return the error that says that the ledger comes from elsewhere, or that nobody knows."""
    try:
        ledger.check_own()
    except LedgerError as error:
        return error
    return None


def _has_guest(record: Record, mapper: Mapper) -> bool:
    """Return True when Xen has the guest that a domain has according to the ledger.

    :raises XenError: when Xen cannot be asked.
    """
    start = record.start
    if start is None or start.domid is None or start.boot_id != host_boot_id():
        return False
    return mapper.is_alive(start.domid, record.uuid)


def _with_guest(records: Sequence[Record], mapper: Mapper) -> list[Record]:
    """Return the domains whose guest Xen has, or may have."""
    try:
        return [record for record in records if _has_guest(record, mapper)]
    except NvdimmError:  # which check_starts has said
        return list(records)


def check_starts(records: Sequence[Record], mapper: Mapper) -> Iterator[Finding]:
    """Check that Xen has the domains that run according to the ledger."""
    running = [record for record in records if record.start and record.start.domid]
    try:
        gone = [record for record in running if not _has_guest(record, mapper)]
    except NvdimmError as error:
        yield could_not(_XEN, error)
        return
    for record in gone:
        domid = record.start.domid if record.start else None
        yield warned(
            _XEN,
            f"domain {record.name} runs as domid {domid} according to the ledger, but Xen does not have it",
            "'nvdimmctl list' cleans up what is left of it",
        )
    if not gone:
        yield passed(_XEN, f"{len(running)} domains run, according to both")


def check_backings(records: Sequence[Record], backings: Sequence[Backing]) -> Iterator[Finding]:
    """Check that each NVDIMM's backing exists, is usable, and is the one that was provisioned."""
    found = [(record, item) for record in records for item in record.claims]
    wrong = [finding for record, item in found if (finding := check_backing(record, item, backings))]
    yield from wrong
    if not wrong:
        yield passed(_BACKINGS, f"{len(found)} NVDIMMs have the backings that the ledger records")


def check_backing(record: Record, item: Allocation, backings: Sequence[Backing]) -> Finding | None:
    """Return what is wrong with the backing of an NVDIMM; None when nothing is."""
    path = item.spec.path
    if item.identity is None:
        return warned(
            _BACKINGS,
            f"domain {record.name}: {path} is being written ({item.written}% done), or that was interrupted",
            "if no define is running, define the domain again",
        )
    try:
        check_identity(path, backing_of(backings, path).locate(item.spec).identity, item.identity)
    except NvdimmError as error:
        return failed(_BACKINGS, f"domain {record.name}: {error.message}", error.hint)
    except OSError as error:
        return failed(_BACKINGS, f"domain {record.name}: {path}: {error.strerror}")
    return None


def check_label_servers(records: Sequence[Record], label_server: Callable[[str], bool]) -> Iterator[Finding]:
    """Check that each guest that needs a label server has one."""
    served = [record for record in records if (at := record.start) and at.served and at.state == "mapped"]
    gone = [record for record in served if not label_server(record.uuid)]
    for record in gone:
        yield warned(_SERVERS, f"domain {record.name}: its label server is gone", "'nvdimmctl list' starts another")
    if not gone:
        yield passed(_SERVERS, f"{len(served)} guests need one and have it")


def check_holders(records: Sequence[Record], held: Collection[str]) -> Iterator[Finding]:
    """Check that the backings of each guest are held."""
    running = [record for record in records if (at := record.start) and at.state == "mapped"]
    gone = [record for record in running if record.uuid not in held]
    for record in gone:
        yield warned(
            _HOLDERS,
            f"domain {record.name}: nothing holds its backings: they can be unmounted while the guest has them",
            "'nvdimmctl list' holds them again",
        )
    if not gone:
        yield passed(_HOLDERS, f"the backings of {len(running)} guests are held")


def check_caches(records: Sequence[Record]) -> Iterator[Finding]:
    """Report which running guests have their NVDIMMs cached; nothing when none runs."""
    guests: dict[str, list[str]] = {}
    for record in records:
        if record.start and record.start.state == "mapped":
            guests.setdefault(record.start.cache or "not known", []).append(record.name)
    if guests:
        yield noted("cache", "; ".join(f"{cache}: {', '.join(names)}" for cache, names in sorted(guests.items())))
