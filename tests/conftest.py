"""The longest test begins first: two workers share the tests, and at the end one would wait for it."""

import pytest

LONGEST = "test_from_nothing.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put it in front; all others stay in order."""
    items.sort(key=lambda item: item.path.name != LONGEST)
