# SPDX-License-Identifier: Apache-2.0
"""A host with the driver installed, without Xen and persistent memory, for tests under the real libvirtd.

All of the driver is real, from the scripts that ``nvdimmctl register`` writes to the calls of libxenctrl, except for
the DAX of a loop device (bench_backing.py). Stand-ins replace libxenlight, the hypervisor and xenstore (libvirtd.py),
QEMU, and the pmem namespace (a tree of files). doc/without_xen.rst lists the assumptions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from nvdimm_driver.model import MIB, Record
from nvdimm_driver.state.ledger import Ledger
from tests.integration.libvirtd import Libvirtd
from tests.unit.fake_sysfs import FakeSysfs

ROOT = Path(__file__).parents[2]
UUID = "7c7b0e2e-4a6e-4f0e-9a3b-0000000000{:02x}"
SPA = 0x1_4020_0000
"""In the range that xen_stand_in.c reports as persistent memory in the machine's e820 map."""
SIZE = 64 * MIB

NVDIMMCTL = "import sys; from nvdimm_driver.cmd.nvdimmctl import main; sys.exit(main())"
QEMU = """#!/bin/sh
# QEMU as libxl sees it: reports that it runs, and ends when it is told to.
[ "$1" = -xen-domid ] || { echo "device-model $*" 1<>/run/xen-stand-in/events; exit 0; }
[ ! -e /run/qemu-fails ] || exit 1
echo running >/run/xen-stand-in/device-model-$2
exec sleep infinity
"""
CONF = """
[DEFAULT]
allow_any_path=true
state_dir = {folder}/state
log_file = {folder}/nvdimm-driver.log
[xen]
device_model = {folder}/nvdimm-device-model
qemu = {folder}/qemu
[acpi]
builder = native
[rpc]
group = root
[libvirt]
hooks_dir = /etc/libvirt/hooks
apparmor_dir = {folder}/apparmor.d
"""
DOMAIN = """<domain type='xen'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='xenfv'>hvm</type>
    <loader type='rom'>/usr/lib/xen-4.17/boot/hvmloader</loader>
    <boot dev='hd'/>
  </os>
  <features>
    <acpi/>
  </features>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>restart</on_crash>
  <devices>
    <memory model='nvdimm'>
      <source>
        <path>{folder}/pmem/{name}.img</path>
      </source>
      <target>
        <size unit='MiB'>4</size>
      </target>
    </memory>
  </devices>
</domain>
"""


