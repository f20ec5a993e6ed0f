# SPDX-License-Identifier: Apache-2.0
"""A full disk, a log without a folder, a damaged ledger: under the real libvirtd and its libxl driver, without Xen."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.doctor.libvirt import Connection
from nvdimm_driver.lock_files import LockFile
from nvdimm_driver.rpc.procedure import Procedure
from nvdimm_driver.rpc.xdr import DomainRef, LibvirtError, Packer, RemoteError
from tests.integration.bench_host import UUID, Host
from tests.integration.loop_pmem import run
from tests.ledger_copies import copy_ledger, forget_devices, forget_in_use
from tests.unit.fake_sysfs import FakeSysfs

PAGE = (Path(__file__).parents[2] / "doc/ledger.rst").read_text(encoding="utf-8").partition(".. list-table")[0]
FILL = "cat /dev/zero >>{state}/filler 2>/dev/null; sync -f {state}"


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Return a host with the domain db1, which runs."""
    made = Host(tmp_path_factory.mktemp("host"))  # a socket's path is short
    try:
        made.define("db1", 1)
        made.check("start", "db1")
        yield made
    finally:
        made.libvirtd.close()


def rows(host: Host, *words: str) -> list[dict[str, str]]:
    """Return what an nvdimmctl command prints, behind what the stand-in for Xen's libraries does."""
    found: list[dict[str, str]] = json.loads(
        re.sub(r"\A(?:\w+\(.*\)\n)*", "", host.nvdimmctl(*words, "-f", "json").stdout)
    )
    return found


def doctor(host: Host) -> dict[str, dict[str, str]]:
    return {row["Check"]: row for row in rows(host, "doctor")}


def test_a_guest_reboots_on_a_full_disk(host: Host) -> None:
    """That of the ledger and the tables."""
    state = host.folder / "state"
    small = f"cp -a {state} {state}.old && mount -t tmpfs -o size=48m none {state} && cp -a {state}.old/. {state}"
    done = host.libvirtd.run("sh", "-c", f"{small} && rm {state}/ledger.sqlite-reserve")
    assert done.returncode == 0, done.stderr
    assert rows(host, "check", "--repair")[0]["Problem"].startswith("it is a backup or a copy")
    assert rows(host, "list")[0]["Domain"] == "db1"
    host.libvirtd.events()
    for domid in (2, 3):
        host.libvirtd.run("sh", "-c", FILL.format(state=state))
        host.libvirtd.inject("db1", "reboot")
        host.libvirtd.wait_for(f"hook started begin db1 id={domid}")
    (row,) = rows(host, "list")
    assert "mapped" in row.values()
    found = doctor(host)
    assert found["state folder"]["Result"] == "WARN"
    assert "are kept for starts" in found["state folder"]["Message"]
    file = host.xml("db2", 2)
    done = host.virsh("define", file)
    assert done.returncode == 0 or "the disk is full (make room, and try again)" in done.stderr
    host.check("destroy", "db1")


def test_a_guest_starts_without_the_folder_of_the_log(host: Host) -> None:
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    conf.write_text(conf.read_text().replace("/nvdimm-driver.log", "/missing/nvdimm-driver.log"))
    host.check("destroy", "db1")
    host.check("start", "db1")
    assert host.state("db1")[0] == "mapped"
    found = doctor(host)
    assert found["log"]["Result"] == "WARN"
    assert "there is no folder" in found["log"]["Message"]


