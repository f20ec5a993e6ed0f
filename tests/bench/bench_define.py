# SPDX-License-Identifier: Apache-2.0
"""The cost of a define through nvdimmd, as a multiple of one directly to libvirtd; real libxl driver, no Xen.

Run by hand, as root: ``python -m tests.bench.bench_define``. libvirtd gets the same both ways. The NVDIMM's file
already exists, so rewriting, checks and the ledger are measured, and not the writing of zeros.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import libvirt

from tests.bench.bench_proxy import compare
from tests.integration.bench_host import Host

TIMES = 5


def measure(folder: Path) -> None:
    """Measure on the host: this is the process that runs there."""
    straight = libvirt.open("xen+unix:///system?socket=/run/libvirt/libvirt-sock")
    through = libvirt.open("xen:///system")

    def define(end: tuple[Any, str]) -> None:
        for _ in range(TIMES):
            end[0].defineXML(end[1])

    for name, what in (("plain", "without"), ("db1", "with")):
        xml = (folder / f"{name}.xml").read_text()
        through.defineXML(xml)
        stored = straight.lookupByName(name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        compare(f"{TIMES} defines {what} NVDIMM", define, straight=(straight, stored), through=(through, xml))


def main() -> None:
    """Make the host, and run the measurement on it."""
    with tempfile.TemporaryDirectory() as name:
        host = Host(Path(name))
        try:
            plain = host.xml("plain", 2)
            text = plain.read_text()
            start, end = text.index("<memory model"), text.index("</memory>", text.index("<memory model"))
            plain.write_text(text[:start] + text[end + len("</memory>") :])
            host.xml("db1", 1)
            done = host.libvirtd.run(host.folder / "python/bin/python", "-m", __spec__.name, host.folder)
            print(done.stdout, done.stderr, sep="", end="")
        finally:
            host.libvirtd.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    else:
        main()
