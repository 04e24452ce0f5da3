"""Benchmarks run as a user runs them."""

import pytest

from tests.support.apart import as_a_user


@pytest.fixture(autouse=True)
def as_a_user_and_apart(tmp_path, monkeypatch):
    """In a folder of the test's own."""
    with as_a_user(monkeypatch, tmp_path):
        yield
