# SPDX-License-Identifier: Apache-2.0
"""nvdimmctl's commands about bytes, as an operator runs them, on real ext4 and XFS."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nvdimm_driver.backing import extents
from nvdimm_driver.model import KIB, MIB, Allocation, NvdimmSpec
from nvdimm_driver.state import owner_marks
from nvdimm_driver.state.ledger import Ledger
from tests.integration.loop_backing import LoopBacking
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.ledger_copies import forget_in_use
from tests.unit.doubles import UUID
from tests.unit.label_areas import area_with_namespaces, cookie
from tests.waiting import HANG_SECONDS

PROJECT = Path(__file__).resolve().parents[2]
NVDIMMCTL = Path(sys.executable).with_name("nvdimmctl")
SIZE = 16 * MIB
LABEL = 128 * KIB
CONF = """
[DEFAULT]
state_dir = {state}
[xen]
mapper = dry-run
[acpi]
builder = native
[pool:main]
paths = {root}
wipe_on_release = {wipe}
[libvirt]
definition_dirs = {state}
"""


class Operator:
    """An operator who runs nvdimmctl on a host with one pool, which is the file system."""

    def __init__(self, fs: FileSystem, folder: Path, *, wipe: bool = False) -> None:
        self.fs = fs
        self.folder = folder
        self.state = fs.memory / "state"
        for each in (self.state, folder / "packages/bench-1.dist-info"):
            each.mkdir(parents=True, exist_ok=True)
        for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "steps"):
            (self.state / name).unlink(missing_ok=True)
        forget_in_use(self.state)
        (folder / "conf").write_text(CONF.format(state=self.state, root=fs.root, wipe=wipe))
        info = folder / "packages/bench-1.dist-info"
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench\nVersion: 1\n")
        entry = "[nvdimm_driver.backings]\nbench = tests.integration.loop_backing:LoopBacking\n"
        (info / "entry_points.txt").write_text(entry)
        self.environment = {**os.environ, "PYTHONPATH": f"{folder}/packages:{PROJECT}"}

    def command(self, *words: object) -> list[str]:
        return [str(NVDIMMCTL), "--config-file", str(self.folder / "conf"), *map(str, words)]

    def run(self, *words: object, status: int = 0, text: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words), input=text, capture_output=True, text=True, env=self.environment, check=False
        )
        assert done.returncode == status, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    def interrupt(self, *words: object, steps: int) -> str:
        """Run a command, slowly, press Ctrl-C after so many steps, and return its stderr."""
        marks = self.state / "steps"
        marks.write_bytes(b"")
        with subprocess.Popen(
            self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        ) as process:
            deadline = time.monotonic() + HANG_SECONDS
            while marks.stat().st_size < steps:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, said = process.communicate(timeout=HANG_SECONDS)
        marks.unlink()
        assert (process.returncode, out) == (130, "")
        assert "Traceback" not in said
        return said

    def ledger(self) -> Ledger:
        return Ledger(str(self.state / "ledger.sqlite"))

    def claim(self, name: str = "db1", *paths: Path) -> None:
        """Record in the ledger that a domain owns these backings."""
        backing = LoopBacking(self.state.parent, self.state / "none")
        items = []
        for slot, path in enumerate(paths):
            spec = NvdimmSpec(slot, str(path), SIZE)
            items.append(Allocation(UUID, spec, backing.locate(spec).identity, (68 + slot) << 30))
        self.ledger().store(UUID, name, 1 << 30, items)

    def start(self, *paths: Path) -> None:
        """Record in the ledger that the domain is starting."""
        self.ledger().begin_start(UUID, [str(path) for path in paths])


@pytest.fixture(params=list(MKFS))
def operator(request: pytest.FixtureRequest, file_systems: dict[str, FileSystem], tmp_path: Path) -> Iterator[Operator]:
    yield Operator(file_systems[request.param], tmp_path)
    file_systems[request.param].clear()


def printed(text: str) -> tuple[str, int, int]:
    """Return path, size and label size of printed XML, which is the only output."""
    root = ElementTree.fromstring(text)
    assert (root.tag, root.attrib) == ("memory", {"model": "nvdimm", "access": "shared"})
    units = {"b": 1, "KiB": KIB, "MiB": MIB, "GiB": 1 << 30}
    sizes = {
        place: int(size.text or "") * units[size.attrib["unit"]]
        for place in ("target/size", "target/label/size")
        if (size := root.find(place)) is not None
    }
    return root.findtext("source/path", ""), sizes["target/size"], sizes.get("target/label/size", 0)


def written(path: Path) -> int:
    """Return the bytes of a file that are allocated and written."""
    with open(path, "rb") as file:
        found = extents.fiemap(file.fileno(), path.stat().st_size)
    return sum(each.length for each in found if not each.flags & extents.UNWRITTEN)


def fit(operator: Operator, path: Path, size: int = SIZE) -> bytes:
    """Return the bytes stored for a backing; it can be located, and so is complete."""
    return operator.fs.stored(operator.fs.backing.locate(NvdimmSpec(0, str(path), size)))


def test_provision_makes_a_backing_that_a_domain_can_have(operator: Operator) -> None:
    path = operator.fs.root / "new.img"
    done = operator.run("provision", "--pool", "main", "new.img", "--size", "16M")
    assert printed(done.stdout) == (str(path), SIZE, LABEL)
    advice = f"{path}: advice: Linux makes namespaces only in multiples of 16 MiB\n"
    assert done.stderr == advice, "no bar where there is no terminal"
    assert fit(operator, path) == bytes(SIZE)
    path.write_bytes(b"x" * SIZE)
    again = operator.run("provision", path, "--size", "16MiB", "--label-size", "0")
    assert printed(again.stdout) == (str(path), SIZE, 0)
    assert f"{path} exists already and keeps its contents" in again.stderr
    assert path.read_bytes() == b"x" * SIZE


def test_a_bar_on_a_terminal(operator: Operator) -> None:
    master, slave = pty.openpty()
    command = operator.command("provision", operator.fs.root / "a", "--size", "16M")
    environment = {**operator.environment, "TERM": "xterm", "COLUMNS": "200"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, env=environment, check=True, text=True)
    os.close(slave)
    said = os.read(master, 65536).decode()
    os.close(master)
    assert printed(done.stdout)[1] == SIZE
    assert "writing zeros" in said
    assert "16.0/16.0 MiB" in said


def test_an_interrupted_provision_goes_on(operator: Operator) -> None:
    path = operator.fs.root / "a"
    words = ("provision", path, "--size", "64M")
    said = operator.interrupt(*words, steps=3)
    assert f"{path}: interrupted, writing zeros: " in said
    assert "of 64 MiB done (repeat the command to continue from there)" in said
    already = written(path)
    assert 8 * MIB <= already < 64 * MIB
    with open(path, "r+b") as file:
        file.write(b"mark")
    operator.run(*words)
    assert fit(operator, path, 64 * MIB) == b"mark".ljust(64 * MIB, b"\0"), "what was written is not written again"


def test_an_interruption_before_the_first_byte_leaves_nothing(operator: Operator) -> None:
    with subprocess.Popen(
        operator.command("provision", operator.fs.root / "a", "--size", "64M"),
        stderr=subprocess.PIPE,
        text=True,
        env=operator.environment,
    ) as process:
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=HANG_SECONDS)
    assert process.returncode != 0
    assert not (operator.fs.root / "a").exists()


def test_a_file_of_kvm_is_adopted_where_it_is(operator: Operator) -> None:
    """The file is sparse, as QEMU makes it, and has labels."""
    path = operator.fs.root / "kvm.img"
    data = os.urandom(MIB)
    with open(path, "wb") as file:
        os.truncate(path, SIZE)
        os.pwrite(file.fileno(), data, 4 * MIB)
        os.pwrite(file.fileno(), area_with_namespaces(256 * KIB, cookie(3)), SIZE - 256 * KIB)
    content = path.read_bytes()
    done = operator.run("import", path)
    assert "<address type='dimm' slot='3'/>" in done.stdout
    assert printed(done.stdout) == (str(path), SIZE, 256 * KIB)
    assert fit(operator, path) == content
    assert printed(operator.run("import", path, "--label-size", "0").stdout) == (str(path), SIZE, 0)


def source_of(operator: Operator, size: int = SIZE) -> Path:
    """Make a sparse file on another file system, with labels."""
    path = operator.folder / "source.img"
    with open(path, "wb") as file:
        os.truncate(path, size)
        os.pwrite(file.fileno(), os.urandom(3 * MIB), MIB)
        os.pwrite(file.fileno(), os.urandom(MIB), size - 2 * MIB)
        os.pwrite(file.fileno(), area_with_namespaces(LABEL, 12345), size - LABEL)
    return path


def test_a_file_from_elsewhere_is_copied(operator: Operator) -> None:
    source = source_of(operator)
    for words, name in (((), "source.img"), (("--pool", "main", "--name", "other"), "other")):
        done = operator.run("import", source, *words)
        assert printed(done.stdout) == (f"{operator.fs.root}/{name}", SIZE, LABEL)
        assert "made on another make of NVDIMM, and in slot 0 the guest finds none of its namespaces" in done.stderr
        assert fit(operator, operator.fs.root / name) == source.read_bytes()
        assert (operator.fs.root / name).stat().st_mode & 0o7777 == 0o600
    assert {path.name for path in operator.fs.files()} == {"source.img", "other"}
    assert "exists already" in operator.run("import", source, status=5).stderr


@pytest.mark.parametrize(("steps", "what"), [(5, "copying"), (18, "writing zeros"), (24, "verifying")])
def test_an_interrupted_import_goes_on(operator: Operator, steps: int, what: str) -> None:
    source = source_of(operator)
    said = operator.interrupt("import", source, steps=steps)
    assert f"{source}: interrupted, {what}" in said
    assert [path.name for path in operator.fs.files()] == [".source.img.partial"]
    operator.run("import", source)
    assert [path.name for path in operator.fs.files()] == ["source.img"]
    assert fit(operator, operator.fs.root / "source.img") == source.read_bytes()


def test_a_partial_import_of_something_else_is_no_beginning(operator: Operator) -> None:
    source = source_of(operator, 32 * MIB)
    operator.interrupt("import", source, steps=5)
    source = source_of(operator)
    operator.run("import", source)
    assert (operator.fs.root / "source.img").read_bytes() == source.read_bytes()


def test_other_formats_are_refused(operator: Operator) -> None:
    image = operator.folder / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "16M")
    said = operator.run("import", image, status=1).stderr
    assert "qemu-img convert -f qcow2 -O raw" in said
    assert operator.fs.files() == []


def test_export_gives_the_same_bytes_sparsely(operator: Operator) -> None:
    path, copy = operator.fs.root / "a", operator.folder / "copy"
    path.write_bytes(source_of(operator).read_bytes())
    operator.claim("db:1", path)
    done = operator.run("export", "db:1", copy)
    assert done.stdout == f"{sha256(path.read_bytes()).hexdigest()}  {copy}\n"
    assert done.stdout == run("sha256sum", copy)
    assert copy.read_bytes() == path.read_bytes()
    assert copy.stat().st_blocks * 512 < 8 * MIB
    assert "exists already" in operator.run("export", "db:1:0", copy, status=5).stderr
    operator.run("export", path, copy, "--force")
    assert copy.read_bytes() == path.read_bytes()


def test_an_export_to_a_full_disk_goes_on_when_there_is_room(operator: Operator) -> None:
    path, small = operator.fs.root / "a", operator.folder / "small"
    path.write_bytes(os.urandom(SIZE))
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8M", "none", small)
    try:
        said = operator.run("export", path, small / "copy", status=1).stderr
        assert f"{small / 'copy'}: No space left on device (make room" in said
        run("mount", "-o", "remount,size=32M", small)
        operator.run("export", path, small / "copy")
        assert (small / "copy").read_bytes() == path.read_bytes()
    finally:
        run("umount", small)


def test_an_interrupted_export_goes_on(operator: Operator) -> None:
    path, copy = operator.fs.root / "a", operator.folder / "copy"
    path.write_bytes(os.urandom(SIZE))
    said = operator.interrupt("export", path, copy, steps=5)
    assert "interrupted, copying: " in said
    assert not copy.exists()
    partial = operator.folder / ".copy.export"
    assert partial.stat().st_size == SIZE
    assert 0 < partial.stat().st_blocks * 512 < SIZE
    operator.run("export", path, copy)
    assert copy.read_bytes() == path.read_bytes()
    assert not partial.exists()


def test_an_export_of_a_domain_is_of_what_the_domain_has(operator: Operator) -> None:
    """The destination may be the only good copy: nothing else than the domain's bytes replaces it."""
    path, other, copy = operator.fs.root / "a", operator.fs.root / "b", operator.folder / "copy"
    for each in (path, other):
        each.write_bytes(os.urandom(SIZE))
    good = path.read_bytes()
    operator.claim("db1", path)
    operator.run("export", "db1", copy)
    other.replace(path)
    assert "is not the backing that was provisioned" in operator.run("export", "--force", "db1", copy, status=1).stderr
    assert copy.read_bytes() == good
    operator.run("export", "--force", path, copy)  # by its path, what is there
    assert copy.read_bytes() == path.read_bytes()


