# SPDX-License-Identifier: Apache-2.0
"""Commands for Nova's compute service, which runs them, and for the operators who configure it."""

from __future__ import annotations

import argparse

from nvdimm_driver.cmd.ctl.base import Listing, Rows
from nvdimm_driver.errors import NotFoundError, UsageError

COLUMNS = ("Name", "Label", "Resource class", "Pool", "Path", "Size", "Align", "Domain")


class NovaInventory(Listing):
    """List the backings that nova.conf names in pmem_namespaces, and check that instances can have them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--pmem-namespaces",
            metavar="VALUE",
            action="append",
            help="list these instead of what nova.conf says, in the format of its option; can be repeated",
        )
        parser.add_argument(
            "--nova-config",
            metavar="FILE",
            action="append",
            help="Nova's configuration instead of the standard files; can be repeated",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Rows:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.driver import load_driver
        from nvdimm_driver.nova import pmem_namespaces

        configured = pmem_namespaces.parse(_entries(parsed_args))
        driver = load_driver(self.app.conf)
        served = self.app.conf.acpi.dsm == "qemu"
        inventory = pmem_namespaces.Inventory(driver.pools, driver.backings, driver.ledger, served=served)
        size = render.size_column(parsed_args.human)
        rows = [
            (
                each.name,
                each.label,
                each.resource_class,
                each.pool,
                each.path,
                size(each.size),
                size(each.align),
                each.domain,
            )
            for each in inventory.find(configured)
        ]
        return COLUMNS, rows


def _entries(parsed_args: argparse.Namespace) -> list[str]:
    """Return the entries of pmem_namespaces, from the command line or from Nova's configuration."""
    if parsed_args.pmem_namespaces is not None:
        if parsed_args.nova_config:
            raise UsageError("--pmem-namespaces and --nova-config exclude each other", hint="leave one out")
        return [entry for value in parsed_args.pmem_namespaces for entry in value.split(",") if entry.strip()]
    from nvdimm_driver.nova.conf import read

    conf = read(parsed_args.nova_config)
    if not conf.files:
        raise NotFoundError(
            "there is no nova.conf on this host",
            hint="give its path with --nova-config, or use --pmem-namespaces LABEL:NAME",
        )
    return list(conf.pmem_namespaces)
