"""Commands about domain XML: what it becomes, and what would be done for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nvdimm_driver.cmd.ctl.base import Action, find
from nvdimm_driver.errors import ConfigError, DomainXmlError, NotFoundError

if TYPE_CHECKING:
    from oslo_config import cfg

    from nvdimm_driver.driver import XenNvdimmDriver
    from nvdimm_driver.model import DomainSpec

TABLE_GROUPS = {
    "nvdimm": "for the NVDIMMs: what the guest gets of the driver",
    "qemu": "what QEMU has beside them for such a machine; the guest has its own firmware's instead",
    "guest": "all that the running guest has",
}
FILE_HELP = "domain XML file; - for standard input"


class _FileAction(Action):
    """A command with one domain XML file."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("file", help=FILE_HELP)
        return parser


class Rewrite(_FileAction):
    """Print the XML that libvirt's libxl driver takes, for a domain XML with NVDIMMs."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.xml import parse_domain as domxml

        sys.stdout.write(domxml.rewrite(_read(parsed_args.file), self.app.conf.xen.device_model))


class Restore(_FileAction):
    """Print what the user wrote, for a domain XML that was rewritten."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.xml import parse_domain as domxml

        sys.stdout.write(domxml.restore(_read(parsed_args.file)))


class Plan(_FileAction):
    """Print all that defining and starting a domain would do; touch nothing."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _host_option(parser)
        parser.add_argument("--json", action="store_true", help="print JSON, sizes and addresses in bytes")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.xml import parse_domain as domxml

        xml = _read(parsed_args.file)
        plan = _driver(self.app.conf, parsed_args.host).plan(_domain(xml, parsed_args.file))
        if parsed_args.json:
            print(render.plan_json(plan))
            return
        diff = render.xml_diff(xml, domxml.rewrite(xml, self.app.conf.xen.device_model))
        sys.stdout.write(render.plan_text(plan, diff))


class AcpiDump(Action):
    """Print or write the ACPI tables of a domain's NVDIMMs, in the form of acpidump unless asked otherwise."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "domain", metavar="FILE|DOMAIN", help=f"{FILE_HELP}; or name, uuid or id of a defined domain"
        )
        _host_option(parser)
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
        """The tables by name of :data:`TABLE_GROUPS`; only the first group, unless all are asked for."""
        from nvdimm_driver.acpi.tables import split
        from nvdimm_driver.driver import XenNvdimmDriver

        running: Sequence[bytes] = ()
        if parsed_args.domain != "-" and not Path(parsed_args.domain).exists():
            driver = XenNvdimmDriver.from_conf(self.app.conf)
            record = find(driver, parsed_args.domain)
            started = driver.tables_file(record.uuid)
            if started.exists() and not parsed_args.all:
                return {"nvdimm": split(started.read_bytes())}
            built = driver.tables(record)
            running = driver.guest_tables(record) if parsed_args.all else ()
        else:
            domain = _domain(_read(parsed_args.domain), parsed_args.domain)
            built = _driver(self.app.conf, parsed_args.host).plan(domain).tables
        groups = {"nvdimm": built.tables, "qemu": built.reference, "guest": running}
        return {name: tables for name, tables in groups.items() if tables and (parsed_args.all or name == "nvdimm")}


def _host_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        metavar="HOSTFILE",
        help="plan for the host that this file describes ('nvdimmctl host' prints it) instead of this machine",
    )


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read {file}: {error.strerror}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def _domain(xml: str, file: str) -> DomainSpec:
    from nvdimm_driver.xml import parse_domain as domxml

    domain = domxml.extract(xml)
    if domain is None:
        raise DomainXmlError(f"{file} is not a Xen domain with NVDIMMs", hint="no <memory model='nvdimm'> in it")
    return domain


def _driver(options: cfg.ConfigOpts, host_file: str | None) -> XenNvdimmDriver:
    """The driver of this host, or one on paper for another."""
    from nvdimm_driver.driver import XenNvdimmDriver

    if host_file is None:
        return XenNvdimmDriver.from_conf(options)
    from nvdimm_driver import plugins
    from nvdimm_driver.backing.inventory import HostDescription
    from nvdimm_driver.backing.paper import PaperBacking
    from nvdimm_driver.lifecycle.plan import Host
    from nvdimm_driver.model import GIB
    from nvdimm_driver.pools.rules import Pools
    from nvdimm_driver.state.ledger import Ledger
    from nvdimm_driver.xen.dry_run import DryRunMapper

    host = HostDescription.from_json(_read(host_file), host_file)
    return XenNvdimmDriver(
        ledger=Ledger(":memory:"),
        state_dir=Path(options.state_dir),
        backings=[PaperBacking(host)],
        acpi=plugins.load("nvdimm_driver.acpi_builders", options.acpi.builder, options),
        mapper=DryRunMapper(),
        host=Host(lambda: host.namespaces, host.physical_address_bits),
        qemu=options.xen.qemu,
        gap=options.layout.gap_gib * GIB,
        dsm=options.acpi.dsm,
        pools=Pools([], any_path=True),
    )
