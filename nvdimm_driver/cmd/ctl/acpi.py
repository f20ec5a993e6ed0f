# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl acpi dump``: the ACPI tables of a domain."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nvdimm_driver.cmd.ctl.base import DOMAIN_HELP, Action, find
from nvdimm_driver.cmd.ctl.domain_file import FILE_HELP, domain_in, driver_for, host_option, read_xml

TABLE_GROUPS = {
    "nvdimm": "the tables for the NVDIMMs, which the driver gives to the guest",
    "qemu": "QEMU's other tables for such a machine; the guest has its own firmware's instead",
    "guest": "all tables of the running guest",
}


class AcpiDump(Action):
    """Print or write the ACPI tables for a domain's NVDIMMs, by default in the format of acpidump."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("domain", metavar="FILE|DOMAIN", help=f"{FILE_HELP}; or {DOMAIN_HELP}")
        host_option(parser)
        parser.add_argument("--decode", action="store_true", help="print the contents of the tables, decoded")
        parser.add_argument(
            "-o", "--output", metavar="DIR", type=Path, help="write one file per table into this folder, for iasl"
        )
        parser.add_argument(
            "--all",
            action="store_true",
            help="also QEMU's other tables for such a machine and, if the domain runs, all tables in its memory",
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
                for table in tables:  # each of a guest's may be as long as decode allows
                    print(decode(table))
            else:
                sys.stdout.write(render.acpidump(tables))

    def _groups(self, parsed_args: argparse.Namespace) -> dict[str, Sequence[bytes]]:
        """Return the tables by name of :data:`TABLE_GROUPS`; without ``--all``, only the first group."""
        from nvdimm_driver import host_files
        from nvdimm_driver.acpi.tables import split
        from nvdimm_driver.driver import load_driver

        running: Sequence[bytes] = ()
        if parsed_args.domain != "-" and not Path(parsed_args.domain).exists():
            driver = load_driver(self.app.conf)
            record = find(driver, parsed_args.domain)
            started = driver.tables_file(record.uuid)
            delivered = split(started.read_bytes()) if host_files.exists(started) else []
            if delivered and not parsed_args.all:
                return {"nvdimm": delivered}
            built = driver.build_tables(record)
            built = replace(built, tables=tuple(delivered) or built.tables)  # those delivered have the run's number
            running = driver.read_guest_tables(record) if parsed_args.all else ()
        else:
            domain = domain_in(read_xml(parsed_args.domain), parsed_args.domain, self.app.conf)
            built = driver_for(self.app.conf, parsed_args.host).plan(domain).tables
        groups = {"nvdimm": built.tables, "qemu": built.reference, "guest": running}
        return {name: tables for name, tables in groups.items() if tables and (parsed_args.all or name == "nvdimm")}
