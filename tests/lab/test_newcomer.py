"""The tutorial, as it is written: a newcomer's walk from the package to a guest with ext4 on DAX, and back."""

from __future__ import annotations

import re

import pytest

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost
from tests.package import PROJECT, build_package

pytestmark = pytest.mark.lab
TUTORIAL = (PROJECT / "doc" / "tutorial.rst").read_text(encoding="utf-8")
DISK = "/var/lib/guest.img"
FOLDER = "/root/walk"


def commands(title: str) -> list[tuple[str, str]]:
    """The commands below a title, each with its prompt."""
    section = re.split(r"\n\n([^\n]+)\n-+\n", TUTORIAL)
    text = dict(zip(section[1::2], section[2::2], strict=True))[title]
    found = re.findall(r"^    (guest# |# )(.+)$", text, re.MULTILINE)
    assert found, title
    return found


def snippet() -> str:
    (text,) = re.findall(r"\.\. code-block:: xml\n\n((?:    .*\n)+)", TUTORIAL)
    return str(text)


def walk(xen: XenHost, title: str, guest: Guest | None = None) -> str:
    """Do what a section says; returns all that was printed."""
    printed = ""
    for prompt, command in commands(title):
        if prompt == "# ":
            printed += xen.check(f"cd {FOLDER} && {command}", timeout=600).stdout
        else:
            assert guest
            printed += guest.check("run", f"mkdir -p /mnt; {command}", timeout=300)
    return printed


@pytest.fixture(scope="module")
def xen(systemd_host: XenHost) -> XenHost:
    """A host with nothing of ours but the package in a folder."""
    package = build_package()
    systemd_host.put(package, f"{FOLDER}/{package.name}")
    systemd_host.put(systemd_host.images.guest_tools_disk, DISK)
    xml = operator.domain_xml("db1", [snippet()], ram_mib=256, disk=DISK)
    systemd_host.write(f"{FOLDER}/db1.xml", xml.encode())
    return systemd_host


def test_install_and_make_a_pool(xen: XenHost) -> None:
    assert xen.run("nvdimmctl --version").returncode != 0, "nothing of ours is there yet"
    walk(xen, "Install")
    printed = walk(xen, "Make a pool")
    assert "+ mkfs.ext4" in printed
    assert "pool main: ok" in printed
    assert re.search(r"\| main +\| fsdax .*\| ok +\|", printed)
    assert "[ .." in printed or "[..." in printed
    assert "dax" in xen.check("findmnt -n -o OPTIONS /mnt/main").stdout


def test_all_is_well(xen: XenHost) -> None:
    results = re.findall(r"^(\S.*?) +(PASS|NOTE|WARN|FAIL) ", walk(xen, "Is all well?"), re.MULTILINE)
    assert ("nvdimmd", "PASS") in results
    assert [found for found in results if found[1] in ("WARN", "FAIL")] == [("memory type", "WARN")]


def test_define_and_start(xen: XenHost) -> None:
    guest = Guest(xen, "db1")
    printed = walk(xen, "Define and start a guest")
    assert "Mapping calls:" in printed
    assert "/mnt/main/db1.img" in printed
    assert "mapped" in printed
    assert [disk.size for disk in guest.wait_report().disks] == [64 << 20]
    walk(xen, "In the guest", guest)
    again = guest.reboot()
    assert again.problems == ()
    assert guest.check("run", "mkdir -p /mnt && mount -o dax /dev/pmem0 /mnt && cat /mnt/file").strip() == "hello"
    guest.check("run", "umount /mnt")


def test_put_it_all_away(xen: XenHost) -> None:
    printed = walk(xen, "Put it all away")
    assert "db1.img" in printed
    assert "ledger.sqlite" in printed
    assert xen.run("nvdimmctl --version").returncode != 0
    assert xen.run("ls /etc/nvdimm-driver").returncode != 0
    assert (
        xen.run("find /etc /usr /lib/systemd -name '*nvdimmd*' -o -name '*nvdimm-d*' -o -name 50-nvdimm").stdout == ""
    )
    assert xen.check("virsh -c xen:///system list --all").returncode == 0
