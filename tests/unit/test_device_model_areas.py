# SPDX-License-Identifier: Apache-2.0
"""Between prepare and the device model, root destroys a device-dax namespace, which nothing holds, and another domain's
file gets its memory: the device model maps none of that.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nvdimm_driver import host_text
from nvdimm_driver.backing.sysfs import active
from nvdimm_driver.cmd import device_model
from nvdimm_driver.cmd.device_model import attach
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, GuardError
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec
from nvdimm_driver.state.start_steps import PreparedStart
from tests.unit.doubles import NAMESPACE, UUID, MemoryDevices, RecordingMapper, make_driver, started
from tests.unit.fake_sysfs import FakeSysfs

FIRST = NAMESPACE.data_spa
SAID = "mapping of machine frames 0x140000 to 0x147fff at guest frame .*: their namespace is gone, or is another one"


@pytest.fixture
def mapper() -> RecordingMapper:
    return RecordingMapper({7: UUID})


@pytest.fixture
def driver(tmp_path: Path, mapper: RecordingMapper) -> XenNvdimmDriver:
    """Return a driver that has prepared the start of a domain with a device-dax device."""
    devices = MemoryDevices("/dev/dax0.0")
    devices.name = "devdax"
    driver = make_driver(tmp_path, devices, mapper)
    domain = DomainSpec("a", UUID, 512 * MIB, None, (NvdimmSpec(0, "/dev/dax0.0", 128 * MIB),))
    driver.define(domain)
    driver.prepare(domain)
    return driver


def start(
    driver: XenNvdimmDriver, mapper: RecordingMapper, areas: Callable[[PreparedStart], list[tuple[int, int]]]
) -> None:
    attach(7, driver.ledger, mapper, str(driver.state_dir), lambda _: None, lambda *_: None, areas_now=areas)


def in_sysfs(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, uuid: str, spa: int = FIRST, size: int, mode: str
) -> None:
    """Let sysfs have one namespace."""
    sysfs = FakeSysfs(folder / "sys")
    if mode == "fsdax":
        sysfs.fsdax(259 << 8, spa=spa, size=size, uuid=uuid)
    else:
        sysfs.namespace("namespace0.0", mode="dax", spa=spa - 2 * MIB, size=size + 2 * MIB, uuid=uuid)
        driver = "kmem" if mode == "system-ram" else "device_dax"
        sysfs.dax("dax0.0", sysfs.holder("dax0.1", "namespace0.0"), 250 << 8, spa=spa, size=size, driver=driver)
    monkeypatch.setattr(device_model, "active", lambda: active(str(folder / "sys")))


def test_the_same_namespace_is_mapped(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_sysfs(monkeypatch, tmp_path, uuid="ns-0", size=NAMESPACE.data_size, mode="devdax")
    start(driver, mapper, device_model.areas_now)
    assert [mapping[1:] for mapping in mapper.mapped[7]] == [(FIRST // 4096, 128 * MIB // 4096)]


@pytest.mark.parametrize(
    ("uuid", "spa", "size", "mode"),
    [
        ("ns-1", FIRST, NAMESPACE.data_size, "devdax"),
        ("ns-1", FIRST, NAMESPACE.data_size, "fsdax"),
        ("ns-0", FIRST - 2 * MIB, NAMESPACE.data_size, "devdax"),
        ("ns-0", FIRST, NAMESPACE.data_size - 2 * MIB, "devdax"),
        ("ns-0", FIRST, NAMESPACE.data_size, "system-ram"),
    ],
)
def test_another_namespace_is_not_mapped(
    driver: XenNvdimmDriver,
    mapper: RecordingMapper,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uuid: str,
    spa: int,
    size: int,
    mode: str,
) -> None:
    """Nor one of the same uuid whose data begin or end elsewhere."""
    in_sysfs(monkeypatch, tmp_path, uuid=uuid, spa=spa, size=size, mode=mode)
    with pytest.raises(GuardError, match=SAID):
        start(driver, mapper, device_model.areas_now)
    assert (mapper.mapped, mapper.announced.get(7, [])) == ({}, [])


@pytest.mark.parametrize("count", [1, 2])
def test_another_namespace_that_goes_meanwhile_is_in_nobodys_way(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """During the first look, or the second one."""
    in_sysfs(monkeypatch, tmp_path, uuid="ns-0", size=NAMESPACE.data_size, mode="devdax")
    sysfs = FakeSysfs(tmp_path / "sys")
    other = sysfs.namespace("namespace1.0", mode="raw", spa=1 << 44, size=1 << 30, uuid="other")
    sysfs.disk("pmem1", other, 260 << 8)
    read, looks = host_text.read, []

    def read_and_remove(path: Path | str) -> str:
        found = read(path)
        if str(path) == str(other / "mode"):
            looks.append(path)
            if len(looks) == count:
                shutil.rmtree(other)
        return found

    monkeypatch.setattr(host_text, "read", read_and_remove)
    start(driver, mapper, device_model.areas_now)
    assert mapper.mapped[7]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV])
def test_a_namespace_that_is_there_and_cannot_be_read_keeps_the_guest_from_its_start(
    driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    in_sysfs(monkeypatch, tmp_path, uuid="ns-0", size=NAMESPACE.data_size, mode="devdax")
    read = host_text.read

    def fail(path: Path | str) -> str:
        if str(path).endswith("resource"):
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(host_text, "read", fail)
    with pytest.raises(BackingError, match="resource: cannot be read"):
        start(driver, mapper, device_model.areas_now)
    assert mapper.mapped == {}


def test_one_that_goes_while_the_frames_are_announced_is_not_mapped(
    driver: XenNvdimmDriver, mapper: RecordingMapper
) -> None:
    looks = [started(driver.ledger).areas, []]
    with pytest.raises(GuardError, match=SAID):
        start(driver, mapper, lambda _: looks.pop(0))
    assert (mapper.mapped, mapper.announced[7]) == ({}, [])


@pytest.mark.parametrize("there", [True, False])
def test_memory_of_a_plug_in_is_asked_for(
    driver: XenNvdimmDriver, mapper: RecordingMapper, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """It is in no sysfs that the device model knows."""
    from nvdimm_driver import conf, plugin_loader

    own = MemoryDevices("/dev/dax0.0")
    own.areas = lambda: [NAMESPACE] if there else []  # type: ignore[method-assign]
    monkeypatch.setattr(device_model, "active", list)
    monkeypatch.setattr(device_model, "SHIPPED", ("fsdax", "pmem"))
    monkeypatch.setattr(conf, "load", lambda: None)
    monkeypatch.setattr(plugin_loader, "load_all", lambda namespace, conf: [own])
    if there:
        start(driver, mapper, device_model.areas_now)
        assert mapper.mapped[7]
    else:
        with pytest.raises(GuardError, match=SAID):
            start(driver, mapper, device_model.areas_now)
