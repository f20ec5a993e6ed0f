# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl doctor``: check the host."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from cliff.formatters.base import ListFormatter
from cliff.lister import Lister

if TYPE_CHECKING:
    from nvdimm_driver.cmd.nvdimmctl import Nvdimmctl
    from nvdimm_driver.doctor.finding import Finding

COLUMNS = ("Check", "Result", "Message", "Hint")
_WIDTH = 26
_COLOURS = {"PASS": 32, "NOTE": 36, "WARN": 33, "FAIL": 31}


class Doctor(Lister):
    """Check everything on the host that domains with NVDIMMs need. Nothing is changed.

    The exit status is 1 if any check is FAIL.
    """

    app: Nvdimmctl

    @property
    def formatter_namespace(self) -> str:
        """Return the namespace of cliff's own formatters and :class:`Lines`."""
        return "nvdimm_driver.doctor_formats"

    @property
    def formatter_default(self) -> str:
        return "lines"

    def run(self, parsed_args: argparse.Namespace) -> int:
        self._failed = False
        super().run(parsed_args)
        return int(self._failed)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Iterator[tuple[str, ...]]]:
        from nvdimm_driver.cmd import register, systemd_units
        from nvdimm_driver.doctor.checklist import Installed, examine

        del parsed_args
        conf = self.app.conf
        installed = Installed(register.libvirt_hook(conf), register.device_model(conf), systemd_units.is_enabled())
        return COLUMNS, self._rows(examine(conf, installed))

    def _rows(self, findings: Iterable[Finding]) -> Iterator[tuple[str, ...]]:
        for each in findings:
            self._failed = self._failed or each.result == "FAIL"
            yield each.check, str(each.result), each.message, each.hint


class Lines(ListFormatter):
    """A formatter that prints a line per check as soon as it is done, and the hint on a second line."""

    def add_argument_group(self, parser: argparse.ArgumentParser) -> None:
        """Add no options."""

    def emit_list(
        self,
        column_names: Sequence[str],
        data: Iterable[Sequence[Any]],
        stdout: TextIO,
        parsed_args: argparse.Namespace,
    ) -> None:
        del parsed_args
        for values in data:
            row = dict(zip(column_names, values, strict=True))
            check, result = f"{row.get('Check', ''):{_WIDTH}}", row.get("Result", "")
            if result and stdout.isatty():
                result = f"\033[{_COLOURS[result]}m{result}\033[0m"
            print(" ".join(part for part in (check, result, row.get("Message")) if part), file=stdout, flush=True)
            if row.get("Hint"):
                print(f"{'':{_WIDTH}}      -> {row['Hint']}", file=stdout, flush=True)
