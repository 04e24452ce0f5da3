"""Exact gradients: RTRL against the unrolled loss."""

import chex
import jax
import numpy as np
import pytest

from tests.support.online import (
    exact_run,
    gru,
    gru_after,
    leaky,
    lstm,
    step_gradients,
    total,
    vanilla,
)

FULL = pytest.mark.full
SYSTEMS = [
    vanilla,
    lstm,
    gru,
    pytest.param(leaky, marks=FULL),
    pytest.param(gru_after, marks=FULL),
]
# Identities in float64: some 10² roundings on numbers of order 1 to 10².
TIGHT = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", SYSTEMS)
def test_rtrl_is_the_unrolled_gradient_at_every_step(make):
    """δ G plus the direct part is the gradient of each loss, and so is the sum."""
    system = make()
    _, out = exact_run(system)
    oracle = step_gradients(system)
    assert all(np.linalg.norm(leaf) > 0.1 for leaf in jax.tree.leaves(oracle))
    chex.assert_trees_all_close(out.grads, oracle, **TIGHT)
    chex.assert_trees_all_close(total(out.grads), total(oracle), **TIGHT)
