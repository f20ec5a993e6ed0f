# SPDX-License-Identifier: Apache-2.0
"""A saved guest whose run the ledger has lost: libvirt removes no image of a guest that cannot go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bench_host import Host
from tests.ledger_copies import forget_in_use

HOW = ("lost", "lost, then repaired", "damaged, then repaired")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    host = Host(folder, f"[pool:main]\nkind = bench\npaths = {folder}/pmem\n")
    try:
        yield host
    finally:
        host.libvirtd.close()


def is_saved(host: Host, name: str) -> bool:
    return "Managed save:   yes" in host.check("dominfo", name)


def lose_ledger(state: Path) -> None:
    """Delete the ledger, and what says that there was one."""
    for each in state.glob("ledger*"):
        each.unlink()
    forget_in_use(state)


@pytest.mark.parametrize("how", HOW)
def test_the_saved_guest_stays(host: Host, how: str) -> None:
    number = HOW.index(how) + 1
    name = f"db{number}"
    host.define(name, number)
    host.check("start", name)
    host.check("managedsave", name)
    state = host.folder / "state"
    kept = {each: each.read_bytes() for each in state.glob("ledger*")}
    if how.startswith("damaged"):
        (state / "ledger.sqlite").write_bytes(b"scribble" * 4096)
    else:
        lose_ledger(state)
    if "repaired" in how:
        host.nvdimmctl("check", "--repair")
        told = host.nvdimmctl("check")
        assert told.returncode == 1
        assert f"| {name} " in told.stdout
        assert "does not have the run that it was saved in" in " ".join(told.stdout.split())
    done = host.virsh("start", name)
    assert done.returncode == 1
    assert "the saved guest cannot go on: the ledger does not have the run" in done.stderr
    assert is_saved(host, name)
    lose_ledger(state)
    for each, content in kept.items():  # what the hint says
        each.write_bytes(content)
    assert "'nvdimmctl check --repair' does that" in host.virsh("start", name).stderr
    assert is_saved(host, name)
    host.nvdimmctl("check", "--repair")
    host.check("start", name)
    assert host.state(name)[0] == "mapped"
    host.check("destroy", name)


def saved(host: Host, number: int) -> str:
    """Define and start a domain, save its guest, and lose the ledger; return the domain's name."""
    name = f"db{number}"
    host.define(name, number)
    host.check("start", name)
    if number == 4:
        (found,) = re.findall("<memory model.*?</memory>", host.xml(name, number).read_text(), re.DOTALL)
        (host.folder / "device.xml").write_text(found)
        host.check("detach-device", name, host.folder / "device.xml", "--config")
    host.check("managedsave", name)
    lose_ledger(host.folder / "state")
    return name


def test_the_saved_guest_stays_though_its_definition_has_no_nvdimm_any_more(host: Host) -> None:
    name = saved(host, 4)
    assert "the ledger does not have the run" in host.virsh("start", name).stderr
    assert is_saved(host, name)


@pytest.mark.parametrize("has_nvdimm", [True, False])
def test_the_saved_guest_stays_when_its_domain_is_created(host: Host, has_nvdimm: bool) -> None:
    """libvirt starts a managed save then, too, whatever is in the XML."""
    name = saved(host, 5 + has_nvdimm)
    file = host.folder / f"{name}.xml"
    if not has_nvdimm:
        file.write_text(re.sub("<memory model.*?</memory>", "", file.read_text(), flags=re.DOTALL))
    assert "the ledger does not have the run" in host.virsh("create", file).stderr
    assert is_saved(host, name)
