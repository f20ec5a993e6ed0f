# SPDX-License-Identifier: Apache-2.0
"""Disassembly of an ACPI table with ACPICA's ``iasl``, if it is installed.

A guest can write what it likes into its tables, and iasl is written in C. So root runs it as a user of its own, in
namespaces in which it sees no network and no other process, with limits, and takes nothing from it but a file. What
iasl copies from a table is shown without control characters: they would be the guest's orders to root's terminal.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from nvdimm_driver.acpi import tables
from nvdimm_driver.errors import AcpiError, ConfigError
from nvdimm_driver.host_text import decode as decode_text
from nvdimm_driver.host_text import printable
from nvdimm_driver.model import MIB
from nvdimm_driver.processes import FIRST_UID, run
from nvdimm_driver.sizes import human

_WITH_CODE = (b"DSDT", b"SSDT")
_TIMEOUT = 60
_UID = FIRST_UID + 0xFFFF
"""User and group of iasl, which no domain's label server has: Xen's domids are less than 0x7FF0."""
_OUTPUT_MAX = 8 * MIB
_LIMITS = ("--as=1073741824", "--core=0", "--cpu=30", f"--fsize={_OUTPUT_MAX}", "--nofile=64")


def decode(table: bytes, iasl: str = "iasl") -> str:
    """Return a table as text: :func:`.tables.decode` and, for a DSDT or SSDT when ``iasl`` is installed, its ASL.

    :param iasl: name or path of the disassembler.
    :raises AcpiError: when the table is malformed or the disassembler fails.
    :raises ConfigError: when the disassembler cannot be run without privileges.
    """
    head = tables.decode(table)
    program = shutil.which(iasl)
    if table[:4] not in _WITH_CODE or program is None:
        return head
    return f"{head}\n{_disassemble(table, program)}"


def _disassemble(table: bytes, program: str) -> str:
    with tempfile.TemporaryDirectory(prefix="nvdimm-iasl-") as folder:
        path = Path(folder) / "table.aml"
        path.write_bytes(table)
        path.chmod(0o444)
        if os.geteuid() == 0:
            os.chown(folder, _UID, _UID)
        try:
            done = run([*_confinement(), program, "-d", path.name], timeout=_TIMEOUT, folder=folder)
        except subprocess.TimeoutExpired as error:
            raise AcpiError(f"{program} -d took longer than {_TIMEOUT} s") from error
        source = path.with_suffix(".dsl")
        if done.returncode or not source.exists():
            said = printable(done.stdout + done.stderr)
            raise AcpiError(f"{program} -d failed with status {done.returncode}: {said}")
        return _read(source)


def _confinement() -> list[str]:
    """Return the words that run a program with limits and, for root, without any privilege (util-linux)."""
    words = [_tool("prlimit"), *_LIMITS]
    if os.geteuid() == 0:
        ids = ("--reuid", str(_UID), "--regid", str(_UID), "--clear-groups")
        words = [*_namespaces(), _tool("setpriv"), "--no-new-privs", *ids, "--", *words]
    return [*words, "--"]


def _namespaces() -> list[str]:
    """Return the words that run a program in namespaces; none where root cannot make them, as in some containers."""
    words = [_tool("unshare"), "--net", "--ipc", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child", "--"]
    return words if run([*words, "true"]).returncode == 0 else []


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"{name}, which runs iasl without privileges, is missing", hint="install util-linux")
    return path


def _read(source: Path) -> str:
    """Return what the disassembler has written; its folder is its own, and could have anything in it.

    :raises AcpiError: when that is no ordinary file, or too long.
    """
    try:
        with open(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size >= _OUTPUT_MAX:  # it was cut
                raise AcpiError(
                    f"iasl wrote no ordinary file of less than {human(_OUTPUT_MAX)}",
                    hint="'nvdimmctl acpi dump -o DIR' writes the tables into files",
                )
            return printable(decode_text(file.read(_OUTPUT_MAX)))
    except OSError as error:
        raise AcpiError(f"cannot read what iasl wrote: {error.strerror}") from error
