# SPDX-License-Identifier: Apache-2.0
"""What a running guest keeps the host from doing to its backings: real ext4, XFS and block devices; Xen is a double."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver import processes
from nvdimm_driver.backing import holders, kernel_users
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.backing.pmem import PmemBacking
from nvdimm_driver.cmd.systemd_units import UNITS
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, InUseError, LedgerError
from nvdimm_driver.model import KIB, MIB, DomainSpec, NvdimmSpec
from nvdimm_driver.plugins import Backing
from nvdimm_driver.processes import CGROUPS, kill, leave_unit
from tests.integration.loop_device import Device, Partition, detached
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.unit.doubles import OTHER_UUID, UUID, RecordingMapper, make_driver, started
from tests.unit.fake_sysfs import FakeSysfs

SIZE = 4 * MIB


class Host:
    """The driver with real holders; Xen is a double."""

    def __init__(self, folder: Path, backing: Backing, path: str) -> None:
        self.folder = folder
        self.backing = backing
        self.mapper = RecordingMapper({})
        self.holders = Holders(folder)
        self.domain = DomainSpec("db1", UUID, 512 * MIB, None, (NvdimmSpec(0, path, SIZE),))
        self.driver = self.another()
        self.driver.define(self.domain)

    def another(self) -> XenNvdimmDriver:
        """Return the driver as another process has it."""
        return make_driver(self.folder, self.backing, self.mapper, holders=self.holders)  # type: ignore[arg-type]

    def start(self, domid: int = 7) -> None:
        """Start the domain, as libvirt does."""
        self.driver.prepare(self.domain)
        self.map(domid)

    def map(self, domid: int) -> None:
        """Do what Xen and the device model do."""
        self.mapper.alive[domid] = UUID
        prepared = started(self.driver.ledger)
        self.driver.ledger.begin_mapping(prepared, domid)
        self.driver.ledger.finish_mapping(prepared)

    def end(self, domid: int = 7) -> None:
        """End the domain, as libvirt reports it."""
        del self.mapper.alive[domid]
        self.driver.release(UUID)

    def kinds(self) -> list[str]:
        return [each.kind for each in self.driver.ledger.events()]


def repair_all(host: Host, *named: str) -> None:
    """Do what ``check --repair PATH`` does."""
    for found in look(host.driver, named=named):
        if found.mend:
            found.mend()


def succeeds(*command: str | Path) -> bool:
    return subprocess.run([str(each) for each in command], capture_output=True, check=False).returncode == 0


def can_be_taken(device: str) -> bool:
    """Return True when mount, mkfs, wipefs and ndctl may have the device: all of them open it so (open(2), O_EXCL)."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))
    except OSError:
        return False
    return True


@pytest.fixture(params=list(MKFS))
def fs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileSystem]:
    made = FileSystem(tmp_path, request.param)
    yield made
    if os.path.ismount(made.root):
        made.clear()
    made.close()


@pytest.fixture
def host(fs: FileSystem, tmp_path: Path) -> Iterator[Host]:
    """Yield a host with a domain whose NVDIMM is a file."""
    fs.backing.name = FsdaxBacking.name
    host = Host(tmp_path, fs.backing, str(fs.root / "a.img"))
    yield host
    for pid in (*host.holders.find(UUID), *(pid for pid, *_ in host.holders.deleted())):
        kill(pid)


