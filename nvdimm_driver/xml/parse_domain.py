# SPDX-License-Identifier: Apache-2.0
"""Parser of domain XML with NVDIMMs: from the user's text to a :class:`.model.DomainSpec`. Pure.

In ``<metadata>``, a user can override an option of the host for one domain::

    <nvdimm:options xmlns:nvdimm="urn:nvdimm-driver:options:1" dsm="aml" cache="auto"/>
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

from nvdimm_driver import caching
from nvdimm_driver.errors import DomainXmlError, UnsupportedError
from nvdimm_driver.model import DSM, GIB, KIB, MAX_NVDIMMS, PAGE, DomainSpec, NvdimmSpec
from nvdimm_driver.xml import direct_io
from nvdimm_driver.xml.document import Element, Text, may_have, parse
from nvdimm_driver.xml.nvdimm_element import check_known
from nvdimm_driver.xml.values import integer, scale, scaled

LOG = logging.getLogger(__name__)

XEN_ARGUMENTS = "http://libvirt.org/schemas/domain/xen/1.0"
"""The namespace of ``<commandline>``, which has arguments for QEMU."""
OPTIONS = "urn:nvdimm-driver:options:1"
"""The namespace of the options that a user may put into ``<metadata>``."""
_UUID_DIGITS = re.compile("[0-9A-Fa-f]{32}")
_OPTIONS = {"dsm": DSM, "cache": caching.CACHES}
"""The attributes of its element, with their values."""


def extract(xml: str, *, stored: bool = False) -> DomainSpec | None:
    """Return the domain and its NVDIMMs, from domain XML as the user wrote it.

    Rewritten XML has its NVDIMMs in the metadata: restore it first (:mod:`.rewrite`).

    :param stored: libvirt has stored it: an unknown part of an NVDIMM, which an earlier version let through and which
        never meant anything, is no error. Nor is an unknown option, which nobody can correct in the image of a guest:
        the guest has the host's option instead, and is uncached, which is always right.
    :returns: None when it has no NVDIMMs or is not a domain of type ``xen``.
    :raises DomainXmlError: when the XML cannot be parsed or has an invalid value.
    :raises UnsupportedError: when it asks for something that Xen or this driver cannot do.
    """
    text = parse_xen(xml, "nvdimm")
    return spec_of(text.root, stored=stored) if text is not None and nvdimm_elements(text.root) else None


def has_nvdimms(xml: str) -> bool:
    """Return True for the XML of a domain of type ``xen`` that has NVDIMMs, whatever is wrong with them.

    :raises DomainXmlError: when the XML cannot be parsed.
    """
    text = parse_xen(xml, "nvdimm")
    return text is not None and bool(nvdimm_elements(text.root))


class DefinedMemory(NamedTuple):
    """The memory of a definition with NVDIMMs.

    :ivar ram: bytes.
    :ivar paths: of its NVDIMMs, as they are written.
    :ivar current: bytes of ``<currentMemory>``.
    :ivar has_cells: it has NUMA cells, which say how much RAM it has.
    """

    ram: int
    paths: tuple[str, ...]
    current: int
    has_cells: bool


def memory_of(xml: str) -> DefinedMemory | None:
    """Return the memory of a domain with NVDIMMs, whatever else is wrong with them; None when it has none.

    Between a change of the RAM and one of ``<currentMemory>``, the definition cannot be started.

    :raises DomainXmlError: when the XML cannot be parsed, or has no RAM.
    """
    text = parse_xen(xml, "nvdimm")
    nvdimms = [] if text is None else nvdimm_elements(text.root)
    if text is None or not nvdimms:
        return None
    ram, current = ram_of(text.root), text.root.child("currentMemory")
    return DefinedMemory(
        ram,
        tuple(map(path_of, nvdimms)),
        ram if current is None else scaled(current, "<currentMemory>"),
        bool(_cells(text.root)),
    )


def why_none(xml: str) -> str:
    """Return why :func:`extract` finds no NVDIMMs in XML."""
    root = parse(xml).root
    kind = root.attributes.get("type")
    if root.tag != "domain":
        return f"its root element is <{root.tag}>, and not <domain>"
    if kind != "xen":
        return f"it {f'is of type {kind!r}' if kind else 'has no type'}: write <domain type='xen'>"
    return "it has no <memory model='nvdimm'> in <devices>"


def emulator_of(root: Element) -> str | None:
    """Return the path of the device model that a domain names; None when it names none."""
    devices = root.child("devices")
    emulator = None if devices is None else devices.child("emulator")
    return None if emulator is None else emulator.text.strip() or None


def is_xen(root: Element) -> bool:
    """Return True for a domain of type ``xen``."""
    return root.tag == "domain" and root.attributes.get("type") == "xen"


def nvdimm_elements(root: Element) -> list[Element]:
    """Return the elements of a domain's NVDIMMs, in document order."""
    devices = root.child("devices")
    children = [] if devices is None else devices.children
    return [child for child in children if child.tag == "memory" and child.attributes.get("model") == "nvdimm"]


