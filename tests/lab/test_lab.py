# SPDX-License-Identifier: Apache-2.0
"""The lab itself: a host answers, fails loudly, loses power, and runs a guest."""

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.lab.conftest import MakeHost
from tests.lab.errors import LabError
from tests.lab.guest import Guest, install_guest, pattern, xl_config
from tests.lab.host import CHANNEL_LIMIT, GIB, LABEL_BYTES, Nvdimm, XenHost
from tests.lab.image import Images, make_guest_disk

pytestmark = pytest.mark.lab

MIB = 1 << 20
PMEM0_SPA = 5 * GIB


def test_dom0_runs_on_xen(host: XenHost) -> None:
    lines = (line.split(":", 1) for line in host.check("xl info").stdout.splitlines())
    info = {key.strip(): value.strip() for key, value in lines}

    assert f"{info['xen_major']}.{info['xen_minor']}" == host.images.release.xen
    assert "hvm" in info["virt_caps"]


def test_libvirt_sees_xen(host: XenHost) -> None:
    assert "Domain-0" in host.check("virsh -c xen:///system list").stdout


def test_dom0_has_two_nvdimms_with_labels(host: XenHost) -> None:
    sizes = host.check("cat /sys/block/pmem0/size /sys/block/pmem1/size").stdout.split()

    assert [int(size) * 512 for size in sizes] == [nvdimm.size for nvdimm in host.nvdimms]
    for number in range(2):
        assert int(host.check(f"ndctl read-labels nmem{number} | wc -c").stdout) == LABEL_BYTES


def test_stores_of_dom0_reach_the_file_of_the_nvdimm(host: XenHost) -> None:
    host.check(f"echo -n persistent | dd of=/dev/pmem1 bs=1 seek={MIB} conv=fsync")

    with host.nvdimms[1].path.open("rb") as file:
        file.seek(MIB)
        assert file.read(10) == b"persistent"


def test_a_command_has_its_own_stdout_stderr_and_status(host: XenHost) -> None:
    result = host.run("echo out; echo err >&2; exit 3")

    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_a_failed_check_tells_all(host: XenHost) -> None:
    with pytest.raises(LabError, match=r"(?s)no-such-program.*status 127.*not found"):
        host.check("no-such-program")


def test_a_command_that_hangs_is_killed(host: XenHost) -> None:
    with pytest.raises(LabError, match="still running after 1"):
        host.run("sleep 1000", timeout=1)

    assert host.run("pgrep -x sleep").returncode == 1


def test_a_daemon_does_not_hold_up_its_command(host: XenHost) -> None:
    pid = int(host.check("sleep 1000 & echo $!").stdout)
    host.check(f"kill {pid}")


@pytest.mark.parametrize("size", [0, 5, CHANNEL_LIMIT + 1])
def test_files_go_both_ways(host: XenHost, tmp_path: Path, size: int) -> None:
    local = tmp_path / "file"
    local.write_bytes(pattern(size, size))
    local.chmod(0o750)

    host.put(local, "/tmp/new/folder/file")

    assert host.get("/tmp/new/folder/file") == pattern(size, size)
    assert host.check("stat -c %a /tmp/new/folder/file").stdout == "750\n"


