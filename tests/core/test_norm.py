"""Norms of any magnitude, with derivatives, one by one and mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax._core.norm import norm, norms

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


def row_of(rows):
    return lambda i: (rows[i, :20], rows[i, 20:])


SCALES = {
    "usual": [1.0, 2.0, 0.5],
    "small": [2.0**-70, 2.0**-69, 2.0**-72],
    "large": [2.0**70, 2.0**71, 1.0],
    "mixed": [2.0**-70, 1.0, 2.0**70],
    "with a zero": [1.0, 0.0, 3.0],
    "zeros": [0.0, 0.0, 0.0],
    "not finite": [1.0, np.nan, 2.0**70],
}


@pytest.mark.parametrize("name", SCALES)
def test_norms_of_rows_are_those_one_by_one(name):
    """Whatever their magnitudes: the same bits as of each row, alone and mapped."""
    rows = np.stack([np.roll(X, i) for i in range(3)])
    rows = jnp.asarray(rows * np.array(SCALES[name], np.float32)[:, None])
    each = np.array([norm(row_of(rows)(i)) for i in range(3)])
    np.testing.assert_array_equal(norms(row_of(rows), 3), each)
    both = jax.vmap(lambda rows: norms(row_of(rows), 3))(jnp.stack([rows, rows[::-1]]))
    np.testing.assert_array_equal(both, [each, each[::-1]])


@pytest.mark.parametrize("name", ["usual", "small", "with a zero"])
def test_derivatives_of_the_norms_of_rows(name):
    """D‖x‖ = x / ‖x‖, and zero at zero, in both modes, in and out of the window."""
    rows = X[:12].reshape(3, 4) * np.array(SCALES[name], np.float32)[:, None]
    f = lambda rows: norms(lambda i: rows[i], 3)
    length = np.linalg.norm(rows.astype(float), axis=1)
    unit = rows / np.where(length > 0, length, 1)[:, None]
    want = np.stack([np.eye(3)[i][:, None] * unit[i] for i in range(3)])
    for mode in (jax.jacrev, jax.jacfwd):
        found = mode(f)(jnp.asarray(rows))
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)


def test_a_mapped_condition_stays_one():
    """Of rows that are all in range none is divided by its largest entry, too."""
    for f in (norm, lambda x: norms(lambda i: x[i], 4)):
        mapped = jax.vmap(jax.vmap(f))
        program = jax.jit(mapped).lower(jnp.ones((2, 3, 4))).as_text()
        assert "stablehlo.case" in program  # of a mapped one a selection is made
