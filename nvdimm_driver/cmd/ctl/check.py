# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl check``: list inconsistencies, and repair them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nvdimm_driver.cmd.ctl.base import Listing, Rows
from nvdimm_driver.errors import DamagedLedgerError, NvdimmError

if TYPE_CHECKING:
    from oslo_config import cfg

    from nvdimm_driver.doctor.repair import Inconsistency
    from nvdimm_driver.driver import XenNvdimmDriver

LEDGER = "ledger.sqlite"
COLUMNS = ("Domain", "Path", "Problem", "Remedy", "Done")
DEVICES = (
    "Devices have no marks: before any domain is defined with a device, define those again that have one "
    "(virsh dumpxml, virsh define)"
)
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

        try:
            driver, rows = _open(self.app.conf, repair=parsed_args.repair)
        except DamagedLedgerError as error:
            if parsed_args.repair:
                raise
            self.status = 1
            return COLUMNS, [("", str(Path(self.app.conf.state_dir) / LEDGER), error.message, error.hint, "")]
        rows += _repair(driver) if parsed_args.repair else []
        left = look(driver)
        known = {row[:3] for row in rows}
        rows += [(*_columns(each), "") for each in left if _columns(each)[:3] not in known]
        self.status = 1 if left else 0
        return COLUMNS, rows


def _open(conf: cfg.ConfigOpts, *, repair: bool) -> tuple[XenNvdimmDriver, list[tuple[str, ...]]]:
    """Return the driver, and a row if its ledger was damaged and is a new one now.

    :param repair: make a new one in place of a damaged one.
    :raises DamagedLedgerError: when it is damaged and may not be replaced.
    """
    from nvdimm_driver.driver import load_driver
    from nvdimm_driver.state.ledger import set_aside

    try:
        driver = load_driver(conf)
        driver.ledger.check_integrity()
    except DamagedLedgerError as error:
        if not repair:
            raise
        path = str(Path(conf.state_dir) / LEDGER)
        aside = set_aside(path)
        remedy = f"it is {aside} now; this one is made from the marks. {DEVICES}"
        return load_driver(conf), [("", path, error.message, remedy, "yes")]
    return driver, []


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
