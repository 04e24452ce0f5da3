"""Unbiasedness by enumeration of every sign, and by sampling."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import online
from tests.support.online import (
    enumerate_runs,
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


def kalman(f, loss):
    return online.kalman_nobacktrack(f, loss, decay=0.2)


@pytest.mark.parametrize(
    ("make", "system"),
    [
        (online.uoro, gru(n=2, steps=3)),
        (online.nobacktrack, lstm(n=1, steps=3)),
        (kalman, vanilla(n=2, steps=3)),
    ],
)
def test_rank_one_influence_is_rtrl_in_the_mean(make, system):
    """Over all 64 sign tensors the mean of v wᵀ is G at every step."""
    (carries, _) = enumerate_runs(make(system.f, system.loss), system)
    assert len(jax.tree.leaves(carries.h)[0]) == 64
    v, w = carries.influence
    v = jnp.concatenate([x.reshape(64, 3, -1) for x in jax.tree.leaves(v)], 2)
    outer = jax.tree.map(lambda x: jnp.einsum("eti,et...->ti...", v, x) / 64, w)
    exact, _ = run(online.rtrl(system.f, system.loss), system)
    chex.assert_trees_all_close(outer, exact.influence, **TIGHT)


@pytest.mark.parametrize(
    ("make", "system"),
    [
        (online.uoro, vanilla(n=2, steps=3)),
        (online.uoro, lstm(n=1, steps=3)),
        (online.nobacktrack, vanilla(n=2, steps=3)),
        (online.kf_rtrl, vanilla(n=2, steps=3)),
        (online.kf_rtrl, gru_after(n=2, steps=3)),
    ],
)
def test_gradient_is_exact_in_the_mean_at_every_step(make, system):
    """Over all 64 sign tensors the mean gradient is the unrolled one, noise is real."""
    _, out = enumerate_runs(make(system.f, system.loss), system)
    assert len(out.loss) == 64
    chex.assert_trees_all_close(mean(out.grads), step_gradients(system), **TIGHT)
    assert variance(out.grads) > 1e-3


def test_kronecker_influence_is_rtrl_in_the_mean():
    """The mean of A ⊗ u, taken to the parameters, is G at every step (T = 4)."""
    system = lstm(n=2, steps=4)
    carries, _ = enumerate_runs(online.kf_rtrl(system.f, system.loss), system)
    u, a = carries.influence
    kernels = jnp.einsum("etsiaj,etk->tsiajk", a, u) / len(u)
    _, to_params = jax.vjp(system.f.kernel, system.params)
    flat = kernels.reshape(4 * 4, *kernels.shape[3:])
    (got,) = jax.vmap(to_params)(flat)
    exact, _ = run(online.rtrl(system.f, system.loss), system)
    got = jax.tree.map(lambda g, e: g.reshape(e.shape), got, exact.influence)
    chex.assert_trees_all_close(got, exact.influence, **TIGHT)


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


def test_kronecker_noise_is_smaller():
    """With more units, KF-RTRL has far less variance than UORO."""
    system = vanilla(n=4, steps=8)
    kf_rtrl, uoro = (
        variance(sample(make(system.f, system.loss), system, 400, seed=1)[0])
        for make in (online.kf_rtrl, online.uoro)
    )
    assert kf_rtrl < 0.5 * uoro


def sample(est, system, runs, seed):
    """Gradients of independent runs, and the noise that made them."""
    carry = est.init(system.params, system.h0)
    keys = jax.random.split(jax.random.key(seed), (runs, len(system.xs)))
    noise = jax.vmap(jax.vmap(est.noise, (0, None)), (0, None))(keys, carry)
    return jax.jit(jax.vmap(lambda n: run(est, system, n)[1].grads))(noise), noise


def test_sampled_mean_is_within_its_standard_error():
    """5 standard errors at 1500 runs, which resolve 6 % of the gradient."""
    system = vanilla(n=3, steps=6)
    single = online.uoro(system.f, system.loss)
    grads, noise = sample(single, system, 1500, seed=2)
    exact = jax.tree.map(lambda x: jnp.sum(x, 0), step_gradients(system))
    total = jax.tree.map(lambda x: jnp.sum(x, 1), grads)
    for got, want in zip(jax.tree.leaves(total), jax.tree.leaves(exact), strict=True):
        error = jnp.std(got, 0) / 1500**0.5
        # Directions that no noise reaches have error zero, but for rounding.
        assert jnp.all(jnp.abs(jnp.mean(got, 0) - want) < 5 * error + 1e-10)
        assert jnp.linalg.norm(error) < 0.06 * jnp.linalg.norm(want)
    # The same mean comes from the copies of `average`, with the same noise.
    noise = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), noise)
    _, out = run(online.average(single, 1500), system, noise)
    chex.assert_trees_all_close(out.grads, mean(grads), rtol=1e-9, atol=1e-11)


def test_error_falls_as_one_over_root_n():
    """The mean squared error of N copies is 1/N of that of one."""
    system = vanilla(n=3, steps=5)
    exact = step_gradients(system)

    def squared_error(copies, key):
        est = online.average(online.uoro(system.f, system.loss), copies)
        carry = est.init(system.params, system.h0)
        keys = jax.random.split(key, 5)
        noise = jax.vmap(est.noise, (0, None))(keys, carry)
        gap = jax.tree.map(jnp.subtract, run(est, system, noise)[1].grads, exact)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(gap))

    keys = jax.random.split(jax.random.key(3), 400)
    errors = {
        n: jax.jit(jax.vmap(squared_error, (None, 0)), static_argnums=0)(n, keys)
        for n in (1, 16)
    }
    for n in (16,):
        # Each mean is known to its standard error over 400 repeats.
        ratio = n * jnp.mean(errors[n]) / jnp.mean(errors[1])
        spread = sum(
            jnp.var(e) / jnp.mean(e) ** 2 / 400 for e in (errors[n], errors[1])
        )
        assert abs(ratio - 1) < 5 * spread**0.5
        assert 5 * spread**0.5 < 0.5


def test_copies_divide_the_variance_exactly():
    """Two copies: the same mean, half the variance, over all 256 patterns."""
    system = vanilla(n=2, steps=2)
    one = online.uoro(system.f, system.loss)
    _, single = enumerate_runs(one, system)
    _, double = enumerate_runs(online.average(one, 2), system)
    chex.assert_trees_all_close(mean(double.grads), mean(single.grads), **TIGHT)
    half = variance(single.grads) / 2
    chex.assert_trees_all_close(variance(double.grads), half, rtol=1e-12)


def test_shared_parameter_part_is_unbiased_but_noisier():
    """Batch of two, all 4096 patterns: both means exact, shared w has more variance."""
    system = vanilla(n=2, steps=3)
    other = vanilla(n=2, steps=3, seed=9)
    batch = system._replace(
        h0=jnp.stack([system.h0, other.h0]),
        xs=jnp.stack([system.xs, other.xs], 1),
        ys=jnp.stack([system.ys, other.ys], 1),
    )
    apart = online.per_sequence(online.uoro(system.f, system.loss))
    shared = online.uoro(*online.over_batch(system.f, system.loss))
    exact = run(online.per_sequence(online.rtrl(system.f, system.loss)), batch)[1].grads
    outs = [enumerate_runs(est, batch)[1].grads for est in (apart, shared)]
    for grads in outs:
        chex.assert_trees_all_close(mean(grads), exact, **TIGHT)
    assert variance(outs[1]) > 1.2 * variance(outs[0])


def test_uniform_noise_shrinks_the_past_to_a_third():
    """Negative control on a run: with uniform noise v wᵀ has mean G/3, not G."""
    system = vanilla(n=2, steps=3)
    est = online.uoro(system.f, system.loss)
    noise = jax.random.uniform(
        jax.random.key(5), (5_000, 3, 2), dtype=float, minval=-1.0, maxval=1.0
    )
    carries, _ = jax.jit(jax.vmap(lambda n: run(est, system, n)))(noise)
    v, w = carries.influence
    products = jnp.einsum("ei,ejk->eijk", v[:, -1], w["W"][:, -1])
    exact = run(online.rtrl(system.f, system.loss), system)[0].influence["W"][-1]
    error = jnp.std(products, 0) / 5_000**0.5
    gap = lambda target: jnp.max(jnp.abs(jnp.mean(products, 0) - target) / error)
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
    signs = online.all_signs(jnp.ones(2), 3)

    def bias(eta):
        runs = jax.vmap(lambda n: online_run(uoro, eta, n))(signs)
        gap = jax.tree.map(jnp.subtract, mean(runs), online_run(rtrl, eta, ()))
        return jnp.sqrt(sum(jnp.sum(x**2, range(1, x.ndim)) for x in gap.values()))

    at = {eta: bias(eta) for eta in (1e-6, 2e-6, 1e-3, 1e-2)}
    for eta in at:
        chex.assert_trees_all_close(at[eta][:2], jnp.zeros(2), atol=1e-12)
    # Slope 1 in the limit: the next order is η itself, here some 1e-6 relative.
    chex.assert_trees_all_close(at[2e-6][2], 2 * at[1e-6][2], rtol=1e-3)
    assert at[1e-6][2] > 1e-9  # there is a bias to speak of
    slope = jnp.log10(at[1e-2][2] / at[1e-3][2])
    assert 0.8 < slope < 1.2
