"""Libvirt's domain XML: what it says about NVDIMMs, how libxl is given it, and how the user gets it back.

:func:`rewrite` takes out what libxl refuses and keeps it in ``<metadata>``, as a partial domain XML::

    <nvdimm:domain xmlns:nvdimm="urn:nvdimm-driver:domain:1" added="acpi">
      <maxMemory slots="2" unit="KiB">10485760</maxMemory>
      <memory unit="KiB">8388608</memory>              as it was, when it was not the guest's RAM
      <currentMemory unit="KiB">8388608</currentMemory>
      <devices>
        <emulator>/usr/bin/qemu-system-i386</emulator>   the user's own
        <memory model="nvdimm" access="shared">…</memory>
      </devices>
    </nvdimm:domain>

The rest of the text stays as it is, byte for byte: elements are cut out of it and put into it, where libvirt itself
would put them and formatted as libvirt formats them, so that each direction undoes the other to the byte. That
takes the positions of the elements in the text, which expat gives (and lxml does not); without its DTD support there
are no entities and nothing to fetch.

A user can choose for one domain what is otherwise the host's configuration, in ``<metadata>``, too::

    <nvdimm:options xmlns:nvdimm="urn:nvdimm-driver:options:1" dsm="aml"/>
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from uuid import UUID

from nvdimm_driver import plugins
from nvdimm_driver.errors import DomainXmlError, UnsupportedError
from nvdimm_driver.model import DSM, GIB, KIB, MIB, PAGE, DomainSpec, NvdimmSpec
from nvdimm_driver.xml.document import Element, Text, may_have, parse, written

NAMESPACE = "urn:nvdimm-driver:domain:1"
"""What the record of a rewritten domain is known by."""
OPTIONS = "urn:nvdimm-driver:options:1"
"""What the options are known by that a user may put into ``<metadata>``."""
MAX_NVDIMMS = 256
"""QEMU's ACPI_MAX_RAM_SLOTS (hw/acpi/memory_hotplug.h)."""
MIN_LABEL = 128 * KIB
"""QEMU's MIN_NAMESPACE_LABEL_SIZE (include/hw/mem/nvdimm.h)."""
SIZE_STEP = 2 * MIB
"""What libvirt rounds the size of a memory device up to (src/qemu/qemu_domain.c)."""
MAX_SCALED = (1 << 63) - 1

