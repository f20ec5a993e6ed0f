# SPDX-License-Identifier: Apache-2.0
"""Edits of one domain XML: add, remove or replace an NVDIMM, add a uuid or slots; the XML of a new NVDIMM. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nvdimm_driver.errors import DeviceMissingError
from nvdimm_driver.model import KIB, DomainSpec, NvdimmSpec
from nvdimm_driver.xml.document import Element, parse, written
from nvdimm_driver.xml.nvdimm_element import as_libvirt_shows
from nvdimm_driver.xml.parse_domain import nvdimm_elements, path_of
from nvdimm_driver.xml.values import scaled

BEHIND_MEMORY = ("crypto", "iommu", "vsock", "pstore")
"""Devices that libvirt writes after memory (src/conf/domain_conf.c:virDomainDefFormatInternalSetRootName)."""

_SHOWN = "'virsh dumpxml' shows them"


Edit = Callable[[str, str, Mapping[str, str]], str]
"""Returns domain XML that is changed, by the XML of an NVDIMM, and by the paths that the paths of both lead to now."""


def as_named(edit: Callable[[str, str], str]) -> Edit:
    """Return the edit that takes paths as they are written: errors name them so."""
    return lambda xml, device, real: edit(xml, device)


def by_real_paths(edit: Callable[[str, str], str]) -> Edit:
    """Return the edit that finds an NVDIMM by the path that the device's path leads to, whatever link that is."""
    return lambda xml, device, real: edit(with_paths(xml, real), with_paths(device, real))


def memory_device(spec: NvdimmSpec, slot: int | None = None) -> str:
    """Return the ``<memory>`` element for an NVDIMM with that path, size and label area, and with a slot if given."""
    element = _memory_element(spec.path, spec.size, spec.label_size)
    if slot is not None:
        element.children.append(_address(slot))
    return written(element)


def with_uuid(xml: str, uuid: str) -> str:
    """Return domain XML with the uuid added after its name; the same string when it already has one."""
    text = parse(xml)
    if text.root.child("uuid") is not None:
        return xml
    text.insert_after(text.root.need("name"), Element("uuid", text=uuid))
    return text.edited()


def with_slots(xml: str, domain: DomainSpec) -> str:
    """Return domain XML in which the ``<address>`` of each NVDIMM has its slot, as libvirt writes it for KVM.

    :param domain: what :func:`.parse_domain.extract` returns for this XML.
    """
    text = parse(xml)
    slots = {spec.path: spec.slot for spec in domain.nvdimms}
    for element in nvdimm_elements(text.root):
        if element.child("address") is None:
            text.insert_after(element.children[-1], _address(slots[path_of(element)]))
    return text.edited()


def paths_in(xml: str) -> list[str]:
    """Return the paths of the NVDIMMs in the XML of a domain or of an NVDIMM."""
    return [path_of(element) for element in _nvdimms(parse(xml).root)]


def with_paths(xml: str, paths: Mapping[str, str]) -> str:
    """Return the XML of a domain or of an NVDIMM with other paths of NVDIMMs, given by those of :func:`paths_in`.

    Where they are the same, not a byte changes.
    """
    text = parse(xml)
    for element in _nvdimms(text.root):
        old = path_of(element)
        if paths[old] != old:
            text.replace(element.need("source").need("path"), Element("path", text=paths[old]))
    return text.edited()


def with_size(xml: str, path: str, size: int) -> str:
    """Return domain XML in which the NVDIMM with a path, as it is written there, has another size."""
    text = parse(xml)
    for element in nvdimm_elements(text.root):
        if path_of(element) == path:
            text.replace(element.need("target").need("size"), _size_element(size))
    return text.edited()


def in_slot(device: str, slot: int) -> str:
    """Return the XML of an NVDIMM with a slot, if it has none."""
    text = parse(device)
    if text.root.child("address") is None:
        text.insert_after(text.root.children[-1], _address(slot))
    return text.edited()


