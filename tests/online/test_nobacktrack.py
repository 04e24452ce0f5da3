"""NoBackTrack's scales: what wrong ones cost, and all of them by one product."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from tests.support.counters import noted
from tests.support.online import (
    enumerate_runs,
    gru_after,
    lstm,
    mean,
    run,
    signs_like,
    step_gradients,
    unit_rows,
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


KALMAN = partial(
    online.kalman_nobacktrack, decay=0.2, damping=0.05, rows=unit_rows, prior=0.1
)


FULL = pytest.mark.full
EUCLIDEAN = online.nobacktrack, partial(online.nobacktrack, rows=unit_rows)
METRIC = KALMAN, partial(KALMAN, own_rows=True)


@pytest.mark.parametrize(
    ("make", "ways"),
    [
        (lstm, EUCLIDEAN),
        pytest.param(vanilla, METRIC, marks=FULL),
        pytest.param(gru_after, EUCLIDEAN, marks=FULL),
        pytest.param(lstm, METRIC, marks=FULL),
    ],
)
def test_norms_by_one_product_are_those_of_the_rows(make, ways):
    """Same signs, same run: carries and gradients, in their own size.

    The norms differ by the order of about ten squares in a sum, some 1e-15, and a step
    is Lipschitz in the scales with a constant of order one: 1e-13 after six steps.
    """
    row_by_row, at_once = ways
    system = make(
        n=3, steps=6
    )  # C has two rows, so that no unit of three owns one of them
    plain = row_by_row(system.f, system.loss)
    signs = signs_like(plain, system, len(system.xs))
    want = run(plain, system, signs)
    got = run(at_once(system.f, system.loss), system, signs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.max(np.abs(b)))


def count_products(make, system):
    """Products with Fᵀ that one step of the estimator executes."""
    calls = []
    transpose = lambda _, c: noted(calls, c)
    watched = partial(jax.custom_derivatives.linear_call, lambda _, p: p, transpose, ())
    f = lambda p, x, h: system.f(p | {"W": watched(p["W"])}, x, h)
    est = make(f, system.loss)
    carry = est.init(system.params, system.h0)
    step = jax.jit(est.step)
    signs = signs_like(est, system)
    jax.block_until_ready(step(system.params, carry, system.xs[0], system.ys[0], signs))
    jax.effects_barrier()
    return len(calls)


def test_the_number_of_products_does_not_grow_with_the_units():
    """One a leaf of the state, one for the gradient, one for w; else one a unit."""
    assert count_products(EUCLIDEAN[1], vanilla(n=5)) <= 3
    assert count_products(EUCLIDEAN[1], lstm(n=3)) <= 4
    assert count_products(EUCLIDEAN[0], vanilla(n=5)) == 7  # so that the counter counts


@FULL
def test_the_number_of_products_in_a_metric():
    """The same in the Kalman variant."""
    assert count_products(METRIC[1], vanilla(n=5)) <= 3


def test_rows_of_another_system_are_named():
    """No matrix with a row a unit; rows that lose a number; both kinds of norms."""
    system = vanilla(n=3)
    rows = lambda p: [leaf.reshape(1, -1) for leaf in p.values()]
    est = online.nobacktrack(system.f, system.loss, rows=rows)
    with pytest.raises(
        ValueError, match=r"row for each of the 3 units.*\[1, 1, 1, 1\]"
    ):
        run(est, system)
    est = online.nobacktrack(system.f, system.loss, rows=lambda p: p["W"])
    with pytest.raises(ValueError, match="9 numbers of 24"):
        est.init(system.params, system.h0)
    norms = lambda p, x, h: h
    with pytest.raises(ValueError, match="`row_norms` and `rows`"):
        online.nobacktrack(system.f, system.loss, rows=rows, row_norms=norms)
    with pytest.raises(ValueError, match=r"`own_rows=True`.*give `rows`"):
        online.kalman_nobacktrack(system.f, system.loss, decay=0.1, own_rows=True)
