# SPDX-License-Identifier: Apache-2.0
"""Parsing of NVDIMMs in domain XML; rewriting and restoring it lose nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from nvdimm_driver.contents.importing import new_nvdimm
from nvdimm_driver.errors import BackingError, DeviceMissingError, DomainXmlError, NvdimmError, UnsupportedError
from nvdimm_driver.model import GIB, KIB, MIB, DomainSpec, NvdimmSpec
from nvdimm_driver.xml.document import decode
from nvdimm_driver.xml.edit_devices import attach, detach, memory_device
from nvdimm_driver.xml.parse_domain import extract, why_none
from nvdimm_driver.xml.rewrite import NAMESPACE, LibxlXmlHook, restore, rewrite

DATA = Path(__file__).parent.parent / "data" / "domxml"
DEVICE_MODEL = "/usr/libexec/xen/bin/nvdimm-device-model"
NAMES = ["guest", "nova", "numa"]

NVDIMM = (
    "<memory model='nvdimm' access='shared'><source><path>/mnt/pmem0/a.img</path></source>"
    "<target><size unit='MiB'>64</size><label><size>128</size></label></target></memory>"
)
DOMAIN = f"""<domain type='xen'>
  <name>g</name>
  <memory unit='GiB'>1</memory>
  <os>
    <type machine='xenfv'>hvm</type>
  </os>
  <devices>
    {NVDIMM}
  </devices>
