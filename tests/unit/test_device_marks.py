# SPDX-License-Identifier: Apache-2.0
"""Marks of devices, in a folder beside the ledger: whatever happens to that, no domain gets another's device."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.cmd.device_model import attach
from nvdimm_driver.device_marks import DeviceMarks
from nvdimm_driver.doctor import repair_ledger
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_device_claims import _believe_name
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError, LedgerError, NvdimmError, RefusedError
from nvdimm_driver.model import MIB, SUPERPAGE, Allocation, BackingIdentity, Pool
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state import owner_marks
from tests.ledger_copies import copy_ledger, forget_devices, forget_in_use
from tests.unit.doubles import (
    OTHER_UUID,
    UUID,
    MemoryDevices,
    RecordingHolders,
    RecordingMapper,
    boot_host,
    domain,
    make_driver,
)

A, B, PART = "/mnt/pmem0/a", "/mnt/pmem0/b", "/mnt/pmem0/a1"


def device(start: int = 0, size: int = 128 * MIB, uid: str = "ns-0") -> BackingIdentity:
    return BackingIdentity("memory", uid, start, 0, 0, size)


# --- the files ---


def test_only_root_can_read_a_mark(tmp_path: Path) -> None:
    marks = DeviceMarks(tmp_path / "devices")
    assert marks.owner(device()) is None
    marks.set_owner(device(), b"db1")
    assert marks.owner(device()) == b"db1"
    (file,) = (tmp_path / "devices").iterdir()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    marks.set_owner(device(), None)
    marks.set_owner(device(), None)
    assert list((tmp_path / "devices").iterdir()) == []


@pytest.mark.parametrize("uid", ["ns-0", "spa-0x1000", "../a b-1-2", "ü"])
def test_a_mark_is_found_by_all_that_shares_bytes(tmp_path: Path, uid: str) -> None:
    marks = DeviceMarks(tmp_path / "devices")
    part = device(2 * MIB, 8 * MIB, uid)
    marks.set_owner(part, b"db1")
    for other in (device(uid=uid), device(4 * MIB, MIB, uid), device(0, 3 * MIB, uid)):
        assert marks.owners_of_parts(other) == [(part, b"db1")]
    for other in (part, device(10 * MIB, MIB, uid), device(uid="another")):
        assert marks.owners_of_parts(other) == []


@pytest.mark.parametrize("uid", ["ns-0", "spa-0x1000", "../a b-1-2", "ü", "%41%"])
def test_the_uid_of_a_namespace_with_an_owner_is_told_as_it_is(tmp_path: Path, uid: str) -> None:
    marks = DeviceMarks(tmp_path / "devices")
    assert marks.owned_namespaces() == set()
    marks.set_owner(device(2 * MIB, 8 * MIB, uid), b"db1")
    marks.note_run([device(uid="another")], 7)
    for name in ("notes.owner", "ns-1-%zz%-1-2.owner", "%x%-1-2.owner", "ns-2-0-1.owner.7.7"):
        (tmp_path / "devices" / name).touch()
    assert marks.owned_namespaces() == {uid}


def test_of_the_same_bytes_only_the_marks_in_use_are_taken_over(tmp_path: Path) -> None:
    """The domain that had all of it gave it up in the other folder. What has no mark there keeps the one here."""
    here, before = DeviceMarks(tmp_path / "here"), DeviceMarks(tmp_path / "before")
    whole, part, rest = device(), device(2 * MIB, 8 * MIB), device(16 * MIB, 8 * MIB)
    for each in (whole, device(uid="another")):
        here.set_owner(each, b"db1")
    for each in (part, rest):
        before.set_owner(each, b"db2")
    assert here.follow(before) == []
    assert [here.owner(each) for each in (whole, part, rest)] == [None, b"db2", b"db2"]
    assert here.owner(device(uid="another")) == b"db1"


def test_a_number_that_cannot_be_read_in_the_new_folder_is_replaced(tmp_path: Path) -> None:
    """As at a start; register failed, and did not say what helps. An owner that cannot be read stays."""
    here, before = DeviceMarks(tmp_path / "here"), DeviceMarks(tmp_path / "before")
    before.note_run([device()], 7)
    here.note_run([device()], 6)
    (file,) = (tmp_path / "here").iterdir()
    file.unlink()
    file.symlink_to(file)
    assert here.follow(before) == []
    assert here.last_run(device()) == 7


def test_a_state_folder_that_is_used_again_lets_the_later_owner_start(tmp_path: Path) -> None:
    """It has the mark of the domain that had the whole device when it was used first; its ledger was deleted since."""
    first, other = Host(tmp_path / "first"), Host(tmp_path / "other")
    for each in (first, other):
        each.folder.mkdir()
        each.backing, each.mapper = first.backing, first.mapper
    first.define(A)
    DeviceMarks(other.folder / "devices").follow(DeviceMarks(first.folder / "devices"))
    other.repair()
    other.release(UUID)
    other.define(PART, uuid=OTHER_UUID)
    first.lose_ledger()
    DeviceMarks(first.folder / "devices").follow(DeviceMarks(other.folder / "devices"))
    first.driver().ledger.take_over(compared=False)
    first.driver().prepare(domain(PART, uuid=OTHER_UUID, name="db2"))


def test_the_last_run_is_that_of_all_its_bytes(tmp_path: Path) -> None:
    marks, whole, one, other = DeviceMarks(tmp_path / "devices"), device(), device(0, MIB), device(MIB, MIB)
    assert marks.last_run(one) is None
    marks.note_run([one], 5)
    marks.note_run([other], 6)
    assert [marks.last_run(each) for each in (whole, one, other)] == [0, 5, 6]
    marks.note_run([whole], 7)
    assert [marks.last_run(each) for each in (whole, one, other)] == [7, 0, 0]
    marks.forget_run([whole, one, other])
    assert marks.last_run(whole) is None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process become larger than that: a write fails with EFBIG, also one of pytest's output."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_mark_that_cannot_be_written_stays_as_it_is(tmp_path: Path) -> None:
    marks = DeviceMarks(tmp_path / "devices")
    marks.set_owner(device(), b"db1")
    refused = pytest.raises(LedgerError, match=f"cannot write {tmp_path}/devices/ns-0-0-134217728.owner: {_EFBIG}")
    with largest_file(2), refused:
        marks.set_owner(device(), b"another")
    assert marks.owner(device()) == b"db1"
    assert len(os.listdir(tmp_path / "devices")) == 1


_EFBIG = os.strerror(errno.EFBIG)


# --- domains ---


class Host:
    """A host with two devices, and a part of the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backing, self.mapper = MemoryDevices(A, B), RecordingMapper()
        self.backing.add(PART, "ns-0", 2 * MIB, 64 * MIB)

    def driver(self) -> XenNvdimmDriver:
        return make_driver(self.folder, self.backing, self.mapper)

    def define(self, *paths: str, uuid: str = UUID) -> None:
        self.driver().define(domain(*paths, uuid=uuid, name="db1" if uuid == UUID else "db2"))

    def release(self, uuid: str) -> None:
        self.driver().forget(uuid)

    def owner(self, path: str) -> str | None:
        """Return the uuid in the mark of a device."""
        file = self.backing.inspect(path)
        return owner_marks.unpack(path, file.owner).uuid if file and file.owner else None

    def lose_ledger(self) -> None:
        for file in self.folder.glob("ledger*"):
            file.unlink()
        forget_in_use(self.folder)

    def back_up(self) -> None:
        copy_ledger(self.folder / "ledger.sqlite", self.folder / "backup")

    def put_back(self) -> None:
        for file in self.folder.glob("ledger.sqlite*"):
            file.unlink()
        (self.folder / "backup").rename(self.folder / "ledger.sqlite")

    def repair(self, named: tuple[str, ...] = (A, B)) -> None:
        """Do what ``check --repair`` does, without a libvirt, and check that nothing is left to be repaired."""
        for _ in range(6):
            driver = self.driver()
            found = look(driver, named=named)
            for each in [*found, *repair_ledger.look(driver, found)]:
                if each.mend:
                    with suppress(NvdimmError):
                        each.mend()
        assert [each for each in look(self.driver(), named=named) if each.mend] == []
        assert not self.driver().ledger.is_from_elsewhere()

    def start(self, domid: int, path: str = A, image: dict[int, bytes] | None = None) -> None:
        driver = self.driver()
        driver.prepare(domain(path))
        self.mapper.alive[domid] = UUID
        self.mapper.memory[domid] = dict(image or {})
        prepare = driver.prepare_known
        restored = image is not None
        attach(domid, driver.ledger, self.mapper, str(self.folder), prepare, lambda *_: None, restored=restored)
        if not restored:
            self.mapper.boot(domid)

    def end(self, domid: int) -> dict[int, bytes]:
        del self.mapper.alive[domid]
        self.driver().release(UUID)
        return self.mapper.memory.pop(domid)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def refused(host: Host, path: str) -> None:
    """Check that db2 gets nothing of it in any way."""
    thief = domain(path, uuid=OTHER_UUID, name="db2")
    with pytest.raises(InUseError):
        host.driver().define(thief)
    with pytest.raises(InUseError):
        host.driver().prepare(thief)
    with pytest.raises(InUseError):
        host.driver().wiper.wipe(thief.nvdimms[0], lambda step: lambda done, total: None)
    assert host.driver().ledger.find_domain(OTHER_UUID) is None


