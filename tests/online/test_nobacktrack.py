"""NoBackTrack's scales: what wrong ones cost."""

import chex
import jax.numpy as jnp
import pytest

from rbpjax import online
from tests.support.online import (
    enumerate_runs,
    mean,
    step_gradients,
    vanilla,
    variance,
)

TIGHT = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.full
def test_wrong_row_norms_cost_variance_not_bias():
    """Any positive row norms keep the mean; the true ones match the default."""
    system = vanilla(n=2, steps=3)

    def right(p, x, h):
        slope = 1 - system.f(p, x, h) ** 2
        return slope * jnp.sqrt(jnp.sum(h**2) + jnp.sum(x**2) + 1)

    def wrong(p, x, h):
        return 50.0 ** jnp.arange(2.0) * (1 + h**2)

    outs = [
        enumerate_runs(
            online.nobacktrack(system.f, system.loss, row_norms=norms), system
        )[1].grads
        for norms in (None, right, wrong)
    ]
    chex.assert_trees_all_close(outs[0], outs[1], **TIGHT)
    chex.assert_trees_all_close(mean(outs[2]), step_gradients(system), **TIGHT)
    assert variance(outs[2]) > 1.5 * variance(outs[0])
