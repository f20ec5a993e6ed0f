# SPDX-License-Identifier: Apache-2.0
"""A define that is killed at any point, or meets another, takes nothing from the domain, and gives nothing to another.

The points are found by the tests: before and after each change of the ledger and of a backing is one. After the kill,
nothing that the process would do yet has an effect, its own cleaning up included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError, NvdimmError, RefusedError
from nvdimm_driver.model import GIB, MIB, BackingIdentity, NvdimmSpec, Pool, Progress, Record
from nvdimm_driver.plugins import unwatched
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state.ledger import Ledger
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, domain, make_driver

A, B, C, D = (f"/mnt/pmem0/{name}" for name in "abcd")


class KilledError(BaseException):
    """The process ends here."""


class Life:
    """The life of a process, up to one of its points; what it does later has no effect.

    :ivar points: how many it has passed.
    :ivar at: the one at which it is killed.
    :ivar then: called at that point instead, once.
    """

    def __init__(self) -> None:
        self.points = 0
        self.at = 0
        self.then: Callable[[], None] | None = None

    def point(self) -> None:
        self.points += 1
        if self.then is not None:
            if self.points == self.at:
                self.then()
        elif self.at and self.points >= self.at:
            raise KilledError


class Host:
    """A host on which one process may be killed, and another one looks at what is left.

    The domain has A and B, which a definition with more RAM would put at other bases if it did not know theirs.
    """

    def __init__(self, folder: Path, *, quota: int | None = None) -> None:
        folder.mkdir()
        life = self.life = Life()

        class MortalLedger(Ledger):
            def _write(self, *arguments: Any, **named: Any) -> bool:
                life.point()
                written = super()._write(*arguments, **named)
                life.point()
                return written

        class MortalBacking(MemoryBacking):
            def provision(
                self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
            ) -> BackingIdentity:
                life.point()
                provisioned = super().provision(spec, progress, identity)
                life.point()
                return provisioned

            def discard(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
                life.point()
                super().discard(spec, identity)
                life.point()

            def mark(self, path: str, owner: bytes | None, identity: BackingIdentity | None = None) -> None:
                life.point()
                super().mark(path, owner, identity)
                life.point()

        self.backing = MemoryBacking()
        self.mapper = RecordingMapper()
        self.pools = Pools([Pool("main", "memory", ("/mnt/pmem0",), quota, MIB, 0, False)])
        mortal = MortalBacking()
        mortal.__dict__ = self.backing.__dict__
        self.mortal = make_driver(folder, mortal, self.mapper, pools=self.pools, ledger=MortalLedger)
        self.other = make_driver(folder, self.backing, self.mapper, pools=self.pools)
        for driver in (self.mortal, self.other):
            driver.locks.seconds = driver.starts.release_seconds = 0.0
            driver.ledger._write([("PRAGMA synchronous = OFF", ())], begin="")

    def define_first(self) -> Record:
        self.other.define(domain(A, B))
        self.backing.files[D] = (107, 64 * MIB)
        return self.record()

    def record(self) -> Record:
        record = self.other.ledger.find_domain(UUID)
        assert record is not None
        return record

    def kill(self, work: Callable[[XenNvdimmDriver], object], at: int) -> bool:
        """Let the mortal process work until point `at`; return False if it has fewer points."""
        self.life.points, self.life.at = 0, at
        with suppress(KilledError):
            work(self.mortal)
        self.life.at = 0
        return self.life.points >= at

    def close(self) -> None:
        self.mortal.ledger.close()
        self.other.ledger.close()


def redefine(driver: XenNvdimmDriver) -> None:
    driver.define(domain(A, B, C, ram=8 * GIB))


def give_up_the_first(driver: XenNvdimmDriver) -> None:
    spec = domain(A, B, ram=8 * GIB)
    (_, second) = spec.nvdimms
    driver.define(type(spec)(spec.name, spec.uuid, spec.ram, None, (second,)))


def adopt(driver: XenNvdimmDriver) -> None:
    """Start the domain with a file that nobody has defined it with, and without B."""
    driver.prepare(domain(A, D, ram=8 * GIB))


def create_in_vain(driver: XenNvdimmDriver) -> None:
    """Do what ``virsh create`` with another file does before and after libvirt refuses it."""
    before = driver.state_of(UUID)
    other = domain(C, ram=8 * GIB)
    driver.undo(UUID, before, driver.create(other, driver.check(other)), None)


@pytest.mark.parametrize("work", [redefine, give_up_the_first, adopt, create_in_vain])
def test_a_kill_at_any_point_takes_nothing_from_the_domain(
    tmp_path: Path, work: Callable[[XenNvdimmDriver], object]
) -> None:
    for at in range(1, 200):
        host = Host(tmp_path / str(at))
        before = host.define_first()
        within = host.kill(work, at)
        now = host.record()
        had = {item.identity: item.base for item in before.allocations}
        has = {item.identity: item.base for item in now.allocations}
        given_up = {before.allocations[0].identity} if work is give_up_the_first else set()
        assert had.keys() - given_up <= has.keys()
        assert all(has[each] == had[each] for each in had.keys() & has.keys())
        slots = {item.identity: item.spec.slot % 256 for item in now.allocations}
        for item in before.allocations:
            assert slots.get(item.identity, item.spec.slot) == item.spec.slot
            if item.identity in has:
                with pytest.raises(InUseError):
                    host.other.define(domain(item.spec.path, uuid=OTHER_UUID, name="stranger"))
        for finding in look(host.other):
            assert finding.mend is not None, finding
            finding.mend()
        assert look(host.other) == []
        assert host.record().intents == ()
        work(host.other)
        host.other.release(UUID)
        bases = {item.identity: item.base for item in host.record().allocations}
        assert all(bases[each] == had[each] for each in had.keys() & bases.keys())
        host.close()
        if not within:
            return
    raise AssertionError("it does not end")


def test_a_kill_within_the_first_define_leaves_an_intent(tmp_path: Path) -> None:
    """No other domain can have its path until the define is repeated, or given up."""
    seen = 0
    for at in range(1, 200):
        host = Host(tmp_path / str(at))
        within = host.kill(lambda driver: driver.define(domain(A, B)), at)
        record = host.other.ledger.find_domain(UUID)
        if record is not None and record.intents:
            seen += 1
            assert record.allocations == ()
            with pytest.raises(InUseError, match="belongs to domain db1"):
                host.other.define(domain(B, uuid=OTHER_UUID, name="stranger"))
            assert {finding.path for finding in look(host.other)} >= {A, B}
        host.other.define(domain(A, B))
        assert look(host.other) == []
        host.close()
        if not within:
            break
    assert seen >= 4


# --- two at once ---


def at_each_point(
    tmp_path: Path, quota: int | None, check: Callable[[Host, list[Exception]], None], *paths: str
) -> None:
    """Let two domains be defined at once: the second at each point of the first; look at what came of it."""
    for at in range(1, 200):
        host = Host(tmp_path / str(at), quota=quota)
        refused: list[Exception] = []

        def second() -> None:
            try:
                host.other.define(domain(paths[1], uuid=OTHER_UUID, name="db2"))  # noqa: B023
            except NvdimmError as error:
                refused.append(error)  # noqa: B023

        plan = host.mortal.check(domain(paths[0]))
        host.life.points, host.life.at, host.life.then = 0, at, second
        try:
            host.mortal.define(domain(paths[0]), plan)
        except NvdimmError as error:
            refused.append(error)
        within = host.life.points >= at
        host.life.then, host.life.at = None, 0
        if within:
            check(host, refused)
        host.close()
        if not within:
            return
    raise AssertionError("it does not end")


def test_two_defines_at_once_do_not_exceed_a_quota(tmp_path: Path) -> None:
    def check(host: Host, refused: list[Exception]) -> None:
        (error,) = refused
        assert isinstance(error, RefusedError)
        assert "of its quota of 96 MiB; 64 MiB more is too much" in str(error)
        assert sum(item.spec.size for record in host.other.ledger.domains() for item in record.claims) == 64 * MIB

    at_each_point(tmp_path, 96 * MIB, check, A, B)


def test_two_defines_at_once_do_not_get_one_path(tmp_path: Path) -> None:
    def check(host: Host, refused: list[Exception]) -> None:
        assert [type(error) for error in refused] == [InUseError]
        assert len(host.other.ledger.domains()) == 1
        assert set(host.backing.files) == {A}

    at_each_point(tmp_path, None, check, A, A)


def test_two_defines_at_once_do_not_get_one_file_by_two_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As through a bind mount: neither path is in the other's words, and the file does not exist before."""

    class OneFile(dict[str, tuple[int, int]]):
        """Files of which A and B are one."""

        def __getitem__(self, path: str) -> tuple[int, int]:
            return super().__getitem__(A if path == B else path)

        def __setitem__(self, path: str, value: tuple[int, int]) -> None:
            super().__setitem__(A if path == B else path, value)

        def __delitem__(self, path: str) -> None:
            super().__delitem__(A if path == B else path)

        def __contains__(self, path: object) -> bool:
            return super().__contains__(A if path == B else path)

    plain = MemoryBacking.__init__

    def with_one_file(self: MemoryBacking) -> None:
        plain(self)
        self.files = OneFile()

    monkeypatch.setattr(MemoryBacking, "__init__", with_one_file)

    def check(host: Host, refused: list[Exception]) -> None:
        assert [type(error) for error in refused] == [InUseError]
        (record,) = host.other.ledger.domains()
        assert len(record.claims) == 1
        assert set(host.backing.files) == {A}

    at_each_point(tmp_path, None, check, A, B)


