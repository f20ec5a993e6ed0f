# SPDX-License-Identifier: Apache-2.0
"""The memory areas of each kind of backing, and the defaults of the base class."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nvdimm_driver.backing.devdax import DevdaxBacking
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.backing.pmem import PmemBacking
from nvdimm_driver.errors import BackingError, UnsupportedError
from nvdimm_driver.model import GIB, MIB, BackingIdentity, Extent, Intake, Location, Namespace, NvdimmSpec, Space
from nvdimm_driver.plugins import Backing
from tests.unit.fake_sysfs import UUID, FakeSysfs

AREA = Namespace("spare", "spare", "", "spare-1", 16 * GIB, GIB)
PATH = "/spare/a"
SPEC = NvdimmSpec(0, PATH, 64 * MIB)


class SpareBacking(Backing):
    """A backing with only what is required: pieces of 64 MiB, /spare/a to /spare/d."""

    name = "spare"

    def describe(self) -> str:
        return "spare memory"

    def handles(self, path: str) -> bool:
        return path.startswith("/spare/")

    def areas(self) -> Sequence[Namespace]:
        return [AREA]

    def examine(self, spec: NvdimmSpec) -> Intake:
        self.locate(spec)
        return Intake(self.name, creates=False, writes=0, namespace=AREA)

    def locate(self, spec: NvdimmSpec) -> Location:
        piece = "abcd".find(spec.path.removeprefix("/spare/"))
        if piece < 0 or spec.size > 64 * MIB:
            raise BackingError(f"{spec.path}: there is no such piece of {spec.size} bytes")
        start = piece * 64 * MIB
        identity = BackingIdentity(self.name, AREA.uid, start, 0, 0, 64 * MIB)
        return Location(identity, (Extent(0, AREA.data_spa + start, spec.size),))


def test_each_kind_has_the_namespaces_of_its_mode(tmp_path: Path) -> None:
    sysfs = FakeSysfs(tmp_path / "sys")
    sysfs.fsdax(os.makedev(259, 0))
    raw = sysfs.namespace("namespace1.0", mode="raw", spa=0x2_0000_0000_00, size=GIB)
    sysfs.disk("pmem1", raw, os.makedev(259, 1))
    sysfs.namespace("namespace2.0", mode="dax", spa=0x3_0000_0000_00, size=GIB, uuid=UUID)
    seed = sysfs.holder("dax2.1", "namespace2.0")
    sysfs.dax("dax2.0", seed, os.makedev(250, 1), spa=0x3_0000_0000_00, size=GIB)
    sysfs.namespace("namespace3.0", mode="safe", spa=0x4_0000_0000_00, size=GIB)
    sysfs.disk("pmem3s", sysfs.holder("btt3.0", "namespace3.0", size=GIB), os.makedev(259, 3))
    found = {
        backing.name: [area.name for area in backing.areas()]
        for backing in (FsdaxBacking(sysfs=sysfs.root), DevdaxBacking(sysfs=sysfs.root), PmemBacking(sysfs=sysfs.root))
    }
    assert found == {"fsdax": ["namespace0.0"], "devdax": ["namespace2.0"], "pmem": ["namespace1.0"]}


def test_memory_that_stays_where_it_is_needs_no_more_than_the_core() -> None:
    backing = SpareBacking()
    identity = backing.locate(SPEC).identity
    assert backing.size(PATH) == 64 * MIB
    assert backing.provision(SPEC) == backing.provision(SPEC, identity=identity) == identity
    with pytest.raises(BackingError, match="is another device by now"):
        backing.provision(SPEC, identity=dataclasses.replace(identity, device="another"))
    assert backing.allocate(SPEC) == SPEC
    for step in (backing.publish, backing.fill_holes, backing.discard, backing.extend):
        step(SPEC)
        assert backing.locate(SPEC).identity == identity
    assert backing.lacking(SPEC) == 0
    backing.freeze(PATH)
    backing.thaw(PATH)
    assert list(backing.survey(["/spare"])) == []
    with pytest.raises(BackingError, match="no such piece"):
        backing.size("/spare/e")
    with pytest.raises(BackingError, match="no such piece"):
        backing.allocate(NvdimmSpec(0, PATH, 128 * MIB))
    with pytest.raises(BackingError, match="cannot be moved to /spare/b"):
        backing.move(PATH, "/spare/b")


def test_the_space_of_pieces() -> None:
    backing = SpareBacking()
    assert backing.space(["/spare/b", "/spare/c"], ["/spare/c"]) == Space(
        128 * MIB, 64 * MIB, 64 * MIB, 64 * MIB, (AREA,)
    )
    assert backing.space(["/spare/a"], ["/spare/a"]) == Space(64 * MIB, 0, 0, 16 * GIB, (AREA,))


def test_what_a_backing_cannot_do_is_refused_by_name() -> None:
    backing = SpareBacking()
    with pytest.raises(UnsupportedError, match="/spare/a: the backing spare cannot be read or written from the host"):
        backing.open_bytes(SPEC)
    for step in (
        lambda: backing.check_labels(SPEC),
        lambda: backing.open_labels(SPEC, backing.locate(SPEC).identity),
    ):
        with pytest.raises(UnsupportedError, match="a label server cannot write the labels of the backing spare"):
            step()
