# SPDX-License-Identifier: Apache-2.0
"""The wheel that pip builds and installs, with the module that the build makes, and with its entry points."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.package import PROJECT

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
EXAMPLES = PROJECT / "etc/examples"
WHERE = "import nvdimm_driver.xen._xen as made; print(made.__file__)"


def test_what_pip_installs_runs(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, because setuptools writes into it
    shutil.copytree(PROJECT / "nvdimm_driver", source / "nvdimm_driver", ignore=shutil.ignore_patterns("_xen.py"))
    shutil.copytree(PROJECT / "shim", source / "shim")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("nvdimm_driver-*-py3-none-any.whl")
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str | Path) -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    (licence,) = site.glob("nvdimm_driver-*.dist-info/**/LICENSE")
    assert licence.read_text() == (PROJECT / "LICENSE").read_text()
    shim = site / "nova/virt/nvdimm_ext/__init__.py"
    assert shim.read_text() == (PROJECT / "shim/nova/virt/nvdimm_ext/__init__.py").read_text()
    assert list((site / "nova").rglob("__init__.py")) == [shim], "the rest is Nova's own"
    assert run(sys.executable, "-c", WHERE).startswith(str(site))
    plan = run(site / "bin/nvdimmctl", "plan", "--host", EXAMPLES / "host.json", EXAMPLES / "guest.xml")
    assert "Mapping calls: 2 extents" in plan
