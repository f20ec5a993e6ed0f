# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvdimm_driver.backing.paths import resolve_strictly
from nvdimm_driver.device_marks import DeviceMarks
from nvdimm_driver.errors import ConfigError, InUseError
from nvdimm_driver.model import PAGE, Allocation, BackingIdentity, Location, NvdimmSpec
from nvdimm_driver.plugins import Backing
from nvdimm_driver.state.device_claims import UnknownClaims
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.owner_marks import pack
from nvdimm_driver.xml.definition_files import DefinitionFiles, StoredDomain
from nvdimm_driver.xml.rewrite import restore, rewrite
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking

DEVICE, SIZE = "/dev/pmem1", 4 << 20
XML = f"""<domain type='xen'><name>owner</name><uuid>{UUID}</uuid><memory unit='GiB'>1</memory>
<os><type arch='x86_64' machine='xenfv'>hvm</type></os><devices><memory model='nvdimm'><source><path>{DEVICE}</path>
</source><target><size unit='MiB'>4</size></target></memory></devices></domain>"""
STORED = rewrite(XML, "/device-model")


class Devices(MemoryBacking):
    """Devices by their names, as pairs of name and number."""

    mark, inspect = Backing.mark, Backing.inspect

    def __init__(self, **devices: str) -> None:
        super().__init__()
        self.devices = {f"/dev/{name}": number for name, number in devices.items()}

    def handles(self, path: str) -> bool:
        return path in self.devices

    def locate(self, spec: NvdimmSpec) -> Location:
        return Location(identity(self.devices[spec.path]), ())


def identity(number: str) -> BackingIdentity:
    return BackingIdentity(MemoryBacking.name, number, 0, 0, 0, SIZE)


def claims(stored: list[StoredDomain], **devices: str) -> UnknownClaims:
    return UnknownClaims(Ledger(":memory:"), [Devices(**devices)], stored)


def files(*folders: Path) -> DefinitionFiles:
    return DefinitionFiles([str(folder) for folder in folders], restore, os.path.abspath)


def test_definitions_and_guests_are_read(tmp_path: Path) -> None:
    (tmp_path / "owner.xml").write_text(f"<!--\nmade by libvirt\n-->\n\n{STORED}\n")
    (tmp_path / "plain.xml").write_text("<domain type='xen'><name>plain</name></domain>")
    (tmp_path / "autostart").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "owner.xml").write_text(f"<domstatus state='running' pid='1'>\n{STORED}\n</domstatus>\n")
    owner = StoredDomain("owner", UUID, (DEVICE,))
    assert list(files(tmp_path, run, tmp_path / "missing")) == [owner, owner]


def test_without_libvirts_folders_nobody_gets_a_device(tmp_path: Path) -> None:
    """Whose a device is, nobody can say then: libvirt keeps its domains elsewhere, or has never run."""
    stored = files(tmp_path / "libxl", tmp_path / "run")
    unknown = UnknownClaims(Ledger(":memory:"), [Devices(pmem1="one")], stored)
    with pytest.raises(ConfigError, match=f"none of their folders is there: {tmp_path}/libxl, {tmp_path}/run") as found:
        unknown.check(UUID, {DEVICE: None})
    assert found.value.hint == "start libvirt; if it keeps its domains elsewhere, set [libvirt] definition_dirs"
    unknown.check(UUID, {"/mnt/pmem0/a.img": None})
    assert list(files()) == []
    (tmp_path / "run").mkdir()
    unknown.check(UUID, {DEVICE: None})


def test_a_definition_that_cannot_be_read_may_have_anything_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "owner.xml").write_text(STORED.replace("<nvdimm:domain ", "<nvdimm:domain added='x' "))
    (found,) = files(tmp_path)
    assert (found.name, found.paths, found.names(DEVICE), found.names("/dev/pmem2")) == ("owner", (), True, False)
    assert not StoredDomain("owner", "", (), f"<path>{DEVICE}0<").names(DEVICE), "a longer number is another device's"
    with pytest.raises(InUseError, match=f"^{tmp_path}/owner.xml cannot be read as the XML of a domain") as error:
        claims([found], pmem1="one").check(OTHER_UUID, {DEVICE: None})
    assert error.value.hint == "correct that file, or remove it with its domain"
    (tmp_path / "owner.xml").unlink()
    (tmp_path / "owner.xml").mkdir()
    with pytest.raises(ConfigError, match=r"owner.xml: Is a directory"):
        list(files(tmp_path))


