# SPDX-License-Identifier: Apache-2.0
"""The ledger is lost or older than reality: the files say whose they are, at each way in, on real ext4 and XFS."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, NvdimmError, TurnedError
from nvdimm_driver.model import MIB, BackingIdentity, DomainSpec, NvdimmSpec, Record, Start
from nvdimm_driver.state import ownership
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, is_immutable, quiet
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared


@pytest.fixture(params=list(MKFS))
def fs(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem]) -> Iterator[FileSystem]:
    yield file_systems[request.param]
    empty(file_systems[request.param])


def another_state_dir(host: Host, name: str) -> Host:
    folder = host.folder / name
    folder.mkdir()
    return Host(folder, host.fs, wipe=True)


def running_with_an_old_ledger(host: Host, guest: DomainSpec) -> Host:
    """Start a guest; return the host with a ledger that knows nothing of it."""
    host.run(guest)
    return another_state_dir(host, "lost")


WAYS: dict[str, Callable[[Host, str], object]] = {
    "define": lambda host, name: host.driver.define(host.domain(name, OTHER_UUID)),
    "check": lambda host, name: host.driver.check(host.domain(name, OTHER_UUID)),
    "start": lambda host, name: host.driver.prepare(host.domain(name, OTHER_UUID)),
    "provision": lambda host, name: host.driver.importer.provision(NvdimmSpec(0, host.path(name), SIZE), quiet),
    "import": lambda host, name: host.driver.importer.import_in_place(host.path(name), None, 0, quiet),
    "wipe": lambda host, name: host.driver.wiper.wipe(NvdimmSpec(0, host.path(name), SIZE), quiet),
    "export onto it": lambda host, name: host.driver.exporter.export(
        NvdimmSpec(0, host.path("mine.img"), SIZE), host.path(name), quiet, overwrite=True, running=False
    ),
}


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_file_whose_owner_the_ledger_does_not_know_is_refused(
    tmp_path: Path, fs: FileSystem, way: str, runs: bool
) -> None:
    host = Host(tmp_path, fs)
    host.define("a.img")
    if runs:
        host.run(host.domain("a.img"))
    lost = another_state_dir(host, "lost")
    lost.define("mine.img", OTHER_UUID)
    before = host.mark("a.img")
    with pytest.raises(NvdimmError, match=r"has the mark of domain x .* the ledger does not know that"):
        WAYS[way](lost, "a.img")
    assert host.read("a.img") == DATA
    assert host.mark("a.img") == before
    assert is_immutable(host.path("a.img")) is runs


@pytest.mark.parametrize("way", list(WAYS))
def test_a_frozen_file_without_a_mark_is_refused(tmp_path: Path, fs: FileSystem, way: str) -> None:
    """A version without marks has started the guest, or somebody has removed the mark."""
    host = Host(tmp_path, fs)
    host.define("a.img")
    host.backing.mark(host.path("a.img"), None)
    host.backing.freeze(host.path("a.img"))
    lost = another_state_dir(host, "lost")
    lost.define("mine.img", OTHER_UUID)
    with pytest.raises(NvdimmError, match="is immutable for a guest that the ledger does not know"):
        WAYS[way](lost, "a.img")
    assert host.read("a.img") == DATA
    assert is_immutable(host.path("a.img"))


OLD: dict[str, Callable[[Host, Record], object]] = {
    "release with a wipe": lambda host, record: host.driver.wiper.give_up(record, quiet, delete=False),
    "release --delete": lambda host, record: host.driver.wiper.give_up(record, quiet, delete=True),
    "wipe": lambda host, record: host.driver.wiper.wipe(record.allocations[0].spec, quiet, record),
    "wipe the path": lambda host, record: host.driver.wiper.wipe(record.allocations[0].spec, quiet, owners=[record]),
    "start": lambda host, record: host.driver.prepare(host.domain("a.img")),
    "define": lambda host, record: host.driver.define(host.domain("a.img", ram=600 * MIB)),
}


@pytest.mark.parametrize("knows_new_owner", [False, True])
@pytest.mark.parametrize("way", list(OLD))
def test_a_file_that_has_got_another_owner_since_the_backup_of_the_ledger_is_his(
    tmp_path: Path, fs: FileSystem, way: str, knows_new_owner: bool
) -> None:
    """In the old ledger it is x's still, with the same inode; y may have had another file in that slot then."""
    host = Host(tmp_path, fs)
    host.define("a.img")
    host.define("old.img", OTHER_UUID)
    old = another_state_dir(host, "old")
    for record in host.driver.ledger.domains():
        if record.uuid == UUID or knows_new_owner:
            old.driver.ledger.store(record.uuid, record.name, record.ram, record.allocations)
    host.driver.forget(UUID)
    host.driver.define(host.domain("a.img", OTHER_UUID))
    with pytest.raises(NvdimmError, match=r"has the mark of domain y .* the ledger does not know that"):
        OLD[way](old, old.record())
    assert host.read("a.img") == DATA
    assert host.mark("a.img")
    assert not is_immutable(host.path("a.img"))


