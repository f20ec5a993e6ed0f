# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from xml.etree import ElementTree

from nvdimm_driver.cmd.ctl import memory_map
from nvdimm_driver.model import GIB, MIB, Allocation, Namespace
from nvdimm_driver.pools.usage import Piece, Region, host_map
from tests.unit.doubles import MemoryBacking, RecordingMapper, make_driver
from tests.unit.fake_sysfs import FakeSysfs
from tests.unit.test_pools_rules import domain

SPA = 4 * GIB
NAMESPACE = Namespace("namespace0.0", "fsdax", "pmem0", "uid", SPA + 128 * MIB, 896 * MIB)
PIECES = (
    Piece(SPA + 256 * MIB, 128 * MIB, "db<1>", 0, "/mnt/pmem0/a", "mapped"),
    Piece(SPA + 512 * MIB, 1 * MIB, "db2", 0, "/mnt/pmem0/b", "off"),
    Piece(SPA + 768 * MIB, 128 * MIB, "db<1>", 0, "/mnt/pmem0/a", "mapped"),
)
REGION = Region("region0", SPA, GIB, (NAMESPACE,), PIECES)


def test_a_map_for_a_terminal() -> None:
    assert memory_map.text([REGION], 66) == (
        "region0: 1 GiB at 0x100000000\n"
        "[        ........aaaaaaaa........b...............aaaaaaaa........]\n"
        "  . namespace0.0: fsdax, pmem0, 896 MiB\n"
        "  a db<1> slot 0: /mnt/pmem0/a, 256 MiB, 2 extents, mapped\n"
        "  b db2 slot 0: /mnt/pmem0/b, 1 MiB, off\n"
    )


def test_a_narrow_terminal_still_has_a_bar() -> None:
    assert len(memory_map.text([REGION], 0).splitlines()[1]) == 40


def test_a_map_as_svg() -> None:
    root = ElementTree.fromstring(memory_map.svg([REGION, REGION]))
    titles = [each.text for each in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles.count("db<1> slot 0: /mnt/pmem0/a, 256 MiB, 2 extents, mapped") == 4
    widths = [float(each.get("width", "0")) for each in root.iter("{http://www.w3.org/2000/svg}rect") if len(each)]
    assert widths[:3] == [936.0, 819.0, 117.0]
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:4] == [
        "region0: 1 GiB at 0x100000000",
        "namespace0.0: fsdax, pmem0, 896 MiB",
        "db<1> slot 0: /mnt/pmem0/a, 256 MiB, 2 extents, mapped",
        "db2 slot 0: /mnt/pmem0/b, 1 MiB, off",
    ]


def test_more_nvdimms_than_letters() -> None:
    pieces = tuple(Piece(SPA + index * MIB, MIB, f"db{index}", 0, "/a", "off") for index in range(100))
    assert "  a db52 slot 0" in memory_map.text([Region("region0", SPA, GIB, (), pieces)], 80)


def test_where_everything_is(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path / "sys")
    sysfs.fsdax(1, spa=5 * GIB, size=GIB)
    sysfs.device(sysfs.region, resource=hex(5 * GIB), size=GIB)
    sysfs.link("bus/nd/devices/region0", sysfs.region)
    driver = make_driver(tmp_path, MemoryBacking(), RecordingMapper())
    driver.define(domain(("/mnt/pmem0/a", 64 * MIB)))
    record = driver.ledger.domains()[0]
    half_done = Allocation(record.uuid, domain(("/mnt/pmem0/b", MIB)).nvdimms[0])
    driver.ledger.store("u", "db2", GIB, [half_done])
    (region,) = host_map(driver.ledger, driver.backings, sysfs.root)
    assert (region.name, region.spa, region.size) == ("region0", 5 * GIB, GIB)
    assert [each.name for each in region.namespaces] == ["namespace0.0"]
    assert region.pieces == (Piece(5 * GIB, 64 * MIB, "db1", 0, "/mnt/pmem0/a", "off"),)
