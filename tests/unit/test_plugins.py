# SPDX-License-Identifier: Apache-2.0
"""Plug-ins by name: those that are shipped, and what is wrong with others."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import pytest

from nvdimm_driver import conf
from nvdimm_driver.driver import XenNvdimmDriver, load_driver
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.plugin_loader import NAMESPACES, find, load, options_of
from nvdimm_driver.plugins import AcpiBuilder, Backing, Mapper, XmlHook

BASES: dict[str, type] = {
    "nvdimm_driver.drivers": XenNvdimmDriver,
    "nvdimm_driver.xml_hooks": XmlHook,
    "nvdimm_driver.backings": Backing,
    "nvdimm_driver.acpi_builders": AcpiBuilder,
    "nvdimm_driver.mappers": Mapper,
}
SHIPPED = [entry for namespace in NAMESPACES for entry in entry_points(group=namespace)]


def test_each_kind_is_shipped() -> None:
    assert {entry.group for entry in SHIPPED} == set(BASES) == set(NAMESPACES)


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda entry: f"{entry.group}-{entry.name}")
def test_what_is_shipped_is_of_its_kind(entry: EntryPoint) -> None:
    found = find(entry.group, entry.name)
    assert issubclass(found, BASES[entry.group])
    if issubclass(found, Backing):
        assert found.name == entry.name
    assert options_of(entry.name) == []


def test_the_shipped_xml_hook_can_be_loaded_by_name() -> None:
    assert "libxl" in load("nvdimm_driver.xml_hooks", "libxl", conf.load([])).describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("[DEFAULT]\ndriver = kvm\n", "no plug-in 'kvm' in nvdimm_driver.drivers"),
        ("[acpi]\nbuilder = none\n", "no plug-in 'none' in nvdimm_driver.acpi_builders"),
    ],
)
def test_a_plug_in_that_is_not_installed_is_named(tmp_path: object, options: str, message: str) -> None:
    file = f"{tmp_path}/nvdimm-driver.conf"
    with open(file, "w", encoding="utf-8") as out:
        out.write(f"[DEFAULT]\nstate_dir = {tmp_path}\n{options}")
    with pytest.raises(ConfigError, match=message):
        load_driver(conf.load([file]))
