# SPDX-License-Identifier: Apache-2.0
"""A ledger that comes from elsewhere is taken over, after everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.doctor.repair import Inconsistency
from nvdimm_driver.doctor.repair_ledger import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import LedgerError
from nvdimm_driver.state import in_use
from tests.unit.doubles import MemoryBacking, RecordingMapper, domain, make_driver


def from_elsewhere(folder: Path) -> XenNvdimmDriver:
    """Return a driver whose ledger is not the one in use."""
    driver = make_driver(folder, MemoryBacking(), RecordingMapper())
    assert not driver.ledger.is_from_elsewhere()
    assert look(driver, []) == []
    in_use.beside(driver.ledger.path).replace("another", 1)
    return driver


def test_it_is_taken_over_when_nothing_is_left_to_repair(tmp_path: Path) -> None:
    driver = from_elsewhere(tmp_path)
    for_the_operator = Inconsistency("db1", "", "/mnt/pmem0/a", "it is gone", "restore a backup")
    (found,) = look(driver, [for_the_operator])
    assert found.mend
    found.mend()
    assert not driver.ledger.is_from_elsewhere()


def test_it_is_not_taken_over_while_something_is_left_to_repair(tmp_path: Path) -> None:
    """Its repair may have failed: then the ledger lacks what a domain has."""
    driver = from_elsewhere(tmp_path)
    unknown = Inconsistency("db1", "", "/dev/pmem1", "the ledger does not know whose it is", "write it there", print)
    (found,) = look(driver, [unknown])
    assert found.mend is None
    assert "--accept PATH" in found.remedy
    (found,) = look(driver, [unknown, replace(unknown, path="/dev/pmem2")], ["/dev/pmem1"])
    assert found.mend is None
    (found,) = look(driver, [unknown], ["/dev/pmem1"])
    assert found.mend


def test_it_is_not_taken_over_while_libvirt_cannot_be_asked(tmp_path: Path) -> None:
    (found,) = look(from_elsewhere(tmp_path), [Inconsistency("", "", "", "libvirt cannot be asked", "start it")])
    assert found.mend is None
    assert found.remedy == "first: start it"


def test_a_domain_boots_if_nobody_knows_which_ledger_is_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its file is on a bad sector. Nothing else is done with such a ledger."""
    backing, mapper = MemoryBacking(), RecordingMapper()
    driver = make_driver(tmp_path, backing, mapper)
    driver.define(domain("/mnt/pmem0/a"))
    known = tmp_path.with_name(f"{tmp_path.name}-in-use")
    known.unlink()
    known.mkdir()
    driver.prepare(domain("/mnt/pmem0/a"))
    assert "-in-use: Is a directory" in caplog.text
    with pytest.raises(LedgerError, match="cannot read"):
        driver.check(domain("/mnt/pmem0/b"))
