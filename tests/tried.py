# SPDX-License-Identifier: Apache-2.0
"""What the tests were run with: versions, which tests record in pytest's report, and the table of the documentation.

``python3 -m tests.tried REPORT...`` puts the runs of these reports (JUnit XML) into doc/tried.csv, each in the place of
an earlier one with the same releases. Nothing in the table is written by hand.
"""

import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from xml.etree import ElementTree

from tests.package import PROJECT

TABLE = PROJECT / "doc" / "tried.csv"
PREFIX = "tried with "
"""Of the names of properties in a report."""
COMMANDS = {
    "Debian": ". /etc/os-release; echo $VERSION_CODENAME $(cat /etc/debian_version)",
    "Xen": "xl info xen_version",
    "libvirt": "libvirtd --version | sed 's/.* //'",
    "QEMU": "/usr/libexec/xen-qemu-system-i386 --version | sed -n 's/.*version \\([^ ]*\\).*/\\1/p'",
    "Linux": "uname -r",
    "ndctl": "ndctl --version",
    "Python": "python3 -c 'import platform; print(platform.python_version())'",
}
"""Shell commands that print a version; of the host, in the lab or here."""
COLUMNS = ("tests", *COMMANDS, "Nova", "guests", "passed", "failed", "date")
Record = Callable[[str, str], None]


def record(record_property: Record, run: Callable[[str], str], names: Iterable[str], **more: str) -> None:
    """Record the versions of a host in the report of a test.

    :param record_property: pytest's fixture.
    :param run: runs a shell command there, and returns its stdout.
    :param names: of `COMMANDS`.
    :param more: other columns, with their text.
    """
    for name, text in [*((name, run(COMMANDS[name]).strip()) for name in names), *more.items()]:
        if not text:
            raise RuntimeError(f"{COMMANDS.get(name, name)}: no version")
        record_property(f"{PREFIX}{name}", text)


def main(reports: list[str]) -> int:
    """Put the runs of these reports into the table; return the exit status."""
    rows = {_key(row): row for row in _read(TABLE)}
    for report in reports:
        rows.update({_key(row): row for row in rows_of(Path(report))})
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
    return 0


def rows_of(report: Path) -> list[dict[str, str]]:
    """Return a row for each host on which tests of a report ran."""
    rows: dict[str, dict[str, str]] = {}
    outcomes: dict[str, Counter[str]] = {}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for case in suite.iter("testcase"):
            found = {
                each.attrib["name"].removeprefix(PREFIX): each.attrib["value"]
                for each in case.iter("property")
                if each.attrib["name"].startswith(PREFIX)
            }
            host = _host(case)
            row = rows.setdefault(host, {"date": suite.attrib["timestamp"][:10]})
            guests = {*row.get("guests", "").split(), *found.pop("guests", "").split()}
            row.update(found, guests=" ".join(sorted(guests)))
            outcomes.setdefault(host, Counter())[_outcome(case)] += 1
    for host, counted in outcomes.items():
        rows[host].update({name: str(counted[name]) for name in ("passed", "failed")})
    return [{name: row.get(name, "") for name in COLUMNS} for row in rows.values() if "tests" in row]


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    """Return the tests and the releases of a row, without the last part of versions."""
    return row["tests"], row["Debian"].split()[0], row["Python"].rpartition(".")[0]


def _outcome(case: ElementTree.Element) -> str:
    tags = {child.tag for child in case}
    return "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"


def _host(case: ElementTree.Element) -> str:
    """Return what names the host of a test among those of its report.

    Tests of the lab and of the Debian package have the release of their host in their names: ``test_x[trixie-aml]``.
    The others run on this machine.
    """
    for module in ("tests.lab", "tests.integration.test_deb"):
        if case.attrib["classname"].startswith(module):
            return f"{module}, {case.attrib['name'].partition('[')[2].rstrip(']').split('-')[0]}"
    return ""


def _read(table: Path) -> list[dict[str, str]]:
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
