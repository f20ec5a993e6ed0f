"""``nvdimmctl check``: does all fit together, and can it be mended?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nvdimm_driver.cmd.ctl.base import Listing, Rows
from nvdimm_driver.errors import NvdimmError

if TYPE_CHECKING:
    from nvdimm_driver.doctor.repair import Inconsistency
    from nvdimm_driver.driver import XenNvdimmDriver

ROUNDS = 5
"""How often it is mended and looked again: what is mended may uncover more."""


class Check(Listing):
    """List what does not fit together: the ledger, the backings, what these say of themselves, and Xen."""

    status = 0

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--repair", action="store_true", help="mend what can be mended")
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Status 1 when something is left that does not fit."""
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
    """Mend all that can be mended; a row for each."""
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
