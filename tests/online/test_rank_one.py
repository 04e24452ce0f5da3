"""The rank-one trick: mean, variance, best scales."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online


def terms(seed=0, k=6, n=4, p=5):
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal((k, 1)))  # unequal norms, or ρ has no role
    vs = spread * rng.standard_normal((k, n))
    return vs, rng.standard_normal((k, p)) / spread**0.5


@jax.jit
def all_products(vs, ws, scales):
    signs = online.rank_one.all_signs(jnp.ones(len(vs)), 1)[:, 0]
    pairs = jax.vmap(online.rank_one.reduce, (None, None, 0, None))(
        vs, ws, signs, scales
    )
    return jnp.einsum("ei,ej->eij", pairs.v, pairs.w)


@pytest.mark.parametrize("best", [False, True])
def test_mean_over_all_signs_is_the_sum(best):
    """E v wᵀ = Σ vᵢ wᵢᵀ for any scales."""
    vs, ws = terms()
    scales = online.rank_one.scales(vs, ws) if best else np.arange(1.0, 7.0)
    mean = np.mean(all_products(vs, ws, scales), 0)
    chex.assert_trees_all_close(mean, vs.T @ ws, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("best", [False, True])
def test_variance_formula_is_exact(best):
    """The closed form equals the variance over all 64 sign patterns."""
    vs, ws = terms(seed=1)
    scales = online.rank_one.scales(vs, ws) if best else np.arange(1.0, 7.0)
    products = np.asarray(all_products(vs, ws, scales))
    enumerated = np.mean(np.sum((products - vs.T @ ws) ** 2, (1, 2)))
    formula = online.rank_one.variance(vs, ws, scales)
    chex.assert_trees_all_close(formula, enumerated, rtol=1e-12)


def test_no_random_scales_beat_the_chosen():
    """ρᵢ² ∝ ‖wᵢ‖/‖vᵢ‖ has less variance than 300 random scales, near and far."""
    vs, ws = terms(seed=2)
    best = np.asarray(online.rank_one.scales(vs, ws))
    noise = np.random.default_rng(3).standard_normal((300, len(vs)))
    size = np.logspace(-3, 0.5, 300)[:, None]
    others = best * np.exp(size * noise)
    variance = jax.jit(jax.vmap(online.rank_one.variance, (None, None, 0)))
    assert np.all(variance(vs, ws, others) > variance(vs, ws, best[None]))


def test_uniform_noise_gives_a_third():
    """Negative control: noise of variance 1/3 estimates G/3, not G.

    The mean of a form quadratic in noise uniform on [-1, 1] is exact by the
    two-point Gauss rule, whose nodes are ±1/√3.
    """
    vs, ws = terms()
    nodes = online.rank_one.all_signs(np.ones(len(vs)), 1)[:, 0] / 3**0.5
    pairs = jax.vmap(online.rank_one.reduce, (None, None, 0, None))(
        vs, ws, nodes, online.rank_one.scales(vs, ws)
    )
    mean = np.einsum("ei,ej->ij", pairs.v, pairs.w) / len(nodes)
    chex.assert_trees_all_close(mean, vs.T @ ws / 3, rtol=1e-12, atol=1e-12)


def test_common_factor_of_scales_cancels():
    """Only the ratios of the scales matter."""
    vs, ws = terms()
    scales = online.rank_one.scales(vs, ws)
    one, two = (all_products(vs, ws, c * scales) for c in (1.0, 7.0))
    chex.assert_trees_all_close(one, two, rtol=1e-12, atol=1e-12)


def test_all_signs_are_all_and_once():
    """Every pattern occurs once, with the structure of the noise."""
    noise = {"a": jnp.ones(2), "b": jnp.ones(())}
    signs = online.rank_one.all_signs(noise, num_steps=2)
    chex.assert_shape((signs["a"], signs["b"]), [(64, 2, 2), (64, 2)])
    flat = np.concatenate([signs["a"], signs["b"][..., None]], 2).reshape(64, 6)
    assert len({tuple(row) for row in flat.tolist()}) == 64
    assert np.all(np.abs(flat) == 1)


def test_too_many_signs_are_refused():
    """2^21 patterns raise, with the count and the remedy."""
    with pytest.raises(ValueError, match=r"num_steps.*2\^21.*fewer steps"):
        online.rank_one.all_signs(jnp.ones(3), num_steps=7)
