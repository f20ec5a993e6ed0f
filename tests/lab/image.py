# SPDX-License-Identifier: Apache-2.0
"""The second half of the build: the files that QEMU boots as the Xen host, and the guest that dom0 boots."""

import gzip
import lzma
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tests.lab.base import Base, build_base
from tests.lab.cache import cache_folder, cached, digest
from tests.lab.errors import LabError
from tests.lab.release import Release, chosen
from tests.lab.tools import require, run_tool

SOURCES = Path(__file__).parent / "recipe"
SECTOR = 512
DOM0_DISK_BYTES = 3 << 30
DOM0_MODULES = (
    *("crc32c_generic", "crc32c_intel", "ext4", "xfs", "loop", "tun", "9p", "9pnet_virtio"),
    *("nfit", "nd_pmem", "nd_btt", "nd_e820", "dax_pmem", "device_dax"),
)
DOM0_MODULE_PREFIXES = ("xen", "virtio_")
DOM0_INITRD_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
GUEST_MODULES = ("nd_pmem", "nd_btt", "nfit", "nd_e820")
GUEST_DISK_MODULES = ("virtio_pci", "virtio_blk", "xen_blkfront")
ALL_DISK_MODULES = (*GUEST_DISK_MODULES, "crc32c_generic", "ext4", "nvme", "ata_piix", "ahci", "sd_mod")
GUEST_TOOLS = ("/usr/bin/ndctl", "/sbin/mkfs.ext4")
# Addresses, in a guest of 128 MiB or more, of Linux's setup, the kernel that unpacks itself, and then the initramfs.
SETUP_ADDRESS, KERNEL_ADDRESS, INITRD_ADDRESS = 0x90000, 0x100000, 0x5000000
COPY_ADDRESS = 0x600
"""Of a boot sector that reads another one to its own place; above the BIOS's data."""
SETUP_END = 0xE000
"""Bytes of Linux's setup with its heap and stack; the kernel's arguments follow."""
EXTENTS = 510 - 4 * 12
"""Offset of the boot sector's table: three extents, and one of no sectors."""
# Each exit from a guest to QEMU costs milliseconds. So there is no serial port, no clock calibration, and no probing of
# the BIOS's disks. The initramfs leaves no room to place the kernel at random.
GUEST_LINUX_ARGS = (
    "console=hvc0 quiet loglevel=3 tsc=reliable no_timer_check mitigations=off edd=off nokaslr rdinit=/init"
)


@dataclass(frozen=True, slots=True)
class Images:
    """The files of one built lab; none of them is written again."""

    folder: Path
    release: Release

    @property
    def xen(self) -> Path:
        """The hypervisor, a multiboot ELF file."""
        return self.folder / "xen"

    @property
    def dom0_kernel(self) -> Path:
        """Linux for dom0."""
        return self.folder / "vmlinuz"

    @property
    def dom0_initrd(self) -> Path:
        """The initramfs that mounts `dom0_disk`."""
        return self.folder / "dom0-initrd.gz"

    @property
    def dom0_disk(self) -> Path:
        """dom0's root file system, raw ext4 without a partition table."""
        return self.folder / "dom0.img"

    @property
    def guest_kernel(self) -> Path:
        """Linux for guests."""
        return self.folder / "guest-vmlinuz"

    @property
    def guest_initrd(self) -> Path:
        """The initramfs: a guest's whole user space."""
        return self.folder / "guest-initrd.gz"

    @property
    def guest_disk(self) -> Path:
        """A raw disk that boots the two files above."""
        return self.folder / "guest.img"

    @property
    def guest_tools(self) -> Path:
        """A second initramfs: ndctl, mkfs.ext4, and a program that makes a guest hostile."""
        return self.folder / "guest-tools.gz"

    @property
    def guest_disk_drivers(self) -> Path:
        """A third initramfs: drivers of disks, direct I/O's test, and a journal; the kernel has NVMe built in."""
        return self.folder / "guest-disk-drivers.gz"

    @property
    def full_guest_initrds(self) -> tuple[Path, Path]:
        """The first and third initramfs for a guest with dom0's kernel, which has drivers of all disks."""
        return self.folder / "full-initrd.gz", self.folder / "full-disk-drivers.gz"

    @property
    def guest_tools_disk(self) -> Path:
        """The guest's disk with that initramfs, too; it takes longer to boot."""
        return self.folder / "guest-tools.img"

    def guest_disk_of(self, release: str) -> Path:
        """Return the guest's disk with the kernel of one of the releases that guests have."""
        return self.guest_disk if release == self.release.name else self.folder / f"guest-{release}.img"


