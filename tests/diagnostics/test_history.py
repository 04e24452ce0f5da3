"""Residuals against the budget, by the solvers as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import (
    GMRES,
    RBP,
    Adaptive,
    Anderson,
    Direct,
    FixedPointIteration,
    Hybrid,
    Neumann,
)
from rbpjax.diagnostics import residual_history

W = jnp.array([[0.3, -0.8], [0.7, 0.4]])
X, H = jnp.array([1.0, -0.5]), jnp.zeros(2)
f = lambda w, x, h: w @ h + x


def test_of_an_affine_map_they_are_powers():
    """Plain iteration: r_k = Jᵏ r_0. The series: ‖(Jᵀ)ᵏ⁺¹ g‖."""
    budgets, g = (1, 2, 5, 9), jnp.array([0.6, 0.8])
    history = residual_history(
        f,
        W,
        X,
        H,
        budgets=budgets,
        forward=FixedPointIteration(),
        backward=Neumann(),
        cotangent=g,
    )
    power = lambda a, k: np.linalg.matrix_power(a, k)
    h = H
    for i, k in enumerate(budgets):
        term = np.linalg.norm(power(W.T, k + 1) @ g)
        np.testing.assert_allclose(history.backward_residual[i], term, rtol=1e-9)
        h = sum(power(W, j) for j in range(k)) @ X
        image = f(W, X, h)
        size = max(np.linalg.norm(h), np.linalg.norm(image))
        want = np.linalg.norm(image - h) / size
        np.testing.assert_allclose(history.forward_residual[i], want, rtol=1e-9)
    assert history.budgets.tolist() == list(budgets)


def test_the_least_residual_of_one_product():
    """GMRES after one step: min over a of ‖g - a (I - Jᵀ) g‖. Powers know no sign."""
    g = jnp.array([0.6, 0.8])
    history = residual_history(f, W, X, H, budgets=(1,), backward=GMRES(), cotangent=g)
    image = g - W.T @ g
    cosine = (image @ g) / jnp.linalg.norm(image)
    want = jnp.sqrt(1 - cosine**2)
    np.testing.assert_allclose(history.backward_residual[0], want, rtol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (Hybrid(), Adaptive()),
        (FixedPointIteration(steps=1), Neumann(steps=1)),
        (Anderson(), RBP(Anderson())),
    ],
)
def test_what_ends_is_what_the_solver_reports(forward, backward):
    history = residual_history(
        f, W, X, H, forward=forward, backward=backward, budgets=(1, 400)
    )
    assert history.forward_residual[1] < 1e-9 and history.backward_residual[1] < 1e-9
    assert (history.forward_residual[0] > history.forward_residual[1]).all()
    assert (history.forward_products[1] >= history.forward_products[0]).all()


def test_under_jit():
    run = jax.jit(lambda w: residual_history(f, w, X, H, budgets=(2, 50)))
    assert run(W).backward_residual[1] < 1e-10


def test_refusals():
    with pytest.raises(ValueError, match="`budgets` must be positive integers"):
        residual_history(f, W, X, H, budgets=(0, 3))
    with pytest.raises(ValueError, match="`budgets` must be positive integers"):
        residual_history(f, W, X, H, budgets=(0.5,))
    with pytest.raises(ValueError, match=r"`backward` must be .* Direct\(\)"):
        residual_history(f, W, X, H, backward=Direct())
    with pytest.raises(ValueError, match="`forward` must be"):
        residual_history(f, W, X, H, forward=lambda step, h0: None)
