# SPDX-License-Identifier: Apache-2.0
"""Check what libvirt's configuration promises about its users, and nvdimmd, which is root to libvirt, does not keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nvdimm_driver import host_files
from nvdimm_driver.doctor.finding import Finding, noted, passed, warned
from nvdimm_driver.host_text import read

CHECK = "access"
FOLDER = Path("/etc/libvirt")


def check_access(file: Path, group: str) -> Iterator[Finding]:
    """Check the options of libvirt's daemon that say who may do what.

    libvirt asks neither polkit nor an access driver about root (``src/remote/remote_daemon_dispatch.c``,
    ``src/access/viraccessdriverpolkit.c``), and nvdimmd's connections are root's, whoever its client is.

    :param file: the daemon's configuration.
    :param group: ``[rpc] group``.
    """
    options = _options(read(file)) if host_files.exists(file) else {}
    drivers = options.get("access_drivers", "")
    told = False
    if drivers:
        told = True
        yield warned(
            CHECK,
            f"{file}: access_drivers ({drivers}) limits what each user may do, but not the clients of nvdimmd: members "
            f"of group {group} may do all that root may",
            f"put only those into {group} who may do all; others name libvirt's own socket in their URI",
        )
    for option, who in (("auth_unix_rw", f"members of group {group}"), ("auth_unix_ro", "those who only read")):
        if options.get(option) == "polkit":
            told = True
            yield warned(
                CHECK,
                f"{file}: libvirt asks polkit who may connect ({option}), and nvdimmd does not: {who} connect unasked",
                f"put only those into {group} whom polkit lets in, and set {option} to none"
                if option == "auth_unix_rw"
                else f"set {option} to none; [rpc] socket_ro is for everybody who may open libvirt's own",
            )
    if not told and "auth_unix_rw" not in options:
        yield noted(
            CHECK,
            f"nvdimmd lets in the members of group {group}; if libvirt has rules of polkit for others, those name "
            "libvirt's own socket in their URI",
        )
    elif not told:
        yield passed(CHECK, f"{file} promises nothing that nvdimmd does not keep")


def _options(text: str) -> dict[str, str]:
    """Return the options in a configuration of libvirt (``src/util/virconf.c``), a list as its items with commas."""
    plain = re.sub(r"#[^\n]*", "", text)
    found = re.findall(r"(?:^|;)[ \t]*(\w+)[ \t]*=[ \t]*(\[.*?\]|[^\n;]*)", plain, re.MULTILINE | re.DOTALL)
    return {name: ", ".join(_items(value)) for name, value in found}


def _items(value: str) -> list[str]:
    """Return the items of a value, without quotes."""
    items = [item.strip("\"' \t\r\n") for item in value.strip("[] \t\r\n").split(",")]
    return [item for item in items if item]
