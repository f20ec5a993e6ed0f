# SPDX-License-Identifier: Apache-2.0
"""The guide's steps that give up a file of a domain, as they stand: under the real libvirtd, without Xen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.model import MIB
from tests.integration.bench_host import NVDIMMCTL, UUID, Host
from tests.integration.test_virsh import image

GUIDE = (Path(__file__).parents[2] / "doc/guide.rst").read_text(encoding="utf-8")
POOL = "[pool:main]\nkind = bench\npaths = {folder}/pmem\nwipe_on_release = {wipe}\n"
MEMORY = (
    "<memory model='nvdimm' access='shared'><source><path>{path}</path></source>"
    "<target><size unit='MiB'>16</size></target></memory>"
)
EDITOR = """#!/bin/sh
sed -i -e 's,/{old}<,/{new}<,' -e "s,<size unit='KiB'>16384<,<size unit='KiB'>{size}<," "$1"
"""
"""What the reader does in ``virsh edit``: another path and size for the NVDIMM in slot 0."""


@pytest.fixture(params=["false", "true"], ids=["a pool", "a pool with wipe_on_release"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Return a host with the two commands of the pages, and a folder for backups."""
    folder = tmp_path_factory.mktemp("host")  # a socket's path is short
    host = Host(folder, POOL.format(folder=folder, wipe=request.param), size=256 * MIB)
    try:
        for name in ("backup", "bin"):
            (folder / name).mkdir()
        program(host, "virsh", '#!/bin/sh\nexec /usr/bin/virsh -q -c xen:///system "$@"\n')
        program(host, "nvdimmctl", f"#!{folder}/python/bin/python -I\n{NVDIMMCTL}\n")
        yield host
    finally:
        host.libvirtd.close()


def program(host: Host, name: str, text: str) -> None:
    file = host.folder / "bin" / name
    file.write_text(text)
    file.chmod(0o755)


