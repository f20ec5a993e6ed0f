# SPDX-License-Identifier: Apache-2.0
"""``nvdimmctl pool create``: run the commands that make a pool, and print each one before it runs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvdimm_driver.backing.paths import resolve
from nvdimm_driver.cmd.ctl.base import Action, size_argument
from nvdimm_driver.errors import ConfigError, InUseError, NvdimmError, hint_of
from nvdimm_driver.processes import run

if TYPE_CHECKING:
    from nvdimm_driver.driver import XenNvdimmDriver
    from nvdimm_driver.pools.create import PoolHost, RunCommand, Wish, WriteFile


class PoolCreate(Action):
    """Make a pool: the namespace, for fsdax a file system that is mounted with DAX at boot, and the configuration."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("name", metavar="NAME", help="name of the pool: lower-case letters, digits, - _ and .")
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--region", help="make a namespace in this region; not needed if only one region has room")
        where.add_argument("--namespace", help="use this namespace; everything on it is lost; needs --force")
        parser.add_argument(
            "--size",
            metavar="SIZE",
            type=size_argument,
            help="size of the namespace, such as 512GiB (default: the largest free extent, or all of --namespace)",
        )
        parser.add_argument(
            "--kind",
            choices=("fsdax", "devdax", "pmem"),
            default="fsdax",
            help="fsdax (the default): files on a DAX file system; devdax, pmem: the whole namespace for one NVDIMM",
        )
        parser.add_argument(
            "--file-system",
            choices=("ext4", "xfs"),
            default="ext4",
            help="file system of a fsdax pool (default: ext4)",
        )
        parser.add_argument("--mount-point", metavar="PATH", help="mount point of a fsdax pool (default: /mnt/NAME)")
        parser.add_argument(
            "--quota", metavar="SIZE", type=_size_text, help="how much of the pool domains may have (default: all)"
        )
        parser.add_argument("--force", action="store_true", help="allow the loss of what is on the namespace")
        parser.add_argument("--dry-run", action="store_true", help="only print what would be done")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        from uuid import uuid4

        from nvdimm_driver import conf
        from nvdimm_driver.driver import load_driver
        from nvdimm_driver.pools import create as poolsetup
        from nvdimm_driver.pools.rules import Pools

        driver = load_driver(self.app.conf)
        wish = _wish(parsed_args)
        _check(driver, wish, self.app.options.config_file)
        host = _host(driver)
        _check_unclaimed(driver, wish, host)
        steps = poolsetup.steps(wish, host, str(uuid4()))
        do = _pretend if parsed_args.dry_run else _do
        done: list[str] = []
        printed = ""
        while True:
            try:
                step = steps.send(printed if done else None)  # type: ignore[arg-type]
            except StopIteration:
                break
            text = _text(step)
            print(text, flush=True)
            try:
                printed = do(step, wish)
            except NvdimmError as error:
                undone = f"; done before: {'; '.join(line.splitlines()[0] for line in done)}" if done else ""
                raise ConfigError(f"{error.message}{undone}", hint=error.hint) from error
            done.append(text)
        if not parsed_args.dry_run:
            usage = driver.measure_pool(Pools(conf.configured_pools(conf.load())).named(wish.name))
            print(f"pool {wish.name}: {'; '.join(usage.problems) or 'ok'}")


def _size_text(text: str) -> str:
    """Return an argument that is a size, as it was written: the configuration gets it so."""
    size_argument(text)
    return text


def _wish(args: argparse.Namespace) -> Wish:
    from nvdimm_driver import conf
    from nvdimm_driver.pools.create import Wish

    conf.check_pool_name(args.name, "nvdimmctl pool create")
    return Wish(
        name=args.name,
        kind=args.kind,
        region=args.region,
        namespace=args.namespace,
        size=args.size,
        file_system=args.file_system,
        mount_point=args.mount_point or f"/mnt/{args.name}",
        quota=args.quota or "",
        force=args.force,
    )


def _check(driver: XenNvdimmDriver, wish: Wish, config_file: Sequence[str] | None) -> None:
    """Check what would otherwise fail only after the namespace is made.

    :raises ConfigError: when ``--config-file`` is given, or the mount point is not an absolute path.
    :raises InUseError: when the pool exists, or its mount point is in another pool or not empty.
    """
    import os

    if config_file:
        raise ConfigError(
            "'pool create' writes to the standard configuration, which --config-file replaces",
            hint="leave --config-file out",
        )
    if any(pool.name == wish.name for pool in driver.pools):
        raise InUseError(
            f"there is a pool {wish.name} already",
            hint=f"choose another name; 'nvdimmctl pool show {wish.name}' shows the existing pool",
        )
    if wish.kind != "fsdax":
        return
    if not os.path.isabs(wish.mount_point):
        raise ConfigError(f"--mount-point {wish.mount_point} is not absolute", hint="give an absolute path")
    other = driver.pools.of(resolve(wish.mount_point))
    if other is not None:
        raise InUseError(f"{wish.mount_point} is in pool {other.name}", hint="choose another --mount-point")
    if os.path.ismount(wish.mount_point) or (os.path.isdir(wish.mount_point) and os.listdir(wish.mount_point)):
        raise InUseError(f"{wish.mount_point} is not empty", hint="choose another --mount-point")


