# SPDX-License-Identifier: Apache-2.0
"""The cache of tables returns what was stored, whatever others do to its folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvdimm_driver.acpi import cache
from nvdimm_driver.acpi.cache import TableCache, key_of
from nvdimm_driver.acpi.tables import Header, seal


def table(number: int) -> bytes:
    return seal(Header(b"SSDT", 0, 2, 0, b"NVDRV ", b"NVDIMM\0\0", 1, b"NVDR", 1), number.to_bytes(4, "little"))


TABLES = (table(1), table(2))


def test_what_was_put_is_what_is_got(tmp_path: Path) -> None:
    kept = TableCache(tmp_path / "cache")
    assert kept.get("a") is None
    kept.put("a", TABLES)
    assert TableCache(tmp_path / "cache").get("a") == TABLES
    assert kept.get("b") is None
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "content", [b"", b"NFIT", TABLES[0], b"".join(TABLES), bytes(32) + TABLES[0], bytes(31), bytes(32)]
)
def test_a_damaged_entry_is_none(tmp_path: Path, content: bytes) -> None:
    kept = TableCache(tmp_path)
    (tmp_path / "a").write_bytes(content)
    assert kept.get("a") is None
    kept.put("a", TABLES)
    assert kept.get("a") == TABLES


@pytest.mark.parametrize("at", [0, 31, 32, 60, -1])
def test_a_changed_byte_makes_an_entry_none(tmp_path: Path, at: int) -> None:
    kept = TableCache(tmp_path)
    kept.put("a", TABLES)
    entry = bytearray((tmp_path / "a").read_bytes())
    entry[at] ^= 1
    (tmp_path / "a").write_bytes(entry)
    assert kept.get("a") is None


def test_whole_tables_of_another_entry_are_none(tmp_path: Path) -> None:
    kept = TableCache(tmp_path)
    kept.put("a", TABLES)
    kept.put("b", (table(3),))
    os.replace(tmp_path / "b", tmp_path / "a")
    assert kept.get("a") is None


def test_nothing_is_kept_where_nothing_can_be(tmp_path: Path) -> None:
    kept = TableCache(tmp_path / "missing" / "cache")
    kept.put("a", TABLES)
    assert kept.get("a") is None
    assert list(tmp_path.iterdir()) == []


def test_the_longest_unused_go(tmp_path: Path) -> None:
    kept = TableCache(tmp_path)
    for number in range(cache.LIMIT):
        kept.put(str(number), TABLES)
        os.utime(tmp_path / str(number), (number, number))
    assert kept.get("0") == TABLES
    kept.put("new", TABLES)
    assert kept.get("1") is None
    assert kept.get("0") == kept.get("new") == TABLES
    assert len(list(tmp_path.iterdir())) == cache.LIMIT


def test_a_program_that_was_replaced_has_another_key(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("one")
    (tmp_path / "link").symlink_to(program)
    keys = {key_of(str(program), ["-m", "1"])}
    assert key_of(str(tmp_path / "link"), ["-m", "1"]) in keys
    keys.add(key_of(str(program), ["-m", "2"]))
    keys.add(key_of(str(program), ["-m1"]))
    program.write_text("other")
    keys.add(key_of(str(program), ["-m", "1"]))
    assert len(keys) == 4


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Each process reads whole entries while all of them write and prune."""
    script = (
        "import sys; from pathlib import Path\n"
        "from nvdimm_driver.acpi import cache\n"
        "from tests.unit.test_acpi_cache import TABLES\n"
        "cache.LIMIT = 5\n"
        "kept = cache.TableCache(Path(sys.argv[1]))\n"
        "for number in range(300):\n"
        "    kept.put(str(number % 10), TABLES)\n"
        "    assert kept.get(str(number * 7 % 10)) in (None, TABLES)\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cache")], stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    said = [worker.communicate()[1] for worker in workers]
    assert said == [b""] * 6
    assert [worker.returncode for worker in workers] == [0] * 6
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    kept = TableCache(tmp_path / "cache")
    (tmp_path / "cache" / "key").mkdir(parents=True)  # so that no file can take its place
    kept.put("key", TABLES)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key"]
    assert kept.get("key") is None
