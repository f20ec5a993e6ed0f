# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from nvdimm_driver.errors import InUseError, LedgerError, XenError
from nvdimm_driver.model import Allocation, BackingIdentity, NvdimmSpec, Run, Start
from nvdimm_driver.state import database
from nvdimm_driver.state.database import set_aside
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.start_steps import PreparedStart
from tests.ledger_copies import copy_ledger
from tests.package import PROJECT
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared, started

SPEC = NvdimmSpec(3, "/mnt/pmem0/a", 1 << 21, 131072, 4096, 1 << 40, 1, True)
READY = Allocation(UUID, SPEC, BackingIdentity("fsdax", "u", 1 << 20, 12, 2**32 - 1, 1 << 21), 1 << 40)
RUN = Run(5, "[]", "{}")


def prepare(ledger: Ledger, run: Run = RUN) -> None:
    start = ledger.begin_start(UUID, ["/mnt/pmem0/a"])
    ledger.finish_preparing(start, "/qemu", (0, 1), [(1, 1, 1)], [(1, 1)], run=run)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "ledger.sqlite"))


def test_a_record_comes_back_as_it_was(ledger: Ledger, tmp_path: Path) -> None:
    ledger.store(UUID, "db1", 5, [READY, Allocation(UUID, NvdimmSpec(4, "/b", 1 << 21))])
    again = Ledger(str(tmp_path / "ledger.sqlite"))
    record = again.find_domain(UUID)
    assert record is not None
    assert record.allocations == (READY, Allocation(UUID, NvdimmSpec(4, "/b", 1 << 21)))
    assert (record.name, record.ram, record.fault, record.start) == ("db1", 5, "", None)
    assert again.domains() == (record,)


