# SPDX-License-Identifier: Apache-2.0
"""A saved guest whose run the ledger has lost: what is asked before libvirt removes its image says what its start will.

The bench is that of the tests of saved guests.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from nvdimm_driver.errors import RefusedError
from nvdimm_driver.lifecycle import saved_guest
from tests.unit.doubles import UUID, domain
from tests.unit.test_lifecycle_saved_guest import A, B, Bench, with_header


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Return a bench whose domain runs."""
    bench = Bench(tmp_path)
    bench.driver().define(domain(A))
    bench.start()
    return bench


def lose_start(bench: Bench) -> None:
    """Let the ledger be as one that was made anew from the marks."""
    with closing(sqlite3.connect(bench.folder / "ledger.sqlite")) as database:
        database.executescript("DELETE FROM attachment; DELETE FROM run; DELETE FROM frozen; DELETE FROM mapping")


def take_up(bench: Bench) -> None:
    driver = bench.driver()
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    driver.take_up_running(record, bench.domid, {item.spec.path for item in record.allocations})


def test_a_guest_that_was_saved_before_the_ledger_was_lost(bench: Bench) -> None:
    image = bench.save()
    lose_start(bench)
    with pytest.raises(RefusedError, match="does not have the run"):
        bench.driver().check_restore(UUID)
    assert "the ledger was made anew" in bench.refused(image)


def test_a_running_guest_that_is_taken_up_can_be_saved_and_goes_on(bench: Bench) -> None:
    run = bench.driver().ledger.find_run(UUID)
    lose_start(bench)
    take_up(bench)
    assert bench.driver().ledger.find_run(UUID) == run
    image = bench.save()
    bench.driver().check_restore(UUID)
    bench.restore(image)


def test_a_taken_up_guest_whose_ledger_has_an_older_run(bench: Bench) -> None:
    older = bench.driver().ledger.find_run(UUID)
    bench.save()
    bench.start()
    newer = bench.driver().ledger.find_run(UUID)
    assert older
    assert newer
    assert older.number != newer.number
    lose_start(bench)
    with closing(sqlite3.connect(bench.folder / "ledger.sqlite")) as database, database:
        database.execute("INSERT INTO run VALUES (?, ?, ?, ?)", (UUID, *older))
    take_up(bench)
    assert bench.driver().ledger.find_run(UUID) == newer
    image = bench.save()
    bench.driver().check_restore(UUID)
    bench.restore(image)


@pytest.mark.parametrize("what", ["no tables in memory", "others than the definition has"])
def test_a_taken_up_guest_whose_run_nobody_knows_is_refused_before(bench: Bench, what: str) -> None:
    memory = bench.mapper.memory[bench.domid]
    if what.startswith("no"):
        bench.mapper.memory[bench.domid] = {}
    else:
        bench.driver().define(dataclasses.replace(domain(A, B)))
    lose_start(bench)
    take_up(bench)
    assert bench.driver().ledger.find_run(UUID) is None
    bench.mapper.memory[bench.domid] = memory
    image = bench.save()
    with pytest.raises(RefusedError, match="does not have the run"):
        bench.driver().check_restore(UUID)
    assert "the ledger was made anew" in bench.refused(image, domain(A))


def test_a_taken_up_guest_of_a_version_without_numbers_goes_on(bench: Bench) -> None:
    bench.mapper.memory[bench.domid] = with_header(
        bench.mapper.memory[bench.domid], oem_revision=saved_guest.UNNUMBERED
    )
    lose_start(bench)
    take_up(bench)
    image = bench.save()
    bench.driver().check_restore(UUID)
    bench.restore(image)
    assert not bench.driver().ledger.is_unnumbered(UUID)


def test_an_image_without_a_number_is_refused_if_the_ledger_does_not_know_that_there_is_one(bench: Bench) -> None:
    """The domain may have been started anew since, by a version that numbers runs, before the ledger was lost."""
    image = with_header(bench.save(), oem_revision=saved_guest.UNNUMBERED)
    lose_start(bench)
    assert "the ledger was made anew" in bench.refused(image)
