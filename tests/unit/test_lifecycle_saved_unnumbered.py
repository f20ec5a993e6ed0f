# SPDX-License-Identifier: Apache-2.0
"""A guest that a version without numbers has saved goes on only if nothing else has had, or written, its NVDIMMs."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import RefusedError
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.model import KIB, SUPERPAGE, Location, NvdimmSpec, Record
from nvdimm_driver.plugins import unwatched
from tests.unit.doubles import OTHER_UUID, UUID, domain
from tests.unit.test_lifecycle_saved_guest import A, B, Bench, C, Image, bench, with_header

__all__ = ["bench"]


@pytest.fixture
def image(bench: Bench) -> Image:
    """Return a guest's memory, and have the ledger as an upgrade leaves it."""
    bench.driver().define(domain(A, B))
    bench.start()
    image = with_header(bench.save(), oem_revision=saved_guest.UNNUMBERED)
    with closing(sqlite3.connect(bench.folder / "ledger.sqlite")) as database, database:
        database.executescript("DELETE FROM run; INSERT INTO unnumbered (uuid) SELECT uuid FROM domain")
    return image


def test_what_is_asked_before_the_save_is_removed_does_not_spoil_it(bench: Bench, image: Image) -> None:
    """A file is immutable for a guest that the ledger does not know, which may have written it."""
    bench.backing.freeze(A)
    with pytest.raises(RefusedError, match=f"{A} is immutable for a guest that the ledger does not know"):
        bench.driver().try_restore(UUID)
    assert not bench.driver().ledger.is_spoiled(UUID)
    bench.backing.frozen.clear()
    bench.driver().try_restore(UUID)
    bench.restore(image)


def record_of(driver: XenNvdimmDriver) -> Record:
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    return record


def wipe(driver: XenNvdimmDriver) -> None:
    record = record_of(driver)
    driver.wiper.wipe(record.allocations[1].spec, lambda _: unwatched, record)


def release_a_slot(driver: XenNvdimmDriver) -> None:
    driver.release_claims(record_of(driver), lambda _: unwatched, delete=False, slot=1)
    driver.define(domain(A, B))


def another_file(driver: XenNvdimmDriver) -> None:
    driver.define(domain(A, C))
    driver.define(domain(A, B))


def run_another(driver: XenNvdimmDriver) -> None:
    """Let another domain's guest have one that a definition has taken from this one, and give it back."""
    driver.define(domain(A))
    driver.define(domain(B, name="db2", uuid=OTHER_UUID))
    driver.forget(OTHER_UUID)
    driver.define(domain(A, B))


@pytest.mark.parametrize("what", [wipe, release_a_slot, another_file, run_another], ids=lambda each: each.__name__)
def test_it_does_not_go_on_with_what_something_else_has_had(
    bench: Bench, image: Image, what: Callable[[XenNvdimmDriver], None]
) -> None:
    what(bench.driver())
    with pytest.raises(RefusedError, match="given up, overwritten by nvdimmctl or had by another guest"):
        bench.driver().check_restore(UUID)
    assert "the saved guest cannot go on" in bench.refused(image, domain(A, B)), "virsh restore FILE"


def test_it_goes_on_after_what_changes_no_byte(bench: Bench, image: Image) -> None:
    driver = bench.driver()
    driver.define(domain(A, B, C))
    driver.define(domain(A, B, C, ram=4 << 30))
    driver.check_restore(UUID)
    bench.restore(image, domain(A, B))


@pytest.mark.parametrize("numbered", [True, False], ids=["this version", "an earlier version"])
def test_only_a_guest_of_an_earlier_version_gets_a_base_by_the_place_of_its_bytes(
    bench: Bench, numbered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is no multiple of 2 MiB stays with the domain, and costs it large pages."""
    bench.driver().define(domain(A, B))
    if not numbered:
        with closing(sqlite3.connect(bench.folder / "ledger.sqlite")) as database, database:
            database.execute("INSERT INTO unnumbered (uuid) VALUES (?)", (UUID,))
    driver = bench.driver()
    driver.define(dataclasses.replace(domain(B), nvdimms=domain(A, B).nvdimms[1:]))
    locate = bench.backing.locate

    def somewhere(spec: NvdimmSpec) -> Location:
        found = locate(spec)
        extents = tuple(dataclasses.replace(extent, spa=extent.spa + 64 * KIB) for extent in found.extents)
        return dataclasses.replace(found, extents=extents)

    monkeypatch.setattr(bench.backing, "locate", somewhere)
    driver.prepare(domain(A, B))
    base = bench.bases()[0]
    assert base is not None
    assert base % SUPERPAGE == (0 if numbered else 64 * KIB)
