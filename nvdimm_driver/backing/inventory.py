# SPDX-License-Identifier: Apache-2.0
"""The host's persistent memory: its namespaces, and the namespace that a block device is on.

Reads two foreign formats: sysfs of libnvdimm and device-dax, with :mod:`.backing.sysfs`, and ``/proc/self/mountinfo``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nvdimm_driver.backing.sysfs import active, number, read, text
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import PERSISTENCE_DOMAINS, Extent, Namespace, Space
from nvdimm_driver.sizes import human

SYSFS = Path("/sys")
MODES = ("fsdax", "devdax", "raw", "sector")
_SECTOR = 512  # of the block layer, whatever the device's own (Documentation/ABI/stable/sysfs-block)


@dataclass(frozen=True)
class Volume:
    """The block device of a namespace, or a partition of it.

    :ivar start: offset in the namespace's data area, bytes; 0 for the whole device.
    :ivar size: bytes.
    """

    namespace: Namespace
    start: int
    size: int

    @property
    def spa(self) -> int:
        """SPA of its first byte."""
        return self.namespace.data_spa + self.start


_MODES = {"safe": "sector", "memory": "fsdax", "dax": "devdax"}
"""ndctl's words for the kernel's (drivers/nvdimm/namespace_devs.c:mode_show)."""


def namespaces(sysfs: Path = SYSFS) -> tuple[Namespace, ...]:
    """Return the host's active pmem namespaces, by SPA.

    Idle namespaces (without a driver) and device-dax that the kernel uses as RAM (driver kmem) are left out.

    :raises BackingError: when sysfs cannot be read, as by a user other than root.
    """
    found = []
    for each in sorted(active(str(sysfs)), key=lambda each: each.data_spa):
        node = text(f"{each.holder}/numa_node")
        found.append(
            Namespace(
                name=each.name,
                mode=each.mode,
                device=each.device,
                uid=each.uid,
                data_spa=each.data_spa,
                data_size=each.data_size,
                numa_node=int(node) if node.isdecimal() else None,  # -1: no node
                persistence_domain=_persistence_domain(sysfs, each.name),
            )
        )
    return tuple(found)


def mode_of(uid: str, sysfs: Path = SYSFS) -> tuple[str, str] | None:
    """Return name and mode of a namespace, also of an idle one, or None when there is none of that uid.

    An idle namespace in raw mode has a uid as :attr:`.Namespace.uid`, in other modes if it has a uuid.
    """
    for namespace in sysfs.glob("bus/nd/devices/namespace*"):
        if uid in (text(namespace / "uuid"), f"spa-{int(text(namespace / 'resource') or '0', 0):#x}"):
            mode = text(namespace / "mode")
            return namespace.name, _MODES.get(mode, mode)
    return None


def names_of(uids: Collection[str], idle: Iterable[str], sysfs: Path = SYSFS) -> set[str]:
    """Return the names of the namespaces that have, or may have, one of these uids (:attr:`.Namespace.uid`).

    An idle namespace does not tell a uuid that is in its info block. If a uid is not found, any idle one can have it.

    :param idle: names of the namespaces without a driver.
    """
    active = {each.uid: each.name for each in namespaces(sysfs)}
    others = {uid: mode_of(uid, sysfs) for uid in uids if uid not in active}
    names = {active[uid] for uid in uids if uid in active} | {name for name, _ in filter(None, others.values())}
    return names | {*idle} if None in others.values() else names


def raw_again(name: str) -> str:
    """Return the commands that have the kernel ignore a namespace's info block until the next boot.

    No byte is changed.
    """
    return (
        f"ndctl disable-namespace {name}; echo 1 >/sys/bus/nd/devices/{name}/force_raw; ndctl enable-namespace {name}"
    )


def regions(sysfs: Path = SYSFS) -> tuple[tuple[str, int, int], ...]:
    """Return the host's regions of persistent memory, as (name, SPA, bytes), by SPA.

    :raises BackingError: when sysfs cannot be read, as by a user other than root.
    """
    found = []
    for region in sysfs.glob("bus/nd/devices/region*"):
        spa, size = (number(region / name) if (region / name).exists() else None for name in ("resource", "size"))
        if spa is not None and size:
            found.append((region.name, spa, size))
    return tuple(sorted(found, key=lambda each: each[1]))


def bad_ranges(sysfs: Path = SYSFS) -> tuple[tuple[int, int], ...]:
    """Return the bad ranges of persistent memory that the kernel knows, as (SPA, bytes), sorted; they may overlap.

    A region has those that the platform reported, a disk also those found since (drivers/nvdimm/badrange.c).

    :raises BackingError: when sysfs cannot be read.
    """
    found: set[tuple[int, int]] = set()
    for region in sysfs.glob("bus/nd/devices/region*"):
        spa = number(region / "resource") if (region / "resource").exists() else None
        found.update(_bad(region, spa))
    for namespace in namespaces(sysfs):
        found.update(_bad(sysfs / "class/block" / namespace.device, namespace.data_spa))
    return tuple(sorted(found))


def bad_parts(extents: Iterable[Extent], bad: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the bad ranges of a backing with these extents, as (offset in the backing, bytes)."""
    ranges = tuple(bad)
    parts = []
    for extent in extents:
        for spa, length in ranges:
            start, end = max(spa, extent.spa), min(spa + length, extent.spa + extent.length)
            if start < end:
                parts.append((extent.offset + start - extent.spa, end - start))
    return tuple(sorted(set(parts)))


