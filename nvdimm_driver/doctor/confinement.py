# SPDX-License-Identifier: Apache-2.0
"""Check that the driver's programs are confined, and that AppArmor and SELinux let libvirt's daemon run them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from nvdimm_driver import apparmor
from nvdimm_driver.doctor.finding import Finding, failed, noted, passed, warned
from nvdimm_driver.errors import ConfigError, hint_of
from nvdimm_driver.host_text import read
from nvdimm_driver.processes import start_time

DAEMONS = ("virtxend", "libvirtd")
_EXECUTABLE = (
    "/bin",
    "/sbin",
    "/usr/bin",
    "/usr/sbin",
    "/usr/lib/xen/bin",
    "/usr/lib64/xen/bin",
    "/usr/libexec/xen/bin",
)
"""Folders whose programs libvirt's own profile lets its daemon run unconfined."""


@dataclass(frozen=True)
class Daemon:
    """libvirt's running daemon.

    :ivar started: start time, in seconds since the epoch.
    :ivar label: its label in the security module, such as ``libvirtd (enforce)``.
    """

    name: str
    started: float
    label: str


def find_daemon(proc: Path = Path("/proc")) -> Daemon | None:
    """Return the running daemon that has the libxl driver, the modular one first; None if there is none."""
    found = {}
    for folder in proc.glob("[0-9]*"):
        name = _text(folder / "comm")
        started = start_time(folder) if name in DAEMONS else None  # None when the process has just ended
        if started is not None:
            found[name] = Daemon(name, started, _text(folder / "attr/current"))
    return next((found[name] for name in DAEMONS if name in found), None)


def is_on(root: Path = Path("/")) -> bool:
    """Return True if the kernel has AppArmor turned on."""
    return _text(root / "sys/module/apparmor/parameters/enabled") == "Y"


def profile_of(daemon: str) -> str:
    """Return the name of the file with a daemon's profile."""
    return f"usr.sbin.{daemon}"


def check_profiles(root: Path = Path("/")) -> Finding:
    """Check that AppArmor confines the driver's own programs."""
    check = "AppArmor, nvdimm-driver"
    if not is_on(root):
        return passed(check, "is off")
    try:
        lines = read(root / "sys/kernel/security/apparmor/profiles").splitlines()
    except OSError as error:
        return noted(check, f"is on; its profiles cannot be listed: {error.strerror}", hint_of(error))
    loose = [name for name in apparmor.PROFILES if f"{name} (enforce)" not in lines]
    if not loose:
        return passed(check, f"confines {', '.join(apparmor.PROFILES)}")
    return warned(
        check,
        f"is on, and does not confine {', '.join(loose)}",
        "install /etc/apparmor.d/nvdimm-driver, which the package has, and run: apparmor_parser -r "
        "/etc/apparmor.d/nvdimm-driver && systemctl restart nvdimmd",
    )


def check_label_servers(fault: ConfigError | None, dsm: str) -> Finding:
    """Check that a label server would be kept from the host's files and network; it does not run otherwise.

    :param fault: why it cannot be.
    :param dsm: who serves labels, unless a domain's XML says otherwise.
    """
    check = "label servers, isolation"
    if fault is None:
        return passed(check, "see programs and libraries, and no other files, sockets or processes of the host")
    return (failed if dsm == "qemu" else noted)(check, f"cannot run: {fault.message}", fault.hint)


def check_apparmor(daemon: Daemon | None, programs: Collection[str], folder: Path, root: Path = Path("/")) -> Finding:
    """Check that AppArmor lets libvirt's daemon run the hook under its own profile, and run the device models.

    :param programs: those of :func:`.registered.run_by_libvirt`.
    :param folder: that of AppArmor's profiles.
    """
    check = "AppArmor, libvirt"
    if not is_on(root):
        return passed(check, "is off")
    if daemon is None:
        return noted(
            check,
            "is on; libvirt's daemon does not run, so its profile is unknown",
            "start it: systemctl start libvirtd (or virtxend)",
        )
    if not daemon.label:
        return noted(
            check, f"is on; the label of {daemon.name} cannot be read, so its profile is unknown", "run as root"
        )
    if not daemon.label.endswith("(enforce)"):
        return passed(check, f"does not confine {daemon.name}: {daemon.label}")
    profile = profile_of(daemon.name)
    rules = "\n".join(_rules(path) for path in (folder / profile, folder / "local" / profile))
    missing = missing_rules(rules, programs)
    if not missing:
        return passed(check, f"confines {daemon.name}, and the profile allows what the driver needs")
    return warned(
        check, f"confines {daemon.name}, and the profile lacks: {' '.join(missing)}", "repeat 'nvdimmctl register'"
    )


def missing_rules(rules: str, programs: Collection[str]) -> list[str]:
    """Return the rules that the driver needs and a profile lacks, as lines to add.

    With CAP_LINUX_IMMUTABLE, which earlier versions asked for, the hook works under the daemon's own profile, too.
    """
    missing = []
    enters = re.search(rf"^\s*change_profile\s*->\s*{apparmor.HOOK}\s*,", rules, re.MULTILINE)
    if not enters and not re.search(r"^\s*capability\s*(?:[^,]*\blinux_immutable\b[^,]*)?,", rules, re.MULTILINE):
        # libvirtd looks at its client nvdimmd in /proc
        client = f"ptrace (read) peer={apparmor.NVDIMMD},"
        missing += [f"change_profile -> {apparmor.HOOK},", "signal (send) peer=nvdimm-*,", client]
    confined = [each for each in programs if os.path.dirname(each) not in _EXECUTABLE]
    return [*missing, *(f"{each} Ux," for each in confined if each not in rules)]


def check_selinux(root: Path = Path("/")) -> Finding:
    """Check that SELinux is not enforcing: the driver has no policy for it."""
    enforcing = _text(root / "sys/fs/selinux/enforce")
    if enforcing != "1":
        return passed("SELinux", "is permissive" if enforcing == "0" else "is off")
    return warned(
        "SELinux",
        "is enforcing, and the driver has no policy for it",
        "if a start fails, 'ausearch -m avc -ts recent' lists what was denied, and 'audit2allow -M nvdimm' makes a "
        "policy from that list",
    )


def _rules(path: Path) -> str:
    """Return a profile without its comments."""
    return re.sub(r"^\s*#(?!include).*$", "", _text(path), flags=re.MULTILINE)


def _text(path: Path) -> str:
    try:
        return read(path).strip("\0\n ")
    except OSError:
        return ""
