# SPDX-License-Identifier: Apache-2.0
"""An upgrade from the version before: domains go on with what their guests have seen.

The package of that version (tests/data/upgrade) defines, starts and saves domains, on real ext4 and with the real
libvirtd; then this version goes on with the same state, files and definitions.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.acpi.tables import Nfit, RegionMapping, SpaRange, split
from nvdimm_driver.model import KIB, MIB
from tests.integration.bench_host import ROOT, UUID, Host
from tests.unit.label_areas import area_with_namespaces, cookie

WHEEL = ROOT / "tests/data/upgrade/nvdimm_driver-0.2.0-py3-none-any.whl"
CONF = """
[DEFAULT]
allow_any_path=true
state_dir = {folder}/state
log_file = {folder}/nvdimm-driver.log
[xen]
device_model = {folder}/nvdimm-device-model
qemu = {folder}/qemu
[acpi]
builder = native
[rpc]
group = root
[libvirt]
hooks_dir = /etc/libvirt/hooks
"""
"""The options of the bench that the version before has."""
LABEL = 128 * KIB
MARK = "import os, sys; print(os.getxattr(sys.argv[1], 'trusted.nvdimm_driver.owner').decode())"
BASE = 0x3000000000


@dataclass(frozen=True)
class Wish:
    """An NVDIMM in the XML of a user; sizes in MiB."""

    name: str
    size: int = 2
    labels: bool = False
    slot: int | None = None
    base: int | None = None


WISHES = (Wish("a"), Wish("b", labels=True), Wish("c", slot=5, labels=True), Wish("d", 4, base=BASE), Wish("e", 4))
"""Slots that the version before gives them: a 0, b 1, d 2, e 3, c 5."""
NAMES = ("db1", "db2", "db3", "db4", "db5", "db6")
SLOTS = {"a": 0, "b": 1, "c": 5, "d": 2, "e": 3}


class Upgraded:
    """A host on which the version before has defined, started and saved domains."""

    def __init__(self, folder: Path) -> None:
        self.host = Host(folder, wheels=[WHEEL], conf=CONF)
        self.before: dict[str, Any] = {}

    def upgrade(self) -> None:
        """Replace the package, as pip does, register it, and restart nvdimmd."""
        (site,) = self.host.folder.glob("python/lib/python*/site-packages")
        for each in (*site.glob("nvdimm_driver*"), *site.glob("nova")):
            shutil.rmtree(each)
        self.host.configure()
        done = self.host.nvdimmctl("register")
        assert done.returncode == 0, done.stderr
        assert "hold the backings of db2, which runs" in done.stdout
        self.host.libvirtd.end("nvdimmd")
        self.host.start_nvdimmd()

    def code(self) -> str:
        where = "import nvdimm_driver; print(nvdimm_driver.__file__)"
        return self.host.libvirtd.run(self.host.folder / "python/bin/python", "-I", "-c", where).stdout.strip()

    def define(self, name: str, number: int, *wishes: Wish) -> None:
        file = self.host.xml(name, number)
        text = file.read_text()
        start, end = text.index("    <memory model"), text.index("  </devices>")
        file.write_text(text[:start] + "".join(self._xml(name, wish) for wish in wishes) + text[end:])
        self.host.check("define", file)

    def _xml(self, name: str, wish: Wish) -> str:
        label = f"<label><size unit='KiB'>{LABEL // KIB}</size></label>" if wish.labels else ""
        address = "" if wish.slot is None and wish.base is None else f"<address type='dimm' slot='{SLOTS[wish.name]}'"
        address += f" base='{wish.base:#x}'/>" if wish.base else "/>" if address else ""
        path = self.path(name, wish.name)
        return (
            f"<memory model='nvdimm'><source><path>{path}</path></source>"
            f"<target><size unit='MiB'>{wish.size}</size>{label}</target>{address}</memory>"
        )

    def path(self, domain: str, name: str) -> Path:
        return self.host.folder / f"pmem/{domain}-{name}.img"

    def write(self, domain: str, *wishes: Wish) -> None:
        """Write what a guest has written: data, and labels for the slot that it knows."""
        for wish in wishes:
            data = wish.name.encode() * (wish.size * MIB - (LABEL if wish.labels else 0))
            labels = area_with_namespaces(LABEL, cookie(SLOTS[wish.name])) if wish.labels else b""
            source = self.host.folder / "bytes"
            source.write_bytes(data + labels)
            done = self.host.libvirtd.run("dd", "conv=notrunc", f"if={source}", f"of={self.path(domain, wish.name)}")
            assert done.returncode == 0, done.stderr

    def rows(self, name: str) -> list[tuple[Any, ...]]:
        """Return what the ledger has of a domain's NVDIMMs, without a driver."""
        with closing(sqlite3.connect(self.host.folder / "state/ledger.sqlite")) as database:
            return database.execute(
                "SELECT slot, path, size, label_size, fixed_base, kind, device, start, inode, generation, file_size, "
                "base FROM allocation JOIN domain USING (uuid) WHERE name = ? ORDER BY slot",
                (name,),
            ).fetchall()

    def marks(self, name: str) -> list[str]:
        return [self.host.libvirtd.run(sys.executable, "-c", MARK, row[1]).stdout for row in self.rows(name)]

    def problems(self) -> list[str]:
        """Return what check finds."""
        lines = self.host.nvdimmctl("check").stdout.splitlines()
        return [line for line in lines if ".img" in line or "| db" in line]

    def sums(self) -> str:
        return self.host.libvirtd.run("sh", "-c", f"sha256sum {self.host.folder}/pmem/*.img").stdout

    def places(self, number: int) -> dict[int, tuple[int, int]]:
        """Return base and visible size of each NVDIMM by slot, as the tables of a domain's last start have them."""
        data = (self.host.folder / "state/domains" / UUID.format(number) / "tables").read_bytes()
        (nfit,) = (Nfit.parse(table) for table in split(data) if table[:4] == b"NFIT")
        ranges = {each.index: each for each in nfit.of(SpaRange)}
        return {
            each.handle - 1: (ranges[each.spa_index].base, ranges[each.spa_index].length)
            for each in nfit.of(RegionMapping)
        }

    def runs(self, name: str) -> bool:
        start = self.host.record(name).start
        return start is not None and start.state == "mapped"

    def expected(self, name: str) -> dict[int, tuple[int, int]]:
        """Return what :meth:`places` has for the NVDIMMs in the ledger."""
        return {row[0]: (row[-1], row[2] - row[3]) for row in self.rows(name)}


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    """Return the host after the upgrade.

    db1 is off, db2 runs, db3 and db6 have a managed save, db4 is saved to a file. db5 is saved, too, and was then
    redefined with another NVDIMM in the place of its own.
    """
    found = Upgraded(tmp_path_factory.mktemp("host"))
    host = found.host
    try:
        assert str(host.folder) in found.code()
        found.define("db1", 1, *WISHES)
        found.write("db1", *WISHES)
        for name, number in (("db2", 2), ("db3", 3), ("db4", 4)):
            found.define(name, number, *WISHES[:3])
            found.write(name, *WISHES[:3])
            host.check("start", name)
        host.check("managedsave", "db3")
        host.check("save", "db4", host.folder / "saved")
        found.define("db5", 5, WISHES[0])
        host.check("start", "db5")
        host.check("save", "db5", host.folder / "older")
        found.define("db5", 5, WISHES[1])
        found.define("db6", 6, WISHES[0])
        host.check("start", "db6")
        host.check("managedsave", "db6")
        found.before = {name: (found.rows(name), found.marks(name)) for name in NAMES}
        found.before["sums"] = found.sums()
        found.before["places"] = {number: found.places(number) for number in (2, 3, 4)}
        found.upgrade()
        assert str(host.folder) not in found.code()
        yield found
    finally:
        host.libvirtd.close()


