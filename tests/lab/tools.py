# SPDX-License-Identifier: Apache-2.0
"""Programs of the build machine; their output is kept for the error."""

import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.lab.errors import LabError

HOST_PACKAGES = (
    "binutils",
    "cpio",
    "e2fsprogs",
    "gcc",
    "mmdebstrap",
    "nbdkit",
    "nbdkit-plugin-python",
    "qemu-system-x86",
    "util-linux",
)
OUTPUT_TAIL = 4000


def require(programs: Iterable[str]) -> None:
    """Raise LabError when one of `programs` is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise LabError(f"not installed: {', '.join(missing)}; the lab needs the packages {' '.join(HOST_PACKAGES)}")


def run_tool(
    command: Sequence[str | Path], *, stdin: bytes = b"", cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> bytes:
    """Run `command`; return its stdout.

    :raises LabError: with the end of its stderr, when it fails.
    """
    done = subprocess.run(
        [str(word) for word in command], check=False, input=stdin, capture_output=True, cwd=cwd, env=env
    )
    if done.returncode:
        tail = (done.stdout + done.stderr)[-OUTPUT_TAIL:].decode(errors="replace")
        raise LabError(f"{command[0]} ended with status {done.returncode}\n{tail}")
    return done.stdout
