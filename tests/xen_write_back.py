# SPDX-License-Identifier: Apache-2.0
"""What tests of contrib/xen-write-back share: its programs as modules, and its header without Xen's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.package import PROJECT

CHANGE = PROJECT / "contrib" / "xen-write-back"
HEADER = CHANGE / "direct-mmio-wb.h"


def load(name: str) -> ModuleType:
    """Return a program of the folder, whose name no import statement can have, as a module."""
    spec = importlib.util.spec_from_file_location(f"xen_write_back_{name}", CHANGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_empty_headers(folder: Path) -> None:
    """Make the headers of Xen that the one of the change includes; a test has their names itself."""
    for line in HEADER.read_text().splitlines():
        if line.startswith("#include <"):
            path = folder / line.removeprefix("#include <").removesuffix(">")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
