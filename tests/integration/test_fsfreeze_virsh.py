# SPDX-License-Identifier: Apache-2.0
"""A pool whose file system is frozen (fsfreeze), with plain virsh through nvdimmd to the real libvirtd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.bench_host import Host
from tests.integration.test_virsh import device, image, refused


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Return a host with the domain db1, which runs, and db2, which is off."""
    host = Host(tmp_path_factory.mktemp("host"))  # a socket's path has to be short
    try:
        host.define("db1", 1)
        host.define("db2", 2)
        host.check("start", "db1")
        yield host
    finally:
        host.libvirtd.close()


@contextmanager
def frozen(host: Host) -> Iterator[None]:
    done = host.libvirtd.run("fsfreeze", "-f", host.folder / "pmem")
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        host.libvirtd.run("fsfreeze", "-u", host.folder / "pmem")


def test_what_needs_the_file_system_is_refused_and_the_rest_goes_on(host: Host) -> None:
    with frozen(host):
        for words in (
            ("start", "db2"),
            ("define", host.xml("db3", 3)),
            ("attach-device", "db2", device(host, "more"), "--config"),
        ):
            assert "its file system takes no changes" in refused(host, *words)
        assert "db3" not in host.check("list", "--all", "--name")
        assert "<memory model='nvdimm'" in host.check("dumpxml", "db2")
        host.check("destroy", "db1")
        for command in (("list",), ("show", "db1"), ("pool", "list")):
            assert host.nvdimmctl(*command).returncode == 0
        told = host.nvdimmctl("check")
        assert told.returncode == 1
        assert "its start as domid" in told.stdout
        assert f"{image(host, 'db1')}: its file system takes no changes" in host.log()
    while host.nvdimmctl("check", "--repair").returncode:
        pass  # until nobody waits for the file system any more
    assert host.state("db1") == ("", None, False)
    for name in ("db1", "db2"):
        host.check("start", name)