@pytest.mark.parametrize("path", [A, PART])
def test_a_lost_ledger_gives_no_part_of_a_device_away(host: Host, path: str) -> None:
    host.define(path)
    host.lose_ledger()
    refused(host, A)
    refused(host, PART)
    host.define(B, uuid=OTHER_UUID)
    host.define(path)


def test_a_mark_is_of_the_bytes_whatever_their_name_is(host: Host) -> None:
    host.define(A)
    host.lose_ledger()
    host.backing.exchange(A, B)
    refused(host, B)
    host.define(A, uuid=OTHER_UUID)
    assert (host.owner(A), host.owner(B)) == (OTHER_UUID, UUID)


def test_what_a_domain_gives_up_loses_its_mark(host: Host) -> None:
    host.define(A)
    host.define(B)
    assert (host.owner(A), host.owner(B)) == (None, UUID)
    host.release(UUID)
    assert host.owner(B) is None
    host.define(B, uuid=OTHER_UUID)


def test_what_a_domain_gives_up_loses_its_mark_whatever_its_name_is(host: Host) -> None:
    host.define(A)
    host.backing.rename(A, "/mnt/pmem0/c")
    host.release(UUID)
    assert host.owner("/mnt/pmem0/c") is None
    host.define("/mnt/pmem0/c", uuid=OTHER_UUID)


