# SPDX-License-Identifier: Apache-2.0
"""Output formats of commands that list or show: cliff's own would print Python's notation of lists and dicts."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from cliff.formatters import shell, value

_NOTHING = "-"
_ADDRESSES = frozenset({"base", "guest_base", "offset"})


def for_people(value: Any, name: str = "") -> str:
    """Return a value as people read it: each part of a list in lines of its own.

    :param name: of the field: addresses are hexadecimal.
    """
    if value is None or value in ([], ""):
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name in _ADDRESSES:
        return f"{value:#x}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {for_people(each, key)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(each, Mapping) for each in value):
            return "\n\n".join(
                "\n".join(f"{key}: {for_people(part, key)}" for key, part in each.items()) for each in value
            )
        return "\n".join(for_people(each) for each in value)
    return str(value)


def for_scripts(value: Any) -> str:
    """Return a value as scripts read it: lists and dicts are JSON, and None is empty."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class ValueFormatter(value.ValueFormatter):
    """cliff's format of values alone, in which nothing is Python's notation."""

    def emit_list(
        self,
        column_names: Sequence[str],
        data: Iterable[Sequence[Any]],
        stdout: TextIO,
        parsed_args: argparse.Namespace,
    ) -> None:
        rows = ([_NOTHING if each is None else for_scripts(each) for each in row] for row in data)
        super().emit_list(column_names, rows, stdout, parsed_args)

    def emit_one(
        self, column_names: Sequence[str], data: Sequence[Any], stdout: TextIO, parsed_args: argparse.Namespace
    ) -> None:
        super().emit_one(column_names, [*map(for_scripts, data)], stdout, parsed_args)


class ShellFormatter(shell.ShellFormatter):
    """A format that a shell can evaluate: cliff's quotes not all that a shell would run, such as in a domain's name."""

    def emit_one(
        self, column_names: Sequence[str], data: Sequence[Any], stdout: TextIO, parsed_args: argparse.Namespace
    ) -> None:
        for name, each in zip(column_names, data, strict=True):
            stdout.write(f"{parsed_args.prefix}{name}={shlex.quote(for_scripts(each))}\n")