def test_an_export_by_path_is_the_domains_nvdimm(operator: Operator) -> None:
    """The file may be larger: with all of it, the labels would not be at the end of the copy."""
    path, copy = operator.fs.root / "a", operator.folder / "copy"
    path.write_bytes(os.urandom(SIZE + 2 * MIB))
    operator.claim("db1", path)
    operator.run("export", path, copy)
    assert copy.read_bytes() == path.read_bytes()[:SIZE]


def import_into_another_pool(operator: Operator, path: Path, status: int) -> subprocess.CompletedProcess[str]:
    """Have a file of the pool copied into another one."""
    conf, other = operator.folder / "conf", operator.folder / "other"
    other.mkdir()
    before = conf.read_text()
    conf.write_text(f"{before}[pool:other]\npaths = {other}\n")
    try:
        return operator.run("import", path, "--pool", "other", status=status)
    finally:
        conf.write_text(before)


def test_a_running_domain_keeps_what_it_has(operator: Operator) -> None:
    path, copy = operator.fs.root / "a", operator.folder / "copy"
    path.write_bytes(os.urandom(SIZE))
    operator.claim("db1", path)
    operator.start(path)
    refused: tuple[tuple[object, ...], ...] = (
        ("export", "db1", copy),
        ("export", path, copy),
        ("wipe", "--yes", "db1"),
        ("wipe", "--yes", path),
        ("release", "--yes", "db1"),
        ("release", "--yes", "--delete", "db1"),
    )
    for words in refused:
        assert "db1 is running or starting" in operator.run(*words, status=4).stderr
    for words in (("provision", path, "--size", "16M"), ("import", path)):
        assert f"{path} belongs to domain db1" in operator.run(*words, status=4).stderr
    refusal = import_into_another_pool(operator, path, 4).stderr
    assert "db1 is running or starting" in refusal
    assert "nvdimmctl export --running" in refusal
    assert "db1 is running or starting" in operator.run("export", "--force", "db1", copy, status=4).stderr
    assert "--running" in operator.run("export", "db1", copy, status=4).stderr
    done = operator.run("export", "--running", "db1", copy)
    assert "a domain was running with it: the copy may have" in done.stderr
    assert "exists already" in operator.run("export", "--running", "db1", copy, status=5).stderr
    operator.run("export", "--running", "--force", "db1", copy)
    assert copy.read_bytes() == path.read_bytes()


