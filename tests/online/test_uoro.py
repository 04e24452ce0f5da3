"""UORO by sampling, with the wrong noise, and while the parameters change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from tests.support.online import (
    exact_run,
    mean,
    run,
    sample,
    step_gradients,
    total,
    vanilla,
)


@pytest.mark.full
def test_sampled_mean_is_within_its_standard_error():
    """5 standard errors at 1500 runs, which resolve 6 % of the gradient."""
    system = vanilla(n=3, steps=6)
    single = online.uoro(system.f, system.loss)
    grads, noise = sample(single, system, 1500, seed=2)
    exact = total(step_gradients(system))
    sums = jax.tree.map(lambda x: np.sum(x, 1), grads)
    for got, want in zip(jax.tree.leaves(sums), jax.tree.leaves(exact), strict=True):
        error = np.std(got, 0) / 1500**0.5
        # Directions that no noise reaches have error zero, but for rounding.
        assert np.all(np.abs(np.mean(got, 0) - want) < 5 * error + 1e-10)
        assert np.linalg.norm(error) < 0.06 * np.linalg.norm(want)
    # The same mean comes from the copies of `average`, with the same noise.
    noise = jax.tree.map(lambda x: np.moveaxis(x, 0, 1), noise)
    _, out = run(online.combine.average(single, 1500), system, noise)
    chex.assert_trees_all_close(out.grads, mean(grads), rtol=1e-9, atol=1e-11)


def test_uniform_noise_shrinks_the_past_to_a_third():
    """Negative control on a run: with uniform noise v wᵀ has mean G/3, not G."""
    system = vanilla(n=2, steps=3)
    est = online.uoro(system.f, system.loss)
    noise = np.random.default_rng(5).uniform(-1.0, 1.0, (5_000, 3, 2))
    carries, _ = jax.jit(jax.vmap(lambda n: run(est, system, n)))(noise)
    v, w = carries.influence
    products = np.einsum("ei,ejk->eijk", v[:, -1], w["W"][:, -1])
    exact = np.asarray(exact_run(system)[0].influence["W"][-1])
    error = np.std(products, 0) / 5_000**0.5
    gap = lambda target: np.max(np.abs(np.mean(products, 0) - target) / error)
    assert gap(exact / 3) < 5
    assert gap(exact) > 10


def test_bias_of_online_updates_is_linear_in_the_step_size():
    """Updating at each step: no bias at t = 1, 2, and O(η) from t = 3 on."""
    system = vanilla(n=2, steps=3)

    def online_run(est, eta, noise):
        def body(state, xyn):
            params, carry = state
            carry, out = est.step(params, carry, *xyn)
            params = jax.tree.map(lambda p, g: p - eta * g, params, out.grads)
            return (params, carry), out.grads

        start = system.params, est.init(system.params, system.h0)
        return jax.lax.scan(body, start, (system.xs, system.ys, noise))[1]

    uoro, rtrl = (make(system.f, system.loss) for make in (online.uoro, online.rtrl))
    signs = online.rank_one.all_signs(np.ones(2), 3)

    @jax.jit
    @jax.vmap
    def bias(eta):
        runs = jax.vmap(lambda n: online_run(uoro, eta, n))(signs)
        gap = lambda a, b: jnp.mean(a, 0) - b
        gaps = jax.tree.map(gap, runs, online_run(rtrl, eta, ()))
        return jnp.sqrt(sum(jnp.sum(x**2, range(1, x.ndim)) for x in gaps.values()))

    etas = np.array([1e-6, 2e-6, 1e-3, 1e-2])
    tiny, twice, small, large = np.asarray(bias(etas))
    for at in (tiny, twice, small, large):
        np.testing.assert_allclose(at[:2], 0.0, atol=1e-12)
    # Slope 1 in the limit: the next order is η itself, here some 1e-6 relative.
    np.testing.assert_allclose(twice[2], 2 * tiny[2], rtol=1e-3)
    assert tiny[2] > 1e-9  # there is a bias to speak of
    assert 0.8 < np.log10(large[2] / small[2]) < 1.2
