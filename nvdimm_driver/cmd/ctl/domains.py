# SPDX-License-Identifier: Apache-2.0
"""Commands for domains and their NVDIMMs."""

from __future__ import annotations

import argparse
import sys

from nvdimm_driver.cmd.ctl.base import (
    Action,
    Fields,
    Listing,
    Rows,
    Showing,
    agreed,
    check_single,
    domain_argument,
    find,
    items_of,
    up_to_date,
    yes_option,
)


class List(Listing):
    """List the NVDIMMs of all domains."""

    def take_action(self, parsed_args: argparse.Namespace) -> Rows:
        from nvdimm_driver.cmd.ctl import render

        size = render.size_column(parsed_args.human)
        rows = [
            (record.name, item.spec.slot, item.spec.path, size(item.spec.size), render.state(record, item))
            for record in up_to_date(self.app).ledger.domains()
            for item in record.claims
        ]
        return ("Domain", "Slot", "Path", "Size", "State"), rows


class Show(Showing):
    """Show everything that is known of one domain."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        domain_argument(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Fields:
        from nvdimm_driver.cmd.ctl import render

        driver = up_to_date(self.app)
        return render.record(driver, find(driver, parsed_args.domain), render.size_column(parsed_args.human))


class Release(Action):
    """Give up a domain's claim to its backings, so that other domains can have them.

    The bytes stay as they are, unless --delete is given or the pool has wipe_on_release.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        domain_argument(parser)
        parser.add_argument("--delete", action="store_true", help="delete the files, too; devices stay")
        parser.add_argument(
            "--lost", action="store_true", help="give up what is not there, too, though its bytes may come back with it"
        )
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--slot", type=int, help="give up only the NVDIMM in this slot of the domain")
        which.add_argument(
            "--all", action="store_true", help="with --delete or --lost: release all, if there are several"
        )
        yes_option(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.cmd.ctl.device_claims import check_uncontested
        from nvdimm_driver.cmd.ctl.progress import watched
        from nvdimm_driver.cmd.ctl.saved_guests import warn_of_saved_guest
        from nvdimm_driver.contents.wiping import in_slot

        driver, slot = up_to_date(self.app), parsed_args.slot
        record = find(driver, parsed_args.domain)
        if slot is not None:
            items_of(record, slot)
        chosen = in_slot(record, slot)
        if (parsed_args.delete or parsed_args.lost) and not parsed_args.all:
            check_single(record.name, chosen.allocations, "say which with --slot, or take all of them with --all")
        check_uncontested(driver, self.app.conf, [item.spec.path for item in driver.wiper.to_wipe(chosen)])
        fate = render.fate(driver, chosen, delete=parsed_args.delete)
        warn_of_saved_guest(self.app, driver, record)
        if parsed_args.lost:
            print("what is missing is not overwritten: destroy its medium, or it shows its bytes", file=sys.stderr)
        if not agreed(f"Give up {record.name}'s claim ({fate})?", parsed_args.yes):
            return 1
        with watched(record.name) as watch:
            driver.release_claims(record, watch, delete=parsed_args.delete, slot=slot, lost=parsed_args.lost)
        driver.remove_leftovers()
        print(f"{record.name} has no NVDIMM{'s' if slot is None else f' in slot {slot}'} any more. {fate}")
        return 0
