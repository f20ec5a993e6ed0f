# SPDX-License-Identifier: Apache-2.0
"""Rewritten and restored domain XML against libvirt's own schema, parser and formatter.

The test driver (``test:///default``) runs in virsh's own process and uses the same parser and formatter as the libxl
driver; only the domain's type differs.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from nvdimm_driver.errors import SchemaError, UnsupportedError
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import restore, rewrite
from nvdimm_driver.xml.schema import SCHEMA, check_schema
from tests.waiting import HANG_SECONDS

DATA = Path(__file__).parent.parent / "data" / "domxml"
DEVICE_MODEL = "/usr/libexec/xen/bin/nvdimm-device-model"
NAMES = ["guest", "nova", "numa"]


def read(name: str) -> str:
    return (DATA / f"{name}.xml").read_text()


def of_type(xml: str, old: str, new: str) -> str:
    for quote in "'\"":
        xml = xml.replace(f"<domain type={quote}{old}{quote}", f"<domain type={quote}{new}{quote}", 1)
    return xml


def through_libvirt(xml: str, file: Path, *more: str) -> str:
    """Return the XML of a Xen domain as libvirt returns it after a define and more virsh commands."""
    file.write_text(of_type(xml, "xen", "test"))
    name = etree.fromstring(xml.encode()).findtext("name")
    commands = "; ".join([f"define {file}", *more, f"dumpxml --inactive {name}"])
    result = subprocess.run(
        ["virsh", "-q", "-c", "test:///default", commands],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    assert not result.stderr
    return of_type(result.stdout.strip() + "\n", "test", "xen")


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(SCHEMA))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["", ".rewritten", ".libvirt", ".restored"])
def test_every_form_is_valid(schema: etree.RelaxNG, name: str, form: str) -> None:
    schema.assertValid(etree.fromstring(read(name + form).encode()))


def test_virsh_takes_the_rewritten_form_with_validation(tmp_path: Path) -> None:
    file = tmp_path / "domain.xml"
    file.write_text(of_type(read("nova.rewritten"), "xen", "test"))
    subprocess.run(
        ["virsh", "-q", "-c", "test:///default", "define", "--validate", file], check=True, timeout=HANG_SECONDS
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_libvirt_stores_is_the_golden_file(tmp_path: Path, name: str) -> None:
    assert through_libvirt(rewrite(read(name), DEVICE_MODEL), tmp_path / "domain.xml") == read(f"{name}.libvirt")


def test_another_clients_metadata_goes_behind_ours(tmp_path: Path) -> None:
    stored = through_libvirt(
        rewrite(read("numa"), DEVICE_MODEL),
        tmp_path / "domain.xml",
        "metadata numa --config --uri urn:other --key other --set '<thing/>'",
    )
    assert "urn:other" in stored
    restored = restore(stored)
    assert "urn:other" in restored
    assert rewrite(restored, DEVICE_MODEL) == stored


def test_memory_that_is_set_later_is_seen(tmp_path: Path) -> None:
    """A guest with NVDIMMs cannot start with a balloon below its RAM, whoever asked for it."""
    stored = through_libvirt(
        rewrite(read("nova"), DEVICE_MODEL), tmp_path / "domain.xml", "setmem instance-00000001 1G --config"
    )
    assert "<currentMemory unit='KiB'>1048576</currentMemory>" in restore(stored)
    with pytest.raises(UnsupportedError, match="currentMemory"):
        extract(restore(stored))


@pytest.mark.parametrize("wrong", ["<lable/>", "<size>1</size>", "text"])
def test_what_is_not_valid_is_said_in_libvirts_words(tmp_path: Path, wrong: str) -> None:
    xml = of_type(read("numa"), "xen", "test").replace("<node>1", f"{wrong}<node>1")
    file = tmp_path / "domain.xml"
    file.write_text(xml)
    command = ["virsh", "-q", "-c", "test:///default", "define", "--validate", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False).stderr
    with pytest.raises(SchemaError) as caught:
        check_schema(xml)
    assert said == f"error: Failed to define domain from {file}\nerror: {caught.value.message}\n\n"


# --- properties ---

PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/￾￿"), min_size=1, max_size=8)
PARTS = [
    "<title>a title</title>",
    "<description>two\n lines &amp; more</description>",
    "<metadata><a:b xmlns:a='urn:a'><a:c>d</a:c></a:b></metadata>",
    "<cpu><numa><cell id='0' cpus='0' memory='1' unit='GiB'/></numa></cpu>",
    "<idmap><uid start='0' target='1000' count='10'/><gid start='0' target='1000' count='10'/></idmap>",
    "<sysinfo type='smbios'><bios><entry name='vendor'>X</entry></bios></sysinfo>",
    "<features/>",
    "<features><pae/><apic/></features>",
    "<features><acpi/></features>",
    "<clock offset='utc'/>",
]
DEVICES = [
    "<emulator>/usr/bin/qemu-system-i386</emulator>",
    "<disk type='file'><source file='/a&quot;b'/><target dev='xvda' bus='xen'/></disk>",
    "<console type='pty'><target type='xen'/></console>",
    "<memballoon model='xen'/>",
    "<shmem name='x'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>",
    "<vsock model='virtio'><cid auto='no' address='3'/></vsock>",
]


@st.composite
def domains(draw: st.DrawFn) -> str:
    nvdimms = []
    for number in range(draw(st.integers(1, 3))):
        element = etree.Element("memory", model="nvdimm", access="shared")
        source = etree.SubElement(element, "source")
        etree.SubElement(source, "path").text = f"/mnt/{number}{draw(PATHS)}"
        target = etree.SubElement(element, "target")
        etree.SubElement(target, "size", unit="MiB").text = str(draw(st.integers(1, 1 << 20)))
        if draw(st.booleans()):
            etree.SubElement(etree.SubElement(target, "label"), "size").text = "128"
        if draw(st.booleans()):
            etree.SubElement(element, "alias", name=f"ua-{number}")
            etree.SubElement(element, "address", type="dimm", slot=str(200 + number), base="0x10000000000")
        nvdimms.append(etree.tostring(element, encoding="unicode"))
    devices = draw(st.permutations(draw(st.lists(st.sampled_from(DEVICES), unique=True)) + nvdimms))
    space = draw(st.sampled_from(["", "\n", "\n\n\t"]))
    # libxml2's validator wants the elements of a group in the schema to stay together
    name = ["<name>p</name>", "<uuid>11111111-2222-3333-4444-555555555555</uuid>"]
    memory = ["<memory unit='GiB'>1</memory>", "<vcpu>1</vcpu>"]
    memory += draw(st.sampled_from([[], ["<currentMemory unit='GiB'>2</currentMemory>"]]))
    memory += draw(st.sampled_from([[], ["<maxMemory slots='4' unit='GiB'>9</maxMemory>"]]))
    parts = [
        space.join(draw(st.permutations(name))),
        space.join(draw(st.permutations(memory))),
        "<os><type machine='xenfv'>hvm</type><boot dev='hd'/></os>",
        "<devices>" + "".join(space + device for device in devices) + "</devices>",
        *draw(st.lists(st.sampled_from(PARTS), unique_by=lambda part: part[:6])),
    ]
    return "<domain type='xen'>" + "".join(space + part for part in draw(st.permutations(parts))) + "</domain>"


@settings(max_examples=40, deadline=None)
@given(domains())
def test_libvirts_form_of_any_domain_comes_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, xml: str
) -> None:
    rewritten = rewrite(xml, DEVICE_MODEL)
    stored = through_libvirt(rewritten, tmp_path_factory.getbasetemp() / "domain.xml")
    restored = restore(stored)
    assert rewrite(restored, DEVICE_MODEL) == stored
    assert extract(restored) == extract(xml)


@settings(max_examples=40, deadline=None)
@given(xml=domains())
def test_all_forms_of_any_domain_are_valid(schema: etree.RelaxNG, xml: str) -> None:
    rewritten = rewrite(xml, DEVICE_MODEL)
    for form in (xml, rewritten, restore(rewritten)):
        schema.assertValid(etree.fromstring(form.encode()))


def memory_of(xml: str) -> list[str]:
    """Return the lines of a domain's ``<maxMemory>`` and NVDIMMs, as they are in the text."""
    return re.findall(r" *<maxMemory.*?</maxMemory>| *<memory model='nvdimm'.*?</memory>", xml, re.DOTALL)


