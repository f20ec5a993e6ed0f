# SPDX-License-Identifier: Apache-2.0
"""A process that is killed, or whose calls fail, while it writes marks of devices: nobody gets another's device."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nvdimm_driver.device_marks import DeviceMarks
from nvdimm_driver.errors import FullDiskError, InUseError
from tests.integration.crash_points import Fault, traced
from tests.unit.doubles import OTHER_UUID, UUID
from tests.unit.test_device_marks import A, Host, device

EVERY = 4
"""Of how many points one is tried for what writes the ledger, too."""


def marks_of(folder: Path) -> DeviceMarks:
    return DeviceMarks(folder / "devices")


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("after", [None, b"after"])
@pytest.mark.parametrize("error", [0, errno.ENOSPC])
def test_a_mark_is_whole_at_each_point(tmp_path: Path, before: bytes | None, after: bytes | None, error: int) -> None:
    def work(folder: Path) -> Callable[[], None]:
        folder.mkdir()
        marks_of(folder).set_owner(device(), before)
        return lambda: marks_of(folder).set_owner(device(), after)

    count = len(traced(work(tmp_path / "all")).points)
    for point in range(count):
        folder = tmp_path / str(point)
        ended = traced(work(folder), Fault(point, error))
        assert marks_of(folder).owner(device()) in (before, after)
        assert ended.error is None or isinstance(ended.error, FullDiskError)
        marks_of(folder).set_owner(device(), after)
        assert marks_of(folder).owner(device()) == after


@pytest.mark.parametrize("what", ["define", "release"])
@pytest.mark.parametrize("error", [0, errno.ENOSPC])
def test_a_domain_has_its_device_and_the_mark_or_neither(tmp_path: Path, what: str, error: int) -> None:
    def begin(name: str) -> Host:
        (tmp_path / name).mkdir()
        host = Host(tmp_path / name)
        host.driver()
        if what == "release":
            host.define(A)
        return host

    def work(host: Host) -> None:
        host.define(A) if what == "define" else host.release(UUID)

    host = begin("all")
    count = len(traced(lambda: work(host)).points)
    assert count > EVERY
    for point in range(0, count, EVERY):
        host = begin(str(point))
        traced(lambda host=host: work(host), Fault(point, error))  # type: ignore[misc]
        if host.driver().ledger.find_domain(UUID):
            with pytest.raises(InUseError):
                host.define(A, uuid=OTHER_UUID)
        host.repair()
        known = host.driver().ledger.find_domain(UUID)
        has = bool(known and known.allocations)
        assert host.owner(A) == (UUID if has else None)
        with suppress(InUseError):
            host.define(A, uuid=OTHER_UUID)
        assert host.owner(A) == (UUID if has else OTHER_UUID)
