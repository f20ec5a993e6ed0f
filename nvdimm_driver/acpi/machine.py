# SPDX-License-Identifier: Apache-2.0
"""A QEMU that has a guest's NVDIMMs and no guest: its CPU never runs, and the NVDIMMs' data is never touched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from nvdimm_driver.acpi.qtest import Qtest
from nvdimm_driver.errors import AcpiError, ConfigError
from nvdimm_driver.host_text import decode, printable
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, GuestLayout, Placement
from nvdimm_driver.processes import FIRST_UID
from nvdimm_driver.sizes import align_up

DEFAULT_BINARIES = (
    "/usr/libexec/xen-qemu-system-i386",  # Debian: qemu-system-xen, in every dom0
    "/usr/lib/xen/bin/qemu-system-i386",  # Xen's own build
    "qemu-system-x86_64",
    "qemu-system-i386",
)

# Since 7.1, QEMU refuses addresses that the CPU cannot reach, and CPUs of qemu-system-i386, Xen's device model, have at
# most 36 address bits. Machine types up to 8.1 skip the check for a 32-bit CPU (hw/i386/pc.c:pc_max_used_gpa,
# broken_32bit_mem_addr_check). The CPU's vendor is not AMD: for AMD CPUs, QEMU moves memory away from the
# HyperTransport range. The CPU does not show in the tables.
_MACHINE = "pc-i440fx-7.2,nvdimm=on,usb=off,dump-guest-core=off"
_PERSISTENCE = {"memory_controller": ",nvdimm-persistence=mem-ctrl", "cpu_cache": ",nvdimm-persistence=cpu"}
_CPU = "pentium"

# Debian's qemu-system-xen has qtest but no TCG, its qemu-system-x86 TCG but no qtest. QEMU uses the first that it has.
_ACCELERATORS = ("-accel", "qtest", "-accel", "tcg,thread=single,tb-size=1")
_NO_QTEST = "invalid accelerator qtest"

_SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
_NO_SANDBOX = "-sandbox support is not enabled"

_RAM = 32 * MIB
_FIRMWARE_SIZE = 64 * KIB
_MAX_COMPLAINT = 4 * KIB
"""Bytes of its stderr that are read: a QEMU that serves a guest's requests may write anything there."""


def installed(binaries: Sequence[str]) -> list[str]:
    """Return the paths of the QEMUs that are installed.

    :raises ConfigError: when none is.
    """
    found = [path for path in map(shutil.which, binaries) if path]
    if not found:
        raise ConfigError(
            f"no QEMU is installed; tried {', '.join(binaries)}",
            hint="install one (Debian: qemu-system-xen or qemu-system-x86), or use the ACPI builder 'native'",
        )
    return found


