# SPDX-License-Identifier: Apache-2.0
"""A client's small text does not become large, or the work on it long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvdimm_driver.backing.paths import resolve_new
from nvdimm_driver.errors import BackingError, DomainXmlError
from nvdimm_driver.xml.document import MAX_BYTES, MAX_INDENT, parse
from nvdimm_driver.xml.edit_devices import with_uuid
from nvdimm_driver.xml.rewrite import restore, rewrite
from tests.unit.test_xml_client import DEVICE_MODEL, NVDIMM, PLAIN


def test_an_indent_is_not_repeated_in_each_line_of_the_record() -> None:
    nvdimms = "".join(NVDIMM.replace("/a<", f"/{number}<") for number in range(200))
    plain = PLAIN.format(nvdimms)
    spaces = "\n" + " " * 20_000
    indented = plain.replace("<uuid>", spaces + "<uuid>").replace("<devices>", "<devices>" + spaces)
    kept = rewrite(indented, DEVICE_MODEL)
    lines = rewrite(plain.replace("<uuid>", "\n<uuid>"), DEVICE_MODEL).count("\n")
    assert len(kept) < len(indented) + len(rewrite(plain, DEVICE_MODEL)) + lines * (MAX_INDENT + 20)
    assert len(restore(kept)) < 2 * len(kept)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 10_000])
def test_white_space_of_any_length_goes_with_the_element_behind_it(size: int) -> None:
    text = parse(f"<a><b/>{' ' * size}<c/></a>")
    text.cut(text.root.need("c"))
    assert text.edited() == "<a><b/></a>"


def test_what_becomes_longer_than_libvirt_takes_is_refused() -> None:
    xml = f"<domain><name>{'x' * (MAX_BYTES - 50)}</name></domain>"
    with pytest.raises(DomainXmlError, match="libvirt takes 4 MiB at most"):
        with_uuid(xml, "7c7b0e2e-4a6e-4f0e-9a3b-000000000001")


def test_a_long_chain_of_links_is_not_followed(tmp_path: Path) -> None:
    for number in range(1, 1200):
        os.symlink(f"{number - 1}", tmp_path / f"{number}")
    with pytest.raises(BackingError, match="leads through more than 40 symbolic links"):
        resolve_new(f"{tmp_path}/1199")


def test_xml_of_any_origin_has_no_more_elements_than_libvirt_writes_into_its_longest() -> None:
    attributes = "".join(f" {one}{other}=''" for one in "abcdefghijklmnop" for other in "abcdefghijklmno")
    with pytest.raises(DomainXmlError, match="more than 524288 elements and attributes"):
        parse("<a>" + f"<b{attributes}/>" * (MAX_BYTES // 8 // 241 + 1) + "</a>")
