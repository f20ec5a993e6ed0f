# SPDX-License-Identifier: Apache-2.0
"""Guests whose NVDIMMs are not cached, though they are to be: on stock Xen, and where dom0 does not cache them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import image, operator
from tests.lab.cached_guest import FILE, NAME, check_leaves, define, unpack_changed_xen
from tests.lab.host import XenHost
from tests.lab.release import RELEASES

pytestmark = [pytest.mark.lab, pytest.mark.thorough]


@pytest.fixture
def stock(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the shared host, whose Xen is the distribution's, with the domain defined."""
    define(driver_host)
    yield driver_host
    driver_host.run(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {FILE}")


def test_on_stock_xen_all_is_uncached_and_nothing_else_is_refused(stock: XenHost) -> None:
    define(stock, "write-back")
    refused = stock.run(f"{operator.VIRSH} start {NAME}")
    assert refused.returncode != 0
    assert "this Xen maps NVDIMMs uncached" in refused.stderr
    assert operator.show(stock, NAME)["state"] == "off"
    define(stock)
    operator.start(stock, NAME).wait_report()
    assert operator.show(stock, NAME)["cache"] == "uncached"
    check_leaves(stock, cached=False)


def test_without_mmio_relax_the_changed_xen_gives_nothing_cached(tmp_path: Path, shared_hosts: list[XenHost]) -> None:
    for shared in shared_hosts:
        shared.stop()
    with XenHost(image.build(RELEASES["bookworm"]), xen=unpack_changed_xen(tmp_path)) as host:
        operator.install_driver(host)
        operator.make_pmem(host)
        define(host, "write-back")
        refused = host.run(f"{operator.VIRSH} start {NAME}")
        assert refused.returncode != 0
        assert "mmio-relax is not on Xen's command line" in refused.stderr
        define(host)
        operator.start(host, NAME).wait_report()
        assert operator.show(host, NAME)["cache"] == "uncached"
        check_leaves(host, cached=False)
