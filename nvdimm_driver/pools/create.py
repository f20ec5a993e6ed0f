# SPDX-License-Identifier: Apache-2.0
"""Creation of a pool: a namespace, a file system aligned to it, its mount, and the section of the configuration.

Pure: :func:`steps` yields one step after the other, and is sent the output of each command.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from nvdimm_driver.backing import ndctl
from nvdimm_driver.backing.ndctl import NdNamespace, NdRegion
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError, RefusedError
from nvdimm_driver.model import MIB, SUPERPAGE
from nvdimm_driver.shell import command
from nvdimm_driver.sizes import human
from nvdimm_driver.state import stray_frames

MODES = {"fsdax": "fsdax", "devdax": "devdax", "pmem": "raw"}
"""The mode of the namespace for each kind of pool."""
REGION_ALIGN = 16 * MIB
"""libnvdimm wants a region's size to be a multiple of this, unless its ``align`` says less (region_devs.c)."""
MOUNT_OPTIONS = "dax=always,nosuid,nodev,noexec"
"""The files are guests' bytes: nothing in them is for the host to run."""
UNIT_FOLDER = "/etc/systemd/system"


@dataclass(frozen=True)
class Wish:
    """The pool that the operator asks for.

    :ivar kind: one of :data:`MODES`.
    :ivar region: region for the new namespace; None for the only region with room.
    :ivar namespace: namespace to reconfigure instead of creating one, which loses all that is on it; None to create.
    :ivar size: bytes of the namespace; None for all the room.
    :ivar file_system: ``ext4`` or ``xfs``.
    :ivar mount_point: absolute path.
    :ivar quota: as in the configuration; empty for none.
    :ivar force: what is on the namespace may be lost.
    """

    name: str
    kind: str
    region: str | None
    namespace: str | None
    size: int | None
    file_system: str
    mount_point: str
    quota: str
    force: bool


@dataclass(frozen=True)
class PoolHost:
    """The host of the new pool.

    :ivar page_map: ``mem`` or ``dev``: where the kernel keeps the page structures of a namespace (``--map``).
    :ivar systemd: True when systemd runs, which then mounts the file system at boot.
    :ivar in_use: names of namespaces that are mounted or that domains have.
    :ivar conf_folder: directory for the file with the section.
    :ivar guests: by region, a running guest that has memory there of a namespace that is gone (:mod:`.stray_frames`).
    """

    regions: tuple[NdRegion, ...]
    page_map: str
    systemd: bool
    in_use: frozenset[str]
    conf_folder: str
    guests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunCommand:
    """A command to run."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class WriteFile:
    """A file to write."""

    path: str
    text: str


Steps = Generator[RunCommand | WriteFile, str, None]


def steps(wish: Wish, host: PoolHost, uuid: str) -> Steps:
    """Yield the steps that make the pool; send the output of each command.

    :param uuid: UUID for the file system.
    :raises NotFoundError: when there is no such region or namespace.
    :raises RefusedError: when something would be lost without ``force``.
    :raises InUseError: when the namespace is in use.
    :raises BackingError: when there is no room.
    """
    device = yield from (_create(wish, host) if wish.namespace is None else _reconfigure(wish, host))
    path = device
    if wish.kind == "fsdax":
        path = wish.mount_point
        yield RunCommand(tuple(_mkfs(wish, device, uuid)))
        yield from _mount(wish, host, uuid)
    elif wish.kind == "pmem":
        path = yield from _lasting_name(device, host)
    quota = f"quota = {wish.quota}\n" if wish.quota else ""
    text = f"# made by 'nvdimmctl pool create'\n[pool:{wish.name}]\nkind = {wish.kind}\npaths = {path}\n{quota}"
    yield WriteFile(f"{host.conf_folder}/pool-{wish.name}.conf", text)


def _lasting_name(device: str, host: PoolHost) -> Generator[RunCommand | WriteFile, str, str]:
    """Return the link of a raw namespace that no boot gives to another one, if udev makes it, or else the device.

    It has the namespace's uuid (systemd: rules.d/60-persistent-storage.rules). There is none for device-dax.
    """
    if not host.systemd:
        return device
    yield RunCommand(("udevadm", "settle"))
    links = yield RunCommand(("udevadm", "info", "--query=symlink", f"--name={device}"))
    return next((f"/dev/{link}" for link in links.split() if link.startswith("disk/by-id/pmem-")), device)


def _create(wish: Wish, host: PoolHost) -> Generator[RunCommand | WriteFile, str, str]:
    """Create a namespace in a region's free room, and return its device."""
    region = _region(wish, host)
    _check_room(region, host)
    size = region.largest_free if wish.size is None else wish.size
    if not region.largest_free or size > region.largest_free:
        raise BackingError(
            f"{region.name} has no room for a namespace of {human(size)}, the largest is {human(region.largest_free)}",
            hint=f"ask for less, or take a namespace with --namespace; {_list_regions(host)}",
        )
    yield from _align(region)
    words = ["ndctl", "create-namespace", "-r", region.name, "-n", wish.name, "-s", str(size)]
    printed = yield RunCommand((*words, *_mode(wish, host)))
    return ndctl.namespace(printed).device


