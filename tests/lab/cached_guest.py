# SPDX-License-Identifier: Apache-2.0
"""A guest whose NVDIMMs are cached or not, and the look at its nested page tables that tells which."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

from tests import xen_write_back
from tests.lab import npt, operator
from tests.lab.guest import install_guest
from tests.lab.host import XenHost

NAME, FILE, DEVICE = "cached", "/mnt/pmem0/cached.img", "/dev/pmem1"
FILE_MIB, DEVICE_MIB, LABEL_KIB, ALIGN_MIB = 34, 32, 128, 16
PAGE = 4096
BASE_GIB = 5
"""Of the first NVDIMM; a save goes through all frames up to the guest's last one."""
UUID = "3f6a1c52-0d0c-4b0e-8b57-0c7a4d1e9a11"
RAM = (0x100, 0x4000)
"""Guest frames (first, count) of its RAM, above the first MiB, which has other types."""
STARTED = """\
import json, sqlite3
ledger = sqlite3.connect("file:/var/lib/nvdimm-driver/ledger.sqlite?mode=ro", uri=True)
print(json.dumps([ledger.execute(f"SELECT {columns}").fetchall() for columns in (
    "gfn, mfn, count FROM mapping ORDER BY gfn", "gfn, count FROM uncached")]))
"""


def nvdimms() -> list[str]:
    """Return a file with a label area, which the guest itself writes, and a device without."""
    labelled = operator.nvdimm(FILE, FILE_MIB, label_kib=LABEL_KIB)
    labelled = labelled.replace("</source>", f"<alignsize unit='MiB'>{ALIGN_MIB}</alignsize></source>")
    both = (labelled, operator.nvdimm(DEVICE, DEVICE_MIB))
    return [
        each.replace("</target>", f"</target><address type='dimm' slot='{slot}' base='{(BASE_GIB + slot) << 30:#x}'/>")
        for slot, each in enumerate(both)
    ]


def define(host: XenHost, cache: str | None = None) -> None:
    """Define the domain, anew if it is there; with `cache`, it overrides the host's option."""
    install_guest(host)
    xml = operator.domain_xml(NAME, nvdimms(), dsm="aml", cache=cache)
    host.write(f"/root/{NAME}.xml", xml.replace("<name>", f"<uuid>{UUID}</uuid><name>").encode())
    host.check(f"{operator.VIRSH} define /root/{NAME}.xml")


def python(host: XenHost, script: str, *arguments: int) -> str:
    """Run a script in dom0 with the driver; return its output."""
    host.write("/root/script.py", script.encode())
    return host.check(f"/usr/bin/python3 /root/script.py {' '.join(map(str, arguments))}").stdout


def domid(host: XenHost) -> int:
    """Return the domid of the guest."""
    return int(host.check(f"xl domid {NAME}").stdout)


def check_leaves(host: XenHost, *, cached: bool) -> None:
    """Check each entry of the guest's NVDIMMs: where it leads, and that it is cached, but for label areas; and RAM."""
    mappings, holes = json.loads(python(host, STARTED))
    labels = {gfn + n for gfn, count in holes for n in range(count)}
    assert len(labels) == LABEL_KIB * 1024 // PAGE
    number, sizes = domid(host), set()
    for gfn, mfn, count in mappings:
        found = npt.of_guest(host, number, gfn, count)
        assert sum(leaf.count for leaf in found) == count
        for leaf in found:
            sizes.add((leaf.count, leaf.gfn in labels))
            assert leaf.mfn - leaf.gfn == mfn - gfn
            assert leaf.is_cached == (cached and leaf.gfn not in labels), f"{leaf}"
    assert sizes == {(512, False), (1, True)}
    ram = npt.of_guest(host, number, *RAM)
    assert ram
    assert all(leaf.is_cached for leaf in ram)


def unpack_changed_xen(folder: Path) -> Path:
    """Return Debian 12's hypervisor with the change, out of its package, which is built if the cache lacks it."""
    package = xen_write_back.load("build").build("bookworm", 2)
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    (found,) = folder.glob("boot/xen-*-nvdimm.gz")
    unpacked = folder / "xen"
    unpacked.write_bytes(gzip.decompress(found.read_bytes()))
    return unpacked
