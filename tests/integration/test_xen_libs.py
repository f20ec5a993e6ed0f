# SPDX-License-Identifier: Apache-2.0
"""The declarations against Xen's own headers and libraries, and the calls against stand-ins built from those headers.

Needs gcc and Debian's libxen-dev (which brings the libraries), and no hypervisor.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from nvdimm_driver.doctor.dax import AT_EMPTY_PATH, STATX_ATTR_DAX, STRUCT_STATX_SIZE
from nvdimm_driver.xen.abi import DECLARATIONS
from nvdimm_driver.xen.abi import ffi as declared
from nvdimm_driver.xen.libxenctrl import (
    DOMAIN_FLAGS,
    DOMAIN_HAP,
    DOMAIN_WORDS,
    HAP,
    PHYSINFO_CAPABILITIES,
    PHYSINFO_WORDS,
    VERSION_TEXT_SIZE,
    XENVER_CAPABILITIES,
    XENVER_COMMANDLINE,
    installed_versions,
)

FUNCTIONS = re.findall(r"^\w[\w ]*?\W\*?(\w+)\(", DECLARATIONS, re.MULTILINE)
HEADERS = """
#define _GNU_SOURCE 1
#define XC_WANT_COMPAT_DEVICEMODEL_API 1
#include <stddef.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <xenctrl.h>
#include <xendevicemodel.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xenstore.h>
#include <xentoolcore.h>
"""
STAND_IN = Path(__file__).parent / "xen_stand_in.c"


def compile_c(source: str) -> subprocess.CompletedProcess[str]:
    command = ["gcc", "-std=gnu11", "-fsyntax-only", "-Wall", "-Werror", "-x", "c", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)


def test_every_declaration_is_that_of_the_headers() -> None:
    entry = declared.typeof("struct e820entry")
    layout = [f"sizeof(struct e820entry) == {declared.sizeof('struct e820entry')}"]
    layout += [f"offsetof(xc_physinfo_t, capabilities) == {4 * PHYSINFO_CAPABILITIES}"]
    layout += [f"sizeof(xc_physinfo_t) <= {4 * PHYSINFO_WORDS}", f"XEN_SYSCTL_PHYSCAP_hap == {HAP}"]
    layout += [f"offsetof(xc_domaininfo_t, flags) == {4 * DOMAIN_FLAGS}", "sizeof(domid_t) == 2"]
    layout += ["offsetof(xc_domaininfo_t, domain) == 0", f"sizeof(xc_domaininfo_t) <= {4 * DOMAIN_WORDS}"]
    layout += [f"XEN_DOMINF_hap == {DOMAIN_HAP}"]
    layout += [f"XENVER_capabilities == {XENVER_CAPABILITIES}", f"XENVER_commandline == {XENVER_COMMANDLINE}"]
    layout += [f"sizeof({name}) == {VERSION_TEXT_SIZE}" for name in ("xen_capabilities_info_t", "xen_commandline_t")]
    layout += [f"sizeof(struct statx) <= {STRUCT_STATX_SIZE}", "offsetof(struct statx, stx_attributes) == 8"]
    layout += [f"STATX_ATTR_DAX == {STATX_ATTR_DAX}", f"AT_EMPTY_PATH == {AT_EMPTY_PATH}"]
    layout += [f"offsetof(struct e820entry, {name}) == {field.offset}" for name, field in entry.fields or ()]
    checks = "".join(f'_Static_assert({check}, "{check}");\n' for check in layout)
    result = compile_c(HEADERS + DECLARATIONS + checks)
    assert result.returncode == 0, result.stderr
    assert len(layout) == 20


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_declaration_with_one_wrong_type_would_be_seen(function: str) -> None:
    wrong = re.sub(rf"(?<=\W){function}\(", f"{function}(struct wrong *, ", DECLARATIONS)
    result = compile_c("struct wrong;\n" + HEADERS + wrong)
    assert re.search(rf"conflicting types for .{function}\W", result.stderr), result.stderr


def test_the_generated_module_is_one_that_cffi_1_15_loads(tmp_path: Path) -> None:
    """Debian 12's backend checks this number, whichever cffi generated the module."""
    declared.emit_python_code(str(tmp_path / "_xen.py"))
    assert "_version = 0x2601," in (tmp_path / "_xen.py").read_text()


