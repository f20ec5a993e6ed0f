# SPDX-License-Identifier: Apache-2.0
"""The tutorial, from the package to a guest with ext4 on DAX; `test_systemd` removes everything."""

from __future__ import annotations

import re

import pytest

from tests.lab import operator, tutorial
from tests.lab.guest import Guest
from tests.lab.host import XenHost

pytestmark = [pytest.mark.lab, pytest.mark.thorough]


@pytest.fixture(scope="module")
def xen(systemd_host: XenHost) -> XenHost:
    """Return a host without the driver, with the package in a folder."""
    tutorial.prepare(systemd_host)
    return systemd_host


def test_install_and_make_a_pool(xen: XenHost) -> None:
    assert xen.run("nvdimmctl --version").returncode != 0, "nothing of ours is there yet"
    tutorial.walk(xen, "Install")
    printed = tutorial.walk(xen, "Make a pool")
    assert "+ mkfs.ext4" in printed
    assert "pool main: ok" in printed
    assert re.search(r"\| main +\| fsdax .*\| ok +\|", printed)
    assert "[ .." in printed or "[..." in printed
    options = xen.check("findmnt -n -o OPTIONS /mnt/main").stdout.strip().split(",")
    assert {"dax=always", "nosuid", "nodev", "noexec"} <= {*options}


def test_all_is_well(xen: XenHost) -> None:
    results = re.findall(r"^(\S.*?) +(PASS|NOTE|WARN|FAIL) ", tutorial.walk(xen, "Is all well?"), re.MULTILINE)
    assert ("nvdimmd", "PASS") in results
    assert [found for found in results if found[1] in ("WARN", "FAIL")] == [("memory type", "WARN")]


def test_define_and_start(xen: XenHost) -> None:
    guest = Guest(xen, "db1")
    printed = tutorial.walk(xen, "Define and start a guest")
    assert "Mapping calls:" in printed
    assert "/mnt/main/db1.img" in printed
    assert "mapped" in printed
    assert [disk.size for disk in guest.wait_report().disks] == [64 << 20]
    tutorial.walk(xen, "In the guest", guest)
    again = guest.reboot()
    assert again.problems == ()
    assert guest.check("run", "mkdir -p /mnt && mount -o dax /dev/pmem0 /mnt && cat /mnt/file").strip() == "hello"
    guest.check("run", "umount /mnt")


def test_put_the_guest_away(xen: XenHost) -> None:
    tutorial.walk(xen, "Put the guest away")
    assert xen.check(f"{operator.VIRSH} list --all --name").stdout.split() == ["Domain-0"]
    assert xen.check(f"{operator.NVDIMMCTL} list -f json").stdout.strip() == "[]"
    assert xen.check("stat -c %s /mnt/main/db1.img").stdout.strip() == str(64 << 20)
