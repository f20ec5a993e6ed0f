# SPDX-License-Identifier: Apache-2.0
"""A guest runs with a device-dax device whose namespace root has destroyed, and a file system has its memory now: to
that file system, the guest's frames are free blocks. No command of the driver's writes there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError
from nvdimm_driver.model import MIB, DomainSpec, Intake, NvdimmSpec
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import empty
from tests.unit.doubles import OTHER_UUID, UUID, MemoryDevices, RecordingMapper, make_driver, map_prepared

SIZE = 16 * MIB

SAID = r"is on namespace0\.0, which has memory of the running guest {}: its machine frames 0x140000 to 0x147fff"


class Host(NamedTuple):
    driver: XenNvdimmDriver
    mapper: RecordingMapper
    fs: FileSystem
    folder: Path

    def blocks(self) -> dict[str, int]:
        """Return how many blocks each file has, also of those whose names are hidden."""
        return {each.name: each.stat().st_blocks for each in self.fs.files()}

    def ways(self) -> dict[str, Callable[[], object]]:
        """Return the ways to write new bytes."""
        spec, source = NvdimmSpec(0, f"{self.fs.root}/b.img", SIZE), self.folder / "source"
        sparse = f"{self.fs.root}/sparse"
        source.write_bytes(b"of b" * (SIZE // 4))
        watch = lambda what: lambda done, total: None  # noqa: E731
        return {
            "define": lambda: self.driver.define(DomainSpec("b", OTHER_UUID, 512 * MIB, None, (spec,))),
            "provision": lambda: self.driver.importer.provision(spec, watch),
            "import": lambda: self.driver.importer.import_copy(str(source), spec.path, None, 0, watch),
            "import in place": lambda: self.driver.importer.import_in_place(sparse, None, 0, watch),
            "wipe": lambda: self.driver.wiper.wipe(NvdimmSpec(0, sparse, SIZE), watch),
        }


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    fs = file_systems[request.param]
    with open(fs.root / "sparse", "wb") as sparse:
        sparse.truncate(SIZE)
    yield running(tmp_path, fs)
    empty(fs)


def running(tmp_path: Path, fs: FileSystem) -> Host:
    """Return a host on which domain a runs as domid 7, with what was /dev/dax0.0."""
    devices, mapper = MemoryDevices("/dev/dax0.0"), RecordingMapper({})
    driver = make_driver(tmp_path, devices, mapper)
    a = DomainSpec("a", UUID, 512 * MIB, None, (NvdimmSpec(0, "/dev/dax0.0", 128 * MIB),))
    driver.define(a)
    driver.prepare(a)
    mappings = driver.ledger.find_prepared(UUID).mappings  # type: ignore[union-attr]
    mapper.alive[7] = UUID
    map_prepared(driver.ledger, 7)
    mapper.announce(7, mappings)
    devices.files.clear()
    devices.areas = lambda: []  # type: ignore[method-assign]
    fs.backing.device_marks = driver.ledger.device_marks
    driver.backings.append(fs.backing)  # type: ignore[attr-defined]
    return Host(driver, mapper, fs, tmp_path)


@pytest.mark.parametrize("way", ["define", "provision", "import", "import in place", "wipe"])
def test_nothing_is_written_over_a_running_guest(host: Host, way: str) -> None:
    with pytest.raises(InUseError, match=SAID.format(r"a \(domid 7\)")):
        host.ways()[way]()
    assert host.blocks() == {"sparse": 0}


@pytest.mark.parametrize(("kind", "what"), [*itertools.product(MKFS, ["holes", "zeros"]), ("xfs", "shared blocks")])
def test_no_repair_writes_over_a_running_guest(
    tmp_path: Path, file_systems: dict[str, FileSystem], kind: str, what: str
) -> None:
    """The file was there before."""
    fs = file_systems[kind]
    spec = NvdimmSpec(0, path := f"{fs.root}/b.img", SIZE)
    run("fallocate", "-l", str(140 * MIB), fs.root / "before")  # the guest has free blocks, and not the file's
    first = make_driver(tmp_path, fs.backing, RecordingMapper({}))  # type: ignore[arg-type]
    first.define(DomainSpec("b", OTHER_UUID, 512 * MIB, None, (spec,)))
    first.close()
    (fs.root / "before").unlink()
    host = running(tmp_path, fs)
    if what == "holes":
        os.unlink(path)
        Path(path).touch()
        os.truncate(path, SIZE)
    elif what == "zeros":
        os.truncate(path, MIB)
    else:
        run("cp", "--reflink=always", path, f"{path}.copy")
    blocks, is_shared = host.blocks(), fs.backing.is_shared(spec)
    (mend,) = (each.mend for each in look(host.driver, zeros=[path] if what == "zeros" else []) if each.mend)
    with pytest.raises(InUseError, match=SAID.format(r"a \(domid 7\)")):
        mend()
    assert (host.blocks(), fs.backing.is_shared(spec)) == (blocks, is_shared)
    assert "bytes-lost" not in [each.kind for each in host.driver.ledger.events()]
    empty(fs)


def test_nothing_is_written_when_the_namespace_is_made_anew_between_plan_and_define(host: Host) -> None:
    """As while a define waits for others that write zeros."""
    real, elsewhere = host.fs.backing.examine, "ns-elsewhere"
    b = DomainSpec("b", OTHER_UUID, 512 * MIB, None, (NvdimmSpec(0, f"{host.fs.root}/b.img", SIZE),))

    def examine(spec: NvdimmSpec) -> Intake:
        found = real(spec)
        return replace(found, namespace=replace(found.namespace, uid=elsewhere, data_spa=1 << 44))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.fs.backing, "examine", examine)
        plan = host.driver.check(b)
    with pytest.raises(InUseError, match=SAID.format(r"a \(domid 7\)")):
        host.driver.define(b, plan)


def test_a_guest_that_the_ledger_does_not_know_counts(host: Host) -> None:
    """Its frames are announced; nobody can tell of which namespace they are."""
    host.mapper.alive = {7: UUID, 8: OTHER_UUID}
    host.mapper.announce(8, [(0, 0x140000, 0x8000)])
    host.driver.ledger._write([("DELETE FROM attachment", ())])
    host.mapper.alive.pop(7)
    with pytest.raises(InUseError, match=SAID.format("with domid 8")):
        host.ways()["provision"]()


@pytest.mark.parametrize("way", ["define", "provision", "import"])
def test_there_is_room_again_after_the_end_of_the_guest(host: Host, way: str) -> None:
    host.mapper.alive.clear()
    host.driver.reconcile()
    host.ways()[way]()
    assert os.path.getsize(f"{host.fs.root}/b.img") == SIZE


def test_guests_of_the_same_file_system_are_in_nobodys_way(host: Host) -> None:
    """Also one that a version has started which recorded nothing of its run."""
    host.mapper.alive.clear()
    host.driver.reconcile()
    c = DomainSpec("c", UUID, 512 * MIB, None, (NvdimmSpec(0, f"{host.fs.root}/c.img", SIZE),))
    host.driver.define(c)
    host.driver.prepare(c)
    host.mapper.alive[9] = UUID
    map_prepared(host.driver.ledger, 9)
    host.ways()["define"]()
    host.driver.ledger._write([("UPDATE attachment SET nvdimms = ''", ())])
    host.driver.importer.provision(NvdimmSpec(0, f"{host.fs.root}/d.img", SIZE), lambda what: lambda done, total: None)
