# SPDX-License-Identifier: Apache-2.0
"""Plug-ins by name: those that are shipped, and what is wrong with others."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from stevedore import ExtensionManager

from nvdimm_driver import conf
from nvdimm_driver.driver import XenNvdimmDriver, load_driver
from nvdimm_driver.errors import BackingError, ConfigError, PluginError
from nvdimm_driver.model import NvdimmSpec
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
        (
            "[DEFAULT]\ndriver = kvm\n",
            "driver: there is no plug-in 'kvm' in nvdimm_driver.drivers \\(installed are: xen\\)",
        ),
        (
            "[acpi]\nbuilder = none\n",
            "builder: there is no plug-in 'none' in nvdimm_driver.acpi_builders \\(installed are: ",
        ),
    ],
)
def test_a_plug_in_that_is_not_installed_is_named(tmp_path: object, options: str, message: str) -> None:
    file = f"{tmp_path}/nvdimm-driver.conf"
    with open(file, "w", encoding="utf-8") as out:
        out.write(f"[DEFAULT]\nstate_dir = {tmp_path}\n{options}")
    with pytest.raises(ConfigError, match=message):
        load_driver(conf.load([file]))


PLUG_INS = """
from nvdimm_driver.plugins import Backing, Mapper, XmlHook
def function(): pass
class Hook(XmlHook):
    def describe(self): return ""
    def rewrite(self, xml, device_model): return xml
    def restore(self, xml): return xml
class OtherName(Backing):
    name = "other"
class OldBacking(Backing):
    name = "mine"
"""


@pytest.mark.parametrize(
    ("namespace", "value", "message"),
    [
        ("xml_hooks", "function", "plug-in mine in nvdimm_driver.xml_hooks is .*, which is not a XmlHook"),
        ("xml_hooks", "OldBacking", "which is not a XmlHook"),
        ("mappers", "Hook", "which is not a Mapper"),
        ("acpi_builders", "Hook", "which is not a AcpiBuilder"),
        ("backings", "Hook", "which is not a Backing"),
        ("backings", "OtherName", "plug-in mine in nvdimm_driver.backings has the name 'other'"),
        ("backings", "OldBacking", "plug-in mine .*:OldBacking.* cannot be used: TypeError: .* '?areas'?"),
    ],
)
def test_a_plug_in_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespace: str, value: str, message: str
) -> None:
    (tmp_path / "not_plug_ins.py").write_text(PLUG_INS)
    info = tmp_path / "not_plug_ins-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: not-plug-ins\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[nvdimm_driver.{namespace}]\nmine = not_plug_ins:{value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})
    monkeypatch.delitem(sys.modules, "not_plug_ins", raising=False)
    with pytest.raises(ConfigError, match=message):
        load(f"nvdimm_driver.{namespace}", "mine", conf.load([]))
    monkeypatch.delitem(sys.modules, "not_plug_ins", raising=False)


BROKEN = """
from nvdimm_driver.errors import BackingError
from nvdimm_driver.plugins import Backing
class Mine(Backing):
    name = "mine"
    def describe(self): return {}["text"]
    def handles(self, path): raise BackingError("of the driver")
    def areas(self): return 1 // 0
    def examine(self, spec): raise FileNotFoundError("of the system")
    def locate(self, spec): raise RecursionError
    def survey(self, paths):
        yield paths
        raise IndexError("later")
"""


def test_a_plug_in_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plug_in.py").write_text(BROKEN)
    info = tmp_path / "broken_plug_in-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plug-in\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[nvdimm_driver.backings]\nmine = broken_plug_in:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})
    mine = load("nvdimm_driver.backings", "mine", conf.load([]))
    assert isinstance(mine, Backing)
    assert type(mine).mark is Backing.mark, "what is not overridden is known"
    named = r"the plug-in mine \(broken_plug_in:Mine\) has failed in "
    with pytest.raises(PluginError, match=named + "describe: KeyError: 'text'"):
        mine.describe()
    with pytest.raises(PluginError, match=named + "areas: ZeroDivisionError"):
        mine.areas()
    with pytest.raises(BackingError, match="of the driver"):
        mine.handles("/a")
    with pytest.raises(FileNotFoundError, match="of the system"):
        mine.examine(NvdimmSpec(0, "/a", 4096))
    with pytest.raises(PluginError, match=named + "locate: RecursionError"):
        mine.size("/a")
    found = iter(mine.survey(["/a"]))
    assert next(found) == ["/a"]  # type: ignore[comparison-overlap]
    with pytest.raises(PluginError, match=named + "survey: IndexError: later"):
        next(found)
