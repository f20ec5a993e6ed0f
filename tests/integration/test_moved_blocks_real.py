# SPDX-License-Identifier: Apache-2.0
"""Blocks of a running guest's file that root moves or shares, in spite of the flag or past it: real ext4 and XFS."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.backing import extents, inode, paths
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_changes import Changes
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.errors import BackingError, InUseError
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.lifecycle import start as start_module
from nvdimm_driver.model import KIB, MIB, PAGE, Extent, NvdimmSpec
from nvdimm_driver.plugins import DOUBTFUL
from tests.integration.loop_pmem import MKFS, SPA, FileSystem, lease_break_time, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, is_immutable, quiet
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


OF_B = bytes(MIB) + DATA[MIB:]
FIDEDUPERANGE = 0xC0189436  # include/uapi/linux/fs.h


def dedupe(source: int, target: int, length: int) -> int:
    """Let the beginning of one file be that of another, if their bytes are the same; return 0, or an errno.

    :param target: may be a descriptor that only reads.
    """
    request = bytearray(struct.pack("=QQHHIqQQiI", 0, length, 1, 0, 0, target, 0, 0, 0, 0))
    fcntl.ioctl(source, FIDEDUPERANGE, request)
    return -int(struct.unpack_from("=i", request, 48)[0])


@pytest.fixture
def xfs(tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems["xfs"])
    empty(file_systems["xfs"])


@contextmanager
def deduping(xfs: Host, monkeypatch: pytest.MonkeyPatch, *, leased: bool = False) -> Iterator[None]:
    """Dedupe another file into that of a guest when it is not immutable, with descriptors that only read.

    :param leased: the first opening in that moment fails, as if a program had a lease on the file.
    """
    donor = Path(xfs.path("donor"))
    donor.write_bytes(bytes(SIZE))
    source, target = os.open(donor, os.O_RDONLY), os.open(xfs.path("a.img"), os.O_RDONLY)
    open_again = paths.open_again
    assert dedupe(source, target, 64 * KIB), "it is immutable"

    leases = [True] * leased

    def opened_in_the_moment(fd: int, flags: int) -> int:
        assert dedupe(source, target, 64 * KIB) == 0, "the kernel does not refuse it"
        if leases and leases.pop():
            raise BlockingIOError
        return open_again(fd, flags)

    with monkeypatch.context() as patched:
        patched.setattr(inode, "open_again", opened_in_the_moment)
        yield
    os.close(source)
    os.close(target)
    donor.unlink()


def test_labels_are_not_opened_if_the_file_was_moved_meanwhile(xfs: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    xfs.run(xfs.domain("a.img", label_size=128 * KIB))
    (item,) = xfs.record().allocations
    assert item.identity
    before = extents_of(xfs, "a.img")
    with (
        deduping(xfs, monkeypatch),
        pytest.raises(BackingError, match=r"/a\.img: blocks of it were moved while") as info,
    ):
        xfs.backing.open_labels(item.spec, item.identity)
    assert "nvdimmctl check" in info.value.hint
    assert extents_of(xfs, "a.img") != before
    assert is_immutable(xfs.path("a.img"))
    assert elsewhere(xfs) == [("x", xfs.path("a.img"))], "also when the other file is gone"


def test_labels_are_not_opened_if_the_file_was_moved_in_an_attempt_that_failed(
    xfs: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    xfs.run(xfs.domain("a.img", label_size=128 * KIB))
    (item,) = xfs.record().allocations
    assert item.identity
    moved = pytest.raises(BackingError, match="blocks of it were moved while")
    with deduping(xfs, monkeypatch, leased=True), moved:
        xfs.backing.open_labels(item.spec, item.identity)


def extents_of(host: Host, name: str) -> list[Extent]:
    """Return where the bytes of a file are."""
    spec = host.domain(name).nvdimms[0]
    return [*host.backing.find_extents(spec)]


def move(path: str) -> None:
    """Move all blocks of a frozen file by 64 KiB in it, as no tool does, and on each file system with the same result.

    Some of the guest's blocks are free then.
    """
    run("chattr", "-i", path)
    run("fallocate", "--collapse-range", "--offset", "0", "--length", str(64 * KIB), path)
    with open(path, "ab") as file:
        file.write(bytes(64 * KIB))
        os.fsync(file.fileno())
    assert os.path.getsize(path) == SIZE
    run("chattr", "+i", path)


def elsewhere(host: Host) -> list[tuple[str, str]]:
    """Return domain and path of each finding of a file whose blocks were moved, none of which can be repaired."""
    found = [each for each in look(host.driver) if "blocks of it were moved" in each.problem]
    assert not any(each.mend for each in found)
    return [(each.domain, each.path) for each in found]


def test_check_names_a_running_guests_file_whose_blocks_were_moved(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host.run(host.domain("a.img", label_size=128 * KIB))
    assert look(host.driver) == []
    move(host.path("a.img"))
    assert elsewhere(host) == [("x", host.path("a.img"))]

    host.mapper.alive.clear()
    host.driver.release(UUID)
    assert f"event=blocks-moved domain=x uuid={UUID} domid=7 path={host.path('a.img')}" in caplog.text
    last = host.driver.ledger.find_run(UUID)
    assert last
    assert last.number == 0, "the memory of a guest that was saved does not fit what is in the file"


def test_the_end_of_a_guest_whose_file_has_not_moved_says_nothing(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    host.run(host.domain("a.img", label_size=128 * KIB))
    host.mapper.alive.clear()
    host.driver.release(UUID)
    assert "blocks-moved" not in caplog.text
    last = host.driver.ledger.find_run(UUID)
    assert last
    assert last.number


def test_what_an_end_has_thawed_may_be_moved_before_the_next_attempt(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvdimms = tuple(NvdimmSpec(slot, host.path(name), SIZE) for slot, name in enumerate(("a.img", "b.img")))
    host.run(replace(host.domain("a.img"), nvdimms=nvdimms))
    host.mapper.alive.clear()
    thaw = FsdaxBacking.thaw_unless

    def fails(backing: FsdaxBacking, path: str, *args: Any, **options: Any) -> None:
        if path == host.path("b.img"):
            raise BackingError(f"{path}: {os.strerror(errno.EROFS)}")
        thaw(backing, path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(FsdaxBacking, "thaw_unless", fails)
        with pytest.raises(BackingError, match="Read-only"):
            host.driver.release(UUID)
    assert not is_immutable(host.path("a.img"))
    move(host.path("a.img"))
    run("chattr", "-i", host.path("a.img"))
    host.driver.release(UUID)
    assert "blocks-moved" not in caplog.text
    last = host.driver.ledger.find_run(UUID)
    assert last
    assert last.number


def test_another_boot_may_find_the_namespace_elsewhere(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run(host.domain("a.img"))
    host.mapper.alive.clear()
    move(host.path("a.img"))
    monkeypatch.setattr(start_module, "host_boot_id", lambda: "another")
    host.driver.release(UUID)
    assert "blocks-moved" not in caplog.text
    last = host.driver.ledger.find_run(UUID)
    assert last
    assert last.number


def test_check_compares_with_what_the_guest_has_and_not_with_what_a_repair_has_written(host: Host) -> None:
    host.run(host.domain("a.img"))
    host.mapper.announce(7, [(0, each.spa // PAGE, each.length // PAGE) for each in extents_of(host, "a.img")])
    host.mapper.deliver(7, host.driver.tables_file(UUID).read_bytes())
    host.mapper.boot(7)
    move(host.path("a.img"))
    record = host.record()
    assert record.start
    host.driver.take_up_running(record, 7, [host.path("a.img")])  # the file's blocks of now
    assert elsewhere(host) == [("x", host.path("a.img"))]


def share(xfs: Host) -> None:
    """Let the file of a domain that is off have the first MiB of that of a running guest, which then writes there."""
    xfs.define("b.img", OTHER_UUID, OF_B)
    share_with_defined(xfs)


def share_with_defined(xfs: Host) -> None:
    xfs.run(xfs.domain("a.img"))
    with open(xfs.path("a.img"), "rb") as source, open(xfs.path("b.img"), "rb") as target:
        assert dedupe(source.fileno(), target.fileno(), MIB) == 0
    run("sync", "-f", xfs.fs.root)
    with open(xfs.fs.image, "r+b") as image:
        image.seek(extents_of(xfs, "a.img")[0].spa - SPA)
        image.write(b"secret of a")
    run("sysctl", "-q", "vm.drop_caches=3")
    assert xfs.read("b.img").startswith(b"secret of a")


def shared(xfs: Host, name: str, *named: str) -> Inconsistency:
    """Return the only finding of a file."""
    (found,) = [each for each in look(xfs.driver, named=named) if each.path == xfs.path(name)]
    return found


def test_no_repair_gives_a_domain_what_another_ones_guest_has_written(xfs: Host, tmp_path: Path) -> None:
    share(xfs)
    a, b = shared(xfs, "a.img"), shared(xfs, "b.img")
    assert a.mend is b.mend is shared(xfs, "b.img", xfs.path("b.img")).mend is None
    assert b.problem == "the guest of domain x has blocks of it: what this file had there is lost"
    assert b.remedy.startswith("copy a backup over it, if there is one")
    assert a.remedy.startswith(f"that is {xfs.path('b.img')} of domain y: it has what this guest writes")
    assert "delete" not in a.remedy
    record, changes = xfs.record(OTHER_UUID), Changes(xfs.driver, [xfs.record(OTHER_UUID)], {})
    with pytest.raises(InUseError, match=r"b\.img: the guest of domain x has blocks .* may have written to them"):
        changes.of(record, changes.unshare, xfs.backing, *record.allocations)()
    with pytest.raises(BackingError, match="'nvdimmctl check' says how to go on"):
        xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))

    backup = tmp_path / "backup"
    backup.write_bytes(OF_B)
    run("cp", "--sparse=never", backup, xfs.path("b.img"))
    assert look(xfs.driver) == []
    xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))
    assert xfs.read("a.img").startswith(b"secret of a")


def ended(xfs: Host) -> None:
    """End the guest whose file shares blocks with another domain's."""
    share(xfs)
    xfs.mapper.alive.clear()
    xfs.driver.release(UUID)


