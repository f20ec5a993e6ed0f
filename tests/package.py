# SPDX-License-Identifier: Apache-2.0
"""The Debian package that 'make deb' builds."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def build_package() -> Path:
    """Return the package; build it if its sources changed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    subprocess.run(["make", "-s", "deb"], cwd=PROJECT, check=True, env=environment)
    return PROJECT / "dist" / f"nvdimm-driver_{version('nvdimm_driver')}_all.deb"


def with_version(package: Path, version: str, folder: Path) -> Path:
    """Return a copy of the package with another version, made in an empty folder."""
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "-R", str(package), str(tree)], check=True)
    control = tree / "DEBIAN" / "control"
    lines = control.read_text().splitlines(keepends=True)
    control.write_text("".join(f"Version: {version}\n" if line.startswith("Version:") else line for line in lines))
    subprocess.run(["dpkg-deb", "-b", str(tree), str(folder / "new.deb")], check=True, stdout=subprocess.DEVNULL)
    return folder / "new.deb"
