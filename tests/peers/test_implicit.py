"""Implicit differentiation of answers that were found elsewhere, as peers test it.

torchopt's test_implicit (inner problems of regression), jaxopt's implicit_diff, and the
systematic tests of ImplicitDifferentiation.jl: a solver in NumPy, its Jacobian against
the closed form, for vectors, matrices, one number, nests, and several arguments.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Solution

RTOL = 1e-9  # ε^¾ = 2e-12, and conditions of less than a hundred


def found_elsewhere(value_of):
    """A forward solver that asks a function of NumPy's for the answer."""

    def solver(step, h0):
        shape = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), h0)
        return Solution(value=jax.pure_callback(value_of, shape), converged=True)

    return solver


RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(20, 5)), RANDOM.normal(size=20)


def ridge(penalty):
    """The minimum of ‖X w - y‖² / 2n + e^penalty ‖w‖² / 2, by NumPy."""
    matrix = X.T @ X / 20 + np.exp(penalty) * np.eye(5)
    return np.linalg.solve(matrix, X.T @ Y / 20)


def ridge_gradient(penalty, data, w):
    x, y = data
    return x.T @ (x @ w - y) / 20 + jnp.exp(penalty) * w


@pytest.mark.parametrize("where", ["elsewhere", "default"])
def test_jaxopt_ridge_by_the_gradient_as_optimality(where):
    """dw/dpenalty = -e^penalty (XᵀX / n + e^penalty)⁻¹ w, whoever solved it."""
    penalty = 0.3
    f = lambda p, data, w: w - ridge_gradient(p, data, w)
    given = {"forward": found_elsewhere(lambda: ridge(penalty))}
    solve = rbpjax.rbp_solve(f, **(given if where == "elsewhere" else {}))
    data = jnp.asarray(X), jnp.asarray(Y)
    value = lambda p: solve(p, data, jnp.zeros(5)).value
    got, slope = jax.jit(lambda p: (value(p), jax.jacrev(value)(p)))(penalty)
    matrix = X.T @ X / 20 + np.exp(penalty) * np.eye(5)
    chex.assert_trees_all_close(got, ridge(penalty), rtol=RTOL)
    want = -np.exp(penalty) * np.linalg.solve(matrix, ridge(penalty))
    chex.assert_trees_all_close(slope, want, rtol=RTOL)


def test_torchopt_an_inner_problem_near_meta_parameters():
    """iMAML: min ‖X w - y‖² / 2n + ‖w - m‖² / 2 has dw/dm = (XᵀX / n + I)⁻¹."""
    f = lambda m, data, w: w - 0.3 * (ridge_gradient(0.0, data, w) - m)
    solve = rbpjax.rbp_solve(f)
    data = jnp.asarray(X), jnp.asarray(Y)
    value = lambda m: solve(m, data, jnp.zeros(5)).value
    jacobian = jax.jit(jax.jacrev(value))(jnp.asarray(RANDOM.normal(size=5)))
    want = np.linalg.inv(X.T @ X / 20 + np.eye(5))
    chex.assert_trees_all_close(jacobian, want, rtol=RTOL, atol=1e-12)


def test_torchopt_a_maximum_of_a_quadratic_in_two_players():
    """Descent and ascent on a x y + (x² - y²) / 2 - b x: a contracting rotation."""

    def step(a, b, h):
        x, y = h
        return x - 0.5 * (a * y + x - b), y + 0.5 * (a * x - y)

    solve = rbpjax.rbp_solve(step)
    value = lambda a: solve(a, jnp.float64(2), (jnp.zeros(()), jnp.zeros(()))).value
    a = 1.7
    (x, y), slopes = jax.jit(lambda a: (value(a), jax.jacrev(value)(a)))(jnp.float64(a))
    chex.assert_trees_all_close((x, y), (2 / (1 + a**2), 2 * a / (1 + a**2)), rtol=RTOL)
    d = (1 + a**2) ** 2
    chex.assert_trees_all_close(slopes, (-4 * a / d, (2 - 2 * a**2) / d), rtol=RTOL)


STATES = {
    "one number": np.array([2.5]),
    "a vector": np.array([0.3, 1.0, 4.0]),
    "a matrix": np.array([[0.2, 1.5], [3.0, 0.7]]),
    "a nest": {"a": np.array([0.4, 2.0]), "b": {"c": np.array(5.0)}},
}


@pytest.mark.parametrize("rule", [rbpjax.Adaptive(), rbpjax.Direct()], ids=str)
@pytest.mark.parametrize("state", STATES)
def test_implicit_differentiation_jl_square_roots(state, rule):
    """h² = x, by NumPy: the value is NumPy's, the slope 1 / 2√x, entry by entry."""
    x = STATES[state]
    roots = jax.tree.map(np.sqrt, x)
    step = lambda x, _, h: jax.tree.map(lambda x, h: h - (h**2 - x), x, h)
    solve = rbpjax.rbp_solve(
        step, forward=found_elsewhere(lambda: roots), backward=rule
    )

    def loss(x):
        value = solve(x, None, jax.tree.map(jnp.ones_like, x)).value
        weighted = jax.tree.map(lambda h: jnp.sum(h**3 / 3), value)
        return sum(jax.tree.leaves(weighted)), value

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    slope, value = gradient(jax.tree.map(jnp.asarray, x))
    chex.assert_trees_all_equal(value, jax.tree.map(jnp.asarray, roots))
    # h² · 1 / 2h = h / 2.
    want = jax.tree.map(lambda r: r / 2, roots)
    chex.assert_trees_all_close(slope, want, rtol=RTOL)


def test_implicit_differentiation_jl_arguments_and_their_jacobians():
    """h = √(x p) elementwise with two differentiated arguments, and second order."""
    step = lambda p, x, h: h - (h**2 - x * p)
    x, p = np.array([0.5, 2.0, 3.0]), 1.3
    forward = found_elsewhere(lambda: np.sqrt(x * p))
    solve = rbpjax.rbp_solve(step, forward=forward)
    value = lambda p, x: solve(p, x, jnp.ones(3)).value
    jacobians = jax.jit(jax.jacrev(value, (0, 1)))(jnp.float64(p), jnp.asarray(x))
    root = np.sqrt(x * p)
    want = (x / (2 * root), np.diag(p / (2 * root)))
    chex.assert_trees_all_close(jacobians, want, rtol=RTOL, atol=1e-12)
    curvature = jax.jit(jax.grad(jax.grad(lambda p: value(p, jnp.asarray(x)).sum())))
    # d²√(xp)/dp² = -x² / (4 (xp)^{3/2})
    want = -(x**2 / (4 * root**3)).sum()
    chex.assert_trees_all_close(curvature(jnp.float64(p)), want, rtol=1e-8)


def test_jaxopt_no_derivative_for_the_start_nor_for_integers():
    """implicit_diff_test: zero for h0, and float0 for an integer argument."""
    step = lambda p, _, h: h / (2.0 + p["n"].astype(h.dtype)) + p["a"]
    solve = rbpjax.rbp_solve(step)
    loss = lambda p, h0: solve(p, None, h0).value.sum()
    params = {"a": jnp.ones(2), "n": jnp.int32(1)}
    grads, start = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(params, jnp.ones(2))
    chex.assert_trees_all_close(grads["a"], jnp.full(2, 1.5), rtol=RTOL)
    assert grads["n"].dtype == jax.dtypes.float0
    chex.assert_trees_all_equal(start, jnp.zeros(2))