def test_every_function_is_in_its_library() -> None:
    assert len(FUNCTIONS) == 40
    version = installed_versions()[-1]
    libraries = {
        "xc_": f"libxenctrl.so.{version}",
        "xenforeignmemory_": "libxenforeignmemory.so.1",
        "xs_": "libxenstore.so.4",
        "xendevicemodel_": "libxendevicemodel.so.1",
        "xenevtchn_": "libxenevtchn.so.1",
        "xentoolcore_": "libxentoolcore.so.1",
        "free": None,
        "prctl": None,
        "statx": None,
    }
    for function in FUNCTIONS:
        (soname,) = (soname for prefix, soname in libraries.items() if function.startswith(prefix))
        assert getattr(declared.dlopen(soname), function)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root folder of a Xen 4.17 host; its ``lib`` has libraries that print their calls."""
    root = tmp_path_factory.mktemp("root")
    for path, text in (("type", "xen"), ("version/major", "4"), ("version/minor", "17")):
        (root / "sys/hypervisor" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/hypervisor" / path).write_text(text + "\n")
    (root / "dev/xen").mkdir(parents=True)
    (root / "dev/xen/privcmd").touch()
    (root / "lib").mkdir()
    names = ("xenctrl.so.4.17", "xenforeignmemory.so.1", "xenstore.so.4", "xendevicemodel.so.1", "xenevtchn.so.1")
    for soname in (*(f"lib{name}" for name in names), "libxentoolcore.so.1"):
        command = ["gcc", "-std=gnu11", "-shared", "-fPIC", "-Wall", "-Werror", str(STAND_IN)]
        subprocess.run([*command, f"-Wl,-soname,{soname}", "-o", str(root / "lib" / soname)], check=True)
    return root


def run(root: Path, statement: str, **fail: str | int) -> list[str]:
    """Run a statement with a Xen ``x`` and a Xenstore ``s``; return the output of the libraries and the statement."""
    code = (
        "import sys\n"
        "from nvdimm_driver.errors import XenError\n"
        "from nvdimm_driver.xen.libxenctrl import HAP, Xen\n"
        "from nvdimm_driver.xen.xenstore import Xenstore\n"
        "try:\n"
        "    with Xen(sys.argv[1]) as x, Xenstore() as s:\n"
        f"        print('=', {statement}, flush=True)\n"
        "except XenError as error:\n"
        "    print('!', error)\n"
    )
    env = {**os.environ, "LD_LIBRARY_PATH": str(root / "lib"), **{name: str(value) for name, value in fail.items()}}
    done = subprocess.run([sys.executable, "-c", code, str(root)], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


OPEN = ["xc_interface_open(0)", "xs_open(0)"]
CLOSE = ["xs_close()", "xc_interface_close()"]

CALLS = [
    ("x.iomem_permission(7, 0x140000, 512, True)", "xc_domain_iomem_permission(7, 0x140000, 512, 1)", "None"),
    ("x.iomem_permission(7, 0x140000, 512, False)", "xc_domain_iomem_permission(7, 0x140000, 512, 0)", "None"),
    (
        "x.memory_mapping(7, 0x100000, 0x123456789, 5, True)",
        "xc_domain_memory_mapping(7, 0x100000, 0x123456789, 5, 1)",
        "None",
    ),
    ("x.memory_mapping(7, 1, 2, 3, False)", "xc_domain_memory_mapping(7, 0x1, 0x2, 3, 0)", "None"),
    ("x.paging_pool(7)", "xc_get_paging_mempool_size(7)", str(5 << 32)),
    ("x.set_paging_pool(7, 6 << 32)", f"xc_set_paging_mempool_size(7, {6 << 32})", "None"),
    ("x.pin_memory_cacheattr(7, 16, 4, 6)", "xc_domain_pin_memory_cacheattr(7, 0x10, 0x13, 6)", "True"),
    ("x.machine_memory_map()", "xc_get_machine_memory_map(1024)", "[(0, 654336, 1), (5368709120, 1073741824, 12)]"),
    ("x.platform_capabilities() & HAP", "xc_physinfo()", "8"),
    ("x.command_line()", "xc_version(9)", "dom0_mem=4G mmio-relax"),
    ("x.has_hap(7)", "xc_domain_getinfolist(7, 1)", "True"),
    ("x.capabilities()", "xc_version(3)", "xen-3.0-x86_64 hvm-3.0-x86_64"),
    ("x.maximum_gfn(7)", "xc_domain_maximum_gpfn(7)", str(0xFEFFF)),
    (
        "x.populate_physmap_exact(7, 0xFD001, 3)",
        "xc_domain_populate_physmap_exact(7, 3, 0, 0: 0xfd001 0xfd002 0xfd003)",
        "None",
    ),
    ("s.write('/a/b', 'ä')", "xs_write(0, /a/b, ä, 2)", "None"),
    ("s.read('/a/b')", "xs_read(0, /a/b)", "value of /a/b"),
    ("s.names('/a/b')", "xs_directory(0, /a/b)", "['one', 'two']"),
]


@pytest.mark.parametrize(("statement", "call", "answer"), CALLS)
def test_a_call_arrives_with_its_arguments_and_its_answer_comes_back(
    stand_ins: Path, statement: str, call: str, answer: str
) -> None:
    assert run(stand_ins, statement) == [*OPEN, call, f"= {answer}", *CLOSE]


def test_guest_memory_is_mapped_by_page_and_unmapped(stand_ins: Path) -> None:
    said = run(stand_ins, "x.write_memory(7, 0xFD001FFE, b'abcd'), x.read_memory(7, 0xFD001FFF, 2)")
    both = "xenforeignmemory_map(7, {}, 2: 0xfd001 0xfd002)"
    unmapped = "xenforeignmemory_unmap(2)"
    assert said == [*OPEN, both.format(3), unmapped, both.format(1), unmapped, "= None b'bc'", *CLOSE]


@pytest.mark.parametrize(
    ("statement", "function", "error", "says"),
    [
        (
            "x.iomem_permission(7, 0x140000, 512, True)",
            "xc_domain_iomem_permission",
            "EPERM",
            "mfn 0x140000, 512 frames",
        ),
        ("x.memory_mapping(7, 1, 2, 3, True)", "xc_domain_memory_mapping", "EINVAL", "gfn 0x1, mfn 0x2, 3 frames, add"),
        ("x.memory_mapping(7, 1, 2, 3, True)", "xc_domain_memory_mapping", "EINVAL", "xl dmesg"),
        ("x.set_paging_pool(7, 4096)", "xc_set_paging_mempool_size", "ENOMEM", "domain 7, 4 KiB"),
        ("x.populate_physmap_exact(7, 9, 2)", "xc_domain_populate_physmap_exact", "EBUSY", "gfn 0x9, 2 frames"),
        ("x.maximum_gfn(7)", "xc_domain_maximum_gpfn", "EPERM", "domain 7"),
        ("x.has_hap(7)", "xc_domain_getinfolist", "EPERM", "domain 7"),
        ("x.pin_memory_cacheattr(7, 1, 1, 6)", "xc_domain_pin_memory_cacheattr", "ENOMEM", "gfn 0x1"),
        ("x.read_memory(7, 4096, 1)", "xenforeignmemory_map", "ENOENT", "domain 7, gfn 0x1, 1 pages"),
        ("x.machine_memory_map()", "xc_get_machine_memory_map", "EINVAL", "1024 entries"),
        ("None", "xc_interface_open", "EACCES", "only root"),
        ("None", "xs_open", "ECONNREFUSED", "start xenstored"),
        ("s.read('/a')", "xs_read", "EACCES", "/a"),
        ("s.names('/a')", "xs_directory", "EACCES", "/a"),
        ("s.write('/a', 'b')", "xs_write", "EACCES", "/a"),
    ],
)
def test_a_call_that_fails_says_which_why_and_with_what(
    stand_ins: Path, statement: str, function: str, error: str, says: str
) -> None:
    (line,) = (
        line for line in run(stand_ins, statement, FAIL=function, ERRNO=getattr(errno, error)) if line.startswith("!")
    )
    assert line.startswith(f"! {function}: {error} (")
    assert says in line


def test_a_domain_that_libxc_does_not_find_has_an_errno_all_the_same(stand_ins: Path) -> None:
    """Then libxc returns -EINVAL and leaves errno alone."""
    statement = "x.memory_mapping(7, 1, 2, 3, False)"
    said = run(stand_ins, statement, FAIL="xc_domain_memory_mapping", ERRNO=0)
    assert said[-1].startswith("! xc_domain_memory_mapping: EINVAL ("), said


@pytest.mark.parametrize("statement", ["x.iomem_permission(7, 1, 2, True)", "x.paging_pool(7)"])
def test_eaccess_is_a_library_that_does_not_fit_the_hypervisor(stand_ins: Path, statement: str) -> None:
    function = {"x.i": "xc_domain_iomem_permission", "x.p": "xc_get_paging_mempool_size"}[statement[:3]]
    said = run(stand_ins, statement, FAIL=function, ERRNO=errno.EACCES)
    assert any("libxenctrl.so.4.17 does not match the Xen 4.17 that is running" in line for line in said)


@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP", "EINVAL", "ENOSPC", "EBUSY", "ENOENT"])
def test_a_refused_memory_type_is_an_answer(stand_ins: Path, error: str) -> None:
    said = run(
        stand_ins,
        "x.pin_memory_cacheattr(7, 1, 1, 6)",
        FAIL="xc_domain_pin_memory_cacheattr",
        ERRNO=getattr(errno, error),
    )
    assert "= False" in said


def test_another_domain_is_not_taken_for_one_that_is_gone(stand_ins: Path) -> None:
    (line,) = (line for line in run(stand_ins, "x.has_hap(6)") if line.startswith("!"))
    assert line.startswith("! xc_domain_getinfolist: ESRCH (")


def test_a_domain_that_is_gone(stand_ins: Path) -> None:
    assert "= None" in run(stand_ins, "x.maximum_gfn(7)", FAIL="xc_domain_maximum_gpfn", ERRNO=errno.ESRCH)


def test_a_path_that_is_not_in_xenstore(stand_ins: Path) -> None:
    assert "= None" in run(stand_ins, "s.read('/a')", FAIL="xs_read", ERRNO=errno.ENOENT)
    assert "= []" in run(stand_ins, "s.names('/a')", FAIL="xs_directory", ERRNO=errno.ENOENT)


def test_a_mapping_with_a_page_missing_is_an_error_and_unmapped(stand_ins: Path) -> None:
    said = run(stand_ins, "x.write_memory(7, 0xFD001000, bytes(9000))", MISSING=2)
    assert said[3] == "xenforeignmemory_unmap(3)"
    assert said[-1].startswith("! xenforeignmemory_map: ENOENT (")
    assert "1 not mapped, first gfn 0xfd003" in said[-1]


def serve(root: Path, tmp_path: Path, slots: Sequence[bytes], **fail: str | int) -> list[str]:
    """Serve these requests as an ioreq server of domain 7; return the output of the libraries and the server."""
    (tmp_path / "slots").write_bytes(b"".join(slots))
    (tmp_path / "slots.page").write_bytes(bytes(4096))
    code = (
        "from nvdimm_driver.errors import XenError\n"
        "from nvdimm_driver.xen.ioreq import IoreqServer\n"
        "try:\n"
        "    server = IoreqServer(7)\n"
        "    server.take_over(server.create(), 0xA18, 0xA1B)\n"
        "    server.restrict()\n"
        "    print('serving', flush=True)\n"
        "    server.serve(lambda *written: print('written', *map(hex, written), flush=True), 0.1)\n"
        "except XenError as error:\n"
        "    print('!', error)\n"
    )
    env = {**os.environ, "LD_LIBRARY_PATH": str(root / "lib"), "SLOTS": str(tmp_path / "slots")}
    env |= {name: str(value) for name, value in fail.items()}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def slot(address: int, data: int, size: int = 4, state: int = 1, kind: int = 0, bits: int = 0) -> bytes:
    """Return a request as Xen writes it (xen/include/public/hvm/ioreq.h)."""
    return struct.pack("<QQIIIHBB", address, data, 1, size, 6, 0, state | bits, kind)


def test_an_ioreq_server_takes_over_and_answers_what_was_begun(stand_ins: Path, tmp_path: Path) -> None:
    opened, _, answers = split_at_serving(serve(stand_ins, tmp_path, []))
    assert opened == [
        *("xendevicemodel_open(0)", "xenforeignmemory_open(0)", "xenevtchn_open(0)"),
        "xendevicemodel_create_ioreq_server(7, 0)",
        "xenforeignmemory_map_resource(7, 0, 3, 1, 1, 3, 0)",
        "xendevicemodel_map_io_range_to_ioreq_server(7, 3, 0, 0xa18, 0xa1b)",
        "xendevicemodel_set_ioreq_server_state(7, 3, 1)",
        *("xenevtchn_bind_interdomain(7, 5)", "xenevtchn_bind_interdomain(7, 6)"),
        "xentoolcore_restrict_all(7)",
    ]
    assert answers[0] == "written 0x0 0x0 0x0"
    assert answers[1] == "xenevtchn_notify(106: state 3, type 0, data 0)"


def split_at_serving(lines: list[str]) -> tuple[list[str], str, list[str]]:
    at = lines.index("serving")
    return lines[:at], lines[at], lines[at + 1 :]


def test_ports_that_are_mapped_already_are_no_error(stand_ins: Path, tmp_path: Path) -> None:
    function = "xendevicemodel_map_io_range_to_ioreq_server"
    assert "serving" in serve(stand_ins, tmp_path, [], FAIL=function, ERRNO=errno.EEXIST)
    assert "serving" not in serve(stand_ins, tmp_path, [], FAIL=function, ERRNO=errno.EPERM)


@pytest.mark.parametrize(
    "function",
    [
        *("xendevicemodel_open", "xenforeignmemory_open", "xenevtchn_open", "xendevicemodel_create_ioreq_server"),
        *("xenforeignmemory_map_resource", "xendevicemodel_set_ioreq_server_state", "xenevtchn_bind_interdomain"),
        *("xentoolcore_restrict_all", "xenevtchn_notify"),
    ],
)
def test_what_xen_refuses_ends_the_ioreq_server(stand_ins: Path, tmp_path: Path, function: str) -> None:
    said = serve(stand_ins, tmp_path, [], FAIL=function, ERRNO=errno.EPERM)
    assert said[-1].startswith(f"! {function}: EPERM")


@pytest.mark.parametrize(
    ("request_", "answers"),
    [
        (slot(0xA18, 0xFD000000), ["written 0xa18 0x4 0xfd000000", "state 3, type 0, data 0xfd000000"]),
        (slot(0xA19, 0x1FF, 1), ["written 0xa19 0x1 0x1ff", "state 3, type 0, data 0x1ff"]),
        (slot(0xA18, 7, bits=0x20), ["state 3, type 0, data 0"]),
        (slot(0xA18, 0xFD000000, bits=0x10), ["state 3, type 0, data 0xfd000000"]),
        (slot(0xA18, 7, bits=0x30), ["state 3, type 0, data 0x7"]),
        (slot(0, 0, kind=8), ["state 3, type 8, data 0"]),
        (slot(0xFD000000, 9, kind=1), ["state 3, type 1, data 0x9"]),
        (slot(0xA18, 1, state=0), []),
        (slot(0xA18, 1, state=3), []),
    ],
)
def test_each_kind_of_request_gets_its_answer(
    stand_ins: Path, tmp_path: Path, request_: bytes, answers: list[str]
) -> None:
    _, _, said = split_at_serving(serve(stand_ins, tmp_path, [request_]))
    wanted = [f"xenevtchn_notify(106: {each})" if each.startswith("state") else each for each in answers]
    assert said[2:-1] == wanted
    assert said[-1].startswith("! xenevtchn_pending: ENODATA")


def test_no_request_ends_it(stand_ins: Path, tmp_path: Path) -> None:
    """Each slot that is ready gets an answer, whatever else it contains."""
    random = Random(1)
    slots = [random.randbytes(32) for _ in range(5000)]
    ready = sum(each[30] & 0xF == 1 for each in slots)
    _, _, said = split_at_serving(serve(stand_ins, tmp_path, slots))
    assert sum(line.startswith("xenevtchn_notify(106: state 3,") for line in said[2:]) == ready > 100
    assert said[-1].startswith("! xenevtchn_pending: ENODATA")