def test_wipe_makes_zeros_and_keeps_the_claim(operator: Operator) -> None:
    one, two = operator.fs.root / "a", operator.fs.root / "b"
    for path in (one, two):
        path.write_bytes(os.urandom(SIZE))
    operator.claim("db1", one, two)
    before = operator.ledger().domains()
    asked = operator.run("wipe", "db1", text="n\n", status=1)
    assert f"{one}, {two} (of domain db1) with zeros? [y/N]" in asked.stderr
    assert one.read_bytes() != bytes(SIZE)
    assert operator.run("wipe", "db1", "--slot", "1", text="y\n").stdout == f"{two} is all zeros\n"
    assert fit(operator, two) == bytes(SIZE)
    assert one.read_bytes() != bytes(SIZE)
    operator.run("wipe", "--yes", one)
    assert fit(operator, one) == bytes(SIZE)
    assert operator.ledger().domains() == before


def test_a_wipe_of_what_no_domain_has(operator: Operator) -> None:
    """A domain that is off has it as much as one that runs, also if only the file's mark says so."""
    free, owned, marked = (operator.fs.root / name for name in ("free", "owned", "marked"))
    for path in (free, owned, marked):
        path.write_bytes(os.urandom(SIZE))
    operator.claim("db1", owned)
    record = operator.ledger().domains()[0]
    lost = replace(record, uuid="7c7b0e2e-4a6e-4f0e-9a3b-0000000000cc", name="db2")
    operator.fs.backing.mark(str(marked), owner_marks.pack(lost, lost.allocations[0]))
    for path, whose in ((owned, "belongs to domain db1"), (marked, "has the mark of domain db2")):
        before = path.read_bytes()
        assert whose in operator.run("wipe", "--yes", "--unclaimed", path, status=4).stderr
        assert path.read_bytes() == before
    assert operator.run("wipe", "--yes", "--unclaimed", free).stdout == f"{free} is all zeros\n"
    assert fit(operator, free) == bytes(SIZE)


