# SPDX-License-Identifier: Apache-2.0
"""A ledger that is not the one in use, under the real libvirtd: domains boot, and nothing else, until the repair.

The marks of devices, beside it, say whose they are. Whether a guest may go on that was saved before, nobody knows.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.bench_host import CONF, Host
from tests.integration.loop_device import Device, MakeDevice, Partition, rename
from tests.integration.test_devices_virsh import xml
from tests.integration.test_lost_state import rows
from tests.ledger_copies import copy_ledger, forget_devices

POOLS = """
[pool:files]
kind = bench
paths = {folder}/pmem
[pool:kept]
kind = pmem
paths = {folder}/pmem3, {folder}/pmem4, {folder}/pmem5
"""
IMAGE = "/var/lib/libvirt/libxl/db1.image"
MANAGED_SAVE = "/var/lib/libvirt/libxl/save/db1.save"


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory, made: list[Device | Partition]) -> Iterator[Host]:
    """Return a host with these pools; the devices are detached after its end."""
    host = Host(tmp_path_factory.mktemp("host"), conf=CONF.replace("allow_any_path=true", "") + POOLS)
    try:
        yield host
    finally:
        host.libvirtd.close()


def ledger_of(host: Host) -> Path:
    return host.folder / "state/ledger.sqlite"


def back_up(host: Host) -> Path:
    copy_ledger(ledger_of(host), host.folder / "backup")
    return host.folder / "backup"


def move(source: Path, target: Path) -> None:
    """Move a ledger with its write-ahead log."""
    for end in ("", "-wal", "-shm"):
        if os.path.exists(f"{source}{end}"):
            os.rename(f"{source}{end}", f"{target}{end}")


def put_back(host: Host, backup: Path) -> None:
    """Restore a backup as its page says."""
    move(ledger_of(host), host.folder / "before")
    os.rename(backup, ledger_of(host))


# --- guests that boot ---


@pytest.mark.parametrize("way", ["copied", "written over"])
def test_a_domain_whose_ram_was_changed_boots(host: Host, way: str) -> None:
    """Copied: /var is on a new disk. The ledger is the last one, and the start has to store something in it."""
    host.define("db1", 1)
    backup = back_up(host)
    host.check("setmaxmem", "--config", "db1", "700M")
    host.check("setmem", "--config", "db1", "700M")
    if way == "copied":
        put_back(host, backup)
    else:
        host.define("db3", 3)
        known = (host.folder / "state-in-use").read_text()
        copy_ledger(backup, ledger_of(host))
        (host.folder / "state-in-use").write_text(known)
    (found,) = [row for row in rows(host, "check") if row["Path"] == str(ledger_of(host))]
    assert found["Problem"].startswith("it is a backup or a copy")
    host.check("start", "db1")
    assert "'nvdimmctl check --repair' does that" in host.log()
    assert "is a backup or a copy" in host.virsh("define", host.xml("db2", 2)).stderr


@pytest.mark.parametrize("how", ["start", "reboot"])
def test_a_domain_that_was_defined_since_the_backup_boots(host: Host, how: str) -> None:
    host.define("db1", 1)
    backup = back_up(host)
    host.define("db2", 2)
    if how == "reboot":
        host.check("start", "db2")
    put_back(host, backup)
    host.libvirtd.events()
    if how == "reboot":
        host.libvirtd.inject("db2", "reboot")
        host.libvirtd.wait_for("hook started begin db2 id=2")
    else:
        host.check("start", "db2")
    assert host.check("domstate", "db2") == "running"


def test_a_guest_that_boots_meanwhile_can_be_saved(host: Host, device: MakeDevice) -> None:
    host.check("define", xml(host, "db1", 1, device(3).path))
    put_back(host, back_up(host))
    host.check("start", "db1")
    host.check("managedsave", "db1")
    rows(host, "check", "--repair")
    host.check("start", "db1")


# --- guests that were saved ---


def save(host: Host, disk: Device) -> Path:
    """Save a guest with a device to a file, and have it go on from that; return a backup of the ledger of the save."""
    host.check("define", xml(host, "db1", 1, disk.path))
    host.check("start", "db1")
    host.check("save", "db1", IMAGE)
    host.libvirtd.run("cp", IMAGE, f"{IMAGE}.kept")
    backup = back_up(host)
    host.check("restore", IMAGE)
    disk.write(b"written since")
    host.check("destroy", "db1")
    return backup


@pytest.mark.parametrize("way", ["through nvdimmd", "around nvdimmd"])
def test_a_guest_with_a_device_goes_on_once(host: Host, device: MakeDevice, way: str) -> None:
    put_back(host, save(host, device(3)))
    virsh = host.virsh if way == "through nvdimmd" else host.libvirtd.virsh
    assert "failed to restore" in virsh("restore", f"{IMAGE}.kept").stderr
    assert "the saved guest cannot go on" in host.log()
    rows(host, "check", "--repair")
    assert virsh("restore", f"{IMAGE}.kept").returncode != 0


def test_a_managed_save_that_came_back_with_the_ledger_is_not_started(host: Host, device: MakeDevice) -> None:
    """All of /var comes from a backup. An autostart asks only the hook."""
    disk = device(3)
    host.check("define", xml(host, "db1", 1, disk.path))
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.libvirtd.run("cp", "-a", MANAGED_SAVE, f"{IMAGE}.kept")
    backup = back_up(host)
    host.check("start", "db1")
    disk.write(b"written since")
    host.check("destroy", "db1")
    host.libvirtd.run("mv", f"{IMAGE}.kept", MANAGED_SAVE)
    put_back(host, backup)
    assert host.libvirtd.virsh("start", "db1").returncode != 0
    assert "the saved guest cannot go on" in host.log()


def test_a_managed_save_with_a_file_that_came_back_with_the_ledger_is_not_started(host: Host) -> None:
    """The host loses power, and all of /var comes from a backup. The guest's file is immutable still."""
    host.define("db1", 1)
    host.check("start", "db1")
    host.check("managedsave", "db1")
    host.libvirtd.run("cp", "-a", MANAGED_SAVE, f"{IMAGE}.kept")
    host.libvirtd.run("cp", "-a", "/run/xen-stand-in/saved-1", "/run/kept")
    backup = back_up(host)
    host.check("start", "db1")
    host.libvirtd.lose_power()
    (host.folder / "boot_id").write_text("another boot\n")
    host.libvirtd.run("mv", "/run/kept", "/run/xen-stand-in/saved-1")
    host.libvirtd.run("mv", f"{IMAGE}.kept", MANAGED_SAVE)
    put_back(host, backup)
    host.libvirtd.start()
    assert host.libvirtd.virsh("start", "db1").returncode != 0
    assert "the saved guest cannot go on" in host.log()


