# SPDX-License-Identifier: Apache-2.0
"""A 'register' that is killed keeps no domain from its start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvdimm_driver.cmd.register import _install_hook
from nvdimm_driver.doctor.programs import Script
from nvdimm_driver.registered import MARK
from tests.integration.bench_host import Host
from tests.integration.crash_points import Fault, traced


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    try:
        yield host
    finally:
        host.libvirtd.close()


@pytest.mark.parametrize("before", ["", f"#!/bin/sh\n{MARK}\n: before\n"])
def test_libvirts_folder_has_only_whole_hooks_at_each_point(tmp_path: Path, before: str) -> None:
    after = f"#!/bin/sh\n{MARK}\n: after\n"

    def work(folder: Path) -> Callable[[], object]:
        hook = folder / "libxl.d/50-nvdimm"
        hook.parent.mkdir(parents=True)
        if before:
            hook.write_text(before)
            hook.chmod(0o755)
        return lambda: list(_install_hook(Script("hook", hook, after, MARK)))

    count = len(traced(work(tmp_path / "all")).points)
    assert count >= len(("open", "write", "fchmod", "fsync", "rename", "fsync"))
    for point in range(count):
        traced(work(tmp_path / str(point)), Fault(point))
        files = (tmp_path / str(point) / "libxl.d").iterdir()
        found = {each.name: each.read_text() for each in files if os.access(each, os.X_OK)}
        assert found in ({"50-nvdimm": before} if before else {}, {"50-nvdimm": after})


def test_what_is_left_keeps_no_domain_from_its_start(host: Host) -> None:
    host.define("db1", 1)
    left, earlier = (host.libvirtd.hooks / folder / ".50-nvdimm.new" for folder in ("", "libxl.d"))
    for path in (left, earlier):
        path.touch(0o755)
        done = host.virsh("start", "db1")
        assert done.returncode == (path == earlier), done.stderr
        host.virsh("destroy", "db1")
    assert "removed /etc/libvirt/hooks/libxl.d/.50-nvdimm.new" in host.nvdimmctl("register").stdout
    host.check("start", "db1")
