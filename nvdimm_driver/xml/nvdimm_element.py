# SPDX-License-Identifier: Apache-2.0
"""The element of an NVDIMM: which parts it has, and how libvirt shows them. Pure.

The order is that of src/conf/domain_conf.c:virDomainMemoryDefFormat. Libvirt shows every size in KiB, whatever its
unit was, and tools rely on that: they write another number and leave the unit.
"""

from __future__ import annotations

from collections import Counter

from nvdimm_driver.errors import DomainXmlError
from nvdimm_driver.model import KIB
from nvdimm_driver.xml.document import Element
from nvdimm_driver.xml.values import integer, scaled

_ATTRIBUTES = {
    "memory": ("model", "access", "discard"),
    "size": ("unit",),
    "alignsize": ("unit",),
    "alias": ("name",),
    "address": ("type", "slot", "base"),
}
_CHILDREN = {
    "memory": ("uuid", "source", "target", "alias", "address"),
    "source": ("path", "alignsize", "pmem"),
    "target": ("size", "node", "label", "readonly"),
    "label": ("size",),
}
_USERS_ALIAS = "ua-"
"""Libvirt drops an alias without this prefix from a definition (virDomainDeviceInfoParseXML)."""


def check_known(element: Element, where: str) -> None:
    """Check that an NVDIMM has no unknown attribute or element, and none twice.

    Libvirt ignores what it does not know. Here a misspelt ``access='private'`` would be taken as shared.

    :param where: beginning of the message.
    :raises DomainXmlError: when it has one.
    """
    attributes, children = _ATTRIBUTES.get(element.tag, ()), _CHILDREN.get(element.tag, ())
    unknown = [f"the attribute {name}" for name in element.attributes if name not in attributes]
    unknown += [f"<{child.tag}>" for child in element.children if child.tag not in children]
    if unknown:
        known = [*attributes, *(f"<{tag}>" for tag in children)]
        raise DomainXmlError(
            f"{where}<{element.tag}> has {unknown[0]}, which an NVDIMM does not have there",
            hint=f"remove it, or correct its spelling; <{element.tag}> can have {', '.join(known) or 'only text'}",
        )
    for tag, count in Counter(child.tag for child in element.children).items():
        if count > 1:
            raise DomainXmlError(f"{where}<{element.tag}> has {count} <{tag}>", hint="remove all but one of them")
    for child in element.children:
        check_known(child, where)


def in_kib(element: Element, size: int | None = None) -> Element:
    """Return an element that has a size, in KiB and with its attributes in libvirt's order.

    :param size: another size for it, in bytes.
    :raises DomainXmlError: when its own size is invalid.
    """
    others = {name: value for name, value in element.attributes.items() if name != "unit"}
    size = scaled(element, f"<{element.tag}>") if size is None else size
    return Element(element.tag, others | {"unit": "KiB"}, text=str(size // KIB))


def as_libvirt_shows(element: Element) -> Element:
    """Return the element of an NVDIMM as libvirt shows it; parts that are not an NVDIMM's go last.

    :raises DomainXmlError: when a size or number in it is invalid.
    """
    if element.tag in ("size", "alignsize"):
        return in_kib(element)
    children = [
        as_libvirt_shows(child)
        for child in _sorted(element.children, _CHILDREN.get(element.tag, ()))
        if child.tag != "alias" or child.attributes.get("name", "").startswith(_USERS_ALIAS)
    ]
    return Element(element.tag, _attributes(element), children, _text(element))


def _text(element: Element) -> str:
    if element.tag == "node":
        return str(integer(element.text, "<node>"))
    return "" if element.tag in ("pmem", "readonly") else element.text


def _attributes(element: Element) -> dict[str, str]:
    known = _ATTRIBUTES.get(element.tag, ())
    names = [name for name in known if name in element.attributes]
    names += [name for name in element.attributes if name not in known]
    found = {name: element.attributes[name] for name in names}
    if element.tag == "address" and "slot" in found:
        found["slot"] = str(integer(found["slot"], "the slot in <address>"))
    if element.tag == "address" and "base" in found:
        base = integer(found.pop("base"), "the base in <address>", base=16)
        found |= {"base": f"{base:#x}"} if base else {}  # 0 means that none is given
    return found


def _sorted(children: list[Element], order: tuple[str, ...]) -> list[Element]:
    return sorted(children, key=lambda child: order.index(child.tag) if child.tag in order else len(order))
