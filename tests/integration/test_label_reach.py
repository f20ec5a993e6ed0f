# SPDX-License-Identifier: Apache-2.0
"""What a label server, and so its QEMU, still reaches of the host without AppArmor: each way is tried by a real one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.labels import root_folder
from nvdimm_driver.labels.confinement import end_processes, uid_of
from tests.integration.test_dsm_qemu import PLAIN_QEMU, XEN_QEMU
from tests.waiting import HANG_SECONDS

DOMID = 32011
PRELUDE = """
import json, os, socket, sys
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.labels.confinement import become, isolate, uid_of
from nvdimm_driver.labels.qemu import QemuLabels
from tests.integration.test_dsm_qemu import AREAS, LAYOUT
from tests.unit.doubles import MemoryBytes
words = sys.argv[1:]
"""
REACH = """
folder, other, attempts = words[0], int(words[1]), json.loads(words[2])
isolate(["/usr/bin/true"])
become(uid_of(%d))
found = {}
for what, code in attempts.items():
    try:
        eval(code)
    except OSError as error:
        found[what] = error.errno
    else:
        found[what] = 0
print(json.dumps(found))
"""
SERVE = """
import struct
areas = {slot: MemoryBytes(bytes(size)) for slot, size in AREAS.items()}
labels = QemuLabels(LAYOUT, areas, words[:1], confined=True)
isolate(labels.programs)
become(uid_of(%d))
try:
    labels.start()
    request = struct.pack("<III", 1, 1, 4).ljust(4096, b"\\0")
    print(struct.unpack_from("<III", labels.answer(request))[1:])
    labels._stop(NvdimmError("as if it had died"))
    print(struct.unpack_from("<III", labels.answer(request))[1:])
except NvdimmError as error:
    print(error)
"""
ATTEMPTS = {
    "read a file that all may read": "open(f'{folder}/readable.conf').read()",
    "list what the host keeps": "os.listdir('/var')",
    "list its devices and kernel objects": "os.listdir('/sys')",
    "connect to a socket that all may use": "socket.socket(socket.AF_UNIX).connect(f'{folder}/sock')",
    "connect to an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0of the test' + str(other))",
    "use the network": "socket.socket().connect(('127.0.0.1', 22))",
    "write to its root": "open('/x', 'w')",
    "write to a folder of programs": "open('/usr/x', 'w')",
    "write to memory that all share": "open('/dev/shm/x', 'w')",
    "read the command of a process": "open(f'/proc/{other}/cmdline').read()",
    "read the command of the first process": "open('/proc/1/cmdline').read()",
    "read what all of /proc says": "open('/proc/mounts').read() and open('/proc/cmdline').read()",
    "signal a process": "os.kill(other, 0)",
    "make a device": "os.mknod('/dev/x', 0o20666, os.makedev(1, 1))",
    "leave by the root's parent": "open('/../../..' + folder + '/readable.conf')",
    "make a folder": "os.mkdir('/folder')",
}


def run(code: str, *words: str | Path) -> str:
    """Run code of a label server as root; return what it prints."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PRELUDE + code % DOMID, *map(str, words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=HANG_SECONDS)
    finally:
        end_processes(uid_of(DOMID))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that all users may enter, with a file and a socket that they may use."""
    made = Path(f"/tmp/label-reach-{os.getpid()}")
    made.mkdir(mode=0o755)
    (made / "readable.conf").write_text("of the host")
    (made / "readable.conf").chmod(0o644)
    yield made
    shutil.rmtree(made)


def test_it_reaches_no_file_no_socket_no_process_and_no_network(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract:
        named.bind(f"{folder}/sock")
        (folder / "sock").chmod(0o777)
        with subprocess.Popen(["sleep", "infinity"]) as other:
            abstract.bind(f"\0of the test{other.pid}")
            for each in (named, abstract):
                each.listen()
            try:
                found = json.loads(run(REACH, folder, str(other.pid), json.dumps(ATTEMPTS)))
            finally:
                other.kill()
    assert [what for what, number in found.items() if not number] == []
    assert found.keys() == ATTEMPTS.keys()


SERVED = "(0, 131072)\n(0, 131072)\n"
"""Status, and size of the label area: from one QEMU, and from the one that follows it."""


@pytest.mark.parametrize("qemu", [XEN_QEMU, PLAIN_QEMU], ids=["xen", "plain"])
def test_a_qemu_of_the_distribution_serves_there(qemu: str) -> None:
    assert run(SERVE, qemu) == SERVED


def test_a_qemu_at_another_place_serves_there(folder: Path) -> None:
    """The path is a link to a wrapper, as in a store of packages, and the program is in a folder beside that."""
    for name in ("link", "prefix/bin", "prefix/libexec"):
        (folder / name).mkdir(parents=True)
    program, wrapper = folder / "prefix/libexec/.qemu", folder / "prefix/bin/qemu"
    shutil.copy(os.path.realpath(XEN_QEMU), program)
    wrapper.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    wrapper.chmod(0o755)
    (folder / "link/qemu").symlink_to(wrapper)
    assert run(SERVE, folder / "link/qemu") == SERVED


def test_a_qemu_that_needs_what_is_not_there_is_named(folder: Path) -> None:
    (folder / "bin").mkdir()
    (folder / "elsewhere").mkdir()
    wrapper = folder / "bin/qemu"
    shutil.copy(os.path.realpath(XEN_QEMU), folder / "elsewhere/qemu")
    wrapper.write_text(f'#!/bin/sh\nexec {folder}/elsewhere/qemu "$@"\n')
    wrapper.chmod(0o755)
    said = run(SERVE, wrapper)
    assert f"{folder}/elsewhere/qemu: not found" in said
    assert str(wrapper) in said
    assert "a label server sees /usr, its QEMU and" in said


def test_the_packages_of_a_store_are_shown_with_what_they_need(tmp_path: Path) -> None:
    assert [*root_folder._needed(["/nix/store/abc-qemu/bin/qemu"])][:1] == ["/nix/store"]
    assert [*root_folder._needed(["/srv/q/qemu"])][:1] == ["/srv/q/qemu"]
    assert str(tmp_path) not in root_folder._needed([f"{tmp_path}/qemu"]), "not the whole folder of a single file"


def test_it_does_not_run_where_it_cannot_be_kept_from_the_host() -> None:
    code = "\nos.setresuid(%d, 7, 7)\ntry:\n    isolate([])\nexcept NvdimmError as error:\n    print(error)\n"
    said = run(code)
    assert said.startswith("a label server cannot be kept from the host's files and network: ")
    assert "Operation not permitted" in said
