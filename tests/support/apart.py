"""Experiments and examples as a user runs them, but into a folder of the test's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from benchmarks.harness import checkpoints, results


@contextmanager
def as_a_user(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Path]:
    """JAX's default numerics, and results and checkpoints that vanish afterwards."""
    monkeypatch.setattr(results, "RESULTS", folder / "results")
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", folder / "checkpoints")
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield folder
