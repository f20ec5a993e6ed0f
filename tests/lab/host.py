# SPDX-License-Identifier: Apache-2.0
"""One Xen host: QEMU (TCG) with Xen, a PV dom0, emulated NVDIMMs, and an agent in dom0 that runs commands."""

import base64
import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab.agent import AgentConnection
from tests.lab.errors import LabError
from tests.lab.image import Images
from tests.lab.tools import require, run_tool
from tests.waiting import HANG_SECONDS

GIB = 1 << 30
LABEL_BYTES = 128 << 10
# The visible part of an NVDIMM is its file without the label area, rounded down to this.
NVDIMM_ALIGN = 2 << 20
# Under TCG, SMAP crashes a PV dom0, MWAIT makes Xen panic, exits for RDTSCP are decoded wrongly, and AVX, which needs
# XSAVE, is an invalid opcode now and then when two guests run.
CPU = "EPYC,+svm,+npt,-smap,-smep,-monitor,-rdtscp,-xsave,-xsaveopt,-xsavec,-xgetbv1,-avx,-avx2,-f16c,-fma"
# dom0 gets two of the three CPUs; guests use the third. This machine may have only two: dom0 uses most of the time.
XEN_ARGS = (
    "dom0_mem={memory},max:{memory} dom0_max_vcpus=2 dom0_vcpus_pin sched=credit mwait-idle=0 cpuidle=0 bootscrub=0 "
    "console=com1 com1=115200,8n1 loglvl=info guest_loglvl=debug noreboot"
)
LINUX_ARGS = "rdinit=/init console=hvc0 quiet loglevel=4 net.ifnames=0"
SHARE = "/mnt/share"
# Larger files, in bytes, go through the shared folder and not through the agent's channel.
CHANNEL_LIMIT = 64 << 10
ANSWER_SECONDS = 30
WITHOUT_WRITES_SECONDS = 30
NETWORK_CARD, ADDRESS = "eth0", "10.0.2.15"
TAIL = 4000
PAGE_TABLE = struct.Struct("<512Q")
LOCK = Path("/tmp/nvdimm-driver-lab.lock")
VOLATILE_DISK = Path(__file__).with_name("volatile_disk.py")
CRASHED = "Hardware Dom0 crashed"