def test_a_ledger_that_is_damaged_while_a_guest_runs(host: Host) -> None:
    before, sum_before = host.record("db1"), host.sum("db1")
    ledger = host.folder / "state/ledger.sqlite"
    ledger.write_bytes(b"scribble" * 4096)
    for command in ("list", "check"):
        failed = host.nvdimmctl(command)
        assert failed.returncode == 1
        assert "is damaged: file is not a database" in failed.stdout + failed.stderr
        assert "'nvdimmctl check --repair' keeps the damaged file" in failed.stdout + failed.stderr
    thief = host.xml("db2", 2)
    thief.write_text(thief.read_text().replace("db2.img", "db1.img"))
    assert "is damaged" in host.virsh("define", thief).stderr
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    conf.write_text(conf.read_text() + f"[pool:main]\nkind=bench\npaths={host.folder}/pmem\n")

    done = rows(host, "check", "--repair")
    assert [row["Done"] for row in done] == ["yes"] * 4, done
    assert host.nvdimmctl("check").returncode == 0
    (aside,) = ledger.parent.glob("ledger.sqlite.damaged-*")
    assert aside.read_bytes().startswith(b"scribble")

    after = host.record("db1")
    assert after.allocations == before.allocations
    assert after.start
    assert before.start
    assert (after.start.domid, after.start.paths) == (before.start.domid, before.start.paths)
    assert host.state("db1") == ("mapped", before.start.domid, True)
    assert "db1.img belongs to domain db1" in host.virsh("define", thief).stderr
    assert host.nvdimmctl("release", "--yes", "db1").returncode == 4
    host.libvirtd.events()
    host.libvirtd.inject("db1", "reboot")
    host.libvirtd.wait_for("hook started begin db1 id=2")
    host.check("destroy", "db1")
    assert host.state("db1") == ("", None, False)
    assert host.sum("db1") == sum_before


@pytest.fixture
def device(host: Host) -> Iterator[str]:
    """Return a block device that looks like a raw namespace."""
    image = host.folder / "raw"
    image.touch()
    os.truncate(image, 4 << 20)
    loop = run("losetup", "--find", "--show", image).strip()
    sysfs = FakeSysfs(host.folder / "sys")
    namespace = sysfs.namespace("namespace1.0", mode="raw", spa=0x1_5000_0000, size=4 << 20)
    number = os.stat(loop).st_rdev
    sysfs.disk("pmem1", namespace, number, 4 << 20)
    path = host.folder / "pmem1"
    os.mknod(path, stat.S_IFBLK | 0o600, number)
    yield str(path)
    host.virsh("destroy", "db3")
    run("losetup", "--detach", loop)


def test_a_device_stays_its_domains_when_the_ledger_is_made_again(host: Host, device: str) -> None:
    """Devices have no marks: libvirt's definitions say whose they are."""
    owner, thief = host.xml("db3", 3), host.xml("db4", 4)
    for file in (owner, thief):
        file.write_text(re.sub("<path>.*</path>", f"<path>{device}</path>", file.read_text()))
    host.check("define", owner)
    host.check("start", "db3")
    before = host.record("db3")
    ledger = host.folder / "state/ledger.sqlite"
    ledger.write_bytes(b"scribble" * 4096)
    done = rows(host, "check", "--repair")
    assert [(row["Path"], row["Problem"]) for row in done if row["Domain"] == "db3"] == [
        (device, "libvirt's definition has it, and the ledger does not know whose it is"),
        (device, "the guest with domid 2 has it, and the ledger does not know that"),
    ]
    after = host.record("db3")
    assert after.allocations == before.allocations
    assert after.start
    assert (after.start.domid, after.start.state, after.start.paths) == (2, "mapped", (device,))
    assert f"{device} belongs to domain db3" in host.virsh("define", thief).stderr
    assert host.nvdimmctl("release", "--yes", "db3").returncode == 4
    assert not [row for row in rows(host, "check") if row["Domain"] == "db3"]


def test_a_device_stays_its_domains_while_its_guest_is_saved(host: Host, device: str) -> None:
    """Its definition has given it up while the guest ran. A file has its mark then; a device has none."""
    owner, thief, without = host.xml("db3", 3), host.xml("db4", 4), host.xml("db3-without", 3)
    for file in (owner, thief):
        file.write_text(re.sub("<path>.*</path>", f"<path>{device}</path>", file.read_text()))
    without.write_text(without.read_text().replace("<name>db3-without<", "<name>db3<"))
    host.check("define", owner)
    host.check("start", "db3")
    host.check("define", without)
    host.check("managedsave", "db3")
    for way in ("define", "create"):
        refused = host.virsh(way, thief).stderr
        assert f"{device} is in the saved guest of domain db3" in refused
        assert f"virsh managedsave-remove {UUID.format(3)}" in refused
    host.check("managedsave-remove", "db3")
    host.check("define", thief)


