"""The plug-in of the documentation, installed as it says: the device model maps with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOC = Path(__file__).parents[2] / "doc" / "plugins.rst"
RUN = """
import sys
import syslog
sys.path.insert(0, sys.argv[1])
syslog.syslog = lambda priority, message: print(priority, message)
from nvdimm_driver.cmd.device_model import _mapper
mapper = _mapper("audited")
print(mapper.describe())
try:
    mapper.map(7, [(0x100000, 0x140000, 512)])
except Exception as error:
    print(type(error).__name__)
"""


def blocks() -> list[str]:
    found = re.findall(r"\.\. code-block:: (?:python|ini)\n\n((?:    .*\n|\n)+)", DOC.read_text(encoding="utf-8"))
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() + "\n" for block in found]


def test_the_documented_plug_in_works(tmp_path: Path) -> None:
    module, setup, options = blocks()
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "audited_mapper.py").write_text(module)
    (source / "setup.py").write_text(setup)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, source]
    subprocess.run(pip, check=True, capture_output=True)
    home = tmp_path / "home" / ".nvdimm-driver"
    home.mkdir(parents=True)
    (home / "nvdimm-driver.conf").write_text(options)
    command: list[str | Path] = [sys.executable, "-c", RUN, target]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={"HOME": str(home.parent), "PATH": "/usr/bin"}
    )
    description, logged, error = done.stdout.splitlines()
    assert description.endswith("and says so in the system's log")
    assert logged == "5 domid 7: 512 frames from 0x140000 on, as 0x100000"
    assert error == "XenError", "there is no Xen here to map with"