def give_up_other(xfs: Host, way: str) -> None:
    """Give up the file of the guest that has written, or copy what it shares."""
    path, item = xfs.path("a.img"), xfs.record().allocations[0]
    if way == "repair":
        (found,) = [each for each in look(xfs.driver, named=[path]) if each.path == path]
        assert found.mend
        found.mend()
    elif way == "redefine":
        xfs.driver.drop_claims(UUID)
    elif way == "rm":
        os.unlink(path)
    elif way == "wipe":
        xfs.driver.wiper.wipe(item.spec, quiet, xfs.record())
    elif way != "kept":
        xfs.driver.release_claims(xfs.record(), quiet, delete="delete" in way)


THIRD_UUID = "7c7b0e2e-4a6e-4f0e-9a3b-000000000003"


def check_that_nobody_gets(xfs: Host, name: str, folder: Path) -> None:
    """Check that no domain starts or is defined with a file, and that it is not copied."""
    path, copy, spec = xfs.path(name), folder / "copy", xfs.domain(name).nvdimms[0]
    for use in (
        partial(xfs.driver.prepare, xfs.domain(name, OTHER_UUID)),
        partial(xfs.driver.define, xfs.domain(name, OTHER_UUID)),
        partial(xfs.driver.define, xfs.domain(name, THIRD_UUID)),
        partial(xfs.driver.exporter.export, spec, str(copy), quiet, overwrite=False, running=False),
        partial(xfs.driver.importer.import_copy, path, xfs.path("copy"), None, 0, quiet),
        partial(xfs.driver.importer.import_in_place, path, None, 0, quiet),
    ):
        with pytest.raises((BackingError, InUseError)) as info:
            use()
        assert "it shared blocks with" in str(info.value) or info.type is InUseError
    assert not copy.exists()


