# SPDX-License-Identifier: Apache-2.0
"""XML of clients: what libvirt would read in it and the driver would not, or the other way round, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvdimm_driver.errors import DomainXmlError, UnsupportedError
from nvdimm_driver.xml.client_xml import check_metadata, check_plain, check_room, check_text, read_device, read_domain
from nvdimm_driver.xml.document import MAX_CLIENT_DEPTH, MAX_NAME, MAX_PARTS, MAX_WRITTEN, parse
from nvdimm_driver.xml.rewrite import NAMESPACE, rewrite
from tests.unit.doubles import counted

DEVICE_MODEL = "/usr/libexec/xen/bin/nvdimm-device-model"
UUID = "7c7b0e2e-4a6e-4f0e-9a3b-000000000001"
NVDIMM = "<memory model='nvdimm'><source><path>/mnt/pmem0/a</path></source><target><size>65536</size></target></memory>"
PLAIN = (
    f"<domain type='xen'><name>db1</name><uuid>{UUID}</uuid><memory>524288</memory><os><type>hvm</type></os>"
    "<features><acpi/></features><devices>{}</devices></domain>"
)
DOMAIN = PLAIN.format(NVDIMM)
FORGED = rewrite(DOMAIN, DEVICE_MODEL)
ENTITIES = (
    f"<!DOCTYPE domain [<!ENTITY n '{NAMESPACE[:9]}'><!ENTITY m 'nvd'><!ENTITY e '{DEVICE_MODEL[:9]}'>"
    "<!ATTLIST x type CDATA 'xen'>]>"
)
EMULATOR = "<emulator>{}</emulator>"


def named(text: str, encoding: str) -> bytes:
    return f"<?xml version='1.0' encoding='{encoding}'?>{text}".encode(errors="surrogateescape")


def test_a_domain_is_read() -> None:
    read = read_domain(DOMAIN.encode(), DEVICE_MODEL)
    assert read.text == DOMAIN
    assert read.domain
    assert (read.domain.uuid, read.domain.nvdimms[0].path) == (UUID, "/mnt/pmem0/a")
    assert read_domain(PLAIN.format("").encode(), DEVICE_MODEL).domain is None
    assert read_domain(DOMAIN.replace("'xen'", "'kvm'").encode(), DEVICE_MODEL).other_type == "kvm"
    limited = PLAIN.format("").replace("<memory>", "<maxMemory slots='1'>9999999</maxMemory><memory>", 1)
    read = read_domain(limited.encode(), DEVICE_MODEL)
    assert (read.uuid, read.is_limited) == (UUID, True)


@pytest.mark.parametrize(
    "more",
    [
        "<!-- urn:nvdimm-driver:domain:1 -->",
        "<metadata><a:b xmlns:a='urn:a' a:c='&#10;&lt;'>x<a:d/>y</a:b><b xmlns='urn:b'><c/></b></metadata>",
        "<?target with nvdimm?><title>a &amp; <![CDATA[<b>]]> <!-- c --> d&#13;</title>",
        "<x:commandline xmlns:x='http://libvirt.org/schemas/domain/xen/1.0'><x:arg value='-k'/></x:commandline>",
        "<description>\r\n\t G\u00e4ste \u5ba2 \U0001f600</description>",
        "<memtune/><vcpu placement = 'static'\n>2</vcpu >",
    ],
)
def test_what_users_write_is_read(more: str) -> None:
    for text in (DOMAIN, PLAIN.format("")):
        data = text.replace("<os>", f"{more}<os>").encode()
        assert (read_domain(data, DEVICE_MODEL).domain is None) == (text != DOMAIN)


@pytest.mark.parametrize(
    "text",
    [
        FORGED,
        FORGED.replace("<domain", "<x:domain xmlns:x='urn:x'", 1).replace("</domain>", "</x:domain>"),
        FORGED.replace("type='xen'", "x:type='xen' xmlns:x='urn:x'"),
        FORGED.replace("type='xen'", "x:type='xen' type='kvm' xmlns:x='urn:x'"),
        FORGED.replace("type='xen'", "type='kvm'"),
        FORGED.replace("nvdimm:", "n:").replace("xmlns:nvdimm", "xmlns:n"),
        FORGED.replace(NAMESPACE, NAMESPACE.replace(":", "&#58;")),
        ENTITIES + FORGED.replace(NAMESPACE[:9], "&n;"),
        ENTITIES + FORGED.replace(NAMESPACE[:9], "&n;").replace("<domain type='xen'", "<domain "),
        FORGED.replace("<domain ", f"<domain xmlns:nvdimm='{NAMESPACE}' ", 1).replace(
            f' xmlns:nvdimm="{NAMESPACE}"', ""
        ),
        FORGED.replace("<metadata>", f"<metadata xmlns:nvdimm='{NAMESPACE}'>").replace(
            f' xmlns:nvdimm="{NAMESPACE}"', ""
        ),
        FORGED.replace("<metadata>", "<metadata/><metadata>"),
        FORGED.replace("<metadata>", f"<metadata><domain xmlns='{NAMESPACE}'/>"),
    ],
)
def test_forged_metadata_is_refused(text: str) -> None:
    with pytest.raises(DomainXmlError):
        read_domain(text.encode(), DEVICE_MODEL)


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ("<a>" + "<b/>" * (MAX_PARTS // 2) + "</a>", "more than 50000 elements"),
        (f"<a>{'x' * (MAX_WRITTEN // 2)}</a>", "would have .* as libvirt writes it, and may have 2 MiB"),
        ("<a>" + "'" * (MAX_WRITTEN // 7) + "</a>", "as libvirt writes it"),
    ],
)
def test_metadata_are_refused_before_nobody_could_read_the_domain(value: str, refused: str) -> None:
    added = check_metadata(value.encode(), "k", "urn:x")
    check_room(PLAIN.format(""), added)
    full = PLAIN.format("").replace("<os>", f"<metadata>{value}</metadata><os>")
    parse(full)
    with pytest.raises(DomainXmlError, match=refused):
        check_room(full, added)


def test_a_title_is_counted_as_it_is_escaped() -> None:
    check_room(PLAIN.format(""), check_text("x" * (MAX_WRITTEN - 10_000)))
    for title in ("x" * MAX_WRITTEN, "'" * (MAX_WRITTEN // 5)):
        with pytest.raises(DomainXmlError, match="as libvirt writes it"):
            check_room(PLAIN.format(""), check_text(title))


def test_a_name_is_one_that_libxml2_reads() -> None:
    check_plain("k" * MAX_NAME)
    with pytest.raises(DomainXmlError, match="a name in XML may have"):
        check_plain("k" * MAX_NAME + "k")


def test_what_libvirt_makes_of_the_deepest_and_largest_can_be_read() -> None:
    value = "<a>" * MAX_CLIENT_DEPTH + "</a>" * MAX_CLIENT_DEPTH
    check_metadata(value.encode(), "k", "urn:x")
    parse(f"<domstatus>{PLAIN.format('').replace('<os>', f'<metadata>{value}</metadata><os>')}</domstatus>")
    with pytest.raises(DomainXmlError, match="248 deep"):
        check_metadata(f"<a>{value}</a>".encode(), "k", "urn:x")
    nested = "<a>" * 200 + "<b/>" * 20_000 + "</a>" * 200
    with pytest.raises(DomainXmlError, match="as libvirt writes it"):
        check_metadata(nested.encode(), "k", "urn:x")


def test_a_long_emulator_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can run it, and Python's realpath takes half an hour for the longest."""
    calls = counted(monkeypatch)
    read_domain(PLAIN.format(EMULATOR.format("/a" * 20_000)).encode(), DEVICE_MODEL)
    assert sum(calls.values()) < 100


