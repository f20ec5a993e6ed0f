# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl acpi dump``: the ACPI tables of a domain."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nvdimm_driver.cmd.ctl.base import Action, find
from nvdimm_driver.cmd.ctl.domain_file import FILE_HELP, domain_in, driver_for, host_option, read_file

TABLE_GROUPS = {
    "nvdimm": "for the NVDIMMs: what the guest gets of the driver",
    "qemu": "what QEMU has beside them for such a machine; the guest has its own firmware's instead",
    "guest": "all that the running guest has",
}


class AcpiDump(Action):
    """Print the ACPI tables of a domain's NVDIMMs as acpidump does, decode them, or write them to files."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "domain", metavar="FILE|DOMAIN", help=f"{FILE_HELP}; or name, uuid or id of a defined domain"
        )
        host_option(parser)
        parser.add_argument("--decode", action="store_true", help="print what the tables say")
        parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="write one file a table, as for iasl")
        parser.add_argument(
            "--all",
            action="store_true",
            help="also the others that QEMU has for such a machine, and all that a running domain's guest has",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.acpi.iasl import decode
        from nvdimm_driver.cmd.ctl import render

        for name, tables in self._groups(parsed_args).items():
            folder, title = (name, TABLE_GROUPS[name]) if parsed_args.all else (".", "")
            if title and parsed_args.output is None:
                print(f"# {title}")
            if parsed_args.output is not None:
                for path in render.write_tables(tables, parsed_args.output / folder):
                    print(path)
            elif parsed_args.decode:
                print("\n".join(decode(table) for table in tables))
            else:
                sys.stdout.write(render.acpidump(tables))

    def _groups(self, parsed_args: argparse.Namespace) -> dict[str, Sequence[bytes]]:
        """Return the tables by name of :data:`TABLE_GROUPS`: the first group, or with ``--all`` every group."""
        from nvdimm_driver.acpi.tables import split
        from nvdimm_driver.driver import load_driver

        running: Sequence[bytes] = ()
        if parsed_args.domain != "-" and not Path(parsed_args.domain).exists():
            driver = load_driver(self.app.conf)
            record = find(driver, parsed_args.domain)
            started = driver.tables_file(record.uuid)
            if started.exists() and not parsed_args.all:
                return {"nvdimm": split(started.read_bytes())}
            built = driver.build_tables(record)
            running = driver.read_guest_tables(record) if parsed_args.all else ()
        else:
            domain = domain_in(read_file(parsed_args.domain), parsed_args.domain, self.app.conf)
            built = driver_for(self.app.conf, parsed_args.host).plan(domain).tables
        groups = {"nvdimm": built.tables, "qemu": built.reference, "guest": running}
        return {name: tables for name, tables in groups.items() if tables and (parsed_args.all or name == "nvdimm")}
