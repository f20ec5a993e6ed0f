"""``nvdimmctl``: the operator's command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cliff.app import App
from cliff.command import Command
from cliff.commandmanager import CommandManager
from cliff.lister import Lister
from cliff.show import ShowOne
from oslo_config import cfg

from nvdimm_driver import conf, domxml, plugins
from nvdimm_driver.acpi.iasl import decode
from nvdimm_driver.acpi.tables import split
from nvdimm_driver.backing import inventory
from nvdimm_driver.backing.paper import PaperBacking
from nvdimm_driver.cmd import register, render
from nvdimm_driver.driver import XenNvdimmDriver, from_conf
from nvdimm_driver.errors import ConfigError, DomainXmlError, LedgerError, NvdimmError
from nvdimm_driver.ledger import Ledger
from nvdimm_driver.model import GIB, DomainSpec, Record
from nvdimm_driver.planning import Host
from nvdimm_driver.xen.dry_run import DryRunMapper

TABLE_GROUPS = {
    "nvdimm": "for the NVDIMMs: what the guest gets of the driver",
    "qemu": "what QEMU has beside them for such a machine; the guest has its own firmware's instead",
    "guest": "all that the running guest has",
}
FILE_HELP = "domain XML file; - for standard input"


class Nvdimmctl(App):
    """The application: options common to all commands, and one place that prints errors."""

    def __init__(self) -> None:
        super().__init__(
            description="Persistent memory (NVDIMMs) for Xen domains managed by libvirt.",
            version=version("nvdimm_driver"),
            command_manager=CommandManager("nvdimm_driver.nvdimmctl"),
            deferred_help=True,
        )
        self.conf: cfg.ConfigOpts

    def build_option_parser(self, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        parser = super().build_option_parser(*args, **kwargs)
        parser.add_argument("--config-file", action="append", help="configuration file instead of the standard ones")
        return parser

    def run_subcommand(self, argv: list[str]) -> int:
        """Run one command; cliff would print a NvdimmError without its hint and always exit 1."""
        try:
            command_class, name, rest = self.command_manager.find_command(argv)
        except ValueError:
            return int(super().run_subcommand(argv))
        command = command_class(self, self.options, cmd_name=name)
        parser = command.get_parser(f"{self.NAME} {name}")
        try:
            self.conf = conf.load(self.options.config_file)
            return int(command.run(parser.parse_args(rest)))
        except (NvdimmError, cfg.Error) as error:
            print(f"nvdimmctl: {error}", file=sys.stderr)
            return error.exit_code if isinstance(error, NvdimmError) else ConfigError.exit_code
        except BrokenPipeError:
            return 141


class _FileCommand(Command):
    """A command with one domain XML file."""

    app: Nvdimmctl

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("file", help=FILE_HELP)
        return parser


class Rewrite(_FileCommand):
    """Print the XML that libvirt's libxl driver takes, for a domain XML with NVDIMMs."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        sys.stdout.write(domxml.rewrite(_read(parsed_args.file), self.app.conf.xen.device_model))


class Restore(_FileCommand):
    """Print what the user wrote, for a domain XML that was rewritten."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        sys.stdout.write(domxml.restore(_read(parsed_args.file)))


class Plan(_FileCommand):
    """Print all that defining and starting a domain would do; touch nothing."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        _host_option(parser)
        parser.add_argument("--json", action="store_true", help="print JSON, sizes and addresses in bytes")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        xml = _read(parsed_args.file)
        plan = _driver(self.app.conf, parsed_args.host).plan(_domain(xml, parsed_args.file))
        if parsed_args.json:
            print(render.plan_json(plan))
            return
        diff = render.xml_diff(xml, domxml.rewrite(xml, self.app.conf.xen.device_model))
        sys.stdout.write(render.plan_text(plan, diff))


