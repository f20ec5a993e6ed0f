# SPDX-License-Identifier: Apache-2.0
"""Supervision and locking of label servers. Tests with a guest are in the lab."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvdimm_driver.cmd.label_server import SERVING, _take_lock, supervise
from nvdimm_driver.errors import AcpiError, XenError
from nvdimm_driver.labels.servers import MODULE, LabelServers
from tests.unit.doubles import OTHER_UUID, UUID
from tests.waiting import HANG_SECONDS


def supervised(serve: Callable[[bool, Callable[[], None]], None], happened: list[str] | None = None) -> bytes:
    """Supervise a server; return the report of the first child."""
    ours, theirs = os.pipe()
    events = [] if happened is None else happened
    supervise(
        serve, theirs, lambda kind, detail: events.append(f"{kind} {detail.get('answers', detail.get('status'))}")
    )
    os.close(theirs)
    with open(ours, "rb") as pipe:
        return pipe.read()


def test_one_that_dies_is_followed_by_another_and_then_by_one_that_refuses(tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def serve(refuse: bool, ready: Callable[[], None]) -> None:
        with runs.open("a") as file:
            file.write(f"{refuse}\n")
        ready()
        if not refuse:
            os.kill(os.getpid(), signal.SIGKILL)

    happened: list[str] = []
    assert supervised(serve, happened) == SERVING
    assert happened == ["label-server-started yes", "label-server-gone -9"] * 3 + ["label-server-started no"]
    assert runs.read_text().split() == ["False", "False", "False", "True"]


def test_when_the_first_one_cannot_start_there_is_no_second(tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def serve(refuse: bool, ready: Callable[[], None]) -> None:
        with runs.open("a") as file:
            file.write("run\n")
        raise AcpiError("no QEMU", hint="install one")

    happened: list[str] = []
    assert supervised(serve, happened) == b"no QEMU (install one)"
    assert happened == []
    assert runs.read_text() == "run\n"


def test_one_that_has_no_domain_any_more_is_the_last() -> None:
    assert supervised(lambda refuse, ready: ready()) == SERVING


def test_the_one_of_the_last_start_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "domains" / UUID).mkdir(parents=True)
    servers = LabelServers(tmp_path)
    last = servers.lock(UUID)
    assert last is not None
    ending = threading.Timer(0.3, os.close, [last])
    ending.start()
    _take_lock(servers, UUID)
    assert ending.finished.is_set()
    assert servers.is_running(UUID)


def test_who_has_the_lock_is_running(tmp_path: Path) -> None:
    servers = LabelServers(tmp_path)
    assert not servers.is_running(UUID)
    (tmp_path / "domains" / UUID).mkdir(parents=True)
    assert not servers.is_running(UUID)
    lock = servers.lock(UUID)
    assert lock is not None
    assert servers.is_running(UUID)
    assert servers.lock(UUID) is None
    os.close(lock)
    assert not servers.is_running(UUID)


def test_one_that_cannot_start_says_why() -> None:
    """There is neither such a domain nor a Xen."""
    with pytest.raises(XenError, match=rf"no label server for domid 7: .*domains/{UUID}/label-server"):
        LabelServers("/nonexistent").start(7, UUID)


def test_requests_are_counted_on_from_where_an_earlier_server_was(tmp_path: Path) -> None:
    (tmp_path / "domains" / UUID).mkdir(parents=True)
    servers = LabelServers(tmp_path)
    assert servers.requests(UUID) is None
    counter = servers.count_requests(UUID)
    assert servers.requests(UUID) == (0, 0)
    counter.add(failed=False)
    counter.add(failed=False)
    counter.add(failed=True)
    assert servers.requests(UUID) == (2, 1)
    servers.count_requests(UUID).add(failed=False)
    assert servers.requests(UUID) == (3, 1)


def test_one_that_is_older_than_the_installed_code_is_killed(tmp_path: Path) -> None:
    """Told from others by its lock file and its command; what only looks whether it runs is not killed."""
    servers = LabelServers(tmp_path)
    (tmp_path / "domains" / UUID).mkdir(parents=True)
    lock = tmp_path / "domains" / UUID / "label-server"
    hold = f"import fcntl, signal, sys; file = open({str(lock)!r}, 'w'); "
    hold += "sys.argv[1:] and fcntl.flock(file, fcntl.LOCK_EX); print('open', flush=True); signal.pause()"
    began = time.time()
    commands = [[sys.executable, "-c", hold, *arguments] for arguments in ([MODULE, "7", UUID], [])]
    server, other = (subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands)
    try:
        for process in (server, other):
            assert process.stdout
            assert process.stdout.readline() == b"open\n"
        assert not servers.is_older_than(UUID, began - 3600)
        assert not servers.is_older_than(OTHER_UUID, time.time() + 3600)
        assert servers.is_older_than(UUID, time.time() + 3600)
        servers.kill(OTHER_UUID)
        assert (server.poll(), other.poll()) == (None, None)
        assert servers.is_running(UUID)
        servers.kill(UUID)
        assert not servers.is_running(UUID), "the next one can start at once"
        assert server.wait(HANG_SECONDS) == -signal.SIGKILL
        assert other.poll() is None
        assert not servers.is_older_than(UUID, time.time() + 3600)
    finally:
        for process in (server, other):
            process.kill()
            process.communicate()
