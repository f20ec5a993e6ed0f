# SPDX-License-Identifier: Apache-2.0
"""Two processes that copy to one place at once, and a define of what is being overwritten, on real ext4 and XFS."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError, NvdimmError
from nvdimm_driver.model import NvdimmSpec, Progress
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, quiet
from tests.unit.doubles import OTHER_UUID
from tests.waiting import HANG_SECONDS

OTHER = b"o" * SIZE


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


class Second:
    """Another process that copies to the same place: it begins when the first one has verified, and waits then."""

    def __init__(self, host: Host, copy: Callable[[XenNvdimmDriver, Callable[[str], Progress]], object]) -> None:
        self.said = ""
        self._host = host
        self._copy = copy
        self._at_work, self._goes_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        driver = self._host.another()
        try:
            self._copy(driver, self._watch)
        except NvdimmError as error:
            self.said = str(error)
        finally:
            driver.ledger.close()  # no other thread may
        self._at_work.set()

    def _watch(self, what: str) -> Progress:
        def tell(_done: int, _total: int) -> None:
            if what == "copying" and not self._at_work.is_set():
                self._at_work.set()
                self._goes_on.wait(HANG_SECONDS)

        return tell

    def watch_first(self, what: str) -> Progress:
        """Be the watch of the first one."""

        def tell(done: int, total: int) -> None:
            if what == "verifying" and done == total:
                self._thread.start()
                self._at_work.wait(HANG_SECONDS)

        return tell

    def end(self) -> None:
        self._goes_on.set()
        self._thread.join()


def test_an_import_overwrites_no_file_that_another_import_has_finished(host: Host, tmp_path: Path) -> None:
    """It had opened the file under its hidden name, and went on when that was a domain's."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(DATA)
    other.write_bytes(OTHER)
    second = Second(
        host, lambda driver, watch: driver.importer.import_copy(str(other), host.path("a.img"), None, 0, watch)
    )
    try:
        host.driver.importer.import_copy(str(one), host.path("a.img"), None, 0, second.watch_first)
        host.another().define(host.domain("a.img"))
    finally:
        second.end()
    assert "is being overwritten" in second.said
    assert host.read("a.img") == DATA


