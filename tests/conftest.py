"""For all tests."""

import pytest
from hypothesis import settings

settings.register_profile(
    "untimed", deadline=None
)  # how long an example takes says more of the machine than of the code
settings.load_profile("untimed")


# They take longest: where processes share the tests, the others do the rest meanwhile.
FIRST = ("test_nova_functional.py", "test_nova_driver.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nova's first."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