def test_an_interrupted_wipe_goes_on(operator: Operator) -> None:
    path = operator.fs.root / "a"
    path.write_bytes(os.urandom(SIZE))
    said = operator.interrupt("wipe", "--yes", path, steps=5)
    assert f"{path}: interrupted, wiping: " in said
    assert path.read_bytes()[: 3 * MIB] == bytes(3 * MIB)
    assert path.read_bytes()[-MIB:] != bytes(MIB)
    operator.run("wipe", "--yes", path)
    assert fit(operator, path) == bytes(SIZE)


def test_a_domain_that_lacks_a_backing_is_not_one_that_there_is_not(operator: Operator) -> None:
    """A caller that takes status 3 for "nothing to wipe" would give the second backing's bytes to others."""
    one, two = operator.fs.root / "one", operator.fs.root / "two"
    for path in (one, two):
        operator.run("provision", path, "--size", "16M")
    operator.claim("db1", one, two)
    one.unlink()
    assert f"{one}: there is no such file" in operator.run("wipe", "--yes", UUID, status=1).stderr
    assert "no domain 'db2'" in operator.run("wipe", "--yes", "db2", status=3).stderr


def test_a_line_for_each_tenth_that_is_wiped(operator: Operator) -> None:
    path = operator.fs.root / "a.img"
    operator.run("provision", path, "--size", "20M")
    lines = operator.run("wipe", "--yes", "--progress", path).stderr.splitlines()
    assert lines == [f"{path}: wiping: {done} MiB of 20 MiB done" for done in range(2, 21, 2)]