def test_a_definition_with_a_path_that_nothing_can_follow_claims_no_device_by_its_title(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "owner.xml").write_text(
        STORED.replace("</name>", f"</name><title>{DEVICE}</title>").replace(
            f"<path>{DEVICE}<", f"<path>{tmp_path}/loop/a<"
        )
    )
    (found,) = DefinitionFiles([str(tmp_path)], restore, resolve_strictly)
    assert (found.paths, found.names(DEVICE)) == ((f"{tmp_path}/loop/a",), False)
    assert "leads through more than 40 symbolic links" in found.unfollowed[0]


def test_a_definition_of_which_libvirt_has_made_many_elements_is_read(tmp_path: Path) -> None:
    """Of each <video/>, libvirt makes five elements and attributes."""
    videos = "<video><model type='vga' vram='16384' heads='1'/></video>" * 41_000
    (tmp_path / "owner.xml").write_text(STORED.replace("</emulator>", f"</emulator>{videos}"))
    (found,) = files(tmp_path)
    assert (found.paths, found.text) == ((DEVICE,), "")


def test_a_definition_that_cannot_be_read_takes_no_device_from_its_owner(tmp_path: Path) -> None:
    """The owner by the ledger and by the mark keeps its device; nobody else gets it."""
    unreadable = StoredDomain("evil", "", (), f"<description>{DEVICE}</description>", file="evil.xml")
    found = claims([unreadable], pmem1="one")
    had = Allocation(UUID, NvdimmSpec(0, DEVICE, SIZE), identity("one"), PAGE)
    found.ledger.store(UUID, "owner", 1 << 30, [had])
    record = found.ledger.find_domain(UUID)
    assert record is not None
    for backing in found.backings:
        backing.device_marks = DeviceMarks(tmp_path / "devices")
    with pytest.raises(InUseError, match=r"^evil.xml cannot be read"):
        found.check(UUID, {DEVICE: None})  # by the ledger alone
    found.backings[0].mark(DEVICE, pack(record, had), had.identity)
    found.check(UUID, {DEVICE: None})
    for uuid in (OTHER_UUID, ""):
        with pytest.raises(InUseError):
            found.check(uuid, {DEVICE: None})


def test_a_device_is_anothers_by_any_name() -> None:
    found = claims([StoredDomain("owner", UUID, (DEVICE,))], pmem1="one", pmem1b="one", pmem2="two")
    found.check(UUID, {DEVICE: None})
    found.check(OTHER_UUID, {"/dev/pmem2": None})
    for uuid, path in ((OTHER_UUID, DEVICE), ("", DEVICE), (OTHER_UUID, "/dev/pmem1b")):
        with pytest.raises(InUseError, match=f"{path} is in libvirt's definition of domain owner, too"):
            found.check(uuid, {path: None})


def test_a_name_that_was_another_devices_before_a_boot_is_no_claim() -> None:
    """Two devices have each other's names: each domain can be defined anew with the new name of its own.

    A third domain gets none: the ledger may be older than libvirt's definition.
    """
    found = claims([StoredDomain("owner", UUID, (DEVICE,))], pmem1="two", pmem2="one")
    had = Allocation(UUID, NvdimmSpec(0, DEVICE, SIZE), identity("one"), PAGE)
    found.ledger.store(UUID, "owner", 1 << 30, [had])
    for uuid in ("", OTHER_UUID):
        with pytest.raises(InUseError, match="is in libvirt's definition of domain owner, too"):
            found.check(uuid, {DEVICE: None})
    others = Allocation(OTHER_UUID, NvdimmSpec(0, f"{DEVICE}x", SIZE), identity("two"), PAGE)
    found.ledger.store(OTHER_UUID, "other", 1 << 30, [others])
    found.check(OTHER_UUID, {DEVICE: None})


def test_the_hint_edits_the_domain_that_has_the_device() -> None:
    """Virsh takes a word for a uuid before it takes it for a name (tools/virsh-util.c)."""
    named_like_the_other = StoredDomain(UUID, OTHER_UUID, (DEVICE,))
    with pytest.raises(InUseError) as error:
        claims([named_like_the_other], pmem1="one").check(UUID, {DEVICE: None})
    assert error.value.hint.endswith(f": virsh edit {OTHER_UUID}")
