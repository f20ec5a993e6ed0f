# SPDX-License-Identifier: Apache-2.0
"""AppArmor and SELinux: do they let libvirt's daemon run the hook and the device model?"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from nvdimm_driver.doctor.finding import Finding, noted, passed, warned

DAEMONS = ("virtxend", "libvirtd")
_STARTTIME = 19
"""Behind the name in /proc/PID/stat: in clock ticks since boot (proc(5))."""
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
    """libvirt's daemon, while it runs.

    :ivar started: seconds since the epoch.
    :ivar label: that the security module has put on it, such as ``libvirtd (enforce)``.
    """

    name: str
    started: float
    label: str


def find_daemon(proc: Path = Path("/proc")) -> Daemon | None:
    """Return the running daemon that has the libxl driver; prefer the modular one."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    found = {}
    for folder in proc.glob("[0-9]*"):
        name = _text(folder / "comm")
        fields = _text(folder / "stat").rpartition(")")[2].split()  # none when it has just ended
        if name in DAEMONS and len(fields) > _STARTTIME:
            started = booted + int(fields[_STARTTIME]) / os.sysconf("SC_CLK_TCK")
            found[name] = Daemon(name, started, _text(folder / "attr/current"))
    return next((found[name] for name in DAEMONS if name in found), None)


def check_apparmor(daemon: Daemon | None, device_model: str, root: Path = Path("/")) -> Finding:
    """Check that AppArmor lets the hook make files immutable, and libvirt run the device model."""
    check = "AppArmor"
    if _text(root / "sys/module/apparmor/parameters/enabled") != "Y":
        return passed(check, "is off")
    if daemon is None:
        return noted(check, "is on; libvirt's daemon does not run, so that its profile cannot be told", "start it")
    if not daemon.label:
        return noted(check, f"is on, and does not say whether it confines {daemon.name}", "run as root")
    if not daemon.label.endswith("(enforce)"):
        return passed(check, f"does not confine {daemon.name}: {daemon.label}")
    profile = f"usr.sbin.{daemon.name}"
    folder = root / "etc/apparmor.d"
    rules = "\n".join(_rules(path) for path in (folder / profile, folder / "local" / profile))
    missing = missing_rules(rules, device_model)
    if not missing:
        return passed(check, f"confines {daemon.name}, and its profile allows what is needed")
    return warned(
        check,
        f"confines {daemon.name}, whose profile does not have: {' '.join(missing)}",
        f"add it to /etc/apparmor.d/local/{profile}, apparmor_parser -r /etc/apparmor.d/{profile}, and restart "
        f"{daemon.name}",
    )


def missing_rules(rules: str, device_model: str) -> list[str]:
    """Return the rules that a profile lacks, as lines to add."""
    missing = []
    if not re.search(r"^\s*capability\s*(?:[^,]*\blinux_immutable\b[^,]*)?,", rules, re.MULTILINE):
        missing.append("capability linux_immutable,")
    if os.path.dirname(device_model) not in _EXECUTABLE and device_model not in rules:
        missing.append(f"{device_model} Ux,")
    return missing


def check_selinux(root: Path = Path("/")) -> Finding:
    """Check SELinux, for which no policy is shipped."""
    enforcing = _text(root / "sys/fs/selinux/enforce")
    if enforcing != "1":
        return passed("SELinux", "is permissive" if enforcing == "0" else "is off")
    return warned(
        "SELinux",
        "is enforcing, and the driver has no policy for it",
        "when a start fails, 'ausearch -m avc -ts recent' tells what was denied, and 'audit2allow -M nvdimm' makes a "
        "policy of it",
    )


def _rules(path: Path) -> str:
    """Return a profile without its comments."""
    return re.sub(r"^\s*#(?!include).*$", "", _text(path), flags=re.MULTILINE)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""
