# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from nvdimm_driver.doctor import nova
from nvdimm_driver.doctor.finding import Finding, Result
from nvdimm_driver.errors import NotFoundError
from nvdimm_driver.model import GIB, SUPERPAGE
from nvdimm_driver.nova.conf import NovaConf
from nvdimm_driver.nova.pmem_namespaces import Configured, NovaNamespace
from tests.unit.doubles import UUID

RIGHT = NovaConf(
    files=("/etc/nova/nova.conf",),
    compute_driver="nvdimm_ext.XenLibvirtDriver",
    virt_type="",
    connection_uri="xen:///system",
    pmem_namespaces=("6GB:ns0|ns1", "16GB:ns2"),
    enabled_filters=("ComputeFilter",),
)


def find(configured: Sequence[Configured]) -> tuple[NovaNamespace, ...]:
    return tuple(
        NovaNamespace(each.name, each.label, "", "main", "", GIB, SUPERPAGE, UUID if each.name == "ns0" else "")
        for each in configured
    )


def nothing(configured: Sequence[Configured]) -> tuple[NovaNamespace, ...]:
    raise NotFoundError(f"there is no {configured[0].name}", hint="make it")


def findings(conf: NovaConf, installed: str | None = "34.0.0") -> dict[str, Finding]:
    return {each.check: each for each in nova.check(conf, find, installed)}


def test_what_is_right_passes() -> None:
    found = findings(RIGHT)
    assert {each.result for each in found.values()} == {Result.PASS}
    assert len(found) == 6
    assert found["Nova, pmem_namespaces"].message == "2 of 6GB, 1 of 16GB; 1 of them belong to domains"


def test_a_host_without_nova_hears_nothing() -> None:
    assert findings(replace(RIGHT, files=())) == {}


@pytest.mark.parametrize(
    ("change", "check", "result", "says"),
    [
        (
            {"compute_driver": "libvirt.LibvirtDriver"},
            "compute_driver",
            Result.FAIL,
            "libvirt.LibvirtDriver: instances",
        ),
        ({"compute_driver": ""}, "compute_driver", Result.FAIL, "not set: instances"),
        ({"compute_driver": "", "pmem_namespaces": ()}, "compute_driver", Result.NOTE, "no nova-compute"),
        ({"virt_type": "kvm"}, "virt_type", Result.FAIL, "kvm: nova-compute does not start"),
        ({"virt_type": "xen"}, "virt_type", Result.WARN, "before it loads the compute driver"),
        ({"connection_uri": "xen+unix:///system?socket=/s"}, "connection_uri", Result.WARN, "may bypass nvdimmd"),
        ({"connection_uri": ""}, "connection_uri", Result.PASS, "xen:///system"),
        ({"pmem_namespaces": ()}, "pmem_namespaces", Result.NOTE, "none"),
        ({"pmem_namespaces": ("6gb:ns0",)}, "pmem_namespaces", Result.FAIL, "'6gb' is not a label"),
        ({"pmem_namespaces": ("6.4GB:ns0",)}, "pmem_namespaces", Result.FAIL, "'6.4GB' is not a label"),
        ({"enabled_filters": ("NUMATopologyFilter",)}, "filters", Result.WARN, "refuses every flavor with hw:pmem"),
        ({"enabled_filters": ()}, "filters", Result.NOTE, "not set here"),
    ],
)
def test_what_is_not(change: dict[str, Any], check: str, result: Result, says: str) -> None:
    found = findings(replace(RIGHT, **change))[f"Nova, {check}"]
    assert (found.result, says in found.message) == (result, True), found
    assert found.hint or result in (Result.PASS, Result.NOTE)


def test_a_namespace_that_cannot_be_had() -> None:
    found = {each.check: each for each in nova.check(RIGHT, nothing, "34.0.0")}["Nova, pmem_namespaces"]
    assert found == Finding("Nova, pmem_namespaces", Result.FAIL, "there is no ns0", "make it")


@pytest.mark.parametrize(
    ("installed", "result"),
    [
        ("34.0.0", Result.PASS),
        ("34.1.2", Result.PASS),
        ("35.0.0", Result.WARN),
        ("3.4", Result.WARN),
        (None, Result.NOTE),
    ],
)
def test_versions(installed: str | None, result: Result) -> None:
    assert findings(RIGHT, installed)["Nova, version"].result == result


def test_of_another_compute_driver_no_more_is_looked_at() -> None:
    conf = replace(RIGHT, compute_driver="fake.FakeDriver", pmem_namespaces=())
    assert list(findings(conf)) == ["Nova, compute_driver", "Nova, filters"]


def test_this_environment_has_no_nova() -> None:
    assert nova.nova_version() is None, "what is tested here needs none"
