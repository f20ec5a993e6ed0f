# SPDX-License-Identifier: Apache-2.0
"""Commands for pools, which guests' persistent memory comes from."""

from __future__ import annotations

import argparse
from pathlib import Path
from shutil import get_terminal_size

from nvdimm_driver.cmd.ctl.base import Fields, Listing, Rows, Showing
from nvdimm_driver.errors import BackingError
from nvdimm_driver.host_text import ESCAPED


class PoolList(Listing):
    """List the pools, with their free space and their health."""

    def take_action(self, parsed_args: argparse.Namespace) -> Rows:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.driver import load_driver

        driver = load_driver(self.app.conf)
        size = render.size_column(parsed_args.human)
        rows = [render.pool_row(driver.measure_pool(pool), size) for pool in driver.pools]
        return render.POOL_COLUMNS, rows


class PoolShow(Showing):
    """Show a pool with its namespaces, its problems and its NVDIMMs, or draw a map of it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("pool", metavar="POOL", help="name of the pool, as 'nvdimmctl pool list' prints it")
        parser.add_argument(
            "--map",
            action="store_true",
            help="print a map of the regions that the pool is on, with the place of each NVDIMM",
        )
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the map to this file, as SVG")
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Print or write the map, or have cliff print the table."""
        if not (parsed_args.map or parsed_args.output):
            return int(super().run(parsed_args))
        from nvdimm_driver.cmd.ctl import memory_map
        from nvdimm_driver.driver import load_driver
        from nvdimm_driver.pools.usage import host_map

        driver = load_driver(self.app.conf)
        usage = driver.measure_pool(driver.pools.named(parsed_args.pool))
        if usage.space is None:
            raise BackingError(f"pool {usage.pool.name}: {'; '.join(usage.problems)}")
        its_own = set(usage.space.namespaces)
        regions = [each for each in host_map(driver.ledger, driver.backings) if its_own & set(each.namespaces)]
        if parsed_args.output:
            parsed_args.output.write_text(memory_map.svg(regions), encoding="utf-8", errors=ESCAPED)
        if parsed_args.map:
            print(memory_map.text(regions, get_terminal_size().columns))
        return 0

    def take_action(self, parsed_args: argparse.Namespace) -> Fields:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.driver import load_driver

        driver = load_driver(self.app.conf)
        usage = driver.measure_pool(driver.pools.named(parsed_args.pool))
        return render.pool(usage, render.size_column(parsed_args.human))