def _check_unclaimed(driver: XenNvdimmDriver, wish: Wish, host: PoolHost) -> None:
    """Check that the namespace to be reconfigured is no domain's by libvirt's definitions: the ledger may be lost.

    A ledger from elsewhere does not know whose a device without a definition is, or files that are not mounted.

    :raises LedgerError: when the ledger comes from elsewhere.
    :raises InUseError: when it is one's.
    :raises ConfigError: when libvirt's definitions cannot be read.
    """
    if wish.namespace:
        driver.ledger.check_own()
    found = (each for region in host.regions for each in region.namespaces if each.name == wish.namespace)
    driver.definitions.unknown.check("", {each.device: None for each in found if each.device})


def _host(driver: XenNvdimmDriver) -> PoolHost:
    from pathlib import Path

    from nvdimm_driver import conf, host_text
    from nvdimm_driver.backing import inventory, ndctl
    from nvdimm_driver.cmd.systemd_units import BOOTED
    from nvdimm_driver.pools.create import PoolHost

    kind = Path("/sys/hypervisor/guest_type")
    pv = kind.exists() and host_text.read(kind).strip() == "PV"
    regions = ndctl.regions(_run(("ndctl", "list", "-RNi")))
    taken = {item.identity.device for record in driver.ledger.domains() for item in record.allocations if item.identity}
    taken |= driver.ledger.device_marks.owned_namespaces()
    idle = [each.name for region in regions for each in region.namespaces if not each.device and each.size]
    used = {each.name for each in inventory.mounted()} | inventory.names_of(taken, idle)
    return PoolHost(
        regions=regions,
        page_map="mem" if pv else "dev",  # a PV dom0 cannot have page structures in the namespace: ENOMEM
        systemd=BOOTED.is_dir(),
        in_use=frozenset(each.name for region in regions for each in region.namespaces if each.name in used),
        conf_folder=conf.CONF_FOLDER,
        guests=_guests(driver),
    )


def _guests(driver: XenNvdimmDriver) -> dict[str, str]:
    """Return, by region, a running guest with memory there of a namespace that is gone.

    :raises XenError: when Xen runs, and cannot be asked.
    """
    from nvdimm_driver.backing import inventory
    from nvdimm_driver.model import PAGE
    from nvdimm_driver.state.stray_frames import touching

    strays = driver.planner.strays.find()
    places = [(name, spa // PAGE, -(-size // PAGE)) for name, spa, size in inventory.regions()] if strays else []
    return {name: found[0] for name, *frames in places if (found := touching(strays, *frames))}


def _text(step: RunCommand | WriteFile) -> str:
    from nvdimm_driver.pools.create import RunCommand

    if isinstance(step, RunCommand):
        return f"+ {shlex.join(step.words)}"
    lines = "".join(f"  | {line}\n" for line in step.text.splitlines())
    return f"+ write {step.path}\n{lines}".rstrip()


def _do(step: RunCommand | WriteFile, wish: Wish) -> str:
    """Run a command and return its output, or write a file; one of sysfs can only be written in place."""
    from pathlib import Path

    from nvdimm_driver import host_files
    from nvdimm_driver.pools.create import RunCommand

    del wish
    if isinstance(step, RunCommand):
        return _run(step.words)
    try:
        if step.path.startswith("/sys/"):
            Path(step.path).write_text(step.text)
        else:
            Path(step.path).parent.mkdir(parents=True, exist_ok=True)
            host_files.write(step.path, step.text.encode(), 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {step.path}: {error.strerror}", hint=hint_of(error)) from error
    return ""


def _pretend(step: RunCommand | WriteFile, wish: Wish) -> str:
    """Return what a command would print; run none but systemd-escape, which changes nothing."""
    from nvdimm_driver.pools.create import RunCommand

    if isinstance(step, RunCommand) and step.words[0] == "ndctl":
        kind = "chardev" if wish.kind == "devdax" else "blockdev"
        return f'{{"dev": "{wish.namespace or "namespaceX.Y"}", "{kind}": "DEVICE"}}'
    if isinstance(step, RunCommand) and step.words[0] == "systemd-escape":
        return _run(step.words)
    return ""


def _run(words: tuple[str, ...]) -> str:
    try:
        done = run(words)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {words[0]} on this host", hint=f"apt install {_package(words[0])}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).split("\nUsage:")[0].replace("\n", "; ")
        raise ConfigError(f"'{shlex.join(words)}' failed: {said or f'status {done.returncode}'}")
    return done.stdout


def _package(program: str) -> str:
    return {"ndctl": "ndctl", "mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs"}.get(program, program)
