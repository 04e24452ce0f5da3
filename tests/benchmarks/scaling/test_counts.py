"""What is counted in HLO is what a person counts."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.scaling.counts import count

M, K, N, TURNS = 16, 64, 64, 7


def compiled(f, *args):
    return count(jax.jit(f).lower(*args).compile().as_text())


def place(x, *spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def test_products_in_a_loop_count_as_often_as_it_runs():
    """XLA's own count takes the loop once."""
    f = lambda w, h: lax.fori_loop(0, TURNS, lambda _, h: jnp.tanh(h @ w), h)
    args = jnp.ones((K, K)), jnp.ones((M, K))
    counts = compiled(f, *args)
    assert counts.flops == TURNS * 2 * M * K * K
    assert counts.collectives == {} and counts.unknown == 0
    # Each turn reads the weights and reads and writes the state, at least.
    assert counts.memory >= TURNS * 4 * (K * K + 2 * M * K)
    assert counts.memory <= TURNS * 4 * (K * K + 8 * M * K) + 4 * 8 * K * K


def test_collectives_of_a_contraction_over_devices():
    """Columns of h and rows of w in parts: an all-reduce of the whole a turn."""
    f = lambda w, h: lax.fori_loop(
        0, TURNS, lambda _, h: lax.with_sharding_constraint(jnp.tanh(h @ w), whole), h
    )
    w, h = place(jnp.ones((K, K)), "d"), place(jnp.ones((M, K)))
    whole = h.sharding
    found = compiled(f, w, h)
    assert found.flops == TURNS * 2 * M * K * K / 8
    assert sum(n for n, _ in found.collectives.values()) == TURNS
    ((_, size),) = found.collectives.values()
    assert size == TURNS * 4 * M * K


def test_a_loop_of_unknown_length_is_said():
    f = lambda h: lax.while_loop(lambda h: h.sum() < 10, lambda h: h * 2, h)
    assert compiled(f, jnp.ones(4)).unknown == 1


@pytest.mark.full
def test_the_training_step_has_the_products_of_its_layers():
    """12 + 12 of W, and those of the gradient; encode, read, and theirs."""
    from benchmarks.scaling import worker

    units, batch, steps = 64, 16, 12
    asked = {"units": units, "batch": batch, "solver_steps": steps, "repetitions": 1}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        with jax.numpy_dtype_promotion("standard"):
            found = worker.measure(asked)
    assert found["unknown_loops"] == 0
    ours = batch // jax.device_count()
    loops = (steps + steps) * units * units
    # The product with w at h*, for the linearization, may be shared with the loop's.
    once = 2 * worker.PIXELS * units + 3 * units * worker.CLASSES + units * units
    least, most = loops + once, loops + once + 4 * units * units
    assert 2 * ours * least <= found["flops"] <= 2 * ours * most, found["flops"]
