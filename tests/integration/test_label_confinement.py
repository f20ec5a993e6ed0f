# SPDX-License-Identifier: Apache-2.0
"""Who else can reach a guest's label server and its QEMU: nobody but root, as each way is tried by a real process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.labels.confinement import end_processes, uid_of
from nvdimm_driver.processes import FIRST_UID
from tests.integration.test_dsm_qemu import PLAIN_QEMU, XEN_QEMU

DOMID, OTHER = 32001, 32002
NOBODY = 65534
SERVER = """
import os, signal, sys
from nvdimm_driver.labels.confinement import become, isolate, uid_of
from nvdimm_driver.labels.qemu import QemuLabels
from tests.integration.test_dsm_qemu import AREAS, LAYOUT
from tests.unit.doubles import MemoryBytes

areas = {slot: MemoryBytes(bytes(size)) for slot, size in AREAS.items()}
labels = QemuLabels(LAYOUT, areas, [sys.argv[1]], confined=True)
isolate(labels.programs)
become(uid_of(int(sys.argv[2])))
labels.start()
try:
    open("/tmp/written", "w")
except OSError as error:
    refused = error.errno
pid = open(f"/proc/self/task/{os.getpid()}/children").read().split()[-1]
print(pid, refused, flush=True)
signal.pause()
"""
# what a process of some user tries with another: status 0 when it could
ATTEMPTS = {
    "list its descriptors": "os.listdir(f'/proc/{pid}/fd')",
    "open its first descriptor": "os.open(f'/proc/{pid}/fd/0', os.O_RDWR)",
    "read its memory": "os.open(f'/proc/{pid}/mem', os.O_RDONLY)",
    "write its memory": "os.open(f'/proc/{pid}/mem', os.O_RDWR)",
    "see its memory map": "open(f'/proc/{pid}/maps').read(1)",
    "trace it": "ctypes.CDLL(None).ptrace(16, pid, None, None) and os._exit(1)",
    "take its descriptor": "ctypes.CDLL(None).syscall(438, os.pidfd_open(pid), 0, 0) < 0 and os._exit(1)",
}
ATTEMPT = "import ctypes, os, sys; pid = int(sys.argv[1]); os.setgroups([]); os.setresgid(*[int(sys.argv[3])] * 3); "
ATTEMPT += "os.setresuid(*[int(sys.argv[2])] * 3); "


class Served:
    """A confined server, as a process, and its QEMU."""

    def __init__(self, qemu: str, domid: int = DOMID) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", SERVER, qemu, str(domid)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self.process.stdout
        words = self.process.stdout.readline().split()
        assert len(words) == 2, "it has not started"
        self.server, (self.qemu, self.write_error) = self.process.pid, map(int, words)

    def status(self, pid: int) -> dict[str, str]:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        end_processes(uid_of(DOMID))


@pytest.fixture(scope="module", params=[XEN_QEMU, PLAIN_QEMU], ids=["xen", "plain"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    found = Served(request.param)
    yield found
    found.close()


def could(attempt: str, pid: int, uid: int, gid: int) -> bool:
    command = [sys.executable, "-I", "-c", ATTEMPT + attempt, str(pid), str(uid), str(gid)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_no_other_user_and_not_even_the_same_one_looks_into_it(served: Served, attempt: str) -> None:
    own = uid_of(DOMID)
    users = [(NOBODY, NOBODY), (own, own), (own, FIRST_UID), (uid_of(OTHER), FIRST_UID), (FIRST_UID, FIRST_UID)]
    ordinary = ["setpriv", "--reuid", str(own), "--regid", str(own), "--clear-groups", "sleep", "infinity"]
    with subprocess.Popen(ordinary) as plain:
        while b"sleep" not in Path(f"/proc/{plain.pid}/cmdline").read_bytes().split(b"\0")[:1]:
            time.sleep(0.01)
        assert could(attempt, plain.pid, own, own), "it is possible with an ordinary process"
        plain.kill()
    for pid in (served.server, served.qemu):
        for uid, gid in users:
            assert not could(attempt, pid, uid, gid), f"user {uid}, group {gid}"


def test_another_guests_processes_cannot_signal_it(served: Served) -> None:
    for pid in (served.server, served.qemu):
        for uid in (NOBODY, uid_of(OTHER), FIRST_UID):
            assert not could("os.kill(pid, 0)", pid, uid, uid)


def test_it_has_no_privileges_no_network_and_writes_no_file(served: Served) -> None:
    assert served.write_error in (errno.ENOENT, errno.EROFS), "there is no such folder, or the project is in it"
    for pid in (served.server, served.qemu):
        status = served.status(pid)
        assert set(status["Uid"].split()) == {str(uid_of(DOMID))}
        assert set(status["Gid"].split()) <= {str(uid_of(DOMID)), str(FIRST_UID)}
        assert status["Groups"] == ""
        assert status["NoNewPrivs"] == "1"
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max core file size        0                    0" in limits
        devices = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]
        for name in ("net", "ipc", "mnt"):
            assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")


def test_qemu_has_seccomp_where_it_is_built_in(served: Served) -> None:
    """Debian's qemu-system-xen is not."""
    built_in = os.readlink(f"/proc/{served.qemu}/exe") == os.path.realpath(PLAIN_QEMU)
    assert served.status(served.qemu)["Seccomp"] == ("2" if built_in else "0")


def test_file_systems_of_the_host_are_not_kept(tmp_path: Path) -> None:
    """Another guest's file system could not be unmounted, and made anew, otherwise."""
    outer, folder = tmp_path / "outer", tmp_path / "outer" / "mounted"
    for each in (outer, folder):
        each.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", each], check=True)
        subprocess.run(["mount", "--make-shared", each], check=True)  # as systemd does with all
    server = Served(XEN_QEMU)
    try:
        for pid in (server.server, server.qemu):
            assert str(tmp_path) not in Path(f"/proc/{pid}/mountinfo").read_text()
    finally:
        server.close()
        subprocess.run(["umount", "--recursive", outer], check=True)


def test_the_qemu_of_a_server_that_was_killed_is_ended_and_no_other() -> None:
    first, second = Served(XEN_QEMU), Served(XEN_QEMU, OTHER)
    try:
        first.process.kill()
        first.process.wait()
        end_processes(uid_of(DOMID))
        while Path(f"/proc/{first.qemu}/stat").exists() and "Z" not in first.status(first.qemu)["State"]:
            time.sleep(0.01)
        assert second.process.poll() is None
        assert second.status(second.qemu)["State"][0] != "Z"
    finally:
        first.close()
        second.process.kill()
        second.process.communicate()
        end_processes(uid_of(OTHER))


@pytest.mark.parametrize("domid", [0, -1, -FIRST_UID])
def test_processes_of_no_domain_are_never_ended(domid: int) -> None:
    with pytest.raises(ValueError, match="is of no domain"):
        end_processes(uid_of(domid))
