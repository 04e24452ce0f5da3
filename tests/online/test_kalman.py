"""The quasi-diagonal metric and the Kalman variant of NoBackTrack."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rbpjax import online
from rbpjax.online.metric import QuasiDiagonal, outer, solve
from tests.support.online import run, vanilla

TIGHT = dict(rtol=1e-12, atol=1e-12)


def draws(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def average_outer(samples):
    return jax.tree.map(lambda m: jnp.mean(m, 0), jax.vmap(outer)(samples))


def test_one_bias_and_one_weight_are_solved_exactly():
    """For rows of two numbers, M⁻¹g equals the dense solve, damping included."""
    samples, g = draws(20, 3, 2), draws(3, 2, seed=1)
    dense = jnp.einsum("sni,snj->nij", samples, samples) / 20
    damped = dense + 0.3 * jnp.eye(2)[None]
    exact = jnp.linalg.solve(damped, g[..., None])[..., 0]
    got = solve(average_outer(samples), g, 0.3)
    chex.assert_trees_all_close(got, exact, **TIGHT)


def test_kept_part_is_inverted_and_positive():
    """More weights: the inverse of the bordered metric with weights decorrelated.

    The metric that agrees with M on its bias row and diagonal and in which the
    weights are uncorrelated given the bias is inverted exactly; so gᵀM⁻¹g > 0.
    """
    samples, g = draws(40, 1, 4), draws(1, 4, seed=1)
    kept = average_outer(samples)
    bias, cross, weights = kept.bias[0], kept.cross[0], kept.weights[0]
    full = jnp.outer(cross, cross) / bias
    full = full + jnp.diag(weights - jnp.diagonal(full))
    top = jnp.concatenate([bias[None], cross])[None]
    full = jnp.concatenate([top, jnp.concatenate([cross[:, None], full], 1)])
    exact = jnp.linalg.solve(full, g[0])
    chex.assert_trees_all_close(solve(kept, g, 0.0)[0], exact, rtol=1e-10)
    for seed in range(50):
        g = draws(1, 4, seed=seed)
        assert jnp.vdot(g, solve(kept, g, 1e-6)) > 0


def test_decay_one_over_t_is_recursive_least_squares():
    """γₜ = 1/(t+1) and step γₜ on a linear model with bias: the Kalman filter.

    With the outer products of ∂y/∂θ as metric, t steps solve the normal equations
    of t observations; the prior has weight zero but for the damping.
    """
    x = jnp.stack([jnp.ones(30), draws(30)], 1)
    y = x @ jnp.array([0.7, -1.3]) + 0.3 * draws(30, seed=1)
    metric = QuasiDiagonal(jnp.zeros(1), jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    theta = jnp.zeros((1, 2))
    for t in range(30):
        mix = lambda m, new, t=t: m + (new - m) / (t + 1)
        metric = jax.tree.map(mix, metric, outer(x[t : t + 1]))
        g = (theta @ x[t] - y[t])[:, None] * x[t : t + 1]
        theta = theta - solve(metric, g, 1e-10) / (t + 1)
    exact = jnp.linalg.lstsq(x, y)[0]
    # The damping acts where the first observations leave a direction undetermined.
    chex.assert_trees_all_close(theta[0], exact, rtol=1e-6)


def rows_of(params):
    return jnp.concatenate([params["b"][:, None], params["W"], params["U"]], 1)


def make_kalman(system, include_current):
    def rows(params):
        return [rows_of(params), params["C"]]

    return rows, online.kalman_nobacktrack(
        system.f,
        system.loss,
        decay=0.2,
        rows=rows,
        damping=0.05,
        include_current=include_current,
    )


@pytest.mark.parametrize("include_current", [False, True])
def test_direction_is_the_preconditioned_raw_gradient(include_current):
    """grads = M⁻¹ĝ of the transformation, applied to what NoBackTrack would return."""
    system = vanilla(n=3, steps=8)
    rows, est = make_kalman(system, include_current)
    plain = jax.jit(online.nobacktrack(system.f, system.loss).step)
    transform = online.scale_by_quasi_diagonal(
        0.2, rows, damping=0.05, include_current=include_current
    )
    update = jax.jit(lambda grads, state: transform.update(grads, state))
    signs = jnp.sign(draws(8, 3))
    carries, out = run(est, system, signs)
    start = est.init(system.params, system.h0)
    carries = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, carries)
    state = transform.init(system.params)
    for t in range(8):
        carry = jax.tree.map(lambda a, t=t: a[t], carries)
        _, raw = plain(
            system.params,
            online.Carry(carry.h, carry.influence),
            system.xs[t],
            system.ys[t],
            signs[t],
        )
        chex.assert_trees_all_close(carry.metric.params, state, rtol=1e-10)
        direction, state = update(raw.grads, state)
        got = jax.tree.map(lambda a, t=t: a[t], out.grads)
        chex.assert_trees_all_close(got, direction, rtol=1e-9, atol=1e-11)
        gain = optax.tree.vdot(direction, raw.grads)
        assert gain > 0  # a descent direction


def test_metric_of_the_past_leaves_the_last_gradient_alone():
    """With include_current=False the first direction is the gradient / damping."""
    system = vanilla(n=2, steps=1)
    _, est = make_kalman(system, include_current=False)
    _, out = run(est, system)
    _, exact = run(online.rtrl(system.f, system.loss), system)
    scaled = jax.tree.map(lambda g: g / 0.05, exact.grads)
    chex.assert_trees_all_close(out.grads, scaled, rtol=1e-11)


def test_diagonal_without_rows_is_the_running_mean_square():
    """Every number alone: g / (mean g² + damping), mean over 1/(t+1) at first."""
    transform = online.scale_by_quasi_diagonal(0.01, damping=1e-3)
    gradients = draws(5, 3)
    state = transform.init(gradients[0])
    for g in gradients:
        direction, state = transform.update(g, state)
    expected = gradients[-1] / (jnp.mean(gradients**2, 0) + 1e-3)
    chex.assert_trees_all_close(direction, expected, rtol=1e-12)


def test_forgetting_has_a_floor():
    """After 1/γ updates the newest gradient keeps the share γ."""
    transform = online.scale_by_quasi_diagonal(0.25)
    state = transform.init(jnp.ones(1))
    for _ in range(20):
        _, state = transform.update(jnp.ones(1), state)
    _, state = transform.update(jnp.array([3.0]), state)
    # (1 - γ) · 1 + γ · 9
    chex.assert_trees_all_close(state.metric.bias, jnp.array([3.0]), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.0}, r"decay.*\(0, 1"),
        ({"decay": 1.5}, "decay"),
        ({"decay": 0.1, "damping": 0}, "damping"),
        ({"decay": jnp.array(0.1)}, "Python number"),
    ],
)
def test_bad_options_are_refused(options, message):
    """Out of range, and arrays, in both entry points."""
    with pytest.raises(ValueError, match=message):
        online.scale_by_quasi_diagonal(**options)
    with pytest.raises(ValueError, match=message):
        online.kalman_nobacktrack(lambda p, x, h: h, lambda p, h, y: h, **options)


def test_rows_must_use_every_number():
    """A forgotten parameter is counted."""
    params = {"W": jnp.ones((2, 3)), "b": jnp.ones(2)}
    transform = online.scale_by_quasi_diagonal(0.1, rows=lambda p: p["W"])
    with pytest.raises(ValueError, match="6 numbers of 8"):
        transform.init(params)
