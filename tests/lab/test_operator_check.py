# SPDX-License-Identifier: Apache-2.0
"""Every inconsistency is made on purpose: check finds it, and --repair repairs it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.host import XenHost

pytestmark = pytest.mark.lab
NAME, SIZE_MIB = "checked", 16
MOVED, SHORT, RESTORED, GONE, COPIED = FILES = [f"/mnt/pmem0/checked-{slot}.img" for slot in range(5)]
LEDGER = "/var/lib/nvdimm-driver/ledger.sqlite"
COPY = "python3 -c 'import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))'"


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the host with a domain whose files differ in content."""
    operator.define(driver_host, NAME, [operator.nvdimm(file, SIZE_MIB) for file in FILES])
    for slot, file in enumerate(FILES):
        driver_host.check(f"seq {slot} 100000 | dd of={file} conv=notrunc && sync {file}")
    assert check(driver_host) == []
    yield driver_host
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {' '.join(FILES)}")


@pytest.fixture(autouse=True)
def all_is_well(xen: XenHost) -> Iterator[None]:
    """Check that nothing is left to repair after each test."""
    yield
    assert check(xen) == []


def check(xen: XenHost, *options: str) -> list[dict[str, str]]:
    """Return the rows of check; its status must be 1 exactly if something is left."""
    result = xen.run(f"{operator.NVDIMMCTL} check -f json {' '.join(options)}")
    rows: list[dict[str, str]] = json.loads(result.stdout)
    assert result.returncode == int(any(row["Done"] != "yes" for row in rows)), result
    return rows


def problems(rows: list[dict[str, str]], done: str) -> dict[str, str]:
    """Return problems by path, each path once; all are of the domain and have this value of Done."""
    assert {(row["Domain"], row["Done"]) for row in rows} == {(NAME, done)}
    found = {row["Path"]: row["Problem"] for row in rows}
    assert len(found) == len(rows)
    return found


def contents(xen: XenHost) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {file: operator.host_sha256(xen, file, 0, SIZE_MIB << 20) for file in FILES}


def frozen(xen: XenHost) -> set[bool]:
    """Return whether the files are immutable: the set of the answers."""
    return {"i" in line.split()[0] for line in xen.check(f"lsattr {' '.join(FILES)}").stdout.splitlines()}


@pytest.mark.thorough
def test_files_that_are_not_what_they_were(xen: XenHost) -> None:
    """One file is moved, one truncated, one restored from a backup, one deleted, and one copied with its mark."""
    before = contents(xen)
    xen.check(
        f"cd /mnt/pmem0 && mkdir folder && mv {MOVED} folder/other && truncate -s 8M {SHORT} && "
        f"cp --sparse=never {RESTORED} backup && mv backup {RESTORED} && mv {GONE} /root/away && "
        f"cp -a --sparse=never {COPIED} copy && sync ."
    )
    found = problems(check(xen), "")
    expected = {
        MOVED: "moved to /mnt/pmem0/folder/other",
        SHORT: "it is 8 MiB too short",
        RESTORED: "it is not the backing that was provisioned: its inode is ",
        GONE: "it is not there",
        "/mnt/pmem0/copy": f"slot {FILES.index(COPIED)}, but that is {COPIED}",
    }
    assert found.keys() == expected.keys()
    for path, problem in expected.items():
        assert problem in found[path]
    for options, repaired in (
        ([f"--zeros {SHORT} --zeros {GONE}"], {SHORT, GONE}),
        ([], expected.keys() - {SHORT, GONE}),
    ):
        rows = check(xen, "--repair", *options)
        (left,) = (row for row in rows if not row["Done"])
        assert (left["Path"], "it is not provisioned" in left["Problem"]) == (GONE, True)
        rows.remove(left)
        assert problems(rows, "yes").keys() == repaired
    xen.check("rmdir /mnt/pmem0/folder && rm /mnt/pmem0/copy")

    assert "is not provisioned" in xen.run(f"{operator.VIRSH} start {NAME}").stderr
    xen.check(f"{operator.VIRSH} dumpxml {NAME} >/root/again.xml && {operator.VIRSH} define /root/again.xml")
    assert None not in [nvdimm["identity"] for nvdimm in operator.show(xen, NAME)["nvdimms"]]
    after = contents(xen)
    assert [file for file in FILES if after[file] != before[file]] == [GONE]
    xen.check("rm /root/away")


def test_a_ledger_that_was_lost(xen: XenHost) -> None:
    before = {**operator.show(xen, NAME), "last_fault": ""}
    xen.check(f"mkdir /root/lost && mv {LEDGER}* /root/lost")
    assert set(FILES) <= problems([row for row in check(xen, "--repair") if row["Domain"] == NAME], "yes").keys()
    assert operator.show(xen, NAME) == before
    xen.check("rm -r /root/lost")


def taken_over(xen: XenHost) -> list[dict[str, str]]:
    """Repair with a ledger that is another file than before; return what else is repaired."""
    rows = check(xen, "--repair")
    (own,) = [row for row in rows if row["Path"] == LEDGER]
    assert own["Problem"].startswith("it is a backup or a copy")
    assert own["Done"] == "yes"
    return [row for row in rows if row is not own]


@pytest.mark.thorough
def test_a_ledger_that_is_not_of_now(xen: XenHost) -> None:
    """Restore an old ledger: it has a running guest as off, and does not know another domain."""
    xen.check(f"{COPY} {LEDGER} /root/old.sqlite")
    operator.define(xen, "later", [operator.nvdimm("/mnt/pmem0/later.img", SIZE_MIB)])
    operator.start(xen, NAME)
    xen.check(f"{COPY} {LEDGER} /root/running.sqlite")

    xen.check(f"rm {LEDGER}*; mv /root/old.sqlite {LEDGER}")
    rows = taken_over(xen)
    (later,) = (row for row in rows if row["Domain"] == "later")
    assert (later["Path"], later["Done"]) == ("/mnt/pmem0/later.img", "yes")
    rows.remove(later)
    assert problems(rows, "yes").keys() == set(FILES)
    assert all(
        "it is immutable" in row["Problem"] and "write into the ledger that the guest with domid" in row["Remedy"]
        for row in rows
    )
    assert frozen(xen) == {True}
    assert operator.show(xen, NAME)["state"] == "mapped"
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    assert frozen(xen) == {False}
    assert check(xen) == []

    xen.check(
        f"rm {LEDGER}*; mv /root/running.sqlite {LEDGER} && python3 -c 'import sqlite3; "
        f'db = sqlite3.connect("{LEDGER}"); db.execute("UPDATE attachment SET boot_id = 1"); db.commit()\''
    )
    rows = [row for row in taken_over(xen) if row["Domain"] == NAME]  # the other's mark is of the repair before
    (ended,) = problems(rows, "yes").items()
    assert (ended[0], "is over, but was not cleaned up" in ended[1]) == ("", True)
    assert operator.show(xen, NAME)["state"] == "off"
    operator.remove(xen, "later")
    xen.check("rm /mnt/pmem0/later.img")