@pytest.mark.parametrize("way", ["before the end", "after the end"])
def test_a_file_that_no_domain_has_any_more_stays_nobodys(xfs: Host, way: str, tmp_path: Path) -> None:
    share(xfs)
    if way == "before the end":
        xfs.driver.drop_claims(OTHER_UUID)
    xfs.mapper.alive.clear()
    xfs.driver.release(UUID)
    if way != "before the end":
        xfs.driver.drop_claims(OTHER_UUID)
    xfs.driver.release_claims(xfs.record(), quiet, delete=True)
    for each in look(xfs.driver):
        if each.mend:
            each.mend()
    check_that_nobody_gets(xfs, "b.img", tmp_path)
    found = shared(xfs, "b.img")
    assert (found.mend, found.domain) == (None, "")
    mend = shared(xfs, "b.img", xfs.path("b.img")).mend
    assert mend
    mend()
    xfs.driver.define(xfs.domain("b.img", THIRD_UUID))


def test_what_two_files_share_behind_the_ends_of_their_nvdimms_is_no_guests(xfs: Host) -> None:
    """Such as that of files from one template; a user can append a reflink of another's file to his own, too."""
    Path(xfs.path("template")).write_bytes(bytes(SIZE) + DATA)
    for name, uuid in (("a.img", UUID), ("b.img", OTHER_UUID)):
        run("cp", "--reflink=always", xfs.path("template"), xfs.path(name))
        with open(xfs.path(name), "r+b") as file:
            file.write(DATA)
            os.fsync(file.fileno())
        xfs.driver.define(xfs.domain(name, uuid))
    xfs.run(xfs.domain("a.img"))
    xfs.mapper.alive.clear()
    xfs.driver.release(UUID)
    assert not any(each.doubtful for each in xfs.backing.survey([str(xfs.fs.root)]))
    xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))