class Host:
    """A host with the driver installed.

    :param folder: an empty folder.
    :param options: additional configuration of the driver.
    :param wheels: packages to install beside the driver.
    :param conf: its other configuration.
    :param size: bytes of persistent memory; xen_stand_in.c has 1 GiB, from 2 MiB below SPA on.
    :ivar libvirtd: the running libvirtd, in whose namespaces all commands of the test run.
    """

    def __init__(
        self, folder: Path, options: str = "", wheels: Sequence[Path] = (), conf: str = CONF, size: int = SIZE
    ) -> None:
        self.folder = folder
        self._conf = conf
        self.size = size
        self._options = options
        self._wheels = wheels
        for name in ("libvirtd", "pmem", "sys"):
            (folder / name).mkdir()
        self._make_pmem()
        self.libvirtd = Libvirtd(
            folder / "libvirtd",
            setup=f"mount -o loop {folder}/image {folder}/pmem\n"
            f"mount --bind {folder}/boot_id /proc/sys/kernel/random/boot_id\n"
            f"mount --bind {folder}/sys /sys",
        )
        try:
            self._show_pmem()
            self._install()
            self.libvirtd.start()
            self.start_nvdimmd()
        except BaseException:
            self.libvirtd.close()
            raise

    def nvdimmctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run nvdimmctl on the host."""
        return self.libvirtd.run(self.folder / "python/bin/python", "-I", "-c", NVDIMMCTL, *words)

    def define(self, name: str, number: int) -> None:
        """Define a domain as an operator does."""
        self.check("define", self.xml(name, number))

    def virsh(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run virsh as an operator does: on the host, and so through nvdimmd when it runs."""
        return self.libvirtd.run("virsh", "-q", "-c", "xen:///system", *words)

    def check(self, *words: str | Path) -> str:
        """Run a virsh command that must succeed; return its output."""
        done = self.virsh(*words)
        assert done.returncode == 0, self.libvirtd.report(f"{done.stderr}\n--- nvdimmd:\n{self.nvdimmd_log()}")
        return done.stdout.strip()

    def start_nvdimmd(self) -> None:
        """Start nvdimmd; return when it is ready."""
        self.libvirtd.serve("nvdimmd", self.folder / "python/bin/python", "-I", "-m", "nvdimm_driver.cmd.nvdimmd")

    def nvdimmd_log(self) -> str:
        """Return the log of nvdimmd."""
        return (self.libvirtd.folder / "log/nvdimmd.log").read_text()

    def xml(self, name: str, number: int) -> Path:
        """Return a file with a domain's XML as its user writes it."""
        file = self.folder / f"{name}.xml"
        file.write_text(DOMAIN.format(name=name, uuid=UUID.format(number), folder=self.folder))
        return file

    def record(self, name: str) -> Record:
        """Return a domain's record in the ledger."""
        ledger = Ledger(str(self.folder / "state/ledger.sqlite"))
        (record,) = (each for each in ledger.domains() if each.name == name)
        ledger.close()
        return record

    def state(self, name: str) -> tuple[str, int | None, bool]:
        """Return state and domid of a domain's start in the ledger, and True if its file is immutable."""
        start = self.record(name).start
        flags = self.libvirtd.run("lsattr", self.folder / f"pmem/{name}.img").stdout.split()[0]
        return (start.state, start.domid, "i" in flags) if start else ("", None, "i" in flags)

    def log(self) -> str:
        """Return the log of the driver's hook and device model."""
        return (self.folder / "nvdimm-driver.log").read_text()

    def files(self) -> list[str]:
        """Return the names of the files on persistent memory."""
        return self.libvirtd.run("ls", self.folder / "pmem").stdout.split()

    def sum(self, name: str) -> str:
        """Return the SHA-256 of a domain's file."""
        return self.libvirtd.run("sha256sum", self.folder / f"pmem/{name}.img").stdout.split()[0]

    def configure(self, conf: str = CONF) -> None:
        """Write the configuration of the driver."""
        file = self.libvirtd.folder / "conf/nvdimm-driver.conf"
        file.write_text(conf.format(folder=self.folder) + self._options)

    def script(self, name: str, text: str) -> None:
        """Add a hook."""
        file = self.libvirtd.hooks / "libxl.d" / name
        file.write_text("#!/bin/sh\ncat >/dev/null\n" + text)
        file.chmod(0o755)

    def fail(self, function: str, number: int) -> None:
        """Make a function of Xen's libraries fail from now on, with an errno."""
        (self.libvirtd.xen / "fail").write_text(f"{function} {number}\n")

    def fail_qemu(self) -> None:
        """Make QEMU fail from now on."""
        (self.libvirtd.folder / "run/qemu-fails").touch()

    def reboot(self) -> None:
        """Lose power and boot again."""
        self.libvirtd.lose_power()
        (self.folder / "boot_id").write_text("another boot\n")
        self.libvirtd.start()
        self.start_nvdimmd()

    def clean_up(self) -> None:
        """Undo :meth:`fail`, :meth:`fail_qemu` and :meth:`script`."""
        (self.libvirtd.xen / "fail").unlink(missing_ok=True)
        (self.libvirtd.folder / "run/qemu-fails").unlink(missing_ok=True)
        for script in (self.libvirtd.hooks / "libxl.d").iterdir():
            if script.name not in ("50-nvdimm", "99-record"):
                script.unlink()

    def forget_guests(self) -> None:
        """End all guests while libvirtd is stopped."""
        self.libvirtd.stop()
        self.libvirtd.forget_domains()
        self.clean_up()
        self.libvirtd.start()

    def clean(self) -> None:
        """Shut off all domains, undo failures and forget past events."""
        self.clean_up()
        for name in self.libvirtd.check("list", "--name").split():
            if name != "Domain-0":
                self.libvirtd.check("destroy", name)
        self.libvirtd.events()

    def _make_pmem(self) -> None:
        (self.folder / "boot_id").write_text("a boot\n")
        image = self.folder / "image"
        image.touch()
        os.truncate(image, self.size)
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", image], check=True)

    def _show_pmem(self) -> None:
        sysfs = FakeSysfs(self.folder / "sys")
        done = self.libvirtd.run("stat", "-c", "%d", self.folder / "pmem")
        device = int(done.stdout)
        sysfs.fsdax(device, spa=SPA, size=self.size)
        for name, value in (("type", "xen"), ("version/major", "4"), ("version/minor", "17")):
            file = self.folder / "sys/hypervisor" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
        number = f"{os.major(device)}:{os.minor(device)}"
        mount = f"1 0 {number} / {self.folder}/pmem rw - ext4 /dev/pmem0 rw,dax=always\n"
        (self.libvirtd.folder / "run/mountinfo").write_text(mount)

    def _install(self) -> None:
        """Make an environment with the driver and the bench's plug-in, and run ``register`` in it."""
        python = self.folder / "python"
        venv.create(python, symlinks=True)
        (site,) = python.glob("lib/python*/site-packages")
        packages = [path for path in sys.path if path.endswith("-packages")]
        (site / "bench.pth").write_text("\n".join([str(ROOT), *packages]))
        info = site / "nvdimm_bench-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvdimm-bench\nVersion: 1\n")
        entry = "[nvdimm_driver.backings]\nbench = tests.integration.bench_backing:BenchBacking\n"
        (info / "entry_points.txt").write_text(entry)
        (self.folder / "qemu").write_text(QEMU)
        (self.folder / "qemu").chmod(0o755)
        self.configure(self._conf)
        if self._wheels:
            pip: list[str | Path] = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                site,
                *self._wheels,
            ]
            subprocess.run(pip, check=True, capture_output=True)
        done = self.nvdimmctl("register")
        assert "50-nvdimm" in done.stdout, done.stderr
