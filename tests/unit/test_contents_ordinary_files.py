# SPDX-License-Identifier: Apache-2.0
"""Files outside persistent memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvdimm_driver.backing.paths import Entry
from nvdimm_driver.contents import ordinary_files
from nvdimm_driver.errors import BackingError, NotFoundError, NvdimmError, RefusedError, UnsupportedError
from nvdimm_driver.model import MIB


def test_a_source_is_a_file_or_a_block_device(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with ordinary_files.open_source(str(tmp_path / "file")) as source:
        assert source.read(0, source.size) == b"content"
    with pytest.raises(BackingError, match="has become a symbolic link"):
        ordinary_files.open_source(str(tmp_path / "link"))
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
        UnsupportedError, match=rf"in format {kind} and has to be raw.*qemu-img convert -f {kind} -O raw"
    ):
        ordinary_files.check_raw("/a", head)


@pytest.mark.parametrize("head", [b"", bytes(512), b"\xebc\x90", b"QFI"])
def test_raw_images(head: bytes) -> None:
    ordinary_files.check_raw("/a", head)


def test_a_destination_is_gone_on_with(tmp_path: Path) -> None:
    path = str(tmp_path / "copy")
    for content in (bytes(4), b"mark"):
        with ordinary_files.opened_destination(path, MIB, overwrite=False) as copy:
            assert (copy.content.size, copy.content.read(0, 4)) == (MIB, content)
            copy.content.write(0, b"mark")
    assert os.listdir(tmp_path) == [".copy.export"]
    with ordinary_files.opened_destination(path, 2 * MIB, overwrite=False) as copy:
        assert copy.content.read(0, 4) == bytes(4), "what was begun was of another size"
        copy.publish()
    assert os.listdir(tmp_path) == ["copy"]
    assert os.stat(path).st_size == 2 * MIB
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_destination_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    with ordinary_files.opened_destination(str(path), MIB, overwrite=False) as copy:
        path.write_bytes(b"of somebody else")
        with pytest.raises(RefusedError, match=r"exists already .--force"):
            copy.publish()
    with pytest.raises(RefusedError, match=r"exists already .--force"):
        open_copy(path)
    assert path.read_bytes() == b"of somebody else"
    with ordinary_files.opened_destination(str(path), MIB, overwrite=True) as copy:
        copy.publish()
    assert path.stat().st_size == MIB


def test_a_file_that_is_made_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename_new = tmp_path / "copy", Entry.rename_new

    def late(source: Entry, target: Entry) -> None:
        path.write_bytes(b"of somebody else")
        rename_new(source, target)

    monkeypatch.setattr(Entry, "rename_new", late)
    with (
        ordinary_files.opened_destination(str(path), MIB, overwrite=False) as copy,
        pytest.raises(RefusedError, match=r"exists already .--force"),
    ):
        copy.publish()
    assert path.read_bytes() == b"of somebody else"


def test_a_file_that_takes_the_place_of_an_empty_one_at_the_last_moment_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename_new = tmp_path / "copy", Entry.rename_new
    path.touch()
    (tmp_path / "backup").write_bytes(b"of somebody else")

    def late(source: Entry, target: Entry) -> None:
        if source.name == "copy":
            (tmp_path / "backup").replace(path)
        rename_new(source, target)

    monkeypatch.setattr(Entry, "rename_new", late)
    with (
        ordinary_files.opened_destination(str(path), MIB, overwrite=False) as copy,
        pytest.raises(RefusedError, match=r"exists already .--force"),
    ):
        copy.publish()
    assert path.read_bytes() == b"of somebody else"
    assert sorted(os.listdir(tmp_path)) == [".copy.export", "copy"]


def test_a_file_that_loses_its_name_to_another_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename_new = tmp_path / "copy", Entry.rename_new
    path.touch()

    def late(source: Entry, target: Entry) -> None:
        path.write_bytes(b"one" if source.name == "copy" else b"other")
        rename_new(source, target)

    monkeypatch.setattr(Entry, "rename_new", late)
    with (
        ordinary_files.opened_destination(str(path), MIB, overwrite=False) as copy,
        pytest.raises(BackingError, match=r"copy: two files got this name at once, .*\.empty .*rename it"),
    ):
        copy.publish()
    assert {each.read_bytes() for each in tmp_path.iterdir() if each.name != ".copy.export"} == {b"one", b"other"}


def test_a_folder_that_is_swapped_gets_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with ordinary_files.opened_destination(str(tmp_path / "folder/copy"), MIB, overwrite=True) as copy:
        (tmp_path / "folder").rename(tmp_path / "aside")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/copy").write_bytes(b"of somebody else")
        copy.publish()
    assert (tmp_path / "folder/copy").read_bytes() == b"of somebody else"
    assert (tmp_path / "aside/copy").stat().st_size == MIB


@pytest.mark.parametrize("kind", ["another user's", "hard link", "fifo", "link"])
def test_what_somebody_has_put_in_the_place_of_an_unfinished_copy_is_refused(tmp_path: Path, kind: str) -> None:
    hidden, victim = tmp_path / ".copy.export", tmp_path / "victim"
    victim.write_bytes(b"of somebody else")
    if kind == "another user's":
        hidden.write_bytes(bytes(MIB))
        os.chown(hidden, 65534, 65534)
    elif kind == "hard link":
        hidden.hardlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(hidden)
    else:
        hidden.symlink_to(victim)
    with pytest.raises(NvdimmError, match=r"\.copy\.export: is in the way|has become a symbolic link"):
        open_copy(tmp_path / "copy")
    assert victim.read_bytes() == b"of somebody else"


def open_copy(path: Path) -> None:
    with ordinary_files.opened_destination(str(path), MIB, overwrite=False):
        pass


def test_what_is_no_destination(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        open_copy(tmp_path / "none/copy")
    for other in (tmp_path, Path("/dev/null")):
        with pytest.raises(RefusedError, match="is not a file"):
            open_copy(other)