def ram_of(root: Element) -> int:
    """Return guest RAM in bytes: of the NUMA cells, as libvirt does (virDomainDefPostParseMemory), else ``<memory>``.

    :raises DomainXmlError: when it has none.
    """
    memory, cells = root.child("memory"), _cells(root)
    if cells:
        what = "the memory attribute of a <cpu><numa><cell>"
        parts = [scale(cell.attributes.get("memory", ""), cell.attributes.get("unit", ""), what) for cell in cells]
    else:
        parts = [] if memory is None else [scaled(memory, "<memory>")]
    if not sum(parts):
        raise DomainXmlError(
            "the domain has no RAM: <memory> is missing or 0, and there are no <cpu><numa><cell> elements with memory",
            hint="write <memory unit='GiB'>…</memory>",
        )
    return sum(parts)


def check_started_ram(root: Element) -> None:
    """Check that libvirt starts a rewritten domain with the RAM that it has by its NUMA cells.

    Once ``virsh setmaxmem`` has changed ``<memory>``, libvirt gives libxl that.

    :param root: of the XML as libvirt has it: in what was rewritten, ``<memory>`` is the RAM.
    :raises UnsupportedError: when it does not.
    """
    memory, ram = root.child("memory"), ram_of(root)
    if memory is not None and (total := scaled(memory, "<memory>")) != ram:
        raise UnsupportedError(
            f"<memory> is {total // KIB} KiB, and the NUMA cells have {ram // KIB} KiB together: the guest would start "
            "with other RAM than planned",
            hint=f"'virsh setmaxmem DOMAIN {ram // KIB} --config' makes them the same; to change the RAM, change the "
            "cells: virsh edit",
        )


def hot_slots(root: Element, *, stored: bool = False) -> int:
    """Return the slots of ``<maxMemory>``; 0 without it.

    :param stored: libvirt has stored it: an earlier version ignored the number, and what is wrong with it is no error.
    :raises DomainXmlError: when it is no number from 1 to 256.
    """
    limit = root.child("maxMemory")
    if limit is None:
        return 0
    try:
        count = integer(limit.attributes.get("slots", ""), "slots of <maxMemory>", limit=MAX_NVDIMMS)
        if not count:
            raise DomainXmlError("slots of <maxMemory> is 0", hint=f"write a number from 1 to {MAX_NVDIMMS}")
    except DomainXmlError:
        if not stored:
            raise
        return 0
    return count


def uuid_of(root: Element) -> str | None:
    """Return the uuid of a domain in lower case; None when it has none.

    libvirt takes hyphens and blanks anywhere in it (src/util/viruuid.c:virUUIDParse).

    :raises DomainXmlError: when it is not a UUID.
    """
    element = root.child("uuid")
    if element is None:
        return None
    digits = element.text.strip().replace("-", "").replace(" ", "")
    if not _UUID_DIGITS.fullmatch(digits):
        raise DomainXmlError(f"<uuid> is {element.text!r}, which is not a UUID", hint="write 32 hexadecimal digits")
    return str(UUID(digits))


def parse_xen(xml: str, word: str) -> Text | None:
    """Parse the XML of a domain of type ``xen``; return None for other XML, and for XML without the word."""
    if not may_have(xml, word):
        return None
    text = parse(xml)
    return text if is_xen(text.root) else None


def spec_of(root: Element, *, stored: bool = False) -> DomainSpec:
    """Return the domain of a parsed domain XML; raise what :func:`extract` raises."""
    name = root.need("name").text
    _check_hvm(root)
    ram = ram_of(root)
    _check_current_memory(root, ram)
    _check_other_memory(root)
    elements = nvdimm_elements(root)
    if len(elements) > MAX_NVDIMMS:
        raise UnsupportedError(
            f"domain {name} has {len(elements)} NVDIMMs; a guest can have at most {MAX_NVDIMMS}",
            hint="use fewer and larger NVDIMMs",
        )
    nodes = max(1, len(_cells(root)))
    slots = _slots(elements)
    specs = [_nvdimm(element, slot, nodes, root) for element, slot in zip(elements, slots, strict=True)]
    for element in () if stored else elements:
        check_known(element, f"NVDIMM {path_of(element)}: ")
        _check_alias(element, root)
    _check_paths(specs)
    root.need("devices")
    options = _options(root, stored=stored)
    return DomainSpec(
        name=name,
        uuid=uuid_of(root),
        ram=ram,
        emulator=emulator_of(root),
        nvdimms=tuple(sorted(specs, key=lambda spec: spec.slot)),
        dsm=options.get("dsm"),
        cache=options.get("cache"),
        hap=_hap(root),
        hot_slots=hot_slots(root, stored=stored),
        unplaced=frozenset(path_of(element) for element in elements if element.child("address") is None),
        pci_devices=_pci_devices(root),
        emulated=_emulated(root),
    )