def test_what_a_domain_gives_up_loses_what_a_define_that_was_killed_has_left_of_its_marks(host: Host) -> None:
    """It was killed between the mark of the partition, which is larger now, and the removal of the one before."""
    host.define(PART)
    before, mark = host.backing.identify(PART), host.backing.inspect(PART)
    assert mark
    host.backing.add(PART, "ns-0", 2 * MIB, 96 * MIB)
    host.define(PART)
    DeviceMarks(host.folder / "devices").set_owner(before, mark.owner)
    host.release(UUID)
    host.define(A, uuid=OTHER_UUID)


def test_a_partition_that_was_made_smaller_gives_up_the_rest(host: Host) -> None:
    host.backing.add(PART, "ns-0", 2 * MIB, 96 * MIB)
    host.define(PART)
    host.backing.add(PART, "ns-0", 2 * MIB, 64 * MIB)
    host.define(PART)
    host.backing.add(B, "ns-0", 70 * MIB, 64 * MIB)
    host.define(B, uuid=OTHER_UUID)


def repair_as_hinted(host: Host, path: str) -> list[tuple[str, str]]:
    """Have db2 refused at a path, and repair what the hint names; return problem and remedy of what is left of it."""
    with pytest.raises(InUseError) as raised:
        host.define(path, uuid=OTHER_UUID)
    assert f"nvdimmctl check --repair {path}" in (raised.value.hint or "")
    for each in look(host.driver(), named=(path,)):
        if each.mend and each.path == path:
            each.mend()
    return [(each.problem, each.remedy) for each in look(host.driver(), named=(path,)) if each.path == path]