def _bad(device: Path, spa: int | None) -> Iterator[tuple[int, int]]:
    """Read ``badblocks`` of a region or disk: lines of first sector and number of sectors (block/badblocks.c)."""
    if spa is None:
        return
    for line in text(device / "badblocks").splitlines():
        first, count = map(int, line.split())
        yield spa + first * _SECTOR, count * _SECTOR


def volume_of(device: int, path: str, sysfs: Path = SYSFS) -> Volume:
    """Return the namespace, or the partition of one, that a block device number stands for.

    :param device: st_dev of a file or st_rdev of a block device.
    :param path: a path on that device, for the error.
    :raises BackingError: when it is anything else, device-mapper and md on top of a namespace included.
    """
    volume = volume_if_pmem(device, sysfs)
    if volume is None:
        numbers = f"{os.major(device)}:{os.minor(device)}"
        node = sysfs / "dev/block" / numbers
        name = node.resolve().name if node.exists() else "no block device"
        raise BackingError(
            f"{path}: is on {name} (device {numbers}), not on persistent memory",
            hint="if it should be on another file system, mount that; a backing has to be on a pmem namespace's own "
            "block device (/dev/pmemN) or a partition of it; device-mapper, md, loop and other disks are not "
            "supported; 'nvdimmctl host' shows the namespaces",
        )
    return volume