def test_a_file_is_not_written_by_who_has_opened_it_under_the_name_of_before(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    writing = type(host.backing.locks).writing

    def import_it(*arguments: object) -> object:
        monkeypatch.setattr(type(host.backing.locks), "writing", writing)
        host.another().importer.import_copy(str(source), host.path("a.img"), None, 0, quiet)
        return writing(*arguments)  # type: ignore[arg-type]

    hidden = host.backing.allocate(NvdimmSpec(0, host.path("a.img"), SIZE))
    monkeypatch.setattr(type(host.backing.locks), "writing", import_it)
    with pytest.raises(InUseError, match="was given another name, or deleted"):
        host.backing.open_bytes(hidden, write=True)
    assert host.read("a.img") == DATA


def test_an_export_writes_into_no_copy_that_another_export_has_finished(host: Host, tmp_path: Path) -> None:
    """It had opened the file under its hidden name, and went on when that was the other's copy, with its SHA-256."""
    host.define("a.img")
    host.define("b.img", OTHER_UUID, OTHER)
    (item,), (others,) = host.record().allocations, host.record(OTHER_UUID).allocations
    destination = tmp_path / "copy"

    def copy(driver: XenNvdimmDriver, watch: Callable[[str], Progress]) -> object:
        return driver.exporter.export(others.spec, str(destination), watch, overwrite=False, running=False, item=others)

    second = Second(host, copy)
    try:
        digest = host.driver.exporter.export(
            item.spec, str(destination), second.watch_first, overwrite=False, running=False, item=item
        )
    finally:
        second.end()
    assert "another process writes it" in second.said
    assert hashlib.sha256(destination.read_bytes()).hexdigest() == digest == hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("name", [".new.export", ".new.partial"])
def test_no_copy_has_the_name_of_another_ones_beginning(host: Host, tmp_path: Path, name: str) -> None:
    """The other copy would take it for its own, and write over it."""
    host.define("a.img")
    (item,) = host.record().allocations
    (tmp_path / name).write_bytes(b"begun")
    with pytest.raises(InUseError, match="is not finished"):
        host.driver.exporter.export(item.spec, str(tmp_path / name), quiet, overwrite=True, running=False, item=item)
    assert (tmp_path / name).read_bytes() == b"begun"


def test_an_export_gives_its_name_to_nothing_that_was_put_in_its_place(host: Host, tmp_path: Path) -> None:
    host.define("a.img")
    (item,) = host.record().allocations
    destination, hidden = tmp_path / "copy", tmp_path / ".copy.export"

    def watch(what: str) -> Progress:
        def tell(done: int, total: int) -> None:
            if what == "verifying" and done == total:
                hidden.unlink()
                hidden.write_bytes(OTHER)

        return tell

    with pytest.raises(InUseError, match="renamed or replaced"):
        host.driver.exporter.export(item.spec, str(destination), watch, overwrite=False, running=False, item=item)
    assert not destination.exists()


def test_no_domain_is_defined_with_what_is_being_overwritten(host: Host) -> None:
    Path(host.path("a.img")).write_bytes(DATA)
    host.driver.importer.import_in_place(host.path("a.img"), None, 0, quiet)
    tried = []

    def watch(what: str) -> Progress:
        def tell(_done: int, _total: int) -> None:
            with pytest.raises(InUseError, match="is being overwritten"):
                host.another().define(host.domain("a.img"))
            tried.append(what)

        return tell

    host.driver.wiper.wipe_unclaimed(NvdimmSpec(0, host.path("a.img"), SIZE), watch)
    assert tried
    host.driver.define(host.domain("a.img"))
    assert host.read("a.img") == bytes(SIZE)


def test_an_import_of_another_size_leaves_the_copy_of_another_process(host: Host, tmp_path: Path) -> None:
    """It deleted the hidden file that the first one was verifying; that one gave its name to the second's bytes."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(DATA)
    other.write_bytes(OTHER * 2)
    path = host.path("a.img")
    second = Second(host, lambda driver, watch: driver.importer.import_copy(str(other), path, None, 0, watch))
    try:
        host.driver.importer.import_copy(str(one), path, None, 0, second.watch_first)
        assert host.read("a.img") == DATA
    finally:
        second.end()
    assert "is being overwritten by" in second.said
    assert host.read("a.img") == DATA


def test_what_was_exchanged_for_the_copy_gets_no_name(host: Host, tmp_path: Path) -> None:
    """Only who owns the folder could exchange it: the lock does not keep him from that."""
    one = tmp_path / "one"
    one.write_bytes(DATA)
    hidden = Path(host.path(".a.img.partial"))

    def exchange(what: str) -> Progress:
        def tell(done: int, total: int) -> None:
            if what == "verifying" and done == total and hidden.stat().st_size == SIZE:
                hidden.unlink()
                hidden.write_bytes(OTHER + b"more")

        return tell

    with pytest.raises(InUseError, match="another file is there now"):
        host.driver.importer.import_copy(str(one), host.path("a.img"), None, 0, exchange)
    assert not Path(host.path("a.img")).exists()


def test_an_export_and_an_import_to_one_name_write_different_files(host: Host, tmp_path: Path) -> None:
    """Both wrote one, each with a lock of its own; then a domain was defined with it, and the export wrote on."""
    one = tmp_path / "one"
    one.write_bytes(OTHER)
    host.define("b.img", OTHER_UUID, DATA)
    (item,) = host.record(OTHER_UUID).allocations
    path = host.path("a.img")

    def export(driver: XenNvdimmDriver, watch: Callable[[str], Progress]) -> None:
        driver.exporter.export(item.spec, path, watch, overwrite=False, running=False, item=item)

    second = Second(host, export)
    try:
        host.driver.importer.import_copy(str(one), path, None, 0, second.watch_first)
        host.another().define(host.domain("a.img"))
    finally:
        second.end()
    assert "exists already" in second.said or "belongs to domain" in second.said
    assert host.read("a.img") == OTHER