@dataclass(frozen=True, slots=True)
class Nvdimm:
    """An emulated NVDIMM: dom0 sees `size` bytes, a multiple of 2 MiB; the file `path` has them and a label area."""

    path: Path
    size: int = GIB

    @property
    def file_size(self) -> int:
        """The size of its file in bytes: the visible part, the label area, and room for rounding."""
        return self.size + NVDIMM_ALIGN


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a command in dom0; a negative `returncode` is a signal, as in subprocess."""

    command: str
    returncode: int
    stdout: str
    stderr: str
    seconds: float


def is_race_of_qemu(console: str) -> bool:
    """Return True when dom0's kernel has crashed at a breakpoint that it had put into its own code, and removed again.

    It changes code at boot that another CPU may run, and a breakpoint is there meanwhile. QEMU 7.2 reads the code that
    it translates before it locks the page (accel/tcg/translate-all.c), so it can keep the breakpoint; QEMU 10.0 locks
    the page first.
    """
    return CRASHED in console and "exc_int3" in console


class XenHost:
    """A Xen host that starts, loses power and starts again; only one runs on a machine at a time.

    As a context manager it starts on entry and stops on exit. Its run folder, with the console's log, is deleted then,
    unless the start or the body failed. By default it has two `nvdimms` in its run folder, of 1 GiB and 160 MiB, so
    that dom0 sees /dev/pmem0 and /dev/pmem1; those elsewhere outlive the host. At each start dom0's disk is as it was
    built, unless `keep_disk` is set: then dom0's writes outlive a power cut, too. With `power_loss`, which decides by
    chance, it keeps the disk as well, but one with a write cache: a power cut loses of it what dom0 has not flushed.
    With `xen`, it boots that hypervisor instead of the release's.
    """

    def __init__(
        self,
        images: Images,
        nvdimms: Sequence[Nvdimm] | None = None,
        *,
        xen: Path | None = None,
        dom0_memory: str = "1536M",
        xen_args: str = "",
        linux_args: str = "",
        qemu_args: Sequence[str] = (),
        keep_disk: bool = False,
        power_loss: random.Random | None = None,
        boot_timeout: float = HANG_SECONDS,
        lock_timeout: float = 1800,
    ) -> None:
        self.images = images
        self._xen = xen
        self.run_folder = Path(tempfile.mkdtemp(prefix="nvdimm-lab-"))
        self.share = self.run_folder / "share"
        self.share.mkdir()
        self.nvdimms = tuple(nvdimms) if nvdimms is not None else self._own_nvdimms()
        self.boot_seconds = 0.0
        self._dom0_memory = dom0_memory
        self._xen_args = xen_args
        self._linux_args = linux_args
        self._qemu_args = tuple(qemu_args)
        self._keep_disk = keep_disk
        self._power_loss = power_loss
        self._volatile_disk: subprocess.Popen[bytes] | None = None
        self._boot_timeout = boot_timeout
        self._lock_timeout = lock_timeout
        self._lock: int | None = None
        self._qemu: subprocess.Popen[bytes] | None = None
        self._agent: AgentConnection | None = None
        self._files_put = 0
        self._hung = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=kind is not None)

    @property
    def running(self) -> bool:
        """True while QEMU runs."""
        return self._qemu is not None and self._qemu.poll() is None

    def start(self) -> None:
        """Boot the host and wait for dom0's agent.

        :raises LabError: with the end of the console, when it does not boot.
        """
        if self._qemu is not None:
            raise LabError("this host runs already")
        require(("nbdkit", "qemu-system-x86_64", "setpriv"))
        try:
            self._boot()
        except LabError as error:
            if not is_race_of_qemu(self.console()):
                raise
            print(f"dom0 is started again: QEMU has run code that another CPU had changed\n{error}")
            self._boot()

    def stop(self) -> None:
        """Sync dom0's disks and turn the host off; a host that is off stays off."""
        if not self.running:
            self._kill()
            return
        try:
            self.check("sync")
            self._monitor("quit")
            self._process.wait(HANG_SECONDS)
        finally:
            self._kill()

    def power_cut(self) -> None:
        """Kill QEMU: the host loses power, and its NVDIMMs keep what was stored in them.

        With a disk that has a write cache, that happens while dom0 writes to it.
        """
        if self._volatile_disk is not None:
            cut = self.run_folder / "cut.new"
            cut.write_text(str(self._process.pid))
            cut.rename(self._cut)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(WITHOUT_WRITES_SECONDS)
        self._kill()

    def lost_sectors(self) -> tuple[int, int]:
        """Return how many sectors of dom0's disk the last power cut made older, and how many were not flushed."""
        said = (self.run_folder / "nbdkit.log").read_text()
        lost = re.search(r"^(\d+) of (\d+) sectors are older$", said, re.MULTILINE)
        if not lost:
            raise LabError(f"the disk does not say what it lost: {said}")
        return int(lost[1]), int(lost[2])

    def close(self, *, keep: bool = False) -> None:
        """Stop the host. Delete its run folder unless `keep` is set or a command got no answer."""
        keep = keep or self._hung
        try:
            self.stop()
        except LabError:
            keep = True
            raise
        finally:
            if not keep:
                shutil.rmtree(self.run_folder)

    def run(self, command: str, timeout: float = HANG_SECONDS) -> Result:
        """Run a bash command in dom0 as root. A dom0 that does not answer at all hangs, and the host is killed.

        :raises LabError: when the command takes more than `timeout` seconds, or dom0 is gone.
        """
        answer = self._ask({"op": "run", "command": command, "timeout": timeout}, timeout + ANSWER_SECONDS)
        result = Result(
            command,
            int(answer["rc"]),
            base64.b64decode(answer["stdout"]).decode(errors="replace"),
            base64.b64decode(answer["stderr"]).decode(errors="replace"),
            float(answer["seconds"]),
        )
        if answer["timed_out"]:
            raise LabError(f"still running after {timeout} s, and killed\n{_describe(result)}")
        return result

    def check(self, command: str, timeout: float = HANG_SECONDS) -> Result:
        """Run a command that has to succeed.

        :raises LabError: when it fails, and as :meth:`run` does.
        """
        result = self.run(command, timeout)
        if result.returncode:
            raise LabError(_describe(result))
        return result

    def write(self, remote: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file in dom0; create the folders that it is in."""
        if len(data) > CHANNEL_LIMIT:
            shared = self._shared_name()
            (self.share / shared).write_bytes(data)
            (self.share / shared).chmod(mode)
            self._take_shared(shared, remote)
            return
        order = {"op": "write", "path": remote, "data": base64.b64encode(data).decode(), "mode": mode}
        self._ask(order, 60)

    def read(self, remote: str, offset: int = 0, limit: int = 1 << 20) -> bytes:
        """Return up to `limit` bytes of a file in dom0.

        :raises LabError: when there is no such file.
        """
        answer = self._ask({"op": "read", "path": remote, "offset": offset, "limit": limit}, 60)
        return base64.b64decode(answer["data"])

    def exists(self, remote: str) -> bool:
        """Return True if dom0 has such a file."""
        return self.run(f"test -e '{remote}'").returncode == 0

    def put(self, local: Path, remote: str) -> None:
        """Copy a file, or a folder with its content, into dom0, as `remote`."""
        shared = self._shared_name()
        if local.is_dir():
            shutil.copytree(local, self.share / shared, symlinks=True)
        else:
            shutil.copy(local, self.share / shared)
        self._take_shared(shared, remote)

    def get(self, remote: str) -> bytes:
        """Return the content of a file in dom0."""
        size = int(self.check(f"stat -L -c %s '{remote}'").stdout)
        if 0 < size <= CHANNEL_LIMIT:
            return self.read(remote, limit=size)
        shared = self._shared_name()
        self.check(f"cat '{remote}' >{SHARE}/{shared}")
        data = (self.share / shared).read_bytes()
        _remove(self.share / shared)
        return data

    def forward(self, port: int) -> int:
        """Forward a TCP port of this machine's loopback to `port` in a dom0 without systemd; return it."""
        up = f"ip link set {NETWORK_CARD} up && ip address replace {ADDRESS}/24 dev {NETWORK_CARD}"
        self.check(f"modprobe virtio_net && {up}")
        self._monitor(f"hostfwd_add net tcp:127.0.0.1:0-{ADDRESS}:{port}")
        connections = self._monitor("info usernet")
        forwarded = re.search(rf"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+{port}\s", connections)
        if not forwarded:
            raise LabError(f"QEMU forwards no port to {ADDRESS}:{port}")
        return int(forwarded[1])

    @property
    def console_socket(self) -> Path:
        """The unix socket of the host's serial console, on which dom0 runs a shell."""
        return self.run_folder / "console.sock"

    def console(self) -> str:
        """Return everything that Xen and dom0 have written to the serial console."""
        log = self.run_folder / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def read_table(self, address: int) -> tuple[int, ...]:
        """Return the 512 entries of a page table at an address of the host's memory."""
        saved = self.run_folder / "table"
        said = self._monitor(f'pmemsave {address:#x} {PAGE_TABLE.size} "{saved}"')
        if not saved.exists():
            raise LabError(f"QEMU does not show the host's memory at {address:#x}: {said[-TAIL:]}")
        entries = PAGE_TABLE.unpack(saved.read_bytes())
        saved.unlink()
        return entries

    def _own_nvdimms(self) -> tuple[Nvdimm, ...]:
        return (Nvdimm(self.run_folder / "pmem0.img"), Nvdimm(self.run_folder / "pmem1.img", 160 << 20))

    def _shared_name(self) -> str:
        self._files_put += 1
        return f"transfer-{self._files_put}"

    def _take_shared(self, shared: str, remote: str) -> None:
        self.check(f"mkdir -p \"$(dirname '{remote}')\" && cp -rT --preserve=mode {SHARE}/{shared} '{remote}'")
        _remove(self.share / shared)

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        if self._qemu is None:
            raise LabError("this host is off")
        return self._qemu

    def _ask(self, order: dict[str, object], timeout: float) -> dict[str, str]:
        if self._agent is None or self._process.poll() is not None:
            raise LabError(f"this host is off\n{self._evidence()}")
        try:
            return self._agent.ask(order, timeout)
        except TimeoutError as error:
            evidence = self._evidence()
            self._hung = True
            self._kill()  # later commands would get no answer either, and each would wait as long
            raise LabError(f"{error}\n{evidence}") from error

    def _boot(self) -> None:
        self._take_lock()
        try:
            self._start_qemu()
            self._wait_for_agent()
        except BaseException:
            self._kill()
            raise

    def _start_qemu(self) -> None:
        for nvdimm in self.nvdimms:
            with nvdimm.path.open("ab") as file:
                file.truncate(nvdimm.file_size)
        for name in ("console.log", "agent.sock", "console.sock", "monitor.sock"):
            (self.run_folder / name).unlink(missing_ok=True)
        with (self.run_folder / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(
                # the kernel kills QEMU even if this process ends without running any code
                ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *self._qemu_command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.run_folder)},
            )
        _go_first(self._qemu.pid)

    def _qemu_command(self) -> list[str]:
        run = self.run_folder
        xen_args = f"{XEN_ARGS.format(memory=self._dom0_memory)} {self._xen_args}"
        linux = f"{self.images.dom0_kernel} {LINUX_ARGS} {self._linux_args}"
        return [
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-machine", "pc,nvdimm=on", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", CPU, "-smp", "3"),
            *("-m", "4G,slots=4,maxmem=16G"),
            *(word for number, nvdimm in enumerate(self.nvdimms) for word in _nvdimm_args(number, nvdimm)),
            *("-kernel", str(self._xen or self.images.xen), "-append", xen_args),
            *("-initrd", f"{linux},{self.images.dom0_initrd}"),
            *("-drive", f"if=virtio,format=raw,{self._dom0_disk()}"),
            *("-fsdev", f"local,id=share,path={self.share},security_model=none"),
            *("-device", "virtio-9p-pci,fsdev=share,mount_tag=share", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={run}/agent.sock,server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=nvdimm.lab.agent"),
            *("-chardev", f"socket,id=console,path={self.console_socket},server=on,wait=off,logfile={run}/console.log"),
            *("-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-serial", "chardev:console", "-monitor", f"unix:{run}/monitor.sock,server=on,wait=off"),
            *self._qemu_args,
        ]

    def _dom0_disk(self) -> str:
        if not self._keep_disk and self._power_loss is None:
            return f"cache=unsafe,file={self.images.dom0_disk},snapshot=on"
        own = self.run_folder / "dom0.img"
        if not own.exists():
            run_tool(["cp", "--sparse=always", "--reflink=auto", self.images.dom0_disk, own])
        if self._power_loss is None:
            return f"cache=unsafe,file={own}"
        return f"cache=writeback,file.driver=nbd,file.server.type=unix,file.server.path={self._serve(own)}"

    @property
    def _cut(self) -> Path:
        return self.run_folder / "cut"

    def _serve(self, disk: Path) -> Path:
        """Serve a disk that has a write cache until QEMU ends; return the socket."""
        assert self._power_loss is not None
        served, ready = self.run_folder / "disk.sock", self.run_folder / "nbdkit.pid"
        for each in (served, ready, self._cut):
            each.unlink(missing_ok=True)
        command = [
            *("setpriv", "--pdeathsig", "KILL", "nbdkit", "--foreground", "--filter=exitlast"),
            *(f"--unix={served}", f"--pidfile={ready}", "python", str(VOLATILE_DISK)),
            *(f"image={disk}", f"seed={self._power_loss.getrandbits(32)}", f"cut={self._cut}"),
        ]
        with (self.run_folder / "nbdkit.log").open("wb") as log:
            self._volatile_disk = subprocess.Popen(command, stdout=log, stderr=log)
        while not ready.exists():
            if self._volatile_disk.poll() is not None:
                raise LabError(f"nbdkit ended: {(self.run_folder / 'nbdkit.log').read_text()}")
            time.sleep(0.05)
        return served

    def _wait_for_agent(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < self._boot_timeout:
            if self._process.poll() is not None:
                raise LabError(f"QEMU ended with status {self._process.returncode}\n{self._evidence()}")
            self._connect()
            if self._agent is not None and self._agent.answers():
                self.boot_seconds = time.monotonic() - started
                return
            if CRASHED in self.console():
                raise LabError(f"dom0's kernel has crashed\n{self._evidence()}")
            time.sleep(0.1)
        raise LabError(f"dom0 does not answer after {self._boot_timeout} s\n{self._evidence()}")

    def _connect(self) -> None:
        if self._agent is None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # QEMU is not listening yet
                self._agent = AgentConnection(self.run_folder / "agent.sock")

    def _evidence(self) -> str:
        log = self.run_folder / "qemu.log"
        said = log.read_text(errors="replace")[-TAIL:] if log.exists() else ""
        return f"run folder: {self.run_folder}\nQEMU: {said}\nend of the console:\n{self.console()[-TAIL:]}"

    def _monitor(self, command: str) -> str:
        """Run a command of QEMU's monitor; return its answer."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self.run_folder / "monitor.sock"))
            monitor.sendall(command.encode() + b"\n")
            monitor.shutdown(socket.SHUT_WR)
            with monitor.makefile() as answer:
                return answer.read()

    def _kill(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._qemu is not None:
            if self._qemu.poll() is None:
                self._qemu.send_signal(signal.SIGKILL)
            self._qemu.wait()
            self._qemu = None
        if self._volatile_disk is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._volatile_disk.wait(60)  # it ends with QEMU, unless that has not connected
            self._volatile_disk.kill()
            self._volatile_disk = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise LabError(f"another lab has run for {self._lock_timeout} s: it holds {LOCK}") from None
                time.sleep(0.5)
            else:
                self._lock = descriptor
                return


def _nvdimm_args(number: int, nvdimm: Nvdimm) -> tuple[str, ...]:
    memory = f"memory-backend-file,id=pmem{number},share=on,mem-path={nvdimm.path},size={nvdimm.file_size},align=2M"
    device = f"nvdimm,id=nvdimm{number},memdev=pmem{number},label-size={LABEL_BYTES}"
    return ("-object", memory, "-device", device)


def _go_first(session: int) -> None:
    """Have the processes of a session go before those of others, where Linux shares its time among sessions.

    There, nice values count only among the processes of one session (sched(7), "The autogroup feature"). A container
    may not allow it; then the lab is slower beside other work.
    """
    with contextlib.suppress(FileNotFoundError, PermissionError):
        Path(f"/proc/{session}/autogroup").write_text("-20")


def _describe(result: Result) -> str:
    return (
        f"{result.command}\nstatus {result.returncode} after {result.seconds:.1f} s\n"
        f"stderr:\n{result.stderr[-TAIL:]}\nstdout:\n{result.stdout[-TAIL:]}"
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
