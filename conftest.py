"""Strict numerics for every test: float64, explicit ranks and dtypes."""

import os

# Most of the suite's time is compilation: let the compiler hurry. It decides neither
# what is computed nor how much memory the program asks for.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false"
)

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
