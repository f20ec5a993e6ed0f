# SPDX-License-Identifier: Apache-2.0
"""The table of what was tried: it has what the tests report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tried

REPORT = """\
<testsuites><testsuite timestamp="2026-11-30T01:02:03">
<testcase classname="tests.lab.test_a" name="test_one[trixie]"><properties>
<property name="tried with tests" value="lab"/><property name="tried with Debian" value="trixie 13.2"/>
<property name="tried with guests" value="6.12"/><property name="other" value="x"/></properties></testcase>
<testcase classname="tests.lab.test_a" name="test_two[trixie-aml]"><properties>
<property name="tried with guests" value="6.1"/></properties></testcase>
<testcase classname="tests.lab.test_b" name="test_three[bookworm]"><failure/></testcase>
<testcase classname="tests.lab.test_b" name="test_four[bookworm]"><skipped/></testcase>
<testcase classname="tests.lab.test_b" name="test_five[bookworm-x]"><properties>
<property name="tried with tests" value="lab"/><property name="tried with Debian" value="bookworm 12.11"/>
</properties></testcase>
<testcase classname="tests.unit.test_c" name="test_six[trixie]"/>
</testsuite></testsuites>
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tried, "TABLE", tmp_path / "tried.csv")
    return tmp_path / "tried.csv"


def test_a_report_has_a_row_for_each_host_whose_versions_it_has(tmp_path: Path, table: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert tried.main([str(tmp_path / "report.xml")]) == 0
    assert table.read_text().splitlines()[1:] == [
        "lab,bookworm 12.11,,,,,,,,,1,1,2026-11-30",
        "lab,trixie 13.2,,,,,,,,6.1 6.12,2,0,2026-11-30",
    ]


def test_a_later_run_takes_the_place_of_an_earlier_one(tmp_path: Path, table: Path) -> None:
    (tmp_path / "first.xml").write_text(REPORT)
    (tmp_path / "second.xml").write_text(
        REPORT.replace("2026-11-30", "2026-12-01").replace("13.2", "13.3").replace("<failure/>", "")
    )
    tried.main([str(tmp_path / "first.xml"), str(tmp_path / "second.xml")])
    assert [line.split(",")[-3:] for line in table.read_text().splitlines()[1:]] == [
        ["2", "0", "2026-12-01"],
        ["2", "0", "2026-12-01"],
    ]


def test_a_version_that_cannot_be_told_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="uname -r: no version"):
        tried.record(lambda name, value: None, lambda command: "\n", ["Linux"])
