"""OK-RTRL: unbiased over all signs, and of the variance that theory allows."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from rbpjax.online import rank_one
from rbpjax.online.ok_rtrl import reduce_sum
from tests.support.online import (
    enumerate_runs,
    lstm,
    mean,
    step_gradients,
    vanilla,
)

TIGHT = dict(rtol=1e-10, atol=1e-10)


def factors(sigma, seed=0):
    """Factors, neither orthogonal nor of equal size, of a sum with these values."""
    rng = np.random.default_rng(seed)
    size = len(sigma)
    left = np.linalg.qr(rng.standard_normal((size + 2, size)))[0]
    right = np.linalg.qr(rng.standard_normal((size + 4, size)))[0]
    mix = rng.standard_normal((size, size))
    us = (left * np.asarray(sigma)) @ mix
    ws = right @ np.linalg.inv(mix).T
    return jnp.asarray(us.T), jnp.asarray(ws.T)


def outcomes(us, ws):
    """The sums of the reduced factors for all signs."""
    signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=len(us))))
    left, right = jax.vmap(reduce_sum, (None, None, 0))(us, ws, signs)
    return np.einsum("prk,prn->pkn", left, right)


# With all values mixed, with one and with two of them kept, and where values are equal.
SPECTRA = {
    "two": ([3.0, 1.0], 0),
    "even": ([2.0, 1.9, 1.8, 1.7], 0),
    "one kept": ([9.0, 1.0, 0.9], 1),
    "two kept": ([50.0, 20.0, 1.0, 0.3], 2),
    "equal": ([1.0, 1.0, 1.0], 0),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_a_sum_is_reduced_without_bias_and_with_least_variance(name):
    """Mean over all signs; variance s² / (q - 1) - Σ σᵢ² over the values not kept.

    That is the bound of the paper's theorem: no unbiased estimate of that rank has
    less.
    """
    sigma, kept = SPECTRA[name]
    us, ws = factors(sigma)
    whole = np.asarray(us.T @ ws)
    found = outcomes(us, ws)
    np.testing.assert_allclose(np.mean(found, 0), whole, rtol=0, atol=1e-12)
    rest = np.array(sigma[kept:])
    bound = rest.sum() ** 2 / (len(rest) - 1) - np.sum(rest**2)
    got = np.mean(np.sum((found - whole) ** 2, (1, 2)))
    np.testing.assert_allclose(got, bound, rtol=1e-9)


def test_of_two_products_none_is_better_than_that_of_one_scale_each():
    """KF-RTRL's reduction, by its closed form, of the same two products."""
    for seed in range(5):
        us, ws = factors([2.0, 1.0], seed)
        scales = rank_one.scales(us, ws)
        theirs = float(rank_one.variance(us, ws, scales))
        got = np.mean(np.sum((outcomes(us, ws) - np.asarray(us.T @ ws)) ** 2, (1, 2)))
        assert got < theirs * (1 + 1e-12)


def test_fewer_numbers_than_products_are_exact():
    """Rank 2 of a sum whose right factors have one entry."""
    rng = np.random.default_rng(0)
    us, ws = (jnp.asarray(rng.standard_normal((3, n))) for n in (4, 1))
    left, right = reduce_sum(us, ws, jnp.ones(3))
    np.testing.assert_allclose(left.T @ right, us.T @ ws, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("system", "rank"),
    [(vanilla(n=2, steps=3), 1), (vanilla(n=2, steps=4), 2), (lstm(n=1, steps=3), 1)],
)
def test_the_mean_over_all_signs_is_exact(system, rank):
    """At every step; single runs are not."""
    est = online.ok_rtrl(system.f, system.loss, rank=rank)
    _, out = enumerate_runs(est, system)
    exact = step_gradients(system)
    chex.assert_trees_all_close(mean(out.grads), exact, **TIGHT)
    assert np.max(np.std(out.grads["U"], 0)) > 1e-6


def test_less_variance_than_kf_rtrl_and_less_with_rank():
    """Of the influence: at step 2, where both have the same past, and at the end."""
    system = vanilla(n=2, steps=4)

    def of(est, equation):
        carries, _ = enumerate_runs(est, system)
        u, a = carries.influence
        spread = np.var(np.einsum(equation, a, u), 0)
        return np.sum(spread.reshape(len(spread), -1), 1)

    kf = of(online.kf_rtrl(system.f, system.loss), "ptsiaj,ptk->ptsiajk")
    one, two, three = (
        of(online.ok_rtrl(system.f, system.loss, rank=r), "ptrsiaj,ptrk->ptsiajk")
        for r in (1, 2, 3)
    )
    assert kf[1] > 1.02 * one[1] > 0
    assert one[-1] > two[-1] > three[-1] > 0
    # As many products as steps: exact. A singular value of ε has the variance 2 σ ε.
    assert max(two[1], three[2]) < 1e-13 * one[1]


def test_nothing_has_no_noise():
    """A sum of zeros stays zero, and is finite."""
    left, right = reduce_sum(jnp.zeros((3, 4)), jnp.zeros((3, 5)), jnp.ones(3))
    assert np.all(left == 0) and np.all(right == 0)


def test_a_rank_without_need_is_refused():
    """As many products as features are the whole influence."""
    system = vanilla(n=2)
    with pytest.raises(ValueError, match="`rank` must be"):
        online.ok_rtrl(system.f, system.loss, rank=0)
    est = online.ok_rtrl(system.f, system.loss, rank=5)
    with pytest.raises(ValueError, match=r"`rank` = 5 must be below.*features, 5"):
        est.init(system.params, system.h0)
