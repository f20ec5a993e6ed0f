# SPDX-License-Identifier: Apache-2.0
"""A Debian system to install into: the lab's base, under an overlay in memory."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Self

START = """\
mount -t tmpfs none "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay none -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc none "$1/root/proc"
mount -t sysfs none "$1/root/sys"
mount --rbind /dev "$1/root/dev"
shift 2
while [ $# -gt 0 ]; do
    mkdir -p "$2"
    mount --bind "$1" "$2"
    shift 2
done
echo ready
exec sleep infinity
"""


class DebianRoot:
    """The system, in a mount namespace of its own. It ends with the process that started it. Needs root.

    :param base: root folder of an installed system, which is not changed.
    :param folder: an empty folder.
    :param binds: folders of this machine, by their paths in the system.
    """

    def __init__(self, base: Path, folder: Path, binds: dict[str, Path]) -> None:
        self._folder = folder
        self._arguments = [str(folder), str(base)]
        for inside, outside in binds.items():
            self._arguments += [str(outside), f"{folder}/root{inside}"]

    def __enter__(self) -> Self:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-ec", START, "sh", *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the root file system was not mounted: the reason is above")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def path(self, inside: str) -> Path:
        """Return the path by which this machine sees a file of the system."""
        return Path(f"/proc/{self._process.pid}/root{self._folder}/root{inside}")

    def run(self, command: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a bash command in the system; it must end with that status."""
        inside = ["nsenter", "--mount", f"--target={self._process.pid}", "chroot", f"{self._folder}/root"]
        inside += ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/root"]
        done = subprocess.run([*inside, "bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done