def test_a_device_that_the_ledger_of_a_backup_says_is_anothers_is_left_alone(host: Host, device: str) -> None:
    """Since the backup, db4 has given it up and db3 has got it."""
    new, old = host.xml("db3", 3), host.xml("db4", 4)
    for file in (new, old):
        file.write_text(re.sub("<path>.*</path>", f"<path>{device}</path>", file.read_text()))
    host.check("define", old)
    ledger, backup = host.folder / "state/ledger.sqlite", host.folder / "backup"
    host.check("start", "db4")
    host.check("save", "db4", host.folder / "saved")
    copy_ledger(ledger, backup)
    stored = host.folder / "stored.xml"
    stored.write_text((host.libvirtd.folder / "etc/libxl/db4.xml").read_text())
    host.check("undefine", "db4")
    assert host.nvdimmctl("release", "--yes", "db4").returncode == 0
    host.check("define", new)
    with open(device, "r+b") as content:
        content.write(b"of db3" * 1000)
    copy_ledger(backup, ledger)
    forget_devices(host.folder / "state")
    for way in (["wipe", "--yes", "db4"], ["wipe", "--yes", device], ["wipe", "--yes", "--unclaimed", device]):
        refused = host.nvdimmctl(*way)
        assert refused.returncode != 0
        assert "libvirt's definition has it, and the ledger says that it is domain db4's" in refused.stderr
    too = f"{device} is in libvirt's definition of domain db3, too"
    for command, file in (("define", old), ("create", old), ("restore", host.folder / "saved")):
        assert too in host.virsh(command, file).stderr, command
    host.libvirtd.check("define", stored)  # the ledger says that it is db4's
    assert too in host.virsh("start", "db4").stderr
    host.check("undefine", "db4")
    (found,) = [row for row in rows(host, "check", "--repair") if row["Path"] == device]
    assert found["Done"] == ""
    assert f"nvdimmctl release --slot 0 {host.record('db4').uuid}" in found["Remedy"]
    assert host.nvdimmctl("release", "--yes", "db4").returncode == 0  # as the remedy says; its pool does not wipe
    refused = host.nvdimmctl("wipe", "--yes", "--unclaimed", device)
    assert refused.returncode == 4
    assert "libvirt's definition has it, and the ledger does not know whose it is" in refused.stderr
    rows(host, "check", "--repair")
    assert [item.spec.path for item in host.record("db3").allocations] == [device]
    with open(device, "rb") as content:
        assert content.read(6) == b"of db3"


def test_a_device_that_has_another_name_since_a_boot_is_defined_by_it(host: Host, device: str) -> None:
    """Until then, the domain does not start; no other domain can have the device, and no other device is taken."""
    xml, thief = host.xml("db3", 3), host.xml("db4", 4)
    for file, path in ((xml, device), (thief, f"{device}x")):
        file.write_text(re.sub("<path>.*</path>", f"<path>{path}</path>", file.read_text()))
    host.check("define", xml)
    (before,) = host.record("db3").allocations
    os.rename(device, f"{device}x")
    (found,) = [row for row in rows(host, "check", "--repair") if row["Path"] == device]
    assert (found["Problem"], found["Done"]) == ("its device is not there, and has its bytes still", "")
    assert "define the domain with that" in found["Remedy"]
    assert host.virsh("start", "db3").returncode != 0
    assert "belongs to domain db3" in host.virsh("define", thief).stderr
    xml.write_text(xml.read_text().replace(device, f"{device}x"))
    host.check("define", xml)  # as the remedy says
    assert not [row for row in rows(host, "check") if row["Domain"] == "db3"]
    (after,) = host.record("db3").allocations
    assert (after.spec.slot, after.base, after.identity) == (before.spec.slot, before.base, before.identity)
    host.check("start", "db3")


