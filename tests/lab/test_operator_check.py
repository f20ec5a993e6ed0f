"""Each thing that can come apart is taken apart on purpose: check finds it, and --repair mends it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.host import XenHost

pytestmark = pytest.mark.lab
NAME, FILE, SIZE_MIB = "checked", "/mnt/pmem0/checked.img", 16
LEDGER = "/var/lib/nvdimm-driver/ledger.sqlite"
COPY = "python3 -c 'import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))'"


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """The host, with a domain whose file has bytes of its own."""
    operator.define(driver_host, NAME, [operator.nvdimm(FILE, SIZE_MIB)])
    driver_host.check(f"seq 100000 | dd of={FILE} conv=notrunc && sync {FILE}")
    assert check(driver_host) == []
    yield driver_host
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {FILE}")


@pytest.fixture(autouse=True)
def all_is_well(xen: XenHost) -> Iterator[None]:
    yield
    assert check(xen) == []


def check(xen: XenHost, *options: str) -> list[dict[str, str]]:
    """What check says; its status is 1 when something is left."""
    result = xen.run(f"{operator.NVDIMMCTL} check -f json {' '.join(options)}")
    rows: list[dict[str, str]] = json.loads(result.stdout)
    assert result.returncode == int(any(row["Done"] != "yes" for row in rows)), result
    return rows


def finds(xen: XenHost, problem: str, path: str = FILE) -> None:
    """That is found, mended, and gone."""
    (row,) = check(xen)
    assert problem in row["Problem"]
    assert (row["Domain"], row["Path"]) == (NAME, path)
    (row,) = check(xen, "--repair")
    assert (row["Domain"], row["Path"], row["Done"]) == (NAME, path, "yes")


def content(xen: XenHost) -> str:
    return operator.host_sha256(xen, FILE, 0, SIZE_MIB << 20)


def keep_ledger(xen: XenHost) -> None:
    xen.check(f"rm -f /root/kept.sqlite; {COPY} {LEDGER} /root/kept.sqlite")


def bring_ledger_back(xen: XenHost) -> None:
    xen.check(f"rm {LEDGER}*; {COPY} /root/kept.sqlite {LEDGER}")


def test_a_file_that_was_moved(xen: XenHost) -> None:
    before = content(xen)
    xen.check(f"mkdir /mnt/pmem0/folder && mv {FILE} /mnt/pmem0/folder/other")
    rows = check(xen)
    assert "moved to /mnt/pmem0/folder/other" in rows[0]["Problem"]
    assert [row["Done"] for row in check(xen, "--repair")] == ["yes"]
    assert content(xen) == before
    xen.check("rmdir /mnt/pmem0/folder")


def test_a_file_that_was_truncated(xen: XenHost) -> None:
    before = xen.check(f"head -c 1M {FILE} | sha256sum").stdout
    xen.check(f"truncate -s 8M {FILE}")
    finds(xen, f"it is {8 << 20} bytes too short")
    assert xen.check(f"head -c 1M {FILE} | sha256sum").stdout == before
    operator.start(xen, NAME)
    xen.check(f"{operator.VIRSH} destroy {NAME}")


def test_a_file_from_a_backup(xen: XenHost) -> None:
    before = content(xen)
    xen.check(f"cp --sparse=never {FILE} /mnt/pmem0/backup && mv /mnt/pmem0/backup {FILE} && sync /mnt/pmem0")
    finds(xen, "another object")
    assert content(xen) == before


def test_a_copy_with_the_mark(xen: XenHost) -> None:
    xen.check(f"cp -a --sparse=never {FILE} /mnt/pmem0/copy")
    finds(xen, f"slot 0, which is {FILE}", "/mnt/pmem0/copy")
    xen.check("rm /mnt/pmem0/copy")


def test_a_ledger_that_was_lost(xen: XenHost) -> None:
    before = operator.show(xen, NAME)
    xen.check(f"mkdir /root/lost && mv {LEDGER}* /root/lost")
    rows = check(xen)
    assert (NAME, FILE) in {(row["Domain"], row["Path"]) for row in rows}
    assert {row["Done"] for row in check(xen, "--repair")} == {"yes"}
    assert operator.show(xen, NAME) == before
    operator.start(xen, NAME)
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    xen.check("rm -r /root/lost")


def test_a_ledger_that_is_behind(xen: XenHost) -> None:
    """An old one is brought back, which does not know a domain; what it thinks of others has not changed."""
    keep_ledger(xen)
    operator.define(xen, "later", [operator.nvdimm("/mnt/pmem0/later.img", SIZE_MIB)])
    bring_ledger_back(xen)
    (row,) = check(xen)
    assert (row["Domain"], row["Path"]) == ("later", "/mnt/pmem0/later.img")
    assert [row["Done"] for row in check(xen, "--repair")] == ["yes"]
    operator.remove(xen, "later")
    xen.check("rm /mnt/pmem0/later.img")


def test_a_frozen_file_of_a_domain_that_is_gone(xen: XenHost) -> None:
    """The ledger was lost while a guest ran: its file stays frozen until it is shut down."""
    keep_ledger(xen)
    operator.start(xen, NAME)
    bring_ledger_back(xen)
    (row,) = check(xen, "--repair")
    assert row["Done"] == ""
    assert "it is frozen" in row["Problem"]
    assert "shut the guest with domid" in row["Remedy"]
    assert "i" in xen.check(f"lsattr {FILE}").stdout.split()[0]
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    finds(xen, "it is frozen")
    assert "i" not in xen.check(f"lsattr {FILE}").stdout.split()[0]


def test_a_start_of_an_earlier_boot(xen: XenHost) -> None:
    operator.start(xen, NAME)
    keep_ledger(xen)
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    bring_ledger_back(xen)
    xen.check(
        'python3 -c \'import sqlite3; db = sqlite3.connect("/var/lib/nvdimm-driver/ledger.sqlite"); '
        'db.execute("UPDATE attachment SET boot_id = 1"); db.commit()\''
    )
    finds(xen, "is over, and not put away", "")
    assert operator.show(xen, NAME)["state"] == "off"


def test_a_file_that_is_gone(xen: XenHost) -> None:
    xen.check(f"mv {FILE} /root/away")
    finds(xen, "it is not there")
    assert operator.show(xen, NAME)["nvdimms"][0]["identity"] is None
    result = xen.run(f"{operator.VIRSH} start {NAME}")
    assert "is not provisioned" in result.stderr
    again = "/root/again.xml"
    xen.check(f"{operator.VIRSH} dumpxml {NAME} >{again} && {operator.VIRSH} define {again} && rm /root/away")
    assert operator.show(xen, NAME)["nvdimms"][0]["identity"] is not None
