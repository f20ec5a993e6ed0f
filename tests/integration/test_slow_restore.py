# SPDX-License-Identifier: Apache-2.0
"""libxl makes a domain, reads the RAM of its saved guest for minutes, and then starts the device model."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.state.start_steps import ABANDONED_SECONDS
from tests.integration.bench_host import Host

HANG_SECONDS = 300
WAITING_MODEL = """\
#!/bin/sh
if [ "$1" = -xen-domid ]; then
    touch {folder}/reads
    until [ -e {folder}/go ]; do sleep 0.1; done
fi
exec {folder}/real-model "$@"
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Yield a host with a saved guest, whose device model begins when the file ``go`` is there."""
    made = Host(tmp_path)
    try:
        made.define("db1", 1)
        made.check("start", "db1")
        made.check("save", "db1", str(tmp_path / "image"))
        made.check("start", "db1")
        made.check("managedsave", "db1")
        model = tmp_path / "nvdimm-device-model"
        model.rename(tmp_path / "real-model")
        model.write_text(WAITING_MODEL.format(folder=tmp_path))
        model.chmod(0o755)
        yield made
    finally:
        made.libvirtd.close()


def wait_until_it_reads(host: Host) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not (host.folder / "reads").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_start_is_not_over_while_xen_has_its_domain(host: Host) -> None:
    with host.libvirtd.begin("virsh", "-q", "-c", "xen:///system", "start", "db1") as first:
        wait_until_it_reads(host)
        ledger = sqlite3.connect(host.folder / "state/ledger.sqlite")
        with ledger:
            rows = ledger.execute(f"UPDATE attachment SET since = since - {ABANDONED_SECONDS}").rowcount
        ledger.close()
        assert rows == 1
        host.define("db2", 2)
        (host.folder / "go").touch()
        assert first.wait(HANG_SECONDS) == 0
    assert "running" in host.check("domstate", "db1")
    host.check("destroy", "db1")


def test_a_restore_that_is_under_way_is_not_given_up_for_a_start(host: Host) -> None:
    with host.libvirtd.begin("virsh", "-q", "-c", "xen:///system", "restore", str(host.folder / "image")) as first:
        wait_until_it_reads(host)
        second = host.virsh("start", "db1")
        assert second.returncode != 0
        assert "started from a saved guest or released by" in second.stderr
        (host.folder / "go").touch()
        first.wait(HANG_SECONDS)
    assert "put-away" not in host.log()
