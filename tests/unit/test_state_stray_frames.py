# SPDX-License-Identifier: Apache-2.0
"""Frames of running guests whose namespace is gone; tests/integration/test_stray_frames_real.py has the commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.backing import inventory
from nvdimm_driver.cmd.ctl.pool_create import _guests
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError, XenError
from nvdimm_driver.model import MIB, PAGE
from tests.unit.doubles import (
    NAMESPACE,
    OTHER_UUID,
    UUID,
    MemoryBacking,
    RecordingMapper,
    domain,
    make_driver,
    map_prepared,
)

A, B = "/mnt/pmem0/a", "/mnt/pmem0/b"
FIRST, COUNT = NAMESPACE.frames


class Looks(RecordingMapper):
    """Counts the looks at what guests have announced."""

    looks = 0

    def frames_of_guests(self) -> list[tuple[int, int, int]]:
        self.looks += 1
        if self.fail == "xenstore":
            raise XenError("xenstored does not answer")
        return super().frames_of_guests()


@pytest.fixture
def mapper() -> Looks:
    return Looks()


@pytest.fixture
def driver(tmp_path: Path, mapper: Looks) -> XenNvdimmDriver:
    return make_driver(tmp_path, MemoryBacking(), mapper)


def run_guest(driver: XenNvdimmDriver, mapper: Looks) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    map_prepared(driver.ledger, 7)
    mapper.alive[7] = UUID
    mapper.announce(7, [(0, FIRST, 64 * MIB // PAGE)])


def test_a_define_without_guests_looks_once(driver: XenNvdimmDriver, mapper: Looks) -> None:
    driver.define(domain(A), driver.check(domain(A)))
    assert mapper.looks == 1


def test_a_define_that_writes_nothing_does_not_look(driver: XenNvdimmDriver, mapper: Looks) -> None:
    driver.define(domain(A))
    mapper.looks = 0
    driver.define(domain(A))
    assert mapper.looks == 0


def test_a_guest_in_the_namespace_that_it_was_started_with_is_no_stray(driver: XenNvdimmDriver, mapper: Looks) -> None:
    run_guest(driver, mapper)
    assert driver.planner.strays.find() == []
    driver.define(domain(B, uuid=OTHER_UUID, name="db2"))


@pytest.mark.parametrize(
    "change",
    [{"uid": "ns-new"}, {"data_spa": NAMESPACE.data_spa + MIB}, {"data_size": 32 * MIB}],
    ids=["another namespace", "its data begins later", "it is smaller"],
)
def test_a_guest_whose_namespace_is_another_is_one(
    driver: XenNvdimmDriver, mapper: Looks, change: dict[str, object]
) -> None:
    run_guest(driver, mapper)
    now = replace(NAMESPACE, **change)  # type: ignore[arg-type]
    driver.backings[0].namespace = now  # type: ignore[attr-defined]
    assert driver.planner.strays.find() == [("db1 (domid 7)", FIRST, 64 * MIB // PAGE)]
    with pytest.raises(InUseError, match=r"namespace0\.0, which has memory of the running guest db1 \(domid 7\)"):
        driver.planner.strays.check(B, now)
    driver.planner.strays.check(B, replace(now, data_spa=NAMESPACE.data_spa + 64 * MIB))  # of others' memory


def test_a_domain_cannot_pass_for_one_by_its_name(driver: XenNvdimmDriver, mapper: Looks) -> None:
    named = domain(A, name='"namespace": "ns-new"')
    driver.define(named)
    driver.prepare(named)
    driver.backings[0].namespace = replace(NAMESPACE, uid="ns-new")  # type: ignore[attr-defined]
    assert [mfn for _, mfn, _ in driver.planner.strays.find()] == [FIRST]


def test_xen_that_does_not_answer_is_an_error(driver: XenNvdimmDriver, mapper: Looks) -> None:
    mapper.fail = "xenstore"
    with pytest.raises(XenError, match="xenstored does not answer"):
        driver.define(domain(A))
    with pytest.raises(XenError, match="xenstored does not answer"):
        _guests(driver)


def test_regions_with_strays(driver: XenNvdimmDriver, mapper: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new pool could get a stray guest's frames wherever in the region its namespace gets its place."""
    last = (FIRST + 64 * MIB // PAGE) * PAGE
    regions = [("region0", FIRST * PAGE - MIB, 2 * MIB), ("region1", last, MIB)]
    monkeypatch.setattr(inventory, "regions", lambda: regions)
    run_guest(driver, mapper)
    assert _guests(driver) == {}
    driver.backings[0].namespace = replace(NAMESPACE, uid="ns-new")  # type: ignore[attr-defined]
    assert _guests(driver) == {"region0": "db1 (domid 7)"}
