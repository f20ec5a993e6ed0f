# SPDX-License-Identifier: Apache-2.0
"""The power fails, and all that was not synced is lost: the ledger in use is that one still, and files are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver import host_files
from nvdimm_driver.cmd import apparmor_rules
from nvdimm_driver.cmd.ctl import pool_create
from nvdimm_driver.cmd.installed_files import install, remove
from nvdimm_driver.device_marks import DeviceMarks
from nvdimm_driver.pools.create import WriteFile
from nvdimm_driver.registered import MARK
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.reserve import Reserve
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.unit.test_device_marks import device

NO_WISH: Any = None
WRITERS: dict[str, Callable[[Path, str], object]] = {
    "register": lambda path, text: install(path, text, 0o755),
    "AppArmor's rules": lambda path, text: list(apparmor_rules._write(path.parent.parent / path.name, text)),
    "pool create": lambda path, text: pool_create._do(WriteFile(str(path), text), NO_WISH),
    "tables of a start": lambda path, text: Reserve(f"{path}-reserve").write(path, text.encode()),
    "mark of a device": lambda path, text: DeviceMarks(path.parent).set_owner(device(), text.encode()),
}


@contextmanager
def after_a_cut(fs: FileSystem, where: Path) -> Iterator[Path]:
    """Mount what is on the disk now, of which nothing was synced that the work before has not."""
    run("cp", "--sparse=always", fs.image, fs.memory / "after")
    where.mkdir()
    run("mount", "-o", "loop,nouuid" if fs.kind == "xfs" else "loop", fs.memory / "after", where)
    try:
        yield where / "folder"
    finally:
        run("umount", where)


@pytest.fixture(params=list(MKFS))
def fs(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem]) -> Iterator[FileSystem]:
    fs = file_systems[request.param]
    (fs.root / "folder/local").mkdir(parents=True)
    yield fs
    shutil.rmtree(fs.root / "folder")


def test_a_ledger_that_was_taken_over(file_systems: dict[str, FileSystem], tmp_path: Path) -> None:
    """Otherwise its guests could not go on that were saved with devices since."""
    fs = file_systems["ext4"]
    folder = fs.root / "state"
    folder.mkdir()
    Ledger(str(folder / "ledger.sqlite")).close()
    run("sync", "-f", folder)
    (folder / "ledger.sqlite").rename(folder / "lost")
    with closing(Ledger(str(folder / "ledger.sqlite"))) as ledger:
        ledger.take_over(compared=True)
        shutil.copy(fs.image, fs.memory / "after")
    run("mount", "-o", "loop", fs.memory / "after", tmp_path)
    try:
        with closing(Ledger(str(tmp_path / "state/ledger.sqlite"))) as ledger:
            assert not ledger.is_from_elsewhere()
    finally:
        run("umount", tmp_path)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_the_driver_has_written_is_whole(fs: FileSystem, tmp_path: Path, writer: str) -> None:
    """Another program syncs the folder, and so the new name: XFS had no bytes for it then."""
    folder = fs.root / "folder/local"
    path = Path(DeviceMarks(folder).owner_file(device())) if "mark" in writer else folder / "file"
    WRITERS[writer](path, f"{MARK}\nold\n")
    run("sync", "-f", folder)
    WRITERS[writer](path, f"{MARK}\nnew\n")
    host_files.sync_folder(folder)
    with after_a_cut(fs, tmp_path / "after") as found:
        assert (found / "local" / path.name).read_text() == f"{MARK}\nnew\n"


def test_what_unregister_has_removed_stays_away(fs: FileSystem, tmp_path: Path) -> None:
    """libvirt would run a hook of a package that is gone."""
    path = fs.root / "folder/hook"
    install(path, f"{MARK}\n", 0o755)
    run("sync", "-f", path)
    remove(path)
    with after_a_cut(fs, tmp_path / "after") as found:
        assert not os.path.exists(found / "hook")
