"""Examples run as a user runs them, where a test asks for it."""

import pytest

from tests.support.apart import as_a_user


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """In a folder of the test's own."""
    with as_a_user(monkeypatch, tmp_path) as folder:
        yield folder
