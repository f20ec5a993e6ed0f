# SPDX-License-Identifier: Apache-2.0
"""Check the files that 'nvdimmctl register' has installed, and the QEMUs that the driver runs."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from nvdimm_driver import host_files
from nvdimm_driver.acpi.tables import Header
from nvdimm_driver.doctor.finding import Finding, could_not, failed, passed, warned
from nvdimm_driver.errors import NvdimmError, RefusedError
from nvdimm_driver.host_text import read
from nvdimm_driver.lifecycle.emulators import check_program
from nvdimm_driver.model import GIB, MIB, GuestLayout, Placement
from nvdimm_driver.plugins import AcpiBuilder
from nvdimm_driver.shell import command

_AGAIN = "repeat 'nvdimmctl register'"
_SMALL = GuestLayout(512 * MIB, 4 * GIB, 1 << 40, (Placement(0, 8 * GIB, 16 * MIB),))


@dataclass(frozen=True)
class Script:
    """A script that 'nvdimmctl register' installs.

    :ivar name: what the file is, such as ``hook``.
    :ivar text: the text that the file should have.
    :ivar mark: a text that is in each file that register writes.
    """

    name: str
    path: Path
    text: str
    mark: str


def check_script(script: Script) -> Finding:
    """Check that the script exists, was written by register, is current, and can be run."""
    try:
        text = read(script.path)
    except FileNotFoundError:
        return failed(script.name, f"there is no {script.path}", "'nvdimmctl register' installs it")
    except OSError as error:
        return could_not(script.name, error)
    if script.mark not in text:
        return failed(script.name, f"{script.path} was not written by nvdimm_driver", f"move it away, and {_AGAIN}")
    if not os.access(script.path, os.X_OK):
        return failed(script.name, f"{script.path} is not executable", command("chmod", "755", script.path))
    python = re.search(r"([^\s!]+) -I\b", text)
    if python and not os.access(python[1], os.X_OK):
        return failed(script.name, f"{script.path}: its interpreter {python[1]} is gone", _AGAIN)
    if text != script.text:
        return warned(
            script.name, f"{script.path} is that of another version of the driver, or of other options", _AGAIN
        )
    return passed(script.name, str(script.path))


def check_hook_known(hook: Path, started: float | None) -> Finding:
    """Check that libvirt will run the hook: it looks for hooks only when it starts (src/util/virhook.c).

    :param started: start time of libvirt's daemon, in seconds since the epoch; None while it does not run.
    """
    check = "hook, libvirt"
    if not host_files.exists(hook):
        return failed(check, "there is no hook for libvirt to run", "'nvdimmctl register' installs it")
    if started is None:
        return passed(check, "libvirt's daemon does not run now; it will find the hook when it starts")
    if hook.stat().st_mtime > started:
        return warned(
            check,
            "libvirt's daemon was started before the hook was installed, and may not run it",
            "restart it: systemctl restart libvirtd (or virtxend); guests are not disturbed",
        )
    return passed(check, "libvirt's daemon was started after the hook was installed")


def check_qemu(path: str) -> Finding:
    """Check that the QEMU that the device model becomes can be run, and that nobody but root can change it."""
    try:
        check_program(path)
    except RefusedError as error:
        return failed("QEMU", error.message, error.hint)
    except NvdimmError as error:
        return failed("QEMU", error.message, "install qemu-system-xen, or set [xen] qemu in the options")
    return passed("QEMU", path)


def check_tables(name: str, builder: AcpiBuilder) -> Finding:
    """Check that the ACPI builder makes the tables of a small guest.

    :param builder: a builder without a cache.
    """
    started = time.monotonic()
    try:
        tables = builder.build(_SMALL).tables
    except NvdimmError as error:
        return could_not("ACPI tables", error)
    took = (time.monotonic() - started) * 1000
    made = ", ".join(f"{Header.parse(table).signature.decode()} of {len(table)} bytes" for table in tables)
    return passed("ACPI tables", f"builder {name}: {made} in {took:.0f} ms")
