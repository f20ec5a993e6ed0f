# SPDX-License-Identifier: Apache-2.0
"""Text of the host, which is bytes: names of files, lines of the kernel, what programs print. It need not be UTF-8.

A byte that is not UTF-8 becomes a surrogate, as in Python's own names of files (PEP 383), so a name still opens its
file. What goes out is UTF-8: there such a byte is shown as ``\\udcXX``.

Imports nothing: the device model, which has to start fast, uses it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

ESCAPED = "backslashreplace"
"""The ``errors`` of every stream and file that text goes out to."""


def decode(data: bytes) -> str:
    """Return the text; no bytes are refused."""
    return data.decode("utf-8", "surrogateescape")


def read(path: str | Path) -> str:
    """Return the text of a file, with its line ends as they are.

    :raises OSError: when it cannot be read.
    """
    with open(path, "rb") as file:
        return decode(file.read())


def escaped(text: str) -> str:
    """Return the text as it is shown: valid in UTF-8."""
    return text.encode("utf-8", ESCAPED).decode()
