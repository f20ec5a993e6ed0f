# SPDX-License-Identifier: Apache-2.0
"""The lab's Linux guest in a plain QEMU: it sees what a KVM guest sees of the same file."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.guest import TAIL, Conversation
from tests.lab.image import Images

LINUX_ARGS = "console=ttyS0 quiet loglevel=3 rdinit=/init"
MEMORY_MIB = 256


class PlainGuest(Conversation):
    """The guest with ndctl, in a running QEMU."""

    def __init__(self, process: subprocess.Popen[bytes], console: socket.socket) -> None:
        super().__init__("plain QEMU")
        self._process = process
        self._socket = console
        self._said = b""

    def exists(self) -> bool:
        return self._process.poll() is None

    def console(self) -> str:
        return self._said.decode(errors="replace")

    def _send(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        self._said += data
        return data

    def _evidence(self) -> str:
        return f"status {self._process.poll()}\nend of its console:\n{self.console()[-TAIL:]}"


@contextmanager
def plain_guest(images: Images, file: Path, size: int, label_size: int, align: int) -> Iterator[PlainGuest]:
    """Boot it with the first `size` bytes of a file as its NVDIMM, as libvirt would with the same XML on KVM."""
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryDirectory() as folder:
        initrd = Path(folder) / "initrd.gz"
        initrd.write_bytes(images.guest_initrd.read_bytes() + images.guest_tools.read_bytes())
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-machine", "pc,nvdimm=on", "-accel", "tcg", "-cpu", "max", "-m", f"{MEMORY_MIB}M,slots=1,maxmem=4G"),
            *("-object", f"memory-backend-file,id=m,share=on,mem-path={file},size={size},align={align}"),
            *("-device", f"nvdimm,id=nv,memdev=m,label-size={label_size}"),
            *("-kernel", str(images.guest_kernel), "-initrd", str(initrd), "-append", LINUX_ARGS),
            *("-chardev", f"socket,id=console,fd={theirs.fileno()}", "-serial", "chardev:console"),
        ]
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder},
        )
        try:
            yield PlainGuest(process, ours)
        finally:
            process.kill()
            process.wait()