</domain>
"""


def is_rewritten(xml: str) -> bool:
    return restore(xml) != xml


def read(name: str) -> str:
    return (DATA / f"{name}.xml").read_text()


def domain(nvdimm: str = NVDIMM, **changes: str) -> str:
    """Return DOMAIN with another NVDIMM and other text for its elements: ``memory="<memory>2</memory>"``."""
    tree = etree.fromstring(DOMAIN.replace(NVDIMM, nvdimm))
    for tag, new in changes.items():
        for old in tree.findall(tag):
            tree.remove(old)
        tree.extend(etree.fromstring(f"<x>{new}</x>"))
    return etree.tostring(tree, encoding="unicode")


def with_device(xml: str, device: str) -> str:
    """Return the XML with one more device; the record in its metadata has a </devices> of its own."""
    head, _, tail = xml.rpartition("</devices>")
    return f"{head}{device}</devices>{tail}"


def nvdimm(
    path: str = "/mnt/pmem0/a.img", *, size: str = "<size>65536</size>", source: str = "", more: str = ""
) -> str:
    return f"<memory model='nvdimm'><source><path>{path}</path>{source}</source><target>{size}</target>{more}</memory>"


def spec(nvdimm: str) -> NvdimmSpec:
    found = extract(domain(nvdimm))
    assert found is not None
    return found.nvdimms[0]


def devices_of(root: etree._Element) -> etree._Element:
    found = root.find("devices")
    assert found is not None
    return found


def tidy(xml: str) -> etree._Element:
    """Return the tree without comments, white space, and empty <features> and <metadata>."""
    root = etree.fromstring(xml.encode(), etree.XMLParser(remove_blank_text=True, remove_comments=True))
    for child in root:
        if child.tag in ("features", "metadata") and not len(child):
            root.remove(child)
    for element in root.iter():
        element.tail = None
        if len(element) or not (element.text or "").strip():
            element.text = None
    return root


KIB_OF = {None: 1, "k": 1, "KiB": 1, "MiB": 1 << 10, "G": 1 << 20, "g": 1 << 20, "GiB": 1 << 20}


def meaning(xml: str) -> list[bytes]:
    """Return the domain's parts, whatever the order of elements of different kinds, and the unit of memory."""
    root = tidy(xml)
    for element in root.iter("memory", "currentMemory", "maxMemory", "size", "alignsize"):
        if element.text:
            unit = element.get("unit")
            # libvirt rounds up to KiB; MB is the only unit here that is not a multiple of it
            number = -(-int(element.text) * 1000**2 // 1024) if unit == "MB" else int(element.text) * KIB_OF[unit]
            element.text = str(number)
            element.set("unit", "KiB")
    for parent in (root, devices_of(root), *root.iterfind("devices/memory/source"), *root.iterfind("devices/memory")):
        parent[:] = sorted(parent, key=lambda child: (child.tag, child.get("model", "")))
    return [etree.tostring(part, method="c14n") for part in root]


@pytest.mark.parametrize("name", NAMES)
def test_rewritten_is_the_golden_file(name: str) -> None:
    assert rewrite(read(name), DEVICE_MODEL) == read(f"{name}.rewritten")


@pytest.mark.parametrize("name", NAMES)
def test_restored_from_libvirt_is_the_golden_file(name: str) -> None:
    assert restore(read(f"{name}.libvirt")) == read(f"{name}.restored")


@pytest.mark.parametrize("name", NAMES)
def test_libvirts_form_comes_back_byte_for_byte(name: str) -> None:
    stored = read(f"{name}.libvirt")
    assert rewrite(restore(stored), DEVICE_MODEL) == stored
    assert rewrite(stored, DEVICE_MODEL) == stored


@pytest.mark.parametrize("name", NAMES)
def test_restore_keeps_the_meaning(name: str) -> None:
    assert meaning(restore(rewrite(read(name), DEVICE_MODEL))) == meaning(read(name))


@pytest.mark.parametrize("name", NAMES)
def test_all_forms_say_the_same(name: str) -> None:
    assert extract(read(name)) is not None
    for form in ("rewritten", "libvirt", "restored"):
        assert extract(restore(read(f"{name}.{form}"))) == extract(read(name))
        assert is_rewritten(read(f"{name}.{form}")) == (form != "restored")


OPTIONS = 'xmlns{}="urn:nvdimm-driver:options:1"'


@pytest.mark.parametrize(
    ("metadata", "dsm"),
    [
        ("", None),
        ("<metadata/>", None),
        (f"<metadata><nvdimm:options {OPTIONS.format(':nvdimm')}/></metadata>", None),
        (f"<metadata><nvdimm:options {OPTIONS.format(':nvdimm')} dsm='qemu'/></metadata>", "qemu"),
        (f"<metadata><options {OPTIONS.format('')} dsm='none'></options></metadata>", "none"),
        (f"<metadata {OPTIONS.format(':a')}><a:options dsm='aml'/></metadata>", "aml"),
        ("<metadata><options xmlns='urn:other' dsm='what'/></metadata>", None),
        (f"<metadata {OPTIONS.format(':a')}><a:options xmlns:a='urn:other' dsm='what'/></metadata>", None),
    ],
)
def test_a_domain_can_choose_who_serves_labels(metadata: str, dsm: str | None) -> None:
    xml = DOMAIN.replace("  <memory ", f"  {metadata}\n  <memory ", 1)
    rewritten = rewrite(xml, DEVICE_MODEL)
    for form in (xml, rewritten, restore(rewritten)):
        found = extract(restore(form))
        assert found is not None
        assert found.dsm == dsm


def test_a_domain_can_choose_if_it_is_cached() -> None:
    metadata = f"<metadata><a:options {OPTIONS.format(':a')} dsm='none' cache='uncached'/></metadata>"
    xml = DOMAIN.replace("  <memory ", f"  {metadata}\n  <memory ", 1)
    rewritten = rewrite(xml, DEVICE_MODEL)
    for form in (xml, rewritten, restore(rewritten)):
        found = extract(restore(form))
        assert found is not None
        assert (found.dsm, found.cache) == ("none", "uncached")
    plain = extract(DOMAIN)
    assert plain is not None
    assert plain.cache is None


@pytest.mark.parametrize(
    ("options", "dsm"),
    [
        ("<a:options cache='writeback'/>", None),
        ("<a:options dsm='none' cache=''/>", "none"),
        ("<a:options cache='write-back' dsm='fast'/>", None),
        ("<a:options dsm=''/>", None),
        ("<a:options dms='aml'/>", None),
        ("<a:option dsm='aml'/>", "aml"),
        ("<a:options dsm='aml'><a:more/></a:options>", "aml"),
        ("<a:options dsm='aml'/><a:options dsm='aml'/>", "aml"),
    ],
)
def test_an_option_that_is_not_known_is_refused_but_keeps_no_stored_guest(options: str, dsm: str | None) -> None:
    xml = DOMAIN.replace("<memory ", f"<metadata {OPTIONS.format(':a')}>{options}</metadata><memory ", 1)
    with pytest.raises(DomainXmlError, match=r"dsm|cache"):
        extract(xml)
    stored = extract(xml, stored=True)
    assert stored is not None
    assert (stored.dsm, stored.cache) == (dsm, "uncached")


def test_extract_reads_everything() -> None:
    assert extract(read("guest")) == DomainSpec(
        name="db1",
        uuid="5d7c1a86-0c2c-4c5a-8a3e-9a4c39b2a111",
        ram=4 * GIB,
        emulator=None,
        nvdimms=(
            NvdimmSpec(0, "/dev/pmem1", 16 * GIB, alignsize=2 * MIB, base=0x8000000000, pmem=True),
            NvdimmSpec(1, "/mnt/pmem0/db1.img", 64 * GIB, label_size=128 * KIB),
        ),
        unplaced=frozenset({"/mnt/pmem0/db1.img"}),
        hot_slots=2,
    )
    numa = extract(read("numa"))
    assert numa is not None
    assert (numa.ram, numa.emulator, numa.nvdimms[0].node) == (4 * GIB, "/usr/bin/qemu-system-x86_64", 1)


def test_pci_devices_of_the_host_are_counted() -> None:
    devices = (
        "<hostdev mode='subsystem' type='pci' managed='yes'/><hostdev mode='subsystem' type='usb'/>"
        "<interface type='hostdev'/><interface type='bridge'/>"
    )
    found = extract(domain(NVDIMM + devices))
    assert found is not None
    assert found.pci_devices == 2


def test_devices_that_do_not_reach_the_nvdimms_are_found() -> None:
    disks = (
        "<disk type='file'><target dev='sda' bus='scsi'/></disk><disk type='file'><target dev='xvda'/></disk><disk/>"
    )
    found = extract(domain(NVDIMM + disks))
    assert found is not None
    assert found.emulated == ("lsi53c895a",)
    arguments = "".join(f"<x:arg value='{value}'/>" for value in ("-device", "nvme,drive=a", "-device", "ide-hd"))
    uri = "http://libvirt.org/schemas/domain/xen/1.0"
    for form, names in ((f"<x:commandline xmlns:x='{uri}'>", ("nvme",)), ("<x:commandline xmlns:x='urn:other'>", ())):
        found = extract(DOMAIN.replace("</domain>", f"{form}{arguments}</x:commandline></domain>"))
        assert found is not None
        assert found.emulated == names


def test_a_uuid_is_read_in_lower_case_and_never_invented() -> None:
    found = extract(domain(uuid="<uuid>5D7C1A860C2C4C5A8A3E9A4C39B2A111</uuid>"))
    assert found is not None
    assert found.uuid == "5d7c1a86-0c2c-4c5a-8a3e-9a4c39b2a111"
    without = extract(DOMAIN)
    assert without is not None
    assert without.uuid is None
    assert "uuid" not in rewrite(DOMAIN, DEVICE_MODEL)


@pytest.mark.parametrize(
    "xml",
    [
        DOMAIN.replace(NVDIMM, ""),
        DOMAIN.replace(NVDIMM, "<!-- nvdimm -->"),
        DOMAIN.replace("model='nvdimm'", "model='virtio-pmem'").replace("<name>g", "<name>nvdimm"),
        DOMAIN.replace("type='xen'", "type='kvm'"),
        DOMAIN.replace("type='xen'", "type='kvm'").replace("access='shared'", "access='private'"),
        NVDIMM,
        "<domain type='xen'>not even XML",
        "<!DOCTYPE domain><domain type='xen'/>",
        "",
        "<domain type='xen'>" + "x" * 5 * MIB + "</domain>",
    ],
)
def test_what_is_not_ours_passes_untouched(xml: str) -> None:
    assert rewrite(xml, DEVICE_MODEL) == xml
    assert restore(xml) == xml
    assert extract(xml) is None
    assert not is_rewritten(xml)


def test_a_rewritten_domain_of_another_type_passes_untouched() -> None:
    stored = read("guest.libvirt").replace("type='xen'", "type='kvm'", 1)
    assert restore(stored) == stored
    assert extract(stored) is None


def test_the_users_acpi_table_stays() -> None:
    xml = read("guest")
    rewritten = rewrite(xml, DEVICE_MODEL)
    assert "<acpi>\n      <table type='slic'>/etc/xen/slic.bin</table>\n    </acpi>" in rewritten
    assert meaning(restore(rewritten)) == meaning(xml)


@pytest.mark.parametrize("last", [True, False])
def test_an_nvdimm_added_to_rewritten_xml_joins_the_others(last: bool) -> None:
    new = nvdimm("/mnt/pmem0/new.img")
    added = (
        with_device(read("guest.libvirt"), new)
        if last
        else read("guest.libvirt").replace("<emulator>", new + "<emulator>")
    )
    rewritten = rewrite(added, DEVICE_MODEL)
    found = extract(restore(rewritten))
    assert found is not None
    assert [item.path for item in found.nvdimms] == ["/dev/pmem1", "/mnt/pmem0/db1.img", "/mnt/pmem0/new.img"]
    assert rewritten.count(NAMESPACE) == 1


def test_an_nvdimm_pasted_a_second_time_is_an_error() -> None:
    stored = with_device(rewrite(DOMAIN, DEVICE_MODEL), NVDIMM)
    with pytest.raises(DomainXmlError, match=r"the same <source><path>, /mnt/pmem0/a\.img"):
        rewrite(stored, DEVICE_MODEL)


def test_another_device_model_path_takes_the_place_of_the_old_one() -> None:
    rewritten = rewrite(read("nova.libvirt"), "/opt/new")
    assert DEVICE_MODEL not in rewritten
    assert restore(rewritten) == read("nova.restored")


def test_memory_set_after_the_rewrite_is_kept() -> None:
    changed = read("numa.libvirt").replace("<memory dumpCore='on' unit='KiB'>4194304", "<memory unit='KiB'>4194308")
    assert "<memory unit='KiB'>4194308</memory>" in restore(changed)


ONE_GIB = "<currentMemory unit='KiB'>1048576</currentMemory>"
KEPT_ALONE = '<currentMemory unit="KiB">786432</currentMemory><devices>'


def test_current_memory_above_memory_becomes_that() -> None:
    rewritten = rewrite(domain(currentMemory="<currentMemory unit='GiB'>2</currentMemory>"), DEVICE_MODEL)
    assert ONE_GIB in rewritten
    assert 'currentMemory unit="' not in rewritten
    assert ONE_GIB in restore(rewritten)
    for written, shown in ((3, 3), (9, 4)):  # cells are the RAM, and <memory> is more
        xml = domain(
            memory="<memory unit='GiB'>4</memory>",
            cpu=cells("memory='1' unit='GiB'"),
            currentMemory=f"<currentMemory unit='GiB'>{written}</currentMemory>",
        )
        rewritten = rewrite(xml, DEVICE_MODEL)
        assert ONE_GIB in rewritten
        assert f"<currentMemory unit='KiB'>{shown << 20}</currentMemory>" in restore(rewritten)


def test_current_memory_above_memory_that_an_earlier_version_recorded_does_not_come_back() -> None:
    rewritten = rewrite(domain(currentMemory="<currentMemory unit='GiB'>1</currentMemory>"), DEVICE_MODEL)
    stored = rewritten.replace("<devices>", KEPT_ALONE, 1)
    assert 'GiB">1</currentMemory>' in restore(stored)


def test_features_that_libvirt_adds_stay() -> None:
    """In every x86_64 HVM guest, libxlDomainDefPostParse turns PAE on."""
    stored = read("guest.libvirt").replace("<acpi/>\n", "<acpi/>\n    <pae/>\n")
    restored = restore(stored)
    assert "<features>\n    <pae/>\n  </features>" in restored
    assert rewrite(restored, DEVICE_MODEL) == stored


def test_a_rewritten_domain_without_devices_is_an_error_not_a_loss() -> None:
    root = etree.fromstring(read("guest.libvirt"))
    devices_of(root)[:] = []
    with pytest.raises(DomainXmlError, match="no <emulator>"):
        restore(etree.tostring(root, encoding="unicode"))


def test_the_device_model_cannot_run_itself() -> None:
    xml = DOMAIN.replace(NVDIMM, NVDIMM + f"<emulator>{DEVICE_MODEL}</emulator>")
    with pytest.raises(DomainXmlError, match="is the NVDIMM device model itself"):
        rewrite(xml, DEVICE_MODEL)


def test_text_next_to_elements_is_an_error_not_a_loss() -> None:
    text = DOMAIN.replace("<target>", "<target>64 MiB")
    with pytest.raises(DomainXmlError, match="<target> has both text, '64 MiB', and elements"):
        rewrite(text, DEVICE_MODEL)


def test_an_element_in_metadata_of_the_same_name_but_not_ours_is_the_users() -> None:
    other = "<metadata><nvdimm:domain xmlns:nvdimm='urn:other'/></metadata>"
    assert not is_rewritten(domain(metadata=other) + f"<!-- {NAMESPACE} -->")
    assert "urn:other" in restore(rewrite(domain(metadata=other), DEVICE_MODEL))


@pytest.mark.parametrize("hidden", [NAMESPACE, NAMESPACE.replace(":", "&#58;"), "&#x75;rn:nvdimm-driver:domain:1"])
def test_our_record_is_known_however_it_is_written(hidden: str) -> None:
    record = f"<metadata><nvdimm:domain xmlns:nvdimm='{hidden}'><devices/></nvdimm:domain></metadata>"
    assert is_rewritten(domain(metadata=record))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"<a>\xc3\xa4</a>", "<a>ä</a>"),
        (b"\xef\xbb\xbf<?xml version='1.0' encoding='utf-8'?><a/>", "\ufeff<?xml version='1.0' encoding='utf-8'?><a/>"),
        (b"<?xml version='1.0'?><a>\xc3\xa4</a>", "<?xml version='1.0'?><a>ä</a>"),
        (b"<?xml version='1.0' encoding='us-ascii'?><a/>", "<?xml version='1.0' encoding='us-ascii'?><a/>"),
        (b"<?xml version='1.0' encoding='ISO-8859-1'?>\n<a>\xe4</a>", "\n<a>ä</a>"),
        (b"<?xml version='1.0' encoding='windows-1252'?><a>\x80</a>", "<a>€</a>"),
        (b"no XML", "no XML"),
    ],
)
def test_text_is_read_in_the_encoding_that_it_declares(data: bytes, text: str) -> None:
    assert decode(data) == text


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"<a>\xe4</a>", "not UTF-8, invalid continuation byte at byte 3"),
        (b"<?xml version='1.0' encoding='us-ascii'?><a>\xc3</a>", "not us-ascii.*at byte 44"),
        (b"<?xml version='1.0' encoding='UTF-7'?><a>+AOQ-</a>", "encoding 'UTF-7' is not supported"),
        (b"<?xml version='1.0' encoding='UTF-16'?><a/>", "encoding 'UTF-16' is not supported"),
        (b"<?xml version='1.0' encoding='IBM037'?><a/>", "encoding 'IBM037' is not supported"),
        (b"<?xml version='1.0' encoding='never-heard'?><a/>", "encoding 'never-heard' is not supported"),
    ],
)
def test_text_whose_ascii_would_mean_something_else_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(DomainXmlError, match=problem):
        decode(data)


