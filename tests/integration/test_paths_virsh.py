# SPDX-License-Identifier: Apache-2.0
"""Paths of backings, with plain virsh through nvdimmd to the real libxl driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bench_host import Host
from tests.integration.test_virsh import NVDIMM, image


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    try:
        yield host
    finally:
        host.libvirtd.close()


def test_libvirt_has_what_a_link_led_to_when_it_was_defined(host: Host) -> None:
    link, written = host.libvirtd.folder / "link", host.xml("db1", 1)
    link.symlink_to(image(host, "a").parent)
    named = sorted(line for line in written.read_text().splitlines() if "<path>" in line)
    text = written.read_text().replace(f"<path>{image(host, 'a').parent}/", f"<path>{link}/")
    assert str(link) in text, named
    written.write_text(text)
    host.check("define", str(written))
    assert str(link) not in host.check("dumpxml", "db1")
    device = host.folder / "device.xml"
    device.write_text(NVDIMM.format(f"{link}/more.img"))
    host.check("attach-device", "db1", device, "--config")
    shown = host.check("dumpxml", "db1")
    assert str(image(host, "more")) in shown
    assert str(link) not in shown
    host.check("detach-device", "db1", device, "--config")
    assert "more.img" not in host.check("dumpxml", "db1")
    link.unlink()
    link.symlink_to("/etc")
    host.check("start", "db1")
    host.check("destroy", "db1")
