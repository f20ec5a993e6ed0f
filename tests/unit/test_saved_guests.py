# SPDX-License-Identifier: Apache-2.0
"""The saved guests in libvirt's folder, which is read when libvirt cannot be asked."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path

from nvdimm_driver.doctor.repair_saved_guests import saved
from nvdimm_driver.model import MIB
from nvdimm_driver.rpc.xdr import DomainRef
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xml.definition_files import has_managed_save
from tests.unit.doubles import OTHER_UUID, UUID

THIRD_UUID = UUID[:-1] + "3"
NVDIMM = "<memory model='nvdimm'><source><path>/pmem/a</path></source><target><size>4096</size></target></memory>"


def save(folder: Path, name: str, uuid: str, devices: str = "") -> None:
    """Write an image, as libxl's driver in libvirt does; the guest's memory is left out."""
    xml = f"<domain type='xen'><name>{name}</name><uuid>{uuid}</uuid><devices>{devices}</devices></domain>".encode()
    header = struct.pack("=16sII40x", b"libvirt-xml\n \0 \r", 2, len(xml))
    (folder / f"{name}.save").write_bytes(header + xml)


def found(tmp_path: Path) -> list[DomainRef]:
    with closing(Ledger(str(tmp_path / "ledger.sqlite"))) as ledger:
        ledger.store(UUID, "known", 512 * MIB, [])
        return saved(ledger, str, str(tmp_path / "no-socket"), str(tmp_path))


def test_domains_with_nvdimms_and_domains_of_the_ledger(tmp_path: Path) -> None:
    save(tmp_path, "known", UUID)
    save(tmp_path, "lost", OTHER_UUID, NVDIMM)
    save(tmp_path, "other", THIRD_UUID)
    assert found(tmp_path) == [DomainRef("known", UUID, -1), DomainRef("lost", OTHER_UUID, -1)]


def test_an_image_that_cannot_be_read_is_of_the_domain_that_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "known.save").write_bytes(b"damaged")
    (tmp_path / "other.save").write_bytes(b"")
    assert found(tmp_path) == [DomainRef("known", UUID, -1)]


def test_an_image_is_of_the_domain_whose_uuid_it_has(tmp_path: Path) -> None:
    assert not has_managed_save(str(tmp_path), "db1", UUID)
    save(tmp_path, "db1", OTHER_UUID)
    assert [has_managed_save(str(tmp_path), "db1", uuid) for uuid in (UUID, OTHER_UUID)] == [False, True]
    (tmp_path / "db1.save").write_bytes(b"damaged")
    assert has_managed_save(str(tmp_path), "db1", UUID)


def test_without_the_folder_nothing_is_found(tmp_path: Path) -> None:
    with closing(Ledger(str(tmp_path / "ledger.sqlite"))) as ledger:
        assert saved(ledger, str, "", "") == saved(ledger, str, "", str(tmp_path / "no-folder")) == []
