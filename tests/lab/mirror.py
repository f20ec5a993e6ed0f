# SPDX-License-Identifier: Apache-2.0
"""Debian's packages of any release, from the mirrors that this machine uses."""

import os
import shutil
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.release import of_this_machine
from tests.lab.tools import run_tool

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# proxies, and checks that are off
APT_OPTIONS = (
    "Acquire::http",
    "Acquire::ftp",
    "Acquire::Check-",
    "Acquire::Retries",
    "Acquire::ForceIPv",
    "APT::Sandbox",
)

NETWORK = ("/etc/pip.conf", "/etc/xdg/pip", "/etc/ssl/certs/ca-certificates.crt", "/etc/resolv.conf")


def sources(release: str) -> list[str]:
    """Return this machine's Debian sources, as one-line apt sources of `release`.

    :raises LabError: when this machine has no source for its own release.
    """
    own = of_this_machine()
    targets = run_tool(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    )
    found = {tuple(line.split()) for line in targets.decode().splitlines()}
    lines = {
        f"deb [signed-by={KEYRING}] {address} {suite.replace(own, release)} {component}"
        for address, suite, component in found
        if suite.split("-")[0] == own
    }
    if not lines:
        raise LabError(f"apt on this machine has no source for Debian {own}; the lab is built from its packages")
    return sorted(lines)


def apt_options() -> str:
    """Return the options with which this machine's apt reaches its mirror, as text for apt.conf."""
    dump = run_tool(["apt-config", "dump", "--no-empty"]).decode()
    return "".join(f"{line}\n" for line in dump.splitlines() if line.startswith(APT_OPTIONS))


def write_apt_conf(root: Path) -> None:
    """Let apt in a root tree reach the mirror as this machine's apt does."""
    (root / "etc/apt/apt.conf.d/90mirror").write_text(apt_options())


def copy_network_files(root: Path) -> None:
    """Copy to a root tree what this machine needs to reach the registries of packages."""
    for name in map(Path, NETWORK):
        target = root / name.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.is_dir():
            shutil.copytree(name, target, dirs_exist_ok=True)
        elif name.exists():
            shutil.copy(name, target)


def separate_apt(folder: Path, release: str) -> dict[str, str]:
    """Return the environment in which apt knows only the packages of `release`; update its lists.

    :param folder: is made, and gets apt's files.
    """
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text("".join(f"{line}\n" for line in sources(release)))
    places = {
        "State": folder,
        "State::Lists": folder / "lists",
        "State::Status": folder / "status",
        "Cache": folder,
        "Etc::SourceList": folder / "sources.list",
        "Etc::SourceParts": "/dev/null",
    }
    own = "".join(f'Dir::{name} "{path}";\n' for name, path in places.items())
    (folder / "apt.conf").write_text(f'{apt_options()}{own}Acquire::Languages "none";\n')
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}
    run_tool(["apt-get", "--quiet", "update"], env=environment)
    return environment
