"""Leaves that tend to zero or nearly, and residuals that oscillate as they fall."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import FixedPointIteration
from tests.support.problems import assert_close


def momentum(distance, dtype=float):
    """Heavy-ball descent on a quadratic: f, a start so far from the solution, and that.

    The momentum tends to zero, from zero where the start is the solution.
    """
    n, random = 20, np.random.default_rng(0)
    q = np.linalg.qr(random.normal(size=(n, n)))[0]
    a, b = (q * np.linspace(0.02, 1, n)) @ q.T, random.normal(size=n)
    right = np.linalg.solve(a, b)
    start = right + distance * random.normal(size=n)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)

    def step(h):
        w, v = h
        v = jnp.asarray(0.8, dtype) * v + (a @ w - b)
        return w - v, v

    return step, (jnp.asarray(start, dtype), jnp.zeros(n, dtype)), right


ALL = {
    "plain": FixedPointIteration(max_steps=5000),
    "Anderson": rbpjax.Anderson(),
    "Broyden": rbpjax.Broyden(max_steps=2000),
    "RRE": rbpjax.RRE(max_steps=2000),
    "Newton": rbpjax.Newton(),
    "Hybrid": rbpjax.Hybrid(),
}


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("distance", [1.0, 1e-4, 1e-9, 0.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_momentum_comes_to_rest_from_warm_starts_too(solver, distance, dtype):
    """A leaf that tends to zero has no relative residual that falls."""
    step, h0, right = momentum(distance, dtype)
    found = jax.jit(partial(ALL[solver], step))(h0)
    assert found.converged
    error = np.linalg.norm(found.value[0].astype(float) - right)
    # By no more than what converged promises, eps^(1/2); and rounding times 1 / 0.02.
    assert error <= float(jnp.finfo(dtype).eps) ** 0.5 * np.linalg.norm(right)
    if distance == 0 and dtype == jnp.float64:
        assert found.num_products <= 4


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize(
    "limit, dtype",
    [(1e-3, jnp.float32), (1e-5, jnp.float32), (1e-3, float), (1e-10, float)],
)
def test_a_leaf_with_a_small_limit_is_not_taken_for_zero(solver, limit, dtype):
    """It starts at one: it has faded, and it still counts by its own size."""
    num = lambda x: jnp.asarray(x, dtype)

    def step(h):
        u, v = h
        u = num(0.6) * jnp.tanh(u) + num(1)
        return u, num(0.9) * v + num(limit / 10) * jnp.cos(u)

    h0 = (jnp.ones(3, dtype), jnp.ones(3, dtype))
    found = jax.jit(partial(ALL[solver], step))(h0)
    # Newton-Krylov steps see rounding errors of the larger leaf in the smaller one, and
    # then do not promise.
    careful = solver == "Hybrid" and found.status == rbpjax.Status.ROUNDING
    assert found.converged or careful
    u, v = (np.asarray(leaf, float) for leaf in found.value)
    assert_close(
        v / (limit * np.cos(u)), np.ones(3), rtol=float(jnp.finfo(dtype).eps) ** 0.5
    )


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("radius", [0.9, 0.99, 0.999])
def test_residuals_that_oscillate_as_they_fall_are_not_stuck(angle, radius):
    """Complex eigenvalues, and J far from normal: dips ten times deeper than peaks."""
    cos, sin = np.cos(angle), np.sin(angle)
    basis = np.array([[3.0, 1.0], [0.0, 0.3]])
    j = radius * basis @ np.array([[cos, -sin], [sin, cos]]) @ np.linalg.inv(basis)
    solver = FixedPointIteration(max_steps=60_000)
    found = jax.jit(partial(solver, lambda h: jnp.asarray(j) @ h + 1.0))(jnp.zeros(2))
    assert found.converged
    # Twice the steps of its rate at most, for looks are rare while it is far away.
    assert int(found.num_products) <= 2 * math.log(2e-12) / math.log(radius)
    right = np.linalg.solve(np.eye(2) - j, np.ones(2))
    assert_close(found.value, right, rtol=1e-8)
