# SPDX-License-Identifier: Apache-2.0
"""XML as text: positions of elements, edits that leave every other byte, new elements in libvirt's format. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from xml.parsers import expat

from nvdimm_driver.errors import DomainXmlError
from nvdimm_driver.model import MIB
from nvdimm_driver.sizes import human

MAX_BYTES = 4 * MIB
"""The longest string that libvirt's RPC takes (src/remote/remote_protocol.x:REMOTE_STRING_MAX)."""
MAX_PARTS = 50_000
"""Elements and attributes that a client sends: several times what the largest domains have; bounds the time that
hostile XML takes."""
_MAX_PARTS_READ = MAX_BYTES // 8
"""Those in any XML, for a bound on the memory that it takes. libvirt makes several of one that a client has sent, and
it writes no more of them into :data:`MAX_BYTES`, which is all that limits XML of libvirt's."""
MAX_WRITTEN = MAX_BYTES // 2
"""Bytes that XML of a client's may have as libvirt writes it: what libvirt and the driver add has room, too."""
MAX_DEPTH = 256
"""libxml2's limit without XML_PARSE_HUGE, and so libvirt's (xmlParserMaxDepth)."""
MAX_CLIENT_DEPTH = MAX_DEPTH - 8
"""Of what a client sends: libvirt puts it into <metadata>, and the XML of a guest that runs into <domstatus>."""
MAX_NAME = 50_000
"""Bytes of a name: libxml2's limit without XML_PARSE_HUGE (XML_MAX_NAME_LENGTH)."""
MAX_ATTRIBUTES = 256
"""Of one element: libxml2 looks each of them up from the first one on."""
MAX_INDENT = 64
"""Most white space that a new element takes over from the one beside it, of which it writes a copy in each line."""
EIGHT_BIT = ("iso8859-", "cp125", "koi8-")
"""Eight-bit encodings whose lower half is ASCII, by the beginning of Python's name."""

_SPACE = b" \t\r\n"
_TEXT_ESCAPES = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord("\r"): "&#13;"}
_ATTRIBUTE_ESCAPES = {ord("\t"): "&#9;", ord("\n"): "&#10;"}
"""Escapes of libxml2 (xmlNodeDump), which writes libvirt's metadata."""
_QUOTES = {ord('"'): "&quot;", ord("'"): "&apos;"}
"""Escapes that libvirt adds in what it writes itself (src/util/virbuffer.c:virBufferEscapeString)."""


def decode(data: bytes) -> str:
    """Return the text of XML that a client has sent, as libxml2 would read it.

    The declaration of an eight-bit encoding is removed: the XML is sent on in UTF-8.

    :raises DomainXmlError: when ASCII means something else in its encoding, which would hide its content, or when it is
        not valid in its encoding.
    """
    encoding, end = _declared(data)
    name = "utf-8" if encoding is None else _codec(encoding)
    if not name.startswith((*EIGHT_BIT, "utf-8", "ascii")):
        raise DomainXmlError(f"the XML's encoding {encoding!r} is not supported", hint="write it in UTF-8")
    start = end if name.startswith(EIGHT_BIT) else 0
    try:
        return data[start:].decode(name)
    except UnicodeDecodeError as error:
        raise DomainXmlError(
            f"the XML is not {encoding or 'UTF-8'}, {error.reason} at byte {start + error.start}",
            hint="declare its encoding, as in <?xml version='1.0' encoding='ISO-8859-1'?>",
        ) from None


