# SPDX-License-Identifier: Apache-2.0
"""The value types that modules exchange. No I/O.

Sizes, offsets and addresses are ``int`` bytes; frame numbers (4 KiB each) have types of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NewType, Self

from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.sizes import align_up, human, whole_units

Gfn = NewType("Gfn", int)
"""Guest frame number."""
Mfn = NewType("Mfn", int)
"""Machine frame number: SPA / 4 KiB."""

Progress = Callable[[int, int], None]
"""Called now and then with the bytes done and the total."""
Watch = Callable[[str], Progress]
"""Called when long work on bytes begins, with its name; returns the callback for its progress."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE = 4 * KIB
SUPERPAGE = 2 * MIB
SIZE_STEP = 2 * MIB
"""An NVDIMM's size is a multiple of this: libvirt rounds the size of every memory device up to it for QEMU
(src/qemu/qemu_domain.c)."""
MIN_LABEL_SIZE = 128 * KIB
"""QEMU: include/hw/mem/nvdimm.h:MIN_NAMESPACE_LABEL_SIZE; also in UEFI 2.10 §13.19.2."""
MAX_NVDIMMS = 256
"""QEMU: include/hw/acpi/acpi.h:ACPI_MAX_RAM_SLOTS. Slots are numbered from 0."""
DSM = ("none", "aml", "qemu")
"""The server of the label areas of a guest's NVDIMMs: none, code in its ACPI tables, or a QEMU in dom0."""
PERSISTENCE_DOMAINS = ("", "memory_controller", "cpu_cache")
"""Weakest first (Linux: drivers/nvdimm/region_devs.c:persistence_domain_show)."""


@dataclass(frozen=True)
class NvdimmSpec:
    """One ``<memory model='nvdimm'>`` that the user asked for.

    :ivar slot: DIMM slot; the user's, or the lowest free one in document order. In the ledger, a multiple of 256 more
        while the NVDIMM is :attr:`set_aside`.
    :ivar path: absolute path of the backing file or device.
    :ivar size: bytes, including the label area, a multiple of 2 MiB (libvirt rounds up to it for QEMU).
    :ivar label_size: bytes of the label storage area, at the end of ``size``; 0 without labels.
    :ivar alignsize: ``<source><alignsize>`` in bytes, None when not given.
    :ivar base: guest-physical base address that the user fixed, or None.
    :ivar node: guest NUMA node, or None.
    :ivar pmem: True when ``<pmem/>`` was given.
    """

    slot: int
    path: str
    size: int
    label_size: int = 0
    alignsize: int | None = None
    base: int | None = None
    node: int | None = None
    pmem: bool = False

    @classmethod
    def of_size(
        cls,
        size: int,
        *,
        slot: int,
        path: str,
        label_size: int | None,
        alignsize: int | None = None,
        base: int | None = None,
        node: int | None = None,
        pmem: bool = False,
    ) -> Self:
        """Return an NVDIMM of that size, rounded up to :data:`SIZE_STEP`.

        :param size: bytes, any number.
        :param label_size: bytes; None without a label area.
        :raises ValueError: when the guest would see nothing, or the label area is too small, or as large as the NVDIMM.
        """
        if label_size is not None and not MIN_LABEL_SIZE <= label_size < max(size, 1):
            raise ValueError(
                f"its label area has {human(label_size)}; a label area has {human(MIN_LABEL_SIZE)} or more and is "
                f"smaller than the NVDIMM, which has {human(size)}"
            )
        rounded = align_up(size, SIZE_STEP)
        spec = cls(slot, path, rounded, label_size or 0, alignsize, base, node, pmem)
        if spec.visible_size == 0:
            raise ValueError(
                f"the guest would see nothing of its {human(size)}, without the label area of {human(spec.label_size)} "
                f"and rounded down to multiples of {human(alignsize or PAGE)}"
            )
        return spec

    @property
    def visible_size(self) -> int:
        """Bytes that the guest sees as persistent memory: exactly as many as QEMU shows for the same XML."""
        align = self.alignsize or PAGE
        return (self.size - self.label_size) // align * align

    @property
    def own_slot(self) -> int:
        """The slot that guests know it by."""
        return self.slot % MAX_NVDIMMS

    @property
    def set_aside(self) -> bool:
        """Return True while another NVDIMM of the domain, one of a restored guest, has its slot."""
        return self.slot != self.own_slot

    @property
    def label_gap(self) -> int:
        """Bytes of the backing between those that the guest sees and the label area."""
        return self.size - self.label_size - self.visible_size


