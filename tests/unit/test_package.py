# SPDX-License-Identifier: Apache-2.0
"""Texts that the package repeats are the same, and its completion knows which commands take a domain."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from nvdimm_driver.cmd import systemd_units
from nvdimm_driver.cmd.nvdimmctl import Nvdimmctl
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.registered import MARK

PROJECT = Path(__file__).parents[2]
COMPLETION = PROJECT / "etc/bash-completion/nvdimmctl"
GLOBAL = "source $0; COMP_WORDS=(nvdimmctl --) COMP_CWORD=1; _nvdimmctl; echo ${COMPREPLY[@]}"


def test_the_package_has_the_version_of_the_project() -> None:
    first = (PROJECT / "debian/changelog").read_text().splitlines()[0]
    assert re.findall(r"\((.*)\)", first) == [version("nvdimm_driver")]


def test_the_licence_is_the_same_everywhere() -> None:
    (said,) = re.findall(r'^    license="(.*)",$', (PROJECT / "setup.py").read_text(), re.MULTILINE)
    debian = (PROJECT / "debian/copyright").read_text()
    assert set(re.findall("^License: (.*)$", debian, re.MULTILINE)) == {said} == {"Apache-2.0"}
    copyright_line = "Copyright 2026 the nvdimm_driver developers"
    assert "Apache License\n" in (text := (PROJECT / "LICENSE").read_text())
    assert copyright_line in text
    assert copyright_line.replace("Copyright", "Copyright:") in debian


@pytest.mark.parametrize(("metavar", "names"), [("DOMAIN", "list -c Domain"), ("POOL", "pool list -c Name")])
def test_completion_offers_names_where_one_is_wanted(metavar: str, names: str) -> None:
    wanted = set()
    for entry in entry_points(group="nvdimm_driver.nvdimmctl"):
        parser = entry.load()(Nvdimmctl(), None).get_parser(entry.name)
        if any(metavar in (action.metavar or "") for action in parser._get_positional_actions()):
            wanted.add(f"_{entry.name}")
    (commands,) = re.findall(rf"^ +(\S.*)\) names=\({names}\) ;;$", COMPLETION.read_text(), re.MULTILINE)
    assert set(commands.split(" | ")) == wanted


def test_completion_offers_every_global_option() -> None:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    command = ["bash", "-c", GLOBAL, str(COMPLETION)]
    offered = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    options = [option for action in Nvdimmctl().parser._actions for option in action.option_strings]
    assert sorted(offered) == sorted(option for option in options if option.startswith("--"))


@pytest.mark.parametrize("packaged", ["same", "other", "none"])
def test_a_unit_is_written_where_the_package_has_no_such(tmp_path: Path, packaged: str) -> None:
    text, own, theirs = f"{MARK}\nnew\n", tmp_path / "etc" / "a.socket", tmp_path / "a.socket"
    if packaged != "none":
        theirs.write_text(text if packaged == "same" else f"{MARK}\nold\n")
    first, second = systemd_units.place(own, theirs, text), systemd_units.place(own, theirs, text)
    if packaged == "same":
        assert (first, second) == (f"unchanged {theirs}", f"unchanged {theirs}")
        assert not own.exists()
    else:
        assert (first, second) == (f"installed {own}", f"unchanged {own}")
        assert own.read_text() == text


def test_a_unit_of_other_options_goes_when_the_package_has_what_is_wanted(tmp_path: Path) -> None:
    own, theirs = tmp_path / "etc" / "a.socket", tmp_path / "a.socket"
    theirs.write_text(f"{MARK}\ndefault\n")
    systemd_units.place(own, theirs, f"{MARK}\nother\n")
    assert systemd_units.place(own, theirs, f"{MARK}\ndefault\n") == f"removed {own}"
    assert not own.exists()
    own.write_text("somebody else's\n")
    with pytest.raises(ConfigError, match="nvdimm_driver did not write it"):
        systemd_units.place(own, theirs, f"{MARK}\ndefault\n")