def test_only_the_file_that_a_guest_has_makes_others_doubtful(xfs: Host) -> None:
    """Who owns a folder can put a copy of another domain's file in the place of a guest's, before that is thawed."""
    share(xfs)
    (item,) = xfs.record().allocations
    (other,) = xfs.record(OTHER_UUID).allocations
    assert item.identity
    assert other.identity
    run("cp", "--reflink=always", xfs.path("b.img"), xfs.path("copy"))
    assert xfs.backing.doubt_sharers(xfs.path("copy"), item.identity) == ()
    assert xfs.backing.doubt_sharers(xfs.path("a.img"), other.identity) == ()
    assert not any(each.doubtful for each in xfs.backing.survey([str(xfs.fs.root)]))
    assert sorted(xfs.backing.doubt_sharers(xfs.path("a.img"), item.identity)) == [xfs.path("b.img"), xfs.path("copy")]


@pytest.mark.parametrize("way", ["kept", "repair", "redefine", "rm", "wipe", "release", "release --delete"])
def test_whatever_becomes_of_that_guests_file_the_other_one_waits_for_the_operator(
    xfs: Host, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ended(xfs)
    path, domain = xfs.path("b.img"), xfs.domain("b.img", OTHER_UUID)
    assert f"event=blocks-shared domain=y uuid={OTHER_UUID} domid=- path={path} with={xfs.path('a.img')}" in caplog.text
    give_up_other(xfs, way)
    for each in look(xfs.driver):
        if each.mend:
            each.mend()
    check_that_nobody_gets(xfs, "b.img", tmp_path)

    found = shared(xfs, "b.img")
    assert found.mend is None
    assert found.remedy.endswith(f"then, or to go on without: nvdimmctl check --repair {path}")
    backup = tmp_path / "backup"
    backup.write_bytes(OF_B)
    run("cp", "--sparse=never", backup, path)
    assert shared(xfs, "b.img").mend is None, "nobody knows what was copied over it"
    mend = shared(xfs, "b.img", path).mend
    assert mend
    mend()
    assert [each for each in look(xfs.driver) if each.path == path] == []
    xfs.driver.prepare(domain)
    assert xfs.read("b.img") == OF_B


@pytest.mark.parametrize("written", [False, True])
def test_no_guest_that_was_saved_goes_on_over_what_another_one_has_written(xfs: Host, written: bool) -> None:
    """Neither the deduplication changes the time of its file, nor do the stores."""
    xfs.define("b.img", OTHER_UUID, OF_B)
    b = xfs.domain("b.img", OTHER_UUID)
    xfs.driver.prepare(b)
    xfs.mapper.alive[5] = OTHER_UUID
    map_prepared(xfs.driver.ledger, 5, OTHER_UUID)
    del xfs.mapper.alive[5]
    xfs.driver.release(OTHER_UUID)
    if written:
        share_with_defined(xfs)
        xfs.mapper.alive.clear()
        xfs.driver.release(UUID)
        mend = shared(xfs, "b.img", xfs.path("b.img")).mend
        assert mend
        mend()
    saved = xfs.driver.ledger.find_run(OTHER_UUID)
    assert saved
    now = {xfs.path("b.img"): (os.stat(xfs.path("b.img")).st_mtime_ns,)}
    assert (saved_guest.times_of(saved) == now) is not written


def announce(xfs: Host, domid: int, name: str) -> None:
    xfs.mapper.announce(domid, [(0, each.spa // PAGE, each.length // PAGE) for each in extents_of(xfs, name)])


@pytest.mark.parametrize("flag", ["i", "a"])
def test_a_file_that_the_operator_has_made_immutable_is_doubtful_too(xfs: Host, flag: str) -> None:
    share(xfs)
    run("chattr", f"+{flag}", xfs.path("b.img"))
    try:
        xfs.mapper.alive.clear()
        xfs.driver.release(UUID)
        assert flag in subprocess.check_output(["lsattr", xfs.path("b.img")], text=True).split()[0]
    finally:
        run("chattr", f"-{flag}", xfs.path("b.img"))
    assert xfs.record().start is None
    with pytest.raises(BackingError, match="it shared blocks with"):
        xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))


def test_a_lease_keeps_no_file_from_a_look_and_makes_none_doubtful(xfs: Host) -> None:
    """As smbd takes leases on what its clients have open; the kernel ends them."""
    xfs.define("c.img", THIRD_UUID)
    share(xfs)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    leased = [os.open(xfs.path(name), os.O_RDWR) for name in ("b.img", "c.img")]
    try:
        for each in leased:
            fcntl.fcntl(each, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with lease_break_time(1):
            xfs.mapper.alive.clear()
            xfs.driver.release(UUID)
    finally:
        for each in leased:
            os.close(each)
        signal.signal(signal.SIGIO, before)
    with pytest.raises(BackingError, match="it shared blocks with"):
        xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))
    xfs.driver.prepare(xfs.domain("c.img", THIRD_UUID))


def test_check_names_only_files_that_share_blocks_with_the_guests_own(xfs: Host) -> None:
    xfs.define("c.img", THIRD_UUID)
    share(xfs)
    announce(xfs, 7, "a.img")
    xfs.driver.prepare(xfs.domain("c.img", THIRD_UUID))
    xfs.mapper.alive[9] = THIRD_UUID
    map_prepared(xfs.driver.ledger, 9, THIRD_UUID)
    announce(xfs, 9, "c.img")
    told = f"that is {xfs.path('b.img')} of domain y: it has what this guest"
    assert shared(xfs, "a.img").remedy.startswith(told)
    xfs.driver.ledger.give_up(OTHER_UUID)  # as in a ledger from a backup: the file's mark says whose it is
    assert shared(xfs, "a.img").remedy.startswith(told)


def test_a_running_guests_own_file_is_exported_though_it_has_a_reflink(xfs: Host, tmp_path: Path) -> None:
    xfs.run(xfs.domain("a.img"))
    announce(xfs, 7, "a.img")
    run("cp", "--reflink=always", xfs.path("a.img"), xfs.path("copy"))
    (item,) = xfs.record().allocations
    xfs.driver.exporter.export(item.spec, str(tmp_path / "copy"), quiet, overwrite=False, running=True, item=item)
    assert (tmp_path / "copy").read_bytes() == xfs.read("a.img")


def test_a_copy_outside_of_the_pools_can_be_named_too(xfs: Host, tmp_path: Path) -> None:
    ended(xfs)
    copy = tmp_path / "b.img"
    run("cp", "-a", xfs.path("b.img"), copy)
    with pytest.raises(BackingError, match="it shared blocks with") as info:
        xfs.driver.importer.import_copy(str(copy), xfs.path("new"), None, 0, quiet)
    assert info.value.hint.endswith(f"nvdimmctl check --repair {copy}")
    found = [each for each in look(xfs.driver, named=[str(copy)]) if each.path == str(copy)]
    (mend,) = [each.mend for each in found if each.problem == DOUBTFUL]
    assert mend
    mend()
    xfs.driver.importer.import_copy(str(copy), xfs.path("new"), None, 0, quiet)


def test_what_is_wiped_has_nobodys_bytes(xfs: Host) -> None:
    ended(xfs)
    spec = xfs.record(OTHER_UUID).allocations[0].spec
    xfs.driver.wiper.wipe(spec, quiet, owners=xfs.driver.wiper.owners([spec]))
    xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))
    assert xfs.read("b.img") == bytes(SIZE)
    assert xfs.read("a.img").startswith(b"secret of a")


