# SPDX-License-Identifier: Apache-2.0
"""What hints and remedies tell the operator to do, done word by word: under the real libvirtd, without Xen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.integration.bench_host import Host
from tests.integration.test_guide_virsh import define, host, is_mapped, paths, read, write
from tests.integration.test_lost_state import rows
from tests.integration.test_virsh import image

__all__ = ["host"]  # the fixture

RELEASE = re.compile(r": nvdimmctl (release [^;]+)")


def release_in(text: str) -> list[str]:
    """Return the arguments of the last ``nvdimmctl release`` in a hint or remedy."""
    found = RELEASE.findall(text.strip().removesuffix(")"))
    assert found, text
    return [word for word in found[-1].split(" ") if word]


def check(host: Host, *words: str) -> list[dict[str, str]]:
    return rows(host, "check", *words)


@pytest.mark.parametrize("repaired", [False, True], ids=["at once", "after check --repair"])
def test_who_follows_the_hints_restores_one_nvdimm_and_keeps_the_other(host: Host, repaired: bool) -> None:
    define(host, "first", "first.img", "second.img")
    backup = host.folder / "backup/first.img"
    assert host.nvdimmctl("export", "first:0", str(backup)).returncode == 0
    assert host.libvirtd.run("rm", image(host, "first")).returncode == 0
    if repaired:
        check(host, "--repair", "--zeros", str(image(host, "first")))
        (found,) = check(host)
        assert host.nvdimmctl("release", "--yes", *release_in(found["Remedy"])[1:]).returncode == 0
    words = ["import", str(backup), "--pool", "main"]
    for _ in range(4):
        done = host.nvdimmctl(*words)
        if done.returncode == 0:
            break
        hint = done.stderr
        while True:
            released = host.nvdimmctl("release", "--yes", *release_in(hint)[1:])
            if released.returncode == 0:
                break
            hint = released.stderr
    assert done.returncode == 0, done.stderr
    assert paths(host, "first") == {1: "second.img"}
    host.check("define", host.folder / "first.xml")
    assert [read(host, file) for file in ("first.img", "second.img")] == ["of first.img", "of second.img"]
    is_mapped(host, "first")


def test_a_start_without_a_file_says_that_a_define_makes_zeros(host: Host) -> None:
    define(host, "first", "first.img")
    assert host.libvirtd.run("rm", image(host, "first")).returncode == 0
    (found,) = check(host, "--repair")
    (zeros,) = re.findall(": nvdimmctl (check --repair --zeros [^;]+)", found["Remedy"])
    assert host.nvdimmctl(*zeros.split()).returncode == 1
    refused = host.virsh("start", "first").stderr
    assert "put them there first" in refused
    assert "makes zeros of what is not there" in refused
    (row,) = rows(host, "list")
    assert row["State"] == "lost"


def test_all_that_is_lost_of_several_nvdimms_is_given_up_only_when_all_are_meant(host: Host) -> None:
    define(host, "first", "first.img", "second.img")
    assert host.libvirtd.run("rm", image(host, "first")).returncode == 0
    refused = host.nvdimmctl("release", "--yes", "--lost", "first")
    assert refused.returncode == 2
    assert f"slot 1: {image(host, 'second')}" in refused.stderr
    assert read(host, "second.img") == "of second.img"
    assert host.nvdimmctl("release", "--yes", "--lost", "--slot", "0", "first").returncode == 0
    assert paths(host, "first") == {1: "second.img"}


def test_a_truncated_file_gets_its_backup_back_or_zeros_on_demand(host: Host) -> None:
    define(host, "first", "first.img")
    path, end = image(host, "first"), 12 << 20
    write(host, "first.img", "at the end", at=end)
    backup = host.folder / "backup/first.img"
    assert host.nvdimmctl("export", "first", str(backup)).returncode == 0
    assert host.libvirtd.run("truncate", "-s", "8M", path).returncode == 0
    (found,) = check(host, "--repair")
    assert (found["Path"], found["Done"]) == (str(path), "")
    assert host.virsh("start", "first").returncode != 0
    restore = re.search(": (cp .*?);", found["Remedy"])
    assert restore
    command = restore[1].replace("BACKUP", str(backup))
    assert host.libvirtd.run("sh", "-c", f"{command} && sync {path}").returncode == 0
    assert check(host, "--repair") == []
    assert read(host, "first.img", at=end) == "at the end"
    is_mapped(host, "first")
    host.check("destroy", "first")

    assert host.libvirtd.run("truncate", "-s", "8M", path).returncode == 0
    assert host.nvdimmctl("check", "--zeros", str(path)).returncode == 2
    (done,) = check(host, "--repair", "--zeros", str(path))
    assert done["Done"] == "yes"
    assert read(host, "first.img", at=end) == ""
    events = host.nvdimmctl("monitor", "--no-follow", "--event", "bytes-lost").stdout
    (event,) = map(json.loads, events.splitlines())
    assert (event["path"], event["bytes"], event["first"]) == (str(path), 8 << 20, hex(8 << 20))
    assert "nothing of it is lost" in host.nvdimmctl("check", "--repair", "--zeros", str(path)).stderr
    is_mapped(host, "first")


def test_no_hint_about_a_truncated_file_leads_to_zeros(host: Host) -> None:
    """Nor does a define, when somebody has made the file larger on his own."""
    define(host, "first", "first.img")
    path = image(host, "first")
    write(host, "first.img", "at the end", at=12 << 20)
    assert host.libvirtd.run("truncate", "-s", "8M", path).returncode == 0
    refused = host.virsh("start", "first").stderr
    assert "8 MiB too short" in refused
    assert "'nvdimmctl check' says how to go on" in refused
    assert host.libvirtd.run("fallocate", "-l", "16M", path).returncode == 0
    for command in (["start", "first"], ["define", host.folder / "first.xml"]):
        done = host.virsh(*command)
        assert done.returncode != 0
        assert "'nvdimmctl check' says how to go on" in done.stderr


@pytest.mark.parametrize("moved", [False, True], ids=["emptied", "moved, and an empty one is there"])
def test_no_define_makes_zeros_in_the_place_of_an_empty_file(host: Host, moved: bool) -> None:
    define(host, "first", "first.img")
    path = image(host, "first")
    change = f"mv {path} {path}.moved; : >{path}" if moved else f": >{path}"
    assert host.libvirtd.run("sh", "-c", change).returncode == 0
    done = host.virsh("define", host.folder / "first.xml")
    assert done.returncode != 0
    assert "nvdimmctl check" in done.stderr
    found = {row["Path"]: row["Remedy"] for row in check(host)}
    assert found[str(path)].startswith("what was provisioned is" if moved else "copy a backup over it")


@pytest.fixture
def poolless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Return a host with a domain whose file is in no pool."""
    host = Host(tmp_path_factory.mktemp("host"))
    try:
        (host.folder / "backup").mkdir()
        host.define("db1", 1)
        yield host
    finally:
        host.libvirtd.close()


@pytest.mark.parametrize("sparse", ["never", "always"])
def test_a_backup_of_a_file_in_no_pool_is_taken_after_its_contents_were_given_up(poolless: Host, sparse: str) -> None:
    host, path, backup = poolless, image(poolless, "db1"), poolless.folder / "backup/db1.img"
    assert host.nvdimmctl("export", "db1", str(backup)).returncode == 0
    assert host.libvirtd.run("rm", path).returncode == 0
    check(host, "--repair", "--zeros", str(path))
    assert host.libvirtd.run("cp", f"--sparse={sparse}", backup, path).returncode == 0
    (done,) = check(host, "--repair")
    assert done["Done"] == "yes"
    host.check("start", "db1")


def test_an_emptied_file_in_no_pool_gets_zeros_on_demand(poolless: Host) -> None:
    host, path = poolless, image(poolless, "db1")
    assert host.libvirtd.run("truncate", "-s", "0", path).returncode == 0
    (found,) = check(host)
    assert "the missing bytes are lost" in found["Problem"]
    (done,) = check(host, "--repair", "--zeros", str(path))
    assert done["Done"] == "yes"
    host.check("start", "db1")
