# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing with atheris: ``python -m tests.fuzz TARGET [LIBFUZZER OPTION]...``."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import atheris

from tests.fuzz import corpus


def main() -> None:
    """Run until a fault is found or a limit is reached (``-runs=200000``, ``-max_total_time=600``)."""
    with atheris.instrument_imports(include=["nvdimm_driver"]):
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    name, *options = sys.argv[1:] or [""]
    if name not in targets:
        sys.exit(f"usage: python -m tests.fuzz {'|'.join(targets)} [LIBFUZZER OPTION]...")
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(corpus.seeds(name)):
            (Path(folder) / str(number)).write_bytes(data)
        atheris.Setup([sys.argv[0], "-max_len=16384", *options, folder], targets[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
