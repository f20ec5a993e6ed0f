# SPDX-License-Identifier: Apache-2.0
"""Files outside persistent memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvdimm_driver.contents import ordinary_files
from nvdimm_driver.errors import BackingError, NotFoundError, RefusedError, UnsupportedError
from nvdimm_driver.model import MIB


def test_a_source_is_a_file_or_a_block_device(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with ordinary_files.open_source(str(tmp_path / "link")) as source:
        assert source.read(0, source.size) == b"content"
    with pytest.raises(NotFoundError, match="there is no such file"):
        ordinary_files.open_source(str(tmp_path / "none"))
    for other in (tmp_path, Path("/dev/null")):
        with pytest.raises(BackingError, match="is neither a file nor a block device"):
            ordinary_files.open_source(str(other))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"KDMV\1\0\0\0", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>", "vdi"),
        (b"QED\0", "qed"),
    ],
)
def test_images_of_other_formats(head: bytes, kind: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"in format {kind} and has to be raw.*qemu-img convert -f {kind} -O raw /a /a.raw"
    ):
        ordinary_files.check_raw("/a", head)


@pytest.mark.parametrize("head", [b"", bytes(512), b"\xebc\x90", b"QFI"])
def test_raw_images(head: bytes) -> None:
    ordinary_files.check_raw("/a", head)


def test_a_destination_is_gone_on_with(tmp_path: Path) -> None:
    path = str(tmp_path / "copy")
    for content in (bytes(4), b"mark"):
        with ordinary_files.open_destination(path, MIB, overwrite=False) as copy:
            assert (copy.size, copy.read(0, 4)) == (MIB, content)
            copy.write(0, b"mark")
    assert os.listdir(tmp_path) == [".copy.partial"]
    with ordinary_files.open_destination(path, 2 * MIB, overwrite=False) as copy:
        assert copy.read(0, 4) == bytes(4), "what was begun was of another size"
    ordinary_files.publish(path, overwrite=False)
    assert os.listdir(tmp_path) == ["copy"]
    assert os.stat(path).st_size == 2 * MIB
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_destination_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    with ordinary_files.open_destination(str(path), MIB, overwrite=False):
        path.write_bytes(b"of somebody else")
    for attempt in (
        lambda: ordinary_files.open_destination(str(path), MIB, overwrite=False),
        lambda: ordinary_files.publish(str(path), overwrite=False),
    ):
        with pytest.raises(RefusedError, match=r"exists already .--force"):
            attempt()
    assert path.read_bytes() == b"of somebody else"
    ordinary_files.publish(str(path), overwrite=True)
    assert path.stat().st_size == MIB


def test_what_is_no_destination(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        ordinary_files.open_destination(str(tmp_path / "none/copy"), MIB, overwrite=True)
    for other in (tmp_path, Path("/dev/null")):
        with pytest.raises(RefusedError, match="is not a file"):
            ordinary_files.open_destination(str(other), MIB, overwrite=True)