@dataclass(frozen=True)
class Machine:
    """Settings for running a QEMU.

    :ivar binary: its path.
    :ivar confined: this process has no privileges any more, and QEMU gets what it has. It is run directly: the kernel
        then makes it not dumpable (:func:`.confinement.become`).
    :ivar timeout: seconds for its start and all commands; :meth:`.Qtest.give_time` restarts the count.
    """

    binary: str
    confined: bool = False
    timeout: float = 30.0

    @contextmanager
    def run(self, layout: GuestLayout, memory: Mapping[int, int] | None = None) -> Iterator[Qtest]:
        """Run a QEMU with the layout's NVDIMMs until the context ends, normally or by an exception.

        :param memory: as for :func:`arguments`.
        :raises AcpiError: with QEMU's stderr, when it cannot be started and for any AcpiError inside the context.
        :raises ConfigError: when it cannot be run without privileges.
        """
        words = arguments(layout, memory)
        descriptors = tuple((memory or {}).values())
        with ExitStack() as stack:
            try:
                qtest = stack.enter_context(self._started([self.binary, *_SANDBOX, *words], descriptors))
            except AcpiError as error:
                if _NO_SANDBOX not in error.message:
                    raise
                # Debian's qemu-system-xen is built without -sandbox. QEMU still has no privileges and cannot gain any.
                qtest = stack.enter_context(self._started([self.binary, *words], descriptors))
            yield qtest

    @contextmanager
    def _started(self, command: Sequence[str], descriptors: Sequence[int]) -> Iterator[Qtest]:
        ours, theirs = socket.socketpair()
        with ours, theirs, _anonymous_file("stderr") as stderr, _anonymous_file("firmware", _FIRMWARE_SIZE) as firmware:
            try:
                process = subprocess.Popen(
                    [*self._confinement(), *command, "-bios", f"/proc/self/fd/{firmware.fileno()}"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=stderr,
                    pass_fds=(firmware.fileno(), *descriptors),
                    cwd="/",
                )
            except OSError as error:
                raise AcpiError(f"{self.binary} cannot be started: {error}") from error
            theirs.close()
            try:
                qtest = Qtest(ours, self.timeout)
                qtest.command("endianness")  # any answer means that QEMU has started
                yield qtest
            except AcpiError as error:
                _end(process)
                stderr.seek(0)
                raise AcpiError(f"{self.binary}: {error.message}: {_complaint(stderr.read(_MAX_COMPLAINT))}") from error
            finally:
                _end(process)

    def _confinement(self) -> list[str]:
        """Return the setpriv prefix: no privileges, no way to gain any, and SIGKILL when the driver's process dies."""
        if self.confined:
            return []
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ConfigError("setpriv, which starts QEMU without privileges, is missing", hint="install util-linux")
        confined = [setpriv, "--no-new-privs", "--pdeathsig", "KILL"]
        if os.geteuid() == 0:
            confined += ["--reuid", str(FIRST_UID), "--regid", str(FIRST_UID), "--clear-groups"]
        return [*confined, "--"]


def arguments(layout: GuestLayout, memory: Mapping[int, int] | None = None) -> list[str]:
    """Return QEMU's arguments for a machine with the layout's NVDIMMs, except for the firmware.

    :param memory: by slot, descriptors of files with the bytes of NVDIMMs, :func:`backend_size` long. An NVDIMM
        without one gets memory that is never allocated.
    """
    shared = memory or {}
    top = max(placement.end for placement in layout.nvdimms)
    # QEMU's SSDT has one NVxx device per slot. Memory devices start at 4 GiB because all RAM is below.
    slots = max(placement.slot for placement in layout.nvdimms) + 1
    nodes = max(placement.node or 0 for placement in layout.nvdimms) + 1
    sizes = f"size={_RAM // MIB}M,slots={slots},maxmem={_RAM + top - 4 * GIB}"
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-net", "none"),
        *_ACCELERATORS,
        *("-S", "-qtest", "stdio", "-qtest-log", "none"),
        *("-machine", _MACHINE + _PERSISTENCE.get(layout.persistence_domain, ""), "-cpu", _CPU, "-m", sizes),
        *(_nodes(nodes) if nodes > 1 else ()),
        *(argument for placement in layout.nvdimms for argument in _nvdimm(placement, shared.get(placement.slot))),
    ]


def _nodes(count: int) -> list[str]:
    """Return arguments for NUMA nodes: QEMU accepts an NVDIMM's node only if it exists. All RAM is in the first."""
    first = ["-object", f"memory-backend-ram,id=ram,size={_RAM}", "-numa", "node,nodeid=0,memdev=ram"]
    return [*first, *(argument for node in range(1, count) for argument in ("-numa", f"node,nodeid={node}"))]


def backend_size(placement: Placement) -> int:
    """Return the size in bytes of an NVDIMM's backend in QEMU, which ends with the label area.

    QEMU shows the size without the label area, rounded down to a page (hw/mem/nvdimm.c:nvdimm_prepare_memory_region).
    """
    return align_up(placement.size + placement.label_size, PAGE)


def _nvdimm(placement: Placement, descriptor: int | None) -> list[str]:
    size = f"id=m{placement.slot},size={backend_size(placement)},share=on,reserve=off,prealloc=off"
    # A memfd, because a backend of plain RAM would round sizes. None of it is ever allocated.
    backend = f"memory-backend-memfd,{size},seal=off"
    if descriptor is not None:
        backend = f"memory-backend-file,{size},mem-path=/proc/self/fd/{descriptor}"
    device = f"nvdimm,id=nv{placement.slot},memdev=m{placement.slot},slot={placement.slot},addr={placement.base:#x}"
    if placement.node:
        device += f",node={placement.node}"
    if placement.label_size:
        device += f",label-size={placement.label_size}"
    return ["-object", backend, "-device", device]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _anonymous_file(name: str, size: int = 0) -> BinaryIO:
    """Return a file of zeros in memory.

    The firmware is one: it never runs, and a real one would need a package.
    """
    file = os.fdopen(os.memfd_create(name), "w+b", buffering=0)
    file.write(bytes(size))
    return file


def _complaint(stderr: bytes) -> str:
    lines = printable(decode(stderr)).splitlines()
    return " / ".join(line for line in lines if line and _NO_QTEST not in line) or "it wrote nothing to stderr"
