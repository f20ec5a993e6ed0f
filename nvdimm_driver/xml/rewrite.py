# SPDX-License-Identifier: Apache-2.0
"""Rewriting of domain XML with NVDIMMs for libvirt's libxl driver, and its restoration for the user.

:func:`rewrite` moves the elements that libxl refuses into ``<metadata>``, as a partial domain XML::

    <nvdimm:domain xmlns:nvdimm="urn:nvdimm-driver:domain:1" added="acpi">
      <maxMemory slots="2" unit="KiB">10485760</maxMemory>
      <memory unit="KiB">8388608</memory>              as it was, if it was not the guest's RAM
      <currentMemory unit="KiB">8388608</currentMemory>
      <devices>
        <emulator>/usr/bin/qemu-system-i386</emulator>   the user's own
        <memory model="nvdimm" access="shared">…</memory>
      </devices>
    </nvdimm:domain>

The record has elements as libvirt shows them, with sizes in KiB. The rest of the text stays the same, byte for byte:
elements are cut out and inserted where libvirt would put them, in libvirt's format, so that rewriting what was restored
gives the same text again. This needs the positions of elements in the text, which expat gives and lxml does not. DTDs
are refused, so there are no entities and nothing to fetch.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from nvdimm_driver import plugins
from nvdimm_driver.errors import DomainXmlError
from nvdimm_driver.xml.document import Element, parse, written
from nvdimm_driver.xml.edit_devices import BEHIND_MEMORY
from nvdimm_driver.xml.nvdimm_element import as_libvirt_shows, in_kib
from nvdimm_driver.xml.parse_domain import nvdimm_elements, parse_xen, path_of, ram_of, spec_of
from nvdimm_driver.xml.values import scaled

NAMESPACE = "urn:nvdimm-driver:domain:1"
"""The namespace of the record in a rewritten domain's metadata."""

PREFIX = "nvdimm"
_RECORD = f"{PREFIX}:domain"
# Libvirt's order of elements (src/conf/domain_conf.c:virDomainDefFormatInternalSetRootName), as far as it matters here.
_BEFORE_METADATA = ("name", "uuid", "genid", "title", "description")
_BEFORE_FEATURES = ("os", "idmap")


class LibxlXmlHook(plugins.XmlHook):
    """Rewrites domains with NVDIMMs so that libvirt's libxl driver accepts them."""

    def describe(self) -> str:
        return (
            f"rewrites domain XML of type 'xen' for libvirt's libxl driver, keeps the NVDIMMs in metadata ({NAMESPACE})"
        )

    def rewrite(self, xml: str, device_model: str) -> str:
        return rewrite(xml, device_model)

    def restore(self, xml: str) -> str:
        return restore(xml)

    def may_restore(self, reply: bytes) -> bool:
        return NAMESPACE.encode() in reply


def rewrite(xml: str, device_model: str) -> str:
    """Return domain XML that the libxl driver accepts, with the NVDIMMs kept in its metadata.

    :param xml: as the user wrote it. Rewritten XML is restored first, so NVDIMMs added since then join those in its
        metadata.
    :param device_model: absolute path of the program to name as ``<emulator>``.
    :returns: the same string when it has no NVDIMM or is not a domain of type ``xen``.
    :raises DomainXmlError: when the XML cannot be parsed or has an invalid value.
    :raises UnsupportedError: when it asks for something that Xen or this driver cannot do.
    """
    restored = restore(xml)
    text = parse_xen(restored, "nvdimm")
    if text is None or not nvdimm_elements(text.root):
        return xml
    spec = spec_of(text.root)
    if spec.emulator == device_model:
        raise DomainXmlError(
            f"<emulator> names {device_model}, which is the NVDIMM device model itself",
            hint="leave <emulator> out, or name the QEMU that is to run the guest",
        )
    root, devices = text.root, text.root.need("devices")
    record = Element(_RECORD, {"xmlns:nvdimm": NAMESPACE})
    kept = Element("devices")

    if (limit := root.child("maxMemory")) is not None:
        record.children.append(in_kib(limit))
        text.cut(limit)
    memory = root.child("memory")
    most = max(spec.ram, 0 if memory is None else _size(memory))  # libvirt lowers <currentMemory> to that
    for element in _memory_to_change(root, spec.ram):
        size = min(_size(element), most)
        if size != spec.ram:
            record.children.append(in_kib(element, size))
        text.replace(element, in_kib(element, spec.ram))
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
    for nvdimm in nvdimm_elements(root):
        kept.children.append(as_libvirt_shows(nvdimm))
        text.cut(nvdimm)
        _check_plain(nvdimm)
    record.children.append(kept)

    metadata = root.child("metadata")
    if metadata is None:
        text.insert_after(root.last(_BEFORE_METADATA), Element("metadata", children=[record]), quote='"')
    else:
        text.insert_first(metadata, record, quote='"')
    return text.edited()


