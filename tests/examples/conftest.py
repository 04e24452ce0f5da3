"""Examples as a user runs them, but into a folder of the test's own."""

import jax
import pytest

from benchmarks.harness import checkpoints, results


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """JAX's default numerics, and results and checkpoints that vanish afterwards."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield tmp_path
