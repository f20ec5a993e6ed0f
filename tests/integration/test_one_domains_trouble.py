# SPDX-License-Identifier: Apache-2.0
"""One domain's trouble stays its own, in the loops over all domains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nvdimm_driver.errors import XenError
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_ownership_real import Host, empty
from tests.unit.doubles import OTHER_UUID, UUID, map_prepared


@pytest.mark.parametrize("refused", [7, 8])
@pytest.mark.parametrize("kind", list(MKFS))
def test_frames_that_cannot_be_announced_keep_no_others_from_it(
    tmp_path: Path, file_systems: dict[str, FileSystem], kind: str, refused: int
) -> None:
    made = Host(tmp_path, file_systems[kind])
    for name, uuid, domid in (("a.img", UUID, 7), ("b.img", OTHER_UUID, 8)):
        made.driver.define(made.domain(name, uuid))
        made.mapper.alive[domid] = uuid
        made.driver.prepare(made.domain(name, uuid))
        map_prepared(made.driver.ledger, domid, uuid)
    made.mapper.announced.clear()
    announce = made.mapper.announce

    def fail(domid: int, mappings: Sequence[tuple[int, int, int]]) -> None:
        if domid == refused:
            raise XenError("xs_write: Argument list too long")
        announce(domid, mappings)

    made.mapper.announce = fail  # type: ignore[method-assign]
    made.driver.restart_lost()
    assert made.mapper.announced.keys() == {7, 8} - {refused}
    empty(file_systems[kind])