def test_a_guest_with_a_file_goes_on_once_though_the_ledger_comes_back_while_it_runs(host: Host) -> None:
    """The ledger has the start of the guest before it was saved."""
    host.define("db1", 1)
    host.check("start", "db1")
    backup = back_up(host)
    host.check("save", "db1", IMAGE)
    host.libvirtd.run("cp", IMAGE, f"{IMAGE}.kept")
    host.check("restore", IMAGE)
    put_back(host, backup)
    host.check("destroy", "db1")
    rows(host, "check", "--repair")
    assert "failed to restore" in host.virsh("restore", f"{IMAGE}.kept").stderr
    assert "the saved guest cannot go on" in host.log()


def test_a_ledger_that_was_put_aside_and_comes_back(host: Host, device: MakeDevice) -> None:
    disk = device(3)
    host.check("define", xml(host, "db1", 1, disk.path))
    host.check("start", "db1")
    host.check("save", "db1", IMAGE)
    move(ledger_of(host), host.folder / "before")
    rows(host, "check", "--repair")
    host.check("start", "db1")  # it boots anew
    disk.write(b"written since")
    host.check("destroy", "db1")
    move(ledger_of(host), host.folder / "newer")
    move(host.folder / "before", ledger_of(host))
    assert "failed to restore" in host.virsh("restore", IMAGE).stderr
    assert "the saved guest cannot go on" in host.log()


# --- the repair ---