def test_replace_takes_the_place_of_what_was(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    ledger.store(UUID, "db2", 6, [])
    record = ledger.find_domain(UUID)
    assert record is not None
    assert (record.name, record.ram, record.allocations) == ("db2", 6, ())


def test_two_domains_never_have_the_same_path(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    with pytest.raises(InUseError, match=r"/mnt/pmem0/a belongs to domain db1 \(7c7b0e2e"):
        ledger.store(OTHER_UUID, "db2", 5, [READY])
    assert ledger.find_domain(OTHER_UUID) is None


def test_a_start_from_attach_to_detach(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    begun = ledger.begin_start(UUID, ["/mnt/pmem0/a"])
    assert ledger.find_prepared(UUID) is None
    ledger.finish_preparing(
        begun, "/qemu", (256, 1 << 34), [(512, 1024, 16), (4096, 8192, 1)], [(1024, 1 << 20)], run=RUN, served="x"
    )
    start = started(ledger)
    assert (start.name, start.qemu, start.gfn_start, start.gfn_limit) == ("db1", "/qemu", 256, 1 << 34)
    assert start.mappings == [(512, 1024, 16), (4096, 8192, 1)]
    assert start.areas == [(1024, 1 << 20)]
    ledger.begin_mapping(start, 7)
    assert ledger.find_prepared(UUID) is None
    ledger.record_failure(UUID, XenError("old"))
    assert ledger.find_run(UUID) is None
    ledger.finish_mapping(start)
    assert ledger.find_run(UUID) == RUN
    record = ledger.find_domain(UUID)
    assert record is not None
    assert record.start is not None
    assert (record.start.state, record.start.domid, record.fault) == ("mapped", 7, "")
    assert record.start.paths == ("/mnt/pmem0/a",)
    assert ledger.frames_of_others(OTHER_UUID) == [("db1", 1024, 16), ("db1", 8192, 1)]
    assert ledger.frames_of_others(UUID) == []
    assert ledger.note_end(record.start)
    assert ledger.find_begun(record.start) == RUN
    assert not ledger.has_times(record.start)
    assert ledger.note_written(record.start, RUN, "then", "before")
    assert ledger.has_times(record.start)
    assert ledger.find_run(UUID) == RUN._replace(written="before")
    assert ledger.note_end(record.start)
    assert not ledger.note_written(record.start, RUN, "later", "then")
    assert ledger.find_run(UUID) == RUN._replace(written="before")
    assert ledger.find_begun(record.start) == RUN._replace(written="then")
    ledger.end_start(record.start)
    assert ledger.frames_of_others(OTHER_UUID) == []
    assert ledger.find_run(UUID) == RUN._replace(written="then")
    ledger.spoil_run(UUID, 6)
    assert ledger.find_run(UUID) == RUN._replace(written="then")
    ledger.spoil_run(UUID, 5)
    assert ledger.runs() == {UUID: RUN._replace(number=0, written="then")}


def test_a_start_that_maps_nothing_leaves_the_last_run(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    for number in (5, 6):
        run = Run(number, "[]", "{}")
        prepare(ledger, run)
        if number == 5:
            map_prepared(ledger, 7)
        record = ledger.find_domain(UUID)
        assert record is not None
        assert record.start is not None
        ledger.note_end(record.start)
        assert ledger.note_written(record.start, run, f"end of {number}", "before")
        ledger.end_start(record.start)
    assert ledger.find_run(UUID) == Run(5, "[]", "end of 5")


def test_a_new_start_has_no_reason_of_an_earlier_one(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    ledger.record_failure(UUID, XenError("old"))
    ledger.begin_start(UUID, ["/mnt/pmem0/a"])
    record = ledger.find_domain(UUID)
    assert record is not None
    assert record.fault == ""


def test_forget_drops_everything(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    prepare(ledger)
    ledger.forget(UUID)
    assert ledger.domains() == ()
    assert ledger.frames_of_others(OTHER_UUID) == []


def test_a_newer_schema_is_refused_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.sqlite")
    ledger = Ledger(path)
    ledger._write([("PRAGMA user_version = 99", ())])
    with pytest.raises(LedgerError, match="schema version 99, this nvdimm_driver knows 15"):
        Ledger(path)


def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(LedgerError, match=str(path)):
        Ledger(str(path))


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Eight processes open a new ledger at once: each creates or finds the schema, and none loses a write."""
    script = (
        "import sys; from nvdimm_driver.state.ledger import Ledger\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for i in range(20): ledger.store(f'{sys.argv[2]}-{i}', 'n', 1, [])\n"
    )
    path = str(tmp_path / "ledger.sqlite")
    workers = [subprocess.Popen([sys.executable, "-c", script, path, str(n)]) for n in range(8)]
    assert [worker.wait() for worker in workers] == [0] * 8
    assert len(Ledger(path).domains()) == 160


def start_of(ledger: Ledger) -> Start:
    record = ledger.find_domain(UUID)
    assert record is not None
    assert record.start is not None
    return record.start


def test_the_end_of_a_start_leaves_the_next_start_alone(ledger: Ledger) -> None:
    """A process that found the first over can be slower than the guest's reboot."""
    ledger.store(UUID, "db1", 5, [READY])
    prepare(ledger)
    ledger.begin_mapping(started(ledger), 7)
    over = start_of(ledger)
    ledger.end_start(over, kind="released")
    new = ledger.begin_start(UUID, ["/a"])
    assert start_of(ledger) == new
    ledger.end_start(over, kind="put-away")
    assert start_of(ledger) == new
    assert [each.kind for each in ledger.events()] == ["prepared", "released"]
    ledger.forget_unused(UUID)
    ledger.finish_preparing(new, "/qemu", (0, 1), [], [], run=RUN)
    ledger.begin_mapping(started(ledger), 8)
    ledger.end_start(new)
    assert start_of(ledger).domid == 8


def test_what_a_release_has_noted_stays_until_a_define_or_start_of_that_nvdimm(ledger: Ledger) -> None:
    other = replace(READY, spec=replace(SPEC, slot=4, path="/b"), identity=BackingIdentity("fsdax", "u", 0, 13, 1, 9))

    def noted() -> dict[str, tuple[bool, bool]]:
        record = ledger.find_domain(UUID)
        return {item.spec.path: (item.overwritten, item.deleted) for item in (record.allocations if record else ())}

    def note() -> None:
        ledger.note_overwritten(UUID, [3, 4])
        ledger.note_deleted(UUID, 4)

    ledger.store(UUID, "db1", 5, [READY, other])
    note()
    both = {"/mnt/pmem0/a": (True, False), "/b": (True, True)}
    assert noted() == both
    ledger.store(UUID, "db1", 5, [replace(READY, base=None), replace(other, spec=replace(other.spec, slot=260))])
    assert noted() == both
    ledger.store(UUID, "db1", 5, [READY, other])
    start = ledger.begin_start(UUID, ["/b"])
    assert noted() == {**both, "/b": (False, False)}
    note()
    ledger.take_up_running(UUID, start, 7, ["/b"], [], [], served="")
    assert noted() == {**both, "/b": (False, False)}
    note()
    ledger.note_deleted(UUID, 4, deleted=False)
    ledger.store(UUID, "db1", 5, [READY, other], marked={"/mnt/pmem0/a": 0})
    assert noted() == {"/mnt/pmem0/a": (False, False), "/b": (True, False)}


def test_a_step_of_a_start_that_is_undone_is_refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="was deleted from the ledger while it was started"):
        ledger.begin_start(UUID, ["/a"])
    ledger.store(UUID, "db1", 5, [READY])
    start = ledger.begin_start(UUID, ["/a"])
    ledger.end_start(start)
    assert_refused(lambda: ledger.finish_preparing(start, "/qemu", (0, 1), [(1, 1, 1)], [(1, 1)], run=RUN))
    assert ledger.events() == []
    prepare(ledger)
    prepared = started(ledger)
    assert_refused(lambda: ledger.record_ioreq_server(UUID, 7, 3))
    ledger.end_start(start_of(ledger))
    assert_refused(lambda: ledger.begin_mapping(prepared, 7))
    assert_refused(lambda: ledger.finish_mapping(prepared))
    assert ledger.counters() == []


def assert_refused(step: Callable[[], None]) -> None:
    with pytest.raises(LedgerError, match="was undone by another process"):
        step()


def test_a_start_does_not_take_the_place_of_another(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    start = ledger.begin_start(UUID, ["/a"])
    with pytest.raises(InUseError, match="has another start, which has begun just now"):
        ledger.begin_start(UUID, ["/b"])
    assert start_of(ledger) == start


def test_of_two_device_models_one_maps(ledger: Ledger) -> None:
    """Both find what was prepared; also when the second finds what was prepared after the first was put away."""
    ledger.store(UUID, "db1", 5, [READY])
    prepare(ledger)
    first, second = started(ledger), started(ledger)
    ledger.begin_mapping(first, 7)
    assert_refused(lambda: ledger.begin_mapping(second, 8))
    ledger.record_ioreq_server(UUID, 7, 3)
    assert_refused(lambda: ledger.record_ioreq_server(UUID, 8, 4))
    assert ledger.find_ioreq_server(UUID) == 3
    ledger.end_start(start_of(ledger))
    prepare(ledger)
    assert_refused(lambda: ledger.finish_mapping(first))
    assert_refused(lambda: ledger.begin_mapping(first, 7))
    ledger.begin_mapping(started(ledger), 8)
    assert_refused(lambda: ledger.finish_mapping(first))


def test_nothing_follows_once_an_end_is_noted(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    prepare(ledger)
    found, prepared = start_of(ledger), started(ledger)
    assert ledger.note_end(found)
    assert ledger.note_end(found)
    assert start_of(ledger).ended
    assert ledger.find_prepared(UUID) is None
    assert_refused(lambda: ledger.begin_mapping(prepared, 7))


def test_a_start_that_goes_on_is_not_ended(ledger: Ledger) -> None:
    """A process that found it abandoned is slower than its device model."""
    ledger.store(UUID, "db1", 5, [READY])
    prepare(ledger)
    found = start_of(ledger)
    ledger.begin_mapping(started(ledger), 7)
    assert not ledger.note_end(found)
    ledger.end_start(found)
    ledger.finish_mapping(PreparedStart((UUID, found.id, "prepared"), "", "", 0, 0, False, [], [], [], (0, "", "")))
    assert start_of(ledger).state == "mapped"


@pytest.mark.parametrize(
    ("state", "kept"),
    [("preparing", {5}), ("prepared", {5, None}), ("mapping", {5, None}), ("mapped", set())],
)
def test_the_number_of_a_start_that_has_left_a_file_and_never_run_is_kept(
    ledger: Ledger, state: str, kept: set[int | None]
) -> None:
    """A file without a number may be its own once it has frozen all of them."""
    ledger.store(UUID, "db1", 5, [READY])
    if state == "preparing":
        ledger.begin_start(UUID, ["/mnt/pmem0/a"], RUN.number)
    else:
        prepare(ledger)
    if state in ("mapping", "mapped"):
        ledger.begin_mapping(started(ledger), 7)
    if state == "mapped":
        ledger.finish_mapping(
            PreparedStart((UUID, start_of(ledger).id, "mapping"), "", "", 0, 0, False, [], [], [], RUN)
        )
    found = start_of(ledger)
    assert (found.state, ledger.note_end(found)) == (state, True)
    ledger.end_start(found, left=True)
    assert ledger.never_run(UUID) == kept
    ledger.take_up_running(UUID, None, 7, [], [], [], served="")
    assert ledger.never_run(UUID) == set()


def test_a_running_guest_is_taken_up_only_in_place_of_the_start_that_was_looked_at(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    ledger.take_up_running(UUID, None, 7, ["/a"], [(1, 1, 1)], [(1, 1)], served="")
    first = start_of(ledger)
    assert_refused(lambda: ledger.take_up_running(UUID, None, 8, ["/a"], [], [], served=""))
    ledger.take_up_running(UUID, first, 7, ["/a", "/b"], [(1, 1, 2)], [(1, 1)], served="")
    assert start_of(ledger).paths == ("/a", "/b")
    assert_refused(lambda: ledger.take_up_running(UUID, first, 7, ["/a"], [], [], served=""))
    assert ledger.frames_of_others(OTHER_UUID) == [("db1", 1, 2)]


def test_a_domain_that_gives_up_its_nvdimms_keeps_its_start(ledger: Ledger) -> None:
    ledger.store(UUID, "db1", 5, [READY])
    start = ledger.begin_start(UUID, ["/a"])
    ledger.give_up(UUID)
    record = ledger.find_domain(UUID)
    assert record is not None
    assert (record.allocations, record.start) == ((), start)
    ledger.end_start(start)
    ledger.forget_unused(UUID)
    assert ledger.find_domain(UUID) is None
    ledger.store(UUID, "db1", 5, [READY])
    ledger.forget_unused(UUID)
    assert ledger.find_domain(UUID) is not None
    ledger.give_up(UUID)
    assert ledger.find_domain(UUID) is None


def test_a_look_at_the_file_keeps_its_locks(tmp_path: Path) -> None:
    """A process that closes a file gives up all locks on it (fcntl(2)): another one would then delete the log."""
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(str(path))
    assert not ledger.is_from_elsewhere()
    other = "import sqlite3, sys; database = sqlite3.connect(sys.argv[1]); database.execute('SELECT * FROM latest')"
    subprocess.run([sys.executable, "-c", f"{other}; database.close()", path], check=True)
    assert Path(f"{path}-wal").exists()
    ledger.close()
    assert not Path(f"{path}-wal").exists(), "who closes it last deletes the log"


def test_a_ledger_in_another_file_is_from_elsewhere(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger.sqlite", tmp_path / "backup"
    with closing(Ledger(str(path))) as ledger:
        copy_ledger(path, backup)
        ledger.check_own()
    for way in ("renamed", "copied"):
        if way == "renamed":
            os.replace(backup, path)
        else:
            _copy(path)
        with closing(Ledger(str(path))) as ledger:
            with pytest.raises(LedgerError, match="is a backup or a copy"):
                ledger.check_own()
            ledger.take_over(compared=True)
            ledger.check_own()


def test_a_backup_that_was_written_over_the_ledger_is_older_than_the_one_in_use(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(str(path)).close()
    backup, known = path.read_bytes(), _known(path).read_text()
    with closing(Ledger(str(path))) as ledger:
        ledger.record_failure(UUID, XenError("a write"))
    path.write_bytes(backup)
    with closing(Ledger(str(path))) as ledger:
        assert ledger.is_from_elsewhere()
        ledger.record_failure(UUID, XenError("as many writes"))
        assert ledger.is_from_elsewhere()
        ledger.take_over(compared=False)
        assert (ledger.is_strange(), ledger.is_from_elsewhere()) == (False, True)
        ledger.take_over(compared=True)
        assert not ledger.is_from_elsewhere()
    path.write_bytes(backup)
    _known(path).write_text(known)
    with closing(Ledger(str(path))) as ledger:
        assert not ledger.is_from_elsewhere(), "nobody can tell when the other file comes back, too"


def test_a_ledger_that_comes_back_after_another_was_used(tmp_path: Path) -> None:
    path, aside = tmp_path / "ledger.sqlite", tmp_path / "aside"
    Ledger(str(path)).close()
    os.rename(path, aside)
    with closing(Ledger(str(path))) as ledger:
        assert ledger.is_from_elsewhere(), "one was there, and is lost"
        ledger.take_over(compared=True)
    os.rename(aside, path)
    with closing(Ledger(str(path))) as ledger:
        assert ledger.is_from_elsewhere()


@pytest.mark.parametrize("schema", ["10", "11", "12"])
def test_a_backup_of_an_earlier_version(tmp_path: Path, schema: str) -> None:
    """The first one that is opened is the ledger. A later one is a backup."""
    path, dump = tmp_path / "ledger.sqlite", PROJECT / f"tests/data/ledger/{schema}.sql"
    with closing(sqlite3.connect(path)) as old:
        old.executescript(dump.read_text() + ("" if schema == "10" else "UPDATE latest SET file = ''"))
    backup = path.read_bytes()
    with closing(Ledger(str(path))) as ledger:
        assert not ledger.is_from_elsewhere()
    path.write_bytes(backup)
    with closing(Ledger(str(path))) as ledger:
        assert ledger.is_from_elsewhere()


def test_a_kernel_that_begins_to_tell_birth_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "ledger.sqlite")
    with monkeypatch.context() as before:
        before.setattr(database, "STATX_BTIME", 0)  # as if statx(2) did not fill it in
        Ledger(path).close()
    with closing(Ledger(path)) as ledger:
        assert not ledger.is_from_elsewhere()


@pytest.mark.parametrize("content", ["", "scribble", "x" * 54, f"{'0' * 32} {'no number':20}\n"])
def test_what_tells_the_ledger_in_use_is_damaged(tmp_path: Path, content: str) -> None:
    path = str(tmp_path / "ledger.sqlite")
    known = _known(path)
    Ledger(path).close()
    before = known.read_text()
    known.write_text(content)
    with closing(Ledger(path)) as ledger:
        assert not ledger.is_from_elsewhere()
        ledger.record_failure(UUID, XenError("a write"))
    assert known.read_text()[:32] == before[:32]


def test_a_ledger_that_is_made_anew_after_it_was_lost_was_not_compared(tmp_path: Path) -> None:
    """It knows nothing of what is there. The first ledger of a host is not such a one."""
    path = tmp_path / "ledger.sqlite"
    with closing(Ledger(str(path))) as ledger:
        assert not ledger.is_from_elsewhere()
    path.unlink()
    for _ in range(2):
        with closing(Ledger(str(path))) as ledger, pytest.raises(LedgerError, match="in place of one that was lost"):
            ledger.check_own()
    with closing(Ledger(str(path))) as ledger:
        assert not ledger.is_strange()
        ledger.take_over(compared=True)
        ledger.check_own()


def test_a_ledger_that_cannot_be_noted_as_the_one_in_use_is_not_taken_over_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(str(path)).close()
    _known(path).unlink()
    with closing(Ledger(str(path))) as ledger:
        _known(path).mkdir()
        with pytest.raises(LedgerError, match=r"cannot read .*: Is a directory \(run 'nvdimmctl check --repair'"):
            ledger.check_own()
        assert ledger.is_strange(), "nobody can say"
        with pytest.raises(LedgerError, match=r"cannot write .*-in-use: Is a directory"):
            ledger.take_over(compared=True)
        ledger.record_failure(UUID, XenError("a start is recorded all the same"))


@pytest.mark.parametrize("lost", [False, True])
def test_a_file_of_the_one_in_use_that_cannot_be_read_is_made_anew_by_a_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Who deleted it, as the hint said, had a backup believed before it was compared, or a new ledger."""
    path = tmp_path / "ledger.sqlite"
    Ledger(str(path)).close()
    bad = _known(path).stat().st_ino

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def tried(fd: int, *arguments: Any) -> Any:
            if os.fstat(fd).st_ino == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(fd, *arguments)

        return tried

    monkeypatch.setattr(os, "pread", failing(os.pread))
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite))
    if lost:
        path.unlink()
    with closing(Ledger(str(path))) as ledger:
        assert ledger.is_from_elsewhere()
        with pytest.raises(LedgerError, match="nvdimmctl check --repair"):
            ledger.check_own()
        ledger.take_over(compared=True)
        ledger.check_own()
    assert os.listdir(tmp_path.parent).count(_known(path).name) == 1
    assert _known(path).stat().st_ino != bad


def test_of_two_that_take_it_over_at_once_the_last_is_noted(tmp_path: Path) -> None:
    """A start does, beside a repair. What is noted is the id that the ledger has then."""
    path = str(tmp_path / "ledger.sqlite")
    Ledger(path).close()

    def take_over() -> None:
        with closing(Ledger(path)) as ledger:
            for _ in range(20):
                ledger.take_over(compared=True)
                ledger.record_failure(UUID, XenError("a write"))

    threads = [Thread(target=take_over) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    with closing(Ledger(path)) as ledger:
        assert not ledger.is_strange()


def test_whoever_opens_it_after_a_damaged_one_was_set_aside_knows_that(tmp_path: Path) -> None:
    """Also if a version made it that noted nowhere that there is one."""
    path = tmp_path / "ledger.sqlite"
    Ledger(str(path)).close()
    _known(path).unlink()
    assert set_aside(str(path), path.stat().st_ino)
    with closing(Ledger(str(path))) as ledger:
        assert ledger.is_from_elsewhere()


def _known(path: Path | str) -> Path:
    """Return the file that tells the ledger in use."""
    folder = Path(path).parent
    return folder.with_name(f"{folder.name}-in-use")


def _copy(path: Path) -> None:
    """Put a copy in a file's place, whose inode may get the same number."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