def test_a_folder_goes_whole(host: XenHost, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("deep")

    host.put(tmp_path / "a", "/tmp/tree")

    assert host.get("/tmp/tree/b/c") == b"deep"


@pytest.mark.parametrize("data", [b"\0\xff", pattern(1, CHANNEL_LIMIT + 1)], ids=["small", "large"])
def test_written_files_have_their_mode(host: XenHost, data: bytes) -> None:
    host.write("/tmp/written/file", data, 0o600)

    assert host.get("/tmp/written/file") == data
    assert host.check("stat -c %a /tmp/written/file").stdout == "600\n"


def test_a_missing_file_is_an_error(host: XenHost) -> None:
    with pytest.raises(LabError, match="No such file"):
        host.read("/no/such/file")


@pytest.mark.thorough
def test_a_guest_reports_takes_orders_and_reboots(host: XenHost, images: Images, tmp_path: Path) -> None:
    """Without an NFIT, the guest learns from its kernel command line of the memory that `iomem` maps into it."""
    disk, length = tmp_path / "guest.img", 3 * MIB + 100
    make_guest_disk(images, disk, "memmap=64M!4G")
    host.put(disk, "/tmp/memmap.img")
    iomem = f'iomem = ["{PMEM0_SPA >> 12:#x},0x4000@0x100000"]'
    host.write("/tmp/memmap.cfg", xl_config("memmap", disk="/tmp/memmap.img", extra=iomem).encode())
    guest = Guest(host, "memmap")

    host.check("xl create /tmp/memmap.cfg")
    report = guest.wait_report()

    assert [(region.size, region.resource, region.dimm) for region in report.regions] == [(64 * MIB, 4 * GIB, None)]
    assert [(found.name, found.size) for found in report.disks] == [("pmem0", 64 * MIB)]
    assert report.problems == ()

    guest.write("/dev/pmem0", MIB, length, seed=7)
    expected = pattern(7, length)
    assert guest.sha256("/dev/pmem0", MIB, length) == hashlib.sha256(expected).hexdigest()
    assert guest.read("/dev/pmem0", MIB, 64) == expected[:64]
    assert "no such order" in guest.order("nonsense").result
    with pytest.raises(LabError, match="has 67108864 bytes"):
        guest.sha256("/dev/pmem0", 64 * MIB, 1)
    with host.nvdimms[0].path.open("rb") as file:
        file.seek(MIB)
        assert file.read(length) == expected

    second = guest.reboot()
    assert second.boot_id != report.boot_id
    guest.poweroff()


@pytest.mark.thorough
def test_a_guest_without_nvdimm_has_none(host: XenHost) -> None:
    install_guest(host)
    host.write("/tmp/plain.cfg", xl_config("plain").encode())
    guest = Guest(host, "plain")

    host.check("xl create /tmp/plain.cfg")
    report = guest.wait_report()

    assert (report.regions, report.dimms, report.disks) == ((), (), ())
    assert "Linux version" in guest.dmesg()
    guest.poweroff()


def test_what_dom0_writes_does_not_reach_its_image(host: XenHost) -> None:
    before = host.images.dom0_disk.stat().st_mtime_ns

    host.check("echo written >/root/written && sync")

    assert host.images.dom0_disk.stat().st_mtime_ns == before


@pytest.mark.thorough
def test_nvdimms_and_a_disk_that_is_kept_survive_a_power_cut(fresh_host: MakeHost, tmp_path: Path) -> None:
    host = fresh_host(nvdimms=[Nvdimm(tmp_path / "only.img", 64 * MIB)], keep_disk=True)
    host.start()
    host.check("echo -n before | dd of=/dev/pmem0 conv=fsync && echo kept >/root/kept && sync")

    host.power_cut()
    assert not host.running
    with pytest.raises(LabError, match="off"):
        host.run("true")
    host.start()

    assert host.check("head -c 6 /dev/pmem0").stdout == "before"
    assert host.get("/root/kept") == b"kept\n"


@pytest.mark.thorough
def test_a_host_that_hangs_is_given_up(fresh_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.lab.host.ANSWER_SECONDS", 1)
    host = fresh_host()
    host.start()

    with pytest.raises(LabError, match=r"(?s)no answer from dom0 after 2 s.*end of the console:"):
        host.run("pkill -STOP -f lab-agent", timeout=1)

    assert not host.running
    host.close()
    assert (host.run_folder / "console.log").exists()
    shutil.rmtree(host.run_folder)


def test_a_host_that_dies_at_once_shows_why(fresh_host: MakeHost) -> None:
    host = fresh_host(qemu_args=("-device", "no-such-device"))

    with pytest.raises(LabError, match=r"(?s)QEMU ended with status 1.*no-such-device"):
        host.start()

    assert not host.running


@pytest.mark.thorough
def test_a_host_that_does_not_come_up_shows_its_console(fresh_host: MakeHost) -> None:
    host = fresh_host(linux_args="rdinit=/no-such-init", boot_timeout=40)

    with pytest.raises(LabError, match=r"(?s)dom0's kernel has crashed.*end of the console:.*Kernel panic"):
        host.start()

    assert not host.running
