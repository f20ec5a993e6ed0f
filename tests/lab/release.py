# SPDX-License-Identifier: Apache-2.0
"""The Debian releases that the lab's host can be made of."""

import os
import platform
from dataclasses import dataclass

from tests.lab.errors import LabError


@dataclass(frozen=True, slots=True)
class Release:
    """A Debian release, and what differs between the labs made of them."""

    name: str
    xen: str
    """Version of its Xen, as in the names of packages, folders and libraries."""
    python: str


RELEASES = {
    release.name: release for release in (Release("trixie", "4.20", "3.13"), Release("bookworm", "4.17", "3.11"))
}
DEFAULT = "trixie"
GUESTS = (*RELEASES, "forky")
"""The releases whose Linux guests boot. The last is Debian's next one: the newest Linux, whose version changes."""


def chosen() -> Release:
    """Return the release that $RELEASE names, or the default.

    :raises LabError: when no lab can be made of it.
    """
    return named(os.environ.get("RELEASE") or DEFAULT)


def named(name: str) -> Release:
    """Return a release by its code name.

    :raises LabError: when no lab can be made of it.
    """
    if name not in RELEASES:
        raise LabError(f"RELEASE={name}: the lab can be made of {', '.join(RELEASES)}")
    return RELEASES[name]


def of_this_machine() -> str:
    """Return the code name of the release that this machine runs.

    :raises LabError: when it is no Debian.
    """
    found = platform.freedesktop_os_release()
    if found.get("ID") != "debian" or "VERSION_CODENAME" not in found:
        raise LabError(f"this is {found.get('PRETTY_NAME')}; the lab is built on Debian, from its packages")
    return found["VERSION_CODENAME"]