def volume_if_pmem(device: int, sysfs: Path) -> Volume | None:
    """Return what a block device number stands for; None when it is neither a pmem namespace nor a partition of one."""
    block = (sysfs / f"dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    partition = (block / "partition").exists()
    disk = block.parent.name if partition else block.name
    for namespace in namespaces(sysfs):
        if namespace.device == disk:
            break
    else:
        return None
    if not partition:
        return Volume(namespace, 0, namespace.data_size)
    start, size = number(block / "start"), number(block / "size")
    if start is None or size is None:
        return None
    return Volume(namespace, start * _SECTOR, size * _SECTOR)


def partitions(disk: str, sysfs: Path = SYSFS) -> list[str]:
    """Return the names of the block devices that are partitions of a disk."""
    return sorted(each.parent.name for each in (sysfs / "class/block" / disk).glob("*/partition"))


def space_of(volumes: Collection[Volume], capacity: int, free: int, largest_free: int) -> Space:
    """Return the room in a pool that is on these volumes; the arguments are those of :class:`.model.Space`."""
    alignments = [volume.spa & -volume.spa for volume in volumes]
    used = {volume.namespace.name: volume.namespace for volume in volumes}
    return Space(capacity, free, largest_free, min(alignments, default=0), tuple(used.values()))


def problems(namespace: Namespace, sysfs: Path = SYSFS) -> tuple[str, ...]:
    """Return the problems that the kernel reports about a namespace, its region and its DIMMs; empty without any.

    :raises BackingError: when sysfs cannot be read.
    """
    found = []
    inside = (Extent(0, namespace.data_spa, namespace.data_size),)
    bad = sum(length for _, length in bad_parts(inside, bad_ranges(sysfs)))
    if bad:
        found.append(f"{namespace.name}: {human(bad)} of bad blocks")
    region = (sysfs / "bus/nd/devices" / namespace.name).resolve().parent
    if text(region / "read_only") == "1":
        found.append(f"{region.name}: read-only")
    for mapping in sorted(region.glob("mapping[0-9]*")):
        dimm = text(mapping).split(",")[0]
        flags = text(sysfs / "bus/nd/devices" / dimm / "nfit/flags")
        if flags:
            found.append(f"{dimm}: {flags}")
    return tuple(found)


def dax_alignment(namespace: Namespace, sysfs: Path = SYSFS) -> int:
    """Return the alignment, in bytes, that mappings of a device-dax device need.

    :raises BackingError: when sysfs cannot be read.
    """
    attribute = sysfs / "bus/dax/devices" / namespace.device / "align"
    alignment = number(attribute)
    if not alignment:
        raise BackingError(f"{attribute}: has no alignment")
    return alignment


def _persistence_domain(sysfs: Path, name: str) -> str:
    """Return the persistence domain of the namespace's region; empty when the kernel names none."""
    domain = text((sysfs / "bus/nd/devices" / name).resolve().parent / "persistence_domain")
    return domain if domain in PERSISTENCE_DOMAINS else ""


# --- mounts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mount:
    """A mounted file system.

    :ivar device: st_dev of its files.
    :ivar options: those of the file system, which have ``dax``, not those of the mount point.
    :ivar root: the folder of the file system that is mounted; ``/`` unless it is a bind mount.
    :ivar id: number that the kernel has given to this mount.
    """

    device: int
    directory: str
    kind: str
    options: tuple[str, ...]
    root: str = "/"
    id: int = 0


def mounts(mountinfo: Path) -> tuple[Mount, ...]:
    """Read ``/proc/<pid>/mountinfo`` (proc(5)): ``id parent major:minor root point options [field…] - type source
    options``.

    :raises BackingError: when it cannot be read.
    """
    lines = read(mountinfo)
    result = []
    # The kernel escapes blanks and newlines in names, and nothing else that Python takes for a space or a line's end.
    for line in (lines or "").split("\n"):
        left, _, right = line.partition(" - ")
        if not right:
            continue
        mount_id, _, numbers, root, directory = left.split(" ")[:5]
        major, _, minor = numbers.partition(":")
        kind, _, options = right.split(" ", 2)  # the source may be empty
        device = os.makedev(int(major), int(minor))
        words = tuple(options.split(","))
        result.append(Mount(device, _unescape(directory), kind, words, _unescape(root), int(mount_id)))
    return tuple(result)


def mount_of(fd: int) -> int:
    """Return the number of the mount by which a descriptor was opened (proc(5), fdinfo).

    :raises BackingError: when /proc cannot be read.
    """
    lines = (read(Path(f"/proc/self/fdinfo/{fd}")) or "").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), 0)


def _unescape(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def mounted(sysfs: Path = SYSFS, mountinfo: Path = Path("/proc/self/mountinfo")) -> tuple[Namespace, ...]:
    """Return the namespaces that a mounted file system is on, directly or on a partition.

    :raises BackingError: when the kernel's files cannot be read.
    """
    volumes = [volume_if_pmem(mount.device, sysfs) for mount in mounts(mountinfo)]
    return tuple({volume.namespace.name: volume.namespace for volume in volumes if volume}.values())


def has_dax(options: Iterable[str]) -> bool:
    """Return True when a file system with these options uses DAX for every file (Documentation/filesystems/dax.rst)."""
    return not {"dax", "dax=always"}.isdisjoint(options)


def physical_address_bits(proc: Path = Path("/proc")) -> int:
    """Return the width of the machine's physical addresses.

    :raises BackingError: when /proc/cpuinfo does not have it.
    """
    cpuinfo = proc / "cpuinfo"
    bits = re.search(r"^address sizes\s*: (\d+) bits physical", read(cpuinfo) or "", re.MULTILINE)
    if not bits:
        raise BackingError(f"{cpuinfo}: no line 'address sizes'", hint="an x86 host is needed")
    return int(bits[1])