def test_a_domain_does_not_start_while_it_is_wiped(operator: Operator) -> None:
    from nvdimm_driver.errors import InUseError

    path = operator.fs.root / "a"
    path.write_bytes(os.urandom(SIZE))
    with operator.fs.backing.open_bytes(NvdimmSpec(0, str(path), SIZE), write=True):
        assert "is being overwritten" in operator.run("wipe", "--yes", path, status=4).stderr
        with pytest.raises(InUseError, match="is being overwritten"):
            operator.fs.backing.freeze(str(path))
        assert "i" not in run("lsattr", path).split()[0]
    operator.fs.backing.freeze(str(path))
    assert "i" in run("lsattr", path).split()[0]


def test_release_with_wipe_on_release(operator: Operator) -> None:
    operator = Operator(operator.fs, operator.folder, wipe=True)
    path = operator.fs.root / "a"
    path.write_bytes(os.urandom(SIZE))
    operator.claim("db1", path)
    asked = operator.run("release", "db1", text="n\n", status=1)
    assert f"{path}: overwritten with zeros (wipe_on_release))? [y/N]" in asked.stderr
    said = operator.interrupt("release", "--yes", "db1", steps=5)
    assert "db1: interrupted, wiping" in said
    assert [record.name for record in operator.ledger().domains()] == ["db1"]
    done = operator.run("release", "--yes", "db1")
    assert "overwritten with zeros" in done.stdout
    assert operator.ledger().domains() == ()
    assert fit(operator, path) == bytes(SIZE)


def test_release_with_delete(operator: Operator) -> None:
    path = operator.fs.root / "a"
    path.write_bytes(content := os.urandom(SIZE))
    operator.claim("db1", path)
    assert f"{path}: kept as it is" in operator.run("release", "--yes", "db1").stdout
    assert path.read_bytes() == content
    operator.claim("db1", path)
    assert f"{path}: deleted" in operator.run("release", "--yes", "--delete", "db1").stdout
    assert not path.exists()


def test_release_of_a_file_that_is_missing_says_so(operator: Operator) -> None:
    path = operator.fs.root / "a"
    path.write_bytes(bytes(SIZE))
    operator.claim("db1", path)
    path.unlink()
    assert f"{path}: missing" in operator.run("release", "--yes", "db1").stdout