def test_another_file_in_its_place_has_no_guests_bytes(xfs: Host) -> None:
    ended(xfs)
    Path(xfs.path("new")).write_bytes(OF_B)
    os.rename(xfs.path("new"), xfs.path("b.img"))
    mend = shared(xfs, "b.img").mend
    assert mend
    mend()
    xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))


def test_of_two_files_that_come_from_one_no_guest_has_written_to_the_other(xfs: Host) -> None:
    """As those that cp makes of a template; the start that fails has no guest."""
    xfs.define("a.img")
    xfs.define("b.img", OTHER_UUID)
    for name in ("a.img", "b.img"):
        run("cp", "--reflink=always", xfs.path("a.img"), xfs.path("template"))
        os.truncate(xfs.path(name), 0)
        run("cp", "--reflink=always", xfs.path("template"), xfs.path(name))
    with pytest.raises(BackingError, match="shares its blocks"):
        xfs.driver.prepare(xfs.domain("a.img"))
    found = shared(xfs, "b.img")
    assert found.mend is None, "a version before may have ended the guest of one"
    assert (
        f"if both have the right bytes, copy what is shared: nvdimmctl check --repair {xfs.path('b.img')}"
        in found.remedy
    )
    mend = shared(xfs, "b.img", xfs.path("b.img")).mend
    assert mend
    mend()
    xfs.driver.release_claims(xfs.record(), quiet, delete=True)
    xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))


