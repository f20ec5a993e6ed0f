# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvdimm_driver.cmd.hook import main

REWRITTEN = b"<domain type='xen'><metadata><x:y xmlns:x='urn:nvdimm-driver:domain:1'/></metadata></domain>"


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "reconnect", "migrate", ""])
def test_operations_that_are_none_of_ours_pass(operation: str) -> None:
    assert main(["50-nvdimm", "db1", operation, "begin", "-"], REWRITTEN) == 0


def test_dom0_and_domains_without_nvdimms_pass() -> None:
    assert main(["50-nvdimm", "Domain-0", "prepare", "begin", "-"], REWRITTEN) == 0
    assert main(["50-nvdimm", "db1", "prepare", "begin", "-"], b"<domain type='xen'/>") == 0


def test_a_domain_without_nvdimms_costs_no_imports() -> None:
    script = (
        "import sys; from nvdimm_driver.cmd.hook import main\n"
        "status = main(['50-nvdimm', 'db1', 'prepare', 'begin', '-'], b'<domain/>')\n"
        "print(status, *sorted({'lxml', 'oslo_config', 'stevedore'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_an_error_has_no_character_that_a_terminal_obeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The client that starts the domain gets it: libvirt passes on what a failing hook prints."""
    assert main(["50-nvdimm", "db1", "prepare", "begin", "-"], REWRITTEN, [str(tmp_path / "no\x1b[2K.conf")]) == 1
    assert r"no\x1b[2K.conf" in capsys.readouterr().err