@pytest.mark.parametrize(("marked", "other"), [(A, PART), (PART, A)])
def test_the_hint_for_a_part_of_a_marked_device_leads_to_that(host: Host, marked: str, other: str) -> None:
    host.define(marked)
    host.lose_ledger()
    ((problem, remedy),) = repair_as_hinted(host, other)
    start, size = (0, "128 MiB") if marked == A else (2 * MIB, "64 MiB")
    assert f"{size} from byte {start} of the namespace on, has the mark of slot 0 of db1 ({UUID})" in problem
    assert f"with the name of that device, on the namespace of {A}: nvdimmctl check --repair DEVICE" in remedy
    (file,) = (host.folder / "devices").glob("*.owner")
    assert remedy.endswith(f"delete {file}")
    found = {each.path: each for each in look(host.driver(), named=(A, PART))}
    assert found[other].remedy == f"write that into the ledger: nvdimmctl check --repair {marked}"
    mend = found[marked].mend
    assert mend
    mend()
    assert look(host.driver(), named=(A, PART)) == []
    assert host.driver().ledger.find_domain(UUID)


@pytest.mark.parametrize("has", ["nothing", "another in its slot"])
def test_a_partition_that_was_made_larger_goes_back_to_its_domain(
    host: Host, monkeypatch: pytest.MonkeyPatch, has: str
) -> None:
    host.define(PART)
    host.lose_ledger()
    monkeypatch.setattr("nvdimm_driver.state.ledger.time.time_ns", lambda: 1)  # the clock was set back, too
    if has != "nothing":
        host.define(B)
    host.backing.add(PART, "ns-0", 2 * MIB, 96 * MIB)
    assert repair_as_hinted(host, PART) == []
    record = host.driver().ledger.find_domain(UUID)
    assert record
    assert PART in {item.spec.path for item in record.allocations}
    assert len([*(host.folder / "devices").glob("ns-0*.owner")]) == 1, "it has no mark of its size of before"
    assert host.owner(PART) == UUID
    host.release(UUID)
    host.define(A, uuid=OTHER_UUID)


def test_a_partition_that_is_smaller_than_its_mark_is_nobodys(host: Host) -> None:
    host.define(PART)
    host.lose_ledger()
    host.backing.add(PART, "ns-0", 2 * MIB, 32 * MIB)
    ((_, remedy),) = repair_as_hinted(host, PART)
    assert "make it as it was" in remedy
    host.backing.add(PART, "ns-0", 2 * MIB, 64 * MIB)
    assert repair_as_hinted(host, PART) == []


@pytest.mark.parametrize("path", [A, PART], ids=["of a part", "of what was made larger"])
def test_a_mark_of_a_part_that_cannot_be_read_is_removed(host: Host, path: str) -> None:
    DeviceMarks(host.folder / "devices").set_owner(device(2 * MIB, 8 * MIB), b"{")
    with pytest.raises(LedgerError) as raised:
        host.define(path)
    assert raised.value.hint == f"to remove it: nvdimmctl check --repair {path}"
    (found,) = look(host.driver(), named=(path,))
    assert (found.path, found.remedy) == (path, "remove the mark")
    assert found.mend
    found.mend()
    host.define(path)


STATES = ((A, B), (B, A), (A, None), (None, A), (None, None))
"""What db1 and db2 have."""


def become(host: Host, state: tuple[str | None, str | None]) -> None:
    for uuid in (UUID, OTHER_UUID):
        if host.driver().ledger.find_domain(uuid):
            host.release(uuid)
    for uuid, path in zip((UUID, OTHER_UUID), state, strict=True):
        if path:
            host.define(path, uuid=uuid)


