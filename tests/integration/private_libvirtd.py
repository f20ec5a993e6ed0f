# SPDX-License-Identifier: Apache-2.0
"""The real libvirtd with its own folders: it does not touch the host's libvirt."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Self

from tests.waiting import HANG_SECONDS

CONFIG = """\
unix_sock_dir = "{folder}"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:stderr"
max_clients = 1100
max_queued_clients = 1100
"""
START = """\
for folder in /run /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mount -t tmpfs none $folder
done
echo 'user = "root"' >/etc/libvirt/qemu.conf
exec libvirtd -f "$1/libvirtd.conf" -p "$1/libvirtd.pid"
"""


class PrivateLibvirtd:
    """libvirtd in its own mount and network namespaces; ends with the process that started it. Needs root.

    :ivar socket: path of the socket that it listens on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = folder / "libvirt-sock"
        self.log = folder / "libvirtd.log"

    def __enter__(self) -> Self:
        (self._folder / "libvirtd.conf").write_text(CONFIG.format(folder=self._folder))
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net"]
        command += ["sh", "-ec", START, "sh", str(self._folder)]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + HANG_SECONDS
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"libvirtd did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def uri(self, driver: str, path: str, socket: Path | None = None) -> str:
        """Return a connection URI for a driver of this libvirtd; `socket` is that of a proxy in front, if any."""
        return f"{driver}+unix://{path}?socket={socket or self.socket}"
