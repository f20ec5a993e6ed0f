# SPDX-License-Identifier: Apache-2.0
"""The first half of the build: a dom0 root tree, kernels, Xen and busybox from Debian 12 packages, and a guest kernel
from Debian 13.

This is the slow half, and it rarely changes. So it is cached by itself, under a key made from this file and the
download script.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.lab.cache import cached, digest
from tests.lab.errors import LabError
from tests.lab.tools import require, run_tool

RELEASE = "bookworm"
OTHER_RELEASE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
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
    "xen-utils-4.17",
    "xfsprogs",
)
UNPACKED_PACKAGES = {
    "dom0-kernel": "linux-image-amd64",
    "guest-kernel": "linux-image-cloud-amd64",
    "xen": "xen-hypervisor-4.17-amd64",
    "busybox": "busybox-static",
}
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/icons/*")
DOWNLOAD = Path(__file__).parent / "recipe" / "download.sh"
APT_OPTIONS = (
    "Acquire::http",
    "Acquire::ftp",
    "Acquire::Check-",
    "Acquire::Retries",
    "Acquire::ForceIPv",
    "APT::Sandbox",
)


@dataclass(frozen=True, slots=True)
class Base:
    """Folders made from Debian packages: `root` is an installed system, each other one an unpacked package."""

    root: Path
    dom0_kernel: Path
    guest_kernel: Path
    xen: Path
    busybox: Path
    other_kernel: Path


def build_base(cache: Path) -> Base:
    """Return the base from `cache`; build it first if it is not there."""
    folder = cached(cache, "base", digest([Path(__file__), DOWNLOAD]), _make)
    return Base(*(folder / name for name in ("root", *UNPACKED_PACKAGES, "other-kernel")))


def _make(folder: Path) -> None:
    require(("mmdebstrap", "dpkg-deb", "apt-get", "chroot"))
    if os.geteuid() != 0:
        raise LabError("building the lab's images needs root: mmdebstrap keeps the owners of files in a plain folder")
    downloads = folder / "downloads"
    downloads.mkdir()
    options = folder / "apt.conf"
    options.write_bytes(_apt_options())
    run_tool(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=apt",
            f"--aptopt={options}",
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
            f"--include={','.join(DOM0_PACKAGES)}",
            f"--customize-hook={DOWNLOAD} {downloads} " + " ".join(UNPACKED_PACKAGES.values()),
            RELEASE,
            folder / "root",
            "-",
        ],
        stdin="".join(f"{line}\n" for line in _mirror_lines()).encode(),
    )
    _download_other(downloads, options)
    for name, package in UNPACKED_PACKAGES.items():
        _unpack(_only_archive(downloads / package), folder / name, folder / "root")
    _unpack(_only_archive(downloads / "other"), folder / "other-kernel", folder / "root")
    shutil.rmtree(downloads)


def _download_other(downloads: Path, options: Path) -> None:
    """Download the guest's kernel of another release to `downloads`/other, with separate folders for apt."""
    own = downloads / "apt"
    (own / "lists" / "partial").mkdir(parents=True)
    (own / "status").touch()
    sources = own / "sources.list"
    main = next(line for line in _mirror_lines() if f" {RELEASE} " in line)
    sources.write_text(f"{main.replace(RELEASE, OTHER_RELEASE)}\n")
    folders = {
        "State": own,
        "State::Lists": own / "lists",
        "State::Status": own / "status",
        "Cache": own,
        "Etc::SourceList": sources,
        "Etc::SourceParts": "/dev/null",
    }
    own_options = "".join(f'Dir::{name} "{path}";\n' for name, path in folders.items())
    (own / "apt.conf").write_text(f'{options.read_text()}{own_options}Acquire::Languages "none";\n')
    environment = {**os.environ, "APT_CONFIG": str(own / "apt.conf"), "MMDEBSTRAP_APT_CONFIG": str(own / "apt.conf")}
    run_tool(["apt-get", "--quiet", "update"], env=environment)
    run_tool([DOWNLOAD, own, UNPACKED_PACKAGES["guest-kernel"]], env=environment)
    (own / UNPACKED_PACKAGES["guest-kernel"]).rename(downloads / "other")


def _only_archive(folder: Path) -> Path:
    (archive,) = folder.glob("*.deb")
    return archive


def _unpack(archive: Path, target: Path, root: Path) -> None:
    """Unpack a package. Kernel packages have no modules.dep; the depmod of the system in `root` makes it."""
    inside = root / "unpacked"
    run_tool(["dpkg-deb", "-x", archive, inside])
    merged = inside / "usr" / "lib" / "modules"  # since Debian 13
    if merged.exists():
        (inside / "lib").mkdir()
        merged.rename(inside / "lib" / "modules")
    for modules in inside.glob("lib/modules/*"):
        run_tool(["chroot", root, "depmod", "-b", "/unpacked", modules.name])
    inside.rename(target)


def _mirror_lines() -> list[str]:
    """Return this machine's Debian sources for the release, as one-line apt sources."""
    targets = run_tool(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    )
    sources = sorted({line for line in targets.decode().splitlines() if line.split()[1].startswith(RELEASE)})
    if not sources:
        raise LabError(f"apt on this machine has no source for Debian {RELEASE}; the lab is built from its packages")
    return [f"deb [signed-by={KEYRING}] {source}" for source in sources]


def _apt_options() -> bytes:
    """Return the options with which this machine's apt reaches its mirror: proxies, and checks that are off."""
    dump = run_tool(["apt-config", "dump", "--no-empty"]).decode()
    return "".join(f"{line}\n" for line in dump.splitlines() if line.startswith(APT_OPTIONS)).encode()
