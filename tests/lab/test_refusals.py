# SPDX-License-Identifier: Apache-2.0
"""Wrong input on a real host: a clear error at define or prepare, and nothing is left behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab import operator
from tests.lab.host import XenHost
from tests.lab.release import chosen

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
BREAKING_HOOK = "/etc/libvirt/hooks/libxl.d/60-break"
# Runs between prepare and the device model: adds a second mapping that the guards accept and Xen refuses.
BREAK_MAPPING = """\
#!/usr/bin/python3
import sqlite3, sys
if sys.argv[2] == "start":
    db = sqlite3.connect("/var/lib/nvdimm-driver/ledger.sqlite")
    beyond = 1 << 41
    db.execute("INSERT INTO mapping SELECT uuid, gfn_limit - 1, ?, 1 FROM attachment", (beyond,))
    db.execute("INSERT INTO area SELECT uuid, ?, 1 FROM attachment", (beyond,))
    db.commit()
"""


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> XenHost:
    """Return the host with the driver, a DAX file system, and a domain that owns a file on it."""
    operator.define(driver_host, "owner", [operator.nvdimm("/mnt/pmem0/owned.img", 16)])
    return driver_host


def refused(xen: XenHost, nvdimm: str) -> str:
    """Define a domain that must be refused; return the error. Nothing of it is left in libvirt or the pool."""
    files = xen.check("ls -A /mnt/pmem0").stdout
    xen.write("/root/wrong.xml", operator.domain_xml("wrong", [nvdimm]).encode())
    result = xen.run(f"{operator.VIRSH} define /root/wrong.xml")
    assert result.returncode == 1, result
    assert xen.run("virsh -q -c xen:///system dominfo wrong").returncode != 0
    assert xen.check("ls -A /mnt/pmem0").stdout == files
    return result.stderr


@contextmanager
def configured(xen: XenHost, text: str) -> Iterator[None]:
    """Add text to the configuration for a while; nvdimmd reads it at each use."""
    file = "/etc/nvdimm-driver/nvdimm-driver.conf.d/test.conf"
    xen.write(file, text.encode())
    try:
        yield
    finally:
        xen.check(f"rm {file}")


def test_a_file_in_no_pool(xen: XenHost) -> None:
    assert "/root/a.img is in none of the host's pools" in refused(xen, operator.nvdimm("/root/a.img", 16))


def test_a_quota_that_is_used_up(xen: XenHost) -> None:
    with configured(xen, "[pool:main]\nquota = 24M\n"):
        stderr = refused(xen, operator.nvdimm("/mnt/pmem0/a.img", 16))
    assert re.search("pool main: domains have .* of its quota of 24 MiB; 16 MiB more is too much", stderr)


def test_a_file_on_the_root_disk(xen: XenHost) -> None:
    with configured(xen, "[DEFAULT]\nallow_any_path = true\n"):
        stderr = refused(xen, operator.nvdimm("/root/a.img", 16))
    assert re.search(r"/root/a\.img.*not on persistent memory", stderr)


def test_a_file_of_another_domain(xen: XenHost) -> None:
    assert "/mnt/pmem0/owned.img belongs to domain owner" in refused(xen, operator.nvdimm("/mnt/pmem0/owned.img", 16))


def test_a_size_that_does_not_fit(xen: XenHost) -> None:
    assert re.search(r"/mnt/pmem0/big\.img.*(free|fit)", refused(xen, operator.nvdimm("/mnt/pmem0/big.img", 8192)))


def test_a_sparse_file(xen: XenHost) -> None:
    xen.check("truncate -s 16M /mnt/pmem0/sparse.img")
    assert re.search(r"sparse\.img.*(hole|sparse)", refused(xen, operator.nvdimm("/mnt/pmem0/sparse.img", 16)))
    xen.check("rm /mnt/pmem0/sparse.img")


def test_a_namespace_in_the_wrong_mode(xen: XenHost) -> None:
    with configured(xen, "[DEFAULT]\nallow_any_path = true\n"):
        assert re.search(r"/dev/pmem0.*fsdax", refused(xen, operator.nvdimm("/dev/pmem0", 16)))


def test_a_missing_qemu_for_the_tables(xen: XenHost) -> None:
    with configured(xen, "[acpi]\nqemu=/nonexistent/qemu\n"):
        stderr = refused(xen, operator.nvdimm("/mnt/pmem0/x.img", 16))
    assert "/nonexistent/qemu" in stderr


def test_the_ledger_has_nothing_of_what_was_refused(xen: XenHost) -> None:
    assert "wrong" not in xen.check(f"{operator.NVDIMMCTL} list -f value").stdout


def test_a_file_replaced_between_define_and_start(xen: XenHost) -> None:
    operator.define(xen, "changed", [operator.nvdimm("/mnt/pmem0/changed.img", 16)])
    xen.check("cp /mnt/pmem0/changed.img /mnt/pmem0/new && mv /mnt/pmem0/new /mnt/pmem0/changed.img && sync")
    result = xen.run("virsh -q -c xen:///system start changed")
    assert result.returncode != 0
    assert "/mnt/pmem0/changed.img is not the backing that was provisioned" in result.stderr
    assert "is not the backing that was provisioned" in operator.show(xen, "changed")["last_fault"]
    assert "i" not in xen.check("lsattr /mnt/pmem0/changed.img").stdout.split()[0]


def test_a_file_truncated_between_define_and_start(xen: XenHost) -> None:
    operator.define(xen, "short", [operator.nvdimm("/mnt/pmem0/short.img", 16)])
    xen.check("truncate -s 8M /mnt/pmem0/short.img")
    result = xen.run("virsh -q -c xen:///system start short")
    assert result.returncode != 0
    assert "/mnt/pmem0/short.img" in result.stderr


def test_a_missing_xen_library_names_both_versions(xen: XenHost) -> None:
    library = xen.check(f"ls /usr/lib/*/libxenctrl.so.{chosen().xen}").stdout.strip()
    other = library.replace(chosen().xen, "4.14")
    xen.check(f"mv {library} {other}")
    try:
        result = xen.run("virsh -q -c xen:///system start owner")
    finally:
        xen.check(f"mv {other} {library}")
    assert result.returncode != 0
    assert chosen().xen in result.stderr
    assert "4.14" in result.stderr


def test_a_failing_device_model_leaves_nothing(xen: XenHost) -> None:
    """Xen refuses the second mapping: the first is taken back, and the ledger and both logs have the reason."""
    xen.write(BREAKING_HOOK, BREAK_MAPPING.encode(), 0o755)
    try:
        result = xen.run("virsh -q -c xen:///system start owner")
    finally:
        xen.check(f"rm {BREAKING_HOOK}")
    assert result.returncode != 0
    reason = operator.show(xen, "owner")["last_fault"]
    assert "0x20000000000" in reason
    assert reason in xen.get(operator.LOG).decode()
    assert reason in xen.get("/var/log/xen/qemu-dm-owner.log").decode()
    assert "owner" not in xen.check("xl list").stdout
    assert operator.show(xen, "owner")["state"] == "off"
    assert "i" not in xen.check("lsattr /mnt/pmem0/owned.img").stdout.split()[0]
    operator.start(xen, "owner").wait_report()
    assert operator.show(xen, "owner")["last_fault"] == ""
    xen.check("virsh -q -c xen:///system destroy owner")