class AcpiDump(Command):
    """Print or write the ACPI tables of a domain's NVDIMMs, in the form of acpidump unless asked otherwise."""

    app: Nvdimmctl

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("domain", metavar="FILE|DOMAIN", help=f"{FILE_HELP}; or name or uuid of a defined domain")
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
        running: Sequence[bytes] = ()
        if parsed_args.domain != "-" and not Path(parsed_args.domain).exists():
            driver = from_conf(self.app.conf)
            record = _find(driver, parsed_args.domain)
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


class List(Lister):
    """List the NVDIMMs of all domains; sizes and addresses are in bytes."""

    app: Nvdimmctl

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        del parsed_args
        driver = from_conf(self.app.conf)
        driver.reconcile()
        driver.serve_labels()
        rows = [
            (record.name, item.spec.slot, item.spec.path, item.spec.size, render.state(record, item))
            for record in driver.ledger.domains()
            for item in record.allocations
        ]
        return ("Domain", "Slot", "Path", "Size", "State"), rows


class Show(ShowOne):
    """Show all that is known of one domain."""

    app: Nvdimmctl

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("domain", metavar="DOMAIN", help="name or uuid")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Sequence[Any]]:
        driver = from_conf(self.app.conf)
        driver.reconcile()
        driver.serve_labels()
        return render.record(driver, _find(driver, parsed_args.domain))


class Release(Command):
    """Give up a domain's claim to its backings. Their bytes stay as they are."""

    app: Nvdimmctl

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("domain", metavar="DOMAIN", help="name or uuid")
        parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        driver = from_conf(self.app.conf)
        record = _find(driver, parsed_args.domain)
        paths = ", ".join(item.spec.path for item in record.allocations)
        if not parsed_args.yes and input(f"Give up {record.name}'s claim to {paths}? [y/N] ").strip().lower() != "y":
            print("nothing done")
            return 1
        driver.forget(record.uuid)
        print(f"{record.name} has no NVDIMMs any more; kept: {paths}")
        return 0


class HostFile(Command):
    """Print the host's pmem namespaces as the file that 'plan --host' takes."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        del parsed_args
        print(inventory.read_host().to_json())


class Register(Command):
    """Install the libvirt hook, the device model and the folders. Can be repeated."""

    app: Nvdimmctl

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        del parsed_args
        for line in register.register(self.app.conf):
            print(line)


class Unregister(Command):
    """Remove what 'register' has installed. The ledger and all data stay."""

    app: Nvdimmctl

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        del parsed_args
        running: list[str] = []
        if Path(self.app.conf.state_dir).exists():
            driver = from_conf(self.app.conf)
            driver.reconcile()
            running = [record.name for record in driver.ledger.domains() if record.attachment]
        for line in register.unregister(self.app.conf, running):
            print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``nvdimmctl``."""
    return Nvdimmctl().run(list(sys.argv[1:] if argv is None else argv))


def _host_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        metavar="HOSTFILE",
        help="plan for the host that this file describes ('nvdimmctl host' prints it) instead of this machine",
    )


def _read(file: str, problem: type[NvdimmError] = DomainXmlError) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise problem(f"cannot read {file}: {error}") from error


def _domain(xml: str, file: str) -> DomainSpec:
    domain = domxml.extract(xml)
    if domain is None:
        raise DomainXmlError(f"{file} is not a Xen domain with NVDIMMs", hint="no <memory model='nvdimm'> in it")
    return domain


def _driver(options: cfg.ConfigOpts, host_file: str | None) -> XenNvdimmDriver:
    """The driver of this host, or one on paper for another."""
    if host_file is None:
        return from_conf(options)
    host = inventory.HostDescription.from_json(_read(host_file, ConfigError), host_file)
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
    )


def _find(driver: XenNvdimmDriver, key: str) -> Record:
    for record in driver.ledger.domains():
        if key in (record.name, record.uuid):
            return record
    raise LedgerError(f"no domain {key!r} with NVDIMMs", hint="'nvdimmctl list' shows all")
