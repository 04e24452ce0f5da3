"""The quasi-diagonal metric against dense solves, and as a transformation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from rbpjax.online.metric import QuasiDiagonal, outer, solve

TIGHT = dict(rtol=1e-12, atol=1e-12)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


solve = jax.jit(solve, static_argnums=2)


@jax.jit
def average_outer(samples):
    return jax.tree.map(lambda m: jnp.mean(m, 0), jax.vmap(outer)(samples))


def test_one_bias_and_one_weight_are_solved_exactly():
    """For rows of two numbers, M⁻¹g equals the dense solve, damping included."""
    samples, g = draws(20, 3, 2), draws(3, 2, seed=1)
    dense = np.einsum("sni,snj->nij", samples, samples) / 20
    damped = dense + 0.3 * np.eye(2)
    exact = np.linalg.solve(damped, g[..., None])[..., 0]
    got = solve(average_outer(samples), g, 0.3)
    chex.assert_trees_all_close(got, exact, **TIGHT)


def test_kept_part_is_inverted_and_positive():
    """More weights: the inverse of the bordered metric with weights decorrelated.

    The metric that agrees with M on its bias row and diagonal and in which the
    weights are uncorrelated given the bias is inverted exactly; so gᵀM⁻¹g > 0.
    """
    samples, g = draws(40, 1, 4), draws(1, 4, seed=1)
    kept = average_outer(samples)
    bias, cross, weights = (np.asarray(part[0]) for part in kept)
    full = np.outer(cross, cross) / bias
    full = full + np.diag(weights - np.diagonal(full))
    full = np.block([[bias, cross], [cross[:, None], full]])
    exact = np.linalg.solve(full, g[0])
    chex.assert_trees_all_close(solve(kept, g, 0.0)[0], exact, rtol=1e-10)
    for seed in range(50):
        g = draws(1, 4, seed=seed)
        assert np.vdot(g, solve(kept, g, 1e-6)) > 0


def test_decay_one_over_t_is_recursive_least_squares():
    """γₜ = 1/(t+1) and step γₜ on a linear model with bias: the Kalman filter.

    With the outer products of ∂y/∂θ as metric, t steps solve the normal equations
    of t observations; the prior has weight zero but for the damping.
    """
    x = np.stack([np.ones(30), draws(30)], 1)
    y = x @ np.array([0.7, -1.3]) + 0.3 * draws(30, seed=1)
    metric = QuasiDiagonal(np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1)))
    theta = np.zeros((1, 2))
    for t in range(30):
        mix = lambda m, new, t=t: m + (new - m) / (t + 1)
        metric = jax.tree.map(mix, metric, outer(x[t : t + 1]))
        g = (theta @ x[t] - y[t])[:, None] * x[t : t + 1]
        theta = theta - np.asarray(solve(metric, g, 1e-10)) / (t + 1)
    exact = np.linalg.lstsq(x, y)[0]
    # The damping acts where the first observations leave a direction undetermined.
    chex.assert_trees_all_close(theta[0], exact, rtol=1e-6)


def test_with_a_prior_the_recipe_is_the_kalman_filter():
    """Step size = decay on a linear model: weighted least squares around the start.

    With λ = 1 - γ it minimizes Σₛ λᵗ⁻ˢ (yₛ - θ·xₛ)² + λᵗ (prior / γ) ‖θ - θ₀‖². The
    metric learns xₛ, whose outer product is the curvature of the loss.
    """
    gamma, prior, start = 0.05, 0.3, np.array([[2.0, -1.0]])
    x = np.stack([np.ones(30), draws(30)], 1)
    y = x @ np.array([0.7, -1.3]) + 0.3 * draws(30, seed=1)
    transform = online.scale_by_quasi_diagonal(
        gamma, lambda p: p, damping=1e-14, prior=prior
    )
    update = jax.jit(lambda g, state: transform.update(g, state))
    theta, state = start, transform.init(start)
    for t in range(30):
        direction, state = update(x[t : t + 1], state)
        theta = theta - gamma * (theta[0] @ x[t] - y[t]) * np.asarray(direction)
    weights = (1 - gamma) ** np.arange(29, -1, -1)
    before = (1 - gamma) ** 30 * prior / gamma
    normal = np.einsum("t,ti,tj->ij", weights, x, x) + before * np.eye(2)
    exact = np.linalg.solve(normal, (weights * y) @ x + before * start[0])
    # The damping is 1e-13 of the prior; a step is backward stable at condition 10.
    chex.assert_trees_all_close(theta[0], exact, rtol=1e-11)


def test_diagonal_without_rows_is_the_running_mean_square():
    """Every number alone: g / (mean g² + damping), mean over 1/(t+1) at first."""
    transform = online.scale_by_quasi_diagonal(0.01, damping=1e-3)
    gradients = draws(5, 3)
    update = jax.jit(lambda g, state: transform.update(g, state))
    state = transform.init(gradients[0])
    for g in gradients:
        direction, state = update(g, state)
    expected = gradients[-1] / (np.mean(gradients**2, 0) + 1e-3)
    chex.assert_trees_all_close(direction, expected, rtol=1e-12)


def test_forgetting_has_a_floor():
    """After 1/γ updates the newest gradient keeps the share γ."""
    transform = online.scale_by_quasi_diagonal(0.25)
    update = jax.jit(lambda g, state: transform.update(g, state))
    state = transform.init(np.ones(1))
    for _ in range(20):
        _, state = update(np.ones(1), state)
    _, state = update(np.array([3.0]), state)
    # (1 - γ) · 1 + γ · 9
    chex.assert_trees_all_close(state.metric.bias, jnp.array([3.0]), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.0}, r"decay.*\(0, 1"),
        ({"decay": 1.5}, "decay"),
        ({"decay": 0.1, "damping": 0}, "damping"),
        ({"decay": 0.1, "prior": 0.0}, "prior"),
        ({"decay": True}, "Python number"),
        ({"decay": np.array(0.1)}, "Python number"),
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
