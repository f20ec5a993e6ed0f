# SPDX-License-Identifier: Apache-2.0
"""Commands in hints, with names that their users have chosen to run something, on real ext4 and XFS."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvdimm_driver.backing.paths import resolve_new
from nvdimm_driver.cmd.ctl.base import path_argument
from nvdimm_driver.cmd.ctl.check import _find_only, _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.errors import NotFoundError, NvdimmError, UsageError
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import SIZE, Host, empty, quiet
from tests.unit.doubles import OTHER_UUID, UUID

NOBODY = 65534
NASTY = "a'; touch PWNED; '.img"


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem], tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param], wipe=True)
    empty(file_systems[request.param])


def domain(name: str, path: str, uuid: str = UUID) -> DomainSpec:
    return DomainSpec(name, uuid, 512 * MIB, None, (NvdimmSpec(0, path, SIZE),))


def truncate(host: Host, path: str) -> None:
    host.driver.define(domain(NASTY, path))
    os.truncate(path, SIZE // 2)


def delete(host: Host, path: str) -> None:
    host.driver.define(domain(NASTY, path))
    os.unlink(path)


def copy(host: Host, path: str) -> None:
    """Leave a copy with the mark in the place of what is gone."""
    host.driver.define(domain(NASTY, path))
    run("cp", "-a", "--reflink=never", path, f"{path}.bak")
    os.unlink(path)


def make_sparse(host: Host, path: str) -> None:
    del host
    with open(path, "wb") as file:
        file.truncate(SIZE)


def own(host: Host, path: str) -> None:
    host.driver.define(domain(NASTY, path))


@pytest.mark.parametrize("prepare", [truncate, delete, copy, make_sparse, own])
def test_each_command_has_a_name_as_one_word(host: Host, prepare: Callable[[Host, str], None]) -> None:
    """After all quoted names are taken out, none is left in a command."""
    folder = Path(host.path("g; touch PWNED"))
    folder.mkdir()
    path = str(folder / NASTY)
    prepare(host, path)
    hints = [each.remedy for each in look(host.driver)]
    for uuid in (UUID, OTHER_UUID):
        for step in (
            lambda uuid=uuid: host.driver.define(domain("x", path, uuid)),
            lambda: host.driver.release_claims(host.record(), quiet, delete=True, slot=0),
        ):
            try:
                step()
            except (NvdimmError, AssertionError) as error:
                hints.append(getattr(error, "hint", ""))
    programs = r"nvdimmctl [a-z]|fallocate |mkdir |cp -|setfattr -|rm |mv |find "
    for hint in hints:
        for found in re.finditer(programs, hint):
            rest = hint[found.start() :]
            for name in (path, str(folder), f"{path}.bak", NASTY):
                rest = rest.replace(shlex.quote(name), "NAME")
            assert "PWNED" not in rest, hint
            assert "'NAME" not in rest, hint


def test_the_command_for_a_folder_that_is_gone(host: Host) -> None:
    folder = Path(host.path("g; touch PWNED"))
    folder.mkdir()
    path = str(folder / "a.img")
    host.driver.define(domain("x", path))
    os.unlink(path)
    folder.rmdir()
    with pytest.raises(NvdimmError) as error:
        host.driver.release_claims(host.record(), quiet, delete=False, slot=0)
    assert str(folder) in shlex.split(error.value.hint.split("gone for good: ")[1])


def only(host: Host, *words: str, zeros: tuple[str, ...] = ()) -> Callable[[], list[Inconsistency]]:
    return lambda: _find_only(host.driver, [*words, *zeros], lambda: look(host.driver, zeros=zeros))


@pytest.mark.parametrize("word", ["path", "x", UUID, "zeros"])
def test_a_repair_of_one_gives_up_no_other(host: Host, word: str) -> None:
    """The backup of another domain's file is still being fetched."""
    host.define("a.img")
    host.define("b.img", OTHER_UUID)
    os.truncate(host.path("a.img"), SIZE // 2)
    os.unlink(host.path("b.img"))
    assert {each.path for each in look(host.driver)} == {host.path("a.img"), host.path("b.img")}
    path = host.path("a.img")
    find = only(host, zeros=(path,)) if word == "zeros" else only(host, path if word == "path" else word, zeros=(path,))
    assert [row[-1] for row in _repair(find)] == ["yes"]
    assert find() == []
    with pytest.raises(NvdimmError):
        host.driver.define(host.domain("b.img", OTHER_UUID))
    (left,) = look(host.driver)
    assert left.path == host.path("b.img")


def test_a_repair_of_a_file_puts_its_domains_old_start_away_first(host: Host) -> None:
    host.run(host.domain("a.img"))
    host.mapper.alive.clear()
    found = only(host, host.path("a.img"))()
    assert "" in {each.path for each in found}


def test_a_word_that_is_neither_a_path_nor_a_domain_is_refused(host: Host) -> None:
    host.define("a.img")
    with pytest.raises(NotFoundError):
        only(host, "nobody")()


@pytest.mark.parametrize("word", ["uuid", "name"])
def test_a_domain_with_the_name_of_another_is_not_listed_for_it(host: Host, word: str) -> None:
    """Users choose names: one may be another domain's uuid, or its name after that was undefined and kept its claim."""
    name = UUID if word == "uuid" else "x"
    host.define("a.img")
    host.driver.define(domain(name, host.path("b.img"), OTHER_UUID))
    os.unlink(host.path("a.img"))
    os.unlink(host.path("b.img"))
    assert [each.path for each in only(host, UUID)()] == [host.path("a.img")]
    assert [each.path for each in only(host, OTHER_UUID.upper())()] == [host.path("b.img")]
    if word == "name":
        with pytest.raises(UsageError, match="'x' is the name or id of 2 domains"):
            only(host, "x")()


@pytest.mark.parametrize("word", ["uuid", "path"])
def test_a_repair_of_a_domain_repairs_no_other_of_its_name(host: Host, word: str) -> None:
    """The start of the other is over, which is a finding without a path."""
    host.run(host.domain("a.img"))
    host.driver.define(domain("x", host.path("b.img"), OTHER_UUID))
    host.mapper.alive.clear()
    assert (UUID, "") in {(each.uuid, each.path) for each in look(host.driver)}
    assert _repair(only(host, host.path("b.img") if word == "path" else OTHER_UUID)) == []
    assert host.record().start is not None


def test_a_domain_that_only_marks_know_is_listed_by_its_uuid_and_name(host: Host, tmp_path: Path) -> None:
    host.define("a.img")
    (tmp_path / "new").mkdir()
    for word in (UUID, "x"):
        found = only(Host(tmp_path / "new", host.fs), word)()
        assert [(each.uuid, each.path) for each in found] == [(UUID, host.path("a.img"))]


def test_a_path_that_has_become_a_link_means_nothing(host: Host) -> None:
    """The backup of the other domain's file is still being fetched, and a hint names a path in a folder of a user's."""
    folder = Path(host.path("folder"))
    folder.mkdir()
    path = folder / "f.img"
    os.chown(folder, NOBODY, NOBODY)
    host.define("a.img")
    host.driver.define(domain("evil", str(path), OTHER_UUID))
    os.truncate(host.path("a.img"), SIZE // 2)
    path.unlink()
    path.symlink_to(host.path("a.img"))
    for use in (
        lambda: _repair(only(host, str(path))),
        lambda: path_argument(str(path)),
        lambda: path_argument(str(path), resolve_new),
    ):
        with pytest.raises(UsageError, match=f"f.img leads to {host.path('a.img')} by a symbolic link, and others"):
            use()
    assert os.path.getsize(host.path("a.img")) == SIZE // 2
    assert host.record().allocations[0].ready


def test_links_of_root_are_followed(host: Host, tmp_path: Path) -> None:
    host.define("a.img")
    (tmp_path / "link").symlink_to(host.fs.root)
    assert path_argument(f"{tmp_path}/link/a.img") == host.path("a.img")


def users_file(host: Host, name: str = "sub/f.img") -> str:
    """Return a path in a folder of a user's in the pool."""
    path = Path(host.path("users")) / name
    path.parent.mkdir(parents=True)
    for folder in (path.parent, Path(host.path("users"))):
        os.chown(folder, NOBODY, NOBODY)
    return str(path)


FOREIGN = r"(?<![\w/])(cp|mkdir|fallocate|setfattr|qemu-img|mv|rm|chmod|chown|truncate|dd) [^;]*"


@pytest.mark.parametrize("prepare", [truncate, delete, copy, make_sparse, own])
def test_no_program_that_follows_links_gets_a_path_of_a_users(host: Host, prepare: Callable[[Host, str], None]) -> None:
    """He turns a folder or name on its way into a link before root pastes the command."""
    path = users_file(host)
    prepare(host, path)
    hints = [each.remedy for each in look(host.driver)]
    for step in (
        lambda: host.driver.define(domain("x", path, OTHER_UUID)),
        lambda: host.driver.release_claims(host.record(), quiet, delete=True, slot=0),
        lambda: shutil.rmtree(os.path.dirname(path)),
        lambda: host.driver.release_claims(host.record(), quiet, delete=True, slot=0),
    ):
        try:
            step()
        except (NvdimmError, AssertionError) as error:
            hints.append(getattr(error, "hint", ""))
    assert any(hints)
    for hint in hints:
        assert all("users" not in found[0] for found in re.finditer(FOREIGN, hint)), hint


def test_a_backup_is_copied_by_the_user_who_has_the_folder(host: Host) -> None:
    theirs, roots = users_file(host), host.path("a.img")
    for path, uuid in ((theirs, UUID), (roots, OTHER_UUID)):
        host.driver.define(domain("x", path, uuid))
        os.truncate(path, SIZE // 2)
    remedies = {each.path: each.remedy for each in look(host.driver)}
    assert "not as root, but as a user who may write to its folder" in remedies[theirs]
    assert f": cp --sparse=never BACKUP {roots};" in remedies[roots]


def test_a_sparse_file_is_imported_as_the_hint_says(host: Host) -> None:
    path = users_file(host)
    make_sparse(host, path)
    with pytest.raises(NvdimmError) as error:
        host.driver.define(domain("x", path))
    assert f": nvdimmctl import {path};" in error.value.hint
    host.driver.importer.import_in_place(path, None, 0, quiet)
    host.driver.define(domain("x", path))
