"""The plug-in ``qemu``: an NFIT that is QEMU's own.

A QEMU is started with the guest's NVDIMMs and no guest: its CPU never runs, its memory is never touched. What it
would hand to its firmware is read out and put together as the firmware would, and it is ended.
"""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from nvdimm_driver.acpi.linker import link, split
from nvdimm_driver.acpi.native import ssdt
from nvdimm_driver.acpi.qtest import Qtest, read_fw_cfg
from nvdimm_driver.acpi.verify import check_layout, check_space, check_tables
from nvdimm_driver.errors import AcpiError, ConfigError
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, AcpiTables, GuestLayout, Placement
from nvdimm_driver.plugins import AcpiBuilder

if TYPE_CHECKING:
    from oslo_config import cfg

LOG = logging.getLogger(__name__)

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
_SCRIPT = "etc/table-loader"


class QemuAcpiBuilder(AcpiBuilder):
    """Takes the NFIT from a QEMU, byte for byte; the SSDT is :func:`.native.ssdt`.

    :param binaries: names or paths of QEMUs (7.2 or later, i386 or x86_64), each tried until one gives the tables.
    :param timeout: seconds that each may take.
    :param user: who QEMU runs as when we are root.
    """

    def __init__(self, binaries: Sequence[str] = DEFAULT_BINARIES, timeout: float = 30.0, user: str = "nobody") -> None:
        self._binaries = tuple(binaries)
        self._timeout = timeout
        self._user = user

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        return cls(conf.acpi.qemu)

    def describe(self) -> str:
        return "NFIT taken from a stopped QEMU; needs one of " + ", ".join(self._binaries)

    def build(self, layout: GuestLayout) -> AcpiTables:
        """Return the NFIT and the SSDT, and as reference all other tables that QEMU has for such a machine.

        :raises LayoutError: when no tables can describe the layout.
        :raises ConfigError: when no QEMU is installed.
        :raises AcpiError: with each QEMU's reason, when none gave tables that say what the layout says.
        """
        check_layout(layout)
        failures: list[AcpiError] = []
        for binary in self._installed():
            started = time.monotonic()
            try:
                tables = self._build(binary, layout)
            except AcpiError as error:
                LOG.warning("%s", error)
                failures.append(error)
            else:
                LOG.debug("ACPI tables from %s in %.0f ms", binary, (time.monotonic() - started) * 1000)
                check_space(tables.tables)
                return tables
        raise AcpiError(
            "no ACPI tables from QEMU: " + "; ".join(failure.message for failure in failures),
            hint="if QEMU is at fault, install another (Debian: qemu-system-xen, qemu-system-x86), "
            "or take the ACPI builder 'native'",
        )

    def _installed(self) -> list[str]:
        found = [path for path in map(shutil.which, self._binaries) if path]
        if not found:
            raise ConfigError(
                f"no QEMU to take ACPI tables from; tried {', '.join(self._binaries)}",
                hint="install one (Debian: qemu-system-xen or qemu-system-x86), or take the ACPI builder 'native'",
            )
        return found

    def _build(self, binary: str, layout: GuestLayout) -> AcpiTables:
        try:
            files = self._harvest([binary, *_SANDBOX, *arguments(layout)])
        except AcpiError as error:
            if _NO_SANDBOX not in error.message:
                raise
            # Not built in, as in Debian's qemu-system-xen; that QEMU still has no privileges and cannot gain any.
            files = self._harvest([binary, *arguments(layout)])
        harvested = split(link(files.pop(_SCRIPT, b""), files))
        nfits = tuple(table for table in harvested if table[:4] == b"NFIT")
        tables = (*nfits, ssdt(layout))
        check_tables(layout, tables)
        return AcpiTables(tables, tuple(table for table in harvested if table not in nfits))

    def _harvest(self, command: Sequence[str]) -> dict[str, bytes]:
        with _qemu(self._confinement(), command, self._timeout) as qtest:
            return read_fw_cfg(qtest, "etc/acpi/") | read_fw_cfg(qtest, _SCRIPT)

    def _confinement(self) -> list[str]:
        """Return the setpriv command that goes in front: no privileges, no way to gain any, and death when we die."""
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ConfigError("setpriv, which starts QEMU without privileges, is missing", hint="install util-linux")
        confined = [setpriv, "--no-new-privs", "--pdeathsig", "KILL"]
        if os.geteuid() == 0:
            try:
                user = pwd.getpwnam(self._user)
            except KeyError as error:
                raise ConfigError(f"there is no user {self._user!r} for QEMU to run as") from error
            confined += ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
        return [*confined, "--"]


