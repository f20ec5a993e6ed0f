# SPDX-License-Identifier: Apache-2.0
"""An NVDIMM that stays keeps its bytes, its slot, and the alignment of its base, whatever else of a domain changes.

With plain virsh, to the real libvirtd and its libxl driver.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.model import KIB, MIB, SUPERPAGE
from tests.integration.bench_host import Host
from tests.unit.label_areas import area_with_namespaces, cookie

BASE = 0x11_0020_1000
"""No multiple of 2 MiB, as versions before 0.2.0 chose bases."""
LABEL = 128 * KIB


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))  # a socket's path has to be short
    try:
        yield host
    finally:
        host.libvirtd.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    shell(shared_host, "mkdir -p sub other")
    yield shared_host
    shared_host.check("undefine", "db1")
    shared_host.nvdimmctl("release", "--yes", "db1")
    shell(shared_host, "rm -rf sub sub.old other *.img")


def shell(host: Host, script: str) -> None:
    """Run a script in the pool's folder."""
    done = host.libvirtd.run("sh", "-ec", f"cd {host.folder}/pmem; {script}")
    assert done.returncode == 0, done.stderr


def nvdimm(host: Host, name: str = "db1", size: int = 4, label: int = 0, address: str = "") -> str:
    """Return the XML of an NVDIMM; size in MiB, label area in bytes."""
    area = f"<label><size unit='KiB'>{label // KIB}</size></label>" if label else ""
    return (
        f"<memory model='nvdimm'><source><path>{host.folder}/pmem/{name}.img</path></source><target>"
        f"<size unit='MiB'>{size}</size>{area}</target>{address}</memory>"
    )


def define(host: Host, *nvdimms: str) -> None:
    file = host.xml("db1", 1)
    file.write_text(re.sub("<memory model.*?</memory>", "".join(nvdimms), file.read_text(), flags=re.DOTALL))
    host.check("define", file)


def device(host: Host, xml: str) -> Path:
    file = host.folder / "device.xml"
    file.write_text(xml)
    return file


def base(host: Host) -> int:
    (item,) = host.record("db1").allocations
    assert item.base is not None
    return item.base


def places(host: Host) -> dict[str, tuple[int, int]]:
    """Return inode and slot of each NVDIMM, by path."""
    items = host.record("db1").allocations
    return {item.spec.path: (item.identity.inode, item.spec.slot) for item in items if item.identity}


# --- bases and slots ---


def keep_base(host: Host) -> None:
    define(host, nvdimm(host, address=f"<address type='dimm' slot='0' base='{BASE:#x}'/>"))
    define(host, nvdimm(host))
    assert base(host) == BASE


def test_an_nvdimm_that_grows_keeps_the_alignment_of_its_base(host: Host) -> None:
    keep_base(host)
    shell(host, "fallocate -l 6M db1.img")
    define(host, nvdimm(host, size=6))
    assert base(host) % SUPERPAGE == BASE % SUPERPAGE


def test_an_nvdimm_in_another_slot_keeps_the_alignment_of_its_base(host: Host) -> None:
    keep_base(host)
    define(host, nvdimm(host, address="<address type='dimm' slot='5'/>"))
    assert base(host) % SUPERPAGE == BASE % SUPERPAGE


def test_what_is_attached_again_gets_the_slot_of_its_labels(host: Host) -> None:
    names = ("one", "two")
    last = nvdimm(host, address="<address type='dimm' slot='2'/>")
    define(host, *(nvdimm(host, name, 6, LABEL) for name in names), last)
    for slot, name in enumerate(names):
        (host.folder / "area").write_bytes(area_with_namespaces(LABEL, cookie(slot)))
        shell(host, f"dd if={host.folder}/area of={name}.img bs=4k seek={(6 * MIB - LABEL) // 4096} conv=notrunc")
    define(host, last)
    for name in reversed(names):
        host.check("attach-device", "db1", device(host, nvdimm(host, name, 6, LABEL)), "--config")
    found = {Path(path).stem: slot for path, (_, slot) in places(host).items()}
    assert found == {"one": 0, "two": 1, "db1": 2}
    assert host.nvdimmctl("check").returncode == 0


# --- paths that have become symbolic links ---

TURNS = {
    "another file": "mv sub/s.img aside.img; head -c 4M /dev/zero >sub/s.img",
    "a link to another file": "mv sub/s.img aside.img; head -c 4M /dev/zero >x.img; ln -s ../x.img sub/s.img",
    "a link to an empty folder": "mv sub sub.old; ln -s other sub",
}


@pytest.mark.parametrize("how", TURNS)
def test_a_change_of_something_else_gives_the_guest_no_other_bytes(host: Host, how: str) -> None:
    define(host, nvdimm(host, "sub/s"), nvdimm(host, "c"))
    before = places(host)
    shell(host, TURNS[how])
    editor = host.folder / "editor"
    editor.write_text("#!/bin/sh\nsed -i 's/<vcpu placement=.static.>1/<vcpu>2/' \"$1\"\n")
    editor.chmod(0o755)
    done = host.libvirtd.run("env", f"EDITOR={editor}", "virsh", "-q", "-c", "xen:///system", "edit", "db1")
    assert done.stderr == "error: Failed.\n"  # what virsh says where it cannot ask
    told = host.virsh("detach-device", "db1", device(host, nvdimm(host, "c")), "--config").stderr
    assert "s.img leads to" in told or "s.img is not the backing that was provisioned" in told
    assert places(host) == before
    (other,) = [path for path in before if path.endswith("/s.img")]
    assert not how.startswith("a link") or f"{other} leads to" in told


@pytest.mark.parametrize("which", ["sub/s", "c"])
@pytest.mark.parametrize(
    "turn", ["mv sub/s.img aside.img; ln -s ../c.img sub/s.img", "mv c.img a.img; ln -s sub/s.img c.img"]
)
def test_a_detach_takes_no_other_nvdimm_to_which_a_path_leads(host: Host, which: str, turn: str) -> None:
    define(host, nvdimm(host, "sub/s"), nvdimm(host, "c"))
    before = places(host)
    shell(host, turn)
    assert "leads to" in host.virsh("detach-device", "db1", device(host, nvdimm(host, which)), "--config").stderr
    assert places(host) == before


def test_a_link_that_leads_to_the_same_bytes_is_followed(host: Host) -> None:
    """As after a file system was mounted elsewhere."""
    define(host, nvdimm(host, "sub/s"), nvdimm(host, "c"))
    before = places(host)
    shell(host, "mv sub sub.old; ln -s sub.old sub")
    host.check("detach-device", "db1", device(host, nvdimm(host, "c")), "--config")
    ((path, place),) = places(host).items()
    assert path == f"{host.folder}/pmem/sub.old/s.img"
    assert place == before[f"{host.folder}/pmem/sub/s.img"]
