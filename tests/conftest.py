"""For all tests."""

import signal

import pytest
from hypothesis import settings

settings.register_profile(
    "untimed", deadline=None
)  # how long an example takes says more of the machine than of the code
settings.load_profile("untimed")

# A job in a script's background begins with SIGINT ignored; what tests start and interrupt would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# They take longest: where processes share the tests, the others do the rest meanwhile.
FIRST = ("test_nova_functional.py", "test_nova_driver.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nova's first."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
