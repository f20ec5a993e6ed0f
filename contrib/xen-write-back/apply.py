#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""``apply.py FOLDER``: make the change of write-back.cocci in a source tree of Xen, all of it or nothing.

What spatch makes of each file is taken back and compared: a source that is not as the change knows it is refused.
"""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATCH = HERE / "write-back.cocci"
HEADER = HERE / "direct-mmio-wb.h"
X86 = Path("xen/arch/x86")
HEADER_IN_XEN = X86 / "include/asm/hvm" / HEADER.name
MARK = "direct-mmio-wb"


class Refused(Exception):
    """The source is not one that the change is known to be right for."""


# What each file gets, its white space left out: a pattern, what takes it back, and how often the pattern must be there.
Undo = tuple[tuple[str, str, int], ...]
NAME = r"\w+"
INCLUDED = (re.escape(f"#include<asm/hvm/{HEADER.name}>"), "", 1)
FLAGS = r"p2m_type_to_flags\(p2m,p2mt,mfn,%d\)"
UNCACHED = r"(?<=casep2m_mmio_direct:return)(MTRR_TYPE_UNCACHABLE|X86_MT_UC);"
CHANGES: dict[str, Undo] = {
    "mm/p2m-ept.c": (INCLUDED, (r"(?<=casep2m_mmio_direct:return)direct_mmio_emt\(d,gfn,mfn,order,ipat\);", ";", 1)),
    "mm/p2m-pt.c": (
        INCLUDED,
        *((rf"direct_mmio_flags\(p2m,p2mt,{NAME},mfn,{n},({FLAGS % n})\)", r"\1", 1) for n in (0, 1, 2)),
    ),
    "hvm/hvm.c": (INCLUDED, (r"(?<=ioreq_server_destroy_all\(d\);)direct_mmio_flush\(d\);", "", 1)),
    "setup.c": ((rf'if\(hvm_hap_supported\(\)\)safe_strcat\((xen_cap_info|\*info),"{MARK}"\);', "", 1),),
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
        before, after = path.read_text(), _changed(path)
        lines = difflib.unified_diff(
            before.splitlines(True), after.splitlines(True), f"a/{X86 / name}", f"b/{X86 / name}"
        )
        difference = "".join(lines)
        if not _is(before, after, wanted):
            shown = difference or "nothing was changed\n"
            raise Refused(f"{X86 / name}: not as the semantic patch knows it, which would have made:\n{shown}")
        found[path] = after
        differences.append(difference)
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


def _is(before: str, after: str, wanted: Undo) -> bool:
    """Return True if `after` is `before` with what is wanted, and differs in nothing else but white space."""
    undone = re.sub(r"\s", "", after)
    for pattern, back, times in wanted:
        undone, count = re.subn(pattern, back, undone)
        if count != times:
            return False
    return undone == re.sub(UNCACHED, ";", re.sub(r"\s", "", before))


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