WRITTEN = [
    "<memory discard='no' model='nvdimm' access='shared'><alias name='ua-x'/><target><label><size unit='MB'>1</size>"
    "</label><node>0</node><size unit='b'>67108865</size></target><source><pmem/><alignsize unit='MiB'>2</alignsize>"
    '<path>/mnt/it\'s &quot;"&amp;</path></source><address base="0X180000000" slot="3" type="dimm"/></memory>',
    "<memory model='nvdimm'><source><path>/a</path></source><target><size unit='G'>1</size></target>"
    "<alias name='nvdimm0'/><address slot='1' type='dimm' base='0x0'/></memory>",
]


@pytest.mark.parametrize("device", WRITTEN)
def test_an_nvdimm_is_shown_as_libvirt_itself_shows_it(tmp_path: Path, device: str) -> None:
    nova = read("nova")
    first = nova.index('    <memory model="nvdimm"')
    xml = nova[:first] + device + nova[nova.index('    <memballoon model="xen"') :]
    xml = xml.replace('<maxMemory slots="2">25169920', '<maxMemory unit="GiB" slots="2">24')
    numa = "<cpu><numa><cell id='0' cpus='0-1' memory='2097152'/></numa></cpu>"
    xml = xml.replace("<memory>2097152</memory>", "<memory>8388608</memory>" + numa)
    file = tmp_path / "domain.xml"
    ours = memory_of(restore(through_libvirt(rewrite(xml, DEVICE_MODEL), file)))
    assert len(ours) == 2
    assert ours == memory_of(through_libvirt(xml, file))
