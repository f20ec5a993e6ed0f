# SPDX-License-Identifier: Apache-2.0
"""Commands for the bytes of NVDIMMs: provision, import, export and wipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from nvdimm_driver.backing.paths import resolve_folder, resolve_new
from nvdimm_driver.cmd.ctl.base import (
    Action,
    agreed,
    check_single,
    find,
    items_of,
    path_argument,
    size_argument,
    up_to_date,
    yes_option,
)
from nvdimm_driver.cmd.ctl.progress import watched
from nvdimm_driver.errors import UsageError

if TYPE_CHECKING:
    from nvdimm_driver.driver import XenNvdimmDriver
    from nvdimm_driver.model import Allocation, NvdimmSpec, Pool, Record, Watch

_PATH_HELP = "the absolute path of a backing's file or device"


class Provision(Action):
    """Make a backing before a domain is defined with it, and print the XML that a domain needs for it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "path", metavar="PATH|NAME", help="path of the file or device; with --pool, its name in the pool"
        )
        parser.add_argument("--pool", help="make it in this pool")
        parser.add_argument(
            "--size",
            type=size_argument,
            required=True,
            help="size with the label area, such as 64GiB; rounded up to 2 MiB",
        )
        _label_option(parser, "that of the pool; for an existing backing with data, the one found")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.cmd.ctl import render
        from nvdimm_driver.contents.importing import new_nvdimm
        from nvdimm_driver.shell import command
        from nvdimm_driver.xml.edit_devices import memory_device

        driver = up_to_date(self.app)
        path = _placed(driver, parsed_args.pool, parsed_args.path)
        pool = driver.pools.of(path)
        label_size = parsed_args.label_size
        if label_size is None:
            wanted = pool.label_size if pool else 0
            label_size = driver.importer.default_label_size(path, parsed_args.size, wanted)
        spec = new_nvdimm(path, parsed_args.size, label_size)
        with watched(path) as watch:
            intake = driver.importer.provision(spec, watch)
        if not intake.creates and not intake.writes:
            print(
                f"{path} exists already and keeps its contents; to overwrite them: "
                + command("nvdimmctl", "wipe", path),
                file=sys.stderr,
            )
        for line in render.advice(spec.visible_size):
            print(f"{path}: {line}", file=sys.stderr)
        print(memory_device(spec))


