# SPDX-License-Identifier: Apache-2.0
"""The real libvirtd with its real libxl driver, on a host without Xen: libxl_stand_in.c in place of libxenlight.

It runs in its own mount and process namespaces, over folders of the test. It does not touch this machine's libvirt, and
nothing of it outlives the test: processes and mounts end with the namespaces, and these with the process that made
them, however that ends.

Needs root, gcc, and Debian's libvirt-daemon-system, libvirt-daemon-driver-xen and libxen-dev.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Self

from tests.waiting import HANG_SECONDS

SOURCES = Path(__file__).parent
DRIVER = Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_libxl.so")
XEN_LIBRARIES = ("libxenctrl.so.4.17", "libxenforeignmemory.so.1", "libxenstore.so.4")

PLACES = {
    "run": "/run",
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
    "conf": "/etc/nvdimm-driver",
    "dev": "/dev",
}
# The first process of the process namespace. It reaps orphans (signal(7): SIGCHLD ignored).
HOLD = """
{setup}
for node in null zero full random urandom; do
    touch {folder}/dev/$node
    mount --bind /dev/$node {folder}/dev/$node
done
mkdir -p /etc/nvdimm-driver
{mounts}
echo ready
trap '' CHLD
exec sleep infinity
"""
# No authentication, as polkit has no daemon here. Only the libxl driver is loaded; its hooks are logged.
LIBVIRTD_CONF = """
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
log_filters = "2:libxl 1:util.hook 3:*"
"""
# Runs after all other hooks: libvirt runs them by name, and continues after one that fails (virhook.c:virHookCall).
RECORDER = """#!/bin/sh
read -r domain
cat >/dev/null
case $domain in *" id='"*) id=${domain##* id=\\'} id=" id=${id%%\\'*}" ;; *) id= ;; esac
echo "hook $2 $3 $1$id" 1<>/run/xen-stand-in/events
"""


class Libvirtd:
    """A libvirtd and the domains that the stand-in shows it.

    :param folder: an empty folder; the path of a socket in it must stay below 108 bytes (unix(7)).
    :param setup: shell commands to run in the new namespaces first, while ``/dev`` is still the machine's.
    :ivar uri: connection URI for libvirt clients anywhere on the machine.
    :ivar hooks: libvirt's folder for hooks, with a script ``libxl.d/99-record``.
    :ivar xen: the stand-in's folder (libxl_stand_in.c lists its files); ``/run/xen-stand-in`` in the namespaces.
    """

    def __init__(self, folder: Path, setup: str = "") -> None:
        self.folder = folder
        self.uri = f"xen+unix:///system?socket={folder}/run/libvirt/libvirt-sock"
        self.hooks = folder / "etc/hooks"
        self.xen = folder / "run/xen-stand-in"
        self._seen: list[str] = []
        self._unread: list[str] = []
        self._partial = ""
        self._daemon: subprocess.Popen[bytes] | None = None
        self._served: dict[str, subprocess.Popen[bytes]] = {}
        self._make_folders()
        self._compile()
        self._namespaces = self._hold(setup)
        self._events = os.open(self.xen / "events", os.O_RDWR | os.O_NONBLOCK)
        self._ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ready.bind(str(folder / "run/ready"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. Can be repeated."""
        self._namespaces.kill()
        self._namespaces.wait(HANG_SECONDS)
        self._wait_for_all()
        self._ready.close()
        if self._events >= 0:
            os.close(self._events)
            self._events = -1

    @property
    def pid(self) -> int:
        """Pid of libvirtd in the machine's pid namespace; its parent is nsenter."""
        if self._daemon is None:
            raise RuntimeError("libvirtd does not run")
        return _child(self._daemon)

    def start(self) -> None:
        """Start libvirtd; return when it has autostarted domains and accepts calls.

        :raises RuntimeError: with the end of its log, when it ends instead.
        """
        environment = {
            "LD_PRELOAD": self.folder / "libxl_stand_in.so",
            "LIBVIRT_DRIVER_DIR": self.folder / "drivers",
            "NOTIFY_SOCKET": "/run/ready",
            "XEN_STAND_IN_LIBRARIES": self.folder / "xen-libraries",
        }
        # Passed to env(1), so that nsenter itself does not load the library.
        settings = [f"{name}={value}" for name, value in environment.items()]
        command = self._inside("env", "--unset=LD_LIBRARY_PATH", *settings, "/usr/sbin/libvirtd")
        self._daemon = subprocess.Popen(command, env=self._environment())
        self._wait_until_ready(self._daemon, "libvirtd")
        self.check("uri")  # it accepts no clients before its drivers are ready (remote_daemon.c:daemonRunStateInit)

    def serve(self, name: str, *command: str | Path) -> None:
        """Start another daemon and wait until it is ready, as sd_notify(3) tells; its log is ``log/NAME.log``."""
        program = self._inside("env", "NOTIFY_SOCKET=/run/ready", *command)
        with (self.folder / f"log/{name}.log").open("ab") as log:
            self._served[name] = subprocess.Popen(program, env=self._environment(), stdout=log, stderr=log)
        self._wait_until_ready(self._served[name], name)

    def pid_of(self, name: str) -> int:
        """Return the pid, in the machine's pid namespace, of a daemon that :meth:`serve` has started."""
        return _child(self._served[name])

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to a daemon that :meth:`serve` has started, and wait for its end."""
        pid, daemon = self.pid_of(name), self._served.pop(name)
        os.kill(pid, number)
        daemon.wait(HANG_SECONDS)

    def stop(self) -> None:
        """Stop libvirtd; its domains keep running."""
        if self._daemon is not None:
            os.kill(self.pid, signal.SIGTERM)
            self._wait_for_daemon()

    def restart(self) -> None:
        """Stop libvirtd and start it again; its domains keep running."""
        self.stop()
        self.start()

    def lose_power(self) -> None:
        """Kill everything at once, and remove what a reboot of the host removes: domains and ``/run``."""
        # -1: all processes of the namespace except its first and the caller (kill(2))
        self.run("sh", "-c", "kill -KILL -1; rm -rf /run/libvirt /run/libvirtd.pid /run/xen-stand-in/*-[0-9]*")
        self._wait_for_all()
        self.forget_domains()

    def forget_domains(self) -> None:
        """Remove all domains, as when somebody else destroys them; libvirtd must not run."""
        (self.xen / "domains").write_bytes(bytes(1 << 16))

    def next_domid(self) -> int:
        """Return the domid of the next domain; the table's first number is the last domid."""
        return int.from_bytes((self.xen / "domains").read_bytes()[:4], "little") + 1

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespaces, where ``/run/libvirt`` belongs to this libvirtd."""
        return self._run(self._inside(*command))

    def begin(self, *command: str | Path) -> subprocess.Popen[str]:
        """Begin a command in the namespaces, whose output its end will have, however long it takes."""
        return subprocess.Popen(
            self._inside(*command),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def virsh(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a virsh command, which may fail."""
        return self._run(["virsh", "-q", "-c", self.uri, *map(str, words)])

    def check(self, *words: str | Path) -> str:
        """Run a virsh command that must succeed; return its output.

        :raises RuntimeError: with its error and the ends of the logs, when it fails.
        """
        done = self.virsh(*words)
        if done.returncode:
            raise RuntimeError(self.report(f"virsh {' '.join(map(str, words))}: {done.stderr.strip()}"))
        return done.stdout.strip()

    def inject(self, domain: str, what: str) -> None:
        """Make something happen to a running domain without libvirt.

        :param what: ``poweroff``, ``reboot``, ``crash``, ``suspend`` or ``soft-reset`` of the guest, or ``death`` of
            the domain.
        """
        domid = self.check("domid", domain)
        commands = os.open(self.xen / "commands", os.O_WRONLY | os.O_NONBLOCK)  # ENXIO: libvirtd does not run
        os.write(commands, f"{what} {domid}\n".encode())
        os.close(commands)

    def events(self) -> list[str]:
        """Return the events since the last call, in order.

        The stand-in writes ``create NAME DOMID``, ``unpause DOMID`` and so on; hooks write
        ``hook OPERATION SUBOPERATION NAME``, followed by `` id=DOMID`` when the XML has one.
        """
        self._read_events()
        unread, self._unread = self._unread, []
        return unread

    def wait_for(self, event: str, timeout: float = HANG_SECONDS) -> list[str]:
        """Wait for an event; return the events since the last call, up to that one.

        :raises TimeoutError: with the ends of the logs.
        """
        deadline = time.monotonic() + timeout
        while event not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._events], [], [], left)[0]:
                raise TimeoutError(self.report(f"no {event!r} in {timeout:.0f} s"))
            self._read_events()
        end = self._unread.index(event) + 1
        happened, self._unread = self._unread[:end], self._unread[end:]
        return happened

    def log(self) -> str:
        """Return libvirtd's log."""
        file = self.folder / "log/libvirtd.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def device_model_log(self, domain: str) -> str:
        """Return the output of the domain's device models."""
        file = self.xen / f"qemu-dm-{domain}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def report(self, problem: str) -> str:
        """Return a problem, followed by the ends of all logs."""
        self._read_events()
        parts = [problem, "--- events:", *self._seen[-20:], "--- libvirtd:", *self.log().splitlines()[-20:]]
        for file in sorted(self.xen.glob("qemu-dm-*.log")):
            parts += [f"--- {file.name}:", *file.read_text(errors="replace").splitlines()[-20:]]
        return "\n".join(parts)

    def _make_folders(self) -> None:
        for name in (*PLACES, "dev/xen", "drivers", "etc/hooks/libxl.d", "home", "run/xen-stand-in", "xen-libraries"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("dev/xen/xenstored", "dev/xen/privcmd"):
            (self.folder / name).touch()
        (self.folder / "drivers" / DRIVER.name).symlink_to(DRIVER)
        (self.folder / "etc/libvirtd.conf").write_text(LIBVIRTD_CONF)
        recorder = self.hooks / "libxl.d/99-record"
        recorder.write_text(RECORDER)
        recorder.chmod(0o755)
        for name in ("events", "commands"):
            os.mkfifo(self.xen / name)
        self.forget_domains()

    def _compile(self) -> None:
        compile_c(self.folder / "libxl_stand_in.so", "libxl_stand_in.c")
        xen = self.folder / "xen-libraries/xen.so"
        compile_c(xen, "xen_stand_in.c", "xen_with_domains.c")
        for name in XEN_LIBRARIES:
            (xen.parent / name).symlink_to(xen.name)

    def _hold(self, setup: str) -> subprocess.Popen[bytes]:
        mounts = [f"mount --rbind {self.folder}/{name} {place}" for name, place in PLACES.items()]
        script = HOLD.format(setup=setup, folder=self.folder, mounts="\n".join(mounts))
        unshare = ["unshare", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child=KILL"]
        ready, write = os.pipe()
        try:
            holder = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *unshare, "sh", "-euc", script],
                stdin=subprocess.DEVNULL,
                stdout=write,
            )
            os.close(write)
            if not select.select([ready], [], [], HANG_SECONDS)[0] or not os.read(ready, 100):
                holder.kill()
                raise RuntimeError(f"cannot make namespaces (as root?): exit status {holder.wait(HANG_SECONDS)}")
            return holder
        finally:
            os.close(ready)

    def _wait_until_ready(self, process: subprocess.Popen[bytes], name: str) -> None:
        ended = os.pidfd_open(process.pid)
        try:
            while True:
                found, _, _ = select.select([self._ready.fileno(), ended], [], [], HANG_SECONDS)
                if self._ready.fileno() not in found:
                    raise RuntimeError(self.report(f"{name} does not start"))
                if b"READY=1" in self._ready.recv(100):  # not STOPPING=1 of an earlier one
                    return
        finally:
            os.close(ended)

    def _wait_for_daemon(self) -> None:
        if self._daemon is None:
            return
        try:
            self._daemon.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(self.report("libvirtd does not end")) from error
        self._daemon = None

    def _wait_for_all(self) -> None:
        self._wait_for_daemon()
        while self._served:
            self._served.popitem()[1].wait(HANG_SECONDS)

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=HANG_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(self.report(str(error))) from error

    def _inside(self, *command: str | Path) -> Sequence[str]:
        process = f"/proc/{self._namespaces.pid}/ns"
        enter = ["nsenter", f"--mount={process}/mnt", f"--pid={process}/pid_for_children"]
        return [*enter, *map(str, command)]

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder / "home"),
            "LD_LIBRARY_PATH": str(self.folder / "xen-libraries"),
        }

    def _read_events(self) -> None:
        while True:
            try:
                self._partial += os.read(self._events, 1 << 16).decode()
            except BlockingIOError:
                return
            *lines, self._partial = self._partial.split("\n")
            self._seen += lines
            self._unread += lines


def _child(nsenter: subprocess.Popen[bytes]) -> int:
    (child,) = Path(f"/proc/{nsenter.pid}/task/{nsenter.pid}/children").read_text().split()
    return int(child)


def compile_c(library: Path, *sources: str) -> None:
    """Compile C files of this folder to a shared library."""
    library.write_bytes(_compiled(*sources))


@cache
def _compiled(*sources: str) -> bytes:
    command = ["gcc", "-std=gnu11", "-shared", "-fPIC", "-Wall", "-Werror", *(str(SOURCES / each) for each in sources)]
    with tempfile.NamedTemporaryFile() as made:
        subprocess.run([*command, "-o", made.name], check=True, timeout=HANG_SECONDS)
        return Path(made.name).read_bytes()
