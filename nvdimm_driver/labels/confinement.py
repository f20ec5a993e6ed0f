# SPDX-License-Identifier: Apache-2.0
"""Confinement of a guest's label server and of its QEMU, which parse what the guest writes.

Each guest has a user of its own, as the device models of libxl's ``xen-qemuuser-range-base`` have. No account is
needed: the numbers are in a range that nobody gives out (systemd: docs/UIDS-GIDS.md).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress

from nvdimm_driver import apparmor
from nvdimm_driver.errors import ConfigError
from nvdimm_driver.labels import root_folder
from nvdimm_driver.processes import FIRST_UID

NAMESPACES = 0x00020000 | 0x08000000 | 0x40000000
"""CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWNET."""
MAX_PROCESSES = 64
"""RLIMIT_NPROC counts threads, too; a QEMU without a guest has fewer than ten."""
ISOLATION_HINT = (
    "it needs root, Linux 5.12, a root file system that is not the initramfs, and AppArmor profiles of this version "
    "of the driver; dsm 'aml' needs no label server"
)
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


def uid_of(domid: int) -> int:
    """Return the user of a domain's label server, which no other running domain has."""
    return FIRST_UID + domid


def isolate(programs: Sequence[str]) -> None:
    """Leave the host's network, IPC objects and files for good. Descriptors stay as they are.

    :param programs: paths of programs that are run later; they see themselves and their libraries.
    :raises ConfigError: when the kernel refuses: a label server that is not isolated must not run.
    """
    try:
        _check(ctypes.CDLL(None, use_errno=True).unshare(NAMESPACES), "unshare")
        root_folder.enter(programs)
    except OSError as error:
        raise ConfigError(
            f"a label server cannot be kept from the host's files and network: {error.strerror}",
            hint=ISOLATION_HINT,
        ) from error


def find_isolation_fault() -> ConfigError | None:
    """Return why no label server could be isolated on this host; None when one can. It is tried in a child process."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            isolate([])
        except ConfigError as error:
            os.write(theirs, error.message.encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return ConfigError(said, hint=ISOLATION_HINT) if said else None


def become(uid: int) -> None:
    """Become a user without capabilities and without a way to gain any, whose processes nobody but root can look into.

    The kernel clears the dumpable flag when a process changes its user. A program that the process then runs would have
    it again, unless the real and the effective group differ (fs/exec.c:begin_new_exec; kernel/cred.c:commit_creds).

    :raises OSError: when the kernel refuses.
    """
    apparmor.enter(apparmor.LABEL_SERVER)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_NPROC: MAX_PROCESSES}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    os.setgroups([])
    os.setresgid(uid, FIRST_UID, FIRST_UID)
    os.setresuid(uid, uid, uid)
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        _check(libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3), "prctl")


def end_processes(uid: int) -> None:
    """Kill all processes of a domain's user, such as a QEMU whose label server was killed.

    The kernel forgets a parent-death signal when a program with another effective group is run.

    :raises ValueError: when it is the user of no domain.
    """
    if uid <= FIRST_UID:
        raise ValueError(f"uid {uid} is of no domain")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setresuid(uid, uid, uid)
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # kill(2): all that this user may signal, except for the caller
    finally:
        os._exit(0)


def _check(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
