"""How a pool is made: the commands for a namespace, a file system that is aligned to it, its mount, and the section.

Pure: :func:`steps` yields what is to be done, one step after the other, and gets what each command has printed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from nvdimm_driver.backing import ndctl
from nvdimm_driver.backing.ndctl import NdNamespace, NdRegion
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError, RefusedError
from nvdimm_driver.model import MIB, SUPERPAGE
from nvdimm_driver.sizes import human

MODES = {"fsdax": "fsdax", "devdax": "devdax", "pmem": "raw"}
"""The mode of the namespace for each kind of pool."""
REGION_ALIGN = 16 * MIB
"""What libnvdimm wants a region's size to be a multiple of, unless its ``align`` says less (region_devs.c)."""
UNIT_FOLDER = "/etc/systemd/system"


@dataclass(frozen=True)
class Wish:
    """What the operator asks for.

    :ivar kind: one of :data:`MODES`.
    :ivar region: to make the namespace in; None for the only one with room.
    :ivar namespace: to make anew, with all that is on it lost, instead of making one.
    :ivar size: bytes of the namespace; None for all there is.
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
    """The host to make it on.

    :ivar page_map: ``mem`` or ``dev``: where the kernel keeps the page structures of a namespace (``--map``).
    :ivar systemd: whether systemd runs, to mount the file system at boot.
    :ivar in_use: names of namespaces that are mounted or that domains have.
    :ivar conf_folder: where the section goes.
    """

    regions: tuple[NdRegion, ...]
    page_map: str
    systemd: bool
    in_use: frozenset[str]
    conf_folder: str


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
    """What makes the pool.

    :param uuid: for the file system.
    :raises NotFoundError: there is no such region or namespace.
    :raises RefusedError: something would be lost.
    :raises InUseError: the namespace is in use.
    :raises BackingError: there is no room.
    """
    device = yield from (_made(wish, host) if wish.namespace is None else _made_anew(wish, host))
    path = device
    if wish.kind == "fsdax":
        path = wish.mount_point
        yield RunCommand(tuple(_mkfs(wish, device, uuid)))
        yield from _mounted(wish, host, uuid)
    quota = f"quota = {wish.quota}\n" if wish.quota else ""
    text = f"# made by 'nvdimmctl pool create'\n[pool:{wish.name}]\nkind = {wish.kind}\npaths = {path}\n{quota}"
    yield WriteFile(f"{host.conf_folder}/pool-{wish.name}.conf", text)


def _made(wish: Wish, host: PoolHost) -> Generator[RunCommand | WriteFile, str, str]:
    """A new namespace in a region's free room; returns its device."""
    region = _region(wish, host)
    size = region.largest_free if wish.size is None else wish.size
    if not region.largest_free or size > region.largest_free:
        raise BackingError(
            f"{region.name} has no room for a namespace of {human(size)}, the largest is {human(region.largest_free)}",
            hint=f"ask for less, or take a namespace with --namespace; {_what_there_is(host)}",
        )
    yield from _aligned(region)
    words = ["ndctl", "create-namespace", "-r", region.name, "-n", wish.name, "-s", str(size)]
    printed = yield RunCommand((*words, *_mode(wish, host)))
    return ndctl.namespace(printed).device


def _made_anew(wish: Wish, host: PoolHost) -> Generator[RunCommand | WriteFile, str, str]:
    """A namespace that there is, in the mode that is wanted; returns its device."""
    region, found = _namespace(wish, host)
    if found.name in host.in_use:
        raise InUseError(
            f"{found.name} is in use: {found.device} is mounted, or a domain has it",
            hint="unmount it, or 'nvdimmctl release' the domain, and only if nothing on it is needed any more",
        )
    if not wish.force:
        raise RefusedError(
            f"all that is on {found.name} ({human(found.size or region.size)}, mode {found.mode}) would be lost",
            hint="--force, if nothing on it is needed",
        )
    if found.mode == MODES[wish.kind] and found.device and wish.size is None:
        return (
            found.device
        )  # taking down one with page structures crashes some PV dom0 kernels, and there is no need to
    yield from _aligned(region)
    size = ["-s", str(wish.size)] if wish.size is not None else []
    printed = yield RunCommand(("ndctl", "create-namespace", "-f", "-e", found.name, *size, *_mode(wish, host)))
    return ndctl.namespace(printed).device


def _region(wish: Wish, host: PoolHost) -> NdRegion:
    if wish.region is not None:
        for region in host.regions:
            if region.name == wish.region:
                return region
        raise NotFoundError(f"there is no region {wish.region}", hint=_what_there_is(host))
    roomy = [region for region in host.regions if region.largest_free]
    if len(roomy) == 1:
        return roomy[0]
    what = "more than one region has room" if roomy else "no region has room for a new namespace"
    raise BackingError(what, hint=f"--region or --namespace says where to make it; {_what_there_is(host)}")


def _namespace(wish: Wish, host: PoolHost) -> tuple[NdRegion, NdNamespace]:
    for region in host.regions:
        for each in region.namespaces:
            if each.name == wish.namespace:
                return region, each
    raise NotFoundError(f"there is no namespace {wish.namespace}", hint=_what_there_is(host))


def _what_there_is(host: PoolHost) -> str:
    told = [
        f"{region.name} ({human(region.largest_free)} free): "
        + (", ".join(f"{each.name} {each.mode} {human(each.size)}" for each in region.namespaces) or "no namespaces")
        for region in host.regions
    ]
    return (
        "there is " + "; ".join(told) if told else "the kernel has no region of persistent memory: see 'ndctl list -R'"
    )


def _aligned(region: NdRegion) -> Steps:
    if region.size % REGION_ALIGN:
        yield WriteFile(f"/sys/bus/nd/devices/{region.name}/align", f"{SUPERPAGE:#x}\n")


def _mode(wish: Wish, host: PoolHost) -> Sequence[str]:
    mode = MODES[wish.kind]
    return ["-m", mode] if mode == "raw" else ["-m", mode, f"--map={host.page_map}"]


def _mkfs(wish: Wish, device: str, uuid: str) -> Sequence[str]:
    """Extents in whole pieces of 2 MiB, where they can be had, and no copies that share blocks."""
    if wish.file_system == "xfs":
        layout = ["-m", f"reflink=0,uuid={uuid}", "-d", "su=2m,sw=1", "-l", "su=4k"]
        return ["mkfs.xfs", "-q", *(["-f"] if wish.force else []), *layout, device]
    layout = ["-b", "4096", "-E", "stride=512,stripe_width=512", "-m", "0", "-U", uuid]
    return ["mkfs.ext4", "-q", *(["-F"] if wish.force else []), *layout, device]


def _mounted(wish: Wish, host: PoolHost, uuid: str) -> Steps:
    source = f"/dev/disk/by-uuid/{uuid}"
    yield RunCommand(("mkdir", "-p", wish.mount_point))
    if host.systemd:
        unit = (yield RunCommand(("systemd-escape", "--path", "--suffix=mount", wish.mount_point))).strip()
        yield WriteFile(f"{UNIT_FOLDER}/{unit}", _unit(wish, source))
        yield RunCommand(("systemctl", "daemon-reload"))
        yield RunCommand(("udevadm", "settle"))
        yield RunCommand(("systemctl", "enable", "--now", unit))
    else:
        yield RunCommand(("mount", "-t", wish.file_system, "-o", "dax=always", f"UUID={uuid}", wish.mount_point))
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
Options=dax=always

[Install]
WantedBy=local-fs.target
"""
