# SPDX-License-Identifier: Apache-2.0
"""The only plug-in that the bench without Xen needs: the bench has no persistent memory either."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from oslo_config import cfg

from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import BackingIdentity, NvdimmSpec, Progress
from nvdimm_driver.plugins import unwatched

MOUNTINFO = Path("/run/mountinfo")
GATES = Path("/run/gates")
"""Folder of FIFOs by name of a file: writing it waits until the test writes ``go`` or anything else, which fails."""


class BenchBacking(FsdaxBacking):
    """fsdax on a file system that only claims to be mounted with DAX, without the check of the page tables.

    A loop device cannot do DAX, and the page tables would show that. All else is real: files are written, located with
    FIEMAP, and made immutable.
    """

    name = "bench"  # the first by name that handles a path is taken

    @classmethod
    def from_conf(cls, conf: cfg.ConfigOpts) -> Self:
        backing = super().from_conf(conf)  # the tests of an upgrade have it of an earlier version, too
        backing.mountinfo, backing.cross_check = MOUNTINFO, lambda fd, located: None
        return backing

    def create(self, spec: NvdimmSpec, progress: Progress = unwatched) -> BackingIdentity:
        _wait_at_gate(spec.path)
        return super().create(spec, progress)

    def provision(
        self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
    ) -> BackingIdentity:
        _wait_at_gate(spec.path)
        return super().provision(spec, progress, *([identity] if identity else []))  # an earlier version takes none


def _wait_at_gate(path: str) -> None:
    gate = GATES / Path(path).name
    if gate.exists() and _read(gate) != b"go":
        raise BackingError(f"{path}: the test wants no bytes")


def _read(gate: Path) -> bytes:
    """Wait for one write to a FIFO."""
    with gate.open("rb", buffering=0) as fifo:
        return fifo.read(4)
