# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl check``: list inconsistencies, and repair them."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nvdimm_driver.cmd.ctl.base import Listing, Rows, path_argument
from nvdimm_driver.errors import ConfigError, DamagedLedgerError, NvdimmError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from oslo_config import cfg

    from nvdimm_driver.doctor.repair_view import Inconsistency
    from nvdimm_driver.driver import XenNvdimmDriver

LOG = logging.getLogger(__name__)

LEDGER = "ledger.sqlite"
COLUMNS = ("Domain", "Path", "Problem", "Remedy", "Done")
ROUNDS = 6
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
        parser.add_argument(
            "only",
            metavar="PATH|DOMAIN",
            nargs="*",
            help="list and repair only what concerns these files, devices or domains",
        )
        parser.add_argument(
            "--zeros",
            metavar="PATH",
            action="append",
            default=[],
            help="with --repair: replace what this file has lost with zeros, and repair nothing else; can be repeated",
        )
        parser.add_argument(
            "--unmark",
            metavar="PATH",
            action="append",
            default=[],
            help="with --repair: take the mark from this copy of a file, and repair nothing else; can be repeated",
        )
        parser.add_argument(
            "--accept",
            metavar="PATH|DOMAIN",
            action="append",
            default=[],
            help="with --repair: take over a ledger from elsewhere if the repair of this path, or one of this domain "
            "without a path, fails; can be repeated",
        )
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Return 1 when an inconsistency is left."""
        return int(super().run(parsed_args)) or self.status

    def take_action(self, parsed_args: argparse.Namespace) -> Rows:
        from nvdimm_driver.doctor.repair_marks import unmark_copy

        zeros, copies = ([path_argument(path) for path in paths] for paths in (parsed_args.zeros, parsed_args.unmark))
        if (zeros or copies or parsed_args.accept) and not parsed_args.repair:
            raise UsageError("--zeros, --unmark and --accept are ways to repair", hint="add --repair")
        try:
            driver, rows = _open(self.app.conf, repair=parsed_args.repair)
        except DamagedLedgerError as error:
            if parsed_args.repair:
                raise
            self.status = 1
            return COLUMNS, [("", str(Path(self.app.conf.state_dir) / LEDGER), error.message, error.hint, "")]
        accepted = [_path_or_uuid(driver, word) for word in parsed_args.accept]
        for path in copies:
            unmark_copy(driver, path)
        named = [path_argument(word) for word in parsed_args.only if word.startswith("/")]
        find = partial(_find, driver, self.app.conf, zeros, named, accepted)
        if only := [*parsed_args.only, *zeros, *copies]:
            find = partial(_find_only, driver, only, find)
        if zeros and (whole := {*zeros} - {each.path for each in find()}):
            raise UsageError(f"{', '.join(sorted(whole))}: nothing of it is lost", hint="see 'nvdimmctl check'")
        repairs = _repair(find) if parsed_args.repair else []
        left = find()
        known = {(each.uuid, each.path, each.problem) for each, _ in repairs}
        new = [(each, "") for each in left if (each.uuid, each.path, each.problem) not in known]
        rows += [(each.domain, each.path, each.problem, each.remedy, done) for each, done in [*repairs, *new]]
        self.status = 1 if left else 0
        if not rows and sys.stdout.isatty():
            print("nothing is inconsistent", file=sys.stderr)
        return COLUMNS, rows


def _open(conf: cfg.ConfigOpts, *, repair: bool) -> tuple[XenNvdimmDriver, list[tuple[str, ...]]]:
    """Return the driver, and a row if its ledger was damaged and is a new one now.

    :param repair: make a new one in place of a damaged one.
    :raises DamagedLedgerError: when it is damaged and may not be replaced.
    """
    from nvdimm_driver.driver import load_driver
    from nvdimm_driver.state.database import file_number, set_aside

    path = str(Path(conf.state_dir) / LEDGER)
    number = file_number(path)
    try:
        driver = load_driver(conf)
        driver.ledger.check_integrity()
    except DamagedLedgerError as error:
        if not repair:
            raise
        aside = set_aside(path, number)
        if aside is None:
            return _open(conf, repair=False)
        remedy = f"it is {aside} now; this one is made from the marks, and for devices from libvirt's definitions"
        driver = load_driver(conf)
        driver.ledger.take_over(compared=False)  # an earlier version may have noted nowhere that there was one
        return driver, [("", path, error.message, remedy, "yes")]
    return driver, []


def _find(
    driver: XenNvdimmDriver, conf: cfg.ConfigOpts, zeros: Sequence[str], named: Sequence[str], accepted: Sequence[str]
) -> list[Inconsistency]:
    """Find all inconsistencies.

    That libvirt cannot say whose the devices are is one, too, if the ledger is new or from a backup.

    :param zeros: files whose lost bytes are to be replaced with zeros.
    :param named: paths that the operator has named.
    :param accepted: paths and uuids whose repair a ledger from elsewhere does not wait for.
    """
    from nvdimm_driver.cmd.ctl.device_claims import find_device_claims
    from nvdimm_driver.doctor import repair_ledger, repair_saved_guests
    from nvdimm_driver.doctor.libvirt import daemon_socket, definition_of
    from nvdimm_driver.doctor.repair import look
    from nvdimm_driver.doctor.repair_view import Inconsistency
    from nvdimm_driver.xml.hooks import XmlHooks

    socket = daemon_socket(conf.rpc.libvirt_direct_socket, conf.rpc.libvirt_socket)
    restore = XmlHooks.from_conf(conf).restore
    found = [
        *look(driver, partial(definition_of, socket, restore), zeros, named),
        *repair_saved_guests.look(driver, restore, socket, conf.libvirt.save_dir),
    ]
    try:
        found += find_device_claims(driver, conf, named)
    except ConfigError as error:
        if driver.ledger.is_from_elsewhere():
            found.append(Inconsistency("", "", "", error.message, error.hint))
    return [*found, *repair_ledger.look(driver, found, accepted)]


def _path_or_uuid(driver: XenNvdimmDriver, word: str) -> str:
    """Return the path that a word is, or the uuid of the domain that it names."""
    from nvdimm_driver.state.words import find_named, uuid_in

    if word.startswith("/"):
        return path_argument(word)
    return uuid_in(word) or find_named(driver.ledger.domains(), word).uuid


def _find_only(
    driver: XenNvdimmDriver, words: Sequence[str], find: Callable[[], list[Inconsistency]]
) -> list[Inconsistency]:
    """Find the inconsistencies of some files, devices and domains; of a file's domain, those that name no file, too.

    :param words: paths, and names, uuids or ids of domains.
    :raises NotFoundError: when one is neither a path nor a domain.
    :raises UsageError: when one is the name of several domains, or a path that a link leads elsewhere.
    """
    from nvdimm_driver.model import Record
    from nvdimm_driver.state.words import find_named

    found, records = find(), driver.ledger.domains()
    known = {record.uuid: record for record in records}
    for each in found:
        if each.uuid:  # the ledger may have been lost
            known.setdefault(each.uuid, Record(each.uuid, each.domain, 0, None, "", (), None))
    paths = {path_argument(word) for word in words if word.startswith("/")}
    uuids = {find_named([*known.values()], word).uuid for word in words if not word.startswith("/")}
    owners = {record.uuid for record in records for item in record.claims if item.spec.path in paths}
    remedy = "run 'nvdimmctl check --repair' without a path or domain, to compare it with everything"
    of_ledger = [replace(each, mend=None, remedy=remedy) for each in found if each.path == driver.ledger.path]
    others = [each for each in found if each.path != driver.ledger.path]
    return [
        each
        for each in [*others, *of_ledger]
        if each.uuid in uuids or each.path in paths or (each.uuid in owners and not each.path)
    ]


def _repair(find: Callable[[], list[Inconsistency]]) -> list[tuple[Inconsistency, str]]:
    """Repair everything that can be repaired; return each, and what came of it."""
    repairs: list[tuple[Inconsistency, str]] = []
    failed: set[Inconsistency] = set()
    for _ in range(ROUNDS):
        todo = [each for each in find() if each.mend and each not in failed]
        if not todo:
            break
        for finding in todo:
            try:
                if finding.mend:
                    finding.mend()
                repairs.append((finding, "yes"))
            except (NvdimmError, OSError) as error:
                failed.add(finding)
                repairs.append((finding, f"no: {error}"))
            except Exception as error:  # a fault of one repair does not keep the others from being done
                LOG.exception("%s: the repair has failed", finding.path)
                failed.add(finding)
                repairs.append((finding, f"no: {type(error).__name__}: {error} (see the log; report it)"))
    return repairs
