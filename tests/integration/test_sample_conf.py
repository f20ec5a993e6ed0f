from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nvdimm_driver import conf

SAMPLE = Path(__file__).resolve().parents[2] / "etc/nvdimm-driver.conf"


def test_the_sample_is_what_the_generator_makes() -> None:
    """'make sample' writes it again."""
    generator = Path(sys.executable).with_name("oslo-config-generator")
    done = subprocess.run([generator, "--namespace", "nvdimm_driver"], capture_output=True, text=True, check=True)
    assert SAMPLE.read_text() == done.stdout


def test_the_sample_loads() -> None:
    assert conf.load([str(SAMPLE)]).state_dir == "/var/lib/nvdimm-driver"