@pytest.mark.parametrize("boot", [False, True])
@pytest.mark.parametrize(("then", "now"), [*permutations(STATES, 2)])
def test_a_repair_of_a_ledger_from_a_backup_follows_the_marks(
    host: Host, then: tuple[str | None, str | None], now: tuple[str | None, str | None], boot: bool
) -> None:
    """Also if a boot has exchanged the names since: then a domain may have to be defined with the name of now first."""
    become(host, then)
    host.back_up()
    become(host, now)
    has = {path: uuid for uuid, path in zip((UUID, OTHER_UUID), now, strict=True) if path}
    if boot:
        host.backing.exchange(A, B)
        has = {B if path == A else A: uuid for path, uuid in has.items()}
    host.put_back()
    for path, owner in has.items():
        other = OTHER_UUID if owner == UUID else UUID
        with pytest.raises(InUseError):
            host.driver().prepare(domain(path, uuid=other, name="db2" if owner == UUID else "db1"))
    host.repair()
    for path, owner in has.items() if boot else ():
        with suppress(NvdimmError):
            host.define(path, uuid=owner)
    host.repair()
    records = host.driver().ledger.domains()
    for path, owner in has.items():
        assert host.owner(path) == owner
        assert [each.uuid for each in records if path in {item.spec.path for item in each.allocations}] == [owner]


def test_a_repair_follows_a_mark_though_a_boot_has_given_the_device_another_name(host: Host) -> None:
    """The repair failed each time, as the other domain had it by the name of before; that one's advice was wrong."""
    host.define(A)
    host.back_up()
    host.release(UUID)
    host.define(A, uuid=OTHER_UUID)
    host.backing.rename(A, "/mnt/pmem0/c")
    host.put_back()
    host.repair(named=("/mnt/pmem0/c",))
    (record,) = host.driver().ledger.domains()
    assert (record.uuid, record.allocations[0].spec.path) == (OTHER_UUID, "/mnt/pmem0/c")
    host.driver().prepare(domain("/mnt/pmem0/c", uuid=OTHER_UUID, name="db2"))


def test_a_device_without_a_mark_gets_one(host: Host) -> None:
    """An earlier version has defined the domain, or the marks were lost."""
    host.define(A)
    host.backing.mark(A, None)
    (found,) = look(host.driver())
    assert (found.path, found.problem, found.remedy) == (A, "it has no mark", "write its mark")
    host.driver().mark_devices()
    assert host.owner(A) == UUID
    assert look(host.driver()) == []


def test_a_ledger_that_was_not_compared_marks_nothing(host: Host) -> None:
    host.define(A)
    host.backing.mark(A, None)
    host.driver().ledger.take_over(compared=False)
    host.driver().mark_devices()
    assert host.owner(A) is None