def restore(xml: str) -> str:
    """Return what the user asked for, as libvirt would show it; values that libvirt has filled in stay.

    :returns: the same string when it is not a rewritten domain of type ``xen``.
    :raises DomainXmlError: when the XML cannot be parsed or our metadata in it is broken.
    """
    text = parse_xen(xml, NAMESPACE)
    record = None if text is None else _record(text.root)
    if text is None or record is None:
        return xml
    root, devices = text.root, text.root.need("devices")
    kept = record.need("devices")

    metadata = root.need("metadata")
    text.cut(record if len(metadata.children) > 1 else metadata)
    limit, memory = record.child("maxMemory"), root.child("memory")
    if limit is not None and memory is not None:
        text.insert_before(memory, _shown(in_kib, limit))
    elif limit is not None:  # never in XML from libvirt, which always writes <memory>
        text.insert_after(root.last(_BEFORE_METADATA), _shown(in_kib, limit))
    for tag in ("memory", "currentMemory"):
        now, then = root.child(tag), record.child(tag)
        # a value changed since (virsh setmaxmem, setmem) is newer than the record; <currentMemory> alone, which an
        # earlier version recorded, was above <memory>, and libvirt has taken <memory> for it
        if now is None or then is None or _size(now) != ram_of(root):
            break
        text.replace(now, _shown(in_kib, then))
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
    # records of earlier versions have the units that the user wrote
    nvdimms = [_shown(as_libvirt_shows, element) for element in kept.children if element.tag == "memory"]
    added = nvdimm_elements(root)
    before = [element for element in devices.children if element.tag not in BEHIND_MEMORY]
    if not before:
        raise DomainXmlError("<devices> of a rewritten domain has no <emulator> in it", hint="define the domain again")
    for nvdimm in nvdimms:
        if added:  # ours go first: their slots may depend on their order
            text.insert_before(added[0], nvdimm)
        else:
            text.insert_after(before[-1], nvdimm)
    return text.edited()


def record_with(xml: str, nvdimm: Element) -> str:
    """Return the record of a rewritten domain with one more NVDIMM, as :func:`record_without` does."""
    record = _needed(xml)
    record.need("devices").children.append(as_libvirt_shows(nvdimm))
    return written(record)


def record_without(xml: str, paths: Container[str]) -> str | None:
    """Return the record of a rewritten domain without its NVDIMMs with these paths, for virDomainSetMetadata.

    libvirt gives it, and each element in it, the namespace that the call names.

    :returns: None when it has none of them.
    """
    record = _needed(xml)
    kept = record.need("devices")
    left = [each for each in kept.children if each.tag != "memory" or path_of(each) not in paths]
    if len(left) == len(kept.children):
        return None
    kept.children[:] = left
    return written(record)


def _needed(xml: str) -> Element:
    record = _record(parse(xml).root)
    if record is None:
        raise DomainXmlError("libvirt has the domain without NVDIMMs", hint="define the domain again")
    attributes = {name: value for name, value in record.attributes.items() if name != f"xmlns:{PREFIX}"}
    return Element("domain", attributes, record.children)


def mentions(element: Element) -> bool:
    """Return True if an attribute in it, such as a namespace declaration, has the value :data:`NAMESPACE`."""
    return NAMESPACE in element.attributes.values() or any(map(mentions, element.children))


def _shown(form: Callable[[Element], Element], element: Element) -> Element:
    """Return a kept element in libvirt's form; as it is when it has an invalid size, so that the user sees that."""
    try:
        return form(element)
    except DomainXmlError:
        return element


def _memory_to_change(root: Element, ram: int) -> list[Element]:
    elements = [element for element in (root.child("memory"), root.child("currentMemory")) if element is not None]
    return [element for element in elements if _size(element) not in (0, ram)]


def _size(element: Element) -> int:
    return scaled(element, f"<{element.tag}>")


def _record(root: Element) -> Element | None:
    metadata = root.child("metadata")
    children = [] if metadata is None else metadata.children
    found = next(
        (child for child in children if child.tag == _RECORD and child.attributes.get("xmlns:nvdimm") == NAMESPACE),
        None,
    )
    return None if found is None else _plain(found)


def _plain(record: Element) -> Element:
    """Let the elements in a record have no prefix, which virDomainSetMetadata gives each of them. Return the record."""
    for each in record.children:
        each.tag = each.tag.removeprefix(f"{PREFIX}:")
        _plain(each)
    return record


def _check_plain(element: Element) -> None:
    """Check that no element has both text and elements, as none in libvirt's format has: the text would be lost."""
    if element.children and element.text.strip():
        text = element.text.strip()[:40]
        raise DomainXmlError(f"<{element.tag}> has both text, {text!r}, and elements in it", hint="remove one of them")
    for child in element.children:
        _check_plain(child)