def test_a_file_is_wiped_that_shares_blocks_with_a_copy_which_no_domain_has(xfs: Host) -> None:
    xfs.define("a.img")
    run("cp", "--reflink=always", xfs.path("a.img"), xfs.path("copy"))
    spec = xfs.record().allocations[0].spec
    xfs.driver.wiper.wipe(spec, quiet, owners=xfs.driver.wiper.owners([spec]))
    assert xfs.read("a.img") == bytes(SIZE)
    assert xfs.read("copy") == DATA


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_an_export_does_not_show_what_another_ones_guest_has_written(
    xfs: Host, tmp_path: Path, announced: bool, running: bool
) -> None:
    share(xfs)
    if announced:
        announce(xfs, 7, "a.img")
    spec, copy = xfs.domain("b.img", OTHER_UUID).nvdimms[0], tmp_path / "copy"
    (item,) = xfs.record(OTHER_UUID).allocations
    with pytest.raises(InUseError, match="the guest of domain x has blocks of it"):
        xfs.driver.exporter.export(spec, str(copy), quiet, overwrite=False, running=running, item=item)
    assert not copy.exists()


def test_a_file_that_shares_blocks_with_no_domains_file_is_copied(xfs: Host) -> None:
    xfs.define("b.img", OTHER_UUID)
    xfs.define("a.img")
    run("cp", "--reflink=always", xfs.path("a.img"), xfs.path("copy"))
    found = shared(xfs, "a.img")
    assert (found.remedy, found.mend is None) == ("copy what is shared", False)


