"""Commands about pools: where pmem for guests comes from."""

from __future__ import annotations

import argparse

from nvdimm_driver.cmd.ctl.base import Fields, Listing, Rows, Showing


class PoolList(Listing):
    """List the pools: how much they have, how much of it is free, and how they are."""

    def take_action(self, parsed_args: argparse.Namespace) -> Rows:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.driver import XenNvdimmDriver

        driver = XenNvdimmDriver.from_conf(self.app.conf)
        size = render.size_column(parsed_args.human)
        rows = [render.pool_row(driver.usage(pool), size) for pool in driver.pools]
        return render.POOL_COLUMNS, rows


class PoolShow(Showing):
    """Show all that is known of one pool: its namespaces, its health, and who has what of it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("pool", metavar="POOL", help="name of the pool, as in 'nvdimmctl pool list'")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Fields:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.driver import XenNvdimmDriver

        driver = XenNvdimmDriver.from_conf(self.app.conf)
        usage = driver.usage(driver.pools.named(parsed_args.pool))
        return render.pool(usage, render.size_column(parsed_args.human))