def _check_alias(element: Element, root: Element) -> None:
    """Check that no other device of a domain has the alias of an NVDIMM; raise DomainXmlError if one has."""
    aliases = [alias.attributes.get("name") for each in root.need("devices").children if (alias := each.child("alias"))]
    name = alias.attributes.get("name") if (alias := element.child("alias")) else None
    if name and aliases.count(name) > 1:
        raise DomainXmlError(
            f"NVDIMM {path_of(element)}: another device has <alias name={name!r}>, too", hint="give each its own alias"
        )


def _pci_devices(root: Element) -> int:
    """Return how many PCI devices of the host the domain names, also as network interfaces."""
    kinds = [(child.tag, child.attributes.get("type")) for child in root.need("devices").children]
    return kinds.count(("hostdev", "pci")) + kinds.count(("interface", "hostdev"))


def _emulated(root: Element) -> tuple[str, ...]:
    """Return QEMU's names of the devices that do not reach the NVDIMMs: those of disks, and those in its arguments."""
    disks = [disk for disk in root.need("devices").children if disk.tag == "disk"]
    kinds = {
        (target.attributes.get("dev", "")[:2], disk.attributes.get("device"))
        for disk in disks
        if (target := disk.child("target"))
    }
    names = {direct_io.DISKS[prefix] for prefix, device in kinds - {direct_io.IDE_CDROM} if prefix in direct_io.DISKS}
    given = [element for element in root.children if _in_namespace(element, (root,), XEN_ARGUMENTS)]
    arguments = [each.attributes.get("value", "") for element in given for each in element.children]
    return (*sorted(names), *direct_io.devices(arguments))


def _hap(root: Element) -> bool:
    features = root.child("features")
    hap = features.child("hap") if features else None
    return hap is None or hap.attributes.get("state") != "off"


def _options(root: Element, *, stored: bool) -> dict[str, str]:
    """Return the driver's options for a domain that its metadata give."""
    metadata = root.child("metadata")
    children = [] if metadata is None else metadata.children
    found = [child for child in children if _in_namespace(child, (metadata, root), OPTIONS)]
    if not found:
        return {}
    given = {name: value for name, value in found[0].attributes.items() if not name.startswith("xmlns")}
    try:
        _check_options(found, given)
    except DomainXmlError as error:
        if not stored:
            raise
        LOG.warning("%s; what is unknown in it is ignored, and the guest is uncached", error)
        known = {option: value for option, value in given.items() if value in _OPTIONS.get(option, ())}
        return known | {"cache": caching.UNCACHED}
    return given


def is_options(element: Element) -> bool:
    """Return True for an element that has the driver's options once it is in ``<metadata>``."""
    return _in_namespace(element, (), OPTIONS)


def _check_options(found: Sequence[Element], given: Mapping[str, str]) -> None:
    """Check the elements in the namespace of the options, and the attributes of the first.

    :raises DomainXmlError: when there is more than one, or something else in it than known options.
    """
    name = found[0].tag.rpartition(":")[2]
    unknown = [each for each in given if each not in _OPTIONS]
    if len(found) > 1 or name != "options" or unknown or found[0].children:
        raise DomainXmlError(
            f"<metadata> has {', '.join(f'<{each.tag}>' for each in found)} in the namespace {OPTIONS}, "
            f"unknown attributes: {', '.join(unknown) or 'none'}",
            hint=f"write one empty element <options> with the attributes {' and '.join(_OPTIONS)}, or one of them",
        )
    for option, value in given.items():
        if value not in _OPTIONS[option]:
            raise DomainXmlError(
                f"<{found[0].tag} {option}={value!r}> in <metadata>",
                hint=f"{option} is one of {', '.join(_OPTIONS[option])}",
            )


