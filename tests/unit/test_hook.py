# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvdimm_driver.cmd.hook import main
from nvdimm_driver.cmd.register import HOOK
from nvdimm_driver.registered import MARK

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


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """The shell part of the hook, with a program in Python's place that says how it was called."""
    python, made = tmp_path / "python", tmp_path / "50-nvdimm"
    python.write_text('#!/bin/sh\nshift 3\nprintf "%s|" "$@" "$(cat)"\nexit 3\n')
    made.write_text(HOOK.format(python=python, mark=MARK, xml_mark="urn:nvdimm-driver:"))
    for path in (python, made):
        path.chmod(0o755)
    return made


@pytest.mark.parametrize("operation", ["prepare", "release"])
@pytest.mark.parametrize("name", ["db1", "Domain-0:x", "-n", "a b*'\"$(false)", "Domain-0\n", "x:start", "\\n"])
def test_python_gets_the_whole_call_and_its_status_counts(hook: Path, name: str, operation: str) -> None:
    xml = REWRITTEN + b"\n<!-- -n \\n %s \xc3\xa9 \xff * -->" + bytes(300_000).replace(b"\0", b"<a/>\n") + b"\n"
    done = subprocess.run([hook, name, operation, "begin", "-"], input=xml, capture_output=True)
    assert done.stdout == b"|".join([name.encode(), operation.encode(), b"begin", b"-", xml.rstrip(b"\n"), b""])
    assert (done.returncode, done.stderr) == (3, b"")


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "reconnect", "migrate", "restore", ""])
def test_no_python_runs_at_other_steps(hook: Path, operation: str) -> None:
    done = subprocess.run([hook, "db1", operation, "begin", "-"], input=REWRITTEN, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(("name", "xml"), [("db1", b"<domain/>"), ("db1", b""), ("Domain-0", REWRITTEN)])
def test_no_python_runs_for_other_domains(hook: Path, name: str, xml: bytes) -> None:
    done = subprocess.run([hook, name, "prepare", "begin", "-"], input=xml, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_hook_that_cannot_read_the_xml_fails(hook: Path) -> None:
    """What it has not seen may be the driver's."""
    done = subprocess.run([hook, "db1", "prepare", "begin", "-"], stdin=subprocess.PIPE, env={"PATH": "/nowhere"})
    assert done.returncode == 127