def arguments(layout: GuestLayout) -> list[str]:
    """Return QEMU's arguments for a machine with the layout's NVDIMMs, all but the firmware."""
    top = max(placement.end for placement in layout.nvdimms)
    # One NVxx device per slot in QEMU's SSDT; memory devices start at 4 GiB, as RAM is below.
    slots = max(placement.slot for placement in layout.nvdimms) + 1
    nodes = max(placement.node or 0 for placement in layout.nvdimms) + 1
    memory = f"size={_RAM // MIB}M,slots={slots},maxmem={_RAM + top - 4 * GIB}"
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-net", "none"),
        *_ACCELERATORS,
        *("-S", "-qtest", "stdio", "-qtest-log", "none"),
        *("-machine", _MACHINE + _PERSISTENCE.get(layout.persistence_domain, ""), "-cpu", _CPU, "-m", memory),
        *(_nodes(nodes) if nodes > 1 else ()),
        *(argument for placement in layout.nvdimms for argument in _nvdimm(placement)),
    ]


def _nodes(count: int) -> list[str]:
    """QEMU takes an NVDIMM's node only if it has that node; all RAM is in the first."""
    first = ["-object", f"memory-backend-ram,id=ram,size={_RAM}", "-numa", "node,nodeid=0,memdev=ram"]
    return [*first, *(argument for node in range(1, count) for argument in ("-numa", f"node,nodeid={node}"))]


def _nvdimm(placement: Placement) -> list[str]:
    # A memfd, as a backend of plain RAM would round sizes; nothing of it is ever allocated. QEMU shows the size
    # without the label, rounded down to a page (hw/mem/nvdimm.c:nvdimm_prepare_memory_region).
    size = -(-(placement.size + placement.label_size) // PAGE) * PAGE
    backend = f"memory-backend-memfd,id=m{placement.slot},size={size},share=on,reserve=off,prealloc=off,seal=off"
    device = f"nvdimm,id=nv{placement.slot},memdev=m{placement.slot},slot={placement.slot},addr={placement.base:#x}"
    if placement.node:
        device += f",node={placement.node}"
    if placement.label_size:
        device += f",label-size={placement.label_size}"
    return ["-object", backend, "-device", device]


@contextmanager
def _qemu(confinement: Sequence[str], command: Sequence[str], timeout: float) -> Iterator[Qtest]:
    """Run a QEMU for as long as the context lasts; it is gone afterwards, whatever happened.

    :raises AcpiError: with what QEMU wrote to stderr, when it cannot be started, or on any AcpiError inside.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as stderr, _firmware() as firmware:
        try:
            process = subprocess.Popen(
                [*confinement, *command, "-bios", f"/proc/self/fd/{firmware}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=stderr,
                pass_fds=(firmware,),
                cwd="/",
            )
        except OSError as error:
            raise AcpiError(f"{command[0]} cannot be started: {error}") from error
        theirs.close()
        try:
            yield Qtest(ours, time.monotonic() + timeout)
        except AcpiError as error:
            _end(process)
            stderr.seek(0)
            raise AcpiError(f"{command[0]}: {error.message}: {_complaint(stderr.read())}") from error
        finally:
            _end(process)


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