def _in_namespace(element: Element, ancestors: Sequence[Element | None], uri: str) -> bool:
    prefix, colon, _ = element.tag.rpartition(":")
    declaration = f"xmlns:{prefix}" if colon else "xmlns"
    declared = [
        each.attributes[declaration] for each in (element, *ancestors) if each and declaration in each.attributes
    ]
    return declared[:1] == [uri]


def _check_hvm(root: Element) -> None:
    os_element = root.child("os")
    kind = None if os_element is None else os_element.child("type")
    guest, machine = ("", "") if kind is None else (kind.text.strip(), kind.attributes.get("machine", ""))
    if guest != "hvm" or machine in ("xenpv", "xenpvh"):
        raise UnsupportedError(
            f"an NVDIMM needs an HVM guest, and <os><type machine={machine!r}> is {guest!r}: hvmloader, the firmware "
            "that takes the NVDIMM's ACPI tables, runs only in HVM guests",
            hint="write <type arch='x86_64' machine='xenfv'>hvm</type>, or remove the NVDIMMs",
        )


def _cells(root: Element) -> list[Element]:
    cpu = root.child("cpu")
    numa = None if cpu is None else cpu.child("numa")
    return [] if numa is None else [child for child in numa.children if child.tag == "cell"]


def _check_current_memory(root: Element, ram: int) -> None:
    element = root.child("currentMemory")
    current = 0 if element is None else scaled(element, "<currentMemory>")
    if 0 < current < ram:  # 0 means that none is given (virDomainDefPostParseMemory)
        raise UnsupportedError(
            f"<currentMemory> is {current // KIB} KiB and the guest's RAM {ram // KIB} KiB: such a guest starts with "
            "memory populated on demand, which Xen does not combine with mapped frames",
            hint=f"set <currentMemory> to {ram // KIB} KiB or leave it out; after 'virsh setmaxmem --config', 'virsh "
            f"setmem DOMAIN {ram // KIB} --config' does that",
        )


def path_of(nvdimm: Element) -> str:
    """Return the path of an NVDIMM's backing; empty when it has none."""
    source = nvdimm.child("source")
    return "" if source is None else source.text_of("path")


def _check_other_memory(root: Element) -> None:
    for element in root.need("devices").children:
        check_memory_device(element)


def check_memory_device(element: Element) -> None:
    """Check that a device is no other memory device than an NVDIMM; raise UnsupportedError if it is."""
    model = element.attributes.get("model")
    if element.tag == "memory" and model != "nvdimm":
        what = "<memory> without a model" if model is None else f"<memory model={model!r}>"
        raise UnsupportedError(
            f"{what} in <devices>: on Xen, NVDIMMs are the only memory devices",
            hint="remove it; to give the guest more RAM, change <memory> of the domain",
        )


def _nvdimm(element: Element, slot: int, nodes: int, root: Element) -> NvdimmSpec:
    source, target = element.child("source"), element.child("target")
    path = path_of(element)
    where = f"NVDIMM {path or f'in slot {slot}'}: "
    if source is None or not posixpath.isabs(path):
        raise DomainXmlError(
            f"{where}<source><path> is {path!r}, which is not an absolute path",
            hint="give the absolute path of the backing file or device, such as /mnt/pmem0/db1.img",
        )
    if target is None or target.child("size") is None:
        raise DomainXmlError(
            f"{where}<target><size> is missing", hint="write <target><size unit='GiB'>…</size></target>"
        )
    _check_supported(element, target, where)
    number = target.child("node")
    node = None if number is None else integer(number.text, f"{where}<node>", limit=nodes - 1)
    _check_not_private(root, element, node or 0, where)

    size = scaled(target.need("size"), f"{where}<target><size>")
    label = target.child("label")
    try:
        return NvdimmSpec.of_size(
            size,
            slot=slot,
            path=path,
            label_size=None if label is None else scaled(label.need("size"), f"{where}<label><size>"),
            alignsize=_alignsize(source, where),
            base=_base(element, where),
            node=node,
            pmem=source.child("pmem") is not None,
        )
    except ValueError as error:
        raise DomainXmlError(
            f"{where}{error}", hint="change its <target><size>, <label><size> or <source><alignsize>"
        ) from error


