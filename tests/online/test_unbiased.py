"""Unbiasedness of every random estimator, by enumeration of every sign."""

import chex
import jax
import numpy as np
import pytest

from rbpjax import online
from tests.support.online import (
    enumerate_runs,
    exact_run,
    gru,
    gru_after,
    lstm,
    mean,
    run,
    step_gradients,
    vanilla,
    variance,
)

# Means of 64 to 1024 float64 numbers of order 1 to 10.
TIGHT = dict(rtol=1e-12, atol=1e-12)
FULL = pytest.mark.full


def kalman(f, loss):
    return online.kalman_nobacktrack(f, loss, decay=0.2)


@pytest.mark.parametrize(
    ("make", "system"),
    [
        (online.uoro, gru(n=2, steps=3)),
        pytest.param(online.nobacktrack, lstm(n=1, steps=3), marks=FULL),
        pytest.param(kalman, vanilla(n=2, steps=3), marks=FULL),
    ],
)
def test_rank_one_influence_is_rtrl_in_the_mean(make, system):
    """Over all 64 sign tensors the mean of v wᵀ is G at every step."""
    (carries, _) = enumerate_runs(make(system.f, system.loss), system)
    assert len(jax.tree.leaves(carries.h)[0]) == 64
    v, w = carries.influence
    v = np.concatenate([x.reshape(64, 3, -1) for x in jax.tree.leaves(v)], 2)
    outer = jax.tree.map(lambda x: np.einsum("eti,et...->ti...", v, x) / 64, w)
    exact, _ = exact_run(system)
    chex.assert_trees_all_close(outer, exact.influence, **TIGHT)


@pytest.mark.parametrize(
    ("make", "system"),
    [
        (online.uoro, vanilla(n=2, steps=3)),
        (online.nobacktrack, vanilla(n=2, steps=3)),
        (online.kf_rtrl, vanilla(n=2, steps=3)),
        pytest.param(online.uoro, lstm(n=1, steps=3), marks=FULL),
        pytest.param(online.kf_rtrl, gru_after(n=2, steps=3), marks=FULL),
    ],
)
def test_gradient_is_exact_in_the_mean_at_every_step(make, system):
    """Over all 64 sign tensors the mean gradient is the unrolled one, noise is real."""
    _, out = enumerate_runs(make(system.f, system.loss), system)
    assert len(out.loss) == 64
    chex.assert_trees_all_close(mean(out.grads), step_gradients(system), **TIGHT)
    assert variance(out.grads) > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        online.uoro,
        pytest.param(online.nobacktrack, marks=FULL),
        online.kf_rtrl,
        online.snap1,
    ],
)
def test_first_step_of_every_estimator_is_exact(make):
    """With no past, the gradient has no noise: the last step is exact."""
    system = vanilla(steps=1)
    _, out = run(make(system.f, system.loss), system)
    chex.assert_trees_all_close(out.grads, step_gradients(system), **TIGHT)
