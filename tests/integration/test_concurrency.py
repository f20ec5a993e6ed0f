# SPDX-License-Identifier: Apache-2.0
"""Many at once, on the real libvirtd and its libxl driver without Xen: clients, two nvdimmd, hooks, nvdimmctl.

The order of what happens is up to the machine. What is asserted is who has what afterwards.
"""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from nvdimm_driver.model import MIB, PAGE
from nvdimm_driver.state.ledger import Ledger
from tests.integration.bench_host import UUID, Host

ROUNDS = 3
SECOND = "/run/second-nvdimmd-sock"
STEPS_OF_A_START = ["hook prepare begin", "hook start begin", "create", "hook started begin"]


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"), size=512 * MIB)
    try:
        conf = host.folder / "second.conf"
        text = (host.libvirtd.folder / "conf/nvdimm-driver.conf").read_text()
        conf.write_text(text.replace("[rpc]\n", f"[rpc]\nsocket = {SECOND}\nsocket_ro = {SECOND}-ro\n"))
        python = host.folder / "python/bin/python"
        host.libvirtd.serve("nvdimmd2", python, "-I", "-m", "nvdimm_driver.cmd.nvdimmd", conf)
        yield host
    finally:
        host.libvirtd.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """Return a host without a domain."""
    yield shared_host
    shared_host.clean()
    for name in shared_host.check("list", "--all", "--name").split():
        if name != "Domain-0":
            shared_host.check("undefine", name)
    for record in records(shared_host):
        shared_host.nvdimmctl("release", "--yes", "--delete", "--all", record)
    shared_host.libvirtd.run("find", shared_host.folder / "pmem", "-name", "*.img", "-delete")


def records(host: Host) -> list[str]:
    """Return the names of the domains in the ledger."""
    ledger = Ledger(str(host.folder / "state/ledger.sqlite"))
    try:
        return [record.name for record in ledger.domains()]
    finally:
        ledger.close()


def at_once(host: Host, commands: Sequence[Sequence[str | Path]]) -> list[subprocess.CompletedProcess[str]]:
    """Run commands at once; return how they ended, in their order."""
    begun = [host.libvirtd.begin(*command) for command in commands]
    ended = []
    for process in begun:
        out, said = process.communicate()
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, said))
    return ended


def virsh(*words: str | Path, second: bool = False) -> list[str | Path]:
    """Return a virsh command, for the one nvdimmd or for the other."""
    return ["virsh", "-q", "-c", f"xen+unix:///system?socket={SECOND}" if second else "xen:///system", *words]


def nvdimmctl(host: Host, *words: str) -> list[str | Path]:
    main = "import sys; from nvdimm_driver.cmd.nvdimmctl import main; sys.exit(main())"
    return [host.folder / "python/bin/python", "-I", "-c", main, *words]


def with_file(host: Host, name: str, number: int, file: str) -> Path:
    """Return the XML of a domain with another's file."""
    xml = host.xml(name, number)
    xml.write_text(xml.read_text().replace(f"{name}.img", file))
    return xml


def frames(host: Host) -> dict[str, set[int]]:
    """Return the machine frames that each running domain has, as the ledger says."""
    found: dict[str, set[int]] = {}
    with closing(sqlite3.connect(host.folder / "state/ledger.sqlite")) as ledger:
        for name, mfn, count in ledger.execute("SELECT name, mfn, count FROM mapping JOIN domain USING (uuid)"):
            found.setdefault(name, set()).update(range(mfn, mfn + count))
    return found


def is_consistent(host: Host) -> None:
    """Assert that check finds nothing, and that running domains have their files and nobody else's."""
    done = host.nvdimmctl("check")
    assert done.returncode == 0, done.stdout
    running = {*host.check("list", "--name").split()} - {"Domain-0"}
    for name in running:
        record = host.record(name)
        assert record.start is not None
        assert record.start.state == "mapped"
        assert host.libvirtd.check("domid", name) == str(record.start.domid)
        for path in record.start.paths:
            assert "i" in host.libvirtd.run("lsattr", path).stdout.split()[0]
    ledger = Ledger(str(host.folder / "state/ledger.sqlite"))
    every = [item.spec.path for record in ledger.domains() for item in record.allocations]
    ledger.close()
    assert len(every) == len({*every})


def of_domain(name: str, event: str) -> str:
    """Return what an event says that happened to a domain; empty when it is of another."""
    words = [word for word in event.split() if not word.startswith("id=") and not word.isdigit()]
    return " ".join(words[:-1]) if words[-1] == name else ""


