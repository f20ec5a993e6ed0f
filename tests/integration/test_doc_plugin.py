# SPDX-License-Identifier: Apache-2.0
"""The plug-ins of the documentation, each installed from a wheel as the page says, and used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bench_host import Host
from tests.integration.etc_folder import with_folder

DOC = Path(__file__).parents[2] / "doc" / "plugins.rst"
RUN_MAPPER = """
import sys
import syslog
sys.path.insert(0, sys.argv[1])
syslog.syslog = lambda priority, message: print(priority, message)
from nvdimm_driver.cmd.device_model import _mapper
mapper = _mapper("audited")
print(mapper.describe())
try:
    mapper.map(7, [(0x100000, 0x140000, 512)])
except Exception as error:
    print(type(error).__name__)
"""


def blocks(title: str) -> list[str]:
    """The code of the section with that title."""
    text = DOC.read_text(encoding="utf-8")
    section = re.split(r"^-+$", text[text.index(f"\n{title}\n---") :], flags=re.MULTILINE)[1]
    found = re.findall(r"\.\. code-block:: (?:python|ini)\n\n((?:    .*\n|\n)+)", section)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() + "\n" for block in found]


def wheel(folder: Path, title: str) -> tuple[Path, str]:
    """Build the package of a section; return its wheel and the options that go with it."""
    module, setup, options = blocks(title)
    folder.mkdir()
    (name,) = re.findall(r'py_modules=\["(\w+)"\]', setup)
    (folder / f"{name}.py").write_text(module)
    (folder / "setup.py").write_text(setup)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "dist", folder]
    subprocess.run(pip, check=True, capture_output=True)
    (built,) = (folder / "dist").glob("*.whl")
    return built, options


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with the documented backing, XML hook and driver, and their options."""
    folder = tmp_path_factory.mktemp("plugins")
    backing, backing_options = wheel(folder / "backing", "A backing")
    audit, audit_options = wheel(folder / "audit", "An XML hook and a driver")
    (folder / "host").mkdir()
    host = Host(folder / "host", backing_options + audit_options, [backing, audit])
    try:
        yield host
    finally:
        host.libvirtd.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """The host, whose domains are off again after each test."""
    yield shared_host
    shared_host.clean()


def domain(host: Host, name: str, number: int, path: str, size: int = 64) -> Path:
    file = host.xml(name, number)
    text = file.read_text().replace(f"{host.folder}/pmem/{name}.img", path)
    file.write_text(text.replace("<size unit='MiB'>4</size>", f"<size unit='MiB'>{size}</size>"))
    return file


def test_a_domain_gets_memory_of_a_backing_that_is_not_shipped(host: Host) -> None:
    xml = domain(host, "db1", 1, "/setaside/db1")
    planned = host.nvdimmctl("plan", str(xml))
    assert "/setaside/db1" in planned.stdout, planned.stderr
    assert "0x160000000" in planned.stdout
    host.check("define", xml)
    (item,) = host.record("db1").allocations
    assert item.identity is not None
    assert (item.identity.kind, item.identity.device) == ("setaside", "setaside")
    assert item.spec.path == "/setaside/db1"
    host.check("start", "db1")
    assert host.record("db1").start is not None
    assert f", 0x160000, {(64 << 20) // 4096}, 1)" in host.libvirtd.device_model_log("db1"), (
        "64 MiB from there on are mapped"
    )
    host.check("destroy", "db1")
    assert host.nvdimmctl("check").returncode == 0


def test_memory_of_that_backing_is_not_given_twice(host: Host) -> None:
    host.check("define", domain(host, "db1", 1, "/setaside/db1"))
    other = host.virsh("define", domain(host, "db3", 3, "/setaside/db1"))
    assert "belongs to domain db1" in other.stderr
    assert (
        "has 128 MiB, the NVDIMM needs 192 MiB"
        in host.virsh("define", domain(host, "db4", 4, "/setaside/db2", 192)).stderr
    )