def test_what_is_kept_counts_in_the_quota(tmp_path: Path) -> None:
    """A guest that libvirt creates beside its domain's definition has its NVDIMMs besides."""
    host = Host(tmp_path / "host", quota=96 * MIB)
    host.other.define(domain(A))
    with pytest.raises(RefusedError, match="of its quota"):
        host.other.create(domain(B), host.other.check(domain(B)))
    assert [item.spec.path for item in host.record().claims] == [A]


# --- a create that fails ---


def test_a_create_that_fails_leaves_the_record_of_before(tmp_path: Path) -> None:
    host = Host(tmp_path / "host")
    before, marks = host.define_first(), host.backing.owners()
    create_in_vain(host.other)
    assert host.record() == before
    assert host.backing.owners() == marks
    assert C not in host.backing.files


def test_a_create_that_fails_beside_a_running_guest_leaves_what_it_has(tmp_path: Path) -> None:
    host = Host(tmp_path / "host")
    host.define_first()
    host.other.prepare(domain(A, B))
    before = host.record()
    create_in_vain(host.other)
    assert host.record() == before
    assert host.backing.frozen == {A, B}


def test_a_define_that_fails_to_give_a_file_back_to_its_guest_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path / "host")
    host.define_first()
    host.other.prepare(domain(A, B))
    host.other.define(domain(A))
    before = host.record()
    monkeypatch.setattr(host.other.definitions, "_mark", _refuse)
    with pytest.raises(OSError, match="no room"):
        host.other.define(domain(A, B))
    monkeypatch.undo()
    assert host.record() == before
    assert host.backing.frozen == {A, B}
    host.other.release(UUID)
    host.other.define(domain(B, uuid=OTHER_UUID, name="other"))


def _refuse(*_: object) -> None:
    raise OSError("no room")


def test_a_create_that_fails_while_its_guest_lives_keeps_what_that_has(tmp_path: Path) -> None:
    """Frames of a file that is deleted would be another file's next."""
    host = Host(tmp_path / "host")
    host.define_first()
    before = host.other.state_of(UUID)
    created = host.other.create(domain(C), host.other.check(domain(C)))
    host.other.prepare(domain(C))
    host.mapper.alive = {7: UUID}
    start = host.other.ledger.find_prepared(UUID)
    assert start is not None
    host.other.ledger.begin_mapping(start, 7)
    host.other.undo(UUID, before, created, host.record())
    assert C in host.backing.files
    assert {item.spec.path for item in host.record().allocations} == {A, B, C}
    with pytest.raises(InUseError):
        host.other.define(domain(C, uuid=OTHER_UUID, name="stranger"))