def device_of(fs: FileSystem) -> str:
    return run("findmnt", "-no", "SOURCE", fs.root).strip()


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Host]:
    """Yield a host with a domain whose NVDIMM is a block device; the path is ``host.domain.nvdimms[0].path``."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE)
    device = run("losetup", "--find", "--show", image).strip()
    sysfs = FakeSysfs(tmp_path / "sys")
    sysfs.raw(os.stat(device).st_rdev, size=SIZE)
    host = Host(tmp_path, PmemBacking(sysfs=sysfs.root), device)
    yield host
    host.holders.kill(UUID, host.holders.find(UUID))
    run("losetup", "--detach", device)


def test_what_was_deleted_under_a_guest_can_be_copied_until_the_operator_ends_its_holder(
    host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = host.domain.nvdimms[0].path
    host.start()
    written = bytes(range(256)) * (SIZE // 256)
    run("chattr", "-i", path)
    Path(path).write_bytes(written)
    os.unlink(path)
    for end in (host.end, host.driver.reconcile, host.another().reconcile):
        end()
        ((_, uuid, deleted, there),) = host.holders.deleted()
        assert (uuid, deleted) == (UUID, path)
    assert f"event=left-deleted domain=db1 uuid={UUID} domid=7 path={path} copy={there}" in caplog.text
    (found,) = (each for each in look(host.driver) if "deleted" in each.problem)
    assert found.path == path
    copy = found.remedy.split("copy them: ")[1].split(";")[0].replace("FILE", str(tmp_path / "copy")).split()
    run(*copy)
    assert (tmp_path / "copy").read_bytes() == written
    end_holder = found.remedy.rsplit("by: ", 1)[1].split()
    assert end_holder[0] == "kill"
    kill(int(end_holder[1]))
    assert not any("deleted" in each.problem for each in look(host.driver))


def test_the_keeper_of_what_was_deleted_is_not_the_holder_of_the_next_guest(host: Host) -> None:
    path = host.domain.nvdimms[0].path
    host.start()
    run("chattr", "-i", path)
    os.unlink(path)
    host.end()
    assert not host.holders.has(UUID)
    ((_, _, _, there),) = host.holders.deleted()
    run("cp", "--sparse=never", there, path)
    repair_all(host, path)
    host.start()
    assert len(host.holders.find(UUID)) == 1
    (holder,) = host.holders.find(UUID)
    kill(holder)
    assert [each.name for each in host.driver.guest_processes.find_unheld()] == ["db1"]
    host.driver.restart_lost()
    assert not host.driver.guest_processes.find_unheld()
    host.end()
    ((keeper, _, _, there),) = host.holders.deleted()
    kill(keeper)


def test_an_end_that_is_killed_and_repeated_leaves_one_keeper(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed when it had started the keeper, before the end of the holder."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    path = host.domain.nvdimms[0].path
    host.start()
    run("chattr", "-i", path)
    os.unlink(path)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "kill", die)
        with pytest.raises(KeyboardInterrupt):
            host.end()
    host.another().reconcile()
    assert not host.holders.find(UUID)
    assert [(uuid, deleted) for _, uuid, deleted, _ in host.holders.deleted()] == [(UUID, path)]


def test_a_keeper_has_nothing_but_what_was_deleted(host: Host, tmp_path: Path) -> None:
    own, gone = host.domain.nvdimms[0].path, tmp_path / "gone"
    gone.touch()
    descriptors = [os.open(each, os.O_RDONLY) for each in (own, gone)]
    pid = host.holders.start(UUID, "db1", descriptors)
    gone.unlink()
    for each in descriptors:
        os.close(each)
    host.holders.kill(UUID, [pid])
    assert not os.path.exists(f"/proc/{pid}/fd/0")
    ((keeper, uuid, path, there),) = host.holders.deleted()
    assert (uuid, path) == (UUID, str(gone))
    held = {os.readlink(f"/proc/{keeper}/fd/{each}") for each in os.listdir(f"/proc/{keeper}/fd")}
    assert held == {f"{path} (deleted)", "/dev/null"}, there
    kill(keeper)


def test_a_file_system_cannot_be_unmounted_while_a_guest_has_a_file_of_it(host: Host, fs: FileSystem) -> None:
    device = device_of(fs)
    host.driver.prepare(host.domain)
    assert not succeeds("umount", fs.root), "held before the frames are mapped"
    host.map(7)
    assert not succeeds("umount", fs.root)
    run("umount", "--lazy", fs.root)
    assert not can_be_taken(device), "out of sight, and still the guest's"
    assert not succeeds(*MKFS[fs.kind], device)


def test_it_can_be_unmounted_as_soon_as_the_guest_has_ended(host: Host, fs: FileSystem) -> None:
    host.start()
    host.end()
    assert host.holders.find(UUID) == []
    run("umount", fs.root)


def test_a_reboot_replaces_the_holder(host: Host, fs: FileSystem) -> None:
    host.start()
    (first,) = host.holders.find(UUID)
    host.end()
    host.start(8)
    (second,) = host.holders.find(UUID)
    assert first != second
    assert not succeeds("umount", fs.root)


def test_a_start_that_fails_holds_nothing(host: Host, fs: FileSystem) -> None:
    (host.folder / "domains").write_text("in the way of the tables")
    with pytest.raises(LedgerError, match="Not a directory"):
        host.driver.prepare(host.domain)
    assert host.holders.find(UUID) == []
    run("umount", fs.root)


def test_a_holder_that_was_killed_is_found_and_replaced(host: Host, fs: FileSystem) -> None:
    """So is that of a guest which a version without holders has started."""
    host.start()
    assert look(host.driver) == []
    (pid,) = host.holders.find(UUID)
    kill(pid)
    (found,) = look(host.driver)
    assert "nothing holds its backings" in found.problem
    assert found.mend
    found.mend()
    assert look(host.driver) == []
    assert host.kinds()[-1] == "holder-gone"
    assert not succeeds("umount", fs.root)
    host.end()
    assert host.holders.find(UUID) == []


def test_another_file_at_the_path_is_not_held_for_the_guest(
    host: Host, fs: FileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    """The holder was killed, and somebody has made the file anew before another was started."""
    host.start()
    (pid,) = host.holders.find(UUID)
    kill(pid)
    path = host.domain.nvdimms[0].path
    run("chattr", "-i", path)
    os.rename(path, f"{path}.old")
    Path(path).write_bytes(bytes(SIZE))
    host.driver.restart_lost()
    assert host.holders.find(UUID) == []
    assert "event=hold-failed" in caplog.text
    assert "not the backing that was provisioned" in caplog.text


def test_a_late_end_of_an_earlier_start_leaves_the_holder_of_the_next(host: Host) -> None:
    """Another process finds the first start over, and puts it away when the next one has begun."""
    host.start()
    old = host.another().ledger.find_domain(UUID)
    assert old
    assert old.start
    host.end()
    host.start(8)
    (pid,) = host.holders.find(UUID)
    host.another().starts.put_away(old.start)
    assert host.holders.find(UUID) == [pid]


def test_a_holder_that_came_too_late_is_ended(host: Host, fs: FileSystem) -> None:
    """A process was about to replace a holder when the guest ended; the next command finds what it left."""
    host.start()
    record = host.driver.ledger.find_domain(UUID)
    assert record
    identities = [item.identity for item in record.allocations if item.identity]
    host.end()
    host.driver.starts.hold(UUID, "db1", [(host.domain.nvdimms[0].path, identities[0])])
    assert not succeeds("umount", fs.root)
    host.mapper.alive[7] = UUID
    host.driver.reconcile()
    assert len(host.holders.find(UUID)) == 1, "the ledger has lost the start of a guest that runs"
    host.mapper.alive.clear()
    host.driver.reconcile()
    run("umount", fs.root)


def test_what_cannot_be_thawed_is_let_go(host: Host, fs: FileSystem) -> None:
    """After a media error the kernel makes a file system read-only, and only fsck mends it."""
    host.start()
    run("mount", "-o", "remount,ro", fs.root)
    del host.mapper.alive[7]
    with pytest.raises(BackingError, match="Read-only"):
        host.driver.release(UUID)
    run("umount", fs.root)


def test_the_holder_has_no_power_and_keeps_nothing_else(host: Host) -> None:
    host.start()
    (pid,) = host.holders.find(UUID)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
    assert status["Name"] == holders.PROCESS_NAME
    opened = {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
    assert host.holders.has(UUID)
    assert not host.holders.has(OTHER_UUID)
    assert opened == {"/dev/null", host.domain.nvdimms[0].path}
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)


def test_nvdimmd_sees_what_it_holds(raw: Host) -> None:
    """It has few capabilities, and the kernel lets it look into processes that have no more."""
    raw.start()
    number = os.stat(raw.domain.nvdimms[0].path).st_rdev
    script = (
        "from nvdimm_driver.backing import holders\n"
        f"print(holders.Holders({str(raw.folder)!r}).find({UUID!r}), holders.is_held({number}))"
    )
    assert "CAP_SYS_PTRACE" not in UNITS["nvdimmd.service"]
    few = ["setpriv", "--bounding-set=-all,+sys_admin,+kill,+dac_override", "--inh-caps=-all", "--"]
    assert run(*few, sys.executable, "-c", script) == f"{raw.holders.find(UUID)} True\n"


def test_a_block_device_cannot_be_taken_while_a_guest_has_it(raw: Host) -> None:
    device = raw.domain.nvdimms[0].path
    assert can_be_taken(device)
    raw.start()
    assert not can_be_taken(device)
    for command in (["mkfs.ext4", "-q", device], ["wipefs", "--all", device], ["mount", device, "/mnt"]):
        assert not succeeds(*command), command
    raw.end()
    assert can_be_taken(device)


def test_the_driver_itself_goes_on_with_a_device_that_is_held(raw: Host) -> None:
    """A redefine of the running guest, check and a label server open the device, and refuse what else is in use."""
    raw.start()
    (item,) = raw.driver.ledger.domains()[0].allocations
    assert item.identity
    with raw.backing.open_labels(replace(item.spec, label_size=128 * KIB), item.identity) as labels:
        assert labels.read(0, 16) == bytes(16)
    raw.another().define(replace(raw.domain, ram=256 * MIB))
    assert look(raw.driver) == []
    (pid,) = raw.holders.find(UUID)
    kill(pid)
    raw.driver.restart_lost()
    assert raw.holders.find(UUID) not in ([], [pid])
    raw.end()
    fd = os.open(raw.domain.nvdimms[0].path, os.O_RDONLY | os.O_EXCL)
    with pytest.raises(BackingError, match="in use in the host"):
        raw.driver.prepare(raw.domain)
    os.close(fd)
    raw.start(8)


def test_a_start_after_one_that_was_killed_half_way_holds_the_device(raw: Host) -> None:
    """The hook was killed when it had started the holder."""
    raw.driver.prepare(raw.domain)
    (first,) = raw.holders.find(UUID)
    raw.driver = raw.another()
    raw.start()
    (second,) = raw.holders.find(UUID)
    assert second != first
    assert not can_be_taken(raw.domain.nvdimms[0].path)


def test_a_process_of_another_user_is_no_holder(tmp_path: Path) -> None:
    """Everybody may run a program with these arguments; also one that then runs as root."""
    words = [holders.PROGRAM, str(tmp_path), OTHER_UUID, "x"]
    python = subprocess.run(["readlink", "-f", "/usr/bin/python3"], capture_output=True, text=True, check=True)
    yes = subprocess.Popen(["sleep", "-I", "-S", *words], executable="/usr/bin/yes", stdout=subprocess.DEVNULL)
    nobodys = ["setpriv", "--reuid=65534", "--", python.stdout.strip(), "-I", "-S", *words]
    background = int(subprocess.check_output(nobodys, stderr=subprocess.DEVNULL))
    try:
        assert Path(f"/proc/{background}/cmdline").read_text().split("\0")[3:7] == words
        assert Holders(tmp_path).find(OTHER_UUID) == []
    finally:
        kill(background)
        yes.kill()
        yes.wait()


def test_a_holder_leaves_the_unit_of_the_command_that_starts_it(host: Host, tmp_path: Path) -> None:
    """systemd kills what a command of a timer leaves in its unit; the lab has the real one."""
    host.start()
    (pid,) = host.holders.find(UUID)
    kill(pid)
    host.another().restart_lost()
    (pid,) = host.holders.find(UUID)
    can_leave = any(os.access(f"{root}/cgroup.procs", os.W_OK) for root in CGROUPS)
    assert ("/nvdimm-driver\n" in Path(f"/proc/{pid}/cgroup").read_text()) is can_leave
    unified, none = tmp_path / "unified", tmp_path / "none"
    for root in (unified, none):
        root.mkdir()
    (unified / "cgroup.procs").touch()
    leave_unit(7, (str(none), str(unified), str(tmp_path / "missing")))
    assert (unified / "nvdimm-driver/cgroup.procs").read_text() == "7"
    assert list(none.iterdir()) == []


BACKUP, STORED = b"restored from a backup", b"of the guest, flushed "


def store(host: Host) -> None:
    """Write to the medium as a guest does: past the page cache of the device."""
    with open(host.folder / "image", "r+b") as medium:
        medium.write(STORED)
        os.fsync(medium.fileno())


@pytest.mark.parametrize("is_open", [False, True], ids=["nobody", "a pager"])
def test_what_was_written_to_a_device_is_there_before_its_guest_and_nothing_of_it_comes_later(
    raw: Host, is_open: bool
) -> None:
    """The kernel writes the page cache of a device when the last program closes it, or some seconds later."""
    device, image = raw.domain.nvdimms[0].path, raw.folder / "image"
    pager = os.open(device, os.O_RDONLY) if is_open else None
    with open(device, "r+b") as file:
        file.write(BACKUP)
    raw.start()
    assert image.read_bytes()[: len(BACKUP)] == BACKUP
    store(raw)
    os.sync()
    assert image.read_bytes()[: len(STORED)] == STORED
    raw.end()
    with open(device, "rb") as file:
        assert file.read(len(STORED)) == STORED
    if pager is not None:
        os.close(pager)


def test_no_guest_starts_while_a_program_writes_its_device(raw: Host) -> None:
    device = raw.domain.nvdimms[0].path
    with open(device, "r+b", buffering=0) as file:
        with pytest.raises(InUseError, match=f"{device}: .*process {os.getpid()}.* may write it"):
            raw.start()
        file.write(BACKUP)
    assert not raw.driver.ledger.started_domains()
    raw.start()
    raw.end()


def test_no_guest_starts_while_a_program_has_its_device_mapped(raw: Host) -> None:
    """The kernel would keep the mapped pages, and write them whole, with old bytes, once dom0 changes a part."""
    device = raw.domain.nvdimms[0].path
    with open(device, "rb") as file:
        pages = mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)
    assert pages[0] == 0
    with pytest.raises(InUseError, match=f"process {os.getpid()}"):
        raw.start()
    pages.close()
    raw.start()
    raw.end()


@contextmanager
def looped(device: str | Path, *options: str | int) -> Iterator[str]:
    """Yield a loop device on a device."""
    loop = run("losetup", "--find", "--show", *map(str, options), device).strip()
    try:
        yield loop
    finally:
        run("losetup", "--detach", loop)


def test_no_guest_starts_while_a_loop_device_may_write_its_device(raw: Host) -> None:
    """As for a file system in the guest's own partition table; no process has it open."""
    device = raw.domain.nvdimms[0].path
    with looped(device, "--offset", MIB) as loop:
        with pytest.raises(InUseError, match=f"{device}: {loop} may write it") as error:
            raw.start()
        assert f"losetup --detach {loop}" in error.value.hint
    with looped(device, "--read-only"):
        raw.start()
        raw.end()


