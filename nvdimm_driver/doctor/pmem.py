# SPDX-License-Identifier: Apache-2.0
"""Check the host's persistent memory, and the pools on it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from nvdimm_driver.backing import inventory
from nvdimm_driver.backing.inventory import Mount
from nvdimm_driver.doctor.dax import has_dax
from nvdimm_driver.doctor.finding import Finding, could_not, failed, noted, passed, warned
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.model import SUPERPAGE, Namespace, Pool
from nvdimm_driver.plugins import Backing
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.pools.usage import PoolUsage, usage_of
from nvdimm_driver.shell import command
from nvdimm_driver.sizes import human
from nvdimm_driver.state.ledger import Ledger

_BLOCK = 4096
_NUMBERED = re.compile(r"/dev/(pmem[0-9.]+(p[0-9]+)?|dax[0-9]+\.[0-9]+)")
"""Names that the kernel gives to devices in the order in which it finds them."""
_SECTOR = 512
_DOMAINS = {
    "memory_controller": "what has reached the memory controller survives a power loss (ADR)",
    "cpu_cache": "the caches survive a power loss, too (eADR)",
}


def check_namespaces(sysfs: Path = inventory.SYSFS) -> Iterator[Finding]:
    """Check the namespaces that are active in Linux."""
    try:
        found = inventory.namespaces(sysfs)
        health = [inventory.problems(each, sysfs) for each in found]
    except NvdimmError as error:
        yield could_not("namespaces", error)
        return
    if not found:
        yield failed(
            "namespaces",
            "there is no active namespace of persistent memory",
            "'ndctl list -RNi' lists regions and namespaces; 'nvdimmctl pool create NAME' makes a namespace",
        )
        return
    yield passed("namespaces", f"{len(found)} active, {human(sum(each.data_size for each in found))} in all")
    for each, problems in zip(found, health, strict=True):
        yield check_namespace(each, problems)
        yield check_persistence(each)


def check_namespace(namespace: Namespace, problems: Sequence[str]) -> Finding:
    """Check that a namespace is usable and healthy.

    :param problems: those that :func:`.inventory.problems` has found.
    """
    what = f"{namespace.device}, {namespace.mode}, {human(namespace.data_size)}"
    if problems:
        return warned(
            namespace.name,
            f"{what}: {'; '.join(problems)}",
            "'ndctl list -DRNHM' has the details; copy the data elsewhere before it is lost",
        )
    if namespace.mode == "sector":
        return noted(namespace.name, f"{what}: cannot be used, because its sectors move", "use mode fsdax if possible")
    return passed(namespace.name, what)


def check_persistence(namespace: Namespace) -> Finding:
    """Report what survives a power loss."""
    check = f"{namespace.name}, power loss"
    if namespace.persistence_domain in _DOMAINS:
        return passed(check, _DOMAINS[namespace.persistence_domain])
    return noted(
        check,
        "the platform does not report what survives a power loss; guests are told that flushed stores do (ADR)",
        "look it up in the machine's documentation",
    )


def check_pools(
    pools: Pools,
    backings: Sequence[Backing],
    *,
    any_path: bool,
    mountinfo: Path = Path("/proc/self/mountinfo"),
    dax: Callable[[str], bool] = has_dax,
) -> Iterator[Finding]:
    """Check that there are pools, and that each of them works.

    :param any_path: True when domains may have backings outside the pools, too.
    :param dax: returns True when a new file in a folder is on DAX.
    """
    if not list(pools):
        if any_path:
            yield noted("pools", "none, but domains may have any path: allow_any_path is set")
        else:
            yield failed(
                "pools",
                "none is configured, so domains can have no NVDIMMs",
                "run 'nvdimmctl pool create NAME', or write a section [pool:NAME]",
            )
        return
    with closing(Ledger(":memory:")) as ledger:  # the owners of NVDIMMs do not matter here
        for pool in pools:
            yield from check_pool(pool, pools, ledger, backings, mountinfo, dax)


def check_pool(
    pool: Pool,
    pools: Pools,
    ledger: Ledger,
    backings: Sequence[Backing],
    mountinfo: Path,
    dax: Callable[[str], bool],
) -> Iterator[Finding]:
    """Check that a pool works, and how well.

    :param pools: all of them.
    """
    usage = usage_of(pool, pools, ledger, backings)
    yield check_usage(usage)
    if usage.space is not None:
        yield check_alignment(usage)
        yield from check_names(pool, backings)
        if pool.kind == "fsdax":
            yield from check_file_systems(pool, mountinfo, dax)


def check_usage(usage: PoolUsage) -> Finding:
    """Check that domains can have NVDIMMs in the pool."""
    check = f"pool {usage.pool.name}"
    if usage.space is None:
        return failed(check, "; ".join(usage.problems), "correct that, or remove the pool from the configuration")
    what = f"{usage.pool.kind}, {human(usage.space.capacity)}"
    if usage.problems:
        return warned(
            check, f"{what}: {'; '.join(usage.problems)}", f"'nvdimmctl pool show {usage.pool.name}' has the details"
        )
    return passed(check, what)


def check_alignment(usage: PoolUsage) -> Finding:
    """Check that the pool is aligned to 2 MiB, so that guests can be mapped in entries of 2 MiB."""
    check = f"pool {usage.pool.name}, alignment"
    alignment = usage.space.alignment if usage.space else 0
    if alignment >= SUPERPAGE:
        return passed(check, f"begins at a multiple of {human(alignment)}")
    return warned(
        check,
        f"begins at a multiple of {human(alignment)}: guests are mapped in entries of 4 KiB",
        "begin the partition at a multiple of 2 MiB, or recreate the namespace with --align=2M",
    )


def check_names(pool: Pool, backings: Sequence[Backing]) -> Iterator[Finding]:
    """Check that no boot can give the name of one of the pool's devices to another namespace."""
    found = [path for path in pool.paths if _NUMBERED.fullmatch(path)]
    areas = [area for backing in backings if backing.name == pool.kind for area in backing.areas()]
    if found and len(areas) > 1:
        yield warned(
            f"pool {pool.name}, names",
            f"after a boot, {', '.join(found)} can be another namespace, and domains may have that then",
            "write /dev/disk/by-id/pmem-UUID, the link of a raw namespace or of a partition of it, into the pool's "
            "section; for device-dax, which has none, compare 'ndctl list -N' with the section after each boot",
        )


