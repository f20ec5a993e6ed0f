# SPDX-License-Identifier: Apache-2.0
"""The persistent memory of the hosts that nova-compute runs on, and the nvdimmctl that it finds there.

Real: ext4 on a loop device, the ledger, pools, claims, provisioning, wiping, freezing, and nvdimmctl as a process of
its own. Not real: the loop device is shown as pmem by a tree of sysfs files, and there is no Xen to map anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvdimm_driver.acpi.native import NativeAcpiBuilder
from nvdimm_driver.conf import configured_pools, load
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.lifecycle.emulators import Emulators
from nvdimm_driver.lifecycle.plan import HostFacts
from nvdimm_driver.model import GIB, Location, NvdimmSpec, Record
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.xen.dry_run import DryRunMapper
from nvdimm_driver.xml.parse_domain import extract
from tests.integration.loop_backing import LoopBacking
from tests.integration.loop_pmem import SPA, FileSystem
from tests.ledger_copies import forget_in_use

PROJECT = Path(__file__).parents[3]
NVDIMMCTL = Path(sys.executable).with_name("nvdimmctl")
CONF = """
[DEFAULT]
state_dir = {state}
[xen]
mapper = dry-run
[acpi]
builder = native
"""
# Every call is noted, so that a test can tell what came before what.
COMMAND = """#!/bin/sh
echo "$*" >>{folder}/calls
while [ -e "{folder}/hold-$1" ]; do sleep 0.1; done
PYTHONPATH={folder}/packages:{project} exec {nvdimmctl} --config-file {folder}/conf "$@"
"""


class PmemHost:
    """The pmem of several hosts: one file system with a pool for each of them, named after the host, and one ledger.

    nova's functional tests run all hosts in one process, which has one PATH: hosts that are up together share this.

    :param folder: an empty one.
    :param pools: names of the pools.
    """

    def __init__(self, fs: FileSystem, folder: Path, pools: tuple[str, ...]) -> None:
        self.fs = fs
        self.folder = folder
        self.state = fs.memory / f"state-{'-'.join(pools)}"
        self.pools = {name: fs.root / name for name in pools}
        self.calls_file = folder / "calls"
        self._make_state()
        self._make_command()
        self.driver = self._make_driver()

    def _make_driver(self) -> XenNvdimmDriver:
        return XenNvdimmDriver(
            ledger=Ledger(str(self.state / "ledger.sqlite")),
            state_dir=self.state,
            backings=[LoopBacking(self.state.parent, self.state / "steps")],
            acpi=NativeAcpiBuilder(),
            mapper=DryRunMapper(),
            host=HostFacts(46),
            emulators=Emulators("/usr/bin/qemu", (), lambda path: None),
            gap=GIB,
            dsm="aml",
            pools=Pools(configured_pools(load([str(self.folder / "conf")]))),
        )

    @property
    def bin(self) -> Path:
        """Return the folder of programs for PATH."""
        return self.folder / "bin"

    def nvdimmctl(self, *words: object) -> str:
        """Run nvdimmctl as an operator does; what it prints."""
        command = [self.bin / "nvdimmctl", *words]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def provision(self, pool: str, *names: str, size: str = "16M", label_size: str = "2M") -> None:
        """Make namespaces, all of them zeros."""
        for name in names:
            self.nvdimmctl("provision", "--pool", pool, name, "--size", size, "--label-size", label_size)

    def path(self, pool: str, name: str) -> Path:
        return self.pools[pool] / name

    def calls(self) -> list[str]:
        """The nvdimmctl commands that were run, in order."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def verbs(self) -> list[str]:
        """Those of them that changed something, by their first word."""
        return [verb for verb in (each.split()[0] for each in self.calls()) if verb in ("wipe", "release")]

    def forget_calls(self) -> None:
        self.calls_file.unlink(missing_ok=True)

    def write(self, pool: str, name: str, data: bytes) -> None:
        """Write at the start of a namespace as a guest does: to the memory, past the file system."""
        path = self.path(pool, name)
        subprocess.run(["sync", "-f", path], check=True)
        start = self._location(path).extents[0].spa - SPA
        with open(self.fs.image, "r+b", buffering=0) as image:
            image.seek(start)
            image.write(data)
        with open(path, "rb") as file:  # what the page cache has of it is not what the memory has now
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, pool: str, name: str) -> bytes:
        """All that the memory of a namespace has."""
        return self.fs.stored(self._location(self.path(pool, name)))

    def claimed(self) -> dict[str, str]:
        """The uuid of the domain that has each claimed path."""
        return {item.spec.path: record.uuid for record in self._records() for item in record.allocations}

    def running(self) -> set[str]:
        """uuids of the domains that run with NVDIMMs."""
        return {record.uuid for record in self._records() if record.start is not None}

    def mount(self, options: str) -> None:
        """Mount the file system anew: ``ro`` is what a kernel makes of one with errors."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.fs.root], check=True)

    @contextmanager
    def held(self, verb: str) -> Iterator[None]:
        """nvdimmctl does not begin with that verb before this ends."""
        hold = self.folder / f"hold-{verb}"
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()

    # --- what nvdimmd and the hook do with the driver ---

    def define(self, xml: str) -> None:
        domain = extract(xml)
        if domain is not None:
            self.driver.check(domain)
            self.driver.define(domain)

    def start(self, xml: str) -> None:
        domain = extract(xml)
        if domain is not None:
            self.driver.prepare(domain)

    def stop(self, uuid: str) -> None:
        record = self.driver.ledger.find_domain(uuid)
        if record is not None and record.start is not None:
            self.driver.starts.put_away(record.start)

    def lose_ledger(self, *, marks: bool) -> None:
        """Begin with an empty ledger, as nvdimmctl does when there is none.

        :param marks: the files keep the marks of their owners; without, they are as devices are.
        """
        paths = self.claimed()
        self.driver.ledger.close()
        self._make_state()
        for path in () if marks else paths:
            for name in os.listxattr(path):
                os.removexattr(path, name)
        self.driver = self._make_driver()

    def close(self) -> None:
        """Leave the file system as it was."""
        for uuid in self.running():
            self.stop(uuid)
        self.driver.ledger.close()
        for pool in self.pools.values():
            shutil.rmtree(pool)

    def _location(self, path: Path) -> Location:
        return self.fs.backing.locate(NvdimmSpec(0, str(path), path.stat().st_size))

    def _records(self) -> tuple[Record, ...]:
        return self.driver.ledger.domains()

    def _make_state(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.state.mkdir(exist_ok=True)
        for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "steps"):
            (self.state / name).unlink(missing_ok=True)
        forget_in_use(self.state)
        for path in self.pools.values():
            path.mkdir(exist_ok=True)

    def _make_command(self) -> None:
        pools = "".join(f"[pool:{name}]\npaths = {path}\n" for name, path in self.pools.items())
        (self.folder / "conf").write_text(CONF.format(state=self.state) + pools)
        info = self.folder / "packages/bench-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench\nVersion: 1\n")
        entry = "[nvdimm_driver.backings]\nbench = tests.integration.loop_backing:LoopBacking\n"
        (info / "entry_points.txt").write_text(entry)
        self.bin.mkdir()
        command = self.bin / "nvdimmctl"
        command.write_text(COMMAND.format(folder=self.folder, project=PROJECT, nvdimmctl=NVDIMMCTL))
        command.chmod(0o755)