def steps(title: str) -> list[list[str]]:
    """Return the commands of each block in the section with this title, for a domain that is off."""
    section = re.split(rf"^{re.escape(title)}\n~+\n", GUIDE, flags=re.MULTILINE)[1]
    section = re.split(r"^\S.*\n[~-]+$", section, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^ *\.\. code-block:: console\n\n((?:    .*\n)+)", section, re.MULTILINE)
    found = [re.findall(r"^ +# (.+)$", block, re.MULTILINE) for block in blocks]
    return [[command for command in block if not command.startswith("virsh shutdown")] for block in found]


def do(host: Host, commands: list[str], *, size: str = "8M") -> None:
    """Do what a page says, step by step, and agree to each question."""
    for command in commands:
        done = host.libvirtd.run(
            "sh",
            "-c",
            f"cd {host.folder} && export PATH={host.folder}/bin:$PATH EDITOR={host.folder}/bin/editor && yes | "
            + command.replace("/srv/backup", f"{host.folder}/backup")
            .replace("/mnt/pmem0", f"{host.folder}/pmem")
            .replace("32G", size),
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def define(host: Host, name: str, *files: str) -> None:
    """Define a domain with NVDIMMs of 16 MiB, and let its guest write to them."""
    xml = host.xml(name, 1)
    devices = "".join(MEMORY.format(path=host.folder / "pmem" / file) for file in files)
    xml.write_text(re.sub(r"<memory model.*</memory>", devices, xml.read_text(), flags=re.DOTALL))
    host.check("define", xml)
    for file in files:
        write(host, file, f"of {file}")


def write(host: Host, file: str, text: str, at: int = 4096) -> None:
    path = host.folder / "pmem" / file
    done = host.libvirtd.run(
        "sh", "-ec", f"printf '{text}' | dd of={path} bs=1 seek={at} conv=notrunc status=none; sync {path}"
    )
    assert done.returncode == 0, done.stderr


def read(host: Host, file: str, at: int = 4096) -> str:
    """Return the text at an offset of a file in the pool."""
    path = host.folder / "pmem" / file
    done = host.libvirtd.run("sh", "-ec", f"dd if={path} bs=1 skip={at} count=32 status=none | tr -d '\\0'")
    assert done.returncode == 0, done.stderr
    return done.stdout


def paths(host: Host, name: str) -> dict[int, str]:
    """Return the names of the files of the domain's NVDIMMs, by slot."""
    return {item.spec.slot: Path(item.spec.path).name for item in host.record(name).allocations}


def is_mapped(host: Host, name: str) -> None:
    host.check("start", name)
    assert host.record(name).start


def test_a_backup_is_restored_beside_what_is_there(host: Host) -> None:
    define(host, "first", "first.img", "second.img")
    backup, restore, _ = steps("Backup")
    do(host, backup)
    write(host, "first.img", "overwritten by mistake")
    program(host, "editor", EDITOR.format(old="first.img", new="first-restored.img", size=16384))
    do(host, restore)
    assert {slot: name for slot, name in paths(host, "first").items() if slot < 256} == {
        0: "first-restored.img",
        1: "second.img",
    }
    assert read(host, "first-restored.img") == "of first.img"
    assert read(host, "first.img") == "overwritten by mistake"
    assert read(host, "second.img") == "of second.img"
    is_mapped(host, "first")


def test_a_backup_is_restored_in_the_place_of_what_is_there(host: Host) -> None:
    """The domain has another NVDIMM, of which there is no backup."""
    define(host, "first", "first.img", "second.img")
    backup, _, restore = steps("Backup")
    do(host, backup)
    write(host, "first.img", "overwritten by mistake")
    do(host, restore)
    assert paths(host, "first") == {0: "first.img", 1: "second.img"}
    assert read(host, "first.img") == "of first.img"
    assert read(host, "second.img") == "of second.img"
    is_mapped(host, "first")


def test_a_file_that_is_lost_is_copied_from_its_backup(host: Host) -> None:
    """The backup is sparse, and so is what cp makes of it."""
    define(host, "first", "first.img")
    do(host, steps("Backup")[0])
    before = host.sum("first")
    host.libvirtd.run("rm", image(host, "first"))
    copy, check = steps("When something is lost")
    do(host, copy)
    assert [command.split()[0] for command in check] == ["nvdimmctl", "nvdimmctl"]
    do(host, check[1:])
    assert host.sum("first") == before
    assert host.nvdimmctl("check").returncode == 0
    is_mapped(host, "first")


def test_a_backup_that_is_refused_keeps_the_sum_of_the_one_before(host: Host) -> None:
    define(host, "first", "first.img")
    backup, _, restore = steps("Backup")
    do(host, backup)
    with pytest.raises(AssertionError, match="exists"):
        do(host, backup)
    do(host, restore[:1])


def test_a_damaged_copy_is_found_before_the_old_file_is_deleted(host: Host) -> None:
    define(host, "first", "first.img")
    backup, _, restore = steps("Backup")
    do(host, backup)
    copy = host.folder / "backup/first.img"
    with copy.open("r+b") as file:
        file.write(b"rotten")
    with pytest.raises(AssertionError, match="sha256sum: WARNING"):
        do(host, restore)
    assert read(host, "first.img") == "of first.img"


def test_an_nvdimm_gets_another_size_and_no_byte_is_overwritten(host: Host) -> None:
    define(host, "db1", "db1.img")
    write(host, "db1.img", "at the end", at=12 * MIB)
    before = host.sum("db1")
    (commands,) = steps("Changing the size")
    program(host, "editor", EDITOR.format(old="db1.img", new="db1-new.img", size=8192))
    do(host, commands)
    assert paths(host, "db1")[0] == "db1-new.img"
    assert host.record("db1").allocations[0].spec.size == 8 * MIB
    assert read(host, "db1-new.img") == "of db1.img"
    assert host.sum("db1") == before, "the old file is as it was"
    is_mapped(host, "db1")
    host.check("destroy", "db1")
    if 256 in paths(host, "db1"):  # as the page says of a pool that wipes
        assert host.nvdimmctl("release", "--yes", "--delete", "--slot", "256", "db1").returncode == 0
        assert "db1.img" not in host.files()
    assert paths(host, "db1") == {0: "db1-new.img"}
    assert read(host, "db1-new.img") == "of db1.img"


def test_the_files_of_several_nvdimms_are_deleted_only_when_all_are_meant(host: Host) -> None:
    define(host, "first", "first.img", "second.img")
    refused = host.nvdimmctl("release", "--yes", "--delete", "first")
    assert refused.returncode == 2
    assert f"slot 1: {image(host, 'second')}" in refused.stderr
    assert "--all" in refused.stderr
    assert [read(host, file) for file in ("first.img", "second.img")] == ["of first.img", "of second.img"]
    assert paths(host, "first") == {0: "first.img", 1: "second.img"}
    assert host.nvdimmctl("release", "--yes", "--delete", "--all", UUID.format(1)).returncode == 0
    assert host.files() == ["lost+found"]


def test_the_hints_about_a_file_that_is_lost_give_up_no_other(host: Host) -> None:
    """From the import of its backup on, each command that an error names is run."""
    define(host, "first", "first.img", "second.img")
    do(host, steps("Backup")[0])
    host.libvirtd.run("rm", image(host, "first"))
    bring = ("import", str(host.folder / "backup/first.img"), "--pool", "main")
    told = host.nvdimmctl(*bring).stderr
    (named,) = re.findall(r"free the path: nvdimmctl (release [^;]+);", told)
    done = host.nvdimmctl(*named.split(), "--yes")
    if done.returncode:  # in a pool with wipe_on_release
        assert f"give it up: nvdimmctl release --lost --slot 0 {host.record('first').uuid}" in done.stderr
        assert host.nvdimmctl("release", "--yes", "--lost", "first").returncode == 2
        assert host.nvdimmctl("release", "--yes", "--lost", *named.split()[1:]).returncode == 0
    assert paths(host, "first") == {1: "second.img"}
    assert read(host, "second.img") == "of second.img"
    assert host.nvdimmctl(*bring).returncode == 0
    host.check("define", host.folder / "first.xml")
    assert [read(host, file) for file in ("first.img", "second.img")] == ["of first.img", "of second.img"]


def test_an_import_says_that_the_definition_needs_its_path(host: Host) -> None:
    """A backup with a date in its name is imported by that, and the definition has another."""
    define(host, "first", "first.img")
    copy = host.folder / "backup/first-friday.img"
    assert host.nvdimmctl("export", "first", str(copy)).returncode == 0
    done = host.nvdimmctl("import", str(copy), "--pool", "main")
    assert done.returncode == 0
    assert f"no domain has {image(host, 'first-friday')} yet" in done.stderr