def test_the_version_before_gave_these_slots(upgraded: Upgraded) -> None:
    """If not, the other tests would show nothing."""
    rows, _ = upgraded.before["db1"]
    names = {Path(row[1]).stem.removeprefix("db1-"): row[0] for row in rows}
    assert names == SLOTS
    assert [row[-1] for row in rows if row[0] == 2] == [BASE]
    assert all(mark.startswith('{"version": 1') for name in NAMES for mark in upgraded.before[name][1])
    for number, places in upgraded.before["places"].items():
        assert places == upgraded.expected(f"db{number}")


def test_nothing_has_changed(upgraded: Upgraded) -> None:
    assert upgraded.problems() == []
    for name in NAMES:
        assert (upgraded.rows(name), upgraded.marks(name)) == upgraded.before[name]
    assert upgraded.sums() == upgraded.before["sums"]
    assert upgraded.runs("db2")


def test_a_definition_goes_through_as_it_is_shown(upgraded: Upgraded) -> None:
    host = upgraded.host
    shown = host.folder / "shown.xml"
    shown.write_text(host.check("dumpxml", "db1"))
    assert "<address type='dimm' slot='1'/>" not in shown.read_text(), "the version before wrote no slots"
    host.check("define", shown)
    assert upgraded.rows("db1") == upgraded.before["db1"][0]
    shown.write_text(host.check("dumpxml", "db1"))
    assert "<address type='dimm' slot='1'/>" in shown.read_text()
    host.check("define", shown)
    assert upgraded.rows("db1") == upgraded.before["db1"][0]


