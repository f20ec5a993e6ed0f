# SPDX-License-Identifier: Apache-2.0
"""The time that an operator waits: 'nvdimmctl --help' and a bare cliff application, 'list' of many and of few.

Run by hand: ``python -m tests.bench.bench_nvdimmctl``. The limits: 1.2 for --help, 2 for 10,000 NVDIMMs against 10.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from uuid import uuid4

from nvdimm_driver.model import GIB, MIB, Allocation, BackingIdentity, NvdimmSpec
from nvdimm_driver.state.ledger import Ledger

ROUNDS = 11
FEW, MANY = 10, 10_000
BARE = """
import sys
from cliff.app import App
from cliff.commandmanager import CommandManager
commands = CommandManager("bench.none")
sys.exit(App(description="bare", version="1", command_manager=commands, deferred_help=True).run(["--help"]))
"""
OURS = "import sys; from nvdimm_driver.cmd.nvdimmctl import main; sys.exit(main(sys.argv[1:]))"


def fill(path: Path, number: int) -> None:
    """Make a ledger with so many domains of one NVDIMM each."""
    ledger = Ledger(str(path))
    ledger._db.execute("PRAGMA synchronous = OFF")
    for index in range(number):
        uuid = str(uuid4())
        spec = NvdimmSpec(0, f"/mnt/pmem0/{index}.img", 64 * MIB)
        identity = BackingIdentity("fsdax", "namespace", 0, index + 100, 1, 64 * MIB)
        ledger.store(uuid, f"guest{index}", GIB, [Allocation(uuid, spec, identity, 64 * GIB, 100)])
    ledger.close()


def seconds(command: Sequence[str]) -> float:
    """Return the seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def compare(what: str, one: Sequence[str], other: Sequence[str]) -> None:
    """Run two commands in turns; print the time of one, and the other's as a multiple of it."""
    rounds = [(seconds(one), seconds(other)) for _ in range(ROUNDS + 1)][1:]
    ratios = sorted(second / first for first, second in rounds)
    print(
        f"{what}: {median(first for first, _ in rounds) * 1000:.0f} ms, "
        f"{median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def main() -> None:
    """Measure and print everything."""
    ours = [sys.executable, "-c", OURS]
    compare("bare cliff application, and nvdimmctl --help", [sys.executable, "-c", BARE], [*ours, "--help"])
    with tempfile.TemporaryDirectory() as name:
        confs = []
        for number in (FEW, MANY):
            folder = Path(name) / str(number)
            folder.mkdir()
            fill(folder / "ledger.sqlite", number)
            (folder / "conf").write_text(f"[DEFAULT]\nstate_dir = {folder}\n")
            confs.append(str(folder / "conf"))
        for form in ("json", "value", "table"):
            few, many = ([*ours, "--config-file", conf, "list", "-f", form] for conf in confs)
            compare(f"list of {FEW}, and of {MANY}, -f {form}", few, many)


if __name__ == "__main__":
    main()