def as_nobody(work: Callable[[], object]) -> None:
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("later", ["release", "reconcile"])
def test_a_users_file_with_many_attributes_keeps_no_guest_from_its_end(xfs: Host, later: str) -> None:
    share(xfs)
    folder = Path(xfs.path("users"))
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for each in folder.parents:  # the test's own
        os.chmod(each, os.stat(each).st_mode | 0o011)

    def make() -> None:
        fd = os.open(folder / "note", os.O_CREAT | os.O_WRONLY)
        for number in range(300):
            os.setxattr(fd, "user." + f"{number:06}".ljust(249, "x"), b"")

    as_nobody(make)
    with pytest.raises(OSError, match="Argument list too long"):
        os.listxattr(folder / "note")
    xfs.mapper.alive.clear()
    xfs.driver.release(UUID) if later == "release" else xfs.driver.reconcile()
    assert xfs.record().start is None
    assert is_doubtful(xfs, "b.img")


def ends_while_another_start_has_frozen_its_file(
    xfs: Host, monkeypatch: pytest.MonkeyPatch, end: Callable[[], object]
) -> None:
    """Let a guest end after the start of another domain has frozen a file, and before it is refused."""
    frozen, over, go, ended = *os.pipe(), *os.pipe()
    pid = os.fork()
    if not pid:
        check = extents.check_flags

        def wait(path: str, *rest: Any, **options: Any) -> None:
            with open(path, "rb") as file:
                is_first = path.endswith("b.img") and inode.is_frozen(file.fileno())
            if is_first:
                monkeypatch.setattr(extents, "check_flags", check)
                os.write(over, b"x")
                os.read(go, 1)
            check(path, *rest, **options)

        try:
            monkeypatch.setattr(extents, "check_flags", wait)
            with pytest.raises(BackingError, match="shares"):
                xfs.another().prepare(xfs.domain("b.img", OTHER_UUID))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(over)
    assert os.read(frozen, 1) == b"x"
    end()
    os.write(ended, b"x")
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "refused"])
def test_a_start_that_does_not_come_hides_no_file(xfs: Host, monkeypatch: pytest.MonkeyPatch, is_killed: bool) -> None:
    """It freezes its file before it looks at it: that is no sign of a guest."""
    share(xfs)

    def end() -> None:
        xfs.mapper.alive.clear()
        xfs.another().release(UUID)

    if is_killed:
        pid = os.fork()
        if not pid:
            monkeypatch.setattr(extents, "check_flags", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            try:
                xfs.another().prepare(xfs.domain("b.img", OTHER_UUID))
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert is_immutable(xfs.path("b.img"))
        end()
    else:
        ends_while_another_start_has_frozen_its_file(xfs, monkeypatch, end)
    assert is_doubtful(xfs, "b.img")
    xfs.driver = xfs.another()
    xfs.driver.release_claims(xfs.record(), quiet, delete=True)
    with pytest.raises(BackingError, match=DOUBTFUL):
        xfs.driver.prepare(xfs.domain("b.img", OTHER_UUID))


def is_doubtful(xfs: Host, name: str) -> bool:
    with open(xfs.path(name), "rb") as file:
        return inode.is_doubtful(file.fileno())
