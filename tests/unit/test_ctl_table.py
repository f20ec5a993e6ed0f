# SPDX-License-Identifier: Apache-2.0
import argparse
import io

import pytest
from cliff.formatters import table as cliffs

from nvdimm_driver.cmd.ctl import table

COLUMNS = ("Domain", "Slot", "A long heading")


def emitted(formatter: cliffs.TableFormatter, rows: list[tuple[object, ...]], **options: object) -> str:
    out = io.StringIO()
    settings = {"max_width": 0, "fit_width": False, "print_empty": False, **options}
    formatter.emit_list(COLUMNS, rows, out, argparse.Namespace(**settings))
    return out.getvalue()


@pytest.mark.parametrize("count", [1, table.MANY - 1, table.MANY, table.MANY + 1])
def test_many_lines_look_as_few(count: int) -> None:
    rows: list[tuple[object, ...]] = [(f"guest{index}", index, "x" * (index % 20)) for index in range(count)]
    assert emitted(table.TableFormatter(), rows) == emitted(cliffs.TableFormatter(), rows)


def test_a_width_that_is_asked_for_is_cliffs_to_make() -> None:
    rows: list[tuple[object, ...]] = [("a" * 50, 0, "b" * 50)] * table.MANY
    assert emitted(table.TableFormatter(), rows, max_width=60) == emitted(cliffs.TableFormatter(), rows, max_width=60)