def test_what_nova_is_told(operator: Operator) -> None:
    one, two = operator.fs.root / "ns0", operator.fs.root / "ns1"
    for path in (one, two):
        operator.run("provision", path, "--size", "16M", "--label-size", "2M")
    operator.claim("instance-1", one)
    operator.start(one)
    conf = operator.folder / "nova.conf"
    conf.write_text("[libvirt]\npmem_namespaces = 16MB:ns0, OTHER:main/ns1\n")
    listed = operator.run("nova", "inventory", "--nova-config", conf, "-f", "json").stdout
    first, second = json.loads(listed)
    assert first == {
        "Name": "ns0",
        "Label": "16MB",
        "Resource class": "CUSTOM_PMEM_NAMESPACE_16MB",
        "Pool": "main",
        "Path": str(one),
        "Size": 16 * MIB,
        "Align": 2 * MIB,
        "Domain": UUID,
    }
    assert (second["Name"], second["Path"], second["Domain"]) == ("main/ns1", str(two), "")
    values = ("--pmem-namespaces", "16MB:ns0,", "--pmem-namespaces", "OTHER:main/ns1")
    assert operator.run("nova", "inventory", *values, "-f", "json").stdout == listed
    assert "16 MiB" in operator.run("nova", "inventory", "--nova-config", conf, "-u").stdout


def test_what_nova_cannot_be_told(operator: Operator) -> None:
    with open(operator.fs.root / "sparse", "wb") as file:
        file.truncate(16 * MIB)
    with open(operator.fs.root / "fallocated", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 16 * MIB)
    for status, entry, says in (
        (1, "6gb:ns0", "'6gb' is not a label"),
        (3, "6GB:ns0", "there is no ns0 in pool main (nvdimmctl provision --pool main"),
        (1, "6GB:sparse", f"{operator.fs.root}/sparse: "),
        (1, "6GB:fallocated", "fallocated: is not provisioned: 16 MiB still to be written"),
    ):
        assert says in operator.run("nova", "inventory", "--pmem-namespaces", entry, status=status).stderr


def test_exit_statuses(operator: Operator) -> None:
    root, elsewhere = operator.fs.root, operator.folder / "file"
    (root / "a").write_bytes(os.urandom(SIZE))
    elsewhere.write_bytes(bytes(SIZE))
    operator.claim("db1", root / "a")
    for status, *words in (
        (2, "provision", root / "b"),
        (2, "provision", root / "b", "--size", "many"),
        (2, "provision", "--pool", "main", "a/b", "--size", "2M"),
        (3, "provision", "--pool", "none", "b", "--size", "2M"),
        (5, "provision", operator.folder / "b", "--size", "2M"),
        (1, "provision", root / "b", "--size", "2T"),
        (1, "provision", root / "b", "--size", "2M", "--label-size", "2M"),
        (2, "import"),
        (2, "import", root / "a", "--name", "b"),
        (3, "import", root / "none"),
        (3, "import", operator.folder / "none"),
        (1, "import", "/dev/null"),
        (2, "export", "db1"),
        (3, "export", "none", operator.folder / "x"),
        (3, "export", "db1:7", operator.folder / "x"),
        (3, "export", "db1", operator.folder / "none/x"),
        (5, "export", "db1", "/dev/null"),
        (2, "wipe"),
        (2, "wipe", "--slot", "1", root / "a"),
        (2, "wipe", "--yes", "--unclaimed", "db1"),
        (3, "wipe", "--yes", "none"),
        (3, "wipe", "--yes", "--slot", "7", "db1"),
        (3, "wipe", "--yes", root / "none"),
        (5, "wipe", "--yes", elsewhere),
        (3, "release", "--yes", "none"),
    ):
        done = operator.run(*words, status=status)
        assert done.stdout == "", words
        assert done.stderr, words
    assert {path.name for path in operator.fs.files()} == {"a"}


# --- names at their limits ---

