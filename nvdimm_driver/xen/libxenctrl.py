# SPDX-License-Identifier: Apache-2.0
"""The running hypervisor, through its own libxenctrl: one thin method for each call that the driver makes.

libxenctrl's soname contains the hypervisor's version, because domctls are not stable between releases. The library is
chosen by the running version, not by the installed one. The functions used here have had the same signatures since
Xen 4.17 (xc_get_paging_mempool_size came with it).
"""

from __future__ import annotations

import errno
import os

from nvdimm_driver.errors import XenError
from nvdimm_driver.host_text import decode, read
from nvdimm_driver.sizes import human

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    ffi: Any
else:
    from nvdimm_driver.xen._xen import ffi

PAGE = 4096
OLDEST = (4, 17)
E820_RAM = 1
WRITE_BACK = 6
"""xen/include/asm-x86/mtrr.h: MTRR_TYPE_WRBACK."""
DELETE_CACHEATTR = 0xFFFFFFFF
"""xen/include/public/domctl.h: XEN_DOMCTL_DELETE_MEM_CACHEATTR."""
HAP = 1 << 3
"""xen/include/public/sysctl.h: XEN_SYSCTL_PHYSCAP_hap."""
MAX_E820_ENTRIES = 1024
"""Xen's maximum (E820MAX); it answers EINVAL to a buffer that is too small."""
PROT_READ, PROT_WRITE = 1, 2
XENVER_CAPABILITIES, XENVER_COMMANDLINE, VERSION_TEXT_SIZE = 3, 9, 1024
"""xen/include/public/version.h: XENVER_*, and the size of xen_capabilities_info_t and xen_commandline_t."""
PHYSINFO_CAPABILITIES, PHYSINFO_WORDS = 7, 64
"""Index of the capabilities in struct xen_sysctl_physinfo (public/sysctl.h), and a size above its own; 4-byte words."""
DOMAIN_FLAGS, DOMAIN_WORDS = 1, 64
"""Index of the flags in struct xen_domctl_getdomaininfo (public/domctl.h), and a size above its own; 4-byte words."""
DOMAIN_HAP = 1 << 8
"""xen/include/public/domctl.h: XEN_DOMINF_hap."""

LIBRARY_FOLDERS = ("lib", "lib64", "lib/*-linux-gnu", "local/lib", "local/lib64")

HINTS = {
    errno.EPERM: "only root in dom0 may do this, and only with frames that dom0 itself may access",
    errno.ESRCH: "the domain is gone",
    errno.ENOMEM: "the hypervisor is out of memory; free_memory in `xl info` shows what is left",
    errno.EBUSY: "the domain is at its memory limit",
}