def test_a_backup_of_the_ledger_is_restored_as_its_page_says(host: Host) -> None:
    """Since the backup, the domain was shut down, redefined with another file, and started again."""
    state = host.folder / "state"
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    with conf.open("a") as text:
        text.write(f"[pool:main]\nkind = bench\npaths = {host.folder}/pmem\n")
    with sqlite3.connect(state / "ledger.sqlite") as source, sqlite3.connect(host.folder / "backup") as copy:
        source.backup(copy)  # sqlite3(1) does the same
    host.check("destroy", "db1")
    xml = host.xml("db1", 1)
    xml.write_text(xml.read_text().replace("db1.img", "new.img"))
    host.check("define", xml)
    host.check("start", "db1")
    before = host.record("db1")
    host.libvirtd.stop()
    commands = [line.strip() for line in PAGE.splitlines() if line.startswith(" " * 6)]
    moves = [line for line in commands if not line.startswith(("systemctl", "nvdimmctl"))]
    assert len(moves) == 5
    script = "; ".join(moves).replace("/var/lib/nvdimm-driver", str(state)).replace("FILE", str(host.folder / "backup"))
    host.libvirtd.run("sh", "-ec", script)
    host.libvirtd.start()
    (found,) = [row for row in rows(host, "check") if row["Path"] == str(state / "ledger.sqlite")]
    assert "it is a backup or a copy" in found["Problem"]
    refused = host.libvirtd.run("virsh", "-q", "-c", "xen:///system", "define", xml)
    assert "'nvdimmctl check --repair' does that" in refused.stderr
    assert doctor(host)["ledger"]["Result"] == "WARN"
    rows(host, "check", "--repair")
    assert rows(host, "check") == []
    assert doctor(host)["ledger"]["Result"] == "PASS"
    after = host.record("db1")
    assert [(item.spec.slot, item.spec.path) for item in after.started] == [
        (item.spec.slot, item.spec.path) for item in before.started
    ]
    assert after.start
    assert before.start
    assert (after.start.domid, after.start.paths) == (before.start.domid, before.start.paths)
    assert len(after.allocations) == 2, "it may have the old file, too"


def test_without_libvirt_nobody_knows_whose_a_device_is(host: Host, device: str) -> None:
    (host.folder / "state/ledger.sqlite").write_bytes(b"scribble" * 4096)
    host.libvirtd.stop()
    *_, asked, ledger = rows(host, "check", "--repair")
    assert "libvirt cannot be asked whose the devices are" in asked["Problem"]
    assert "before any domain is defined" in asked["Remedy"]
    assert asked["Remedy"] in ledger["Remedy"]
    host.libvirtd.start()
    assert "in place of one that was lost" in host.virsh("define", host.xml("db2", 2)).stderr


def test_an_empty_ledger_gives_nothing_away(host: Host) -> None:
    """All was deleted that tells of a ledger, and somebody defines a domain before check --repair."""
    for each in (host.folder / "state").glob("ledger*"):
        each.unlink()
    forget_in_use(host.folder / "state")
    thief = host.xml("db2", 2)
    thief.write_text(thief.read_text().replace("db2.img", "db1.img"))
    assert "has the mark of domain db1" in host.virsh("define", thief).stderr


def lose_ledger(host: Host, *, entirely: bool = True) -> None:
    """Lose the ledger.

    :param entirely: with what says that there was one, and the marks of devices.
    """
    host.libvirtd.end("nvdimmd", signal.SIGTERM)
    for each in (host.folder / "state").glob("ledger.sqlite*"):
        each.unlink()
    if entirely:
        forget_in_use(host.folder / "state")
        forget_devices(host.folder / "state")
    host.start_nvdimmd()


@pytest.fixture
def thief(host: Host, device: str) -> Path:
    """Return the XML of db4 with the device of db3, which is off, and which the ledger has lost."""
    owner, thief = host.xml("db3", 3), host.xml("db4", 4)
    for file in (owner, thief):
        file.write_text(re.sub("<path>.*</path>", f"<path>{device}</path>", file.read_text()))
    host.check("define", owner)
    with open(device, "r+b") as content:
        content.write(b"of db3" * 1000)
    lose_ledger(host)
    return thief


