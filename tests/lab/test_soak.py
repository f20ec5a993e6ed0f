# SPDX-License-Identifier: Apache-2.0
"""A host that works for long: nothing of the driver's, libvirt's or Xen's grows from cycle to cycle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest

from nvdimm_driver.rpc.workers import THREADS
from tests.lab import operator
from tests.lab.guest import install_guest
from tests.lab.host import XenHost

pytestmark = pytest.mark.lab
MIB = 1 << 20
NAMES = ("soak-one", "soak-two")
BASE = 5 << 30  # a save goes through all frames up to the guest's last one
MEASURE = """\
import glob, json, os, sqlite3, subprocess
def output(*command): return subprocess.run(command, check=True, capture_output=True, text=True).stdout
found = {}
for name, file in (("nvdimmd", "/run/nvdimmd.pid"), ("libvirtd", "/run/libvirtd.pid")):
    pid = open(file).read().strip()
    found[name + " descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
    found[name + " tasks"] = len(os.listdir(f"/proc/{pid}/task"))
    status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    found[name + " KiB"] = int(status["VmRSS"].split()[0])
ledger = sqlite3.connect("file:/var/lib/nvdimm-driver/ledger.sqlite?mode=ro", uri=True)
for (table,) in ledger.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
    if table not in ("event", "counter") and not table.startswith("sqlite_"):
        found["ledger " + table] = ledger.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
found["xenstore"] = output("xenstore-ls", "-f", "/").count("\\n")
found["event channels"] = output(*glob.glob("/usr/lib/xen-[0-9]*/bin/lsevtchn"), "0").count("\\n")
facts = dict(line.split(":", 1) for line in output("xl", "info").splitlines() if ":" in line)
found["Xen's free MiB"] = int(next(value for key, value in facts.items() if key.strip() == "free_memory"))
found["domains"] = output("xl", "list").count("\\n")
found["locks"] = len(glob.glob("/var/lib/nvdimm-driver/locks/*"))
found["folders of domains"] = len(glob.glob("/var/lib/nvdimm-driver/domains/*"))
found["the driver's processes"] = output("ps", "-eo", "args").count("nvdimm_driver")
print(json.dumps(found))
"""
SPREAD = {
    "nvdimmd KiB": 4096,
    "libvirtd KiB": 4096,
    "Xen's free MiB": 1,
    "nvdimmd tasks": sum(THREADS.values()),
    "libvirtd tasks": 20,
}
"""By how much a measure may differ; the others must be equal. Allocators round. Pools start a thread when more is to be
done at once than before, and keep it: libvirtd has 20 threads for calls at most (``max_workers``).
"""


@pytest.fixture
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the host with a guest's disk and the script that measures."""
    install_guest(driver_host)
    driver_host.write("/root/measure.py", MEASURE.encode())
    yield driver_host
    driver_host.check(f"rm -f /root/measure.py {' '.join(f'/mnt/pmem0/{name}.img' for name in NAMES)}")


def measure(xen: XenHost) -> dict[str, int]:
    """Return what the host uses now, with no guest of the test defined."""
    found = json.loads(xen.check("python3 /root/measure.py").stdout)
    assert isinstance(found, dict)
    return found


def cycle(xen: XenHost, names: Sequence[str], number: int, *, whole: bool) -> None:
    """Run guests from define to undefine: start, write, destroy; in a whole cycle also reboot, save and restore."""
    guests = []
    for place, name in enumerate(names):
        nvdimm = operator.nvdimm(f"/mnt/pmem0/{name}.img", 16)
        nvdimm = nvdimm.replace("</memory>", f"<address type='dimm' slot='0' base='{BASE:#x}'/></memory>")
        operator.define(xen, name, [nvdimm])
        guests.append(operator.start(xen, name))
        guests[place].wait_report()
    for place, guest in enumerate(guests):
        guest.write("/dev/pmem0", 0, MIB, 2 * number + place)
    written = [guest.sha256("/dev/pmem0", 0, MIB) for guest in guests]
    assert len(set(written)) == len(names)
    for guest in guests if whole else ():
        guest.reboot()
    for guest in guests if whole else ():
        xen.check(f"{operator.VIRSH} managedsave {guest.name} && {operator.VIRSH} start {guest.name}")
    assert [guest.sha256("/dev/pmem0", 0, MIB) for guest in guests] == written
    for guest in guests:
        xen.check(f"{operator.VIRSH} destroy {guest.name}")
        operator.remove(xen, guest.name)


@pytest.mark.parametrize("cycles", [1, pytest.param(500, marks=pytest.mark.long)])
def test_nothing_grows(xen: XenHost, cycles: int) -> None:
    whole = cycles > 1
    names = NAMES if whole else NAMES[:1]
    cycle(xen, names, 0, whole=whole)
    before = measure(xen)
    print(json.dumps(before))
    for number in range(1, cycles + 1):
        cycle(xen, names, number, whole=whole)
        after = measure(xen)
        print(json.dumps({"cycle": number} | after), flush=True)
        grown = {
            name: (value, after[name])
            for name, value in before.items()
            if abs(after[name] - value) > SPREAD.get(name, 0)
        }
        assert not grown
