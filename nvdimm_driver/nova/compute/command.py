# SPDX-License-Identifier: Apache-2.0
"""Run ``nvdimmctl`` as root from an unprivileged nova-compute: only root may change the ledger and the backings."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

from nova import utils

from nvdimm_driver.host_text import decode
from nvdimm_driver.nova.compute.compatibility import expect

NOT_FOUND = 3
IN_USE = 4
EXPECTED = tuple(expect(utils, {"get_root_helper": "()"}))


class CommandFailed(Exception):
    """nvdimmctl failed, or could not be run.

    :ivar status: its exit status (nvdimmctl(8)); 127 when it could not be run.
    """

    def __init__(self, words: tuple[str, ...], status: int, said: str) -> None:
        super().__init__(f"nvdimmctl {' '.join(words)} ended with {status}: {said or 'it said nothing'}")
        self.status = status


def _ignore(line: str) -> None:
    del line


def run(*words: str, tell: Callable[[str], None] = _ignore) -> str:
    """Run nvdimmctl and return its standard output.

    :param tell: called with each line of its standard error, as it comes.
    :raises CommandFailed: when its exit status is not 0, or it cannot be run.
    """
    root = [] if os.geteuid() == 0 else shlex.split(utils.get_root_helper())
    said = ""
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                [*root, "nvdimmctl", *words], stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise CommandFailed(words, 127, str(error)) from error
        with process:
            for raw in process.stderr or ():
                said = decode(raw).strip()
                tell(said)
        if process.returncode:
            raise CommandFailed(words, process.returncode, said)
        printed.seek(0)
        return decode(printed.read())


def rows(*words: str) -> list[dict[str, Any]]:
    """Run an nvdimmctl command that prints a table, and return the rows.

    :raises CommandFailed: as :func:`run` does.
    """
    found: list[dict[str, Any]] = json.loads(run(*words, "-f", "json"))
    return found
