# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.doctor import ledger
from nvdimm_driver.doctor.finding import Finding, Result, noted
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import XenError
from nvdimm_driver.model import Run
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, domain, make_driver, map_prepared

PATH = "/mnt/pmem0/a"


class DeafMapper(RecordingMapper):
    """A mapper that does not reach Xen."""

    def is_alive(self, domid: int, uuid: str) -> bool:
        raise XenError("not running on Xen", hint="boot it")


class Host:
    """A ledger with a domain that runs as domid 7, and everything that the ledger is compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backing = MemoryBacking()
        self.mapper = RecordingMapper({7: UUID})
        self.driver: XenNvdimmDriver = make_driver(folder, self.backing, self.mapper)
        self.driver.define(domain(PATH))

    def start(self, served: str = "") -> None:
        ledger = self.driver.ledger
        start = ledger.begin_start(UUID, [PATH])
        ledger.finish_preparing(start, "/qemu", (0, 1), [], [], run=Run(2, "[]", "{}"), served=served)
        map_prepared(ledger, 7)

    def look(
        self, *, mapper: RecordingMapper | None = None, served: bool = True, held: bool = True
    ) -> dict[str, Finding]:
        found = ledger.check(
            self.folder / "ledger.sqlite",
            [self.backing],
            mapper or self.mapper,
            lambda uuid: served and uuid == UUID,
            lambda: {UUID} if held else set(),
        )
        return {each.check: each for each in found}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.driver.ledger.close()


def results(found: dict[str, Finding]) -> dict[str, Result]:
    return {name: each.result for name, each in found.items() if name != "cache"}


ALL_PASS = dict.fromkeys(("ledger", "ledger, Xen", "ledger, backings", "label servers", "holders"), Result.PASS)


@pytest.mark.parametrize("cache", ["write-back", "uncached", ""])
def test_it_says_what_running_guests_have(host: Host, cache: str) -> None:
    assert "cache" not in host.look()
    host.start()
    assert host.look()["cache"].message == "not known: db1"
    host.driver.ledger._write([("UPDATE attachment SET cache = ?", (cache,))])
    assert host.look()["cache"] == noted("cache", f"{cache or 'not known'}: db1")


def test_all_is_consistent(host: Host) -> None:
    host.start()
    found = host.look()
    assert results(found) == ALL_PASS
    assert found["ledger"].message == "1 domains, 1 NVDIMMs"
    assert found["ledger, Xen"].message == "1 domains run, according to both"


def test_a_domain_that_xen_does_not_have(host: Host) -> None:
    host.start()
    host.mapper.alive.clear()
    found = host.look()
    assert results(found) == ALL_PASS | {"ledger, Xen": Result.WARN}
    assert "db1 runs as domid 7" in found["ledger, Xen"].message


def test_a_domain_of_another_boot(host: Host) -> None:
    host.start()
    (record,) = host.driver.ledger.domains()
    assert record.start is not None
    before = replace(record, start=replace(record.start, boot_id="another"))
    assert [each.result for each in ledger.check_starts([before], host.mapper)] == [Result.WARN]


def test_xen_that_does_not_answer(host: Host) -> None:
    host.start()
    found = host.look(mapper=DeafMapper())
    assert results(found) == ALL_PASS | {"ledger, Xen": Result.FAIL}
    assert found["ledger, Xen"].hint == "boot it"


def test_a_backing_that_is_gone_or_another(host: Host) -> None:
    inode, size = host.backing.files.pop(PATH)
    found = host.look()
    assert results(found) == ALL_PASS | {"ledger, backings": Result.FAIL}
    assert "does not exist" in found["ledger, backings"].message
    host.backing.files[PATH] = (inode + 1, size)
    found = host.look()
    assert results(found) == ALL_PASS | {"ledger, backings": Result.FAIL}
    assert "db1" in found["ledger, backings"].message


def test_a_backing_that_is_being_written(host: Host) -> None:
    (record,) = host.driver.ledger.domains()
    unfinished = replace(record.allocations[0], identity=None, written=40)
    (found,) = ledger.check_backings([replace(record, allocations=(unfinished,))], [host.backing])
    assert found.result == Result.WARN
    assert "40%" in found.message


def test_a_label_server_that_is_gone(host: Host) -> None:
    host.start(served="x")
    assert results(host.look()) == ALL_PASS
    assert results(host.look(served=False)) == ALL_PASS | {"label servers": Result.WARN}


def test_a_guest_whose_holder_was_killed(host: Host) -> None:
    host.start()
    found = host.look(held=False)
    assert results(found) == ALL_PASS | {"holders": Result.WARN}
    assert "db1: nothing holds its backings" in found["holders"].message


def test_a_guest_that_has_ended_lacks_nothing(host: Host) -> None:
    host.start(served="x")
    found = host.look(mapper=RecordingMapper({}), served=False, held=False)
    assert results(found) == ALL_PASS | {"ledger, Xen": Result.WARN}
    assert found["holders"].message == "the backings of 0 guests are held"


def test_without_a_ledger_nothing_passes_and_none_is_made(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    looked = ledger.check(path, [MemoryBacking()], RecordingMapper(), lambda _: True, set)
    found = {each.check: each for each in looked}
    assert results(found) == dict.fromkeys(ALL_PASS, Result.FAIL)
    assert not path.exists()


def test_a_ledger_that_is_damaged_in_its_middle(host: Host) -> None:
    path = host.folder / "ledger.sqlite"
    host.driver.ledger.close()
    content = bytearray(path.read_bytes())
    page = int.from_bytes(content[16:18], "big")
    content[4 * page : 4 * page + 64] = bytes(range(64))
    path.write_bytes(content)
    found = host.look()
    assert found["ledger"].result == Result.FAIL
    assert f"{path} is damaged: " in found["ledger"].message
    assert "'nvdimmctl check --repair' keeps the damaged file" in found["ledger"].hint


def test_what_sqlite_finds_wrong_is_one_line(host: Host) -> None:
    path = host.folder / "ledger.sqlite"
    host.driver.ledger.close()
    content = bytearray(path.read_bytes())
    content[36:40] = (9).to_bytes(4, "big")  # the number of free pages, of which the file has none
    path.write_bytes(content)
    message = host.look()["ledger"].message
    assert message.startswith(f"{path} is damaged: ")
    assert "***" not in message
    assert len(message.splitlines()) == 1


def test_a_ledger_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_text("no database\n" * 100)
    looked = ledger.check(path, [MemoryBacking()], RecordingMapper(), lambda _: True, set)
    found = {each.check: each for each in looked}
    assert results(found) == dict.fromkeys(ALL_PASS, Result.FAIL)
    assert str(path) in found["ledger"].message