@dataclass(frozen=True)
class DomainSpec:
    """A domain with NVDIMMs.

    :ivar uuid: lower-case text form, or None when the XML has none yet.
    :ivar ram: guest RAM in bytes.
    :ivar emulator: the user's own ``<emulator>``, or None.
    :ivar nvdimms: in slot order, at least one.
    :ivar dsm: one of :data:`DSM`, or None for the default of the host's configuration.
    :ivar cache: one of :data:`.caching.CACHES`, or None for that default.
    :ivar hap: False when it asks for shadow page tables instead of hardware assisted paging.
    :ivar unplaced: paths of the NVDIMMs whose slots the XML leaves open: they have the lowest free ones until
        :meth:`.lifecycle.define.Definitions.keep_slots`.
    :ivar pci_devices: number of the host's PCI devices that it gets.
    :ivar emulated: QEMU's names of the devices that do not reach its NVDIMMs (:mod:`.xml.direct_io`).
    :ivar hot_slots: slots of ``<maxMemory>``, into which NVDIMMs can be plugged while it runs; 0 without that element.
    :ivar plugged: path of the NVDIMM that its running guest is to get; empty for none.
    :ivar plugged_above: guest-physical address that this one begins at, or behind: its guest has nothing from there on.
    """

    name: str
    uuid: str | None
    ram: int
    emulator: str | None
    nvdimms: tuple[NvdimmSpec, ...]
    dsm: str | None = None
    unplaced: frozenset[str] = frozenset()
    pci_devices: int = 0
    emulated: tuple[str, ...] = ()
    cache: str | None = None
    hap: bool = True
    hot_slots: int = 0
    plugged: str = ""
    plugged_above: int = 0

    def with_paths(self, paths: dict[str, str]) -> Self:
        """Return the domain with other paths of its NVDIMMs, given by those that they have."""
        nvdimms = tuple(replace(spec, path=paths[spec.path]) for spec in self.nvdimms)
        unplaced = frozenset(paths[path] for path in self.unplaced)
        return replace(self, nvdimms=nvdimms, unplaced=unplaced, plugged=paths.get(self.plugged, ""))


@dataclass(frozen=True)
class Namespace:
    """A pmem namespace of the host, or a part of other persistent memory that a backing hands out.

    :ivar name: the kernel's name, ``namespace0.0``.
    :ivar mode: ``fsdax``, ``devdax``, ``raw`` or ``sector``, as in ``ndctl list``; for other memory, the name of the
        backing.
    :ivar device: name of its block or character device (``pmem0``, ``dax0.0``); empty when it has none.
    :ivar uid: identifier that survives reboots: the namespace's uuid, or ``spa-…`` when it has none.
    :ivar data_spa: SPA of the first byte of its data area, behind any info block and page structures.
    :ivar data_size: bytes of the data area.
    :ivar persistence_domain: what is flushed on power loss, as the kernel names it: ``memory_controller`` (ADR), or
        ``cpu_cache``, the caches too (eADR); empty when the platform does not say.
    """

    name: str
    mode: str
    device: str
    uid: str
    data_spa: int
    data_size: int
    numa_node: int | None = None
    persistence_domain: str = ""

    @property
    def frames(self) -> tuple[int, int]:
        """Machine frames (mfn, count) that are wholly in the data area: those that guests may get."""
        return whole_units(self.data_spa, self.data_size, PAGE)


@dataclass(frozen=True)
class Extent:
    """A part of a backing that is contiguous in the machine's memory: offset in the backing, SPA, length, in bytes."""

    offset: int
    spa: int
    length: int