def check_file_systems(pool: Pool, mountinfo: Path, dax: Callable[[str], bool]) -> Iterator[Finding]:
    """Check that each folder of the pool really is on DAX, and that its file system allocates in pieces of 2 MiB."""
    for path in pool.paths:
        check = f"pool {pool.name}, DAX"
        try:
            if dax(path):
                yield passed(check, f"{path}: files are in persistent memory itself")
            else:
                yield failed(
                    check,
                    f"{path}: files go through the page cache, whatever the mount options say",
                    "unmount it and mount it with -o dax; dmesg says why it does not use DAX (it needs blocks of 4 KiB "
                    "and, before Linux 6.2, no reflink)",
                )
            device = os.stat(path).st_dev
            mount = next((each for each in inventory.mounts(mountinfo) if each.device == device), None)
        except (NvdimmError, OSError) as error:
            yield could_not(check, error)
            continue
        if mount is not None:
            yield check_stripe(pool, mount)
            yield from check_times(pool, path, mount)
        yield from check_mount_options(pool, path, os.statvfs(path).f_flag)


def check_mount_options(pool: Pool, path: str, flags: int) -> Iterator[Finding]:
    """Check that the host takes no guest's file for a program or a device.

    :param flags: those of the mount, as in statvfs(3).
    """
    wanted = {"nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
    missing = ",".join(name for name, flag in wanted.items() if not flags & flag)
    if missing:
        yield warned(
            f"pool {pool.name}, mount options",
            f"{path} is mounted without {missing}: the host could take a guest's file for a program or a device",
            f"add {missing} to its line in /etc/fstab; until the next mount: mount -o remount,{missing} {path}",
        )


def check_times(pool: Pool, path: str, mount: Mount) -> Iterator[Finding]:
    """Check that a loss of power does not lose for long when a program of the host has written a file."""
    if "lazytime" in mount.options:
        yield warned(
            f"pool {pool.name}, times",
            f"{path} is mounted with lazytime: a loss of power loses for up to a day when a program of the host has "
            "written a file; a saved guest could go on over that",
            "take lazytime from its line in /etc/fstab; until the next mount: "
            + command("mount", "-o", "remount,nolazytime", mount.directory),
        )


def check_stripe(pool: Pool, mount: Mount) -> Finding:
    """Check that the file system allocates in pieces of 2 MiB."""
    check = f"pool {pool.name}, file system"
    stripe = stripe_of(mount)
    if stripe and stripe % SUPERPAGE == 0:
        return passed(check, f"{mount.directory}: {mount.kind} allocates in pieces of {human(stripe)}")
    make = {"ext4": "mkfs.ext4 -b 4096 -E stride=512,stripe_width=512", "xfs": "mkfs.xfs -m reflink=0 -d su=2m,sw=1"}
    return warned(
        check,
        f"{mount.directory}: {mount.kind} does not allocate in pieces of 2 MiB: guests may get entries of 4 KiB",
        f"recreate it, which deletes everything on it: {make.get(mount.kind, 'with a stripe of 2 MiB')}",
    )


def stripe_of(mount: Mount) -> int:
    """Return the bytes of the pieces that a file system allocates in, by its mount options; 0 when it has none.

    ext4 has ``stripe`` in blocks (fs/ext4/super.c:_ext4_show_options), which are of 4 KiB where there is DAX; XFS has
    ``sunit`` in sectors (fs/xfs/xfs_super.c:xfs_fs_show_options).
    """
    unit, name = (_BLOCK, "stripe") if mount.kind == "ext4" else (_SECTOR, "sunit")
    values = dict(option.partition("=")[::2] for option in mount.options)
    return int(values.get(name, "0")) * unit
