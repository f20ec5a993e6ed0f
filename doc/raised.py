# SPDX-License-Identifier: Apache-2.0
"""List the errors that the code can raise, each with its hint; conf.py has the directive that prints them.

They are read from the source, so none can be missing. An ellipsis stands for what varies.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "nvdimm_driver"


def raised(kind: str, source: Path = SOURCE) -> list[tuple[str, tuple[str, ...]]]:
    """Return message and possible hints of each error of that kind, sorted, each once; no hint is an empty tuple.

    A message without a word of its own, which passes another error on, is left out.

    :param source: folder of the package.
    """
    found = set()
    for name, node in _calls(source):
        if name == kind and node.args:
            hints = tuple(text for each in node.keywords if each.arg == "hint" for text in texts(each.value))
            found |= {(message, hints) for message in texts(node.args[0]) if re.search(r"\w", message)}
    return sorted(found, key=lambda pair: (pair[0].lstrip("…:'\" ").lower(), pair))


@functools.cache
def _calls(source: Path) -> list[tuple[str, ast.Call]]:
    """Return the calls of plain names in a folder's code, each with the name."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in source.rglob("*.py"))
    return [
        (node.func.id, node)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]


def texts(node: ast.expr) -> Iterator[str]:
    """Yield each text that an expression can be; a conditional expression has several."""
    if isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from (left + right for left in texts(node.left) for right in texts(node.right))
    else:
        yield "…"