@pytest.mark.parametrize("runs", [False, True], ids=["off", "runs"])
def test_a_domain_with_a_device_that_was_defined_since_is_repaired(host: Host, device: MakeDevice, runs: bool) -> None:
    backup = back_up(host)
    host.check("define", xml(host, "db1", 1, device(3).path))
    if runs:
        host.check("start", "db1")
    put_back(host, backup)
    done = [row for row in rows(host, "check", "--repair") if row["Done"]]
    assert {row["Done"] for row in done} == {"yes"}, done
    assert done[-1]["Path"] == str(ledger_of(host)), "at last"
    record = host.record("db1")
    assert bool(record.start) == runs
    assert len(record.allocations) == 1
    host.check("define", host.xml("db2", 2))


def test_it_is_not_taken_over_alone(host: Host) -> None:
    host.define("db1", 1)
    backup = back_up(host)
    host.define("db2", 2)
    put_back(host, backup)
    (found,) = rows(host, "check", "--repair", str(ledger_of(host)))
    assert "without a path or domain" in found["Remedy"]
    rows(host, "check", "--repair", "db2")
    assert "is a backup or a copy" in host.virsh("define", host.xml("db3", 3)).stderr
    rows(host, "check", "--repair")
    host.check("define", host.xml("db3", 3))


def test_a_ledger_that_was_lost_gives_no_device_away(host: Host, device: MakeDevice) -> None:
    disk = device(3)
    host.check("define", xml(host, "db1", 1, disk.path))
    move(ledger_of(host), host.folder / "before")
    thief = xml(host, "db2", 2, disk.path)
    assert "in place of one that was lost" in host.virsh("define", thief).stderr
    host.check("start", "db1")
    rows(host, "check", "--repair")
    assert "belongs to domain db1" in host.virsh("define", thief).stderr


def test_a_device_that_only_the_guest_has_still_is_its_own_after_the_ledger_was_lost(
    host: Host, device: MakeDevice
) -> None:
    disk, file = device(3), host.folder / "pmem/db1.img"
    host.check("define", xml(host, "db1", 1, file, disk.path))
    host.check("start", "db1")
    host.check("define", xml(host, "db1", 1, file))
    move(ledger_of(host), host.folder / "before")
    rows(host, "check", "--repair")
    assert [row for row in rows(host, "check") if row["Domain"]] == []
    start = host.record("db1").start
    assert start
    assert {*start.paths} == {str(file), str(disk.path)}
    assert "belongs to domain db1" in host.virsh("define", xml(host, "db2", 2, disk.path)).stderr


def test_nvdimmd_starts_with_a_damaged_ledger(host: Host) -> None:
    """It keeps no client from libvirt."""
    host.libvirtd.end("nvdimmd")
    move(ledger_of(host), host.folder / "before")
    ledger_of(host).write_bytes(b"scribble" * 4096)
    host.start_nvdimmd()
    host.check("list", "--all")


def test_a_device_that_is_away_during_the_repair_keeps_its_owner(host: Host, device: MakeDevice) -> None:
    """Its namespace is disabled, or the kernel takes it for one of another mode; the backup does not know db1."""
    disk = device(3)
    backup = back_up(host)
    host.check("define", xml(host, "db1", 1, disk.path))
    disk.write(b"of db1")
    put_back(host, backup)
    disk._vanish()
    rows(host, "check", "--repair")
    host.virsh("undefine", "db1")
    disk._appear(disk.path)
    thief = xml(host, "db2", 2, disk.path)
    assert "has the mark of domain db1" in host.virsh("define", thief).stderr
    rows(host, "check", "--repair")
    assert "belongs to domain db1" in host.virsh("define", thief).stderr


