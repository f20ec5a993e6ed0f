# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvdimm_driver import conf
from nvdimm_driver.errors import ConfigError

SAMPLE = Path(__file__).resolve().parents[2] / "etc/nvdimm-driver.conf"


def test_the_sample_is_what_the_generator_makes() -> None:
    """'make sample' writes it again."""
    generator = Path(sys.executable).with_name("oslo-config-generator")
    done = subprocess.run([generator, "--namespace", "nvdimm_driver"], capture_output=True, text=True, check=True)
    assert SAMPLE.read_text() == done.stdout


@pytest.mark.parametrize(("text", "status"), [("", 0), ("[acpi]\ndms = aml\n", 1), ("[acip]\ndsm = aml\n", 1)])
def test_oslos_own_validator_agrees(tmp_path: Path, text: str, status: int) -> None:
    validator = Path(sys.executable).with_name("oslo-config-validator")
    file = tmp_path / "nvdimm-driver.conf"
    file.write_text(SAMPLE.read_text() + text)
    done = subprocess.run([validator, "--namespace", "nvdimm_driver", "--input-file", file], check=False)
    assert done.returncode == status
    if status:
        with pytest.raises(ConfigError, match="there is no"):
            conf.load([str(file)])


def test_the_sample_loads() -> None:
    assert conf.load([str(SAMPLE)]).state_dir == "/var/lib/nvdimm-driver"