class Xen:
    """An open connection to the hypervisor. Frames have 4 KiB; addresses, lengths and sizes are in bytes.

    Every method makes one call. When that fails, it raises XenError with the errno's name and the arguments.
    """

    def __init__(self, root: str = "/") -> None:
        """Connect to the running hypervisor; ``root`` is the folder with ``sys``, ``dev`` and ``usr``.

        :raises XenError: without Xen, outside dom0, when not root, or without that Xen version's libxenctrl.
        """
        self._version = running_version(root)
        self._soname = f"libxenctrl.so.{self._version}"
        if not os.path.exists(os.path.join(root, "dev/xen/privcmd")):
            raise XenError(
                "this is not dom0: /dev/xen/privcmd is missing",
                hint="run it in dom0; there, `modprobe xen-privcmd` creates the device",
            )
        try:
            self._lib: Any = ffi.dlopen(self._soname)
        except OSError as error:
            installed = ", ".join(installed_versions(root)) or "none"
            raise XenError(
                f"{self._soname} cannot be loaded: Xen {self._version} is running, "
                f"libxenctrl is installed for: {installed}",
                hint=f"install the libraries of Xen {self._version}, or reboot into the Xen that is installed",
            ) from error
        try:
            self._memory: Any = ffi.dlopen("libxenforeignmemory.so.1")
        except OSError as error:
            raise XenError(f"{error}", hint="install the package with libxenforeignmemory.so.1") from error
        ffi.errno = 0
        self._handle: Any = self._lib.xc_interface_open(ffi.NULL, ffi.NULL, 0)
        if not self._handle:
            raise self._error("xc_interface_open", ffi.errno, "/dev/xen/privcmd", hint="only root in dom0 may do this")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Can be repeated."""
        handle, self._handle = self._handle, ffi.NULL
        if handle:
            self._lib.xc_interface_close(handle)

    def iomem_permission(self, domid: int, mfn: int, count: int, allow: bool) -> None:
        """Allow these machine frames to be mapped into the domain, or revoke that."""
        what = f"domain {domid}, mfn {mfn:#x}, {count} frames, {'grant' if allow else 'revoke'}"
        self._call("xc_domain_iomem_permission", what, domid, mfn, count, allow)

    def memory_mapping(self, domid: int, gfn: int, mfn: int, count: int, add: bool) -> None:
        """Map machine frames into the guest, or remove them.

        When adding fails, libxc removes the whole range before it returns, and errno is that of the removal
        (tools/libs/ctrl/xc_domain.c:xc_domain_memory_mapping). After an error, removing goes on to the range's end.
        """
        what = f"domain {domid}, gfn {gfn:#x}, mfn {mfn:#x}, {count} frames, {'add' if add else 'remove'}"
        hint = "find the hypervisor's own reason in `xl dmesg` at memory_map:fail; libxc does not keep its errno"
        self._call("xc_domain_memory_mapping", what, domid, gfn, mfn, count, add, hint=hint if add else "")

    def paging_pool(self, domid: int) -> int:
        """Return the size in bytes of the domain's pool of page-table pages, including used ones."""
        size = ffi.new("uint64_t *")
        self._call("xc_get_paging_mempool_size", f"domain {domid}", domid, size)
        return int(size[0])

    def set_paging_pool(self, domid: int, size: int) -> None:
        """Set the size in bytes of that pool, a multiple of 4 KiB."""
        self._call("xc_set_paging_mempool_size", f"domain {domid}, {human(size)}", domid, size)

    def pin_memory_cacheattr(self, domid: int, gfn: int, count: int, memory_type: int) -> bool:
        """Pin the memory type of guest frames; return False when the hypervisor refuses.

        Refusals (xen/arch/x86/hvm/mtrr.c:hvm_set_mem_pinned_cacheattr): a Xen without the call (ENOSYS, EOPNOTSUPP), a
        range above the address width (EINVAL), more than 64 ranges (ENOSPC), one that overlaps another range (EBUSY),
        no pin to delete (ENOENT).
        """
        what = f"domain {domid}, gfn {gfn:#x}, {count} frames, memory type {memory_type}"
        refusals = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC, errno.EBUSY, errno.ENOENT)
        arguments = (domid, gfn, gfn + count - 1, memory_type)
        return self._call("xc_domain_pin_memory_cacheattr", what, *arguments, refusals=refusals) >= 0

    def machine_memory_map(self) -> list[tuple[int, int, int]]:
        """Return the host's e820 map: (address, size, type) of each entry; RAM is type 1."""
        entries = ffi.new("struct e820entry[]", MAX_E820_ENTRIES)
        count = self._call("xc_get_machine_memory_map", f"{MAX_E820_ENTRIES} entries", entries, MAX_E820_ENTRIES)
        return [(entry.addr, entry.size, entry.type) for entry in entries[0:count]]

    def platform_capabilities(self) -> int:
        """Return the platform's capability bits, such as :data:`HAP`."""
        info = ffi.new("uint32_t[]", PHYSINFO_WORDS)
        self._call("xc_physinfo", "the platform", ffi.cast("xc_physinfo_t *", info))
        return int(info[PHYSINFO_CAPABILITIES])

    def command_line(self) -> str:
        """Return the command line that the hypervisor was booted with."""
        return self._version_text(XENVER_COMMANDLINE, "command line")

    def capabilities(self) -> str:
        """Return the hypervisor's words for what it can do, such as ``hvm-3.0-x86_64``."""
        return self._version_text(XENVER_CAPABILITIES, "capabilities")

    def maximum_gfn(self, domid: int) -> int | None:
        """Return the highest guest frame that the domain has; None when the hypervisor does not know the domain.

        XENMEM_maximum_gpfn finds any domain by its id, dying ones and zombies included (xen/common/memory.c). Unlike
        xc_domain_getinfolist, its interface does not change with Xen's version.
        """
        gfn = ffi.new("xen_pfn_t *")
        rc = self._call("xc_domain_maximum_gpfn", f"domain {domid}", domid, gfn, refusals=(errno.ESRCH,))
        return int(gfn[0]) if rc >= 0 else None

    def has_hap(self, domid: int) -> bool:
        """Return True when the domain has hardware assisted paging, and not shadow page tables."""
        info, what = ffi.new("uint32_t[]", DOMAIN_WORDS), f"domain {domid}"
        found = self._call("xc_domain_getinfolist", what, domid, 1, ffi.cast("xc_domaininfo_t *", info))
        if not found or info[0] & 0xFFFF != domid:  # the next domain, if there is none of this id
            raise self._error("xc_domain_getinfolist", errno.ESRCH, what)
        return bool(info[DOMAIN_FLAGS] & DOMAIN_HAP)

    def populate_physmap_exact(self, domid: int, gfn: int, count: int) -> None:
        """Give the guest new RAM at ``count`` guest frames from ``gfn`` on."""
        gfns = ffi.new("xen_pfn_t[]", list(range(gfn, gfn + count)))
        what = f"domain {domid}, gfn {gfn:#x}, {count} frames"
        self._call("xc_domain_populate_physmap_exact", what, domid, count, 0, 0, gfns)

    def read_memory(self, domid: int, address: int, length: int) -> bytes:
        """Return ``length`` bytes of the guest's RAM."""
        pages, where = self._map_foreign(domid, address, length, PROT_READ)
        try:
            return bytes(ffi.buffer(where + address % PAGE, length))
        finally:
            self._unmap_foreign(where, pages)

    def write_memory(self, domid: int, address: int, data: bytes) -> None:
        """Write bytes to the guest's RAM."""
        pages, where = self._map_foreign(domid, address, len(data), PROT_READ | PROT_WRITE)
        try:
            ffi.memmove(where + address % PAGE, data, len(data))
        finally:
            self._unmap_foreign(where, pages)

    def raise_pci_interrupt(self, domid: int, device: int) -> None:
        """Raise INTA of a device on the guest's PCI bus 0, and lower it: whoever handles it need not lower it."""
        try:
            library: Any = ffi.dlopen("libxendevicemodel.so.1")
        except OSError as error:
            raise XenError(f"{error}", hint="install the package with libxendevicemodel.so.1") from error
        ffi.errno = 0
        model = library.xendevicemodel_open(ffi.NULL, 0)
        if not model:
            raise self._error("xendevicemodel_open", ffi.errno, f"domain {domid}")
        try:
            for level in (1, 0):
                ffi.errno = 0
                if library.xendevicemodel_set_pci_intx_level(model, domid, 0, 0, device, 0, level) < 0:
                    what = f"domain {domid}, device {device}, level {level}"
                    raise self._error("xendevicemodel_set_pci_intx_level", ffi.errno, what)
        finally:
            library.xendevicemodel_close(model)

    def _version_text(self, command: int, what: str) -> str:
        text = ffi.new("char[]", VERSION_TEXT_SIZE)
        self._call("xc_version", what, command, text)
        return decode(bytes(ffi.string(text, VERSION_TEXT_SIZE)))

    def _map_foreign(self, domid: int, address: int, length: int, protection: int) -> tuple[int, Any]:
        first, last = address // PAGE, (address + length - 1) // PAGE
        pages = last - first + 1
        gfns = ffi.new("xen_pfn_t[]", list(range(first, last + 1)))
        errors = ffi.new("int[]", pages)
        what = f"domain {domid}, gfn {first:#x}, {pages} pages"
        foreign = self._lib.xc_interface_fmem_handle(self._handle)
        ffi.errno = 0
        where = self._memory.xenforeignmemory_map(foreign, domid, protection, pages, gfns, errors)
        if not where:
            raise self._error("xenforeignmemory_map", ffi.errno, what)
        # A successful mapping can lack some pages; touching one would raise SIGBUS.
        failed = [(first + index, -error) for index, error in enumerate(errors) if error]
        if failed:
            self._unmap_foreign(where, pages)
            gfn, number = failed[0]
            raise self._error("xenforeignmemory_map", number, f"{what}: {len(failed)} not mapped, first gfn {gfn:#x}")
        return pages, ffi.cast("char *", where)

    def _unmap_foreign(self, where: Any, pages: int) -> None:
        ffi.errno = 0
        if self._memory.xenforeignmemory_unmap(self._lib.xc_interface_fmem_handle(self._handle), where, pages):
            raise self._error("xenforeignmemory_unmap", ffi.errno, f"{pages} pages")

    def _call(self, name: str, what: str, *arguments: object, hint: str = "", refusals: tuple[int, ...] = ()) -> int:
        """Call libxenctrl and return its result, which is negative only for an errno in ``refusals``."""
        ffi.errno = 0
        rc: int = getattr(self._lib, name)(self._handle, *arguments)
        if rc >= 0:
            return rc
        number = ffi.errno or -rc  # for a domain that it does not find, libxc returns -EINVAL and sets no errno
        if number in refusals:
            return rc
        if number == errno.EACCES:
            raise XenError(
                f"{name}: EACCES: {what}: {self._soname} does not match the Xen {self._version} that is running",
                hint="install both from the same build and reboot; with XSM, its policy can be the reason, too",
            )
        raise self._error(name, number, what, hint=hint)

    def _error(self, name: str, number: int, what: str, *, hint: str = "") -> XenError:
        code = errno.errorcode.get(number, str(number))
        return XenError(f"{name}: {code} ({os.strerror(number)}): {what}", hint=hint or HINTS.get(number, ""))