class Import(Action):
    """Take over a raw file or device, such as a KVM guest's, as the backing of an NVDIMM, and print the XML for it.

    A file or device that is in a pool stays where it is. Any other is copied into a pool.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("source", metavar="SOURCE", help="raw file or block device")
        parser.add_argument("--pool", help="copy it into this pool; can be left out if there is only one pool")
        parser.add_argument(
            "--name", help="name of the copy, or of the pool's device to copy to (default: name of the source)"
        )
        parser.add_argument("--size", type=size_argument, help="size with the label area (default: size of the source)")
        _label_option(parser, "that found in the source")
        parser.add_argument("--force", action="store_true", help="overwrite the contents of the device to copy to")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from nvdimm_driver.xml.edit_devices import memory_device

        driver = up_to_date(self.app)
        source = path_argument(parsed_args.source)
        sizes = parsed_args.size, parsed_args.label_size
        pool = _target_pool(driver, source, parsed_args.pool)
        with watched(source) as watch:
            if pool is None:
                if parsed_args.name:
                    raise UsageError(f"{source} is in a pool and stays where it is", hint="leave --name out")
                spec = driver.importer.import_in_place(source, *sizes, watch)
            else:
                path = driver.pools.place(pool, parsed_args.name or os.path.basename(source))
                spec = driver.importer.import_copy(source, path, *sizes, watch, overwrite=parsed_args.force)
        slot = driver.planner.find_slot_of_labels(spec)
        if problem := driver.planner.find_misplaced_labels(replace(spec, slot=slot or 0)):
            print(f"warning: {spec.path}: {problem}", file=sys.stderr)
        print(
            f"no domain has {spec.path} yet: put this into a domain's XML. Where no file is at the path in the XML, a "
            "define makes one of zeros",
            file=sys.stderr,
        )
        print(memory_device(spec, slot))


class Export(Action):
    """Copy an NVDIMM, with its labels, into an ordinary file, which a KVM guest can use, and verify the copy."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("source", metavar="DOMAIN[:SLOT]|PATH", help=f"domain, or {_PATH_HELP}")
        parser.add_argument(
            "destination", metavar="DESTINATION", help="file to write; parts that are zeros become holes"
        )
        parser.add_argument("--force", action="store_true", help="replace DESTINATION if it exists")
        parser.add_argument(
            "--running", action="store_true", help="copy even while a domain runs with it and may be changing it"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        driver = up_to_date(self.app)
        spec, item = one_nvdimm(driver, parsed_args.source)
        destination = path_argument(parsed_args.destination, resolve_folder)
        running = parsed_args.running and driver.exporter.is_in_use(spec.path)
        with watched(destination) as watch:
            digest = driver.exporter.export(
                spec, destination, watch, overwrite=parsed_args.force, running=parsed_args.running, item=item
            )
        if running:
            print(
                "a domain was running with it: the copy may have any part of what it wrote meanwhile, in any order",
                file=sys.stderr,
            )
        print(f"{digest}  {destination}")


class Wipe(Action):
    """Overwrite NVDIMMs with zeros, labels too. Domains keep their claims to them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("what", metavar="DOMAIN|PATH", help=f"domain, or {_PATH_HELP}")
        parser.add_argument("--slot", type=int, help="wipe only the NVDIMM in this slot of the domain")
        parser.add_argument("--progress", action="store_true", help="print a line to standard error at each tenth")
        parser.add_argument(
            "--unclaimed", action="store_true", help="wipe PATH only if no domain has it, not even one that is off"
        )
        yes_option(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        from nvdimm_driver.cmd.ctl.device_claims import check_agreed, check_uncontested
        from nvdimm_driver.cmd.ctl.saved_guests import warn_of_saved_guest

        driver, unclaimed = up_to_date(self.app), parsed_args.unclaimed
        owner: Record | None = None
        if os.path.isabs(parsed_args.what):
            if parsed_args.slot is not None:
                raise UsageError("--slot is only for a domain, not for a path", hint="leave --slot out")
            doomed = [_whole(driver, path_argument(parsed_args.what))]
        elif unclaimed:
            raise UsageError("--unclaimed is only for a path, not for a domain", hint="leave --unclaimed out")
        else:
            owner = find(driver, parsed_args.what)
            doomed = [item.spec for item in items_of(owner, parsed_args.slot)]
        owners = [owner] if owner else driver.wiper.owners(doomed)
        for each in owners:
            warn_of_saved_guest(self.app, driver, each)
        check = check_agreed if unclaimed else check_uncontested
        check(driver, self.app.conf, [spec.path for spec in doomed])
        paths = ", ".join(spec.path for spec in doomed)
        whose = f" (of domain {', '.join(each.name for each in owners)})" if owners else ""
        if not agreed(f"Overwrite everything in {paths}{whose} with zeros?", parsed_args.yes):
            return 1
        with ExitStack() as locked:
            for each in owners:
                locked.enter_context(driver.locks.changing(each.uuid))

            @contextmanager
            def told(spec: NvdimmSpec) -> Iterator[Watch]:
                with watched(spec.path, lines=parsed_args.progress) as watch:
                    yield watch
                print(f"{spec.path} is all zeros")

            if unclaimed:
                with told(doomed[0]) as watch:
                    driver.wiper.wipe_unclaimed(doomed[0], watch)
            else:
                driver.wiper.wipe_all(doomed, told, owner, owners=owners)
        return 0


def _label_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--label-size",
        metavar="SIZE",
        type=size_argument,
        help=f"size of the label area, 0 for none (default: {default})",
    )


def _placed(driver: XenNvdimmDriver, pool: str | None, path: str) -> str:
    """Return the resolved path of an argument, which is a name in the pool if a pool is given."""
    if pool is None:
        return path_argument(path, resolve_new)
    if "/" in path:
        raise UsageError(f"{path!r} is a path: with --pool, give a name")
    return driver.pools.place(driver.pools.named(pool), path)


def _target_pool(driver: XenNvdimmDriver, source: str, name: str | None) -> Pool | None:
    """Return the pool to copy a file into; None when the file stays where it is."""
    there = driver.pools.of(source)
    if name is not None:
        pool = driver.pools.named(name)
        return None if pool == there else pool
    pools = list(driver.pools)
    if there is not None or not pools:
        return None
    if len(pools) > 1:
        names = ", ".join(pool.name for pool in pools)
        raise UsageError(
            f"{source} is in none of the pools {names}", hint="choose the pool to copy it into with --pool"
        )
    return pools[0]


def one_nvdimm(driver: XenNvdimmDriver, word: str) -> tuple[NvdimmSpec, Allocation | None]:
    """Return the NVDIMM that ``DOMAIN``, ``DOMAIN:SLOT`` or an absolute path names, and whose it is, if anybody's."""
    if os.path.isabs(word):
        whole = _whole(driver, path_argument(word))
        item = driver.exporter.find_owned(whole.path)
        return (replace(item.spec, path=whole.path), item) if item else (whole, None)
    from nvdimm_driver.state.words import find_with_slot, word_for

    record, number = find_with_slot(driver.ledger.domains(), word)
    items = items_of(record, number)
    slots = ", ".join(f"{word_for(record.name, record.uuid)}:{item.spec.slot}" for item in items)
    check_single(record.name, items, f"say which: {slots}")
    return items[0].spec, items[0]


def _whole(driver: XenNvdimmDriver, path: str) -> NvdimmSpec:
    """Return an NVDIMM of all the bytes of a file or device."""
    from nvdimm_driver.model import NvdimmSpec
    from nvdimm_driver.plugins import backing_of

    return NvdimmSpec(0, path, backing_of(driver.backings, path).size(path))