def attach(xml: str, device: str) -> str:
    """Return domain XML, as the user wrote it, with one more NVDIMM after its others.

    :param device: XML of an NVDIMM.
    """
    text = parse(xml)
    devices = text.root.need("devices")
    before = [element for element in devices.children if element.tag not in BEHIND_MEMORY]
    if before:
        text.insert_after(before[-1], parse(device).root)
    else:
        text.insert_first(devices, parse(device).root)
    return text.edited()


def detach(xml: str, device: str) -> str:
    """Return domain XML without the NVDIMM that this XML describes.

    As in libvirt (src/conf/domain_conf.c:virDomainMemoryFindByDefInternal), path and size must be the same, and node,
    address and alias if they are given. So must the label area be.

    :raises DeviceMissingError: when the domain has no such NVDIMM.
    :raises DomainXmlError: when something in the XML is invalid.
    """
    text, wanted = parse(xml), parse(device).root
    found = _same_backing(text.root, wanted)
    for what, asked, own in _traits(wanted, found):
        if asked not in (None, own):
            raise DeviceMissingError(
                f"device not found: the NVDIMM {path_of(found)} has another {what}: {own or 'none'}, and not {asked}",
                hint=_SHOWN,
            )
    text.cut(found)
    return text.edited()


def update(xml: str, device: str) -> str:
    """Return domain XML with this NVDIMM in place of the one that has the same backing.

    :raises DeviceMissingError: when there is none.
    """
    text, new = parse(xml), parse(device).root
    text.replace(_same_backing(text.root, new), new)
    return text.edited()


def without_max_memory(xml: str) -> str:
    """Return domain XML without ``<maxMemory>``, which the libxl driver takes of no domain."""
    text = parse(xml)
    for element in text.root.children:
        if element.tag == "maxMemory":
            text.cut(element)
    return text.edited()


def _nvdimms(root: Element) -> list[Element]:
    return [root] if root.tag == "memory" else nvdimm_elements(root)


def _same_backing(root: Element, device: Element) -> Element:
    path = path_of(device)
    for element in nvdimm_elements(root):
        if path_of(element) == path:
            return element
    raise DeviceMissingError(f"device not found: the domain has no NVDIMM with <source><path> {path!r}", hint=_SHOWN)


def _traits(wanted: Element, own: Element) -> list[tuple[str, str | None, str | None]]:
    """Return by what an NVDIMM is found: its name, the value asked for, None for any, and the NVDIMM's own."""
    one, other = wanted.need("target"), own.need("target")
    asked, found = as_libvirt_shows(wanted), as_libvirt_shows(own)
    place = asked.child("address") if found.child("address") is not None else None
    return [
        ("size", _size(one.need("size")), _size(other.need("size"))),
        ("label area", _label_size(one), _label_size(other)),
        ("node", asked.need("target").text_of("node") or None, found.need("target").text_of("node") or "0"),
        *((name, _attribute(place, name), _attribute(found.child("address"), name)) for name in ("slot", "base")),
        ("alias", _attribute(asked.child("alias"), "name"), _attribute(found.child("alias"), "name")),
    ]


def _label_size(target: Element) -> str | None:
    label = target.child("label")
    return None if label is None else _size(label.need("size"))


def _size(element: Element) -> str:
    return f"{scaled(element, f'<{element.tag}>') // KIB} KiB"


def _attribute(element: Element | None, name: str) -> str | None:
    return None if element is None else element.attributes.get(name)


def _address(slot: int) -> Element:
    return Element("address", {"type": "dimm", "slot": str(slot)})


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
    """Return ``<size>`` in the largest unit in which it is a whole number."""
    power = next(power for power in (40, 30, 20, 10, 0) if size % (1 << power) == 0)
    unit = {40: "TiB", 30: "GiB", 20: "MiB", 10: "KiB", 0: "b"}[power]
    return Element("size", {"unit": unit}, text=str(size >> power))