def hypervisor(root: str = "/") -> str:
    """Return the kind of hypervisor that Linux runs on, ``xen`` among them; ``missing`` if it knows none."""
    try:
        return _read(os.path.join(root, "sys/hypervisor"), "type")
    except FileNotFoundError:
        return "missing"


def dom0_kind(root: str = "/") -> str:
    """Return the kind of this domain as Linux names it, such as ``PV``; empty when it does not say."""
    try:
        return _read(os.path.join(root, "sys/hypervisor"), "guest_type")
    except OSError:
        return ""


def running_version(root: str = "/") -> str:
    """Return MAJOR.MINOR of the running hypervisor.

    :raises XenError: when there is none, or it is older than 4.17.
    """
    folder, kind = os.path.join(root, "sys/hypervisor"), hypervisor(root)
    if kind != "xen":
        raise XenError(
            f"not running on Xen: {folder}/type is {kind}", hint="boot this machine into Xen and run it in dom0"
        )
    major, minor = _read(folder, "version/major"), _read(folder, "version/minor")
    if (int(major), int(minor)) < OLDEST:
        raise XenError(f"Xen {major}.{minor} is too old", hint="Xen 4.17 or newer is needed")
    return f"{major}.{minor}"


def installed_versions(root: str = "/") -> list[str]:
    """Return the sorted Xen versions of the libxenctrl libraries in the host's usual folders."""
    import glob  # here because only errors need it and it loads slowly

    prefix = "libxenctrl.so."
    names = [
        os.path.basename(path)
        for folder in LIBRARY_FOLDERS
        for path in glob.glob(os.path.join(glob.escape(root), "usr", folder, prefix + "*"))
    ]
    return sorted({".".join(name.removeprefix(prefix).split(".")[:2]) for name in names})


def _read(folder: str, name: str) -> str:
    return read(os.path.join(folder, name)).strip()
