"""Steps that conserve a total: I - J is singular, and the gradient exists still."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Adaptive, FixedPointIteration, Status
from tests.support.problems import assert_close

N = 8
LAZY = np.array([1.0, 0.5, 0.2, 0.1])


def chain(logits, lazy, h):
    """One step of a Markov chain that stays where it is with probability 1 - lazy."""
    p = jax.nn.softmax(logits, axis=1)
    return (1 - lazy) * h + lazy * (h @ p)


def stationary(logits):
    """Its distribution, as the solution of a linear system with the total pinned."""
    p = jax.nn.softmax(logits, axis=1)
    equations = (jnp.eye(N) - p.T).at[0].set(1.0)
    return jnp.linalg.solve(equations, jnp.zeros(N).at[0].set(1.0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_gradient_of_a_markov_chain(dtype):
    """Right by default, and said to be singular, at mixing rates from 0.5 to 0.98."""
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(len(LAZY), N, N)) * 1.5, dtype)
    cost, h0 = jnp.asarray(random.normal(size=N), dtype), jnp.full(N, 1 / N, dtype)
    forward = FixedPointIteration(max_steps=5000)

    def gradient(logits, lazy):
        solve = rbpjax.rbp_solve(lambda p, x, h: chain(p, x, h), forward=forward)
        loss = lambda p, probe: cost @ solve(p, lazy, h0, probe).value
        return jax.grad(loss, (0, 1))(logits, rbpjax.AdjointReport.zeros())

    got, report = jax.jit(jax.vmap(gradient))(logits, jnp.asarray(LAZY, dtype))
    wide = lambda x: jnp.asarray(x, jnp.float64)
    loss = lambda p: wide(cost) @ stationary(p)
    want = jax.jit(jax.vmap(jax.grad(loss)))(wide(logits))
    tol = float(jnp.finfo(dtype).eps) ** 0.75
    for ours, right, lazy in zip(got, want, LAZY, strict=True):
        # Tolerances of h and z, by 1 / (1 - mixing rate) of either.
        assert_close(wide(ours), right, 2 * tol * (4 / lazy) ** 2)
    assert (np.asarray(report.status) == Status.SINGULAR).all()
    assert (np.asarray(report.converged) == 0).all()


def test_what_is_left_is_a_left_null_vector():
    """A z = g - r with (I - Jᵀ) r = 0, and z has no part along r."""
    random = np.random.default_rng(1)
    p = random.dirichlet(np.ones(N), size=N)
    jac, g = jnp.asarray(p.T), jnp.asarray(random.normal(size=N))
    found = jax.jit(lambda g: Adaptive(tol=1e-9)(lambda v: jac.T @ v, g))(g)
    r = g + jac.T @ found.value - found.value
    # Jᵀ = P has the constants for left null vectors: g's mean under the chain.
    weights = np.linalg.solve(
        (np.eye(N) - p.T) * (np.arange(N) > 0)[:, None]
        + np.eye(N)[:, :1] @ np.ones((1, N)),
        np.eye(N)[0],
    )
    size = np.linalg.norm(g)
    np.testing.assert_allclose(r, np.full(N, weights @ np.asarray(g)), atol=1e-7 * size)
    assert abs(found.value @ r) <= 1e-7 * jnp.linalg.norm(found.value) * size


def test_a_cotangent_without_the_total_is_simply_solved():
    """Where the loss does not see what is conserved: converged, as any other."""
    random = np.random.default_rng(1)
    p = random.dirichlet(np.ones(N), size=N)
    jac = jnp.asarray(p.T)
    g = jnp.asarray((np.eye(N) - p) @ random.normal(size=N))
    found = jax.jit(lambda g: Adaptive(tol=1e-9)(lambda v: jac.T @ v, g))(g)
    assert found.converged
    assert_close(found.value - jac.T @ found.value, g, 1e-8)