def test_a_copy_of_a_file_with_its_mark_can_be_another_domains(tmp_path: Path, fs: FileSystem) -> None:
    """As made by 'cp -a': the file that the mark means is another, and has the mark, too."""
    host = Host(tmp_path, fs)
    host.define("a.img")
    run("cp", "-a", "--sparse=never", "--reflink=never", host.path("a.img"), host.path("copy.img"))
    assert host.mark("copy.img") == host.mark("a.img")
    host.driver.define(host.domain("copy.img", OTHER_UUID))
    assert look(host.driver) == []


def test_a_ledger_of_a_version_that_kept_no_identity_is_refused_nothing(tmp_path: Path, fs: FileSystem) -> None:
    """The domain's own mark is enough."""
    host = Host(tmp_path, fs, wipe=True)
    host.define("a.img")
    item = host.record().allocations[0]
    host.driver.ledger.store(UUID, "x", 512 * MIB, [replace(item, identity=None)])
    host.driver.wiper.give_up(host.record(), quiet, delete=True)
    assert not os.path.exists(host.path("a.img"))
    with pytest.raises(BackingError):
        host.driver.backings[0].locate(item.spec)


# --- the owner of a folder exchanges names in it, after the ledger was lost ---


def exchange(host: Host, one: str, other: str) -> None:
    """Do what renameat2(RENAME_EXCHANGE) does with two names."""
    aside = host.path("aside")
    os.rename(host.path(one), aside)
    os.rename(host.path(other), host.path(one))
    os.rename(aside, host.path(other))


@pytest.fixture
def lost(tmp_path: Path, fs: FileSystem) -> Host:
    """A host that has lost its ledger, in which domain x has victim.img."""
    host = Host(tmp_path, fs)
    host.define("victim.img")
    return another_state_dir(host, "lost")