def build(release: Release | None = None) -> Images:
    """Return the images of a release; build them first if the recipe changed or there are none.

    :param release: by default the chosen one.
    """
    cache = cache_folder()
    release = release or chosen()
    base = build_base(cache, release)

    def make(folder: Path) -> None:
        _make(base, Images(folder, release))

    recipe = [Path(__file__), *SOURCES.iterdir()]
    return Images(cached(cache, f"lab-{release.name}", digest(recipe, base.root.parent.name), make), release)


def make_guest_disk(images: Images, target: Path, linux_args: str = "", *more: Path) -> None:
    """Write the guest's disk to `target`; `linux_args` are for the kernel, `more` are additional initramfs."""
    make_disk(target, images.guest_kernel, (images.guest_initrd, *more), linux_args)


def make_next_disk(target: Path, size: int) -> None:
    """Write an empty raw disk to `target` from which the BIOS boots the disk after it; `size` in bytes."""
    target.write_bytes(_assemble("next-disk.S", target, COPY=COPY_ADDRESS).ljust(size, b"\0"))


def make_disk(target: Path, kernel: Path, initrds: Sequence[Path], linux_args: str = "") -> None:
    """Write a raw disk to `target`: the boot sector of `recipe/boot.S`, a kernel and initramfs.

    Each read costs the emulated host 16 ms. This reads 63.5 KiB at once, GRUB 16 KiB.
    """
    image = kernel.read_bytes()
    if image[0x202:0x206] != b"HdrS":
        raise LabError(f"{kernel} is no Linux kernel for x86")
    initrd = b"".join(_padded(file.read_bytes()) for file in initrds)
    protected = (image[0x1F1] + 1) * SECTOR
    unpacked = sum(struct.unpack_from("<QI", image, 0x258))
    if protected > SETUP_END or unpacked > INITRD_ADDRESS:
        raise LabError(
            f"{kernel}: its setup ends at {protected:#x} and it unpacks itself up to {unpacked:#x}; "
            f"{SETUP_END:#x} and {INITRD_ADDRESS:#x} are the most that there is room for"
        )
    arguments = f"{GUEST_LINUX_ARGS} {linux_args}".encode()
    setup = bytearray(image[:protected].ljust(SETUP_END, b"\0"))
    # Documentation/arch/x86/boot.rst of Linux: a loader without a number that leaves a heap, and what lies where
    setup[0x210], setup[0x211] = 0xFF, setup[0x211] | 0x80
    struct.pack_into("<II", setup, 0x218, INITRD_ADDRESS, len(initrd))
    struct.pack_into("<HxxI", setup, 0x224, SETUP_END - 0x200, SETUP_ADDRESS + SETUP_END)
    parts = {
        SETUP_ADDRESS: _padded(bytes(setup) + arguments + b"\0"),
        KERNEL_ADDRESS: _padded(image[protected:]),
        INITRD_ADDRESS: initrd,
    }
    sectors = accumulate((_sectors(len(part)) for part in parts.values()), initial=1)
    extents = zip(sectors, parts.items(), strict=False)
    table = b"".join(struct.pack("<III", first, _sectors(len(part)), address) for first, (address, part) in extents)
    disk = b"".join((_boot_sector(target, table), *parts.values()))
    target.write_bytes(disk.ljust(-(-len(disk) // (1 << 20)) << 20, b"\0"))


def _boot_sector(target: Path, extents: bytes) -> bytes:
    sector = bytearray(_assemble("boot.S", target, LINUX=SETUP_ADDRESS >> 4, STACK=SETUP_END, EXTENTS=EXTENTS))
    sector[EXTENTS : EXTENTS + len(extents)] = extents
    return bytes(sector)


def _assemble(source: str, target: Path, **symbols: int) -> bytes:
    """Return a boot sector of the recipe; files beside `target` are used meanwhile."""
    program, code = target.with_suffix(".o"), target.with_suffix(".boot")
    defined = (word for name, value in symbols.items() for word in ("--defsym", f"{name}={value}"))
    run_tool(["as", "--32", *defined, "-o", program, SOURCES / source])
    run_tool(["ld", "-m", "elf_i386", "-Ttext=0x7c00", "--oformat=binary", "-o", code, program])
    sector = code.read_bytes()
    program.unlink()
    code.unlink()
    return sector


def _padded(part: bytes) -> bytes:
    return part.ljust(_sectors(len(part)) * SECTOR, b"\0")


def _sectors(length: int) -> int:
    return -(-length // SECTOR)


def _make(base: Base, images: Images) -> None:
    require(("cp", "cpio", "mke2fs", "as", "ld", "chroot", "gcc"))
    images.xen.write_bytes(gzip.decompress(_only(base.xen, "boot/xen-*.gz").read_bytes()))
    shutil.copy(_only(base.dom0_kernel, "boot/vmlinuz-*"), images.dom0_kernel)
    shutil.copy(_only(base.guest_kernel, "boot/vmlinuz-*"), images.guest_kernel)
    dom0_modules, guest_modules = ModuleTree.of(base.dom0_kernel), ModuleTree.of(base.guest_kernel)
    busybox = _only(base.busybox, "**/bin/busybox")
    _make_initrd(
        images.dom0_initrd, SOURCES / "dom0-initramfs-init", busybox, dom0_modules.closure(DOM0_INITRD_MODULES)
    )
    _make_initrd(images.guest_initrd, SOURCES / "guest-init", busybox, guest_modules.closure(GUEST_MODULES))
    full_initrd, full_drivers = images.full_guest_initrds
    _make_initrd(full_initrd, SOURCES / "guest-init", busybox, dom0_modules.closure(GUEST_MODULES))
    _make_disk_drivers(full_drivers, dom0_modules.closure(ALL_DISK_MODULES))
    make_guest_disk(images, images.guest_disk)
    _make_tools(images.guest_tools, base.root)
    make_guest_disk(images, images.guest_tools_disk, "", images.guest_tools)
    _make_disk_drivers(images.guest_disk_drivers, guest_modules.closure(GUEST_DISK_MODULES))
    for name, kernel in base.other_kernels.items():
        other_initrd = images.folder / f"{name}-initrd.gz"
        _make_initrd(other_initrd, SOURCES / "guest-init", busybox, ModuleTree.of(kernel).closure(GUEST_MODULES))
        make_disk(images.guest_disk_of(name), _kernel_of(kernel), [other_initrd])
    root = images.folder / "root"
    run_tool(["cp", "--archive", "--link", base.root, root])
    _furnish(root, dom0_modules)
    run_tool(["mke2fs", "-q", "-t", "ext4", "-d", root, images.dom0_disk, f"{DOM0_DISK_BYTES >> 10}k"])
    shutil.rmtree(root)


def _kernel_of(package: Path) -> Path:
    """Return the kernel in an unpacked package; since Debian 14 it is beside its modules."""
    return _only(package, "lib/modules/*/vmlinuz" if not (package / "boot").exists() else "boot/vmlinuz-*")


def _only(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


def _furnish(root: Path, modules: "ModuleTree") -> None:
    """Turn an installed system into dom0. Its files are links to the base: replace them, never write in place."""
    for name, target in (("dom0-init", "sbin/dom0-init"), ("lab-agent", "usr/local/sbin/lab-agent")):
        shutil.copy(SOURCES / name, root / target)
        (root / target).chmod(0o755)
    shutil.copy(SOURCES / "lab-agent.service", root / "etc/systemd/system")
    # the log of a guest's console is how the lab reads from it
    _replace(root / "etc/default/xen", "XENCONSOLED_ARGS='--log=all --log-dir=/var/log/xen/console'\n")
    for folder in ("mnt/share", "mnt/dax", "var/lib/xenstored", "var/log/xen/console"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _replace(root / "etc/hostname", "dom0\n")
    _replace(root / "etc/hosts", "127.0.0.1 localhost dom0\n")
    # QEMU's TCG has no vme, and libvirt rejects a CPU model with a feature that the host lacks. Without this, libvirtd
    # ends with "Cannot find suitable CPU model for given data".
    model = root / "usr/share/libvirt/cpu_map/x86_486.xml"
    _replace(model, "".join(line for line in model.read_text().splitlines(keepends=True) if "'vme'" not in line))
    names = (*DOM0_MODULES, *(name for name in modules.files if name.startswith(DOM0_MODULE_PREFIXES)))
    modules.copy(modules.closure(names), root)


def _replace(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text)


def _make_initrd(target: Path, init: Path, busybox: Path, modules: Sequence[Path]) -> None:
    tree = target.with_suffix(".tree")
    for folder in ("bin", "dev", "proc", "sys", "root", "modules"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin" / "busybox")
    shutil.copy(init, tree / "init")
    (tree / "init").chmod(0o755)
    _add_modules(tree / "modules", modules)
    _pack(tree, target)


def _make_disk_drivers(target: Path, modules: Sequence[Path]) -> None:
    """Make an initramfs of `directio.c`, `journal.c`, and modules that are loaded after those of the first one."""
    tree = target.with_suffix(".tree")
    for folder in ("bin", "modules"):
        (tree / folder).mkdir(parents=True)
    for name in ("directio", "journal"):
        run_tool(["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", tree / "bin" / name, SOURCES / f"{name}.c"])
    _add_modules(tree / "modules", modules, "disk-")
    _pack(tree, target)


def _add_modules(folder: Path, modules: Sequence[Path], prefix: str = "") -> None:
    """Copy modules, unpacked, under names that have their order."""
    for number, module in enumerate(modules):
        target_file = folder / f"{prefix}{number:02}-{module.name.removesuffix('.xz')}"
        content = module.read_bytes()
        target_file.write_bytes(lzma.decompress(content) if module.suffix == ".xz" else content)


def _make_tools(target: Path, root: Path) -> None:
    """Make an initramfs of programs of the system in `root`, their libraries, and `hostile.c`."""
    tree = target.with_suffix(".tree")
    (tree / "bin").mkdir(parents=True)
    run_tool(["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", tree / "bin/hostile", SOURCES / "hostile.c"])
    needed = re.findall(r"(/\S+) \(0x", run_tool(["chroot", root, "ldd", *GUEST_TOOLS]).decode())
    for name in {*GUEST_TOOLS, *needed}:
        (tree / name[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name[1:], tree / name[1:])
    _pack(tree, target)


def _pack(tree: Path, target: Path) -> None:
    """Make an initramfs of a folder, and delete the folder."""
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    archive = run_tool(["cpio", "--quiet", "-o", "-H", "newc"], stdin="\n".join(names).encode() + b"\n", cwd=tree)
    target.write_bytes(gzip.compress(archive))
    shutil.rmtree(tree)


@dataclass(frozen=True, slots=True)
class ModuleTree:
    """The modules of one kernel package: the file of each, and the modules that it needs, in loading order."""

    folder: Path
    builtin: frozenset[str]
    files: dict[str, Path]
    needs: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, package: Path) -> "ModuleTree":
        """Read the module tree of an unpacked kernel package."""
        folder = _only(package, "lib/modules/*")
        files: dict[str, Path] = {}
        needs: dict[str, tuple[str, ...]] = {}
        for line in (folder / "modules.dep").read_text().splitlines():
            path, needed = line.split(":", 1)
            files[_module_name(path)] = folder / path
            needs[_module_name(path)] = tuple(_module_name(other) for other in reversed(needed.split()))
        builtin = (folder / "modules.builtin").read_text().splitlines()
        return cls(folder, frozenset(map(_module_name, builtin)), files, needs)

    def closure(self, names: Iterable[str]) -> tuple[Path, ...]:
        """Return the files of `names` and of all modules that they need, in an order that insmod accepts.

        What this kernel has built in needs no file.

        :raises LabError: when the kernel has no such module: the list is wrong then.
        """
        ordered: dict[str, None] = {}
        for name in names:
            if name in self.builtin:
                continue
            if name not in self.files:
                raise LabError(f"the kernel {self.folder.name} has no module {name}")
            ordered.update(dict.fromkeys((*self.needs[name], name)))
        return tuple(self.files[name] for name in ordered)

    def copy(self, modules: Iterable[Path], root: Path) -> None:
        """Install `modules` in the system at `root`, with an index for modprobe."""
        target = root / "lib" / "modules" / self.folder.name
        for module in modules:
            file = target / module.relative_to(self.folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(module, file)
        for index in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            shutil.copy(self.folder / index, target / index)
        run_tool(["chroot", root, "depmod", self.folder.name])


def _module_name(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")
