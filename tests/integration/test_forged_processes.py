# SPDX-License-Identifier: Apache-2.0
"""A user without privileges makes processes that look like a domain's label server: they count as none.

He needs namespaces of his own, which Debian allows. In his mount namespace, any file of his has the path of the lock.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvdimm_driver.labels.servers import MODULE, LabelServers
from tests.unit.doubles import UUID

NOBODY = 65534
PROJECT = Path(__file__).parents[2]
SERVER = """
import ctypes, os, sys, time
path, top = sys.argv[1], sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
if top:
    user, group = os.getuid(), os.getgid()
    assert libc.unshare(0x20000 | (0x10000000 if user else 0)) == 0, "unshare"
    if user:
        open("/proc/self/setgroups", "w").write("deny")
        open("/proc/self/uid_map", "w").write(f"0 {user} 1")
        open("/proc/self/gid_map", "w").write(f"0 {group} 1")
    assert libc.mount(None, b"/", None, 0x44000, None) == 0, "private"
    assert libc.mount(b"x", top.encode(), b"tmpfs", 0, None) == 0, os.strerror(ctypes.get_errno())
    os.makedirs(os.path.dirname(path))
fd = os.open(path, os.O_RDWR | os.O_CREAT)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """Return the lock file of a domain's label server; the state folder is the one above ``domains``."""
    lock = tmp_path / "state/domains" / UUID / "label-server"
    lock.parent.mkdir(parents=True)
    (tmp_path / "state").chmod(0o700)
    lock.touch(0o600)
    return lock.resolve()


@contextmanager
def running(*words: str, user: int = NOBODY) -> Iterator[subprocess.Popen[str]]:
    """Run a program of a user that says when it is ready."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, text=True, cwd="/", user=user, group=user, extra_groups=[]) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def server(lock: Path, *, forged: bool) -> tuple[str, ...]:
    top = "/" + lock.parts[1] if forged else ""
    return ("/usr/bin/python3", "-I", "-S", "-c", SERVER, str(lock), top, MODULE)


def test_a_users_process_is_no_label_server(lock: Path) -> None:
    servers = LabelServers(lock.parents[2])
    with running(*server(lock, forged=True)), running(*server(lock, forged=False), user=0) as own:
        assert servers.find(UUID) == [own.pid]
        assert not servers.is_older_than(UUID, 0)
        servers.kill(UUID)
        assert own.wait() < 0
        assert servers.find(UUID) == []


def test_who_opens_another_file_of_that_name_is_no_label_server(lock: Path) -> None:
    """Also if he is root: his file system may be one that never answers."""
    with running(*server(lock, forged=True), user=0):
        assert LabelServers(lock.parents[2]).find(UUID) == []


def test_a_users_processes_do_not_hold_up_the_end_of_a_guest(lock: Path) -> None:
    """Nor are they killed; the time of all that are waited for is one."""
    servers = LabelServers(lock.parents[2])
    with running(*server(lock, forged=True)) as one, running(*server(lock, forged=True)) as other:
        servers.end(UUID, [one.pid, other.pid])
        assert (one.poll(), other.poll()) == (None, None)


INNOCENT = """
import subprocess, sys, threading, time
from pathlib import Path
from nvdimm_driver.labels.servers import LabelServers
from tests.integration.test_forged_processes import server
from tests.unit.doubles import UUID
lock = Path(sys.argv[1])
def start():
    process = subprocess.Popen(server(lock, forged=False), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\\n"
    return process
first, second = start(), start()
servers, innocent = LabelServers(lock.parents[2]), []
pids = sorted(servers.find(UUID))
assert pids == [first.pid, second.pid]
def reuse():
    time.sleep(0.5)
    second.kill(), second.wait()
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(second.pid - 1))
    innocent.append(subprocess.Popen(["sleep", "1000"]))
thread = threading.Thread(target=reuse)
thread.start()
servers.end(UUID, pids)
thread.join()
assert innocent[0].pid == second.pid
print("dead" if innocent[0].poll() is not None else "alive")
for each in (first, *innocent):
    each.kill(), each.wait()
"""


def test_a_process_that_has_the_number_by_now_is_not_killed(lock: Path) -> None:
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", INNOCENT, str(lock)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert done.stdout.strip() == "alive", done.stdout + done.stderr