_RECORD = "nvdimm:domain"
_UNITS: dict[str, int] = {"": KIB, "b": 1, "byte": 1, "bytes": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgtpe", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
"""src/util/virutil.c:virScaleInteger, without regard to case; KiB when nothing is said."""

# Libvirt's order of elements (src/conf/domain_conf.c:virDomainDefFormatInternalSetRootName), as far as it matters here.
_BEFORE_METADATA = ("name", "uuid", "genid", "title", "description")
_BEFORE_FEATURES = ("os", "idmap")
_BEHIND_MEMORY = ("crypto", "iommu", "vsock", "pstore")


class LibxlXmlHook(plugins.XmlHook):
    """Makes libvirt's libxl driver take domains with NVDIMMs."""

    def describe(self) -> str:
        return (
            f"rewrites domain XML of type 'xen' for libvirt's libxl driver, keeps the NVDIMMs in metadata ({NAMESPACE})"
        )

    def rewrite(self, xml: str, device_model: str) -> str:
        return rewrite(xml, device_model)

    def restore(self, xml: str) -> str:
        return restore(xml)


def rewrite(xml: str, device_model: str) -> str:
    """Return domain XML that the libxl driver takes, with the NVDIMMs kept in its metadata.

    :param xml: as the user wrote it. XML that was rewritten before is restored first, so NVDIMMs added to it since then
        join those in its metadata.
    :param device_model: absolute path of the program to name as ``<emulator>``.
    :returns: the same string when it has no NVDIMM or is not a domain of type ``xen``.
    :raises DomainXmlError: when the XML cannot be parsed or says what cannot be right.
    :raises UnsupportedError: when it asks for what Xen or this driver cannot do.
    """
    restored = restore(xml)
    text = _parse_xen(restored, "nvdimm")
    if text is None or not _nvdimms(text.root):
        return xml
    spec = _spec(text.root)
    if spec.emulator == device_model:
        raise DomainXmlError(
            f"<emulator> names {device_model}, which is the NVDIMM device model itself",
            hint="leave <emulator> out, or name the QEMU that is to run the guest",
        )
    root, devices = text.root, text.root.need("devices")
    record = Element(_RECORD, {"xmlns:nvdimm": NAMESPACE})
    kept = Element("devices")

    if (limit := root.child("maxMemory")) is not None:
        record.children.append(limit)
        text.cut(limit)
    for element in _memory_to_change(root, spec.ram):
        record.children.append(element)
        text.replace(element, _in_kib(element, spec.ram))
    features = root.child("features")
    if features is None:
        record.attributes["added"] = "acpi"
        text.insert_after(root.last(_BEFORE_FEATURES), Element("features", children=[Element("acpi")]))
    elif features.child("acpi") is None:
        record.attributes["added"] = "acpi"
        text.insert_first(features, Element("acpi"))

    emulator = devices.child("emulator")
    ours = Element("emulator", text=device_model)
    if emulator is None:
        text.insert_first(devices, ours)
    else:
        kept.children.append(emulator)
        text.replace(emulator, ours)
    for nvdimm in _nvdimms(root):
        kept.children.append(nvdimm)
        text.cut(nvdimm)
    record.children.append(kept)
    _check_plain(record)

    metadata = root.child("metadata")
    if metadata is None:
        text.insert_after(root.last(_BEFORE_METADATA), Element("metadata", children=[record]), quote='"')
    else:
        text.insert_first(metadata, record, quote='"')
    return text.edited()


def restore(xml: str) -> str:
    """Return what the user wrote, as far as libvirt has kept it; what libvirt has filled in stays.

    :returns: the same string when it is not a rewritten domain of type ``xen``.
    :raises DomainXmlError: when the XML cannot be parsed or our metadata in it is broken.
    """
    text = _parse_xen(xml, NAMESPACE)
    record = None if text is None else _record(text.root)
    if text is None or record is None:
        return xml
    root, devices = text.root, text.root.need("devices")
    kept = record.need("devices")

    metadata = root.need("metadata")
    text.cut(record if len(metadata.children) > 1 else metadata)
    limit, memory = record.child("maxMemory"), root.child("memory")
    if limit is not None and memory is not None:
        text.insert_before(memory, limit)
    elif limit is not None:  # not after libvirt, which always writes <memory>
        text.insert_after(root.last(_BEFORE_METADATA), limit)
    for tag in ("memory", "currentMemory"):
        now, then = root.child(tag), record.child(tag)
        # what was changed since (virsh setmaxmem, setmem) is newer than the record
        if now is not None and then is not None and _scaled(now, f"<{tag}>") == _ram(root):
            text.replace(now, then)
    features = root.child("features")
    if record.attributes.get("added") == "acpi" and features is not None:
        acpi = features.child("acpi")
        if acpi is not None:
            text.cut(acpi if len(features.children) > 1 else features)

    emulator, own = devices.child("emulator"), kept.child("emulator")
    if emulator is not None and own is not None:
        text.replace(emulator, own)
    elif emulator is not None:
        text.cut(emulator)
    nvdimms, added = [element for element in kept.children if element.tag == "memory"], _nvdimms(root)
    before = [element for element in devices.children if element.tag not in _BEHIND_MEMORY]
    if not before:
        raise DomainXmlError("<devices> of a rewritten domain has no <emulator> in it", hint="define the domain again")
    for nvdimm in nvdimms:
        if added:  # behind ours, whose slots may depend on their order
            text.insert_before(added[0], nvdimm)
        else:
            text.insert_after(before[-1], nvdimm)
    return text.edited()


def is_rewritten(xml: str) -> bool:
    """True for domain XML that :func:`rewrite` has made.

    :raises DomainXmlError: when the XML cannot be parsed.
    """
    text = _parse_xen(xml, NAMESPACE)
    return text is not None and _record(text.root) is not None


def new_nvdimm(path: str, size: int, label_size: int) -> NvdimmSpec:
    """An NVDIMM of that size, rounded up as libvirt does.

    :param path: absolute.
    :param label_size: bytes of its label area, 0 for none.
    :raises DomainXmlError: when no domain XML could say so.
    """
    return _nvdimm(_memory_element(path, size, label_size), 0, 1)


def memory_device(spec: NvdimmSpec) -> str:
    """The element that a domain has for an NVDIMM of that path, size and label area."""
    return written(_memory_element(spec.path, spec.size, spec.label_size))


def extract(xml: str) -> DomainSpec | None:
    """Return what domain XML, rewritten or as the user wrote it, says about NVDIMMs.

    :returns: None when it has none or is not a domain of type ``xen``.
    :raises DomainXmlError: when the XML cannot be parsed or says what cannot be right.
    :raises UnsupportedError: when it asks for what Xen or this driver cannot do.
    """
    text = _parse_xen(restore(xml), "nvdimm")
    if text is None or not _nvdimms(text.root):
        return None
    return _spec(text.root)


def mentions(xml: str) -> bool:
    """True for XML with an attribute, such as a declaration of a name space, that is :data:`NAMESPACE`.

    :raises DomainXmlError: when the XML cannot be parsed.
    """
    return may_have(xml, NAMESPACE) and _mentions(parse(xml).root)


def emulator_is(xml: str, path: str) -> bool:
    """True for domain XML whose ``<emulator>`` is that path.

    :raises DomainXmlError: when the XML cannot be parsed.
    """
    if not may_have(xml, path):
        return False
    devices = parse(xml).root.child("devices")
    return devices is not None and any(
        child.tag == "emulator" and child.text.strip() == path for child in devices.children
    )


def with_uuid(xml: str, uuid: str) -> str:
    """Return domain XML with that uuid behind its name; the same string when it has one."""
    text = parse(xml)
    if text.root.child("uuid") is not None:
        return xml
    text.insert_after(text.root.need("name"), Element("uuid", text=uuid))
    return text.edited()


def is_nvdimm(device: str) -> bool:
    """True for the XML of one device that is an NVDIMM.

    :raises DomainXmlError: when the XML cannot be parsed.
    """
    if not may_have(device, "nvdimm"):
        return False
    root = parse(device).root
    return root.tag == "memory" and root.attributes.get("model") == "nvdimm"


def attach(xml: str, device: str) -> str:
    """Return domain XML, as the user wrote it, with one more NVDIMM behind those that it has.

    :param device: for which :func:`is_nvdimm` holds.
    """
    text = parse(xml)
    devices = text.root.need("devices")
    before = [element for element in devices.children if element.tag not in _BEHIND_MEMORY]
    if before:
        text.insert_after(before[-1], parse(device).root)
    else:
        text.insert_first(devices, parse(device).root)
    return text.edited()


def detach(xml: str, device: str) -> str:
    """Return domain XML without the NVDIMM that has the backing of this one.

    :raises DomainXmlError: when there is none.
    """
    text = parse(xml)
    text.cut(_same_backing(text.root, device))
    return text.edited()


def update(xml: str, device: str) -> str:
    """Return domain XML with the NVDIMM that has the backing of this one replaced by this one.

    :raises DomainXmlError: when there is none.
    """
    text = parse(xml)
    text.replace(_same_backing(text.root, device), parse(device).root)
    return text.edited()


# --- what the XML says ---


def _same_backing(root: Element, device: str) -> Element:
    source = parse(device).root.child("source")
    path = "" if source is None else source.text_of("path")
    for element in _nvdimms(root):
        own = element.child("source")
        if own is not None and own.text_of("path") == path:
            return element
    raise DomainXmlError(f"the domain has no NVDIMM with <source><path> {path!r}", hint="'virsh dumpxml' shows them")


def _spec(root: Element) -> DomainSpec:
    name = root.need("name").text
    _check_hvm(root)
    ram = _ram(root)
    _check_current_memory(root, ram)
    elements = _nvdimms(root)
    if len(elements) > MAX_NVDIMMS:
        raise UnsupportedError(
            f"domain {name} has {len(elements)} NVDIMMs, and {MAX_NVDIMMS} is the most that a guest can have",
            hint="put more bytes into fewer NVDIMMs",
        )
    nodes = max(1, len(_cells(root)))
    slots = _slots(elements)
    specs = [_nvdimm(element, slot, nodes) for element, slot in zip(elements, slots, strict=True)]
    _check_paths(specs)
    emulator = root.need("devices").child("emulator")
    return DomainSpec(
        name=name,
        uuid=_uuid(root),
        ram=ram,
        emulator=(emulator.text.strip() or None) if emulator is not None else None,
        nvdimms=tuple(sorted(specs, key=lambda spec: spec.slot)),
        dsm=_dsm(root),
    )


def _dsm(root: Element) -> str | None:
    metadata = root.child("metadata")
    children = [] if metadata is None else metadata.children
    found = [child for child in children if _in_namespace(child, (metadata, root), OPTIONS)]
    if not found:
        return None
    name = found[0].tag.rpartition(":")[2]
    unknown = [each for each in found[0].attributes if each != "dsm" and not each.startswith("xmlns")]
    if len(found) > 1 or name != "options" or unknown or found[0].children:
        raise DomainXmlError(
            f"<metadata> has {', '.join(f'<{each.tag}>' for each in found)} of {OPTIONS}, with "
            f"{', '.join(unknown) or 'no'} unknown attributes",
            hint="one empty element <options> with the attribute dsm is known",
        )
    dsm = found[0].attributes.get("dsm")
    if dsm is not None and dsm not in DSM:
        raise DomainXmlError(f"<{found[0].tag} dsm={dsm!r}> in <metadata>", hint=f"dsm is one of {', '.join(DSM)}")
    return dsm


def _in_namespace(element: Element, ancestors: Sequence[Element | None], uri: str) -> bool:
    prefix, colon, _ = element.tag.rpartition(":")
    declaration = f"xmlns:{prefix}" if colon else "xmlns"
    declared = [
        each.attributes[declaration] for each in (element, *ancestors) if each and declaration in each.attributes
    ]
    return declared[:1] == [uri]


def _nvdimms(root: Element) -> list[Element]:
    devices = root.child("devices")
    children = [] if devices is None else devices.children
    return [child for child in children if child.tag == "memory" and child.attributes.get("model") == "nvdimm"]


def _uuid(root: Element) -> str | None:
    element = root.child("uuid")
    if element is None:
        return None
    try:
        return str(UUID(element.text.strip()))
    except ValueError:
        raise DomainXmlError(f"<uuid> is {element.text!r}, which is not a UUID", hint="32 hexadecimal digits") from None


def _check_hvm(root: Element) -> None:
    os_element = root.child("os")
    kind = None if os_element is None else os_element.child("type")
    guest, machine = ("", "") if kind is None else (kind.text.strip(), kind.attributes.get("machine", ""))
    if guest != "hvm" or machine in ("xenpv", "xenpvh"):
        raise UnsupportedError(
            f"an NVDIMM needs an HVM guest, and <os><type machine={machine!r}> is {guest!r}: the firmware that takes "
            "the NVDIMM's ACPI tables, hvmloader, runs in HVM guests alone",
            hint="write <type arch='x86_64' machine='xenfv'>hvm</type>, or remove the NVDIMMs",
        )


def _cells(root: Element) -> list[Element]:
    cpu = root.child("cpu")
    numa = None if cpu is None else cpu.child("numa")
    return [] if numa is None else [child for child in numa.children if child.tag == "cell"]


def _ram(root: Element) -> int:
    """Bytes of guest RAM: the NUMA cells', as libvirt does it (virDomainDefPostParseMemory), or else ``<memory>``."""
    memory, cells = root.child("memory"), _cells(root)
    if cells:
        what = "the memory attribute of a <cpu><numa><cell>"
        parts = [_scale(cell.attributes.get("memory", ""), cell.attributes.get("unit", ""), what) for cell in cells]
    else:
        parts = [] if memory is None else [_scaled(memory, "<memory>")]
    if not sum(parts):
        raise DomainXmlError(
            "the domain has no RAM: <memory> is missing or 0, and there are no <cpu><numa><cell> elements with memory",
            hint="write <memory unit='GiB'>…</memory>",
        )
    return sum(parts)


def _check_current_memory(root: Element, ram: int) -> None:
    element = root.child("currentMemory")
    current = 0 if element is None else _scaled(element, "<currentMemory>")
    if 0 < current < ram:  # 0 is none given (virDomainDefPostParseMemory)
        raise UnsupportedError(
            f"<currentMemory> is {current // KIB} KiB and the guest's RAM {ram // KIB} KiB: such a guest starts with "
            "memory populated on demand, which Xen does not do together with mapped frames",
            hint=f"make <currentMemory> {ram // KIB} KiB or leave it out",
        )


def _memory_to_change(root: Element, ram: int) -> list[Element]:
    elements = [element for element in (root.child("memory"), root.child("currentMemory")) if element is not None]
    return [element for element in elements if _scaled(element, f"<{element.tag}>") not in (0, ram)]


def _nvdimm(element: Element, slot: int, nodes: int) -> NvdimmSpec:
    source, target = element.child("source"), element.child("target")
    path = "" if source is None else source.text_of("path")
    where = f"NVDIMM {path or f'in slot {slot}'}: "
    if source is None or not posixpath.isabs(path):
        raise DomainXmlError(
            f"{where}<source><path> is {path!r}, which is not an absolute path",
            hint="name the backing file or device with its whole path, such as /mnt/pmem0/db1.img",
        )
    if target is None or target.child("size") is None:
        raise DomainXmlError(
            f"{where}<target><size> is missing", hint="write <target><size unit='GiB'>…</size></target>"
        )
    _check_supported(element, target, where)

    size = _scaled(target.need("size"), f"{where}<target><size>")
    label = target.child("label")
    label_size = 0 if label is None else _scaled(label.need("size"), f"{where}<label><size>")
    if label is not None:
        _check_label(size, label_size, where)
    node = target.child("node")
    spec = NvdimmSpec(
        slot=slot,
        path=path,
        size=-(-size // SIZE_STEP) * SIZE_STEP,
        label_size=label_size,
        alignsize=_alignsize(source, where),
        base=_base(element, where),
        node=None if node is None else _integer(node.text, f"{where}<node>", limit=nodes - 1),
        pmem=source.child("pmem") is not None,
    )
    if spec.visible_size == 0:
        raise DomainXmlError(
            f"{where}nothing of <target><size> {size // KIB} KiB is left for the guest to see, without the label "
            f"area of {label_size // KIB} KiB and rounded down to <alignsize> {(spec.alignsize or PAGE) // KIB} KiB",
            hint="make <size> larger or <alignsize> smaller",
        )
    return spec


def _check_label(size: int, label_size: int, where: str) -> None:
    if not MIN_LABEL <= label_size < max(size, 1):
        raise DomainXmlError(
            f"{where}<label><size> is {label_size // KIB} KiB; a label area has at least {MIN_LABEL // KIB} KiB and is "
            f"smaller than the NVDIMM, whose <target><size> is {size // KIB} KiB",
            hint="write <label><size unit='KiB'>128</size></label>, or leave <label> out",
        )


def _check_supported(element: Element, target: Element, where: str) -> None:
    access, discard = element.attributes.get("access", "shared"), element.attributes.get("discard", "no")
    if access not in ("shared", "private"):
        raise DomainXmlError(f"{where}access is {access!r}", hint="write access='shared'")
    if discard not in ("yes", "no"):
        raise DomainXmlError(f"{where}discard is {discard!r}", hint="leave discard out")
    if access == "private":
        raise UnsupportedError(
            f"{where}access='private' cannot be had on Xen: a mapping of real frames is always shared",
            hint="write access='shared'; to keep the backing as it is, give the guest a copy of it",
        )
    if discard == "yes":
        raise UnsupportedError(
            f"{where}discard='yes' cannot be had: the driver never discards what is in persistent memory",
            hint="leave discard out",
        )
    if target.child("readonly") is not None:
        raise UnsupportedError(
            f"{where}<readonly/> cannot be had on Xen: XEN_DOMCTL_memory_mapping has no read-only form",
            hint="remove <readonly/>, and give the guest a copy if it must not write",
        )
    if element.child("uuid") is not None:
        raise UnsupportedError(
            f"{where}<uuid> is for NVDIMMs of pSeries guests, which Xen does not have", hint="remove <uuid>"
        )


def _alignsize(source: Element, where: str) -> int | None:
    element = source.child("alignsize")
    if element is None:
        return None
    align = _scaled(element, f"{where}<alignsize>")
    if align < PAGE or align & (align - 1):
        raise DomainXmlError(
            f"{where}<alignsize> is {align // KIB} KiB; it is a power of two, and {PAGE // KIB} KiB at least",
            hint="write <alignsize unit='MiB'>2</alignsize>, or leave it out",
        )
    return align


def _base(element: Element, where: str) -> int | None:
    address = element.child("address")
    text = None if address is None else address.attributes.get("base")
    base = 0 if text is None else _integer(text, f"{where}the base in <address>", base=16)
    if base and (base % PAGE or base < 4 * GIB):
        raise DomainXmlError(
            f"{where}the base in <address> is {base:#x}; it is a multiple of {PAGE} bytes and at least {4 * GIB:#x}",
            hint="leave base out: a fitting one is chosen",
        )
    return base or None  # 0 is none given (virDomainMemoryDef in src/conf/domain_conf.h)


def _slots(elements: Sequence[Element]) -> list[int]:
    """The slot of each NVDIMM: its own, or the lowest that is free, in document order."""
    given: list[int | None] = []
    for number, element in enumerate(elements, start=1):
        address = element.child("address")
        what = f"NVDIMM number {number}: the slot in <address>"
        if address is not None and address.attributes.get("type") != "dimm":
            raise DomainXmlError(f"NVDIMM number {number}: <address> is not of type 'dimm'", hint="leave <address> out")
        slot = None if address is None else _integer(address.attributes.get("slot", ""), what, limit=MAX_NVDIMMS - 1)
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


def _scaled(element: Element, what: str) -> int:
    return _scale(element.text, element.attributes.get("unit", ""), what)


def _scale(number: str, unit: str, what: str) -> int:
    """Bytes of a size with a unit, in whole KiB, as libvirt counts them (virDomainParseMemory)."""
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise DomainXmlError(
            f"the unit of {what} is {unit!r}", hint="units are bytes, KB, KiB, MB, MiB, GB, GiB and so on"
        )
    size = -(-_integer(number, what) * factor // KIB) * KIB
    if size > MAX_SCALED:
        raise DomainXmlError(f"{what} is {number.strip()} {unit}", hint=f"{MAX_SCALED} bytes is the most libvirt takes")
    return size


def _integer(text: str, what: str, *, base: int = 10, limit: int = MAX_SCALED) -> int:
    digits = text.strip().lower()
    if base == 16:
        digits = digits.removeprefix("0x")
    # the length first: Python takes long to read long numbers
    valid = 0 < len(digits) <= 20 and set(digits) <= set("0123456789abcdef"[:base])
    if not valid or int(digits, base) > limit:
        raise DomainXmlError(
            f"{what} is {text[:40]!r}",
            hint=f"it is a {'hexa' if base == 16 else ''}decimal number from 0 to {limit}",
        )
    return int(digits, base)


# --- the record in the metadata ---


def _record(root: Element) -> Element | None:
    metadata = root.child("metadata")
    children = [] if metadata is None else metadata.children
    return next(
        (child for child in children if child.tag == _RECORD and child.attributes.get("xmlns:nvdimm") == NAMESPACE),
        None,
    )


def _check_plain(element: Element) -> None:
    """Text next to elements, which libvirt's format has nowhere, would be lost in the record."""
    if element.children and element.text.strip():
        text = element.text.strip()[:40]
        raise DomainXmlError(f"<{element.tag}> has both text, {text!r}, and elements in it", hint="remove one of them")
    for child in element.children:
        _check_plain(child)


def _memory_element(path: str, size: int, label_size: int) -> Element:
    target = [_size_element(size)]
    if label_size:
        target.append(Element("label", children=[_size_element(label_size)]))
    return Element(
        "memory",
        {"model": "nvdimm", "access": "shared"},
        [Element("source", children=[Element("path", text=path)]), Element("target", children=target)],
    )


def _size_element(size: int) -> Element:
    """In the largest unit in which it is a whole number."""
    power = next(power for power in (40, 30, 20, 10, 0) if size % (1 << power) == 0)
    unit = {40: "TiB", 30: "GiB", 20: "MiB", 10: "KiB", 0: "b"}[power]
    return Element("size", {"unit": unit}, text=str(size >> power))


def _in_kib(element: Element, size: int) -> Element:
    """The element with another size, its attributes in libvirt's order."""
    others = {name: value for name, value in element.attributes.items() if name != "unit"}
    return Element(element.tag, others | {"unit": "KiB"}, text=str(size // KIB))


def _parse_xen(xml: str, word: str) -> Text | None:
    """Parse the XML of a domain of type ``xen``; None when it is none, or when the word is not in it anywhere."""
    if not may_have(xml, word):
        return None
    text = parse(xml)
    return text if text.root.tag == "domain" and text.root.attributes.get("type") == "xen" else None


def _mentions(element: Element) -> bool:
    return NAMESPACE in element.attributes.values() or any(map(_mentions, element.children))
