# SPDX-License-Identifier: Apache-2.0
"""Runs in a process of its own: importing nova's functional tests patches it for eventlet."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest

from tests.integration.loop_pmem import FileSystem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what nova uses is not ours
    import nova.tests.functional  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")


def pytest_unconfigure() -> None:
    # From Python 3.13 on, an SQLite connection that nova leaves open is told of, here without the marks above.
    warnings.simplefilter("ignore")
    sys.excepthook = sys.__excepthook__  # oslo.log's writes to a stream that pytest has closed: nobody would see why


@pytest.fixture(scope="session")
def file_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystem]:
    mounted = FileSystem(tmp_path_factory.mktemp("pmem"), "ext4")
    yield mounted
    mounted.close()
