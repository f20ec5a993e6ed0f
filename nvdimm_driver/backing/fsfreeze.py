# SPDX-License-Identifier: Apache-2.0
"""Find out if a file system takes changes, or is frozen (fsfreeze(8)): a process that changes it waits unkillably.

Nothing tells that a file system is frozen but a change that waits (fs/namespace.c:mnt_want_write). So another process
makes one, and waits in place of this one, which can tell its user and end.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

LOG = logging.getLogger(__name__)

_PROGRAM = """import os, sys
os.write(1, b"1")
try:
    os.removexattr(int(sys.argv[1]), "nvdimm_driver.none")
except OSError:
    pass
"""
"""Removes an attribute with a name that no file system has: that waits as every change, and changes nothing."""


def find_waiting(fd: int, lock: int, seconds: float) -> int | None:
    """Return None if the file system of an open file takes changes, or the process that waits until it does.

    :param lock: a descriptor that this process has open, too, until then.
    :param seconds: how long the change may take, once it is begun.
    """
    words = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(fd)]
    null = subprocess.DEVNULL
    try:
        process = subprocess.Popen(words, pass_fds=(fd, lock), stdin=null, stdout=subprocess.PIPE, stderr=null)
    except OSError as error:
        LOG.warning("whether a file system is frozen (fsfreeze) cannot be found out: %s", error)
        return None
    assert process.stdout
    with process.stdout as begun:
        os.read(begun.fileno(), 1)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return process.pid
    return None