def test_the_hook_is_the_functions() -> None:
    hook = LibxlXmlHook()
    rewritten = hook.rewrite(DOMAIN, DEVICE_MODEL)
    assert rewritten == rewrite(DOMAIN, DEVICE_MODEL)
    assert hook.restore(rewritten) == restore(rewritten)
    assert "libxl" in hook.describe()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("<size>4096</size>", 4 * MIB),
        ("<size> 4096 </size>", 4 * MIB),
        ("<size unit='bytes'>4194304</size>", 4 * MIB),
        ("<size unit='B'>4194304</size>", 4 * MIB),
        ("<size unit='k'>4096</size>", 4 * MIB),
        ("<size unit='KiB'>4096</size>", 4 * MIB),
        ("<size unit='MB'>4</size>", 4 * MIB),  # 4,000,000 bytes, rounded up
        ("<size unit='mib'>4</size>", 4 * MIB),
        ("<size unit='MiB'>5</size>", 6 * MIB),
        ("<size unit='b'>1</size>", 2 * MIB),
        ("<size unit='GB'>2</size>", 954 * 2 * MIB),
        ("<size unit='T'>1</size>", 1024 * GIB),
        ("<size unit='PiB'>1</size>", 1 << 50),
        ("<size unit='e'>1</size>", 1 << 60),
    ],
)
def test_sizes_are_libvirts(size: str, expected: int) -> None:
    assert spec(nvdimm(size=size)).size == expected


