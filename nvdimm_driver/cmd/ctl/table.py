# SPDX-License-Identifier: Apache-2.0
"""The table formatter of lists: cliff's own and, for many rows, a faster one with the same output."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from cliff.formatters import table

MANY = 1000


class TableFormatter(table.TableFormatter):
    """cliff's table formatter, replaced for many rows: for 10,000 it takes longer than the rest of the command."""

    def emit_list(
        self,
        column_names: Sequence[str],
        data: Iterable[Sequence[Any]],
        stdout: TextIO,
        parsed_args: argparse.Namespace,
    ) -> None:
        rows = list(data)
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
