# SPDX-License-Identifier: Apache-2.0
"""A ledger that comes from elsewhere is taken over, after everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.cmd.ctl.check import _path_or_uuid
from nvdimm_driver.doctor.repair import look as compare
from nvdimm_driver.doctor.repair_ledger import look
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, LedgerError, NvdimmError
from nvdimm_driver.model import MIB
from nvdimm_driver.state import in_use
from tests.unit.doubles import (
    OTHER_UUID,
    UUID,
    MemoryBacking,
    RecordingHolders,
    RecordingMapper,
    TablesOfNative,
    domain,
    make_driver,
    map_prepared,
)


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


def test_what_has_no_path_is_accepted_by_its_domain(tmp_path: Path) -> None:
    driver = from_elsewhere(tmp_path)
    of_domain = Inconsistency("db1", UUID, "", "its start is over, but was not cleaned up", "clean it up", print)
    for accepted in ([], [""], [OTHER_UUID]):
        (found,) = look(driver, [of_domain], accepted)
        assert found.mend is None
        assert "--accept DOMAIN" in found.remedy
    (found,) = look(driver, [of_domain, replace(of_domain, path="/dev/pmem1")], [UUID])
    assert found.mend is None
    (found,) = look(driver, [of_domain], [UUID])
    assert found.mend


@pytest.mark.parametrize("word", ["db1", UUID, UUID.upper(), "/dev/pmem1"])
def test_a_path_and_a_domain_are_accepted_by_any_word_for_them(tmp_path: Path, word: str) -> None:
    driver = make_driver(tmp_path, MemoryBacking(), RecordingMapper())
    driver.define(domain("/mnt/pmem0/a"))
    assert _path_or_uuid(driver, word) == (word if word.startswith("/") else UUID)


class NoHolders(RecordingHolders):
    def start(self, uuid: str, name: str, descriptors: Sequence[int]) -> int:
        raise BackingError("/mnt/pmem0/a: is in use in the host")


def test_it_is_taken_over_though_a_guest_cannot_be_held_or_served(tmp_path: Path) -> None:
    """Who has what was compared. The repair failed each time, said that it had not, and had no path to be accepted."""
    labelled, backing, mapper = domain("/mnt/pmem0/a", label_size=MIB), MemoryBacking(), RecordingMapper()
    driver = make_driver(tmp_path, backing, mapper, dsm="qemu", acpi=TablesOfNative(), holders=NoHolders())
    driver.starts.hold = lambda *_: 0  # type: ignore[method-assign]
    driver.define(labelled)
    driver.prepare(labelled)
    mapper.alive[5] = UUID
    map_prepared(driver.ledger, 5)
    del driver.starts.hold
    in_use.beside(driver.ledger.path).replace("another", 1)
    served, held = compare(driver)
    assert [each.remedy for each in (served, held)] == ["start another", "hold them again"]
    for each, problem in ((served, "no label server for domid 5"), (held, "is in use in the host")):
        assert each.mend
        with pytest.raises(NvdimmError, match=problem):
            each.mend()
    (found,) = look(driver, [served, held])
    assert found.mend
    found.mend()
    assert not driver.ledger.is_from_elsewhere()
    driver.define(domain("/mnt/pmem0/a", "/mnt/pmem0/b", label_size=MIB))
    driver.define(domain("/mnt/pmem0/b", label_size=MIB))
    served, _ = compare(driver)
    assert served.mend is None
    assert "shut domain db1 down" in served.remedy


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