@dataclass
class Element:
    """An element. Start and end are its position in the text, in bytes; both are 0 for a new element."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element] = field(default_factory=list)
    text: str = ""
    start: int = 0
    end: int = 0

    def child(self, tag: str) -> Element | None:
        """Return the first child of that name, as libvirt does, or None."""
        return next((child for child in self.children if child.tag == tag), None)

    def need(self, tag: str) -> Element:
        """Return the first child of that name.

        :raises DomainXmlError: when there is none.
        """
        child = self.child(tag)
        if child is None:
            raise DomainXmlError(
                f"<{self.tag}> has no <{tag}> in it", hint="libvirt's domain XML format requires it here"
            )
        return child

    def text_of(self, tag: str) -> str:
        child = self.child(tag)
        return "" if child is None else child.text

    def last(self, tags: Sequence[str]) -> Element:
        """Return the last child that has one of the names.

        :raises DomainXmlError: when no child has the first name.
        """
        self.need(tags[0])
        return [child for child in self.children if child.tag in tags][-1]


class Text:
    """XML as it was written, and edits to make in it, which never overlap."""

    def __init__(self, data: bytes, root: Element) -> None:
        self.data = data
        self.root = root
        self.edits: list[tuple[int, int, bytes]] = []

    def cut(self, element: Element) -> None:
        """Remove the element and the white space in front of it."""
        self.edits.append((element.start - len(self._space(element)), element.end, b""))

    def replace(self, element: Element, new: Element, *, quote: str = "'") -> None:
        self.edits.append((element.start, element.end, _format(new, self._newline(element), quote).encode()))

    def insert_after(self, element: Element, new: Element, *, quote: str = "'") -> None:
        newline = self._newline(element)
        self.edits.append((element.end, element.end, (newline + _format(new, newline, quote)).encode()))

    def insert_before(self, element: Element, new: Element, *, quote: str = "'") -> None:
        newline, start = self._newline(element), element.start - len(self._space(element))
        self.edits.append((start, start, (newline + _format(new, newline, quote)).encode()))

    def insert_first(self, parent: Element, new: Element, *, quote: str = "'") -> None:
        if parent.children:
            self.insert_before(parent.children[0], new, quote=quote)
        else:
            self.replace(parent, Element(parent.tag, parent.attributes, [new]), quote=quote)

    def edited(self) -> str:
        """Return the XML with all edits made.

        :raises DomainXmlError: when it is too long then for libvirt.
        """
        parts, done = [], 0
        for start, end, new in sorted(self.edits, key=lambda edit: edit[:2]):
            parts += [self.data[done:start], new]
            done = end
        edited = b"".join([*parts, self.data[done:]])
        _check_length(edited)
        return edited.decode()

    def _space(self, element: Element) -> bytes:
        """Return the white space in front of an element."""
        start = element.start
        while self.data[start - 1] in _SPACE:
            piece = self.data[max(0, start - 4096) : start]
            start -= len(piece) - len(piece.rstrip(_SPACE))
        return self.data[start : element.start]

    def _newline(self, element: Element) -> str:
        """Return the line break and indent in front of an element; empty when it does not begin a line."""
        _, newline, indent = self._space(element).rpartition(b"\n")
        return (newline + indent[:MAX_INDENT]).decode() if newline else ""


def written(element: Element) -> str:
    """Return an element by itself, as libvirt writes it."""
    return _format(element, "\n", "'")


def _format(element: Element, newline: str, quote: str) -> str:
    """Return an element as libvirt writes it: 2 more spaces per level; single quotes, in metadata double ones."""
    in_text = _TEXT_ESCAPES if quote == '"' else _TEXT_ESCAPES | _QUOTES
    in_attributes = in_text | _ATTRIBUTE_ESCAPES | {ord('"'): "&quot;"}
    attributes = "".join(
        f" {name}={quote}{value.translate(in_attributes)}{quote}" for name, value in element.attributes.items()
    )
    inner = newline and newline + "  "
    if element.children:
        content = "".join([inner + _format(child, inner, quote) for child in element.children]) + newline
    else:
        content = element.text.translate(in_text) if element.text.strip() else ""
    if not content:
        return f"<{element.tag}{attributes}/>"
    return f"<{element.tag}{attributes}>{content}</{element.tag}>"


def may_have(xml: str, word: str) -> bool:
    """Return False when the word cannot be in the XML: without a DTD, only character references can hide it."""
    return word in xml or "&#" in xml


def _check_length(data: bytes) -> None:
    if len(data) > MAX_BYTES:
        raise DomainXmlError(
            f"the domain XML has {human(len(data))}, and libvirt takes {human(MAX_BYTES)} at most",
            hint="make it shorter",
        )


def _declared(data: bytes) -> tuple[str | None, int]:
    """Return the encoding that the XML declaration names, and where the declaration ends; (None, 0) without one."""
    end = data.find(b"?>") + 2
    if not data.removeprefix(codecs.BOM_UTF8).startswith(b"<?xml"):
        return None, 0
    found: list[str | None] = []
    parser = expat.ParserCreate("utf-8")
    parser.XmlDeclHandler = lambda version, encoding, standalone: found.append(encoding)
    with suppress(expat.ExpatError):
        parser.Parse(data[:end])
    return (found[0], end) if found and found[0] else (None, 0)


def _codec(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        return "unknown"


def written_size(element: Element, depth: int = 0) -> int:
    """Return about how many bytes an element has as libvirt writes it, or a few more: with escapes, and indented by 2
    per level.
    """
    own = 2 * len(element.tag.encode()) + 4 * depth + 8 + _escaped_size(element.text)
    own += sum(len(name.encode()) + 4 + _attribute_size(value) for name, value in element.attributes.items())
    return own + sum(written_size(child, depth + 1) for child in element.children)


def _escaped_size(text: str, escaped: str = "&<>'\"\r") -> int:
    return len(text.encode()) + 5 * sum(map(text.count, escaped))


def _attribute_size(value: str) -> int:
    """Return how many bytes a value may have in an attribute.

    Metadata has no encoding in libvirt. So libxml2 writes each character that is not ASCII as a reference, which is up
    to 6 bytes longer (xmlsave.c:xmlBufAttrSerializeTxtContent).
    """
    others = len(value) - len(value.encode("ascii", "ignore"))
    return _escaped_size(value, "&<>'\"\r\t\n") + 6 * others


def count_parts(element: Element) -> int:
    """Return the number of elements and attributes in an element."""
    return 1 + len(element.attributes) + sum(map(count_parts, element.children))


def parse(xml: str, most: int = _MAX_PARTS_READ, depth: int = MAX_DEPTH) -> Text:
    """Parse XML, with the position of each element.

    :param most: elements and attributes that it may have.
    :param depth: how deep elements may be nested.
    :raises DomainXmlError: when it is not well-formed, has a DTD or exceeds a limit.
    """
    # expat rejects what a lone surrogate becomes
    data = xml.encode(errors="surrogatepass")
    _check_length(data)
    top = Element("")
    open_elements = [top]
    pieces: list[list[str]] = []
    """The text of each open element: comments cut it, and adding up strings takes the square of their number."""
    total = 0
    # the data is UTF-8, whatever its XML declaration says
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal total
        total += 1 + len(attributes)
        if total > most or len(open_elements) > depth or len(attributes) > MAX_ATTRIBUTES:
            raise DomainXmlError(
                f"the domain XML has more than {most} elements and attributes, or elements are nested more than "
                f"{depth} deep or have more than {MAX_ATTRIBUTES} attributes",
                hint="no domain needs that many",
            )
        element = Element(tag, attributes, start=parser.CurrentByteIndex)
        open_elements[-1].children.append(element)
        open_elements.append(element)
        pieces.append([])

    def end(tag: str) -> None:
        element, index = open_elements.pop(), parser.CurrentByteIndex
        element.text = "".join(pieces.pop())
        # expat reports the end of <a/> after it, and the end of <a></a> before its end tag
        is_empty = not element.children and not element.text and data[index - 2 : index] == b"/>"
        element.end = index if is_empty else data.index(b">", index) + 1

    def characters(chars: str) -> None:
        pieces[-1].append(chars)

    def doctype(*_: object) -> None:
        raise DomainXmlError(
            "the domain XML has a document type declaration",
            hint="remove the <!DOCTYPE …>; domain XML has none, and entities are not expanded",
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DomainXmlError(
            f"the domain XML cannot be parsed: {error}", hint="'xmllint FILE' shows the place"
        ) from error
    return Text(data, top.children[0])
