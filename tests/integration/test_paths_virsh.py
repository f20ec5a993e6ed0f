# SPDX-License-Identifier: Apache-2.0
"""Paths of backings, with plain virsh through nvdimmd to the real libxl driver."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bench_host import Host
from tests.integration.test_virsh import NVDIMM, image


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))  # a socket's path has to be short
    try:
        yield host
    finally:
        host.libvirtd.close()


def test_libvirt_has_what_a_link_led_to_when_it_was_defined(host: Host) -> None:
    link = host.libvirtd.folder / "link"
    link.symlink_to(image(host, "db1").parent)
    define_by(host, link)
    assert str(link) not in host.check("dumpxml", "db1")
    device = host.folder / "device.xml"
    device.write_text(NVDIMM.format(f"{link}/more.img"))
    host.check("attach-device", "db1", device, "--config")
    shown = host.check("dumpxml", "db1")
    assert str(image(host, "more")) in shown
    assert str(link) not in shown
    host.check("detach-device", "db1", device, "--config")
    assert "more.img" not in host.check("dumpxml", "db1")
    turn(link, Path("/etc"))
    host.check("start", "db1")
    host.check("destroy", "db1")


def test_an_error_names_the_paths_as_they_are_written(host: Host) -> None:
    """One file by two paths is no two NVDIMMs."""
    link, device = host.libvirtd.folder / "link", host.folder / "device.xml"
    link.symlink_to(image(host, "db1").parent)
    host.define("db1", 1)
    device.write_text(NVDIMM.format(f"{link}/db1.img"))
    told = host.virsh("attach-device", "db1", device, "--config").stderr
    assert f"have the same bytes: {image(host, 'db1')} and {link}/db1.img" in told


def test_a_link_that_is_turned_has_nothing_deleted_by_release(host: Host) -> None:
    link, victim = host.libvirtd.folder / "link", host.folder / "victim/db1.img"
    victim.parent.mkdir()
    victim.write_bytes(b"of somebody else")
    link.symlink_to(image(host, "db1").parent)
    define_by(host, link)
    assert host.files() == ["db1.img", "lost+found"]
    turn(link, victim.parent)
    done = host.nvdimmctl("release", "--yes", "--delete", "db1")
    assert done.returncode == 0, done.stderr
    assert str(image(host, "db1")) in done.stdout
    assert host.files() == ["lost+found"]
    assert victim.read_bytes() == b"of somebody else"


def test_a_link_that_is_turned_has_nothing_deleted_by_a_create_that_fails(host: Host) -> None:
    link, victim = host.libvirtd.folder / "link", host.folder / "victim/db1.img"
    victim.parent.mkdir()
    victim.write_bytes(b"of somebody else")
    link.symlink_to(image(host, "db1").parent)
    host.script("10-turn", f"ln -sfn {victim.parent} {link}\n")
    host.fail("xc_domain_memory_mapping", errno.EPERM)  # no guest has had the new file: it is deleted
    written = host.xml("db1", 1)
    written.write_text(written.read_text().replace(f"<path>{image(host, 'db1').parent}/", f"<path>{link}/"))
    assert host.virsh("create", written).returncode == 1
    assert link.readlink() == victim.parent, "the link was turned in time"
    assert host.files() == ["lost+found"]
    assert victim.read_bytes() == b"of somebody else"


def define_by(host: Host, link: Path) -> None:
    """Define db1 with a path through a link to the folder of its file."""
    written = host.xml("db1", 1)
    written.write_text(written.read_text().replace(f"<path>{image(host, 'db1').parent}/", f"<path>{link}/"))
    assert str(link) in written.read_text()
    host.check("define", written)


def turn(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)
