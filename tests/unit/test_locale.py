# SPDX-License-Identifier: Apache-2.0
"""Every program uses UTF-8 for names of files, whatever the locale is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvdimm_driver.cmd import hook
from tests.waiting import HANG_SECONDS

NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""Python takes ASCII for names of files with these, as it takes ISO-8859-1 in the locale de_DE.ISO-8859-1."""
CONF = "nvdimm-driver.conf"
NAME = "gr\u00fcn"
PROGRAMS = Path(hook.__file__).parent
"""Also where the package is installed, and the sources are not beside the tests."""
XML = "<domain type='xen'><x:y xmlns:x='urn:nvdimm-driver:domain:1'/></domain>"


def run(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=NO_UTF8,
        cwd=folder,
        input=XML.encode(),
        capture_output=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration, whose state folder and log have names that are not ASCII."""
    (tmp_path / f"state-{NAME}").mkdir()
    text = f"[DEFAULT]\nstate_dir={tmp_path}/state-{NAME}\nlog_file={tmp_path}/log-{NAME}\n[rpc]\ngroup=root\n"
    text += f"socket={tmp_path}/none/{NAME}\n"
    (tmp_path / CONF).write_text(text, encoding="utf-8")
    return tmp_path


def test_python_itself_would_not(folder: Path) -> None:
    assert run(folder, "import sys; print(sys.getfilesystemencoding())").stdout == b"ascii\n"


@pytest.mark.parametrize(
    ("code", "made"),
    [
        (f"from nvdimm_driver.cmd.nvdimmctl import main; main(['--config-file', '{CONF}', 'list'])", "state"),
        (f"from nvdimm_driver.cmd.nvdimmd import main; main(['{CONF}'])", "state"),
        (
            f"from nvdimm_driver.cmd.hook import main; main(['h', 'db1', 'release', 'end', '-'], files=['{CONF}'])",
            "log",
        ),
        (
            "import sys; from nvdimm_driver.cmd.device_model import main; "
            "main(['dm', '-xen-domid', '5'], state_dir=sys.argv[1], log_file=sys.argv[2], qemu='/bin/false')",
            "log",
        ),
    ],
    ids=["nvdimmctl", "nvdimmd", "hook", "device model"],
)
def test_a_program_does(folder: Path, code: str, made: str) -> None:
    done = run(folder, code, f"{folder}/state-{NAME}", f"{folder}/log-{NAME}")
    assert b"Traceback" not in done.stderr
    assert f"{made}-{NAME}".encode() in os.listdir(os.fsencode(folder))
    if made == "state":
        assert (folder / f"state-{NAME}/ledger.sqlite").exists()
    assert all(NAME.encode() in name for name in os.listdir(os.fsencode(folder)) if name.startswith((b"state", b"log")))


def test_no_program_was_forgotten() -> None:
    mains = [(path.name, path.read_text()) for path in PROGRAMS.glob("*.py") if "\ndef main(" in path.read_text()]
    assert len(mains) >= 5
    assert [name for name, text in mains if "use_utf8()" not in text] == [], "call host_text.use_utf8() first in main"
