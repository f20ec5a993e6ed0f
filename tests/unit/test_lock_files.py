# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nvdimm_driver.errors import InUseError
from nvdimm_driver.lifecycle.domain_locks import DomainLocks
from nvdimm_driver.lock_files import LockFile
from nvdimm_driver.state.reserve import Reserve

HOLD = """
import signal, sys
from pathlib import Path
from nvdimm_driver.lock_files import LockFile
lock = LockFile(Path(sys.argv[1]))
print("held", flush=True)
signal.pause()
"""


def test_the_second_is_told_who_has_the_lock_and_a_kill_releases_it(tmp_path: Path) -> None:
    file = tmp_path / "define-u"
    with subprocess.Popen([sys.executable, "-c", HOLD, file], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        locks = DomainLocks(tmp_path, Reserve(str(tmp_path / "reserve")))
        locks.seconds = 0.0
        with pytest.raises(InUseError, match=rf"domain u is being defined.* by process {process.pid} \(python"):
            locks.changing("u")
        with locks.starting("u"), locks.changing("other"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        locks.changing("u").close()


def test_a_lock_leaves_no_file_and_can_be_closed_twice(tmp_path: Path) -> None:
    lock = LockFile(tmp_path / "one")
    with pytest.raises(BlockingIOError):
        LockFile(tmp_path / "one")
    lock.close()
    with LockFile(tmp_path / "one"):
        lock.close()
        assert os.listdir(tmp_path) == ["one"]
        with pytest.raises(BlockingIOError):
            LockFile(tmp_path / "one")
    assert os.listdir(tmp_path) == []