def _check_supported(element: Element, target: Element, where: str) -> None:
    access, discard = element.attributes.get("access", "shared"), element.attributes.get("discard", "no")
    if access not in ("shared", "private"):
        raise DomainXmlError(f"{where}access is {access!r}", hint="write access='shared'")
    if discard not in ("yes", "no"):
        raise DomainXmlError(f"{where}discard is {discard!r}", hint="leave discard out")
    if discard == "yes":
        raise UnsupportedError(
            f"{where}discard='yes' is not supported: the driver never discards data in persistent memory",
            hint="leave discard out",
        )
    if target.child("readonly") is not None:
        raise UnsupportedError(
            f"{where}<readonly/> is not supported on Xen: XEN_DOMCTL_memory_mapping has no read-only form",
            hint="remove <readonly/>; if the guest must not write to the backing, give it a copy",
        )
    if element.child("uuid") is not None:
        raise UnsupportedError(
            f"{where}<uuid> is for NVDIMMs of pSeries guests, which Xen does not have", hint="remove <uuid>"
        )


def _check_not_private(root: Element, element: Element, node: int, where: str) -> None:
    asking = _asking_for_private(root, element, node)
    if asking is not None:
        raise UnsupportedError(
            f"{where}{asking} is not supported on Xen: a mapping of machine frames is always shared",
            hint="write access='shared' in the NVDIMM's <memory>; to keep the backing unchanged, give the guest a copy "
            "of it",
        )


def _asking_for_private(root: Element, element: Element, node: int) -> str | None:
    """Return what makes an NVDIMM private: itself, else the cell of its node, else the domain; None when nothing does.

    The first of these that says anything counts (src/qemu/qemu_command.c:qemuBuildMemoryBackendProps).
    """
    cell, backing = _cell(root, node), root.child("memoryBacking")
    access = None if backing is None else backing.child("access")
    wishes = {
        "access='private'": element.attributes.get("access"),
        "memAccess='private' of its <cpu><numa><cell>": None if cell is None else cell.attributes.get("memAccess"),
        "<memoryBacking><access mode='private'/>": None if access is None else access.attributes.get("mode"),
    }
    what, wish = next(((what, wish) for what, wish in wishes.items() if wish is not None), ("", None))
    return what if wish == "private" else None


def _cell(root: Element, node: int) -> Element | None:
    """Return the NUMA cell of a node; None when there is none."""
    for position, cell in enumerate(_cells(root)):
        if integer(cell.attributes.get("id", str(position)), "the id of a <cpu><numa><cell>") == node:
            return cell
    return None


def _alignsize(source: Element, where: str) -> int | None:
    element = source.child("alignsize")
    if element is None:
        return None
    align = scaled(element, f"{where}<alignsize>")
    if align < PAGE or align & (align - 1):
        raise DomainXmlError(
            f"{where}<alignsize> is {align // KIB} KiB; it must be a power of two and at least {PAGE // KIB} KiB",
            hint="write <alignsize unit='MiB'>2</alignsize>, or leave it out",
        )
    return align


def _base(element: Element, where: str) -> int | None:
    address = element.child("address")
    text = None if address is None else address.attributes.get("base")
    base = 0 if text is None else integer(text, f"{where}the base in <address>", base=16)
    if base and (base % PAGE or base < 4 * GIB):
        raise DomainXmlError(
            f"{where}the base in <address> is {base:#x}; it must be a multiple of {PAGE:#x} and at least {4 * GIB:#x}",
            hint="leave base out to have one chosen",
        )
    return base or None  # 0 means that none is given (virDomainMemoryDef in src/conf/domain_conf.h)


def _slots(elements: Sequence[Element]) -> list[int]:
    """Return the slot of each NVDIMM: its own, or the lowest free one, in document order."""
    given: list[int | None] = []
    for number, element in enumerate(elements, start=1):
        address = element.child("address")
        what = f"NVDIMM number {number}: the slot in <address>"
        if address is not None and address.attributes.get("type") != "dimm":
            raise DomainXmlError(f"NVDIMM number {number}: <address> is not of type 'dimm'", hint="leave <address> out")
        slot = None if address is None else integer(address.attributes.get("slot", ""), what, limit=MAX_NVDIMMS - 1)
        if slot is not None and slot in given:
            raise DomainXmlError(
                f"NVDIMMs number {given.index(slot) + 1} and {number} are both in slot {slot}",
                hint="give each a slot of its own, or leave <address> out",
            )
        given.append(slot)
    free = (slot for slot in range(MAX_NVDIMMS) if slot not in given)
    return [next(free) if slot is None else slot for slot in given]


def _check_paths(specs: Sequence[NvdimmSpec]) -> None:
    seen: dict[str, int] = {}
    for spec in specs:
        path = posixpath.normpath(spec.path)
        if path in seen:
            raise DomainXmlError(
                f"the NVDIMMs in slots {seen[path]} and {spec.slot} have the same <source><path>, {path}",
                hint="give each a backing of its own, or remove one",
            )
        seen[path] = spec.slot