def test_devices_that_were_given_the_other_way_round_since_the_backup(host: Host, device: MakeDevice) -> None:
    one, other = device(3), device(4)
    host.check("define", xml(host, "db1", 1, other.path))
    host.check("define", xml(host, "db2", 2, one.path))
    backup = back_up(host)
    for name in ("db1", "db2"):
        host.check("undefine", name)
        assert host.nvdimmctl("release", "--yes", name).returncode == 0
    host.check("define", xml(host, "db1", 1, one.path))
    host.check("define", xml(host, "db2", 2, other.path))
    put_back(host, backup)
    rows(host, "check", "--repair")
    assert [row for row in rows(host, "check") if row["Domain"]] == []
    host.check("undefine", "db1")
    assert "belongs to domain db1" in host.virsh("define", xml(host, "db2", 2, one.path)).stderr
    for name, disk in (("db1", one), ("db2", other)):
        assert [item.spec.path for item in host.record(name).allocations] == [str(disk.path)]


# --- names that a boot has exchanged ---


def define_each(host: Host, disks: list[Device]) -> list[str]:
    """Define a domain with each device by its name of now, twice, in whatever order; return the last errors."""
    errors: list[str] = []
    for _ in range(2):
        errors = [
            host.virsh("define", xml(host, f"db{number}", number, disk.path)).stderr
            for number, disk in enumerate(disks, 1)
        ]
    return errors


def rotate(host: Host, disks: list[Device]) -> None:
    """Boot, and have each device get the name of the next one."""
    host.libvirtd.stop()
    paths = [disk.path for disk in disks]
    rename(dict(zip(disks, [*paths[1:], paths[0]], strict=True)))
    host.libvirtd.start()


def test_two_boots_are_followed(host: Host, device: MakeDevice) -> None:
    disks = [device(index) for index in (3, 4, 5)]
    assert define_each(host, disks) == [""] * 3
    for _ in range(2):
        rotate(host, disks)
        rows(host, "check", "--repair")
    assert define_each(host, disks) == [""] * 3


def test_a_repair_that_fails_until_a_definition_is_changed_is_accepted(host: Host, device: MakeDevice) -> None:
    """db1 has its old name yet, which is db2's by now. It is lost whose each device is."""
    disks = [device(3), device(4)]
    assert define_each(host, disks) == [""] * 2
    rotate(host, disks)
    rows(host, "check", "--repair")
    host.check("define", xml(host, "db2", 2, disks[1].path))
    move(ledger_of(host), host.folder / "before")
    forget_devices(host.folder / "state")
    found = rows(host, "check", "--repair")
    assert all("libvirt's definition of domain" in row["Done"] for row in found if row["Path"] == str(disks[1].path))
    assert host.virsh("define", xml(host, "db1", 1, disks[0].path)).returncode
    rows(host, "check", "--repair", "--accept", str(disks[1].path))
    assert "is in libvirt's definition" in host.virsh("define", xml(host, "db3", 3, disks[1].path)).stderr
    host.check("define", xml(host, "db1", 1, disks[0].path))
    rows(host, "check", "--repair")
    assert "belongs to domain db2" in host.virsh("define", xml(host, "db3", 3, disks[1].path)).stderr
    assert "belongs to domain db1" in host.virsh("define", xml(host, "db3", 3, disks[0].path)).stderr


def test_names_that_rotate_among_devices_of_which_a_domain_has_two(host: Host, device: MakeDevice) -> None:
    disks = [device(index) for index in (3, 4, 5)]
    host.check("define", xml(host, "db1", 1, disks[0].path, disks[1].path))
    host.check("define", xml(host, "db2", 2, disks[2].path))
    had = [(item.spec.slot, item.identity) for item in host.record("db1").allocations]
    rotate(host, disks)
    rows(host, "check", "--repair")
    for _ in range(2):
        done = [
            host.virsh("define", xml(host, "db1", 1, disks[0].path, disks[1].path)).stderr,
            host.virsh("define", xml(host, "db2", 2, disks[2].path)).stderr,
        ]
    assert done == ["", ""]
    assert [(item.spec.slot, item.identity) for item in host.record("db1").allocations] == had


