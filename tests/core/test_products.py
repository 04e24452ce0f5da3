"""Products with J of any step, and the rooms on steps that hold a solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import online, perturb
from rbpjax._core.products import jvp

TIGHT = {
    "forward": rbpjax.FixedPointIteration(tol=1e-14),
    "backward": rbpjax.Adaptive(tol=1e-13),
}


def settle(v):
    """u = 0.3 sin u + v by sixty steps, each of them differentiable both ways."""
    u = v
    for _ in range(60):
        u = 0.3 * jnp.sin(u) + v
    return u


def solved(v):
    """The same by a solve, which has reverse mode alone."""
    solve = rbpjax.rbp_solve(lambda p, a, u: 0.3 * jnp.sin(u) + a, **TIGHT)
    return solve(None, v, jnp.zeros_like(v)).value


def in_scan(f):
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=1)[0]


def in_cond(f):
    return lambda x: jax.lax.cond(x.sum() > 9, jnp.sin, f, x)


HOLDERS = {
    "plain": lambda f: lambda x: {"a": f(x), "b": x[0]},
    "in jit": jax.jit,
    "in scan": in_scan,
    "in cond": in_cond,
    "in remat": jax.checkpoint,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_products_of_functions_with_reverse_mode_alone(hold):
    """Against forward mode through the unrolled loop, eagerly, in jit and in vmap."""
    rng = np.random.default_rng(0)
    w, x, x_dot = (jnp.asarray(rng.normal(size=s)) for s in ((3, 3), 3, 3))
    make = lambda inner: hold(lambda x: jnp.tanh(w @ inner(x)))
    want = jax.jvp(make(settle), (x,), (x_dot,))
    run = lambda x, x_dot: jvp(make(solved), x, x_dot)
    batched = lambda x, v: jax.tree.map(
        lambda u: u[0], jax.jit(jax.vmap(run))(x[None], v[None])
    )
    for call in (run, batched):
        got = call(x, x_dot)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)


def test_plain_functions_keep_forward_mode():
    """One that has forward mode alone: its while loop could not be transposed."""
    more, twice = lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1])
    f = lambda x: jax.lax.while_loop(more, twice, (0, x))[1]
    assert jvp(f, 1.5, 1.0) == (12.0, 8.0)


W = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2)))
XS = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2)))


def step_with(inner):
    return lambda params, x, h: jnp.tanh(params["w"] @ inner(0.5 * h) + x)


def loss(params, h, y):
    return jnp.sum((h - y) ** 2) + 0.1 * jnp.sum(params["w"]) * h[0]


@pytest.mark.parametrize("name", ["uoro", "nobacktrack", "rtrl"])
def test_estimators_run_on_steps_that_hold_a_solve(name):
    """Bit for bit the noise, to rounding the estimate, of the unrolled step."""

    def run(inner):
        est = getattr(online, name)(step_with(inner), loss)
        params, h0 = {"w": W}, jnp.zeros(2)
        carry = est.init(params, h0)

        def body(carry, key_and_x):
            key, x = key_and_x
            carry, out = est.step(params, carry, x, x[::-1], est.noise(key, carry))
            return carry, out.grads

        keys = jax.random.split(jax.random.key(0), 3)
        return jax.lax.scan(body, carry, (keys, XS))[1]

    got, want = jax.jit(lambda: run(solved))(), jax.jit(lambda: run(settle))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_exact_perturbation_of_a_pass_that_holds_a_solve():
    """The forward derivative along a direction is that of the unrolled pass."""
    exact = perturb.difference.Exact()
    direction = jnp.array([0.3, -1.0])
    along = lambda inner: exact(
        lambda s: jnp.sum(inner(XS[0] + s * direction) ** 2), 0.0
    )
    want = along(settle)
    np.testing.assert_allclose(along(solved), want, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(lambda: along(solved))(), want, rtol=1e-9)
