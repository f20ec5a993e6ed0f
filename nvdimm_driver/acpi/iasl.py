# SPDX-License-Identifier: Apache-2.0
"""Disassembly of an ACPI table with ACPICA's ``iasl``, if it is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from nvdimm_driver.acpi import tables
from nvdimm_driver.errors import AcpiError
from nvdimm_driver.host_text import read
from nvdimm_driver.processes import run

_WITH_CODE = (b"DSDT", b"SSDT")
_TIMEOUT = 60


def decode(table: bytes, iasl: str = "iasl") -> str:
    """Return a table as text: :func:`.tables.decode` and, for a DSDT or SSDT when ``iasl`` is installed, its ASL.

    :param iasl: name or path of the disassembler.
    :raises AcpiError: when the table is malformed or the disassembler fails.
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
        try:
            done = run([program, "-d", path.name], timeout=_TIMEOUT, folder=folder)
        except subprocess.TimeoutExpired as error:
            raise AcpiError(f"{program} -d took longer than {_TIMEOUT} s") from error
        source = path.with_suffix(".dsl")
        if done.returncode or not source.exists():
            raise AcpiError(f"{program} -d failed with status {done.returncode}: {done.stdout}{done.stderr}")
        return read(source)
