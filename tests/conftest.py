"""For all tests."""

import pytest
from hypothesis import settings

settings.register_profile(
    "untimed", deadline=None
)  # how long an example takes says more of the machine than of the code
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nova's first: they take longest, and where two processes share the tests, the other does the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_nova.py" or "lab" in item.keywords)
