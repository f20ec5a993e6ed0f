# SPDX-License-Identifier: Apache-2.0
"""The lab's Linux guest: its reports about its NVDIMMs, and orders to it; `recipe/guest-init` is the other side.

A guest boots from one read-only disk that all guests share, and communicates through its Xen console: its reports
and answers are read from xenconsoled's log, orders are written to the console's terminal in dom0.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.lab.errors import LabError
from tests.lab.host import XenHost
from tests.waiting import HANG_SECONDS

MARKER = "@nvdimm-lab "
GUEST_DISK = "/tmp/guest.img"
CONSOLE_LOGS = "/var/log/xen/console"
PATTERN_BLOCK = 4096
READ_LIMIT = 4096
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.3, 1.5
TAIL = 4000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """A range of the guest's e820 map; `last` is its last byte."""

    first: int
    last: int
    kind: str


@dataclass(frozen=True, slots=True)
class Region:
    """A persistent memory region; `dimm` is the name of the one nmem it maps."""

    name: str
    size: int
    resource: int | None
    read_only: bool
    dimm: str | None
    persistence_domain: str | None


@dataclass(frozen=True, slots=True)
class Dimm:
    """An nmem; `handle` is its NFIT device handle, `available_slots` its free label slots or None without labels."""

    name: str
    handle: int
    flags: str | None
    nfit_flags: str | None
    available_slots: int | None


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace; a seed, of which none was made yet, has size 0."""

    name: str
    size: int
    resource: int | None
    mode: str | None
    uuid: str | None


@dataclass(frozen=True, slots=True)
class Disk:
    """A /dev/pmem* block device; `size` in bytes."""

    name: str
    size: int
    read_only: bool


@dataclass(frozen=True, slots=True)
class Report:
    """A guest's report; `problems` are the lines of its kernel log about errors of ACPI, NFIT and libnvdimm."""

    boot_id: str
    uptime: float
    memory_kib: int
    cmdline: str
    e820: tuple[MemoryRange, ...]
    regions: tuple[Region, ...]
    dimms: tuple[Dimm, ...]
    namespaces: tuple[Namespace, ...]
    disks: tuple[Disk, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to an order: a shell's status, and what the order printed."""

    returncode: int
    result: str


class Conversation(ABC):
    """A conversation with a guest's init: its reports, orders to it and their answers."""

    def __init__(self, name: str, begin: int = 0) -> None:
        """:param begin: a number that makes the names of orders differ from those of earlier conversations."""
        self.name = name
        self._begin = begin
        self._pending = b""
        self._reports: list[Report] = []
        self._answers: dict[str, Answer] = {}
        self._orders = 0

    @abstractmethod
    def exists(self) -> bool:
        """Return True if the guest exists."""

    @abstractmethod
    def console(self) -> str:
        """Return everything that the guest has written to its console since this object was made."""

    @abstractmethod
    def _send(self, line: str) -> None:
        """Write a line to the guest's console."""

    @abstractmethod
    def _receive(self) -> bytes:
        """Return what came from the guest since the last call."""

    @abstractmethod
    def _evidence(self) -> str:
        """Return what may explain why nothing comes."""

    def wait_report(self, timeout: float = HANG_SECONDS, boot: int = 1) -> Report:
        """Return the first report of the `boot`-th boot, counted from 1.

        :raises LabError: with the end of the console, if it does not come.
        """

        def found() -> Report | None:
            boots = self._boots()
            return boots[boot - 1] if len(boots) >= boot else None

        return self._wait(found, timeout, f"report of boot {boot}")

    def report(self, timeout: float = HANG_SECONDS) -> Report:
        """Have the guest look again; return its new report."""
        known = len(self._reports)
        self.check("report", timeout=timeout)
        return self._wait(lambda: self._reports[-1] if len(self._reports) > known else None, timeout, "report")

    def order(self, verb: str, *arguments: object, timeout: float = HANG_SECONDS) -> Answer:
        """Send an order and return its answer.

        :raises LabError: when none comes.
        """
        self._orders += 1
        name = f"{self._begin}-{self._orders}"
        line = " ".join((name, verb, *map(str, arguments)))
        self._send(line)
        return self._wait(lambda: self._answers.get(name), timeout, f"answer to {line!r}")

    def check(self, verb: str, *arguments: object, timeout: float = HANG_SECONDS) -> str:
        """Send an order that has to succeed; return what it printed.

        :raises LabError: when it fails, or no answer comes.
        """
        answer = self.order(verb, *arguments, timeout=timeout)
        if answer.returncode:
            raise LabError(f"guest {self.name}: {verb} {arguments} has status {answer.returncode}: {answer.result}")
        return answer.result

    def last_answer(self, name: str, timeout: float = HANG_SECONDS) -> Answer:
        """Return the last answer that a program in the guest has given under a name of its own.

        :raises LabError: when none comes.
        """
        return self._wait(lambda: self._answers.get(name), timeout, f"answer of {name!r}")

    def sha256(self, device: str, offset: int, length: int, timeout: float = HANG_SECONDS) -> str:
        """Return the SHA-256, in hex, of bytes of a block device, read from the device and not from the page cache."""
        return self.check("sha256", device, offset, length, timeout=timeout)

    def read(self, device: str, offset: int, length: int) -> bytes:
        """Return bytes of a block device, at most READ_LIMIT."""
        if length > READ_LIMIT:
            raise LabError(f"{length} bytes do not go through a console; at most {READ_LIMIT}")
        return bytes.fromhex(self.check("read", device, offset, length))

    def write(self, device: str, offset: int, length: int, seed: int, timeout: float = HANG_SECONDS) -> None:
        """Write `pattern(seed, length)` to a block device and sync it."""
        self.check("write", device, offset, length, seed, timeout=timeout)

    def dmesg(self) -> str:
        """Return the guest's kernel log."""
        return self.check("dmesg")

    def reboot(self, timeout: float = HANG_SECONDS) -> Report:
        """Have the guest reboot; return the report of the boot that follows."""
        return self.next_boot(lambda: self.check("reboot"), timeout)

    def next_boot(self, cause: Callable[[], object], timeout: float = HANG_SECONDS) -> Report:
        """Call `cause`, which makes the guest boot again; return the report of that boot."""
        boots = len(self._boots())
        cause()
        return self.wait_report(timeout, boots + 1)

    def poweroff(self, timeout: float = HANG_SECONDS) -> None:
        """Have the guest power off, and wait until its domain is gone."""
        self.check("poweroff")
        self.wait_end(timeout)

    def wait_end(self, timeout: float = HANG_SECONDS) -> None:
        """Wait until the guest's domain is gone."""
        self._wait(lambda: True if not self.exists() else None, timeout, "end of the domain")

    def _boots(self) -> list[Report]:
        self._poll()
        first: dict[str, Report] = {}
        for report in self._reports:
            first.setdefault(report.boot_id, report)
        return list(first.values())

    def _wait(self, look: Callable[[], T | None], timeout: float, what: str) -> T:
        started = time.monotonic()
        while True:
            self._poll()
            found = look()
            if found is not None:
                return found
            waited = time.monotonic() - started
            if waited > timeout:
                raise LabError(f"guest {self.name}: no {what} after {timeout} s\n{self._evidence()}")
            # each poll takes CPU time in dom0 from the guest's device model
            time.sleep(min(max(POLL_SECONDS, waited / 10), LONGEST_POLL_SECONDS))

    def _poll(self) -> None:
        *lines, self._pending = (self._pending + self._receive()).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").strip()
            if text.startswith(MARKER):
                self._take(json.loads(text.removeprefix(MARKER)))

    def _take(self, message: dict[str, Any]) -> None:
        if message["kind"] == "report":
            self._reports.append(_report(message))
        else:
            self._answers[message["id"]] = Answer(message["rc"], message["result"])


class Guest(Conversation):
    """A Xen guest by its name. Create this object before the guest starts: it counts boots from then on."""

    def __init__(self, host: XenHost, name: str) -> None:
        self._host = host
        self._log = f"{CONSOLE_LOGS}/guest-{name}.log"
        made = host.check(f"touch '{self._log}' && stat -c %s '{self._log}'")
        self._end = int(made.stdout)
        self._domid = ""
        super().__init__(name, self._end)

    def exists(self) -> bool:
        """Return True if Xen has a domain of this name."""
        return self._host.run(f"xl domid '{self.name}'").returncode == 0

    def console(self) -> str:
        return self._host.get(self._log)[self._begin :].decode(errors="replace")

    def _send(self, line: str) -> None:
        # xl takes three times as long as xenstore-read, so it is run only after a reboot. Without noctty, the terminal
        # would become that of the command's session and be hung up with it.
        sent = self._host.check(
            f"id={self._domid}; "
            f"[ \"$(xenstore-read /local/domain/$id/name 2>&1)\" = '{self.name}' ] || id=$(xl domid '{self.name}') && "
            "tty=$(xenstore-read /local/domain/$id/console/tty) && "
            f"echo '{line}' | dd of=$tty oflag=noctty conv=notrunc status=none && echo $id"
        )
        self._domid = sent.stdout.strip()

    def _receive(self) -> bytes:
        data = self._host.read(self._log, self._end)
        self._end += len(data)
        return data

    def _evidence(self) -> str:
        log = self._host.run(f"xl list; tail -n 20 '/var/log/xen/qemu-dm-{self.name}.log'")
        return f"{log.stdout}{log.stderr}\nend of its console:\n{self.console()[-TAIL:]}"


def pattern(seed: int, length: int) -> bytes:
    """Return the bytes that a guest writes for `seed`. Each block of 4096 has its number, so a misplaced one shows.

    A block is its number within the pattern as %08x, then 1022 numbers as %04x: the upper halves of the states of
    x → (69069·x + 1) mod 2³² that follow `seed`, 0 ≤ seed < 2³².
    """
    state, numbers = seed, []
    for _ in range(1022):
        state = (state * 69069 + 1) % (1 << 32)
        numbers.append(f"{state >> 16:04x}")
    tail = "".join(numbers)
    blocks = -(-length // PATTERN_BLOCK)
    return "".join(f"{block:08x}{tail}" for block in range(blocks)).encode()[:length]


def install_guest(host: XenHost) -> str:
    """Copy the guest's disk into dom0's memory, where all guests boot from it; return its path there."""
    if not host.exists(GUEST_DISK):
        host.put(host.images.guest_disk, GUEST_DISK)
    return GUEST_DISK


def disk_arguments(disk: str = GUEST_DISK) -> tuple[str, ...]:
    """Return device-model arguments for the guest's disk: virtio, as the BIOS is far slower with IDE or Xen's disk."""
    return (
        *("-drive", f"file={disk},if=none,id=boot,format=raw,readonly=on"),
        *("-device", "virtio-blk-pci,drive=boot,bootindex=1"),
    )


def xl_config(name: str, *, memory_mib: int = 128, disk: str = GUEST_DISK, extra: str = "") -> str:
    """Return a configuration for `xl create` with which a guest boots fast here, followed by the lines of `extra`."""
    return f"""\
type = "hvm"
name = "{name}"
memory = {memory_mib}
vcpus = 1
device_model_args_hvm = {json.dumps(disk_arguments(disk))}
vga = "none"
vnc = 0
usb = 0
hpet = 0
tsc_mode = "native"
on_poweroff = "destroy"
on_reboot = "restart"
on_crash = "destroy"
{extra}
"""


def _report(message: dict[str, Any]) -> Report:
    return Report(
        boot_id=message["boot_id"],
        uptime=float(message["uptime"]),
        memory_kib=int(message["memory_kib"]),
        cmdline=message["cmdline"],
        e820=tuple(MemoryRange(_number(e["first"]), _number(e["last"]), e["type"]) for e in message["e820"]),
        regions=tuple(map(_region, message["regions"])),
        dimms=tuple(map(_dimm, message["dimms"])),
        namespaces=tuple(map(_namespace, message["namespaces"])),
        disks=tuple(Disk(d["name"], _number(d["size"]) * 512, d["ro"] == "1") for d in message["disks"]),
        problems=tuple(message["problems"]),
    )


def _region(fields: dict[str, Any]) -> Region:
    mapping = fields["mapping0"]
    return Region(
        name=fields["name"],
        size=_number(fields["size"]),
        resource=_optional_number(fields["resource"]),
        read_only=fields["read_only"] == "1",
        dimm=mapping.split(",")[0] if mapping else None,
        persistence_domain=fields["persistence_domain"],
    )


def _dimm(fields: dict[str, Any]) -> Dimm:
    return Dimm(
        name=fields["name"],
        handle=_number(fields["handle"]),
        flags=fields["flags"],
        nfit_flags=fields["nfit_flags"],
        available_slots=_optional_number(fields["available_slots"]),
    )


def _namespace(fields: dict[str, Any]) -> Namespace:
    return Namespace(
        name=fields["name"],
        size=_number(fields["size"]),
        resource=_optional_number(fields["resource"]),
        mode=fields["mode"],
        uuid=fields["uuid"] or None,
    )


def _number(text: str) -> int:
    return int(text, 0)


def _optional_number(text: str | None) -> int | None:
    return None if text is None else int(text, 0)
