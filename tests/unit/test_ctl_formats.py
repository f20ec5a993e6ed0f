# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import io
import json
import subprocess
from typing import Any

import pytest

from nvdimm_driver.cmd.ctl.formats import ShellFormatter, ValueFormatter, for_people
from nvdimm_driver.cmd.ctl.table import TableFormatter

NVDIMMS = [{"slot": 0, "base": 1 << 36, "identity": {"kind": "fsdax", "inode": None}}, {"slot": 1, "bad_blocks": []}]
TABLE = {"max_width": 0, "fit_width": False, "print_empty": False}


def emitted(formatter: Any, **values: object) -> str:
    out = io.StringIO()
    formatter.emit_one([*values], [*values.values()], out, argparse.Namespace(prefix="", variables=[], **TABLE))
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ([], "-"),
        ("", "-"),
        (True, "yes"),
        (0, "0"),
        ("64 MiB", "64 MiB"),
        (["/a", "/b"], "/a\n/b"),
        (
            NVDIMMS,
            "slot: 0\nbase: 0x1000000000\nidentity: kind fsdax, inode -\n\nslot: 1\nbad_blocks: -",
        ),
    ],
)
def test_people_see_no_notation_of_a_language(value: object, text: str) -> None:
    assert for_people(value) == text


def test_a_table_of_one_thing() -> None:
    shown = emitted(TableFormatter(), name="db1", domid=None, nvdimms=NVDIMMS)
    assert "| nvdimms | slot: 0 " in shown
    assert not {*"{["} & {*shown}


def test_scripts_get_json_for_what_has_parts() -> None:
    name, domid, ready, nvdimms = emitted(
        ValueFormatter(), name="db1", domid=None, ready=True, nvdimms=NVDIMMS
    ).splitlines()
    assert (name, domid, ready, json.loads(nvdimms)) == ("db1", "", "true", NVDIMMS)


def test_a_row_has_as_many_words_as_columns() -> None:
    out = io.StringIO()
    ValueFormatter().emit_list(["a", "b", "c"], [("main", None, 1)], out, argparse.Namespace())
    assert out.getvalue() == "main - 1\n"


@pytest.mark.parametrize(
    "name", ["$(touch {0})", "`touch {0}`", "\\$(touch {0})", "'; touch {0}; '", '";touch {0};"', "a\nb"]
)
def test_a_shell_runs_nothing_of_a_name(name: str, tmp_path: Any) -> None:
    """Who may define domains chooses their names, and root evaluates what is shown."""
    name = name.format(tmp_path / "run")
    done = subprocess.run(
        ["sh", "-ec", 'eval "$1"; printf %s "$name"', "-", emitted(ShellFormatter(), name=name, nvdimms=NVDIMMS)],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr, [*tmp_path.iterdir()]) == (name, "", [])