@pytest.mark.parametrize("guests", [10, pytest.param(50, marks=pytest.mark.long)])
def test_guests_start_at_once(host: Host, guests: int) -> None:
    names = [f"db{n}" for n in range(guests)]
    files = [host.xml(name, n + 1) for n, name in enumerate(names)]
    for xml in files:
        xml.write_text(xml.read_text().replace("'>4</size>", "'>2</size>"))
    defined = at_once(host, [virsh("define", xml, second=bool(n % 2)) for n, xml in enumerate(files)])
    assert [done.stderr for done in defined if done.returncode] == []
    host.libvirtd.events()
    started = at_once(host, [virsh("start", name, second=bool(n % 2)) for n, name in enumerate(names)])
    assert [done.stderr for done in started if done.returncode] == []
    events = host.libvirtd.events()
    for name in names:
        assert [step for event in events if (step := of_domain(name, event))] == STEPS_OF_A_START, name
    taken = frames(host)
    assert {*taken} == {*names}
    assert sum(map(len, taken.values())) == len(set.union(*taken.values())) == guests * 2 * MIB // PAGE
    is_consistent(host)
    ended = at_once(host, [virsh("destroy", name, second=bool(n % 2)) for n, name in enumerate(names)])
    assert [done.stderr for done in ended if done.returncode] == []
    is_consistent(host)
    assert frames(host) == {}


@pytest.mark.parametrize("second", [False, True], ids=["one nvdimmd", "two nvdimmd"])
def test_of_two_that_define_a_file_at_once_one_has_it(host: Host, second: bool) -> None:
    for number in range(ROUNDS):
        one, other = f"one{number}", f"other{number}"
        files = [
            with_file(host, one, 2 * number + 1, f"{number}.img"),
            with_file(host, other, 2 * number + 2, f"{number}.img"),
        ]
        done = at_once(host, [virsh("define", files[0]), virsh("define", files[1], second=second)])
        won = [name for name, each in zip((one, other), done, strict=True) if each.returncode == 0]
        assert len(won) <= 1, f"both have the file: {done}"
        assert [each.stderr for each in done if each.returncode and "belongs to domain" not in each.stderr] == []
        assert [name for name in (one, other) if name in records(host)] == won
        assert [name for name in host.check("list", "--all", "--name").split() if name in (one, other)] == won
        if not won:
            host.check("define", files[0])
        is_consistent(host)


def test_a_start_and_what_would_take_its_file_at_once(host: Host) -> None:
    """Hook against daemon and nvdimmctl: whoever is first, the guest runs with bytes of its own, or does not run."""
    host.define("db1", 1)
    for _ in range(ROUNDS):
        commands = [
            virsh("start", "db1"),
            nvdimmctl(host, "wipe", "--yes", "db1"),
            virsh("define", with_file(host, "db2", 2, "db1.img"), second=True),
            nvdimmctl(host, "check", "--repair"),
        ]
        started, _, stolen, _ = at_once(host, commands)
        assert stolen.returncode, "another domain has the file"
        if started.returncode:
            assert "overwritten by" in started.stderr or "is changed" in started.stderr, started.stderr
            assert host.state("db1") == ("", None, False)
        is_consistent(host)
        host.virsh("destroy", "db1")
        is_consistent(host)
        assert host.files().count("db1.img") == 1


def test_a_start_and_a_release_at_once(host: Host) -> None:
    """A guest that runs has its claims; one whose claims are gone does not run."""
    for number in range(ROUNDS):
        host.define("db1", 1)
        commands = [virsh("start", "db1"), nvdimmctl(host, "release", "--yes", "db1")]
        started, released = at_once(host, commands[:: 1 if number % 2 else -1])[:: 1 if number % 2 else -1]
        runs = "db1" in host.check("list", "--name").split()
        assert runs == (started.returncode == 0)
        if runs:
            assert host.state("db1")[0] == "mapped", (started, released)
        is_consistent(host)
        host.virsh("destroy", "db1")
        is_consistent(host)


def test_definitions_of_one_domain_at_once(host: Host) -> None:
    """Clients that try again after a time-out: afterwards libvirt and the ledger have the same definition."""
    for number in range(ROUNDS):
        xml = host.xml("db1", 1)
        more = host.folder / "more.xml"
        more.write_text(xml.read_text().replace("<memory unit='MiB'>512", f"<memory unit='MiB'>{600 + number}"))
        at_once(host, [virsh("define", xml), virsh("define", more, second=True), virsh("define", xml, second=True)])
        assert UUID.format(1) == host.check("domuuid", "db1")
        assert [Path(item.spec.path).name for item in host.record("db1").allocations] == ["db1.img"]
        host.check("define", xml)
        is_consistent(host)
