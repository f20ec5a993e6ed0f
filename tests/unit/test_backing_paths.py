# SPDX-License-Identifier: Apache-2.0
"""Resolving of the paths that users name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvdimm_driver.backing import paths
from nvdimm_driver.errors import BackingError
from nvdimm_driver.host_files import PATH_MAX

LONGEST = "/a" * (PATH_MAX // 2) + "/"


def test_a_path_that_the_kernel_takes_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    assert paths.resolve(str(tmp_path / "link")) == str(tmp_path / "file")
    assert len(LONGEST) == PATH_MAX
    assert paths.resolve(LONGEST) == LONGEST.rstrip("/")
    with pytest.raises(FileNotFoundError):
        os.stat(LONGEST)


@pytest.mark.parametrize("path", [LONGEST + "b", "/" + "é" * 2048])
def test_a_longer_one_is_refused_before_the_host_is_looked_at(path: str) -> None:
    """Resolving takes time by the square of the length, in a thread that nothing can stop."""
    with pytest.raises(OSError, match="File name too long"):
        os.stat(path)
    for resolve in (paths.resolve, paths.resolve_new):
        with pytest.raises(BackingError, match=r"^/.{79}…: the path has \d+ bytes, and may have 4095"):
            resolve(path)


def test_only_the_way_in_refuses_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert paths.resolve(f"{tmp_path}/loop/a.img") == f"{tmp_path}/loop/a.img"
    for resolve in (paths.resolve_strictly, paths.resolve_new):
        with pytest.raises(BackingError, match="more than 40 symbolic links, or one that leads back to itself"):
            resolve(f"{tmp_path}/loop/a.img")


def test_a_path_that_cannot_be_followed_is_no_other_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.img").touch()
    path = f"{tmp_path}/loop/../a.img"
    assert paths.resolve(f"/{path}//.") == path
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        os.stat(path)
    with pytest.raises(OSError, match=r"has '\.\.' in it"):
        paths.open_resolved(path, os.O_PATH)


def test_a_path_can_be_turned_by_who_may_replace_a_folder_or_link_on_its_way(tmp_path: Path) -> None:
    """The link is root's, and what is behind it is a user's."""
    roots, users, shared = tmp_path / "roots", tmp_path / "users", tmp_path / "shared"
    for folder in (roots, users / "sub", shared):
        folder.mkdir(parents=True)
    os.chown(users, 65534, 65534)
    shared.chmod(0o1777)
    for folder in (roots, users / "sub", shared):
        (folder / "a.img").write_bytes(b"")
    (shared / "his").symlink_to(roots)
    os.lchown(shared / "his", 65534, 65534)
    for name, target in (("link", users), ("loop", "loop"), ("up", "roots/../users/sub"), ("down", roots)):
        (tmp_path / name).symlink_to(target)
    turned = {
        "roots/a.img": False,
        "roots/missing": False,
        "roots/missing/a.img": False,
        "down/a.img": False,
        "users": False,
        "users/sub/a.img": True,
        "users/missing": True,
        "link/sub/a.img": True,
        "up/a.img": True,
        "loop": True,
        "shared/a.img": False,
        "shared/missing": True,
        "shared/his/a.img": True,
    }
    assert {path: paths.others_can_turn(f"{tmp_path}/{path}") for path in turned} == turned
    roots.chmod(0o775)
    assert paths.others_can_turn(f"{roots}/a.img")


def test_only_the_folder_of_what_is_written_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder/file").symlink_to("elsewhere")
    assert paths.resolve_folder(f"{tmp_path}/link/file") == f"{tmp_path}/folder/file"
    (tmp_path / "folder/sub").mkdir()
    (tmp_path / "down").symlink_to("folder/sub")
    assert paths.resolve_folder(f"{tmp_path}/down/../file") == f"{tmp_path}/folder/file", "as the kernel follows it"
    assert [paths.resolve_folder(f"{tmp_path}/down/{end}") for end in ("..", ".", "")] == [
        f"{tmp_path}/folder",
        f"{tmp_path}/folder/sub",
        f"{tmp_path}/down",
    ]