@pytest.mark.parametrize("way", ["start", "edit", "repair"])
def test_an_old_name_means_what_the_domain_has_when_another_is_there_that_nobody_has(
    host: Host, device: MakeDevice, way: str
) -> None:
    """db2 had it, and was released: its bytes stay."""
    one, other = device(3), device(4)
    define_each(host, [one, other])
    (had,) = host.record("db1").allocations
    host.libvirtd.stop()
    rename({one: other.path, other: one.path})
    host.libvirtd.start()
    rows(host, "check", "--repair")
    host.check("undefine", "db2")
    assert host.nvdimmctl("release", "--yes", "db2").returncode == 0
    if way == "start":
        assert host.virsh("start", "db1").returncode != 0
    elif way == "repair":
        (found,) = [row for row in rows(host, "check", "--repair") if row["Domain"] == "db1"]
        assert f"the domain's is {one.path} now" in found["Problem"]
    else:
        edited = host.folder / "edited.xml"
        edited.write_text(host.check("dumpxml", "--inactive", "db1").replace(">1</vcpu>", ">2</vcpu>"))
        assert f"is {one.path} now" in host.virsh("define", edited).stderr
    (now,) = host.record("db1").allocations
    assert now.identity == had.identity
    assert "belongs to domain db1" in host.virsh("define", xml(host, "db3", 3, one.path)).stderr
    host.check("define", xml(host, "db1", 1, one.path))
    host.check("start", "db1")


@pytest.mark.parametrize("right", ["ledger", "definitions"])
def test_names_that_a_repair_has_followed_before_the_backup(host: Host, device: MakeDevice, right: str) -> None:
    """libvirt's definitions have the other names: of before that boot, or since the domains were defined anew.

    Without marks of the devices, nobody can tell which.
    """
    disks = [device(3), device(4)]
    assert define_each(host, disks) == [""] * 2
    rotate(host, disks)
    rows(host, "check", "--repair")
    backup = back_up(host)
    if right == "definitions":
        release_each(host)
        disks.reverse()
        define_each(host, disks)
    forget_devices(host.folder / "state")
    put_back(host, backup)
    found = {row["Domain"]: row for row in rows(host, "check", "--repair") if row["Domain"]}
    for number, path in ((1, disks[1].path), (2, disks[0].path)) if right == "definitions" else ():
        assert "is in libvirt's definition" in host.virsh("define", xml(host, f"db{number}", number, path)).stderr
    if right == "ledger":
        for name, path in (("db1", disks[1].path), ("db2", disks[0].path)):
            assert f"nvdimmctl check --repair {path}, and define {name}" in found[name]["Remedy"]
            rows(host, "check", "--repair", str(path))
    else:
        assert all("nvdimmctl release --slot 0 " in found[name]["Remedy"] for name in ("db1", "db2"))
        for name in ("db1", "db2"):
            assert host.nvdimmctl("release", "--yes", name).returncode == 0
        rows(host, "check", "--repair")
    assert define_each(host, disks) == [""] * 2
    assert [host.record(f"db{number}").allocations[0].spec.path for number in (1, 2)] == [
        str(disk.path) for disk in disks
    ]


def release_each(host: Host) -> None:
    for name in ("db1", "db2"):
        host.check("undefine", name)
        assert host.nvdimmctl("release", "--yes", name).returncode == 0


def test_pools_with_links_that_are_new_when_a_boot_exchanges_names(host: Host, device: MakeDevice) -> None:
    """nvdimmd notes at its start which devices are to be overwritten: not by the names, which are others' by then."""
    disks = [device(3), device(4)]
    assert define_each(host, disks) == [""] * 2
    disks[0].write(b"of db1")
    host.libvirtd.end("nvdimmd")
    rotate(host, disks)
    sections = ""
    for disk, name, wipes in zip(disks, ("secret", "plain"), ("true", "false"), strict=True):
        (host.folder / name).symlink_to(disk.path)
        sections += f"[pool:{name}]\nkind = pmem\npaths = {{folder}}/{name}\nwipe_on_release = {wipes}\n"
    host.configure(CONF + sections)
    with closing(sqlite3.connect(ledger_of(host))) as ledger:
        ledger.execute("UPDATE allocation SET pool = ''")  # as in one of an earlier version
        ledger.commit()
    host.start_nvdimmd()
    rows(host, "check", "--repair")
    assert define_each(host, disks) == [""] * 2
    assert host.nvdimmctl("release", "--yes", "db1").returncode == 0
    assert disks[0].read(6) == bytes(6)
