# SPDX-License-Identifier: Apache-2.0
"""Base classes, arguments and functions that nvdimmctl's commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cliff.command import Command
from cliff.lister import Lister
from cliff.show import ShowOne

from nvdimm_driver.backing import paths
from nvdimm_driver.errors import NotFoundError, UsageError
from nvdimm_driver.host_files import absolute
from nvdimm_driver.state.words import word_for

if TYPE_CHECKING:
    from nvdimm_driver.cmd.nvdimmctl import Nvdimmctl
    from nvdimm_driver.driver import XenNvdimmDriver
    from nvdimm_driver.model import Allocation, Record

Rows = tuple[Sequence[str], list[tuple[Any, ...]]]
Fields = tuple[Sequence[str], Sequence[Any]]
DOMAIN_HELP = "uuid or name of a domain with NVDIMMs, or its id while it runs"


class Action(Command):
    """A command that does something and prints what it did."""

    app: Nvdimmctl


class _Sizes:
    """A command that prints sizes: in bytes for scripts, or with units for people."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)  # type: ignore[misc]
        parser.add_argument(
            "-u", "--human", action="store_true", help="print sizes with units, such as 64 GiB, instead of in bytes"
        )
        return parser


class _Columns:
    """A command with columns, of which ``-c`` takes some."""

    def _generate_columns_and_selector(
        self, parsed_args: argparse.Namespace, column_names: Sequence[str]
    ) -> tuple[list[str], list[bool] | None]:
        """Do what cliff does; refuse a column that there is not, which cliff passes over if another one is there."""
        known = {name.lower().replace(" ", "_") for name in column_names}
        wrong = [each for each in parsed_args.columns if each.lower().replace(" ", "_") not in known]
        if wrong:
            raise UsageError(f"there is no column {', '.join(wrong)}", hint=f"there are: {', '.join(column_names)}")
        found: tuple[list[str], list[bool] | None]
        found = super()._generate_columns_and_selector(parsed_args, column_names)  # type: ignore[misc]
        return found


class Listing(_Columns, _Sizes, Lister):
    """A command that lists things."""

    app: Nvdimmctl
    formatter_namespace = "nvdimm_driver.list_formatters"


class Showing(_Columns, _Sizes, ShowOne):
    """A command that shows one thing."""

    app: Nvdimmctl
    formatter_namespace = "nvdimm_driver.show_formatters"


def domain_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument DOMAIN."""
    parser.add_argument("domain", metavar="DOMAIN", help=DOMAIN_HELP)


def yes_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--yes`` to a command that asks first."""
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")


def size_argument(text: str) -> int:
    """Return the bytes of an argument that is a size.

    :raises ArgumentTypeError: when it is not a size.
    """
    from nvdimm_driver import sizes
    from nvdimm_driver.errors import ConfigError

    try:
        return sizes.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def up_to_date(app: Nvdimmctl) -> XenNvdimmDriver:
    """Return the driver, after it has cleaned up starts that are over and restarted helpers of guests that are gone."""
    from nvdimm_driver.driver import load_driver

    driver = load_driver(app.conf)
    driver.reconcile()
    driver.restart_lost()
    return driver


def find(driver: XenNvdimmDriver, key: str) -> Record:
    """Return the domain of that uuid, name or, while it runs, id.

    :raises NotFoundError: when the ledger has none.
    :raises UsageError: when it has several.
    """
    from nvdimm_driver.state.words import find_named

    return find_named(driver.ledger.domains(), key)


def path_argument(word: str, resolve: Callable[[str], str] = paths.resolve) -> str:
    """Return the resolved path of a file or device that a word on the command line names.

    Only root's symbolic links are followed: hints name paths in folders of users, who could turn the name into a link
    to another domain's file, or one of root's.

    :param resolve: of :mod:`.backing.paths`: what a path leads to that need not be there yet.
    :raises UsageError: when a link that others than root can turn leads elsewhere.
    """
    path, real = absolute(word), resolve(word)
    if real not in (path, os.path.abspath(word)) and paths.others_can_turn(path):
        raise UsageError(
            f"{path} leads to {real} by a symbolic link, and others than root can turn it",
            hint="name that path, if it is what you mean",
        )
    return real


def items_of(record: Record, slot: int | None) -> list[Allocation]:
    """Return a domain's NVDIMMs, or the one in a slot.

    :raises NotFoundError: when there is none.
    """
    items = [item for item in record.allocations if slot in (None, item.spec.slot)]
    if not items:
        where = "" if slot is None else f" in slot {slot}"
        hint = f"see: nvdimmctl show {word_for(record.name, record.uuid)}"
        if any(slot in (None, item.spec.slot) for item in record.intents):
            hint = "a define wants one for it; if none is under way, one was interrupted: see 'nvdimmctl check'"
        raise NotFoundError(f"domain {record.name} has no NVDIMM{where}", hint=hint)
    return items


def check_single(name: str, items: Sequence[Allocation], hint: str) -> None:
    """Check that a command which takes one NVDIMM is not given several.

    :param name: of the domain that has them.
    :raises UsageError: when there are several; the message lists them.
    """
    if len(items) > 1:
        several = ", ".join(f"slot {item.spec.slot}: {item.spec.path}" for item in items)
        raise UsageError(f"domain {name} has {len(items)} NVDIMMs ({several})", hint=hint)


def agreed(question: str, yes: bool) -> bool:
    """Return True when the operator agrees, by ``--yes`` or by the answer to the question."""
    if yes:
        return True
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print("nothing done", file=sys.stderr)
    return False
