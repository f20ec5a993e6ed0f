# SPDX-License-Identifier: Apache-2.0
"""nvdimmd as a process, by itself and under socket activation, with a socket in place of libvirtd."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvdimm_driver import conf
from nvdimm_driver.cmd import systemd_units
from nvdimm_driver.registered import MARK
from tests.waiting import HANG_SECONDS

NVDIMMD = [sys.executable, "-m", "nvdimm_driver.cmd.nvdimmd"]
GREETING = b"\0\0\0\x1c\x6b\x65\x65\x70\0\0\0\x01\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0\0"
"""A keepalive message (src/rpc/virkeepaliveprotocol.x)."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "nvdimm-driver.conf"
    names = ("socket", "socket_ro", "libvirt_socket", "libvirt_socket_ro")
    rpc = "\n".join(f"{name}={tmp_path}/{name}" for name in names)
    file.write_text(f"[DEFAULT]\nstate_dir={tmp_path}\n[rpc]\ngroup=root\n{rpc}\nlibvirt_direct_socket={tmp_path}/d\n")
    return file


@contextmanager
def libvirtd(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(HANG_SECONDS)
        yield listener


@contextmanager
def running(command: list[str], **env: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def connect(path: Path) -> socket.socket:
    """Connect once the socket exists; nvdimmd takes a moment."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(HANG_SECONDS)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            assert time.monotonic() < deadline, f"nobody listens on {path}"
            time.sleep(0.05)
        else:
            return client


def passes(client: socket.socket, listener: socket.socket) -> bool:
    """Return True when the client's data reach libvirtd, and libvirtd's the client."""
    client.sendall(GREETING)
    upstream, _ = listener.accept()
    with upstream:
        upstream.settimeout(HANG_SECONDS)
        heard = upstream.recv(len(GREETING), socket.MSG_WAITALL)
        upstream.sendall(GREETING)
        return heard == GREETING == client.recv(len(GREETING), socket.MSG_WAITALL)


def test_by_itself_it_makes_its_sockets_and_takes_them_away(tmp_path: Path, config: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "socket"))
    stale.close()
    with (
        libvirtd(tmp_path / "libvirt_socket") as listener,
        libvirtd(tmp_path / "libvirt_socket_ro") as readers,
        running([*NVDIMMD, str(config)]) as nvdimmd,
    ):
        with connect(tmp_path / "socket_ro") as client:
            assert passes(client, readers)
        with connect(tmp_path / "socket") as client:
            assert passes(client, listener)
        assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("socket", "socket_ro")] == [0o660, 0o666]
        nvdimmd.send_signal(signal.SIGTERM)
        assert nvdimmd.wait(HANG_SECONDS) == 0
    assert not (tmp_path / "socket").exists()
    assert not (tmp_path / "socket_ro").exists()


def test_a_moved_socket_of_virtxend_is_preferred(tmp_path: Path, config: Path) -> None:
    with (
        libvirtd(tmp_path / "libvirt_socket"),
        libvirtd(tmp_path / "d") as direct,
        running([*NVDIMMD, str(config)]),
        connect(tmp_path / "socket") as client,
    ):
        assert passes(client, direct)


def test_a_socket_that_somebody_serves_is_left_alone(tmp_path: Path, config: Path) -> None:
    with libvirtd(tmp_path / "socket"):
        done = subprocess.run([*NVDIMMD, str(config)], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 1
    assert f"{tmp_path}/socket is served by another program" in done.stderr


def test_systemd_hands_over_sockets_and_hears_that_it_is_ready(tmp_path: Path, config: Path) -> None:
    notify = f"NOTIFY_SOCKET={tmp_path}/notify"  # not systemd-socket-activate's own, which a newer one would use, too
    command = ["systemd-socket-activate", "-E", notify, "-l", str(tmp_path / "rw"), "-l", str(tmp_path / "ro")]
    command += ["--fdname=nvdimmd.socket:nvdimmd-ro.socket", *NVDIMMD, str(config)]
    with (
        libvirtd(tmp_path / "libvirt_socket") as listener,
        libvirtd(tmp_path / "libvirt_socket_ro") as readers,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service,
    ):
        service.bind(str(tmp_path / "notify"))
        service.settimeout(HANG_SECONDS)
        with running(command, PYTHONPATH=os.pathsep.join(sys.path)):
            with connect(tmp_path / "rw") as client:
                assert passes(client, listener)
            with connect(tmp_path / "ro") as client:
                assert passes(client, readers)
            assert service.recv(100) == b"READY=1"
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize("libvirt", ["libvirtd", "virtxend"])
def test_systemd_takes_the_units(tmp_path: Path, libvirt: str) -> None:
    options = conf.load([])
    names = {"mark": MARK, "python": sys.executable, "group": "root", "libvirt": libvirt}
    names |= {"socket": options.rpc.socket, "socket_ro": options.rpc.socket_ro}
    for name, text in systemd_units.UNITS.items():
        (tmp_path / name).write_text(text.format(**names))
    # the units that they refer to
    for name in (f"{libvirt}.socket", f"{libvirt}-ro.socket"):
        (tmp_path / name).write_text("[Socket]\nListenStream=/run/x\nService=nvdimmd.service\n")
    files = [str(tmp_path / name) for name in systemd_units.UNITS]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True)
    others = "/usr/lib/systemd/system/"  # units of packages, in which a newer systemd finds old options
    said = [line for line in done.stderr.splitlines() if not line.startswith(others)]
    assert (done.returncode, said) == (0, [])
