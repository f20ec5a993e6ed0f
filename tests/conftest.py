# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests."""

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import settings

# the time of an example depends on the machine more than on the code
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# In a CI, pytest shows all of two values that differ, and compares them line by line: that takes hours for some MiB.
# Hypothesis asks if the variable is there, and tries the same examples each time then.
for name in {"CI", "BUILD_NUMBER"} & os.environ.keys():
    os.environ[name] = ""

# A background job of a script starts with SIGINT ignored. Programs that tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# They take longest. Where several processes share the tests, the others run the rest meanwhile.
FIRST = ("test_nova_functional.py", "test_nova_driver.py", "test_state_machine.py")


@pytest.fixture(autouse=True)
def _databases_are_closed() -> Iterator[None]:
    """Close the databases that a test opens: the commands that it calls leave that to the end of their process.

    Since Python 3.13, a connection of SQLite that is not closed is a warning.
    """
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def recorded(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which it may undo
        patch.setattr(sqlite3, "connect", recorded)
        yield
    for each in opened:
        with suppress(sqlite3.ProgrammingError):  # of a thread, which closes it
            each.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest first."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
