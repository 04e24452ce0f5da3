"""Strict numerics for every test and doctest: float64, explicit ranks and dtypes."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # virtual devices for the sharding tests
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def key():
    """A fixed PRNG key."""
    return jax.random.key(0)
