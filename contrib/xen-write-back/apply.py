#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""``apply.py FOLDER``: make the change of write-back.cocci in a source tree of Xen, all of it or nothing.

The change is counted, line by line and name by name: a source that is not as the semantic patch knows it is refused.
"""

from __future__ import annotations

import difflib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATCH = HERE / "write-back.cocci"
HEADER = HERE / "direct-mmio-wb.h"
X86 = Path("xen/arch/x86")
HEADER_IN_XEN = X86 / "include/asm/hvm" / HEADER.name
INCLUDE = f"#include <asm/hvm/{HEADER.name}>"
MARK = "direct-mmio-wb"


class Refused(Exception):
    """The source is not one that the change is known to be right for."""


@dataclass(frozen=True)
class Change:
    """The lines that a file loses and gets: how many, and how many of the latter have each text."""

    removed: int
    added: int
    texts: dict[str, int]


CHANGES = {
    "mm/p2m-ept.c": Change(1, 2, {INCLUDE: 1, "return direct_mmio_emt(d, gfn, mfn, order, ipat);": 1}),
    "mm/p2m-pt.c": Change(3, 4, {INCLUDE: 1, "direct_mmio_flags(": 3, "mfn, 0)": 1, "mfn, 1)": 1, "mfn, 2)": 1}),
    "hvm/hvm.c": Change(0, 2, {INCLUDE: 1, "direct_mmio_flush(d);": 1}),
    "setup.c": Change(0, 2, {"hvm_hap_supported()": 1, f'"{MARK} "': 1}),
}


def change(source: Path) -> str:
    """Change the source tree of Xen in a folder; return the difference.

    :raises Refused: when there is anything in it that the semantic patch does not know; nothing is changed then.
    """
    if not (source / X86 / "include/asm/hvm").is_dir():
        raise Refused(f"{source}: no source tree of Xen")
    if (source / HEADER_IN_XEN).exists():
        raise Refused(f"{source}: has {HEADER_IN_XEN} already")
    found, differences = {}, []
    for name, wanted in CHANGES.items():
        path = source / X86 / name
        if not path.is_file():
            raise Refused(f"{source}: has no {X86 / name}")
        found[path] = _changed(path)
        differences += _checked(X86 / name, path.read_text(), found[path], wanted)
    for path, text in found.items():
        path.write_text(text)
    shutil.copy(HEADER, source / HEADER_IN_XEN)
    return "".join(differences)


def _changed(path: Path) -> str:
    """Return a file's text with what spatch changes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(path, folder))
        command = ["spatch", "--very-quiet", "--no-show-diff", "--in-place", "--sp-file", str(PATCH), str(copy)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"{path}: spatch ended with {done.returncode}: {done.stderr.strip()}")
        return copy.read_text()


def _checked(name: Path, before: str, after: str, wanted: Change) -> list[str]:
    """Return the difference of a file's texts, with the names that patch takes; raise Refused for any but `wanted`."""
    lines = list(difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{name}", f"b/{name}"))
    removed = [line for line in lines[2:] if line.startswith("-")]
    added = [line for line in lines[2:] if line.startswith("+") and line != "+\n"]
    counts = {text: sum(line.count(text) for line in added) for text in wanted.texts}
    if (len(removed), len(added), counts) != (wanted.removed, wanted.added, wanted.texts):
        shown = "".join(lines) or "nothing was changed\n"
        raise Refused(f"{name}: not as the semantic patch knows it, which would have made:\n{shown}")
    return lines


def main() -> int:
    """Change the tree that the command line names, and print the difference; return the exit status."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(change(Path(sys.argv[1])), end="")
    except Refused as error:
        print(f"apply.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
