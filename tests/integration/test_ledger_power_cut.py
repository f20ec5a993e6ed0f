# SPDX-License-Identifier: Apache-2.0
"""The power fails, and all is lost that was not synced: the ledger in use is that one still."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

from nvdimm_driver.state.ledger import Ledger
from tests.integration.loop_pmem import FileSystem, run


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