def test_visible_size_is_without_label_and_in_whole_alignments() -> None:
    found = spec(
        nvdimm(
            size="<size unit='MiB'>63</size><label><size unit='KiB'>128</size></label>",
            source="<alignsize unit='MiB'>2</alignsize>",
        )
    )
    assert (found.size, found.visible_size) == (64 * MIB, 62 * MIB)


def test_slots_are_the_users_or_the_lowest_free_ones_in_document_order() -> None:
    many = "".join(
        nvdimm(f"/p/{number}", more=f"<address type='dimm' slot='{slot}'/>" if slot else "")
        for number, slot in enumerate(["", "0", "", "255", "2"])
    )
    found = extract(domain(many))
    assert found is not None
    assert [(item.slot, item.path) for item in found.nvdimms] == [
        (0, "/p/1"),
        (1, "/p/0"),
        (2, "/p/4"),
        (3, "/p/2"),
        (255, "/p/3"),
    ]


def test_256_nvdimms_are_taken_and_257_are_not() -> None:
    most = "".join(nvdimm(f"/p/{number}") for number in range(256))
    found = extract(domain(most))
    assert found is not None
    assert [item.slot for item in found.nvdimms] == list(range(256))
    with pytest.raises(UnsupportedError, match="257 NVDIMMs; a guest can have at most 256"):
        extract(domain(most + nvdimm("/p/256")))


def label(size: str) -> str:
    return nvdimm(size=f"<size unit='MiB'>2</size><label><size unit='KiB'>{size}</size></label>")


def cells(*attributes: str) -> str:
    return "<cpu><numa>" + "".join(f"<cell {each}/>" for each in attributes) + "</numa></cpu>"


