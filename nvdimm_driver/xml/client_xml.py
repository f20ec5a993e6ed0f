# SPDX-License-Identifier: Apache-2.0
"""XML as libvirt's clients send it: read once, and refused unless libvirt reads the same in it.

The driver reads with expat, which gives positions in the text; libvirt reads with libxml2. What one of them finds and
the other does not would pass the driver's checks and reach libvirt. So the elements that both find are compared, and
what libvirt reads in more than one way (it looks for some names without their namespaces) is refused.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from lxml import etree

from nvdimm_driver.errors import DomainXmlError
from nvdimm_driver.host_files import followed, real_path
from nvdimm_driver.model import DomainSpec
from nvdimm_driver.sizes import human
from nvdimm_driver.xml.document import (
    MAX_CLIENT_DEPTH,
    MAX_NAME,
    MAX_PARTS,
    MAX_WRITTEN,
    Element,
    count_parts,
    decode,
    parse,
    written_size,
)
from nvdimm_driver.xml.parse_domain import (
    OPTIONS,
    check_memory_device,
    emulator_of,
    is_options,
    is_xen,
    nvdimm_elements,
    spec_of,
    uuid_of,
)
from nvdimm_driver.xml.rewrite import NAMESPACE, mentions
from nvdimm_driver.xml.schema import check_schema

_ONCE = (
    *("name", "uuid", "metadata", "maxMemory", "memory", "currentMemory", "memoryBacking", "os", "features", "cpu"),
    "devices",
)
"""Elements of a domain of which libvirt takes the first or all (XPath), and the driver the first."""
_TEXT_ONLY = ("name", "uuid", "maxMemory", "memory", "currentMemory")
"""Elements of a domain, besides its emulator, of which libvirt takes the text of all in them (XPath's string()), and
the driver their own."""

_MARKUP = re.compile("[^!#-%(-;=?-~\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NO_TEXT = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class ClientDomain:
    """Domain XML of a client.

    :ivar text: the XML.
    :ivar domain: the domain; None when it has no NVDIMMs or is not of type ``xen``.
    :ivar other_type: the type of a domain with NVDIMMs that is not of type ``xen``.
    :ivar uuid: that in the XML of a domain of type ``xen``.
    :ivar is_limited: the domain has ``<maxMemory>``.
    :ivar name: of the domain; empty when it has none.
    """

    text: str
    domain: DomainSpec | None
    other_type: str | None
    uuid: str | None
    is_limited: bool
    name: str = ""


def read_domain(data: bytes, device_model: str, *, validate: bool = False) -> ClientDomain:
    """Read the XML of a domain.

    :param device_model: path of the program that rewritten domains have as their emulator.
    :param validate: check the XML of a domain with NVDIMMs against libvirt's schema; libvirt checks what it gets.
    :raises DomainXmlError: when it cannot be parsed, has an invalid value, or is not read alike by libvirt; also when
        it is already rewritten, or names the device model, by any path: only the driver writes that, and clients never
        see it.
    :raises SchemaError: when it does not match the schema.
    :raises UnsupportedError: when it asks for something that Xen or this driver cannot do.
    """
    text, root = _parse(data)
    _check_form(root)
    _check_repeated(root)
    _check_not_ours(root)
    nvdimms, xen = bool(nvdimm_elements(root)) and root.tag == "domain", is_xen(root)
    if nvdimms and xen and validate:
        check_schema(text)
    domain = spec_of(root) if nvdimms and xen else None
    emulator = emulator_of(root)
    if domain is None and emulator is not None and _followed(emulator) == real_path(device_model):
        raise DomainXmlError(
            f"the domain has no NVDIMM and names the device model {device_model}, as {emulator}",
            hint="leave <emulator> out, or name a QEMU",
        )
    other_type = root.attributes.get("type") if nvdimms and not xen else None
    uuid = None
    with suppress(DomainXmlError):  # that libvirt refuses, or takes for none
        uuid = uuid_of(root) if xen else None
    return ClientDomain(text, domain, other_type, uuid, root.child("maxMemory") is not None, root.text_of("name"))


class Added(NamedTuple):
    """The size of what a call adds to a domain's XML.

    :ivar size: about how many bytes libvirt writes.
    :ivar parts: elements and attributes.
    """

    size: int
    parts: int


class ClientDevice(NamedTuple):
    """Device XML of a client."""

    text: str
    is_nvdimm: bool
    added: Added


def read_device(data: bytes) -> ClientDevice:
    """Read the XML of a device.

    :raises DomainXmlError: when it cannot be parsed, or is not read alike by libvirt.
    :raises UnsupportedError: when it is another memory device.
    """
    text, root = _parse(data)
    _check_form(root)
    check_memory_device(root)
    is_nvdimm = root.tag == "memory" and root.attributes.get("model") == "nvdimm"
    return ClientDevice(text, is_nvdimm, Added(written_size(root, 2), count_parts(root)))


def _followed(emulator: str) -> str:
    """Return the path that an emulator's path leads to; one that is too long for the kernel is no program's.

    :raises DomainXmlError: when it leads through more links than the kernel, or the driver, follows.
    """
    try:
        return followed(emulator)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return emulator
        raise DomainXmlError(
            f"the path of the emulator, {emulator[:80]}, cannot be followed: {error.strerror}",
            hint="name the program itself, or leave <emulator> out",
        ) from error


def check_metadata(data: bytes, key: str, namespace: str) -> Added:
    """Check that metadata which a client adds to a domain are neither the driver's own nor its options.

    libvirt declares the namespace in the element, and writes the key in front of each name in it that has no prefix.

    :param key: of its namespace, which :func:`check_plain` has passed, as the namespace.
    :raises DomainXmlError: when they are, cannot be parsed, or are not read alike by libvirt.
    """
    root = _parse(data)[1]
    _check_not_ours(root)
    if is_options(root):
        raise cannot_set_options()
    prefix, parts = len(key.encode()) + 1, count_parts(root)
    declaration = prefix + len(namespace.encode()) + len(' xmlns=""')
    return Added(written_size(root, 2) + declaration + 2 * prefix * parts, parts)


def cannot_set_options() -> DomainXmlError:
    """Return the error for a call that sets or removes the driver's options as metadata.

    Nothing would check them, and they would change in a running guest: once that is saved, it goes on only with the
    label server that it has had.
    """
    return DomainXmlError(
        f"metadata of {OPTIONS}, the options for NVDIMMs, change only with the definition",
        hint="change them with 'virsh edit' or 'virsh define'",
    )


def check_room(xml: str, added: Added) -> None:
    """Check that a domain's XML has room for what a call adds.

    Otherwise nobody could read it any more: neither its client nor the hook, which keeps the domain from its start.

    :param xml: as libvirt has it now.
    :raises DomainXmlError: when it has not.
    """
    _check_written(len(xml.encode()) + added.size)
    if count_parts(parse(xml).root) + added.parts > MAX_PARTS:
        raise DomainXmlError(
            f"the domain would have more than {MAX_PARTS} elements and attributes",
            hint="remove other metadata or devices first",
        )


def _check_written(size: int) -> None:
    if size > MAX_WRITTEN:
        raise DomainXmlError(
            f"the domain XML would have {human(size)} as libvirt writes it, and may have {human(MAX_WRITTEN)}",
            hint="make it shorter, or remove other metadata or devices first",
        )


def check_plain(value: str) -> None:
    """Check a value of a client's that libvirt writes into XML as it is, such as the name of a namespace.

    It would be another value when that is read again, even the driver's own namespace, or XML that nobody can read.

    :raises DomainXmlError: when it has a character that means something in XML, or that XML cannot have.
    """
    if _MARKUP.search(value):
        raise DomainXmlError(
            f"{value[:80]!r} has a character that means something else in XML",
            hint="leave out blanks, controls, and & < > ' \"",
        )
    if len(value.encode()) > MAX_NAME:
        raise DomainXmlError(
            f"{value[:80]!r}… has {human(len(value.encode()))}, and a name in XML may have {human(MAX_NAME)}",
            hint="take a shorter one",
        )


def check_text(value: str) -> Added:
    """Check a value of a client's that libvirt escapes in XML: a title or a description.

    :raises DomainXmlError: when it has a character that XML cannot have: nobody could read the domain's XML any more.
    """
    if _NO_TEXT.search(value):
        raise DomainXmlError(f"{value[:80]!r} has a character that XML cannot have", hint="leave it out")
    return Added(written_size(Element("description", text=value), 1), 1)


def _parse(data: bytes) -> tuple[str, Element]:
    text = decode(data)
    root = parse(text, MAX_PARTS, MAX_CLIENT_DEPTH).root
    _check_written(written_size(root))
    try:
        # as libvirt parses it (src/util/virxml.c:virXMLParseHelper); a document type is refused above
        options = etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True, remove_pis=True)
        theirs = etree.fromstring(data, options)
    except (etree.LxmlError, ValueError) as error:
        raise DomainXmlError(f"libxml2 cannot parse the XML: {error}", hint="'xmllint FILE' shows the place") from error
    differing = _difference(root, theirs)
    if differing is not None:
        raise DomainXmlError(
            f"<{differing.tag}> is read in two ways, by libxml2 and by expat", hint="write the XML plainly, in UTF-8"
        )
    return text, root


def _difference(ours: Element, theirs: etree._Element) -> Element | None:
    """Return the first element that libxml2 reads differently; None when there is none. Prefixes do not count."""
    found = [(etree.QName(name).localname, value) for name, value in theirs.attrib.items()]
    own = [(_local(name), value) for name, value in ours.attributes.items() if not _declares(name)]
    text = (theirs.text or "") + "".join(child.tail or "" for child in theirs)
    same = (_local(ours.tag), sorted(own), ours.text) == (etree.QName(theirs).localname, sorted(found), text)
    if not same or len(ours.children) != len(theirs):
        return ours
    pairs = zip(ours.children, theirs, strict=True)
    return next((differing for one, other in pairs if (differing := _difference(one, other)) is not None), None)


def _check_form(root: Element) -> None:
    """Check that names which the driver looks for mean the same to libvirt, which ignores some namespaces.

    :raises DomainXmlError: for a prefix of the root or of an attribute, and for a default namespace.
    """
    if ":" in root.tag:
        raise DomainXmlError(f"the root element <{root.tag}> has a prefix", hint=f"write <{_local(root.tag)}>")
    for element in _plain(root):
        for name in element.attributes:
            if name == "xmlns" or (":" in name and not _declares(name)):
                raise DomainXmlError(
                    f"<{element.tag}> has the attribute {name}", hint="domain XML has no namespaces here: remove it"
                )


def _plain(element: Element) -> Iterator[Element]:
    """Yield the elements of libvirt's own format: not those in metadata or, like QEMU's arguments, in a namespace."""
    yield element
    for child in element.children:
        if child.tag not in ("metadata", "commandline") and ":" not in child.tag:
            yield from _plain(child)


def _check_repeated(root: Element) -> None:
    for tag, count in Counter(child.tag for child in root.children if child.tag in _ONCE).items():
        if count > 1:
            raise DomainXmlError(f"the domain has {count} <{tag}>", hint="remove all but one of them")
    devices = root.child("devices")
    emulators = [] if devices is None else [child for child in devices.children if child.tag == "emulator"]
    for child in [child for child in root.children if child.tag in _TEXT_ONLY] + emulators:
        if child.children:
            raise DomainXmlError(
                f"<{child.tag}> has <{child.children[0].tag}> in it", hint=f"write only text into <{child.tag}>"
            )


def _check_not_ours(root: Element) -> None:
    if mentions(root):
        raise DomainXmlError(
            f"the XML has nvdimm_driver's own metadata in it ({NAMESPACE})",
            hint="change the <memory model='nvdimm'> elements instead; 'nvdimmctl restore' makes XML to define of this",
        )


def _declares(name: str) -> bool:
    """Return True for the name of an attribute that declares a namespace."""
    return name == "xmlns" or name.startswith("xmlns:")


def _local(name: str) -> str:
    return name.rpartition(":")[2]