@dataclass(frozen=True)
class BackingIdentity:
    """The identity of the object at a path: two equal ones are the same bytes of the same namespace.

    :ivar kind: name of the backing plug-in.
    :ivar device: uid of the namespace.
    :ivar start: offset in its data area, in bytes, of the device, or of the partition that a file is on.
    :ivar inode: inode number; 0 for a device.
    :ivar generation: inode generation (FS_IOC_GETVERSION); 0 for a device.
    :ivar size: bytes of the file or device.
    """

    kind: str
    device: str
    start: int
    inode: int
    generation: int
    size: int

    def is_same(self, other: BackingIdentity | None) -> bool:
        """Return True when both are of one file, whose size may have changed, or of one device."""
        if other is None or not (self.inode and other.inode):
            return self == other
        return self.shares_bytes(other)

    def shares_bytes(self, other: BackingIdentity) -> bool:
        """Return True when some byte belongs to both."""
        if self.device != other.device:
            return False
        if bool(self.inode) != bool(other.inode):
            return True  # a file, and the device that it is on
        if self.inode:
            return (self.start, self.inode, self.generation) == (other.start, other.inode, other.generation)
        return self.start < other.start + other.size and other.start < self.start + self.size

    def begins_as(self, other: BackingIdentity | None) -> bool:
        """Return True when both are of one file, or of devices with the same first byte: what a guest reads is there.

        A partition that was moved has bytes in common with what it was, and none where the guest looks for it.
        """
        if other is None:
            return False
        if self.inode or other.inode:
            return self.is_same(other)
        return (self.device, self.start) == (other.device, other.start)

    def covers(self, other: BackingIdentity) -> bool:
        """Return True when all bytes of the other belong to this one, as far as can be told: the same file or device,
        or a device that the other is a part of.
        """
        if self.inode or other.inode:
            return self.is_same(other)
        within = self.start <= other.start and other.start + other.size <= self.start + self.size
        return self.device == other.device and within


@dataclass(frozen=True)
class Location:
    """The location of a backing: its identity and its extents, in order of offset, from 0 without gaps."""

    identity: BackingIdentity
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class Pool:
    """A pool of pmem for guests, from the operator's configuration.

    :ivar kind: name of the backing plug-in.
    :ivar paths: a folder of a DAX file system, or devices.
    :ivar quota: bytes of it that domains may have; None for all.
    :ivar alignsize: the size of each of its NVDIMMs is a multiple of it, bytes.
    :ivar label_size: bytes of the label area of new NVDIMMs when none is asked for; 0 for none.
    :ivar wipe_on_release: True when a domain's bytes are overwritten with zeros on release.
    """

    name: str
    kind: str
    paths: tuple[str, ...]
    quota: int | None
    alignsize: int
    label_size: int
    wipe_on_release: bool


@dataclass(frozen=True)
class Space:
    """The room in a pool, in bytes, regardless of its quota.

    :ivar capacity: all of it.
    :ivar free: free bytes for new NVDIMMs.
    :ivar largest_free: longest free run: the largest new NVDIMM with a single extent.
    :ivar alignment: alignment of its first byte in the machine's memory, a power of two; 2 MiB or more is good.
    :ivar namespaces: namespaces that it is on.
    """

    capacity: int
    free: int
    largest_free: int
    alignment: int
    namespaces: tuple[Namespace, ...]


@dataclass(frozen=True)
class Surveyed:
    """A file in a pool, or a device, which is immutable and never frozen.

    :ivar path: without symbolic links.
    :ivar owner: the owner recorded on it (:mod:`.state.owner_marks`); None without one.
    :ivar frozen: True when it has been frozen for a guest.
    :ivar unflagged: True when it has been frozen, and lost its flag: somebody may have written it since.
    :ivar doubtful: True when a guest may have written to it that does not have it: its file shared blocks with this.
    :ivar immutable: True when nothing in the host can change where its bytes are.
    :ivar error: why the file cannot be read; then nothing else is known of it. None when it can.
    :ivar identity: of the file; None when it is not known.
    :ivar run: number of the :class:`Run` that it has been frozen for; None when it is not known.
    """

    path: str
    owner: bytes | None
    frozen: bool
    immutable: bool
    error: NvdimmError | None = None
    identity: BackingIdentity | None = None
    run: int | None = None
    unflagged: bool = False
    doubtful: bool = False

    @property
    def is_device(self) -> bool:
        """Return True for a device, whose mark is not on itself."""
        return self.identity is not None and not self.identity.inode