WRONG_XML = {
    "no path": (domain(nvdimm("")), "<source><path> is ''"),
    "no source": (domain("<memory model='nvdimm'><target><size>1</size></target></memory>"), "<source><path> is ''"),
    "relative path": (domain(nvdimm("pmem/a.img")), "'pmem/a.img', which is not an absolute path"),
    "no target": (domain("<memory model='nvdimm'><source><path>/a</path></source></memory>"), "<target><size>"),
    "no size": (domain(nvdimm(size="")), "<target><size> is missing"),
    "size 0": (domain(nvdimm(size="<size>0</size>")), "would see nothing of its 0 B"),
    "size not a number": (domain(nvdimm(size="<size>1e3</size>")), "<target><size> is '1e3'"),
    "negative size": (domain(nvdimm(size="<size>-1</size>")), "<target><size> is '-1'"),
    "empty size": (domain(nvdimm(size="<size/>")), "<target><size> is ''"),
    "other digits": (domain(nvdimm(size="<size>٣</size>")), "<target><size> is '٣'"),
    "long size": (domain(nvdimm(size=f"<size>{'9' * 10_000}</size>")), "<target><size> is '999"),
    "huge size": (domain(nvdimm(size="<size unit='EiB'>8</size>")), "<target><size> is 8 EiB"),
    "unknown unit": (domain(nvdimm(size="<size unit='MiBs'>1</size>")), "<target><size> is 'MiBs'"),
    "label without size": (domain(nvdimm(size="<size>1</size><label/>")), "<label> has no <size>"),
    "label below 128 KiB": (domain(label("127")), "its label area has 127 KiB; a label area has 128 KiB or more"),
    "label 0": (domain(label("0")), "its label area has 0 B"),
    "label as large as the size": (domain(label("2048")), "smaller than the NVDIMM"),
    "alignsize no power of two": (domain(nvdimm(source="<alignsize>12</alignsize>")), "<alignsize> is 12 KiB"),
    "alignsize below a page": (domain(nvdimm(source="<alignsize>2</alignsize>")), "<alignsize> is 2 KiB"),
    "alignsize 0": (domain(nvdimm(source="<alignsize>0</alignsize>")), "<alignsize> is 0 KiB"),
    "alignsize above the size": (
        domain(nvdimm(source="<alignsize unit='GiB'>1</alignsize>")),
        "rounded down to multiples of 1 GiB",
    ),
    "access": (domain(NVDIMM.replace("'shared'", "'common'")), "access is 'common'"),
    "discard": (domain(NVDIMM.replace("access=", "discard='maybe' access=")), "discard is 'maybe'"),
    "node that there is not": (
        domain(nvdimm(size="<size>1</size><node>2</node>"), cpu=cells("memory='1'", "memory='1'")),
        "<node> is '2' (it is a decimal number from 0 to 1)",
    ),
    "node without cells": (domain(nvdimm(size="<size>1</size><node>1</node>")), "<node> is '1'"),
    "address type": (domain(nvdimm(more="<address type='pci' slot='1'/>")), "not of type 'dimm'"),
    "no slot": (domain(nvdimm(more="<address type='dimm'/>")), "the slot in <address> is ''"),
    "slot too large": (domain(nvdimm(more="<address type='dimm' slot='256'/>")), "the slot in <address> is '256'"),
    "same slot": (
        domain("".join(nvdimm(path, more="<address type='dimm' slot='3'/>") for path in ("/a", "/b"))),
        "number 1 and 2 are both in slot 3",
    ),
    "same path": (domain(nvdimm("/mnt/a") + nvdimm("/mnt//b/../a")), "slots 0 and 1 have the same <source><path>"),
    "base not hexadecimal": (domain(nvdimm(more="<address type='dimm' slot='0' base='4G'/>")), "base in <address>"),
    "base misaligned": (
        domain(nvdimm(more="<address type='dimm' slot='0' base='0x100000800'/>")),
        "is 0x100000800; it must be a multiple of 0x1000",
    ),
    "base below 4 GiB": (domain(nvdimm(more="<address type='dimm' slot='0' base='0xf0000000'/>")), "0xf0000000"),
    "no RAM": (domain(memory=""), "the domain has no RAM"),
    "RAM 0": (domain(memory="<memory>0</memory>"), "the domain has no RAM"),
    "memory not a number": (domain(memory="<memory>much</memory>"), "<memory> is 'much'"),
    "cell without memory": (domain(cpu=cells("cpus='0'")), "the memory attribute of a <cpu><numa><cell> is ''"),
    "no name": (domain(name=""), "<domain> has no <name>"),
    "bad uuid": (domain(uuid="<uuid>1234</uuid>"), "<uuid> is '1234'"),
    "not well-formed": (DOMAIN.replace("</devices>", ""), "cannot be parsed: mismatched tag"),
    "cut short": (DOMAIN[:-20], "cannot be parsed"),
    "lone surrogate": (DOMAIN.replace("<name>g", "<name>\udc80"), "cannot be parsed"),
    "NUL": (DOMAIN.replace("<name>g", "<name>\0"), "cannot be parsed"),
    "too long": (DOMAIN + " " * 4 * MIB, "libvirt takes 4 MiB at most"),
    "too deep": (DOMAIN.replace(NVDIMM, nvdimm(more="<a>" * 300 + "</a>" * 300)), "nested more than 256 deep"),
}

UNSUPPORTED_XML = {
    "private": (domain(NVDIMM.replace("'shared'", "'private'")), "access='private'"),
    "discard": (domain(NVDIMM.replace("access=", "discard='yes' access=")), "discard='yes'"),
    "uuid": (domain(nvdimm(more="<uuid>5d7c1a86-0c2c-4c5a-8a3e-9a4c39b2a111</uuid>")), "<uuid>"),
    "readonly": (domain(nvdimm(size="<size>1</size><readonly/>")), "<readonly/>"),
    "PV": (
        domain(os="<os><type machine='xenpv'>linux</type></os>"),
        "HVM guest, and <os><type machine='xenpv'> is 'lin",
    ),
    "PV, the old name": (domain(os="<os><type>xen</type></os>"), "is 'xen'"),
    "PVH": (domain(os="<os><type machine='xenpvh'>xenpvh</type></os>"), "is 'xenpvh'"),
    "PVH machine": (domain(os="<os><type machine='xenpvh'>hvm</type></os>"), "machine='xenpvh'"),
    "PV machine": (domain(os="<os><type machine='xenpv'>hvm</type></os>"), "machine='xenpv'"),
    "no os type": (domain(os="<os/>"), "HVM guest"),
    "no os": (domain(os=""), "HVM guest"),
    "populate on demand": (
        domain(currentMemory="<currentMemory unit='MiB'>512</currentMemory>"),
        "<currentMemory> is 524288 KiB and the guest's RAM 1048576 KiB",
    ),
    "populate on demand with cells": (
        domain(cpu=cells("memory='3' unit='GiB'"), currentMemory="<currentMemory unit='GiB'>2</currentMemory>"),
        "<currentMemory> is 2097152 KiB and the guest's RAM 3145728 KiB",
    ),
}


