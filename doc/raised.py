"""A directive for Sphinx, ``.. raised:: Kind``: every error of that kind that the code can raise, with what to do.

It is read out of the source: what varies is an ellipsis. So no error can be missing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

SOURCE = Path(__file__).parents[1] / "nvdimm_driver"


def texts(node: ast.expr | None) -> Iterator[str]:
    """What a message can be: the alternatives of a conditional one are apart."""
    if node is None:
        return
    if isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from (left + right for left in texts(node.left) for right in texts(node.right))
    else:
        yield "…"


def raised(kind: str) -> list[tuple[str, str]]:
    """Message and hint of each error of that kind, sorted, each once."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == kind and node.args:
                hint = next((each.value for each in node.keywords if each.arg == "hint"), None)
                hints = [text for text in texts(hint) if text.strip("… ")]
                found |= {(message, "; ".join(hints)) for message in texts(node.args[0]) if re.search(r"\w", message)}
    return sorted(found, key=lambda pair: pair[0].lstrip("…:'\" ").lower())


class Raised(Directive):
    """``.. raised:: Kind``"""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A list: the message and, in parentheses as it is printed, the hint."""
        items = nodes.bullet_list()
        for message, hint in raised(self.arguments[0]):
            said = [nodes.literal(text=message), *([nodes.Text(f" ({hint})")] if hint else [])]
            items += nodes.list_item("", nodes.paragraph("", "", *said))
        return [items]


def setup(app: object) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("raised", Raised)  # type: ignore[attr-defined]
    return {"parallel_read_safe": True}