@dataclass(frozen=True)
class Intake:
    """The work that provisioning a backing will do; nothing has been done yet.

    :ivar creates: True when the file does not exist (or is empty) and will be created.
    :ivar writes: bytes of zeros that will be written.
    :ivar namespace: the namespace that the backing is on.
    """

    kind: str
    creates: bool
    writes: int
    namespace: Namespace

    @property
    def assumed(self) -> bool:
        """Return True when the backing's extents are known only after provisioning."""
        return self.creates or self.writes > 0


class Mapping(NamedTuple):
    """A mapping of the machine's frames ``mfn … mfn+frames-1`` at ``gfn …`` in the guest."""

    gfn: Gfn
    mfn: Mfn
    frames: int


@dataclass(frozen=True)
class Placement:
    """The place of an NVDIMM in the guest's physical address space.

    :ivar handle: NFIT device handle, as QEMU assigns it: slot + 1.
    :ivar base: guest-physical address of its first byte.
    :ivar size: visible bytes.
    :ivar label_gap: bytes of the backing between the visible ones and the label area.
    :ivar label_at: guest-physical address of the label area, if that is not as far behind the data as in the backing.
    """

    slot: int
    base: int
    size: int
    label_size: int = 0
    node: int | None = None
    label_gap: int = 0
    label_at: int | None = None

    @property
    def handle(self) -> int:
        return self.slot + 1

    @property
    def end(self) -> int:
        return self.base + self.size

    @property
    def label_base(self) -> int:
        """Guest-physical address of the label area, when it is mapped into the guest."""
        return self.end + self.label_gap if self.label_at is None else self.label_at

    @property
    def label_pages(self) -> tuple[int, int]:
        """Guest-physical addresses of the first page of the label area, and behind its last one."""
        return self.label_base // PAGE * PAGE, align_up(self.label_base + self.label_size, PAGE)

    @property
    def space_end(self) -> int:
        """Address behind the data and a label area as far behind it as in the backing; a multiple of 4 KiB."""
        return self.end + self.label_gap + self.label_size if self.label_size else self.end


@dataclass(frozen=True)
class GuestLayout:
    """The parts of a guest's physical address space that matter to its NVDIMMs.

    :ivar ram: bytes of RAM.
    :ivar highmem_end: address behind the RAM above 4 GiB (4 GiB when there is none).
    :ivar limit: first address that the guest cannot use.
    :ivar nvdimms: in slot order.
    :ivar dsm: server of the guest's label areas, one of :data:`DSM`.
    :ivar persistence_domain: the weakest of the namespaces that its NVDIMMs are on.
    :ivar hot_slots: number of slots into which NVDIMMs can be plugged while it runs; 0 if none can.
    """

    ram: int
    highmem_end: int
    limit: int
    nvdimms: tuple[Placement, ...]
    dsm: str = "none"
    persistence_domain: str = "memory_controller"
    hot_slots: int = 0

    @property
    def slots(self) -> range:
        """The slots that can change while the guest runs: those of its NVDIMMs are among them. Empty if none can."""
        return range(max(self.hot_slots, *(each.slot + 1 for each in self.nvdimms), 0)) if self.hot_slots else range(0)

    @property
    def label_areas(self) -> tuple[Placement, ...]:
        """NVDIMMs whose label areas are in the guest's memory."""
        return self._served_by("aml")

    @property
    def label_clients(self) -> tuple[Placement, ...]:
        """NVDIMMs whose label areas a label server has."""
        return self._served_by("qemu")

    def _served_by(self, dsm: str) -> tuple[Placement, ...]:
        return tuple(each for each in self.nvdimms if each.label_size) if self.dsm == dsm else ()


