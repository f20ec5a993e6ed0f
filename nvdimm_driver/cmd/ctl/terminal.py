# SPDX-License-Identifier: Apache-2.0
"""Streams for a terminal: they escape control characters, which can be another's, as in the name of a file."""

from __future__ import annotations

import re
from io import TextIOWrapper
from typing import TextIO

from nvdimm_driver.host_text import ESCAPED, printable

_COLOUR = re.compile("(\x1b\\[(?:0|3[0-7])m)")
"""The commands' own sequences: a colour, and its end."""


class Terminal(TextIOWrapper):
    """A stream that escapes control characters, but for the ends of lines, tabs and colours."""

    def write(self, text: str, /) -> int:
        """Write the text; return its length as it was given."""
        super().write("".join(part if _COLOUR.fullmatch(part) else printable(part) for part in _COLOUR.split(text)))
        return len(text)


def for_terminal(stream: TextIO) -> TextIO:
    """Return a stream that may replace this one; a pipe or file gets what it would get without."""
    if not stream.isatty():
        return stream
    return Terminal(stream.buffer, encoding="utf-8", errors=ESCAPED, line_buffering=True)
