"""The rank-one trick: mean, variance, best scales."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import online


def terms(seed=0, k=6, n=4, p=5):
    kv, kw, kr = jax.random.split(jax.random.key(seed), 3)
    spread = jnp.exp(jax.random.normal(kr, (k, 1)))  # unequal norms, or ρ has no role
    vs = spread * jax.random.normal(kv, (k, n))
    return vs, jax.random.normal(kw, (k, p)) / spread**0.5


def all_products(vs, ws, scales):
    signs = online.all_signs(jnp.ones(len(vs)), 1)[:, 0]
    pairs = jax.vmap(online.rank_one, (None, None, 0, None))(vs, ws, signs, scales)
    return jnp.einsum("ei,ej->eij", pairs.v, pairs.w)


@pytest.mark.parametrize("best", [False, True])
def test_mean_over_all_signs_is_the_sum(best):
    """E v wᵀ = Σ vᵢ wᵢᵀ for any scales."""
    vs, ws = terms()
    scales = online.rank_one_scales(vs, ws) if best else jnp.arange(1.0, 7.0)
    mean = jnp.mean(all_products(vs, ws, scales), 0)
    chex.assert_trees_all_close(mean, vs.T @ ws, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("best", [False, True])
def test_variance_formula_is_exact(best):
    """The closed form equals the variance over all 64 sign patterns."""
    vs, ws = terms(seed=1)
    scales = online.rank_one_scales(vs, ws) if best else jnp.arange(1.0, 7.0)
    products = all_products(vs, ws, scales)
    enumerated = jnp.mean(jnp.sum((products - (vs.T @ ws)[None]) ** 2, (1, 2)))
    formula = online.rank_one_variance(vs, ws, scales)
    chex.assert_trees_all_close(formula, enumerated, rtol=1e-12)


def test_no_random_scales_beat_the_chosen():
    """ρᵢ² ∝ ‖wᵢ‖/‖vᵢ‖ has less variance than 300 random scales, near and far."""
    vs, ws = terms(seed=2)
    best = online.rank_one_scales(vs, ws)
    noise = jax.random.normal(jax.random.key(3), (300, len(vs)))
    size = jnp.logspace(-3, 0.5, 300)[:, None]
    others = best[None] * jnp.exp(size * noise)
    variance = jax.vmap(online.rank_one_variance, (None, None, 0))(vs, ws, others)
    assert jnp.all(variance > online.rank_one_variance(vs, ws, best))


def test_uniform_noise_gives_a_third():
    """Negative control: noise of variance 1/3 estimates G/3, not G.

    The mean of a form quadratic in noise uniform on [-1, 1] is exact by the
    two-point Gauss rule, whose nodes are ±1/√3.
    """
    vs, ws = terms()
    nodes = online.all_signs(jnp.ones(len(vs)), 1)[:, 0] / 3**0.5
    pairs = jax.vmap(online.rank_one, (None, None, 0, None))(
        vs, ws, nodes, online.rank_one_scales(vs, ws)
    )
    mean = jnp.einsum("ei,ej->ij", pairs.v, pairs.w) / len(nodes)
    chex.assert_trees_all_close(mean, vs.T @ ws / 3, rtol=1e-12, atol=1e-12)


def test_common_factor_of_scales_cancels():
    """Only the ratios of the scales matter."""
    vs, ws = terms()
    scales = online.rank_one_scales(vs, ws)
    one, two = (all_products(vs, ws, c * scales) for c in (1.0, 7.0))
    chex.assert_trees_all_close(one, two, rtol=1e-12, atol=1e-12)


def test_all_signs_are_all_and_once():
    """Every pattern occurs once, with the structure of the noise."""
    noise = {"a": jnp.ones(2), "b": jnp.ones(())}
    signs = online.all_signs(noise, num_steps=2)
    chex.assert_shape((signs["a"], signs["b"]), [(64, 2, 2), (64, 2)])
    flat = jnp.concatenate([signs["a"], signs["b"][..., None]], 2).reshape(64, 6)
    assert len({tuple(row) for row in flat.tolist()}) == 64
    assert jnp.all(jnp.abs(flat) == 1)


def test_too_many_signs_are_refused():
    """2^21 patterns raise, with the count and the remedy."""
    with pytest.raises(ValueError, match=r"num_steps.*2\^21.*fewer steps"):
        online.all_signs(jnp.ones(3), num_steps=7)