@dataclass(frozen=True)
class AcpiTables:
    """ACPI tables for a guest's firmware, each whole and with a correct checksum.

    :ivar tables: in the order in which the guest gets them.
    :ivar reference: every other table that came with them, only to be shown (``acpi dump --all``).
    :ivar seconds: time that a QEMU took to produce them; None without a QEMU.
    """

    tables: tuple[bytes, ...]
    reference: tuple[bytes, ...] = ()
    seconds: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Plan:
    """The plan of all that a define and a start of a domain would do.

    :ivar intakes: the work left for provisioning, in slot order.
    :ivar locations: in slot order; for a backing that does not exist yet, the best case.
    :ivar mappings: of all NVDIMMs.
    :ivar areas: areas of the domain's backings, as (first MFN, frames); every mapping lies in one.
    :ivar bad_blocks: in slot order, the known bad ranges of each backing, as (offset in it, bytes).
    :ivar misplaced_labels: in slot order, why the guest would find no namespaces on an NVDIMM with labels, or nothing.
    :ivar cache: what is asked for, one of :data:`.caching.CACHES`.
    :ivar cache_fault: why the guest cannot have write-back; empty when it can.
    """

    domain: DomainSpec
    intakes: tuple[Intake, ...]
    locations: tuple[Location, ...]
    layout: GuestLayout
    mappings: tuple[Mapping, ...]
    areas: tuple[tuple[int, int], ...]
    tables: AcpiTables
    bad_blocks: tuple[tuple[tuple[int, int], ...], ...] = ()
    misplaced_labels: tuple[str, ...] = ()
    cache: str = "auto"
    cache_fault: str = ""


@dataclass(frozen=True)
class Allocation:
    """The ledger's record of one NVDIMM of a domain.

    :ivar identity: None until it is provisioned.
    :ivar base: guest-physical base, chosen once; None until it is provisioned.
    :ivar written: percent written so far, while it is being provisioned.
    :ivar changed: as in :class:`Record`, when the domain got it as it is.
    :ivar wipes: True when its pool had ``wipe_on_release``, last time that it was found in a pool.
    :ivar pool: of a device, the name of the pool that the domain got it from: a boot can give it a name that is in
        another pool. Empty while that is not known.
    :ivar overwritten: True when a release has overwritten it, and no define or start of it has come since.
    :ivar deleted: True when a release has begun to delete it and not failed to, and no define or start of it has come
        since.
    :ivar renamed_from: of a device that a boot has given the name of another one: the name that it had, which libvirt's
        definition still has for it; else empty.
    :ivar doubtful: of a device that had another one's name in a ledger from elsewhere, or another name before a
        boot: True until the operator has said which one the domain has.
    """

    uuid: str
    spec: NvdimmSpec
    identity: BackingIdentity | None = None
    base: int | None = None
    written: int = 0
    changed: int = field(default=0, compare=False, repr=False)
    wipes: bool = field(default=False, compare=False, repr=False)
    overwritten: bool = field(default=False, compare=False, repr=False)
    renamed_from: str = field(default="", compare=False, repr=False)
    pool: str = field(default="", compare=False, repr=False)
    doubtful: bool = field(default=False, compare=False, repr=False)
    deleted: bool = field(default=False, compare=False, repr=False)

    @property
    def ready(self) -> bool:
        return self.identity is not None

    @property
    def placement(self) -> Placement:
        return Placement(
            slot=self.spec.slot,
            base=self.base or 0,
            size=self.spec.visible_size,
            label_size=self.spec.label_size,
            node=self.spec.node,
            label_gap=self.spec.label_gap,
        )


class Touch(NamedTuple):
    """A change of the time at which a backing was last written, for what its guest has written.

    All times are as the backing's ``written_at`` returns them.

    :ivar before: the backing's time when its guest had ended, while nobody could write it, or several if it is not
        known which of these it has; empty if nothing is known. With another time, it has been written since.
    :ivar after: its new time.
    """

    before: tuple[int, ...]
    after: int


