# SPDX-License-Identifier: Apache-2.0
"""The tutorial as written, but for recommended packages, which the lab has: run in dom0 and in the guest."""

from __future__ import annotations

import re

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost
from tests.package import PROJECT, build_package

TUTORIAL = (PROJECT / "doc" / "tutorial.rst").read_text(encoding="utf-8")
DISK = "/var/lib/guest.img"
FOLDER = "/root/walk"


def prepare(xen: XenHost) -> None:
    """Copy into a folder of dom0 what the reader needs: the package, and a guest with the NVDIMM of the page."""
    package = build_package()
    xen.put(package, f"{FOLDER}/{package.name}")
    xen.put(xen.images.guest_tools_disk, DISK)
    xml = operator.domain_xml("db1", [_snippet()], ram_mib=256, disk=DISK)
    xen.write(f"{FOLDER}/db1.xml", xml.encode())


def walk(xen: XenHost, title: str, guest: Guest | None = None) -> str:
    """Run the commands of the section with this title; return everything that they printed."""
    printed = ""
    for prompt, command in _commands(title):
        command = command.replace("apt-get install -y", "apt-get install -y --no-install-recommends")  # no network
        if prompt == "# ":
            printed += xen.check(f"cd {FOLDER} && {command}", timeout=600).stdout
        else:
            assert guest
            printed += guest.check("run", f"mkdir -p /mnt; {command}", timeout=300)
    return printed


def _commands(title: str) -> list[tuple[str, str]]:
    """Yield each command with its prompt."""
    section = re.split(r"\n\n([^\n]+)\n-+\n", TUTORIAL)
    text = dict(zip(section[1::2], section[2::2], strict=True))[title]
    found = re.findall(r"^    (guest# |# )(.+)$", text, re.MULTILINE)
    assert found, title
    return found


def _snippet() -> str:
    (text,) = re.findall(r"\.\. code-block:: xml\n\n((?:    .*\n)+)", TUTORIAL)
    return str(text)
