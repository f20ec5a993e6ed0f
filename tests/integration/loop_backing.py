# SPDX-License-Identifier: Apache-2.0
"""A plug-in that makes nvdimmctl take a loop device for a pmem namespace, and work as slowly as a test wants."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Self

from oslo_config import cfg

from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.model import BackingIdentity, NvdimmSpec, Progress
from nvdimm_driver.plugins import ByteRange, unwatched

SLOW_SECONDS = 0.05


class LoopBacking(FsdaxBacking):
    """fsdax on a ``loop_pmem.FileSystem``, without the check of the page tables.

    :param steps: a file that grows by a byte for each step of long work, which then takes :data:`SLOW_SECONDS`; without
        the file, work is fast.
    """

    name = "bench"  # the first by name that handles a path is taken

    def __init__(self, folder: Path, steps: Path) -> None:
        super().__init__(
            locks=Locks(folder / "locks"),
            sysfs=folder / "sys",
            mountinfo=folder / "mountinfo",
            cross_check=lambda fd, located: None,
        )
        self.steps = steps

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        folder = Path(conf.state_dir)
        return cls(folder.parent, folder / "steps")

    def create(self, spec: NvdimmSpec, progress: Progress = unwatched) -> BackingIdentity:
        return super().create(spec, self._stepping(progress))

    def provision(
        self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
    ) -> BackingIdentity:
        return super().provision(spec, self._stepping(progress), identity)

    def _stepping(self, progress: Progress) -> Progress:
        def tell(done: int, total: int) -> None:
            self.step()
            progress(done, total)

        return tell

    def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        opened = super().open_bytes(spec, write=write)
        return SlowBytes(opened, self)

    def step(self) -> None:
        """Record a step and take the time for it."""
        if self.steps.exists():
            with open(self.steps, "ab") as file:
                file.write(b".")
            time.sleep(SLOW_SECONDS)


class SlowBytes(ByteRange):
    """A byte range of which each read is a step."""

    def __init__(self, opened: ByteRange, backing: LoopBacking) -> None:
        self.size = opened.size
        self.opened = opened
        self.backing = backing

    def sync(self) -> None:
        self.opened.sync()

    def close(self) -> None:
        self.opened.close()

    def _read(self, offset: int, length: int) -> bytes:
        self.backing.step()
        return self.opened.read(offset, length)

    def _write(self, offset: int, data: bytes) -> None:
        self.opened.write(offset, data)