@pytest.mark.parametrize(
    ("pieces", "start", "path", "size"),
    [
        ("db1:192MiB", "0x160000000", "/setaside/db1", 192),
        ("db1:64MiB, db3:128MiB", "0x160200000", "/setaside/db3", 128),
        ("dbx:64MiB, db2:128MiB", "0x160000000", "/setaside/dbx", 64),
    ],
    ids=["one larger piece", "moved", "renamed"],
)
def test_memory_that_is_cut_anew_is_not_given_twice(host: Host, pieces: str, start: str, path: str, size: int) -> None:
    host.check("define", domain(host, "db1", 1, "/setaside/db1"))
    host.check("define", domain(host, "db2", 2, "/setaside/db2", 128))
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    before = conf.read_text()
    try:
        changed = before.replace("db1:64MiB, db2:128MiB", pieces).replace("0x160000000", start)
        assert changed != before
        conf.write_text(changed.replace("paths = /setaside/db1, /setaside/db2", f"paths = {path}"))
        host.nvdimmctl("check", "--repair")
        refused = host.virsh("define", domain(host, "db3", 3, path, size))
        assert re.search("belongs to domain db[12]", refused.stderr), refused
    finally:
        conf.write_text(before)
        host.check("undefine", "db2")
        assert host.nvdimmctl("release", "--yes", "db2").returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("start = abc", "[setaside] start: invalid literal"),
        ("pieces = db1", "'' is not a size"),
    ],
)
def test_wrong_values_of_its_options_are_errors(host: Host, options: str, message: str) -> None:
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    before = conf.read_text()
    name = options.split(" ", maxsplit=1)[0]
    try:
        conf.write_text(re.sub(rf"^{name} = .*$", options, before, flags=re.MULTILINE))
        done = host.nvdimmctl("list")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        conf.write_text(before)


def test_a_pool_of_it_knows_what_is_free(host: Host) -> None:
    host.check("define", domain(host, "db1", 1, "/setaside/db1"))
    shown = json.loads(host.nvdimmctl("pool", "show", "cxl", "-f", "json").stdout)
    assert (shown["capacity"], shown["free"], shown["largest_free"]) == (192 << 20, 128 << 20, 128 << 20)


def test_what_it_cannot_do_is_told(host: Host) -> None:
    done = host.nvdimmctl("wipe", "--yes", "/setaside/db2")
    assert "the backing setaside cannot be read or written from the host" in done.stderr
    assert done.returncode == 1


def test_options_that_it_does_not_have_are_refused(host: Host) -> None:
    conf = host.libvirtd.folder / "conf/nvdimm-driver.conf"
    before = conf.read_text()
    try:
        conf.write_text(before.replace("[setaside]", "[setaside]\nstrat = 1"))
        done = host.nvdimmctl("list")
        assert "there is no option strat in section [setaside] (did you mean start?)" in done.stderr
    finally:
        conf.write_text(before)


def test_a_second_xml_hook_and_a_second_driver_are_used_by_virsh(host: Host) -> None:
    xml = domain(host, "db1", 1, "/setaside/db1")
    host.check("define", xml)
    shown = host.check("dumpxml", "db1")
    stored = host.libvirtd.check("dumpxml", "db1")
    assert "<path>/setaside/db1</path>" in shown
    assert "<description>" not in shown
    assert "<description>has NVDIMMs of nvdimm_driver</description>" in stored
    assert "audit: db1 has 1 NVDIMMs" in host.nvdimmd_log()
    rewritten = host.folder / "rewritten.xml"
    rewritten.write_text(host.nvdimmctl("rewrite", str(xml)).stdout)
    assert "<description>has NVDIMMs of nvdimm_driver</description>" in rewritten.read_text()
    assert host.nvdimmctl("restore", str(rewritten)).stdout == xml.read_text().replace(
        "<size unit='MiB'>64<",
        "<size unit='KiB'>65536<",  # as libvirt shows it
    )


def test_the_libvirt_hook_and_the_device_model_take_what_both_hooks_have_written(host: Host) -> None:
    host.check("define", domain(host, "db1", 1, "/setaside/db1"))
    host.check("start", "db1")
    assert "event=prepared domain=db1" in host.log()
    assert "event=started domain=db1" in host.log()
    host.check("destroy", "db1")


def test_the_documented_mapper_works(tmp_path: Path) -> None:
    built, options = wheel(tmp_path / "source", "A mapper")
    target = tmp_path / "target"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, built]
    subprocess.run(pip, check=True, capture_output=True)
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "nvdimm-driver.conf").write_text(options)
    command = with_folder("/etc/nvdimm-driver", folder, [sys.executable, "-c", RUN_MAPPER, target])
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    description, logged, error = done.stdout.splitlines()
    assert description.endswith("; logs each mapping to syslog")
    assert logged == "5 domid 7: map gfn 0x100000 to mfn 0x140000, 512 frames"
    assert error == "XenError", "there is no Xen here to map with"