PRIVATE_CELL = cells("id='1' memory='1' memAccess='private'", "id='0' memory='1'")
PRIVATE_BACKING = "<memoryBacking><access mode='private'/></memoryBacking>"
ON_NODE_1 = "<size>65536</size><node>1</node>"
UNSUPPORTED_XML |= {
    "private memory of the domain": (
        domain(nvdimm(), memoryBacking=PRIVATE_BACKING),
        "/mnt/pmem0/a.img: <memoryBacking><access mode='private'/> is not supported",
    ),
    "private cell": (domain(nvdimm(size=ON_NODE_1), cpu=PRIVATE_CELL), "a.img: memAccess='private' of its <cpu>"),
    "private cell, another way of writing its number": (
        domain(nvdimm(size="<size>65536</size><node> 01</node>"), cpu=PRIVATE_CELL.replace("id='1'", "id='001'")),
        "memAccess='private'",
    ),
    "private cell in a shared domain": (
        domain(nvdimm(size=ON_NODE_1), cpu=PRIVATE_CELL, memoryBacking=PRIVATE_BACKING.replace("private", "shared")),
        "memAccess='private'",
    ),
    "private first cell without a number, NVDIMM without a node": (
        domain(nvdimm(), cpu=cells("memory='1' memAccess='private'")),
        "memAccess='private'",
    ),
    "private NVDIMM in a shared cell": (
        domain(nvdimm().replace("'nvdimm'", "'nvdimm' access='private'"), cpu=cells("memory='1' memAccess='shared'")),
        "access='private' is not supported",
    ),
    "dimm": (
        domain(NVDIMM + "<memory model='dimm'><target><size>1</size></target></memory>"),
        "<memory model='dimm'> in <devices>",
    ),
    "sgx-epc": (
        domain(NVDIMM + "<memory model='sgx-epc'><target><size>1</size></target></memory>"),
        "<memory model='sgx-epc'> in <devices>",
    ),
    "no model": (
        domain(NVDIMM + "<memory><target><size>1</size></target></memory>"),
        "<memory> without a model in <devices>",
    ),
}
WRONG_XML |= {
    "attribute": (domain(NVDIMM.replace("access=", "acces=")), "a.img: <memory> has the attribute acces, which an"),
    "attribute of a size": (domain(nvdimm(size="<size Unit='MiB'>64</size>")), "<size> has the attribute Unit"),
    "attribute of the address": (
        domain(nvdimm(more="<address type='dimm' slot='0' Base='0x180000000'/>")),
        "<address> has the attribute Base",
    ),
    "attribute of a namespace": (
        domain(nvdimm().replace("<target>", "<target xmlns:a='urn:a' a:b='c'>")),
        "<target> has the attribute",
    ),
    "element": (domain(nvdimm(more="<foo/>")), "<memory> has <foo>, which an NVDIMM does not have there"),
    "element in source": (domain(nvdimm(source="<alignSize>4</alignSize>")), "<source> has <alignSize>"),
    "element in target": (
        domain(nvdimm(size="<size>65536</size><lable><size>128</size></lable>")),
        "<target> has <lable>, which an NVDIMM does not have there (remove it, or correct its spelling; <target> can "
        "have <size>, <node>, <label>, <readonly>)",
    ),
    "element in a size": (domain(nvdimm(size="<size>65536<a/></size>")), "<size> has <a>"),
    "element of virtio-mem": (domain(nvdimm(size="<size>65536</size><requested>0</requested>")), "has <requested>"),
    "two sizes": (domain(nvdimm(size="<size>65536</size><size>1</size>")), "<target> has 2 <size>"),
    "two labels": (
        domain(nvdimm(size="<size>65536</size>" + "<label><size>128</size></label>" * 2)),
        "<target> has 2 <label>",
    ),
}


@pytest.mark.parametrize(
    ("element", "cpu", "backing"),
    [
        (nvdimm(), "", ""),
        (NVDIMM, "", PRIVATE_BACKING),
        (NVDIMM, cells("memory='1' memAccess='private'"), PRIVATE_BACKING),
        (nvdimm(), cells("memory='1' memAccess='shared'"), PRIVATE_BACKING),
        (nvdimm(size=ON_NODE_1), cells("memory='1' memAccess='private'", "memory='1'"), ""),
        (nvdimm(), "", "<memoryBacking><source type='memfd'/></memoryBacking>"),
    ],
)
def test_the_first_of_nvdimm_cell_and_domain_says_whether_it_is_private(element: str, cpu: str, backing: str) -> None:
    assert extract(domain(element, cpu=cpu, memoryBacking=backing)) is not None


def shown(device: str) -> str:
    """Return what a user sees of an NVDIMM after a define."""
    xml = restore(rewrite(DOMAIN.replace(NVDIMM, device), DEVICE_MODEL))
    return xml[xml.index("    <memory model") : xml.index("  </devices>")]


def test_an_nvdimm_is_shown_as_libvirt_shows_it() -> None:
    written = (
        '<memory discard="no" model="nvdimm" access="shared">'
        '<address base="0X180000000" slot="3" type="dimm"/><alias name="ua-x"/>'
        '<target><label><size unit="MB">1</size></label><node> 0 </node><size unit="b">67108865</size></target>'
        '<source><pmem>yes</pmem><alignsize unit="MiB">2</alignsize><path>/mnt/it\'s</path></source></memory>'
    )
    assert (
        shown(written)
        == """    <memory model='nvdimm' access='shared' discard='no'>
      <source>
        <path>/mnt/it&apos;s</path>
        <alignsize unit='KiB'>2048</alignsize>
        <pmem/>
      </source>
      <target>
        <size unit='KiB'>65537</size>
        <node>0</node>
        <label>
          <size unit='KiB'>977</size>
        </label>
      </target>
      <alias name='ua-x'/>
      <address type='dimm' slot='3' base='0x180000000'/>
    </memory>
"""
    )
    assert "alias" not in shown(nvdimm(more="<alias name='nvdimm0'/>"))
    assert "base" not in shown(nvdimm(more="<address type='dimm' slot='0' base='0x0'/>"))


@pytest.mark.parametrize("other", [NVDIMM, "<disk><alias name='ua-x'/></disk>"])
def test_two_devices_have_no_alias_in_common(other: str) -> None:
    """As on KVM."""
    alias = "<alias name='ua-x'/></memory>"
    first, second = (NVDIMM.replace("</memory>", alias), other.replace("/mnt/", "/other/").replace("</memory>", alias))
    with pytest.raises(DomainXmlError, match="another device has <alias name='ua-x'>, too"):
        extract(domain(first + second))
    assert extract(domain(first))


def test_a_record_of_an_earlier_version_is_shown_in_kib() -> None:
    stored = read("guest.libvirt")
    earlier = stored.replace('<size unit="KiB">67108864<', '<size unit="GiB">64<')
    earlier = earlier.replace('slots="2" unit="KiB">209715200', 'slots="2" unit="GiB">200')
    assert earlier.count("GiB") == 2
    assert restore(earlier) == read("guest.restored")
    assert rewrite(earlier, DEVICE_MODEL) == stored


def test_a_broken_record_is_shown_as_it_is_and_refused() -> None:
    stored = read("guest.libvirt").replace('"KiB">67108864<', '"KiB">much<').replace('"KiB">209715200<', '"XiB">1<')
    assert "<size unit='KiB'>much</size>" in restore(stored)
    assert "<maxMemory slots='2' unit='XiB'>1</maxMemory>" in restore(stored)
    with pytest.raises(DomainXmlError, match="<size> is 'much'"):
        extract(restore(stored))


def test_what_an_earlier_version_kept_of_an_unknown_part_is_shown_and_refused_in_a_new_definition() -> None:
    stored = rewrite(DOMAIN, DEVICE_MODEL).replace('access="shared"', 'acces="private"')
    assert "acces='private'" in restore(stored)
    with pytest.raises(DomainXmlError, match="the attribute acces"):
        extract(restore(stored))
    assert extract(restore(stored), stored=True) == extract(DOMAIN)


