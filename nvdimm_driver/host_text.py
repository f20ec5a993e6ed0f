# SPDX-License-Identifier: Apache-2.0
"""Text of the host, which is bytes: names of files, lines of the kernel, what programs print. It need not be UTF-8.

A byte that is not UTF-8 becomes a surrogate, as in Python's own names of files (PEP 383), so a name still opens its
file. What goes out is UTF-8: there such a byte is shown as ``\\udcXX``.

Imports nothing but os and sys: the device model, which has to start fast, uses it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import TextIOWrapper
    from pathlib import Path

ESCAPED = "backslashreplace"
"""The ``errors`` of every stream and file that text goes out to."""
LOG_MODE = 0o640
_UNSEEN = (0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
"""Characters that change the order in which a line is shown (UAX #9), or take no place in it."""
_CONTROL = {
    **{each: f"\\x{each:02x}" for each in (*range(0x20), *range(0x7F, 0xA0)) if chr(each) not in "\t\n"},
    **{each: f"\\u{each:04x}" for each in _UNSEEN},
}


def use_utf8() -> None:
    """Run this program again with UTF-8 for names of files and text, unless the locale has that: call this first.

    In the locale de_DE.ISO-8859-1, Python would open another file than the one that a domain XML names.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def use_open_streams() -> None:
    """Open what is closed of the standard streams, so that no other file gets its number; reads and writes fail."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDONLY if number else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def decode(data: bytes) -> str:
    """Return the text; no bytes are refused."""
    return data.decode("utf-8", "surrogateescape")


def read(path: str | Path) -> str:
    """Return the text of a file, with its line ends as they are.

    :raises OSError: when it cannot be read.
    """
    with open(path, "rb") as file:
        return decode(file.read())


def open_log(path: str) -> TextIOWrapper:
    """Open a log file to append to it; a new one is for its owner and group alone: it names files and domains.

    :raises OSError: when it cannot be written.
    """
    return open(path, "a", encoding="utf-8", errors=ESCAPED, opener=lambda name, flags: os.open(name, flags, LOG_MODE))


def escaped(text: str) -> str:
    """Return the text as it is shown: valid in UTF-8."""
    return text.encode("utf-8", ESCAPED).decode()


def printable(text: str) -> str:
    """Return the text as :func:`escaped`, and without characters that a terminal obeys: ``\\xNN``, ``\\uNNNN``."""
    return escaped(text).translate(_CONTROL)
