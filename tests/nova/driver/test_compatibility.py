# SPDX-License-Identifier: Apache-2.0
"""The check that the installed Nova is the one that the driver was written for."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from nova import exception, objects
from nova.virt.libvirt import blockinfo, driver, host

from nvdimm_driver.nova import RELEASE
from nvdimm_driver.nova.compute import command, patches, strangers
from nvdimm_driver.nova.compute import driver as our_driver
from nvdimm_driver.nova.compute import host as our_host
from nvdimm_driver.nova.compute.compatibility import (
    ASSIGNED,
    NOTHING,
    Expected,
    check_nova,
    expect,
    form_of,
    overridden,
    overrides,
)
from nvdimm_driver.nova.compute.driver import EXPECTED, XenLibvirtDriver
from nvdimm_driver.nova.compute.host import XenHost

MODULES = (our_driver, our_host, patches, command, strangers)


def differences(expected: Any) -> list[str]:
    return [found for found in (each.difference() for each in expected) if found]


def other(theirs: type, changes: dict[str, Any]) -> type:
    """Return a copy of a class of Nova, without its bases and with other attributes.

    :param changes: the other attributes; None takes one away.
    """
    skipped = ("__dict__", "__weakref__")
    body = {name: value for name, value in vars(theirs).items() if name not in skipped} | changes
    return type(theirs.__name__, (), {name: value for name, value in body.items() if value is not None})


class Plain:
    """Each form that a name can have."""

    LIMIT = 3

    def __init__(self) -> None:
        self.made = Expected(self, "", "")
        self.made.owner.other_owner = 1

    def method(self, first: int, *more: Any, flag: bool = False) -> None: ...

    @staticmethod
    def static(first: str) -> None: ...

    @classmethod
    def of_class(cls) -> None: ...

    @property
    def prop(self) -> int:
        return 0


class Derived(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.more = 1


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("method", "(self, first, *more, flag=False)"),
        ("static", "static (first)"),
        ("of_class", "class method (cls)"),
        ("prop", "property"),
        ("LIMIT", "int"),
        ("__init__", "(self)"),
        ("more", ASSIGNED),
        ("made", ASSIGNED),
        ("absent", NOTHING),
        ("absent.further", NOTHING),
    ],
)
def test_forms(path: str, form: str) -> None:
    assert form_of(Derived, path) == form


def test_a_form_inside_a_module() -> None:
    assert form_of(exception, "InvalidInput") == "class (message=None, **kwargs)"
    assert form_of(driver, "LibvirtDriver._cleanup_vpmems") == "(self, vpmems)"
    assert form_of(driver, "LibvirtDriver._vpmems_by_name") == ASSIGNED


def test_the_installed_nova_is_right() -> None:
    assert differences(EXPECTED) == []
    check_nova(EXPECTED)


def test_the_release_is_the_one_that_setup_installs() -> None:
    (required,) = re.findall(r'"nova>=(\d+),<(\d+)"', (Path(__file__).parents[3] / "setup.py").read_text())
    assert required == (str(RELEASE), str(RELEASE + 1))
    assert version("nova").partition(".")[0] == str(RELEASE)


OVERRIDES = [
    (ours, theirs, each.path)
    for ours, theirs in ((XenLibvirtDriver, driver.LibvirtDriver), (XenHost, host.Host))
    for each in overridden(ours, theirs)
    if each.form != NOTHING
]


def test_every_override_is_known() -> None:
    """None is left out because its name begins with an underscore, or because it is no plain method."""
    found = {path for _, _, path in OVERRIDES}
    assert {"__init__", "_uri", "static_traits", "_cleanup_vpmems", "_get_machine_types"} <= found


@pytest.mark.parametrize(("ours", "theirs", "name"), OVERRIDES, ids=lambda each: getattr(each, "__name__", each))
def test_a_name_that_is_gone_is_told(ours: type, theirs: type, name: str) -> None:
    (found,) = differences(overridden(ours, other(theirs, {name: None})))
    assert found.startswith(f"{theirs.__module__}.{theirs.__name__}.{name}: expected ")
    assert found.endswith(f", found {form_of(object, name)}"), "object has an __init__"


@pytest.mark.parametrize(("ours", "theirs", "name"), OVERRIDES, ids=lambda each: getattr(each, "__name__", each))
def test_another_parameter_is_told(ours: type, theirs: type, name: str) -> None:
    (found,) = differences(overridden(ours, other(theirs, {name: lambda self, unheard_of: None})))
    assert found.startswith(f"{theirs.__module__}.{theirs.__name__}.{name}: expected ")
    assert found.endswith(", found (self, unheard_of)")


def test_an_override_without_its_expectation_is_told() -> None:
    class New(driver.LibvirtDriver):
        """It is documented, which is no override."""

        @overrides("(self, host)")
        def init_host(self, host: str) -> None: ...

        def _get_vpmem_resources(self, resources: Any) -> Any: ...

        @property
        def disk_cachemode(self) -> str: ...  # type: ignore[empty-body]

        def _ours_alone(self) -> None: ...

    assert differences(overridden(New, driver.LibvirtDriver)) == [
        f"nova.virt.libvirt.driver.LibvirtDriver._get_vpmem_resources: expected {NOTHING}, found (self, resources)",
        f"nova.virt.libvirt.driver.LibvirtDriver.disk_cachemode: expected {NOTHING}, found property",
    ]


@pytest.mark.parametrize("name", ["_wipe", "_release", "DYING_SECONDS"])
def test_a_new_name_of_nova_that_ours_would_hide_is_told(name: str) -> None:
    changed = other(driver.LibvirtDriver, {name: lambda self: None})
    (found,) = differences(overridden(XenLibvirtDriver, changed))
    assert found.endswith(f".{name}: expected {NOTHING}, found (self)")


def test_an_attribute_that_nova_no_longer_sets_is_told() -> None:
    def __init__(self: Any, virtapi: Any, read_only: bool = False) -> None:
        self._host, self._vpmems_by_name = None, {}

    changed = other(driver.LibvirtDriver, {"__init__": __init__})
    expected = expect(changed, dict.fromkeys(("_host", "vif_driver", "_vpmems_by_name"), ASSIGNED))
    assert differences(expected) == [
        f"nova.virt.libvirt.driver.LibvirtDriver.vif_driver: expected {ASSIGNED}, found {NOTHING}"
    ]


def test_a_function_that_is_gone_from_a_module_or_changed_is_told() -> None:
    module = ModuleType("nova.other")
    for name in ("get_disk_bus_for_device_type", "get_disk_bus_for_disk_dev"):
        setattr(module, name, getattr(blockinfo, name))
    module.get_disk_bus_for_disk_dev = lambda disk_dev: None  # type: ignore[attr-defined]
    assert differences(Expected(module, each.path, each.form) for each, _ in patches.WRAPPED) == [
        "nova.other.get_disk_bus_for_disk_dev: expected (virt_type, disk_dev), found (disk_dev)",
        f"nova.other.get_dev_prefix_for_disk_bus: expected (disk_bus), found {NOTHING}",
    ]


def test_a_function_that_is_wrapped_already_has_novas_signature() -> None:
    patches.accept_xen()
    assert hasattr(blockinfo.get_disk_bus_for_disk_dev, "__wrapped__")
    assert differences(patches.EXPECTED) == []


def test_the_error_has_all_that_an_operator_needs() -> None:
    changed = other(host.Host, {"list_instance_domains": None, "get_online_cpus": lambda self, cells: set()})
    with pytest.raises(exception.InvalidConfiguration) as caught:
        check_nova([*EXPECTED, *overridden(XenHost, changed)])
    prefix = "nova.virt.libvirt.host.Host"
    assert str(caught.value) == (
        f"nvdimm_driver supports Nova {RELEASE}. In the installed Nova {version('nova')}, names that it depends on are "
        f"missing or different: {prefix}.get_online_cpus: expected (self), found (self, cells); "
        f"{prefix}.list_instance_domains: expected (self, only_running=True), found {NOTHING}. nova-compute does not "
        f"start, because instances could lose their persistent memory: install Nova {RELEASE}, or an nvdimm_driver "
        "that supports the installed Nova"
    )


# --- no use of Nova is forgotten ---


def functions(module: ModuleType) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a module, methods included. Names outside of them are read when it is imported."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def used(module: ModuleType, owner_of: Callable[[str], Any]) -> set[tuple[str, str]]:
    """Return what the functions of a module use of Nova: the owner's name and the attribute.

    :param owner_of: returns the class or module of Nova that a variable is, or None.
    """
    return {
        (owner.__name__, node.attr)
        for function in functions(module)
        for statement in function.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if (owner := owner_of(node.value.id)) is not None
    }


EXPECTED_NAMES = {(each.owner.__name__, each.path.partition(".")[0]) for each in EXPECTED}


@pytest.mark.parametrize("module", MODULES, ids=lambda each: each.__name__.rpartition(".")[2])
def test_what_is_used_of_novas_modules_is_expected(module: ModuleType) -> None:
    def owner_of(variable: str) -> Any:
        value = getattr(module, variable, None)
        return value if isinstance(value, ModuleType) and value.__name__.split(".")[0] == "nova" else None

    found = used(module, owner_of)
    assert found or module is our_host
    assert found <= EXPECTED_NAMES


@pytest.mark.parametrize(
    ("module", "ours", "theirs"), [(our_driver, XenLibvirtDriver, driver.LibvirtDriver), (our_host, XenHost, host.Host)]
)
def test_what_is_used_of_novas_classes_is_expected(module: ModuleType, ours: type, theirs: type) -> None:
    found = {attribute for _, attribute in used(module, lambda variable: ours if variable == "self" else None)}
    inherited = found - set(vars(ours))
    assert inherited
    assert {(theirs.__name__, each) for each in inherited} <= EXPECTED_NAMES


def test_fields_of_objects_that_are_gone_are_told() -> None:
    module = ModuleType("nova.objects")
    module.Instance = other(objects.Instance, {"task_state": None})  # type: ignore[attr-defined]
    expected = [each for each in EXPECTED if each.owner is objects and each.path.startswith("Instance.")]
    assert differences(Expected(module, each.path, each.form) for each in expected) == [
        f"nova.objects.Instance.task_state: expected property, found {NOTHING}"
    ]
