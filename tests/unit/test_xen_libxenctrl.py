# SPDX-License-Identifier: Apache-2.0
"""Finding the hypervisor and its library: the error for everything that can be missing says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvdimm_driver.errors import XenError
from nvdimm_driver.xen.libxenctrl import Xen, installed_versions, running_version


def host(root: Path, version: str | None = "4.17", kind: str = "xen", privcmd: bool = True) -> str:
    """Return the root folder of a host with that hypervisor."""
    if version is not None:
        major, minor = version.split(".")
        folder = root / "sys/hypervisor"
        (folder / "version").mkdir(parents=True)
        (folder / "type").write_text(f"{kind}\n")
        (folder / "version/major").write_text(f"{major}\n")
        (folder / "version/minor").write_text(f"{minor}\n")
    if privcmd:
        (root / "dev/xen").mkdir(parents=True)
        (root / "dev/xen/privcmd").touch()
    return str(root)


def install(root: Path, *names: str) -> None:
    for name in names:
        (root / "usr" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "usr" / name).touch()


@pytest.mark.parametrize("version", ["4.17", "4.20", "5.0"])
def test_the_version_is_the_running_hypervisors(tmp_path: Path, version: str) -> None:
    assert running_version(host(tmp_path, version)) == version


def test_without_a_hypervisor(tmp_path: Path) -> None:
    with pytest.raises(XenError, match=r"not running on Xen: .*/type is missing") as caught:
        Xen(host(tmp_path, None))
    assert "boot this machine into Xen" in caught.value.hint


def test_on_another_hypervisor(tmp_path: Path) -> None:
    with pytest.raises(XenError, match="type is kvm"):
        Xen(host(tmp_path, kind="kvm"))


@pytest.mark.parametrize("version", ["4.16", "4.9", "3.18"])
def test_on_an_old_xen(tmp_path: Path, version: str) -> None:
    with pytest.raises(XenError, match=f"Xen {version} is too old") as caught:
        Xen(host(tmp_path, version))
    assert "4.17" in caught.value.hint


def test_outside_dom0(tmp_path: Path) -> None:
    with pytest.raises(XenError, match="not dom0"):
        Xen(host(tmp_path, privcmd=False))


def test_a_library_of_another_version_is_an_error_that_names_both(tmp_path: Path) -> None:
    install(tmp_path, "lib/x86_64-linux-gnu/libxenctrl.so.4.17", "lib/x86_64-linux-gnu/libxenctrl.so.4.17.0")
    install(tmp_path, "local/lib/libxenctrl.so.4.20", "lib/libxenctrl.so.4.5x/other")
    with pytest.raises(XenError, match=r"Xen 4\.98 is running, libxenctrl is installed for: 4\.17, 4\.20") as caught:
        Xen(host(tmp_path, "4.98"))
    assert "libraries of Xen 4.98" in caught.value.hint


def test_without_any_library(tmp_path: Path) -> None:
    assert installed_versions(str(tmp_path)) == []
    with pytest.raises(XenError, match="installed for: none"):
        Xen(host(tmp_path, "4.98"))
