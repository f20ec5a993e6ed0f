# SPDX-License-Identifier: Apache-2.0
"""The table formatter: cliff's own and, for many rows, a faster one with the same output."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from cliff.formatters import table

from nvdimm_driver.cmd.ctl.formats import for_people

MANY = 1000


def _cell(value: Any) -> Any:
    """Return what is shown in a cell; cliff puts numbers to the right."""
    return value if type(value) is int or type(value) is str else for_people(value)


def _fit(stdout: TextIO, parsed_args: argparse.Namespace) -> None:
    """Let a table for a terminal be no wider than that, unless another width is asked for."""
    if stdout.isatty() and parsed_args.max_width <= 0:
        parsed_args.fit_width = True


class TableFormatter(table.TableFormatter):
    """cliff's table formatter, replaced for many rows: for 10,000 it takes longer than the rest of the command."""

    def emit_list(
        self,
        column_names: Sequence[str],
        data: Iterable[Sequence[Any]],
        stdout: TextIO,
        parsed_args: argparse.Namespace,
    ) -> None:
        rows = [[*map(_cell, row)] for row in data]
        _fit(stdout, parsed_args)
        if len(rows) < MANY or parsed_args.max_width > 0 or parsed_args.fit_width:
            super().emit_list(column_names, rows, stdout, parsed_args)
            return
        columns = list(zip(*rows, strict=True))
        texts = [[" ".join(str(value).split("\n")) for value in column] for column in columns]
        widths = [max(len(name), max(map(len, text))) for name, text in zip(column_names, texts, strict=True)]
        signs = ["" if isinstance(value, int) else "-" for value in rows[0]]
        line = "| " + " | ".join(f"%{sign}{width}s" for sign, width in zip(signs, widths, strict=True)) + " |\n"
        rule = "+-" + "-+-".join("-" * width for width in widths) + "-+\n"
        body = [line % row for row in zip(*texts, strict=True)]
        stdout.writelines([rule, line % tuple(column_names), rule, *body, rule])

    def emit_one(
        self, column_names: Sequence[str], data: Sequence[Any], stdout: TextIO, parsed_args: argparse.Namespace
    ) -> None:
        _fit(stdout, parsed_args)
        shown = [for_people(each, name) for name, each in zip(column_names, data, strict=True)]
        super().emit_one(column_names, shown, stdout, parsed_args)
