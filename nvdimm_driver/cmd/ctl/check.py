# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl check``: list inconsistencies, and repair them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nvdimm_driver.cmd.ctl.base import Listing, Rows
from nvdimm_driver.errors import NvdimmError

if TYPE_CHECKING:
    from nvdimm_driver.doctor.repair import Inconsistency
    from nvdimm_driver.driver import XenNvdimmDriver

ROUNDS = 5
"""Rounds of repairing and looking again: a repair may uncover other inconsistencies."""


class Check(Listing):
    """List inconsistencies between the ledger, the backings, their marks, and Xen.

    The exit status is 1 if any inconsistency is left.
    """

    status = 0

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--repair", action="store_true", help="repair what can be repaired, as the column Remedy says"
        )
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Return 1 when an inconsistency is left."""
        return int(super().run(parsed_args)) or self.status

    def take_action(self, parsed_args: argparse.Namespace) -> Rows:
        from nvdimm_driver.doctor.repair import look
        from nvdimm_driver.driver import load_driver

        driver = load_driver(self.app.conf)
        rows = _repair(driver) if parsed_args.repair else []
        left = look(driver)
        known = {row[:3] for row in rows}
        rows += [(*_columns(each), "") for each in left if _columns(each)[:3] not in known]
        self.status = 1 if left else 0
        return ("Domain", "Path", "Problem", "Remedy", "Done"), rows


def _repair(driver: XenNvdimmDriver) -> list[tuple[str, ...]]:
    """Repair everything that can be repaired; return a row for each repair."""
    from nvdimm_driver.doctor.repair import look

    rows: list[tuple[str, ...]] = []
    failed: set[Inconsistency] = set()
    for _ in range(ROUNDS):
        todo = [each for each in look(driver) if each.mend and each not in failed]
        if not todo:
            break
        for finding in todo:
            try:
                if finding.mend:
                    finding.mend()
                rows.append((*_columns(finding), "yes"))
            except NvdimmError as error:
                failed.add(finding)
                rows.append((*_columns(finding), f"no: {error}"))
    return rows


def _columns(finding: Inconsistency) -> tuple[str, ...]:
    return finding.domain, finding.path, finding.problem, finding.remedy
