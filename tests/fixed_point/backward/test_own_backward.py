"""Steps with a backward pass of their own, of which JAX cannot make products with J."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Adaptive, CGNormal, FixedPointIteration, Solution
from rbpjax.fixed_point.backward.rule import System
from tests.support.problems import IDENTITY_RTOL, assert_close

N = 12
JAC = np.random.default_rng(0).normal(size=(N, N))
JAC *= 1.5 / np.abs(np.linalg.eigvals(JAC)).max()  # ρ(J) = 1.5: no series
W = jnp.asarray(JAC)
G = jnp.asarray(np.random.default_rng(1).normal(size=N))
H = jnp.zeros(N)


@jax.custom_vjp
def clipped(h):
    """The identity, with a gradient that is clipped, though never here."""
    return h


clipped.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -1e9, 1e9),))


@jax.custom_vjp
def on_the_host(h):
    """The identity, with a backward pass outside JAX."""
    return h


def _host(_, g):
    kind = jax.ShapeDtypeStruct(g.shape, g.dtype)
    return (jax.pure_callback(np.array, kind, g, vmap_method="sequential"),)


on_the_host.defvjp(lambda h: (h, None), _host)

_inner = rbpjax.rbp_solve(
    lambda _, v, u: 0.25 * u + 0.75 * v, forward=FixedPointIteration(steps=80)
)


def settled(h):
    """The identity, as the fixed point of a step."""
    return _inner(None, h, jnp.zeros_like(h)).value


KINDS = {"clipped": clipped, "host": on_the_host, "settled": settled}


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_needs_no_transpose(kind):
    """ρ(J) = 1.5: beyond the series, by products with Jᵀ alone; against LU."""
    own = KINDS[kind]
    f = lambda w, x, h: w @ own(h) + x
    vjp = jax.vjp(lambda h: f(W, H, h), H)[1]
    assert System.of(lambda v: vjp(v)[0], G, None).transposed() is None
    gradient = jax.jit(
        lambda w, x: rbpjax.rbp_vjp(f, w, x, H, G, backward=Adaptive(tol=1e-10))
    )
    (_, x_bar), found = gradient(W, H)
    assert found.converged
    z = np.linalg.solve(np.eye(N) - JAC.T, np.asarray(G))
    kappa = np.linalg.cond(np.eye(N) - JAC)
    assert_close(x_bar, jnp.asarray(z), 1e-10 * kappa)


def test_gradient_through_a_nested_solve():
    """Of an outer solve around an inner one, against the map in one piece."""
    w = 0.5 * W / jnp.linalg.norm(W, 2)
    exact = lambda step, h0: Solution(
        jax.lax.fori_loop(0, 80, lambda _, h: step(h), h0), converged=True
    )
    loss = lambda own: (
        lambda w: jnp.sum(
            rbpjax.rbp_solve(lambda w, x, h: jnp.tanh(w @ own(h) + x), forward=exact)(
                w, G, H
            ).value
            ** 2
        )
    )
    got = jax.jit(jax.grad(loss(settled)))(w)
    want = jax.jit(jax.grad(loss(lambda h: h)))(w)
    # The defaults of both, ε^¾ of float64, by κ below 3 each.
    assert_close(got, want, 10 * np.finfo(float).eps ** 0.75)


def test_transposed_is_the_jacobian():
    """Where there is one: the products with J, and the same for CGNormal."""
    system = System.of(lambda v: W.T @ v, G, None)
    assert_close(system.transposed()(G), W @ G, IDENTITY_RTOL)


def test_cg_normal_says_why_it_cannot():
    """It alone cannot do without J, and names the rules that can."""
    f = lambda w, x, h: w @ clipped(h) + x
    with pytest.raises(ValueError, match=r"CGNormal needs products with J.*Adaptive"):
        rbpjax.rbp_vjp(f, W, H, H, G, backward=CGNormal())
