# SPDX-License-Identifier: Apache-2.0
"""The first half of the build: a dom0 root tree, kernels, Xen and busybox from the packages of a Debian release, and
the guest kernel of another one.

This is the slow half, and it rarely changes. So it is cached by itself, under a key made from these files and the
name of the release.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.lab import mirror
from tests.lab import release as releases
from tests.lab.cache import cached, digest
from tests.lab.errors import LabError
from tests.lab.release import GUESTS, Release
from tests.lab.tools import require, run_tool

DOM0_PACKAGES = (
    "apparmor",
    "daxctl",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon-driver-xen",
    "libvirt-daemon-system",
    "ndctl",
    "procps",
    "python3-cffi",
    "python3-cliff",
    "python3-libvirt",
    "python3-lxml",
    "python3-oslo.config",
    "python3-oslo.log",
    "python3-prometheus-client",
    "python3-rich",
    "python3-stevedore",
    "qemu-system-xen",
    "strace",
    "xen-utils-{xen}",
    "xfsprogs",
)
UNPACKED_PACKAGES = {
    "dom0-kernel": "linux-image-amd64",
    "guest-kernel": "linux-image-cloud-amd64",
    "xen": "xen-hypervisor-{xen}-amd64",
    "busybox": "busybox-static",
}
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/icons/*")
DOWNLOAD = Path(__file__).parent / "recipe" / "download.sh"


@dataclass(frozen=True, slots=True)
class Base:
    """Folders made from Debian packages: `root` is an installed system, each other one an unpacked package.

    :ivar other_kernels: the guests' kernels of the other releases, by the release's name.
    """

    root: Path
    dom0_kernel: Path
    guest_kernel: Path
    xen: Path
    busybox: Path
    other_kernels: dict[str, Path]


def build_base(cache: Path, release: Release) -> Base:
    """Return the base of a release from `cache`; build it first if it is not there."""

    def make(folder: Path) -> None:
        _make(folder, release)

    sources = [Path(__file__), Path(releases.__file__), Path(mirror.__file__), DOWNLOAD]
    folder = cached(cache, f"base-{release.name}", digest(sources, release.name), make)
    return Base(
        root=folder / "root",
        dom0_kernel=folder / "dom0-kernel",
        guest_kernel=folder / "guest-kernel",
        xen=folder / "xen",
        busybox=folder / "busybox",
        other_kernels={name: folder / f"kernel-{name}" for name in GUESTS if name != release.name},
    )


def _make(folder: Path, release: Release) -> None:
    require(("mmdebstrap", "dpkg-deb", "apt-get", "chroot"))
    if os.geteuid() != 0:
        raise LabError("building the lab's images needs root: mmdebstrap keeps the owners of files in a plain folder")
    downloads = folder / "downloads"
    downloads.mkdir()
    options = folder / "apt.conf"
    options.write_text(mirror.apt_options())
    packages = {name: package.format(xen=release.xen) for name, package in UNPACKED_PACKAGES.items()}
    run_tool(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=apt",
            f"--aptopt={options}",
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
            f"--include={','.join(DOM0_PACKAGES).format(xen=release.xen)}",
            f"--customize-hook={DOWNLOAD} {downloads} " + " ".join(packages.values()),
            release.name,
            folder / "root",
            "-",
        ],
        stdin="".join(f"{line}\n" for line in mirror.sources(release.name)).encode(),
    )
    for name, package in packages.items():
        _unpack(downloads / package, folder / name, folder / "root")
    for name in GUESTS:
        if name != release.name:
            _unpack(_download_kernel(downloads / name, name), folder / f"kernel-{name}", folder / "root")
    shutil.rmtree(downloads)


def _download_kernel(folder: Path, release: str) -> Path:
    """Download the guest's kernel of a release below `folder`, which is made; return where."""
    folder.mkdir()
    environment = mirror.separate_apt(folder, release)
    package = UNPACKED_PACKAGES["guest-kernel"]
    run_tool([DOWNLOAD, folder, package], env={**environment, "MMDEBSTRAP_APT_CONFIG": environment["APT_CONFIG"]})
    return folder / package


def _unpack(downloads: Path, target: Path, root: Path) -> None:
    """Unpack the packages in a folder. Those of a kernel have no modules.dep; depmod of the system in `root` makes it.

    :raises LabError: when there is none.
    """
    inside = root / "unpacked"
    archives = list(downloads.glob("*.deb"))
    if not archives:
        raise LabError(f"{downloads}: apt-get download left no package")
    for archive in archives:
        run_tool(["dpkg-deb", "-x", archive, inside])
    merged = inside / "usr" / "lib" / "modules"  # since Debian 13
    if merged.exists():
        (inside / "lib").mkdir()
        merged.rename(inside / "lib" / "modules")
    for modules in inside.glob("lib/modules/*"):
        run_tool(["chroot", root, "depmod", "-b", "/unpacked", modules.name])
    inside.rename(target)
