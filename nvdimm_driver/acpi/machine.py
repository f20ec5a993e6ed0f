"""A QEMU that has a guest's NVDIMMs and no guest: its CPU never runs, its memory is never touched."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from nvdimm_driver.acpi.qtest import Qtest
from nvdimm_driver.errors import AcpiError, ConfigError
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, GuestLayout, Placement
from nvdimm_driver.sizes import align_up

DEFAULT_BINARIES = (
    "/usr/libexec/xen-qemu-system-i386",  # Debian: qemu-system-xen, in every dom0
    "/usr/lib/xen/bin/qemu-system-i386",  # Xen's own build
    "qemu-system-x86_64",
    "qemu-system-i386",
)

# Since 7.1 QEMU refuses addresses that the CPU cannot reach, and CPUs of qemu-system-i386, Xen's device model, have
# 36 address bits at most. With a 32-bit CPU that check asks nothing, in machines up to 8.1
# (hw/i386/pc.c:pc_max_used_gpa, broken_32bit_mem_addr_check). The CPU's vendor is not AMD, for whose CPUs QEMU
# moves memory out of the way of the HyperTransport range. It does not show in the tables.
_MACHINE = "pc-i440fx-7.2,nvdimm=on,usb=off,dump-guest-core=off"
_PERSISTENCE = {"memory_controller": ",nvdimm-persistence=mem-ctrl", "cpu_cache": ",nvdimm-persistence=cpu"}
_CPU = "pentium"

# Debian's qemu-system-xen has qtest and no TCG, its qemu-system-x86 TCG and no qtest. QEMU takes the first it has.
_ACCELERATORS = ("-accel", "qtest", "-accel", "tcg,thread=single,tb-size=1")
_NO_QTEST = "invalid accelerator qtest"

_SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
_NO_SANDBOX = "-sandbox support is not enabled"

_RAM = 32 * MIB
_FIRMWARE_SIZE = 64 * KIB


def installed(binaries: Sequence[str]) -> list[str]:
    """Return the paths of those QEMUs that there are.

    :raises ConfigError: when there are none.
    """
    found = [path for path in map(shutil.which, binaries) if path]
    if not found:
        raise ConfigError(
            f"no QEMU to take ACPI tables from; tried {', '.join(binaries)}",
            hint="install one (Debian: qemu-system-xen or qemu-system-x86), or take the ACPI builder 'native'",
        )
    return found


@dataclass(frozen=True)
class Machine:
    """How a QEMU is run.

    :ivar binary: its path.
    :ivar user: who it runs as when we are root.
    :ivar timeout: seconds that it may take to start and, after that, for what is asked of it.
    """

    binary: str
    user: str = "nobody"
    timeout: float = 30.0

    @contextmanager
    def run(self, layout: GuestLayout, memory: Mapping[int, int] | None = None) -> Iterator[Qtest]:
        """A QEMU with the layout's NVDIMMs, for as long as the context lasts; it is gone afterwards, whatever happened.

        :param memory: as for :func:`arguments`.
        :raises AcpiError: with what QEMU wrote to stderr, when it cannot be started, or on any AcpiError inside.
        :raises ConfigError: when it cannot be confined.
        """
        words = arguments(layout, memory)
        descriptors = tuple((memory or {}).values())
        with ExitStack() as stack:
            try:
                qtest = stack.enter_context(self._started([self.binary, *_SANDBOX, *words], descriptors))
            except AcpiError as error:
                if _NO_SANDBOX not in error.message:
                    raise
                # Not built in, as in Debian's qemu-system-xen; that QEMU still has no privileges and cannot gain any.
                qtest = stack.enter_context(self._started([self.binary, *words], descriptors))
            yield qtest

    @contextmanager
    def _started(self, command: Sequence[str], descriptors: Sequence[int]) -> Iterator[Qtest]:
        ours, theirs = socket.socketpair()
        with ours, theirs, tempfile.TemporaryFile() as stderr, _firmware() as firmware:
            try:
                process = subprocess.Popen(
                    [*self._confinement(), *command, "-bios", f"/proc/self/fd/{firmware}"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=stderr,
                    pass_fds=(firmware, *descriptors),
                    cwd="/",
                )
            except OSError as error:
                raise AcpiError(f"{self.binary} cannot be started: {error}") from error
            theirs.close()
            try:
                qtest = Qtest(ours, self.timeout)
                qtest.command("endianness")  # an answer: it has started
                yield qtest
            except AcpiError as error:
                _end(process)
                stderr.seek(0)
                raise AcpiError(f"{self.binary}: {error.message}: {_complaint(stderr.read())}") from error
            finally:
                _end(process)

    def _confinement(self) -> list[str]:
        """Return the setpriv command that goes in front: no privileges, no way to gain any, and death when we die."""
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ConfigError("setpriv, which starts QEMU without privileges, is missing", hint="install util-linux")
        confined = [setpriv, "--no-new-privs", "--pdeathsig", "KILL"]
        if os.geteuid() == 0:
            try:
                user = pwd.getpwnam(self.user)
            except KeyError as error:
                raise ConfigError(f"there is no user {self.user!r} for QEMU to run as") from error
            confined += ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
        return [*confined, "--"]


def arguments(layout: GuestLayout, memory: Mapping[int, int] | None = None) -> list[str]:
    """Return QEMU's arguments for a machine with the layout's NVDIMMs, all but the firmware.

    :param memory: by slot, descriptors of files with the bytes of NVDIMMs, as long as :func:`backend_size`; those of
        others are nowhere.
    """
    shared = memory or {}
    top = max(placement.end for placement in layout.nvdimms)
    # One NVxx device per slot in QEMU's SSDT; memory devices start at 4 GiB, as RAM is below.
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
    """QEMU takes an NVDIMM's node only if it has that node; all RAM is in the first."""
    first = ["-object", f"memory-backend-ram,id=ram,size={_RAM}", "-numa", "node,nodeid=0,memdev=ram"]
    return [*first, *(argument for node in range(1, count) for argument in ("-numa", f"node,nodeid={node}"))]


def backend_size(placement: Placement) -> int:
    """Bytes of what is behind an NVDIMM in QEMU, whose label area is the last ones of it.

    QEMU shows the size without the label, rounded down to a page (hw/mem/nvdimm.c:nvdimm_prepare_memory_region).
    """
    return align_up(placement.size + placement.label_size, PAGE)


def _nvdimm(placement: Placement, descriptor: int | None) -> list[str]:
    size = f"id=m{placement.slot},size={backend_size(placement)},share=on,reserve=off,prealloc=off"
    # A memfd, as a backend of plain RAM would round sizes; nothing of it is ever allocated.
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


@contextmanager
def _firmware() -> Iterator[int]:
    """A firmware that never runs, as a file without a name: an open descriptor. It spares us a package."""
    descriptor = os.memfd_create("firmware")
    try:
        os.write(descriptor, bytes(_FIRMWARE_SIZE))
        yield descriptor
    finally:
        os.close(descriptor)


def _complaint(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").splitlines()
    return " / ".join(line for line in lines if line and _NO_QTEST not in line) or "it wrote nothing to stderr"