@pytest.mark.parametrize(
    "emulator",
    [
        EMULATOR.format(DEVICE_MODEL),
        EMULATOR.format(DEVICE_MODEL.replace("/", "&#x2f;")),
        EMULATOR.format(f"<![CDATA[{DEVICE_MODEL[:9]}]]>{DEVICE_MODEL[9:]}"),
        EMULATOR.format(f"{DEVICE_MODEL[:9]}<!-- x -->{DEVICE_MODEL[9:]}"),
        EMULATOR.format(f"{DEVICE_MODEL[:9]}<?x?>{DEVICE_MODEL[9:]}"),
        EMULATOR.format(f"<x>{DEVICE_MODEL}</x>"),
        EMULATOR.format(f"<x>{DEVICE_MODEL[:9]}</x>{DEVICE_MODEL[9:]}"),
        f"</devices><devices>{EMULATOR.format(DEVICE_MODEL)}",
    ],
)
def test_the_device_model_is_refused_however_it_is_written(emulator: str) -> None:
    with pytest.raises(DomainXmlError):
        read_domain(PLAIN.format(emulator).encode(), DEVICE_MODEL)


def test_the_device_model_is_refused_by_every_path(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    device_model, link = tmp_path / "device-model", tmp_path / "link"
    device_model.touch()
    link.symlink_to(device_model)
    for path in (f"{tmp_path}/folder/../device-model", f"/{device_model}", link):
        with pytest.raises(DomainXmlError, match="names the device model"):
            read_domain(PLAIN.format(EMULATOR.format(path)).encode(), str(device_model))
    with pytest.raises(DomainXmlError, match="names the device model"):
        read_domain(PLAIN.format(EMULATOR.format(device_model)).encode(), str(link))
    assert read_domain(PLAIN.format(EMULATOR.format("/usr/bin/qemu")).encode(), str(device_model)).domain is None


def test_an_entity_hides_nothing() -> None:
    for text in (PLAIN.format(EMULATOR.format(f"&e;{DEVICE_MODEL[9:]}")), DOMAIN.replace("nvd", "&m;")):
        with pytest.raises(DomainXmlError, match="document type declaration"):
            read_domain((ENTITIES + text).encode(), DEVICE_MODEL)


@pytest.mark.parametrize(
    "text",
    [
        DOMAIN.replace(UUID, f"{UUID}<x/>"),
        DOMAIN.replace("<name>db1<", "<name>db1<x>2</x><"),
        DOMAIN.replace("<memory>524288<", "<memory>524288<x>0</x><"),
        DOMAIN.replace("<memory>", "<memory>1</memory><memory>", 1),
        DOMAIN.replace("<uuid>", f"<uuid>{UUID[:-1]}2</uuid><uuid>"),
        DOMAIN.replace("<devices>", "<devices/><devices>"),
        DOMAIN.replace("<devices>", "<devices xmlns='urn:x'>"),
        DOMAIN.replace("<domain", "<domain xmlns='urn:x'", 1),
        DOMAIN.replace("<memory m", "<memory xml:base='x' m"),
        DOMAIN.replace("<memory m", "<memory xmlns:x='urn:x' x:model='dimm' m"),
        DOMAIN.replace("<domain", "<x:domain", 1).replace("</domain", "</x:domain"),
        DOMAIN.replace("<memory m", "<memory model='dimm' m"),
        DOMAIN.replace("db1", "db\ufffe"),
    ],
)
def test_what_libvirt_reads_in_another_way_is_refused(text: str) -> None:
    with pytest.raises(DomainXmlError):
        read_domain(text.encode(), DEVICE_MODEL)


@pytest.mark.parametrize(
    "data",
    [
        named(FORGED.replace(":", "+ADo-"), "UTF-7"),
        named(FORGED, "UTF-16"),
        FORGED.encode("utf-16"),
        FORGED.encode("utf-32-le"),
        FORGED.encode("cp037"),
        named(FORGED, "IBM037"),
        named(DOMAIN, "no such encoding"),
        named(DOMAIN.replace("db1", "\udcff"), "UTF-8"),
    ],
)
def test_no_encoding_hides_anything(data: bytes) -> None:
    with pytest.raises(DomainXmlError):
        read_domain(data, DEVICE_MODEL)


def test_other_encodings_are_read_as_libvirt_reads_them() -> None:
    text = DOMAIN.replace("pmem0/a", "pmem0/\u00e4")
    for encoding in ("UTF-8", "ISO-8859-1", "windows-1252", "iso-8859-15"):
        read = read_domain(f"<?xml version='1.0' encoding='{encoding}'?>{text}".encode(encoding), DEVICE_MODEL)
        assert read.domain
        assert read.domain.nvdimms[0].path == "/mnt/pmem0/\u00e4"
    assert read_domain(b"\xef\xbb\xbf" + DOMAIN.encode(), DEVICE_MODEL).domain


@pytest.mark.parametrize("parts", ["<a/>", "<a b=''/>", "<a>" * 200 + "</a>" * 200])
def test_too_many_elements_are_refused(parts: str) -> None:
    attributes = " ".join(f"a{number}=''" for number in range(300))
    for more in (parts * (MAX_PARTS // parts.count("<a")), "<a>" * 300 + "</a>" * 300, f"<a {attributes}/>"):
        with pytest.raises(DomainXmlError, match="no domain needs that many"):
            read_domain(PLAIN.format(more).encode(), DEVICE_MODEL)


def test_text_in_many_pieces_is_read() -> None:
    pieces = "a<!---->" * 200_000
    assert read_domain(DOMAIN.replace("<os>", f"<title>{pieces}</title><os>").encode(), DEVICE_MODEL).domain


def test_a_device_is_read() -> None:
    assert read_device(NVDIMM.encode())[:2] == (NVDIMM, True)
    assert read_device(b"<memory model='nvd&#105;mm'/>")[1]
    assert not read_device(b"<disk/>")[1]
    with pytest.raises(UnsupportedError, match=r"<memory model='dimm'> .*NVDIMMs are the only memory devices"):
        read_device(b"<memory model='dimm'><!-- nvdimm --></memory>")
    for text in (
        NVDIMM.replace("<memory", "<x:memory xmlns:x='urn:x'").replace("</memory", "</x:memory"),
        NVDIMM.replace("model", "x:model").replace("<memory", "<memory xmlns:x='urn:x'"),
        NVDIMM.replace("<memory", "<memory xmlns='urn:x'"),
        ENTITIES + NVDIMM.replace("nvd", "&m;"),
    ):
        with pytest.raises(DomainXmlError):
            read_device(text.encode())


@pytest.mark.parametrize("hidden", [NAMESPACE, NAMESPACE.replace(":", "&#58;"), "&#x75;rn:nvdimm-driver:domain:1"])
def test_metadata_of_ours_are_known_however_they_are_written(hidden: str) -> None:
    with pytest.raises(DomainXmlError, match="own metadata"):
        check_metadata(f"<a><b xmlns:c='{hidden}'/></a>".encode(), "k", "urn:x")
    with pytest.raises(DomainXmlError, match="own metadata"):
        check_metadata(f"<a xmlns='{hidden}'/>".encode(), "k", "urn:x")


def test_metadata_that_speak_of_our_name_space_are_the_users() -> None:
    check_metadata(f"<a b='{NAMESPACE} '>{NAMESPACE}</a>".encode(), "k", "urn:x")