def test_who_stays_keeps_its_place(upgraded: Upgraded) -> None:
    host = upgraded.host
    device = host.folder / "device.xml"
    for wish in (WISHES[0], WISHES[4]):
        device.write_text(upgraded._xml("db1", wish))
        host.check("detach-device", "db1", device, "--config")
    left = [row for row in upgraded.before["db1"][0] if row[0] not in (SLOTS["a"], SLOTS["e"])]
    assert upgraded.rows("db1") == left
    host.check("start", "db1")
    assert upgraded.places(1) == upgraded.expected("db1")
    host.check("destroy", "db1")
    assert upgraded.rows("db1") == left
    assert upgraded.sums() == upgraded.before["sums"]


def test_a_guest_that_runs_goes_on_and_boots_again(upgraded: Upgraded) -> None:
    host = upgraded.host
    host.libvirtd.events()
    host.libvirtd.inject("db2", "reboot")
    happened: list[str] = []
    while not any(event.startswith("hook started begin db2") for event in happened):
        time.sleep(0.05)
        happened += host.libvirtd.events()
    assert upgraded.places(2) == upgraded.before["places"][2]
    host.check("destroy", "db2")
    host.check("start", "db2")
    assert upgraded.places(2) == upgraded.before["places"][2]
    assert upgraded.rows("db2") == upgraded.before["db2"][0]
    host.check("destroy", "db2")


@pytest.mark.parametrize("number", [3, 4])
def test_a_guest_that_was_saved_goes_on(upgraded: Upgraded, number: int) -> None:
    host, name = upgraded.host, f"db{number}"
    host.check(*(["start", name] if number == 3 else ["restore", host.folder / "saved"]))
    assert upgraded.runs(name)
    assert upgraded.places(number) == upgraded.before["places"][number]
    assert upgraded.rows(name) == upgraded.before[name][0]
    host.check("managedsave", name)
    host.check("start", name)
    host.check("destroy", name)
    assert upgraded.sums() == upgraded.before["sums"]
    assert upgraded.problems() == []


def test_a_slot_comes_back_that_a_restored_guest_had(upgraded: Upgraded) -> None:
    host = upgraded.host
    ((slot, path, *_, base),) = upgraded.before["db5"][0]
    assert (slot, path) == (0, str(upgraded.path("db5", "b")))
    host.check("restore", host.folder / "older")
    assert upgraded.runs("db5")
    assert set(upgraded.places(5)) == {0}
    host.check("destroy", "db5")
    host.check("start", "db5")
    assert upgraded.places(5) == {0: (base, 2 * MIB - LABEL)}
    assert "<address" not in host.check("dumpxml", "db5", "--inactive")
    host.check("destroy", "db5")


def test_a_saved_guest_does_not_go_on_over_zeros(upgraded: Upgraded) -> None:
    host = upgraded.host
    wiped = host.nvdimmctl("wipe", "--yes", "db6")
    assert wiped.returncode == 0, wiped.stderr
    assert "db6 has a saved guest (virsh managedsave), which cannot go on without these bytes" in wiped.stderr
    refused = host.virsh("start", "db6")
    assert refused.returncode != 0
    assert "the saved guest cannot go on: since it was saved" in refused.stderr
    assert "Managed save:   yes" in host.check("dominfo", "db6")
