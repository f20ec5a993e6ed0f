# SPDX-License-Identifier: Apache-2.0
"""Commands in hints, which root pastes into a shell: users have chosen names in them."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver import errors
from nvdimm_driver.shell import command, repair_of
from nvdimm_driver.state.owner_marks import unmark_command

PACKAGE = Path(errors.__file__).parent
NASTY = "/mnt/a'; touch PWNED; '.img"
PROGRAM = re.compile(
    r"(?:^|[\s'(:])(nvdimmctl|fallocate|mkdir|cp|chmod|chown|chattr|rm|mv|find|setfattr|ndctl|daxctl|xl|virsh|df|umount"
    r"|mount|dd|qemu-img)\s[^;.,:()]*$"
)
QUOTED = ("command", "quote", "repair_of", "release_of", "unmark_command", "word_for")
NO_NAMES_OF_USERS = {
    "slot": "a number",
    "domid": "a number",
    "status.st_ino": "a number",
    "identity.inode": "a number",
    "status": "a number",
    "ram // KIB": "a number",
    "uuid": "a uuid",
    "kind": "of a table of formats",
    "name": "Linux's name of a namespace",
    "namespace.name": "Linux's name of a namespace",
    "pool.name": "of the configuration",
    "usage.pool.name": "of the configuration",
    "wish.name": "of root's command line",
    "args[1]": "of root's command line",
    "options": "of the caller",
    "listed[:80]": "no command",
    "printed[:80]": "no command",
    "' '.join(words)": "no command",
    "path": "no command: 'mount the file system that had PATH'",
}


def formatted(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield what f-strings have a value for, with the text before it."""
    for node in ast.walk(tree):
        text = ""
        for part in node.values if isinstance(node, ast.JoinedStr) else ():
            if isinstance(part, ast.FormattedValue):
                yield text, part.value
                text += "X"
            elif isinstance(part, ast.Constant):
                text += str(part.value)


def is_quoted(value: ast.expr) -> bool:
    name = value.func if isinstance(value, ast.Call) else None
    return getattr(name, "id", getattr(name, "attr", "")) in QUOTED


@pytest.mark.parametrize("source", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_all_names_in_commands_are_quoted(source: Path) -> None:
    for text, value in formatted(ast.parse(source.read_text(encoding="utf-8"))):
        if found := PROGRAM.search(text):
            known = ast.unparse(value) in NO_NAMES_OF_USERS
            if found[1] != "mount" and ast.unparse(value) == "path":
                known = False
            assert known or is_quoted(value), f"{text}{{{ast.unparse(value)}}}"
        if is_quoted(value):  # it would end at the first quotation mark of a quoted name
            assert not text.endswith("'"), f"{text}{{{ast.unparse(value)}}}"


@pytest.mark.parametrize("made", [command("cp", "-a", NASTY), repair_of(NASTY), unmark_command(NASTY)])
def test_a_nasty_name_is_one_word(made: str) -> None:
    assert NASTY[1:] in shlex.split(made)[-1]
