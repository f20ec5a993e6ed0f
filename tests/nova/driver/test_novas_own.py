# SPDX-License-Identifier: Apache-2.0
"""Nova's own unit tests of what its libvirt driver does with persistent memory, with our driver in its place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from nova.tests.unit.virt.libvirt import test_driver, test_migration
from nova.virt import nvdimm_ext
from nova.virt.libvirt import driver

APPLY = (
    "test_get_guest_config_with_vpmems",
    "test_discover_vpmems",
    "test_vpmems_not_on_host",
    "test_vpmems_invalid_format",
    "test_vpmems_duplicated_config",
    "test_get_ordered_vpmems",
    "test_sorted_migrating_vpmem_resources",
    "test_guest_add_vpmems_int_values",
    "test_update_device_resources_xml_vpmem",
    "test_cleanup_lingering_instance_resources_deletes_mdevs",
)
DO_NOT = {
    "test_update_provider_tree_for_vpmem": "needs a libvirt with the machine pc, and compares all traits, of which "
    "ours has one more (test_libxl.HostTest.test_what_placement_is_told)",
    "test_get_vpmems_on_host__exception": "of a failing ndctl: nvdimmctl is asked instead (test_rules.InventoryTest)",
    "test_cleanup_vpmems": "zeroes whatever the reason: our driver does when an instance goes (test_rules.WipeTest)",
    "test_cleanup_vpmems_fail": "the same",
}


RUN = (test_driver.LibvirtConnTestCase, test_driver.LibvirtPMEMNamespaceTests, test_migration.UtilityMigrationTestCase)
CASES = (*RUN, test_driver.TestUpdateProviderTree)
ROWS = [
    {"Name": f"ns_{number}", "Path": f"/dev/dax0.{number}", "Size": size, "Align": 2 << 20}
    for number, size in enumerate((4292870144, 17177772032, 17177772032))
]
"""nvdimmctl's output, in place of ndctl's in Nova's own tests."""


@pytest.fixture(autouse=True)
def _nvdimmctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvdimmctl"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(ROWS)}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def only(case: type[Any]) -> type[Any]:
    """A test case with just those of its tests that apply, whose driver is ours."""

    def set_up(self: Any) -> None:
        for where, name, ours in (
            (driver, "LibvirtDriver", nvdimm_ext.XenLibvirtDriver),
            (nvdimm_ext.XenLibvirtDriver, "_uri", staticmethod(lambda: "qemu:///system")),  # of Nova's fake libvirt
        ):
            replaced = mock.patch.object(where, name, ours)
            replaced.start()
            self.addCleanup(replaced.stop)
        case.setUp(self)
        self.flags(virt_type="xen", group="libvirt")

    left_out = [name for name in dir(case) if name.startswith("test") and name not in APPLY]
    body = {"setUp": set_up, "_clear_attrs": lambda self: None, **dict.fromkeys(left_out)}
    return type(case.__name__, (case,), body)


def of_pmem(case: type[Any]) -> set[str]:
    return {
        name for name in dir(case) if name.startswith("test") and ("vpmem" in name or "pmem" in case.__name__.lower())
    }


TestConnection, TestNamespaces, TestMigration = map(only, RUN)


def test_every_test_that_nova_has_of_it_is_run_or_has_a_reason() -> None:
    found = set().union(*map(of_pmem, CASES))
    assert found == {*APPLY, *DO_NOT}