def test_an_empty_ledger_gives_no_device_away(host: Host, device: str, thief: Path) -> None:
    """Libvirt's files say whose it is: to a client, to the hook when libvirt starts a domain itself, to an operator."""
    too = f"{device} is in libvirt's definition of domain db3, too"
    for way in ("define", "create"):
        assert too in host.virsh(way, thief).stderr
    alias = f"{device}b"  # as after a boot that has given it another name
    os.mknod(alias, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
    named = thief.read_text()
    thief.write_text(named.replace(device, alias))
    assert f"{alias} is in libvirt's definition of domain db3, too" in host.virsh("define", thief).stderr
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    conf.write_text(conf.read_text() + f"[pool:dev]\nkind=pmem\npaths={device}\n")
    source = host.folder / "source"
    source.write_bytes(b"other" + bytes((4 << 20) - 5))
    words = (str(source), "--pool", "dev", "--name", os.path.basename(device), "--label-size", "0", "--force")
    for command in (["import", *words], ["provision", device, "--size", "4MiB"], ["import", device]):
        refused = host.nvdimmctl(*command)
        assert refused.returncode == 4
        assert too in refused.stderr
    with open(device, "rb") as content:
        assert content.read(6) == b"of db3"
    host.check("start", "db3")  # its hook writes it into the ledger
    assert [item.spec.path for item in host.record("db3").allocations] == [device]


@pytest.mark.parametrize("blank", ["-", " "])
def test_what_only_a_definition_knows_is_not_taken_from_it(host: Host, device: str, thief: Path, blank: str) -> None:
    """Not before check --repair has written it into the ledger, which was lost. libvirt takes blanks in a uuid."""
    lose_ledger(host, entirely=False)
    plain = host.folder / "plain.xml"
    text = re.sub(r"<memory model.*?</memory>\s*", "", host.xml("db3", 3).read_text(), flags=re.DOTALL)
    plain.write_text(text.replace(UUID.format(3), UUID.format(3).replace("-", blank, 1)))
    for words in (("define", plain), ("undefine", "db3"), ("define", thief)):
        assert "in place of one that was lost" in host.virsh(*words).stderr
    assert all(row["Done"] == "yes" for row in rows(host, "check", "--repair"))
    host.check("undefine", "db3")
    assert f"{device} belongs to domain db3" in host.virsh("define", thief).stderr


def test_a_repair_of_a_device_waits_for_a_define(host: Host, device: str, thief: Path) -> None:
    """The define may be about to take the device from the definition that the repair has seen."""
    del thief
    with LockFile(host.folder / f"state/locks/define-{UUID.format(3)}"):
        done = {row["Path"]: row["Done"] for row in rows(host, "check", "--repair")}
    assert done[device].startswith(f"no: domain {UUID.format(3)} is being defined")
    assert {row["Path"]: row["Done"] for row in rows(host, "check", "--repair")}[device] == "yes"


def test_libvirt_autostarts_no_domain_with_a_device_of_another(host: Host, device: str, thief: Path) -> None:
    stored = host.folder / "stored.xml"
    text = (host.libvirtd.folder / "etc/libxl/db3.xml").read_text()
    stored.write_text(text.replace("db3", "db4").replace(UUID.format(3), UUID.format(4)))
    host.libvirtd.check("define", stored)  # without nvdimmd
    host.check("autostart", "db4")
    host.reboot()
    assert "db4" not in host.libvirtd.check("list", "--name").split()
    assert f"{device} is in libvirt's definition of domain db3, too" in host.log()


def test_a_definition_that_cannot_be_started_keeps_no_other_domain_from_anything(host: Host, device: str) -> None:
    """Any user can make one; on a host with a device, commands ask libvirt whose that is."""
    host.check("destroy", "db1")
    host.define("db2", 2)
    host.check("setmaxmem", "db2", "1G", "--config")
    for command in (["check"], ["wipe", "--yes", "db1"], ["wipe", "--yes", device]):
        done = host.nvdimmctl(*command)
        assert done.returncode == 0, (command, done.stderr)
    assert host.nvdimmctl("release", "--yes", "db1").returncode == 0


def test_a_guest_that_the_ledger_has_lost_is_not_migrated_nor_changed(host: Host) -> None:
    lose_ledger(host)
    arguments = bytes(Packer().domain(DomainRef("db1", UUID.format(1), 1)).uint32(0).uint32(0))
    socket = str(host.libvirtd.folder / "run/libvirt/virtxend-sock")
    with Connection(socket) as connection, pytest.raises(LibvirtError) as refused:
        connection.call(Procedure.DOMAIN_MIGRATE_BEGIN3_PARAMS, arguments)
    assert "domain db1 has NVDIMMs, and cannot be migrated" in (RemoteError.unpack(refused.value.payload).message or "")
    assert "has NVDIMMs that the ledger does not know" in host.virsh("setmem", "db1", "256M", "--live").stderr
