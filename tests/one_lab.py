"""A plug-in of pytest-xdist: where several workers share the tests, one of them has all those of the lab."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling


class OneLab(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """The tests of a file go to one worker, and so do all those of the lab, as only one host can run."""

    def _split_scope(self, nodeid: str) -> str:
        return "lab" if nodeid.startswith("tests/lab/") else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneLab:
    """The hook that is asked."""
    return OneLab(config, log)
