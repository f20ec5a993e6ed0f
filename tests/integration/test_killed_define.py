# SPDX-License-Identifier: Apache-2.0
"""``check`` after nvdimmd was killed in a define, on the real libvirtd: what it says and does agrees with libvirt."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.bench_host import UUID, Host
from tests.integration.test_claims_virsh import stranger, with_file
from tests.integration.test_virsh import image, refused


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))  # a socket's path has to be short
    try:
        yield host
    finally:
        host.libvirtd.close()


def kill_in(host: Host, command: str, xml: Path, file: str) -> None:
    """Kill nvdimmd while it writes a file for a command of virsh's, and start it again."""
    gate = host.libvirtd.folder / "run/gates" / file
    gate.parent.mkdir(exist_ok=True)
    os.mkfifo(gate)
    virsh = host.libvirtd.begin("virsh", "-q", "-c", "xen:///system", command, str(xml))
    writer = None
    while writer is None:
        assert virsh.poll() is None, virsh.communicate()
        with suppress(OSError):
            writer = os.open(gate, os.O_WRONLY | os.O_NONBLOCK)  # ENXIO until somebody reads
        time.sleep(0.02)
    host.libvirtd.end("nvdimmd", signal.SIGKILL)
    os.close(writer)
    virsh.communicate()
    gate.unlink()
    host.start_nvdimmd()


def check(host: Host, *options: str) -> tuple[int, list[dict[str, str]]]:
    """Run ``nvdimmctl check``; return its exit status, and its rows."""
    done = host.nvdimmctl("check", "-f", "json", *options)
    rows: list[dict[str, str]] = json.loads(done.stdout[done.stdout.index("[") :])  # after what the stand-in prints
    return done.returncode, rows


def test_a_define_whose_definition_libvirt_has_is_finished(host: Host) -> None:
    """Of a domain with NVDIMMs: those that it had before stay its own, too."""
    host.define("db1", 1)
    (before,) = host.record("db1").allocations
    kill_in(host, "define", with_file(host, "new"), "new.img")
    assert "is not provisioned" in refused(host, "start", "db1")
    status, (found,) = check(host)
    assert status == 1
    assert found["Path"] == str(image(host, "new"))
    assert found["Remedy"].startswith("finish it: libvirt has the new definition")
    assert [row["Done"] for row in check(host, "--repair")[1]] == ["yes"]
    assert check(host) == (0, [])
    host.check("start", "db1")
    assert [Path(item.spec.path) for item in host.record("db1").started] == [image(host, "new")]
    host.check("destroy", "db1")
    assert before.identity in {item.identity for item in host.record("db1").allocations}
    assert "belongs to domain db1" in refused(host, "define", stranger(host))


def test_a_first_define_is_finished(host: Host) -> None:
    kill_in(host, "define", host.xml("db1", 1), "db1.img")
    assert check(host)[1][0]["Remedy"] == "finish it: libvirt has the new definition already"
    told = host.nvdimmctl("export", "db1", str(host.folder / "copy")).stderr
    assert "has no NVDIMM" in told
    assert "one was interrupted: see 'nvdimmctl check'" in told
    check(host, "--repair")
    assert check(host) == (0, [])
    host.check("start", "db1")


def test_a_define_that_cannot_be_finished_stays_a_finding(host: Host) -> None:
    kill_in(host, "define", host.xml("db1", 1), "db1.img")
    host.libvirtd.run("sh", "-c", f"mkdir {image(host, 'db1')}")
    status, rows = check(host, "--repair")
    assert status == 1
    assert rows[0]["Done"].startswith("no: ")
    host.libvirtd.run("rmdir", image(host, "db1"))
    assert check(host, "--repair")[0] == 0
    host.check("start", "db1")


def test_a_definition_of_before_is_kept(host: Host) -> None:
    """virsh create sends libvirt nothing before all is provisioned: libvirt has the definition of before."""
    host.define("db1", 1)
    before = host.record("db1")
    kill_in(host, "create", with_file(host, "new"), "new.img")
    _, (found,) = check(host)
    assert found["Remedy"] == "give that up: the domain keeps what it had before"
    check(host, "--repair")
    assert check(host) == (0, [])
    assert host.record("db1") == before
    host.check("start", "db1")


def test_a_domain_that_libvirt_does_not_have_is_given_up(host: Host) -> None:
    kill_in(host, "create", host.xml("db1", 1), "db1.img")
    _, (found,) = check(host)
    assert found["Remedy"] == ("give that up: the domain had nothing before, and has no such definition in libvirt")
    check(host, "--repair")
    assert check(host) == (0, [])
    assert UUID.format(1) not in host.nvdimmctl("list", "-f", "json").stdout
    host.check("create", host.xml("db1", 1))


def test_without_libvirt_the_remedy_says_what_it_depends_on(host: Host) -> None:
    host.define("db1", 1)
    kill_in(host, "define", with_file(host, "new"), "new.img")
    host.libvirtd.stop()
    _, (found,) = check(host)
    assert found["Remedy"] == (
        "give that up: the domain keeps what it had before; if libvirt, which cannot be asked, has the new definition "
        "already, the domain has to be defined again before it starts"
    )
    check(host, "--repair")
    host.libvirtd.start()
    assert "define the domain with virsh" in refused(host, "start", "db1")
    host.check("define", with_file(host, "new"))
    host.check("start", "db1")
