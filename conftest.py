"""Strict numerics for every test: float64, explicit ranks and dtypes."""

import os
from importlib.metadata import version
from pathlib import Path

# Most of the suite's time is compilation: let the compiler hurry. It decides neither
# what is computed nor how much memory the program asks for.
# A flag that the compiler does not know ends the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
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


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs before the system's limit of memory maps is reached."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


# Whole modules of the long form, as the marker ``full`` makes it: with them the default
# suite would take more than five minutes on two cores.
LONG = (
    "tests/benchmarks/citation",
    "tests/benchmarks/comparison",
    "tests/benchmarks/hopfield",
    "tests/benchmarks/hyperopt",
    "tests/benchmarks/modern",
    "tests/benchmarks/online",
    "tests/benchmarks/perturb",
    "tests/benchmarks/rooms",
    "tests/benchmarks/unitary",
    "tests/core/test_convolution.py",
    "tests/core/test_products.py",
    "tests/core/test_reuse.py",
    "tests/diagnostics/test_diagnose.py",
    "tests/diagnostics/test_recurrence.py",
    "tests/fixed_point/backward/test_own_backward.py",
    "tests/fixed_point/backward/test_rounding.py",
    "tests/fixed_point/backward/test_units.py",
    "tests/fixed_point/backward/test_warm.py",
    "tests/fixed_point/forward/test_broyden.py",
    "tests/fixed_point/forward/test_slow_and_small.py",
    "tests/fixed_point/test_bound.py",
    "tests/fixed_point/test_coupled.py",
    "tests/fixed_point/test_implicit.py",
    "tests/fixed_point/test_own_solvers.py",
    "tests/fixed_point/test_peers.py",
    "tests/fixed_point/test_phantom.py",
    "tests/fixed_point/test_products.py",
    "tests/fixed_point/test_propagation.py",
    "tests/fixed_point/test_report.py",
    "tests/fixed_point/test_reversible.py",
    "tests/fixed_point/test_sharding.py",
    "tests/fixed_point/test_solvers_and_rules.py",
    "tests/fixed_point/test_speech.py",
    "tests/fixed_point/test_states.py",
    "tests/fixed_point/test_traced_options.py",
    "tests/fixed_point/test_transforms.py",
    "tests/fixed_point/test_two_processes.py",
    "tests/nn/test_hopfield.py",
    "tests/online/test_combine.py",
    "tests/online/test_contracts.py",
    "tests/online/test_estimator.py",
    "tests/online/test_ok_rtrl.py",
    "tests/peers",
    "tests/perturb/test_activity.py",
    "tests/perturb/test_contract.py",
    "tests/perturb/test_decorrelate.py",
    "tests/perturb/test_dependence.py",
    "tests/perturb/test_difference.py",
    "tests/perturb/test_local.py",
    "tests/perturb/test_node.py",
    "tests/perturb/test_recurrent.py",
    "tests/perturb/test_seeded.py",
    "tests/perturb/test_weight.py",
    "tests/test_bilevel.py",
    "tests/test_examples.py",
    "tests/test_regularizers.py",
    "tests/unitary/test_boundary.py",
    "tests/unitary/test_cell.py",
    "tests/unitary/test_graph.py",
    "tests/unitary/test_orthogonal.py",
    "tests/unitary/test_recompute.py",
)


def pytest_collection_modifyitems(config, items):
    """Marks the tests of the long modules."""
    for item in items:
        path = item.path.relative_to(config.rootpath).as_posix()
        if path.startswith(LONG):
            item.add_marker(pytest.mark.full)
