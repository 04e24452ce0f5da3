"""The Kalman variant of NoBackTrack against its two parts."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from tests.support.online import exact_run, run, signs_like, unit_rows, vanilla


def rows_of(params):
    return jnp.concatenate([params["b"][:, None], params["W"], params["U"]], 1)


def make_kalman(system, include_current):
    def rows(params):
        return [rows_of(params), params["C"]]

    return rows, online.kalman_nobacktrack(
        system.f,
        system.loss,
        decay=0.2,
        rows=rows,
        damping=0.05,
        include_current=include_current,
    )


@pytest.mark.parametrize(
    "include_current", [True, pytest.param(False, marks=pytest.mark.full)]
)
def test_direction_is_the_preconditioned_raw_gradient(include_current):
    """grads = M⁻¹ĝ of the transformation, applied to what NoBackTrack would return."""
    system = vanilla(n=3, steps=8)
    rows, est = make_kalman(system, include_current)
    plain = online.nobacktrack(system.f, system.loss)
    transform = online.scale_by_quasi_diagonal(
        0.2, rows, damping=0.05, include_current=include_current
    )

    @jax.jit
    def raw_and_direction(carry, state, x, y, signs):
        carry = online.Carry(carry.h, carry.influence)
        _, raw = plain.step(system.params, carry, x, y, signs)
        return raw.grads, *transform.update(raw.grads, state)

    signs = signs_like(est, system, 8)
    carries, out = run(est, system, signs)
    carry, state = est.init(system.params, system.h0), transform.init(system.params)
    for t in range(8):
        chex.assert_trees_all_close(carry.metric.params, state, rtol=1e-10)
        raw, direction, state = raw_and_direction(
            carry, state, system.xs[t], system.ys[t], signs[t]
        )
        got = jax.tree.map(lambda a, t=t: a[t], out.grads)
        chex.assert_trees_all_close(got, direction, rtol=1e-9, atol=1e-11)
        gain = sum(np.vdot(direction[k], raw[k]) for k in raw)
        assert gain > 0  # a descent direction
        carry = jax.tree.map(lambda a, t=t: a[t], carries)


def test_metric_of_the_past_leaves_the_last_gradient_alone():
    """With include_current=False the first direction is the gradient / damping."""
    system = vanilla(n=2, steps=1)
    _, est = make_kalman(system, include_current=False)
    _, out = run(est, system)
    _, exact = exact_run(system)
    scaled = jax.tree.map(lambda g: g / 0.05, exact.grads)
    chex.assert_trees_all_close(out.grads, scaled, rtol=1e-11)


@pytest.mark.full
def test_with_a_prior_the_recipe_learns_and_without_it_spoils_the_network():
    """A teacher is followed, step size = decay; three seeds of the signs.

    The weights are right to within about 0.3: prior = decay / 0.3². Guessing zero costs
    the mean square of what the teacher says.
    """
    system, decay, steps = vanilla(n=3), 3e-4, 6_000
    xs = jax.random.normal(jax.random.key(0), (steps, 2))
    teach = lambda h, x: (system.f(system.params, x, h),) * 2
    ys = jax.lax.scan(teach, system.h0, xs)[1] @ system.params["C"].T
    loss = lambda p, h, y: jnp.sum((p["C"] @ h - y) ** 2)
    moved = jax.random.normal(jax.random.key(1), (24,))
    flat, unravel = jax.flatten_util.ravel_pytree(system.params)
    start = unravel(flat + 0.3 * moved)

    @partial(jax.jit, static_argnums=0)
    def losses(prior, key):
        est = online.kalman_nobacktrack(
            system.f, loss, decay=decay, rows=unit_rows, own_rows=True, prior=prior
        )
        rate = lambda t: decay if prior else jnp.maximum(decay, 1 / (t + 1))

        def body(state, xyt):
            params, carry, key = state
            key, signs = jax.random.split(key)
            noise = est.noise(signs, carry)
            carry, out = est.step(params, carry, *xyt[:2], noise)
            move = lambda p, g: p - rate(xyt[2]) * g
            return (jax.tree.map(move, params, out.grads), carry, key), out.loss

        state = start, est.init(start, system.h0), key
        return jax.lax.scan(body, state, (xs, ys, jnp.arange(steps)))[1]

    for seed in range(3):
        with_prior = losses(decay / 0.3**2, jax.random.key(seed))
        without = losses(None, jax.random.key(seed))
        last = jnp.mean(with_prior[-1000:])
        assert last < 0.3 * jnp.mean(with_prior[:100])
        assert jnp.mean(without[-1000:]) > 3 * last
