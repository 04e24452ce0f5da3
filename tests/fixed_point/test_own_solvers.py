"""Forward solvers of a user's own that close over traced values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Adaptive, Solution, rbp_solve

W = jnp.array([[0.3, -0.8], [0.8, 0.3]]) * 0.7
X, H = jnp.array([0.4, -0.2]), jnp.zeros(2)


def f(w, x, h):
    return jnp.tanh(w @ h + x)


def gradient(w, damping, num_steps):
    """Of sum(h*²), by damped steps of which size and number are traced."""

    def forward(step, h0):
        once = lambda _, h: damping * h + (1 - damping) * step(h)
        h = jax.lax.fori_loop(0, num_steps, once, h0)
        return Solution(h, num_steps=num_steps, converged=True)

    solve = rbp_solve(f, forward=forward, backward=Adaptive(tol=1e-12))
    return jax.value_and_grad(
        lambda w: (lambda s: (jnp.sum(s.value**2), s.num_steps))(solve(w, X, H)),
        has_aux=True,
    )(w)


def dense():
    h = jax.lax.fori_loop(0, 500, lambda _, h: f(W, X, h), H)
    z = jnp.linalg.solve(jnp.eye(2) - jax.jacobian(f, 2)(W, X, h).T, 2 * h)
    return jnp.sum(h**2), jax.vjp(lambda w: f(w, X, h), W)[1](z)[0]


TRANSFORMS = {
    "eager": lambda g: g,
    "jit": jax.jit,
    "vmap": lambda g: (
        lambda *a: jax.tree.map(
            lambda x: x[0], jax.vmap(g)(*(jnp.asarray(b)[None] for b in a))
        )
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_solvers_close_over_traced_values(transform):
    (value, steps), grad = transform(gradient)(W, 0.3, 400)
    for a, b in zip((value, grad), dense(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    assert steps == 400


def test_a_traced_budget_compiles_once():
    """The number of steps changes, the program does not."""
    run = jax.jit(lambda k: gradient(W, 0.0, k))
    for k in (3, 7, 400):
        assert run(k)[0][1] == k
    assert run._cache_size() == 1


def test_no_gradient_and_no_leak_through_the_solver():
    """What the solver closes over may be what is differentiated."""
    total = lambda damping: gradient(W, damping, 400)[0][0]
    for transform in (lambda g: g, jax.jit):
        assert transform(jax.grad(total))(0.3) == 0.0
    (_, _), grad = gradient(W, 0.3, 400)
    outer = jax.grad(lambda w, d: gradient(w, d, 400)[0][0], (0, 1))(W, 0.3)
    np.testing.assert_allclose(outer[0], grad, rtol=1e-9)
    assert outer[1] == 0.0


def test_a_second_derivative_through_it():
    plain = rbp_solve(
        f, forward=rbpjax.FixedPointIteration(tol=1e-14), backward=Adaptive(tol=1e-13)
    )
    want = jax.jacrev(jax.grad(lambda w: jnp.sum(plain(w, X, H).value ** 2)))(W)
    got = jax.jit(jax.jacrev(lambda w, d: gradient(w, d, 500)[1]))(W, 0.3)
    np.testing.assert_allclose(got, want, rtol=1e-7)