DOMAIN = """<domain type='xen'><name>d</name><uuid>{uuid}</uuid><memory unit='MiB'>512</memory>
<os><type arch='x86_64' machine='xenfv'>hvm</type></os><devices>{nvdimms}</devices></domain>"""
NVDIMM = "<memory model='nvdimm'><source><path>{}</path></source><target><size unit='MiB'>16</size></target></memory>"
LONG, COPY = "x" * 256, "y" * 247
NO_FOLDER = (1, "there is no folder {root}/missing (mount the file system that it is on, or make the folder)")
FOLDER = (1, "{root}/folder: is a folder (name a file in it, which need not exist yet)")
TOO_LONG = (1, "its name has 256 bytes, and may have 255 (take a shorter name)")
TOO_LONG_TO_COPY = "bytes, and may have 246: the file is .NAME.partial until it is complete (take a shorter name)"
NOTHING = (1, "{root}/link: is a symbolic link to {root}/gone.img, and nothing is there (mount the file system of that")
MISSING = (3, "there is no such file")
LIMITS = {
    LONG: {"plan": TOO_LONG, "provision": TOO_LONG}
    | dict.fromkeys(("import", "export", "wipe"), (1, "File name too long (take a shorter name)"))
    | {"copy": TOO_LONG, "to": (1, f"256 {TOO_LONG_TO_COPY}")},
    COPY: {"import": MISSING, "export": MISSING, "wipe": MISSING}
    | {"copy": (1, f"247 {TOO_LONG_TO_COPY}"), "to": (1, f"247 {TOO_LONG_TO_COPY}")},
    "missing/a.img": dict.fromkeys(("plan", "provision", "import", "export", "wipe"), NO_FOLDER)
    | {"to": (3, "{root}/missing: there is no such folder")},
    "missing/b/a.img": dict.fromkeys(("plan", "provision", "import", "export", "wipe"), NO_FOLDER),
    "folder": dict.fromkeys(("plan", "provision", "import", "export", "wipe", "copy"), FOLDER)
    | {"to": (5, "{root}/folder: is not a file")},
    "link": {"plan": NOTHING, "provision": NOTHING, "copy": NOTHING}
    | {"import": MISSING, "export": MISSING, "wipe": MISSING},
    "loop": dict.fromkeys(("plan", "provision"), (1, "symbolic links, or one that leads back to itself"))
    | dict.fromkeys(("import", "export", "wipe"), (1, "loop: Too many levels of symbolic")),
    "real.img/a": dict.fromkeys(("plan", "provision", "import", "export", "wipe"), (1, "real.img is not a folder")),
}


@pytest.mark.parametrize("name", LIMITS, ids=lambda name: name[:16])
def test_names_at_their_limits_have_errors_that_say_what_is_wrong(operator: Operator, name: str) -> None:
    root, path = operator.fs.root, operator.fs.root / name
    source = operator.folder / "source"
    source.write_bytes(os.urandom(SIZE))
    operator.run("provision", root / "real.img", "--size", "16MiB")
    (root / "folder").mkdir(exist_ok=True)
    for link, target in (("link", "gone.img"), ("loop", "loop")):
        (root / link).unlink(missing_ok=True)
        os.symlink(root / target, root / link)
    before = sorted(os.listdir(root))
    commands: dict[str, tuple[object, ...]] = {
        "plan": ("plan", "-"),
        "provision": ("provision", path, "--size", "16MiB"),
        "import": ("import", path),
        "copy": ("import", source, "--name", name),
        "to": ("export", root / "real.img", path),
        "export": ("export", path, operator.folder / "out"),
        "wipe": ("wipe", "--yes", path),
    }
    xml = DOMAIN.format(uuid=UUID, nvdimms=NVDIMM.format(path))
    for command, (status, message) in LIMITS[name].items():
        done = operator.run(*commands[command], status=status, text=xml)
        assert message.format(root=root) in done.stderr, command
    assert sorted(os.listdir(root)) == before
    for link in ("link", "loop"):
        (root / link).unlink()


def test_a_path_that_is_too_long(operator: Operator) -> None:
    path = f"{operator.fs.root}/{'a/' * 2100}f"
    done = operator.run("provision", path, "--size", "16MiB", status=1)
    assert f"…: the path has {len(path)} bytes, and may have 4095 (take a shorter path)" in done.stderr


def test_a_name_that_is_not_utf8_is_for_no_domain(operator: Operator) -> None:
    path = os.fsdecode(os.fsencode(operator.fs.root) + b"/gr\xf6sse")
    done = operator.run("provision", path, "--size", "16MiB", status=1)
    assert r"gr\udcf6sse: is not UTF-8, and domain XML has to be (rename it)" in done.stderr


