# SPDX-License-Identifier: Apache-2.0
"""Run work in a process of its own, and stop it at a system call that changes something: kill it, or fail the call.

The kernel reports each call that is not known to be harmless (seccomp(2), SECCOMP_RET_TRACE), and this process decides
about it (ptrace(2)). So a new side effect is a point without being listed. x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import signal
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HARMLESS = {
    "read": 0, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10,
    "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19,
    "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "mincore": 27, "madvise": 28, "dup": 32,
    "dup2": 33, "nanosleep": 35, "getpid": 39, "clone": 56, "fork": 57, "vfork": 58, "exit": 60, "wait4": 61,
    "uname": 63, "fcntl": 72, "flock": 73, "getcwd": 79, "readlink": 89, "umask": 95, "gettimeofday": 96,
    "getrlimit": 97, "sysinfo": 99, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "prctl": 157, "arch_prctl": 158, "gettid": 186,
    "getxattr": 191, "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194, "llistxattr": 195, "flistxattr": 196,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "fadvise64": 221,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262,
    "readlinkat": 267, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_create1": 291, "dup3": 292,
    "pipe2": 293, "preadv": 295, "prlimit64": 302, "getrandom": 318, "memfd_create": 319, "statx": 332, "rseq": 334,
    "clone3": 435, "close_range": 436, "faccessat2": 439,
}  # fmt: skip
"""Calls that change nothing which outlives the process, by number (arch/x86/entry/syscalls/syscall_64.tbl)."""
NAMES = {
    1: "write", 2: "open", 16: "ioctl", 18: "pwrite64", 20: "writev", 26: "msync", 40: "sendfile", 59: "execve",
    62: "kill", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir",
    86: "link", 87: "unlink", 88: "symlink", 90: "chmod", 91: "fchmod", 92: "chown", 93: "fchown", 162: "sync",
    188: "setxattr", 189: "lsetxattr", 190: "fsetxattr", 197: "removexattr", 198: "lremovexattr", 199: "fremovexattr",
    257: "openat", 258: "mkdirat", 260: "fchownat", 263: "unlinkat", 264: "renameat", 265: "linkat", 266: "symlinkat",
    268: "fchmodat", 277: "sync_file_range", 280: "utimensat", 285: "fallocate", 296: "pwritev", 306: "syncfs",
    316: "renameat2", 326: "copy_file_range", 437: "openat2",
}  # fmt: skip
"""Names of calls that may be points, for people; one that is missing has its number."""
NUMBERS = {name: number for number, name in NAMES.items()}
OPENS = {NUMBERS["open"]: "rsi", NUMBERS["openat"]: "rdx"}
BY_DESCRIPTOR = {"write", "ioctl", "pwrite64", "fsync", "fdatasync", "ftruncate", "fchmod", "fsetxattr", "fremovexattr",
                 "fallocate"}  # fmt: skip
REGISTERS = [
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
]
"""struct user_regs_struct (arch/x86/include/asm/user_64.h)."""
_CHANGES = os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
_HARMLESS_IOCTLS = {
    0x5401,  # TCGETS
    0x5413,  # TIOCGWINSZ
    0x5450,  # FIONCLEX
    0x5451,  # FIOCLEX
    0x80086601,  # FS_IOC_GETFLAGS
    0x80087601,  # FS_IOC_GETVERSION
    0x801C581F,  # FS_IOC_FSGETXATTR
    0xC020660B,  # FS_IOC_FIEMAP
    0xC0C0583B,  # FS_IOC_GETFSMAP
}

_TRACEME, _CONT, _GETREGS, _SETREGS, _SETOPTIONS = 0, 7, 12, 13, 0x4200
_OPTIONS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100000  # TRACEFORK, TRACEVFORK, TRACECLONE, TRACESECCOMP, EXITKILL
_EVENT_SECCOMP = 7
_WALL = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in REGISTERS]


@dataclass(frozen=True)
class Fault:
    """What happens at a point.

    :ivar point: its number, from 0.
    :ivar error: errno of the call, which is not made; 0 to kill the process before the call.
    :ivar lasting: later calls of the same name fail, too, as on a full disk.
    """

    point: int
    error: int = 0
    lasting: bool = False

    def __str__(self) -> str:
        what = f"{errno.errorcode[self.error]}{' from there on' if self.lasting else ''}" if self.error else "killed"
        return f"{what} at point {self.point}"


@dataclass
class Ended:
    """How a process ended.

    :ivar points: the calls that changed something, for people, in order.
    :ivar killed: True when it was killed at its point.
    :ivar value: what the work returned.
    :ivar error: the exception that the work raised.
    """

    points: list[str] = field(default_factory=list)
    killed: bool = False
    value: Any = None
    error: Exception | None = None


def process(work: Callable[[], Any]) -> Any:
    """Run work in a process of its own; return what it returns, or raise what it raises."""
    ended = _run(work, None, traced=False)
    if ended.error is not None:
        raise ended.error
    return ended.value


def traced(work: Callable[[], Any], fault: Fault | None = None) -> Ended:
    """Run work in a process of its own, with a fault, if any; return how it ended."""
    return _run(work, fault, traced=True)


def _run(work: Callable[[], Any], fault: Fault | None, *, traced: bool) -> Ended:
    report, told = os.pipe()
    child = os.fork()
    if not child:
        os.close(report)
        _work(work, told, traced=traced)
    os.close(told)
    ended = Ended()
    if traced:
        _trace(child, fault, ended)
    with os.fdopen(report, "rb") as file:
        said = file.read()
    if not traced:
        os.waitpid(child, 0)
    if said:
        ended.value, ended.error = pickle.loads(said)
    elif not ended.killed:
        raise RuntimeError("the process ended without a word")
    return ended


def _work(work: Callable[[], Any], told: int, *, traced: bool) -> None:
    """Be the process: do the work, and tell what came of it."""
    try:
        if traced:
            _libc.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            _filter()
        try:
            said: tuple[Any, Exception | None] = (work(), None)
        except Exception as error:
            error.add_note(traceback.format_exc())
            said = (None, error)
        _tell(told, _packed(said))
    finally:
        os._exit(0)


def _packed(said: tuple[Any, Exception | None]) -> bytes:
    try:
        data = pickle.dumps(said)
        pickle.loads(data)
        return data
    except Exception:  # an exception that cannot be made anew
        return pickle.dumps((None, RuntimeError("".join(traceback.format_exception(said[1])))))


def _tell(told: int, data: bytes) -> None:
    while data:
        data = data[os.write(told, data) :]


def _filter() -> None:
    """Have the tracer told of each call of this process and its children that is not harmless."""
    allowed = sorted(HARMLESS.values())
    code = [struct.pack("=HBBI", 0x20, 0, 0, 0)]  # load the call's number
    for place, number in enumerate(allowed):
        code.append(struct.pack("=HBBI", 0x15, len(allowed) - place, 0, number))  # equal: jump to the last
    code += [struct.pack("=HBBI", 6, 0, 0, 0x7FF00000), struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)]
    instructions = ctypes.create_string_buffer(b"".join(code))
    program = struct.pack("=H6xQ", len(code), ctypes.addressof(instructions))
    if _libc.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


def _trace(child: int, fault: Fault | None, ended: Ended) -> None:
    """Let a process run until it ends, with its children, and note its points."""
    os.waitpid(child, 0)
    _libc.ptrace(_SETOPTIONS, child, None, _OPTIONS)
    _libc.ptrace(_CONT, child, None, None)
    failing = ""
    while True:
        try:
            pid, status = os.waitpid(-1, _WALL)
        except ChildProcessError:
            return
        if not os.WIFSTOPPED(status):
            if pid == child and os.WIFSIGNALED(status) and not ended.killed:
                raise RuntimeError(f"the process ended by signal {os.WTERMSIG(status)}")
            continue
        signalled = os.WSTOPSIG(status)
        event = status >> 16
        if event == _EVENT_SECCOMP:
            failing = _at_call(pid, child, fault, ended, failing)
        hidden = event or signalled in (signal.SIGTRAP, signal.SIGSTOP)
        _libc.ptrace(_CONT, pid, None, None if hidden else signalled)


def _at_call(pid: int, child: int, fault: Fault | None, ended: Ended, failing: str) -> str:
    """Decide about a call; return the name of the calls that fail from now on."""
    registers = _Registers()
    _libc.ptrace(_GETREGS, pid, None, ctypes.addressof(registers))
    number = registers.orig_rax
    name = NAMES.get(number, f"call {number}")
    if not _changes(pid, name, number, registers):
        return failing
    at = len(ended.points)
    ended.points.append(_described(pid, name, registers))
    if fault is None or not (at == fault.point or name == failing):
        return failing
    if not fault.error:
        ended.killed = True
        os.kill(child, signal.SIGKILL)
        return failing
    registers.orig_rax, registers.rax = 2**64 - 1, 2**64 - fault.error
    _libc.ptrace(_SETREGS, pid, None, ctypes.addressof(registers))
    return name if fault.lasting else ""


def _changes(pid: int, name: str, number: int, registers: _Registers) -> bool:
    if number in OPENS:
        return bool(getattr(registers, OPENS[number]) & _CHANGES)
    if name == "openat2":
        (flags,) = struct.unpack("=Q", _memory(pid, registers.rdx, 8))
        return bool(flags & _CHANGES)
    if name == "ioctl":
        return registers.rsi & 0xFFFFFFFF not in _HARMLESS_IOCTLS
    if name == "write":
        return not _path(pid, registers.rdi).startswith(("pipe:", "/dev/null"))
    return True


def _memory(pid: int, address: int, length: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(length)


def _path(pid: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor & 0xFFFFFFFF}")
    except OSError:
        return "?"


def _described(pid: int, name: str, registers: _Registers) -> str:
    if name in BY_DESCRIPTOR:
        return f"{name} {os.path.basename(_path(pid, registers.rdi))}"
    return name