def test_a_lost_ledger_brings_back_what_is_only_kept_until_it_is_wiped(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = Pools([Pool("main", "memory", (A, B), None, SUPERPAGE, 0, True)])
    monkeypatch.setattr(host, "driver", lambda: make_driver(host.folder, host.backing, host.mapper, pools=pools))
    host.define(A)
    host.driver().drop_claims(UUID)
    host.lose_ledger()
    host.repair()
    record = host.driver().ledger.find_domain(UUID)
    assert record
    assert [(item.spec.path, item.spec.slot) for item in record.allocations] == [(A, 256)]


def test_a_define_that_was_killed_before_the_mark(host: Host) -> None:
    host.define(A)
    host.backing.mark(A, None)
    refused(host, A)
    host.repair()
    assert host.owner(A) == UUID


def test_a_release_that_was_killed_after_the_mark_went(host: Host) -> None:
    host.define(A)
    host.backing.mark(A, None)
    host.release(UUID)
    host.define(A, uuid=OTHER_UUID)


def test_a_define_without_room_for_the_mark_changes_nothing(host: Host) -> None:
    (host.folder / "devices").write_text("in place of the folder")
    with pytest.raises(LedgerError, match="cannot write"):
        host.define(A)
    assert host.driver().ledger.find_domain(UUID) is None


def test_a_start_and_an_end_need_no_mark(host: Host) -> None:
    host.define(A)
    for file in (host.folder / "devices").iterdir():
        file.unlink()
    (host.folder / "devices").rmdir()
    (host.folder / "devices").write_text("in place of the folder")
    host.start(5)
    host.end(5)


def make_unreadable(host: Host, suffix: str) -> Path:
    """Let the file of the device be as below a bad sector: it cannot be read, but replaced or deleted."""
    (file,) = (host.folder / "devices").glob(f"*{suffix}")
    file.unlink()
    file.symlink_to(file)
    return file


def test_an_owner_that_cannot_be_read_can_be_deleted(host: Host) -> None:
    """Nobody can say whose the device is, so the start is refused; it was left open what to do."""
    host.define(A)
    file = make_unreadable(host, ".owner")
    with pytest.raises(LedgerError, match=r"cannot read .*\.owner") as refused:
        host.start(5)
    assert "delete that file" in refused.value.hint
    with pytest.raises(LedgerError, match="cannot read"):
        DeviceMarks(file.parent).set_owner(device(), None)
    file.unlink()
    host.start(5)
    assert host.owner(A) == UUID


# --- saved guests ---


def test_a_guest_boots_though_the_number_of_its_last_run_cannot_be_read(host: Host) -> None:
    host.define(A)
    host.start(5)
    image = host.end(5)
    make_unreadable(host, ".run")
    with pytest.raises(RefusedError, match="since it was saved, its domain was started"):
        host.start(6, image=image)
    host.end(6)
    host.start(7)
    image = host.end(7)
    host.start(8, image=image)


@pytest.mark.parametrize("other_boots", [False, True], ids=["alone", "another boots"])
def test_an_image_is_good_once_when_the_ledger_is_put_back_while_its_guest_runs(host: Host, other_boots: bool) -> None:
    """The backup has the run of the image, and the start of that run: the guest of now is in another."""
    host.define(A)
    host.define(B, uuid=OTHER_UUID)
    host.start(5)
    host.back_up()
    image = host.end(5)
    host.start(6, image=image)
    host.put_back()
    if other_boots:
        host.driver().prepare(domain(B, uuid=OTHER_UUID, name="db2"))
    host.end(6)
    with pytest.raises(RefusedError, match="since it was saved, its domain was started"):
        host.start(7, image=image)
    del host.mapper.alive[7]
    host.driver().ledger.take_over(compared=True)
    with pytest.raises(RefusedError, match="since it was saved, its domain was started"):
        host.start(8, image=image)


@pytest.fixture
def held(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Return a host whose holders stay while its processes come and go."""
    holders = RecordingHolders()
    monkeypatch.setattr(host, "driver", lambda: make_driver(host.folder, host.backing, host.mapper, holders=holders))
    return host


@pytest.mark.parametrize("domid", [5, 6], ids=["the same domid", "another domid"])
def test_an_image_is_good_once_when_the_ledger_is_of_before_a_boot(
    host: Host, monkeypatch: pytest.MonkeyPatch, domid: int
) -> None:
    """The backup has no marks; domids begin anew at each boot, and the guest of now may have the one of then."""
    host.define(A)
    host.define(B, uuid=OTHER_UUID)
    boot_host(monkeypatch, "one")
    host.start(5)
    host.back_up()
    image = host.end(5)
    boot_host(monkeypatch, "two")
    host.start(domid, image=image)
    host.put_back()
    forget_devices(host.folder)
    host.driver().prepare(domain(B, uuid=OTHER_UUID, name="db2"))
    host.end(domid)
    with pytest.raises(RefusedError, match="since it was saved, its domain was started"):
        host.start(7, image=image)


@pytest.mark.parametrize("domid", [5, 6], ids=["the same domid", "another domid"])
def test_a_guest_that_is_saved_after_the_repair_of_a_ledger_of_before_a_boot_goes_on(
    held: Host, monkeypatch: pytest.MonkeyPatch, domid: int
) -> None:
    held.define(A)
    boot_host(monkeypatch, "one")
    held.start(5)
    held.back_up()
    image = held.end(5)
    boot_host(monkeypatch, "two")
    held.start(domid, image=image)
    held.put_back()
    held.repair()
    assert look(held.driver()) == []
    saved = held.end(domid)
    held.start(8, image=saved)


@pytest.mark.parametrize("restored", [False, True])
def test_a_repair_of_a_ledger_from_a_backup_leaves_a_start_alone_that_is_under_way(
    held: Host, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    """It was taken for one of before the backup, and replaced: the device model failed, and libvirt lost the guest."""
    held.define(A)
    held.back_up()
    held.put_back()
    held.start(4)
    image = held.end(4)
    real, said = held.mapper.map, []

    def map_later(*args: Any) -> int:
        for each in look(held.driver(), named=(A,)):
            assert each.mend
            with pytest.raises(InUseError, match="db1 is starting as domid 5") as refused:
                each.mend()
            said.append((each.problem, refused.value.hint.partition(",")[0]))
        return real(*args)

    monkeypatch.setattr(held.mapper, "map", map_later)
    held.start(5, image=image if restored else None)
    assert said == [("its guest runs with domid 5, or is starting: the ledger is from a backup", "wait until it runs")]
    held.repair()
    saved = held.end(5)
    held.start(6, image=saved)


def test_what_a_backup_has_as_the_domid_may_be_another_guest(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of before a boot: nothing of that guest is shown, and no label server gets to it."""
    host.define(A)
    boot_host(monkeypatch, "one")
    host.start(5)
    host.back_up()
    image = host.end(5)
    boot_host(monkeypatch, "two")
    host.start(6, image=image)
    host.put_back()
    host.mapper.alive[5] = OTHER_UUID
    host.mapper.memory[5] = {}
    driver = host.driver()
    driver.ledger._write([("UPDATE attachment SET served = 'labels'", ())])
    assert driver.guest_processes.find_served() == []
    record = driver.ledger.find_domain(UUID)
    assert record
    assert [table[:4] for table in driver.read_guest_tables(record)] == [b"NFIT", b"SSDT"]


def test_an_image_is_good_once_though_nothing_tells_that_the_ledger_is_a_backup(host: Host) -> None:
    host.define(A)
    host.start(5)
    image = host.end(5)
    host.back_up()
    host.start(6, image=image)
    host.end(6)
    copy_ledger(host.folder / "backup", host.folder / "ledger.sqlite")
    assert not host.driver().ledger.is_from_elsewhere()
    with pytest.raises(RefusedError, match="since it was saved, its domain was started"):
        host.start(7, image=image)


def test_an_image_is_good_until_something_else_has_the_device(host: Host) -> None:
    host.define(A)
    host.start(5)
    image = host.end(5)
    host.back_up()
    host.driver().note_overwritten(device())
    copy_ledger(host.folder / "backup", host.folder / "ledger.sqlite")
    with pytest.raises(RefusedError, match="overwritten by nvdimmctl"):
        host.start(6, image=image)


def test_a_restore_that_fails_in_the_device_model_can_be_repeated(host: Host) -> None:
    host.define(A)
    host.start(5)
    image = host.end(5)
    host.mapper.fail = "map"
    with pytest.raises(NvdimmError, match="EPERM"):
        host.start(6, image=image)
    host.end(6)
    host.mapper.fail = ""
    host.start(7, image=image)


def records(driver: XenNvdimmDriver) -> list[Allocation]:
    """Return the NVDIMMs of all domains."""
    return [item for record in driver.ledger.domains() for item in record.allocations]


def test_a_name_is_believed_of_what_was_seen_and_nothing_else(host: Host) -> None:
    """A define between the look and the repair: its NVDIMM got the name of the one that had the slot before."""
    host.define(A)
    driver = host.driver()
    driver.ledger.doubt_names([(UUID, 0)])
    (seen,) = records(driver)
    host.define(B)
    with pytest.raises(InUseError, match="was given up meanwhile"):
        _believe_name(driver, seen)
    (now,) = records(driver)
    assert (now.spec.path, now.identity) == (B, host.backing.identify(B))
