"""Norms of any magnitude, with derivatives, one by one and mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax._core.norm import norm

X = np.random.default_rng(0).standard_normal(50).astype(np.float32)


@pytest.mark.parametrize("k", [-90, -40, -33, -20, 20, 33, 40, 90])
def test_other_units_are_the_same_bits(k):
    """‖2ᵏx‖ = 2ᵏ‖x‖, also where the squares of 2ᵏ are out of range."""
    by = np.float32(2.0**k)
    assert norm({"a": X[:7] * by, "b": (X[7:] * by,)}) == by * norm([X[:7], (X[7:],)])


def test_against_float64():
    """The exact norm, of trees of several leaves and dtypes, and of nothing."""
    exact = np.linalg.norm(X.astype(float))
    np.testing.assert_allclose(norm([X[:20], X[20:]]), exact, rtol=1e-6)
    assert norm(()) == 0
    assert norm(jnp.zeros(3)) == 0
    half = jnp.full(4, 6e4, jnp.float16)
    assert norm(half).dtype == jnp.float32
    np.testing.assert_allclose(norm(half), 12e4, rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(value):
    """Alone, and in a row of its own under vmap."""
    rows = jnp.array([[1.0, 2.0], [value, 1.0], [3e-30, 4e-30]])
    got = jax.vmap(norm)(rows)
    assert not np.isfinite(norm(rows[1]))
    assert np.isfinite(np.delete(got, 1)).all() and not np.isfinite(got[1])


def test_maps_of_maps_are_row_by_row():
    """Any number of mapped axes, with unmapped leaves among them: one by one."""
    x = X.reshape(2, 5, 5) * np.float32(10.0) ** np.array([[[0]], [[-25]]], np.float32)
    mapped = jax.vmap(jax.vmap(lambda row: norm((row, X))))(x)
    each = [[norm((row, X)) for row in rows] for rows in x]
    np.testing.assert_array_equal(mapped, np.array(each))


@pytest.mark.full
def test_derivatives():
    """First and second, both modes; 0 at 0, where that of a root is infinite."""
    x = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(jax.grad(norm)(x), [0.6, 0.8])
    exact = [[0.128, -0.096], [-0.096, 0.072]]
    np.testing.assert_allclose(jax.hessian(norm)(x), exact, rtol=1e-12)
    np.testing.assert_allclose(jax.jacrev(jax.jacrev(norm))(x), exact, rtol=1e-12)
    assert np.all(jax.grad(norm)(jnp.zeros(2)) == 0)
    rows = jax.vmap(jax.grad(norm))(jnp.stack([x, 0 * x]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]])