def check_error(xml: str, kind: type[NvdimmError], text: str) -> None:
    for function in (extract, lambda xml: rewrite(xml, DEVICE_MODEL)):
        with pytest.raises(kind) as caught:
            function(xml)
        assert text in str(caught.value)
        assert caught.value.hint


@pytest.mark.parametrize("case", WRONG_XML)
def test_nonsense_is_an_error(case: str) -> None:
    check_error(WRONG_XML[case][0], DomainXmlError, WRONG_XML[case][1])


@pytest.mark.parametrize("case", UNSUPPORTED_XML)
def test_what_xen_cannot_do_is_an_error(case: str) -> None:
    check_error(UNSUPPORTED_XML[case][0], UnsupportedError, UNSUPPORTED_XML[case][1])


@pytest.mark.parametrize(
    "doctype",
    [
        "<!DOCTYPE domain>",
        "<!DOCTYPE domain [<!ENTITY a 'x'><!ENTITY b '&a;&a;&a;'>]>",
        "<!DOCTYPE domain [<!ENTITY a SYSTEM 'file:///etc/hostname'>]>",
        "<!DOCTYPE domain SYSTEM 'http://{address}/domain.dtd'>",
    ],
)
def test_entities_are_refused_and_nothing_is_fetched(doctype: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        here = doctype.replace("{address}", f"127.0.0.1:{server.getsockname()[1]}")
        check_error(here + DOMAIN, DomainXmlError, "document type declaration")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_the_deepest_xml_that_libvirt_reads_goes_through() -> None:
    depth = 256 - 2
    xml = domain(metadata="<metadata>" + "<a>" * depth + "</a>" * depth + "</metadata>")
    assert extract(restore(rewrite(xml, DEVICE_MODEL)))
    with pytest.raises(DomainXmlError, match="nested more than 256 deep"):
        extract(xml.replace("<metadata>", "<metadata><a>").replace("</metadata>", "</a></metadata>"))


# --- properties ---

# XML has no other control characters, and a reader turns a carriage return into a line feed
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="￾￿"), min_size=1, max_size=8)
SPACE = st.text(" \t\n", max_size=6)
OTHER_DEVICES = [
    "<disk type='file'><source file='/a'/><target dev='xvda'/></disk>",
    "<console type='pty'/>",
    '<memballoon model="xen"/>',
    "<vsock model='virtio'/>",
    "<!-- nvdimm -->",
]
METADATA = ['<a:b xmlns:a="urn:a"/>', "<c:d xmlns:c='urn:c'><c:e f='&lt;'>g</c:e></c:d>"]


@st.composite
def nvdimms(draw: st.DrawFn) -> list[str]:
    paths = draw(st.lists(TEXT.filter(lambda text: text.strip("./")), min_size=1, max_size=4, unique=True))
    elements = []
    for number, path in enumerate(paths):
        element = etree.Element("memory", model="nvdimm")
        if draw(st.booleans()):
            element.set("access", "shared")
        etree.SubElement(etree.SubElement(element, "source"), "path").text = f"/{number}/{path.replace('/', '_')}"
        target = etree.SubElement(element, "target")
        etree.SubElement(target, "size", unit=draw(st.sampled_from(["KiB", "MB", "g"]))).text = str(
            draw(st.integers(1000, 5000))
        )
        if draw(st.booleans()):
            etree.SubElement(etree.SubElement(target, "label"), "size").text = "128"
        if draw(st.booleans()):
            etree.SubElement(element, "address", type="dimm", slot=str(100 + number))
        elements.append(element)
    return [etree.tostring(element, encoding="unicode") for element in elements]


@st.composite
def domains(draw: st.DrawFn) -> str:
    """Draw domain XML as people write it: any order, any white space."""
    ram = draw(st.integers(1, 1 << 20))
    devices = draw(st.lists(st.sampled_from(OTHER_DEVICES), unique=True)) + draw(nvdimms())
    devices += draw(st.sampled_from([[], ["<emulator>/usr/bin/qemu</emulator>"], ["<emulator/>"]]))
    parts = [
        f"<name>{draw(st.sampled_from(['g', 'é', '&amp;']))}</name>",
        f"<memory unit='MiB'>{ram}</memory>",
        "<os><type>hvm</type></os>",
        "<devices>"
        + "".join(draw(SPACE) + part for part in draw(st.permutations(devices)))
        + draw(SPACE)
        + "</devices>",
    ]
    optional = [
        f"<currentMemory unit='MiB'>{ram}</currentMemory>",
        "<maxMemory slots='4'>8</maxMemory>",
        "<description>&lt;a/></description>",
        f"<cpu><numa><cell memory='{ram}' unit='MiB'/></numa></cpu>",
        draw(st.sampled_from(["<features/>", "<features></features>", "<features>\n<pae/></features>"])),
        "<metadata>" + "".join(draw(st.lists(st.sampled_from(METADATA), unique=True))) + "</metadata>",
    ]
    parts += draw(st.lists(st.sampled_from(optional), unique=True))
    declaration = draw(st.sampled_from(["", "<?xml version='1.0' encoding='UTF-8'?>\n"]))
    body = "".join(draw(SPACE) + part for part in draw(st.permutations(parts)))
    return f"{declaration}<domain type='xen'>{body}{draw(SPACE)}</domain>{draw(SPACE)}"


def indent(xml: str) -> str:
    """Return the domain as libvirt formats it: in its order, 2 spaces per level, no comments, a line per element."""
    order = [
        "name",
        "description",
        "metadata",
        "maxMemory",
        "memory",
        "currentMemory",
        "os",
        "features",
        "cpu",
        "devices",
    ]
    device_order = ["emulator", "disk", "console", "memballoon", "memory", "vsock"]
    root = tidy(xml)
    root[:] = sorted(root, key=lambda child: order.index(str(child.tag)))
    devices = devices_of(root)
    devices[:] = sorted(devices, key=lambda child: device_order.index(str(child.tag)))
    etree.indent(root)
    return etree.tostring(root, encoding="unicode") + "\n"