@pytest.mark.parametrize("other", ["{root}/link.img", "/{root}/a.img", "{root}/folder/../a.img"])
@pytest.mark.parametrize("exists", [True, False])
def test_one_file_twice_in_a_domain_is_not_called_a_bug(operator: Operator, other: str, exists: bool) -> None:
    root = operator.fs.root
    (root / "folder").mkdir(exist_ok=True)
    if exists:
        operator.run("provision", root / "a.img", "--size", "16MiB")
    link = root / "link.img"
    os.symlink(root / "a.img", link)
    if "link" in other and not exists:
        link.unlink()
        os.symlink(root, link)
        other = "{root}/link.img/a.img"
    xml = DOMAIN.format(uuid=UUID, nvdimms=NVDIMM.format(root / "a.img") + NVDIMM.format(other.format(root=root)))
    done = operator.run("plan", "-", status=1, text=xml)
    link.unlink()
    assert re.search("the NVDIMMs in slots 0 and 1 have the same (bytes|<source><path>)", done.stderr)
    assert "give each a backing of its own, or remove one" in done.stderr


@pytest.mark.parametrize("instead", ["folder", "link", "nothing", "no folder"])
def test_a_domain_is_released_whatever_is_at_its_path(operator: Operator, instead: str) -> None:
    folder = operator.fs.root / "inside"
    folder.mkdir(exist_ok=True)
    path = folder / "a.img"
    operator.run("provision", path, "--size", "16MiB")
    operator.claim("db1", path)
    path.unlink()
    if instead == "folder":
        path.mkdir()
    elif instead == "link":
        os.symlink("gone", path)
    elif instead == "no folder":
        folder.rmdir()
    operator.run("release", "--yes", "db1")
    assert operator.ledger().domains() == ()
    shutil.rmtree(folder, ignore_errors=True)


def test_check_takes_the_mark_from_a_copy_that_is_named(operator: Operator) -> None:
    path, copy = operator.fs.root / "a.img", operator.fs.root / "a.bak"
    operator.run("provision", path, "--size", "16MiB")
    operator.claim("db1", path)
    record = operator.ledger().find_domain(UUID)
    assert record is not None
    os.setxattr(path, "trusted.nvdimm_driver.owner", owner_marks.pack(record, record.allocations[0]))
    run("cp", "-a", "--reflink=never", path, copy)
    marked = os.listxattr(copy)
    assert marked == ["trusted.nvdimm_driver.owner"]
    operator.run("check", "--unmark", copy, status=2)
    operator.run("check", "--repair", "--unmark", path, status=5)
    assert os.listxattr(copy) == os.listxattr(path) == marked
    operator.run("check", "--repair", "--unmark", copy)
    assert (os.listxattr(copy), os.listxattr(path)) == ([], marked)


@pytest.mark.parametrize(
    "words", ["import {}", "wipe --yes {}", "check {}", "check --repair --zeros {}", "export {} out"]
)
def test_a_link_of_a_users_is_not_followed(operator: Operator, words: str) -> None:
    path, folder = operator.fs.root / "a.img", operator.fs.root / "users"
    operator.run("provision", path, "--size", "16MiB")
    folder.mkdir()
    (folder / "a.img").symlink_to(path)
    (operator.fs.root / "one/two/three").mkdir(parents=True)
    (folder / "up").symlink_to(operator.fs.root / "one/two/three")
    os.chown(folder, 65534, 65534)
    before = path.read_bytes(), os.listdir(operator.fs.root)
    up = folder / "up/../../a.img"  # in one, and not in the root, where a.img is
    done = operator.run(*words.format(up).split(), status=2)
    assert f"{up} leads to {operator.fs.root}/one/a.img by a symbolic link" in done.stderr
    done = operator.run(*words.format(folder / "a.img").split(), status=2)
    assert f"users/a.img leads to {path} by a symbolic link, and others than root can turn it" in done.stderr
    done = operator.run("export", path, folder / "a.img", "--force", status=5)
    assert "is a symbolic link" in done.stderr
    (folder / "out").symlink_to("/")
    done = operator.run("export", path, folder / "out/copy", status=2)
    assert "out/copy leads to /copy by a symbolic link" in done.stderr
    done = operator.run("export", path, folder / "up/../../copy", status=2)
    assert f"leads to {operator.fs.root}/one/copy by a symbolic link" in done.stderr
    assert (path.read_bytes(), os.listdir(operator.fs.root)) == before
    shutil.rmtree(folder)
    shutil.rmtree(operator.fs.root / "one")
