# SPDX-License-Identifier: Apache-2.0
"""Resolving of the paths that users name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvdimm_driver.backing import paths
from nvdimm_driver.errors import BackingError

LONGEST = "/a" * (paths.PATH_MAX // 2) + "/"


def test_a_path_that_the_kernel_takes_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    assert paths.resolve(str(tmp_path / "link")) == str(tmp_path / "file")
    assert len(LONGEST) == paths.PATH_MAX
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