class Run(NamedTuple):
    """A run of a guest, from a start or a restore to its end, as a saved guest must find it again.

    :ivar number: OEM revision of the NFIT in the guest's memory; 0 when no guest may go on after this run, because
        something else has written to its NVDIMMs since.
    :ivar nvdimms: what the guest has: :func:`.lifecycle.saved_guest.describe`.
    :ivar written: when its backings were last written by the host: :func:`.lifecycle.saved_guest.times`. After its end,
        of a backing that may not have got its new time yet, both, and the new one is the last
        (:func:`.lifecycle.saved_guest.times_at_end`).
    """

    number: int
    nvdimms: str
    written: str


@dataclass(frozen=True)
class Start:
    """A start of a domain, from the first preparation until all of it is undone.

    :ivar state: ``preparing``, ``prepared``, ``mapping`` or ``mapped``.
    :ivar domid: None until the device model has run.
    :ivar boot_id: boot ID of the host at the start.
    :ivar since: when the state was entered, in seconds since the host's boot.
    :ivar paths: backings frozen for it.
    :ivar served: :attr:`Record.labels` of the domain when it was started, if it has a label server, else empty.
    :ivar id: a random one, which no other start has; empty for one that version 0.1.0 has begun.
    :ivar ended: True once it is known to be over: nothing can follow but its end.
    :ivar cache: whether the guest's NVDIMMs are cached, ``write-back`` or ``uncached``, and before they are mapped what
        is asked for, one of :data:`.caching.CACHES`; empty if it is not known.
    :ivar hot_slots: number of its guest's slots for hot-plug; 0 without any.
    """

    uuid: str
    state: str
    domid: int | None
    boot_id: str
    since: int
    paths: tuple[str, ...]
    served: str = ""
    id: str = ""
    ended: bool = False
    cache: str = ""
    hot_slots: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """Values that another start of the domain does not have, nor this one after its next step."""
        return self.uuid, self.id, self.state


@dataclass(frozen=True)
class Record:
    """A domain in the ledger.

    :ivar dsm: as in :class:`DomainSpec`.
    :ivar cache: as in :class:`DomainSpec`.
    :ivar hot_slots: as in :class:`DomainSpec`.
    :ivar fault: error of its last start; empty when that did not fail.
    :ivar intents: what a define wants for it, while that is under way or after it was killed.
    :ivar changed: when its allocations were last changed, nanoseconds since 1970; 0 before a version that notes it. It
        grows with each change, whatever the host's clock does. A mark with a later time shows that this ledger, from a
        backup, is older.
    """

    uuid: str
    name: str
    ram: int
    dsm: str | None
    fault: str
    allocations: tuple[Allocation, ...]
    start: Start | None
    intents: tuple[Allocation, ...] = ()
    changed: int = field(default=0, compare=False, repr=False)
    cache: str | None = None
    hot_slots: int = 0

    def as_spec(self, nvdimms: tuple[NvdimmSpec, ...]) -> DomainSpec:
        """Return the domain with these NVDIMMs."""
        more = (self.name, self.uuid, self.ram, None, nvdimms, self.dsm)
        return DomainSpec(*more, cache=self.cache, hot_slots=self.hot_slots)

    @property
    def claims(self) -> tuple[Allocation, ...]:
        """Its NVDIMMs, and what a define wants for it: no other domain can have these. At one path, the larger size."""
        found = {item.spec.path: item for item in self.allocations}
        for item in self.intents:
            known = found.setdefault(item.spec.path, item)
            if known.spec.size < item.spec.size:
                found[item.spec.path] = replace(known, spec=replace(known.spec, size=item.spec.size))
        return tuple(found.values())

    @property
    def started(self) -> tuple[Allocation, ...]:
        """The NVDIMMs that its start has, as they are defined now; those that one would have while it has no start."""
        if self.start is None:
            return tuple(item for item in self.allocations if not item.spec.set_aside)
        return tuple(item for item in self.allocations if item.spec.path in self.start.paths)

    @property
    def labels(self) -> str:
        """Hash of the label areas of :attr:`started`: equal when two records have the same ones."""
        return hashlib.sha256(repr([item for item in self.started if item.spec.label_size]).encode()).hexdigest()

    @property
    def can_be_served(self) -> bool:
        """Return True when a new label server could serve the guest: its label areas are as at its start."""
        return self.start is not None and self.start.served == self.labels