@pytest.mark.parametrize("slot", [0, 1])
def test_a_define_does_not_take_anothers_file_that_is_put_in_place_while_zeros_are_written(
    lost: Host, monkeypatch: pytest.MonkeyPatch, slot: int
) -> None:
    names = "own.img", "second.img"
    for name in names:
        Path(lost.path(name)).write_bytes(bytes(SIZE))
    provision = lost.backing.provision

    def exchanged(spec: NvdimmSpec, *rest: Any) -> BackingIdentity:
        if spec.slot == slot:
            exchange(lost, "own.img", "victim.img")
        return provision(spec, *rest)

    monkeypatch.setattr(lost.backing, "provision", exchanged)
    before = lost.mark("victim.img")
    nvdimms = tuple(NvdimmSpec(slot, lost.path(name), SIZE) for slot, name in enumerate(names))
    with pytest.raises(NvdimmError, match=r"own\.img (has the mark of domain x|is not the backing)"):
        lost.driver.define(DomainSpec("y", OTHER_UUID, 512 * MIB, None, nvdimms))
    assert lost.driver.ledger.find_domain(OTHER_UUID) is None
    assert lost.read("own.img") == DATA
    assert lost.mark("own.img") == before


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_start_freezes_nothing_that_is_anothers_by_its_mark(
    lost: Host, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A ledger from a backup gives the file to domain y, which had it once."""
    Path(lost.path("own.img")).write_bytes(bytes(SIZE))
    lost.driver.define(lost.domain("own.img", OTHER_UUID))
    identity = lost.backing.identify(lost.path("victim.img"))
    items = [replace(item, identity=identity) for item in lost.record(OTHER_UUID).allocations]
    lost.driver.ledger.store(OTHER_UUID, "y", 512 * MIB, items)
    check, freeze = ownership.check_marks, lost.driver.starts.freeze

    def away(*arguments: Any) -> None:
        if moment == "before":
            exchange(lost, "own.img", "victim.img")
        check(*arguments)

    def back(*arguments: Any) -> Start:
        exchange(lost, "own.img", "victim.img")
        return freeze(*arguments)

    monkeypatch.setattr(ownership, "check_marks", away)
    monkeypatch.setattr(lost.driver.starts, "freeze", back)
    with pytest.raises(NvdimmError, match=r"own\.img (has the mark of domain x|is not the backing)"):
        lost.driver.prepare(lost.domain("own.img", OTHER_UUID))
    assert not is_immutable(lost.path("own.img"))
    assert not is_immutable(lost.path("victim.img"))


def test_a_file_that_cannot_be_read_is_not_taken_for_none(lost: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = lost.driver.definitions.unknown
    path = lost.path("victim.img")

    def fail(fd: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(inode, "owner", fail)
        with pytest.raises(BackingError, match=r"victim\.img: Input/output error"):
            unknown.check(OTHER_UUID, {path: None})
    lease = os.open(path, os.O_RDWR)
    fcntl.fcntl(lease, fcntl.F_SETSIG, signal.SIGURG)  # SIGIO would end this process
    fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    with pytest.raises(BackingError, match=r"victim\.img: .*another program has a lease on it"):
        unknown.check(OTHER_UUID, {path: None})
    os.close(lease)
    os.rename(path, lost.path("aside"))
    os.symlink(lost.path("aside"), path)
    with pytest.raises(TurnedError, match="a part of the path has become a symbolic link"):
        unknown.check(OTHER_UUID, {path: None})
    os.unlink(path)
    unknown.check(OTHER_UUID, {path: None})


@pytest.mark.parametrize("kind", ["tmpfs", "proc"])
def test_a_file_system_that_keeps_no_marks_has_no_domains_file(lost: Host, tmp_path: Path, kind: str) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    run("mount", "-t", kind, "none", mounted)
    try:
        path = mounted / ("uptime" if kind == "proc" else "file")
        if kind == "tmpfs":
            path.touch()
        lost.driver.checks.check_unowned(str(path))
    finally:
        run("umount", mounted)


def test_a_claim_is_given_up_whose_folder_has_become_a_link(lost: Host) -> None:
    """Its owner has turned it: the domain that had the file can end, and be forgotten."""
    os.mkdir(lost.path("g"))
    domain = lost.domain("g/a.img", OTHER_UUID)
    lost.driver.define(domain)
    lost.mapper.alive[9] = OTHER_UUID
    lost.driver.prepare(domain)
    map_prepared(lost.driver.ledger, 9, OTHER_UUID)
    os.rename(lost.path("g"), lost.path("h"))
    os.symlink(lost.path("h"), lost.path("g"))
    del lost.mapper.alive[9]
    lost.driver.release(OTHER_UUID)
    lost.driver.forget(OTHER_UUID)
    assert lost.driver.ledger.find_domain(OTHER_UUID) is None
