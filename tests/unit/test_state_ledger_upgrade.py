# SPDX-License-Identifier: Apache-2.0
"""Ledgers of earlier versions, opened by this one."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.errors import LedgerError
from nvdimm_driver.model import Allocation, BackingIdentity, NvdimmSpec, Record, Start
from nvdimm_driver.state.database import SCHEMA_VERSION
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.schema import SCHEMAS

DUMPS = sorted((Path(__file__).parents[1] / "data/ledger").glob("*.sql"))
"""A ledger of each schema version, as printed by sqlite3's ``.dump``; a version that anybody has used never changes."""
FIRST, SECOND = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "5dea22b3-1d52-d8f3-2516-782e98ab3fa0"
GIB = 1 << 30
ALLOCATIONS = (
    Allocation(
        FIRST,
        NvdimmSpec(0, "/mnt/pmem0/db1.img", GIB, 131072, 2 << 20, None, 0, True),
        BackingIdentity("fsdax", "6a1f", 1 << 20, 12, 2**32 - 1, GIB),
        0x1100000000,
        100,
    ),
    Allocation(
        FIRST,
        NvdimmSpec(3, "/dev/dax1.0", GIB // 2, 0, None, 0x1200000000),
        BackingIdentity("devdax", "9b2e", 0, 0, 0, GIB // 2),
        0x1200000000,
        100,
    ),
)
Tables = dict[str, list[dict[str, Any]]]


def old_ledger(folder: Path, dump: Path, more: str = "") -> str:
    path = folder / "ledger.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(dump.read_text() + more)
    return str(path)


def content(path: str) -> Tables:
    """Return all rows of all tables."""
    database = sqlite3.connect(path)
    database.row_factory = sqlite3.Row
    names = [row["name"] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: [dict(row) for row in database.execute(f"SELECT * FROM {name} ORDER BY rowid")] for name in names}


def columns(database: sqlite3.Connection) -> dict[str, list[Any]]:
    """Return the columns of all tables, with their types, defaults and so on."""
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: database.execute(f"PRAGMA table_info({name})").fetchall() for name in names}


def version(dump: Path) -> int:
    return int(dump.stem)


def test_there_is_a_ledger_of_every_earlier_version() -> None:
    assert len(SCHEMAS) == SCHEMA_VERSION
    assert set(range(1, len(SCHEMAS))) <= {version(dump) for dump in DUMPS}


@pytest.mark.parametrize("dump", DUMPS, ids=version)
def test_a_schema_that_was_used_has_not_been_edited(tmp_path: Path, dump: Path) -> None:
    made = sqlite3.connect(":memory:")
    for function in ("real_path", "real_paths"):  # for the content of an older ledger
        made.create_function(function, 1, str)
    made.executescript("".join(SCHEMAS[: version(dump)]))
    assert columns(made) == columns(sqlite3.connect(old_ledger(tmp_path, dump)))


@pytest.mark.parametrize("dump", DUMPS, ids=version)
def test_nothing_is_lost(tmp_path: Path, dump: Path) -> None:
    path = old_ledger(tmp_path, dump)
    before = content(path)
    assert all(before.values()), "a row in each table"
    Ledger(path).close()
    after = content(path)
    for row in before.get("latest", ()):
        if "writes" in row:
            row["writes"] += 1  # the upgrade is one
    kept = {
        table: [{name: row[name] for name in old} for row, old in zip(after[table], rows, strict=True)]
        for table, rows in before.items()
    }
    assert kept == before
    fresh = tmp_path / "fresh.sqlite"
    Ledger(str(fresh)).close()
    assert columns(sqlite3.connect(path)) == columns(sqlite3.connect(fresh))


@pytest.mark.parametrize("dump", DUMPS, ids=version)
def test_what_it_means_is_the_same(tmp_path: Path, dump: Path) -> None:
    dsm, served = (None, "") if version(dump) == 1 else ("qemu", "qemu")
    ledger = Ledger(old_ledger(tmp_path, dump))
    start = Start(FIRST, "mapped", 7, "b0", 1700000000, ("/mnt/pmem0/db1.img",), served)
    assert ledger.find_domain(FIRST) == Record(FIRST, "db1", 4 * GIB, dsm, "", ALLOCATIONS, start)
    waiting = Allocation(SECOND, NvdimmSpec(0, "/mnt/pmem0/two.img", 2 << 20), written=40)
    assert ledger.find_domain(SECOND) == Record(SECOND, "db two", GIB, None, "no QEMU", (waiting,), None)
    ledger.end_start(start)
    ledger.store(FIRST, "db1", 4 * GIB, ALLOCATIONS[:1], dsm="aml")
    record = ledger.find_domain(FIRST)
    assert record is not None
    assert (record.allocations, record.start, record.dsm) == (ALLOCATIONS[:1], None, "aml")


@pytest.mark.parametrize(("schema", "given_up"), [("8", 0), ("9", 1700000000000000000)])
def test_what_a_guest_has_that_was_given_up_was_so_at_the_latest_when_its_domain_was_changed(
    tmp_path: Path, schema: str, given_up: int
) -> None:
    """Of a ledger that notes no times, nobody knows when."""
    more = f"INSERT INTO frozen VALUES ('{FIRST}', '/mnt/pmem0/old.img');"
    ledger = Ledger(old_ledger(tmp_path, DUMPS[0].parent / f"{schema}.sql", more))
    assert ledger.given_up_at(FIRST, "/mnt/pmem0/old.img") == given_up
    assert ledger.given_up_at(FIRST, "/mnt/pmem0/db1.img") == 0


def test_an_upgrade_that_fails_leaves_what_was(tmp_path: Path) -> None:
    path = old_ledger(tmp_path, DUMPS[0], "CREATE TABLE uncached (in_the_way INTEGER);")
    before = content(path)
    with pytest.raises(LedgerError, match="uncached already exists"):
        Ledger(path)
    assert content(path) == before
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (1,)


def test_paths_of_earlier_versions_are_resolved_once(tmp_path: Path) -> None:
    link, real = tmp_path / "link", tmp_path / "real"
    link.symlink_to(real)
    more = "".join(
        f"UPDATE {table} SET {column} = replace({column}, '/mnt/pmem0/', '{link}/');"
        for table, column in (
            ("allocation", "path"),
            ("frozen", "path"),
            ("run", "nvdimms"),
            ("attachment", "nvdimms"),
        )
    )
    ledger = Ledger(old_ledger(tmp_path, Path(DUMPS[0].parent / "4.sql"), more))
    record, run = ledger.find_domain(FIRST), ledger.find_run(FIRST)
    assert record
    assert record.start
    assert run
    begun = ledger.find_begun(record.start)
    assert begun
    path = f"{real}/db1.img"
    assert record.allocations[0].spec.path == path
    assert record.start.paths == (path,)
    assert [json.loads(each.nvdimms)[0]["path"] for each in (run, begun)] == [path, path]
    unfinished = ledger.find_domain(SECOND)
    assert unfinished
    assert unfinished.allocations[0].spec.path == f"{link}/two.img", "nobody knows which file it is"
