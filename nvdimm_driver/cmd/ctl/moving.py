# SPDX-License-Identifier: Apache-2.0
"""Commands that move NVDIMMs to another host."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from nvdimm_driver.cmd.ctl.backings import one_nvdimm
from nvdimm_driver.cmd.ctl.base import Action, items_of, up_to_date
from nvdimm_driver.errors import ConfigError, NotFoundError, UsageError

if TYPE_CHECKING:
    from nvdimm_driver.driver import XenNvdimmDriver
    from nvdimm_driver.model import Allocation, NvdimmSpec, Pool


class Send(Action):
    """Write NVDIMMs to standard output, for 'nvdimmctl receive' on another host.

    Zeros take no room. Nothing is changed here.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "source", metavar="DOMAIN[:SLOT]|PATH", help="all NVDIMMs of a domain, or one of them; or a file or device"
        )
        parser.add_argument(
            "--have", metavar="FILE", help="what 'receive --sums' has printed: send only what the other host lacks"
        )
        parser.add_argument(
            "--running",
            action="store_true",
            help="send even while a domain runs with it and may be changing it; the other host waits for the rest",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.cmd.ctl.progress import watched

        if sys.stdout.isatty():
            raise UsageError(
                "standard output is a terminal", hint="pipe it: nvdimmctl send … | ssh HOST nvdimmctl receive …"
            )
        with _stream() as out:
            driver = up_to_date(self.app)
            nvdimms = _wanted(driver, parsed_args.source)
            have = _read_sums(parsed_args.have) if parsed_args.have else []
            if have and len(nvdimms) > 1:
                raise UsageError("--have is for one NVDIMM", hint="say which, such as db1:0")
            with watched(parsed_args.source) as watch:
                driver.exporter.send(nvdimms, out, watch, running=parsed_args.running, have=have)


class Receive(Action):
    """Read NVDIMMs from standard input, as 'nvdimmctl send' writes them, into a pool, and verify them.

    A file gets its name when all of it is there. What has come of one is kept if the stream is cut off.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--pool", help="pool to put them into; can be left out if there is only one")
        parser.add_argument("--name", help="name in the pool (default: that on the other host)")
        parser.add_argument("--force", action="store_true", help="overwrite the contents of a device")
        parser.add_argument(
            "--sums",
            action="store_true",
            help="read nothing: print checksums of what has come for --name so far, for 'send --have'",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.cmd.ctl.progress import watched
        from nvdimm_driver.contents import streams
        from nvdimm_driver.xml.edit_devices import memory_device

        driver = up_to_date(self.app)
        pool = _pool(driver, parsed_args.pool)
        if parsed_args.sums:
            if not parsed_args.name:
                raise UsageError("--sums needs --name")
            for line in driver.importer.sums(driver.pools.place(pool, parsed_args.name)):
                print(line)
            return
        stream = sys.stdin.buffer
        sent, is_whole = streams.read_header(stream)
        if parsed_args.name and len(sent) > 1:
            raise UsageError(f"--name is for one NVDIMM, and {len(sent)} come", hint="leave it out")
        paths = [driver.pools.place(pool, parsed_args.name or each.name) for each in sent]
        specs = driver.importer.receive(stream, sent, paths, watched, is_whole=is_whole, overwrite=parsed_args.force)
        for each, path, spec in zip(sent, paths, specs, strict=True):
            if is_whole:
                print(memory_device(spec, each.slot))
            else:
                print(f"{path}: waits for the rest, of when its domain is off", file=sys.stderr)


@contextmanager
def _stream() -> Iterator[BinaryIO]:
    """Yield standard output, not buffered; what a library would print there goes to standard error meanwhile."""
    number = sys.stdout.fileno()
    with open(os.dup(number), "wb", 0) as out:
        os.dup2(sys.stderr.fileno(), number)
        try:
            yield out
        finally:
            os.dup2(out.fileno(), number)


def _pool(driver: XenNvdimmDriver, name: str | None) -> Pool:
    """Return the pool of that name; without one, the only pool."""
    pools = [driver.pools.named(name)] if name else list(driver.pools)
    if len(pools) != 1:
        names = ", ".join(pool.name for pool in pools) or "none"
        raise UsageError(f"which pool? There are: {names}", hint="choose one with --pool")
    return pools[0]


def _wanted(driver: XenNvdimmDriver, word: str) -> list[tuple[NvdimmSpec, Allocation | None]]:
    """Return the NVDIMMs that an argument names: of a domain, all."""
    if word.startswith("/") or ":" in word:
        return [one_nvdimm(driver, word)]
    from nvdimm_driver.cmd.ctl.base import find

    return [(item.spec, item) for item in items_of(find(driver, word), None)]


def _read_sums(file: str) -> list[str]:
    from nvdimm_driver.contents.streams import read_sums

    try:
        with open(file, encoding="ascii", errors="replace") as lines:
            return read_sums(lines)
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read {file}: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