@given(domains())
def test_restoring_keeps_the_meaning(xml: str) -> None:
    rewritten = rewrite(xml, DEVICE_MODEL)
    assert is_rewritten(rewritten)
    assert "model='nvdimm'" not in rewritten
    assert meaning(restore(rewritten)) == meaning(xml)
    assert extract(restore(rewritten)) == extract(xml)


@given(domains())
def test_what_is_shown_does_not_change_again(xml: str) -> None:
    shown = restore(rewrite(xml, DEVICE_MODEL))
    assert restore(rewrite(shown, DEVICE_MODEL)) == shown


@given(domains())
def test_in_libvirts_form_rewriting_undoes_restoring_to_the_byte(xml: str) -> None:
    stored = rewrite(indent(xml), DEVICE_MODEL)
    assert rewrite(restore(stored), DEVICE_MODEL) == stored


@settings(max_examples=50)
@given(domains())
def test_all_that_is_not_cut_or_changed_stays_in_order(xml: str) -> None:
    """Rewriting changes none of the other elements."""
    root = etree.fromstring(xml.encode())
    rewritten = rewrite(xml, DEVICE_MODEL)
    for text in [*OTHER_DEVICES, *METADATA[:1], "<os><type>hvm</type></os>", "<description>&lt;a/></description>"]:
        assert xml.count(text) == rewritten.count(text)
    assert root.findtext("name") == etree.fromstring(rewritten.encode()).findtext("name")


@settings(max_examples=30)
@given(st.text(st.characters(codec="utf-8")), st.text(st.sampled_from("<>/&;'\"= a!-[]"), max_size=30))
def test_any_text_is_parsed_or_refused(text: str, markup: str) -> None:
    for xml in (DOMAIN.replace("<os>", f"{markup}<os>"), DOMAIN + text):
        try:
            rewritten = rewrite(xml, DEVICE_MODEL)
        except DomainXmlError:
            continue
        assert is_rewritten(rewritten)


@pytest.mark.parametrize(
    ("size", "label_size", "printed"),
    [
        (64 << 30, 0, "<target>\n    <size unit='GiB'>64</size>\n  </target>"),
        (34 << 20, 128 << 10, "<size unit='MiB'>34</size>\n    <label>\n      <size unit='KiB'>128</size>"),
        ((1 << 40) + (2 << 20), 2 << 20, "<size unit='MiB'>1048578</size>"),
    ],
)
def test_an_nvdimm_of_ones_own(size: int, label_size: int, printed: str) -> None:
    spec = new_nvdimm("/mnt/a & b", size, label_size)
    assert (spec.path, spec.size, spec.label_size) == ("/mnt/a & b", size, label_size)
    device = memory_device(spec)
    assert device.startswith("<memory model='nvdimm' access='shared'>\n  <source>\n    <path>/mnt/a &amp; b</path>\n")
    assert printed in device
    domain = "<domain type='xen'><name>a</name><memory>1048576</memory><os><type>hvm</type></os><devices/></domain>"
    found = extract(attach(domain, device))
    assert found is not None
    assert found.nvdimms == (spec,)


FULL = (
    "<memory model='nvdimm' access='shared'><source><path>/a</path><pmem/></source>"
    "<target><size unit='MiB'>64</size><node>0</node><label><size>128</size></label></target>"
    "<alias name='ua-a'/><address type='dimm' slot='3' base='0x180000000'/></memory>"
)
SHORT = "<memory model='nvdimm'><source><path>/a</path></source><target><size>65536</size></target>{}</memory>"
ADDRESS = "<address type='dimm' slot='{}'/>"


@pytest.mark.parametrize(
    "device",
    [
        FULL,
        SHORT.format(""),
        FULL.replace("unit='MiB'>64", "unit='KB'>67108"),
        FULL.replace("<pmem/>", "").replace("shared", "private"),
        SHORT.format("<alias name='nvdimm0'/>"),
        SHORT.format("<address type='dimm' slot='3'/>"),
    ],
)
def test_an_nvdimm_is_detached_by_all_that_is_given(device: str) -> None:
    assert detach(domain(NVDIMM + FULL), device) == domain()


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        (SHORT.replace("/a", "/b").format(""), r"no NVDIMM with <source><path> '/b' \('virsh dumpxml' shows them\)"),
        (SHORT.replace("65536", "65537").format(""), "NVDIMM /a has another size: 65536 KiB, and not 65537 KiB"),
        (FULL.replace("<size>128<", "<size>256<"), "another label area: 128 KiB, and not 256 KiB"),
        (FULL.replace("<node>0", "<node>1"), "another node: 0, and not 1"),
        (FULL.replace("slot='3'", "slot='4'"), "another slot: 3, and not 4"),
        (FULL.replace("0x180000000", "0x190000000"), "another base: 0x180000000, and not 0x190000000"),
        (FULL.replace("ua-a", "ua-b"), "another alias: ua-a, and not ua-b"),
    ],
)
def test_an_nvdimm_that_is_another_is_not_detached(device: str, problem: str) -> None:
    with pytest.raises(DeviceMissingError, match=f"^device not found: .*{problem}"):
        detach(domain(NVDIMM + FULL), device)


def test_an_address_counts_only_if_the_nvdimm_has_one_in_the_definition() -> None:
    assert detach(domain(NVDIMM + SHORT.format("")), SHORT.format(ADDRESS.format(7))) == domain()
    with pytest.raises(DeviceMissingError, match="another label area: none, and not 128 KiB"):
        detach(domain(SHORT.format("")), FULL)


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        (DOMAIN.replace("'xen'", "'kvm'"), "it is of type 'kvm': write <domain type='xen'>"),
        (DOMAIN.replace(" type='xen'", ""), "it has no type: write <domain type='xen'>"),
        (NVDIMM, "its root element is <memory>, and not <domain>"),
        (DOMAIN.replace(NVDIMM, ""), "it has no <memory model='nvdimm'> in <devices>"),
    ],
)
def test_why_xml_has_no_nvdimms_for_xen_is_said(xml: str, why: str) -> None:
    assert extract(xml) is None
    assert why_none(xml) == why


def test_sizes_of_an_nvdimm_of_ones_own() -> None:
    assert new_nvdimm("/a", (2 << 20) + 1, 0).size == 4 << 20
    for size, label_size in ((0, 0), (2 << 20, 1), (2 << 20, 2 << 20)):
        with pytest.raises(BackingError, match=r"/a: .*--size"):
            new_nvdimm("/a", size, label_size)