def _reconfigure(wish: Wish, host: PoolHost) -> Generator[RunCommand | WriteFile, str, str]:
    """Bring an existing namespace into the wanted mode, and return its device."""
    region, found = _namespace(wish, host)
    if found.name in host.in_use:
        why = f"{found.device} is mounted, or a domain has it"
        hint = (
            "if nothing on it is needed any more, unmount it, or give up the NVDIMM on it ('nvdimmctl list' shows "
            "which): nvdimmctl release --slot N DOMAIN"
        )
        if not found.device:
            why = "a domain has it, or one that is not there now, which it may be: it is not enabled"
            enable = command("ndctl", "enable-namespace", found.name)
            hint += f"; if it has none, a mark tells: {enable}, and then 'nvdimmctl check --repair' with its device"
        raise InUseError(f"{found.name} is in use: {why}", hint=hint)
    _check_room(region, host)
    if not wish.force:
        raise RefusedError(
            f"all that is on {found.name} ({human(found.size or region.size)}, mode {found.mode}) would be lost",
            hint="--force, if nothing on it is needed",
        )
    if found.mode == MODES[wish.kind] and found.device and wish.size is None:
        # Not needed, and disabling a namespace with page structures crashes some PV dom0 kernels.
        return found.device
    yield from _align(region)
    size = ["-s", str(wish.size)] if wish.size is not None else []
    printed = yield RunCommand(("ndctl", "create-namespace", "-f", "-e", found.name, *size, *_mode(wish, host)))
    return ndctl.namespace(printed).device


def _check_room(region: NdRegion, host: PoolHost) -> None:
    """Check that nothing is written where a running guest has its bytes.

    :raises InUseError: when it could be.
    """
    if region.name in host.guests:
        raise InUseError(
            f"{region.name} has memory of the running guest {host.guests[region.name]}, whose namespace is gone: "
            "nothing was written over it",
            hint=stray_frames.HINT,
        )


def _region(wish: Wish, host: PoolHost) -> NdRegion:
    if wish.region is not None:
        for region in host.regions:
            if region.name == wish.region:
                return region
        raise NotFoundError(f"there is no region {wish.region}", hint=_list_regions(host))
    roomy = [region for region in host.regions if region.largest_free]
    if len(roomy) == 1:
        return roomy[0]
    what = "more than one region has room" if roomy else "no region has room for a new namespace"
    raise BackingError(what, hint=f"choose with --region or --namespace; {_list_regions(host)}")


def _namespace(wish: Wish, host: PoolHost) -> tuple[NdRegion, NdNamespace]:
    for region in host.regions:
        for each in region.namespaces:
            if each.name == wish.namespace:
                return region, each
    raise NotFoundError(f"there is no namespace {wish.namespace}", hint=_list_regions(host))


def _list_regions(host: PoolHost) -> str:
    told = [
        f"{region.name} ({human(region.largest_free)} free): "
        + (", ".join(f"{each.name} {each.mode} {human(each.size)}" for each in region.namespaces) or "no namespaces")
        for region in host.regions
    ]
    return (
        "there is " + "; ".join(told) if told else "the kernel has no region of persistent memory: see 'ndctl list -R'"
    )


def _align(region: NdRegion) -> Steps:
    if region.size % REGION_ALIGN:
        yield WriteFile(f"/sys/bus/nd/devices/{region.name}/align", f"{SUPERPAGE:#x}\n")


def _mode(wish: Wish, host: PoolHost) -> Sequence[str]:
    mode = MODES[wish.kind]
    return ["-m", mode] if mode == "raw" else ["-m", mode, f"--map={host.page_map}"]


def _mkfs(wish: Wish, device: str, uuid: str) -> Sequence[str]:
    """Return the mkfs command: extents of whole 2 MiB pieces where possible, and no reflinks."""
    if wish.file_system == "xfs":
        layout = ["-m", f"reflink=0,uuid={uuid}", "-d", "su=2m,sw=1", "-l", "su=4k"]
        return ["mkfs.xfs", "-q", *(["-f"] if wish.force else []), *layout, device]
    layout = ["-b", "4096", "-E", "stride=512,stripe_width=512", "-m", "0", "-U", uuid]
    return ["mkfs.ext4", "-q", *(["-F"] if wish.force else []), *layout, device]


def _mount(wish: Wish, host: PoolHost, uuid: str) -> Steps:
    source = f"/dev/disk/by-uuid/{uuid}"
    yield RunCommand(("mkdir", "-p", wish.mount_point))
    if host.systemd:
        unit = (yield RunCommand(("systemd-escape", "--path", "--suffix=mount", wish.mount_point))).strip()
        yield WriteFile(f"{UNIT_FOLDER}/{unit}", _unit(wish, source))
        yield RunCommand(("systemctl", "daemon-reload"))
        yield RunCommand(("udevadm", "settle"))
        yield RunCommand(("systemctl", "enable", "--now", unit))
    else:
        yield RunCommand(("mount", "-t", wish.file_system, "-o", MOUNT_OPTIONS, f"UUID={uuid}", wish.mount_point))
    yield RunCommand(("chmod", "0700", wish.mount_point))


def _unit(wish: Wish, source: str) -> str:
    return f"""\
# made by 'nvdimmctl pool create'
[Unit]
Description=NVDIMMs of Xen domains: pool {wish.name}
Before=libvirtd.service virtxend.service nvdimmd.service

[Mount]
What={source}
Where={wish.mount_point}
Type={wish.file_system}
Options={MOUNT_OPTIONS}

[Install]
WantedBy=local-fs.target
"""