def test_no_guest_of_a_partition_starts_while_a_loop_device_has_the_disk(
    parts: tuple[Device, Partition, Partition], tmp_path: Path
) -> None:
    disk, partition, other = parts
    host = Host(tmp_path, PmemBacking(sysfs=disk.sysfs.root), str(partition.path))
    with looped(disk.path) as loop, pytest.raises(InUseError, match=f"{partition.path}: {loop} may write it"):
        host.start()
    with looped(other.path):
        host.start()
        host.end()


@pytest.mark.parametrize(
    ("place", "attributes", "off", "said"),
    [
        (
            "bus/xen-backend/devices/vbd-3-51712",
            {"physical_device": "{major:x}:{minor:x}", "mode": "w"},
            {"mode": "r"},
            "the guest with domid 3, which has it as a disk, may write it",
        ),
        (
            "kernel/config/nvmet/subsystems/a/namespaces/1",
            {"device_path": "{path}", "enable": "1"},
            {"enable": "0"},
            "the export .*nvmet/subsystems/a/namespaces/1 may write it",
        ),
        (
            "kernel/config/target/core/fileio_0/a",
            {"info": "Status: ACTIVATED\n        TCM FILEIO ID: 0        File: {path}  Size: 1  Mode: O_DSYNC"},
            {"enable": "0"},
            "the export .*target/core/fileio_0/a may write it",
        ),
    ],
    ids=["xen-blkback", "nvmet", "fileio"],
)
def test_no_guest_starts_while_another_user_in_the_kernel_may_write_its_device(
    raw: Host,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    attributes: dict[str, str],
    off: dict[str, str],
    said: str,
) -> None:
    """Of which this kernel has none: in files as its sysfs would have them."""
    device = raw.domain.nvdimms[0].path
    number = os.stat(device).st_rdev
    numbers = {"major": os.major(number), "minor": os.minor(number)}
    folder = raw.folder / "kernel" / place
    folder.mkdir(parents=True)
    monkeypatch.setattr(kernel_users, "SYSFS", raw.folder / "kernel")
    for name, value in attributes.items():
        (folder / name).write_text(value.format(path=device, **numbers) + "\n")
    with pytest.raises(InUseError, match=f"{device}: {said}"):
        raw.start()
    for name, value in off.items():
        (folder / name).write_text(f"{value}\n")
    raw.start()
    raw.end()


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[tuple[Device, Partition, Partition]]:
    """Yield a disk and two partitions of it."""
    made: list[Device | Partition] = [disk := Device(tmp_path, 1, 4 * SIZE)]
    made += (one := Partition(disk, 1, SIZE, SIZE), other := Partition(disk, 2, 2 * SIZE, SIZE))
    with detached(made):
        yield disk, one, other


def test_what_was_written_to_the_whole_disk_is_there_before_the_guest_of_a_partition(
    parts: tuple[Device, Partition, Partition], tmp_path: Path
) -> None:
    """Disk and partitions have page caches of their own."""
    disk, partition, _ = parts
    host = Host(tmp_path, PmemBacking(sysfs=disk.sysfs.root), str(partition.path))
    pager = os.open(disk.path, os.O_RDONLY)
    with open(disk.path, "r+b") as file:
        file.seek(SIZE)
        file.write(BACKUP)
    host.start()
    assert disk.image.read_bytes()[SIZE : SIZE + len(BACKUP)] == BACKUP
    host.end()
    os.close(pager)


def test_a_guest_starts_while_another_partition_is_written(
    parts: tuple[Device, Partition, Partition], tmp_path: Path
) -> None:
    """As by the label server of the guest that has it."""
    disk, partition, other = parts
    host = Host(tmp_path, PmemBacking(sysfs=disk.sysfs.root), str(partition.path))
    with open(other.path, "r+b", buffering=0):
        host.start()
        assert look(host.driver) == []
    host.end()
