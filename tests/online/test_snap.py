"""SnAp-n against dense masked RTRL, its special cases, and its refusals."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from tests.support.online import lstm, run, step_gradients, vanilla

TIGHT = dict(rtol=1e-12, atol=1e-12)
# Unit i sees i - 1 and itself, and unit 0 sees unit 2: no symmetry, ways of length 3.
CONNECTIONS = np.eye(4, k=-1, dtype=bool)
CONNECTIONS[0, 2] = True


def sparse(make, n=4, steps=8):
    """A system whose units are connected as above."""
    system = make(n=n, steps=steps)
    kernel = system.f.kernel
    mask = CONNECTIONS | np.eye(n, dtype=bool)
    weigh = lambda p: p | {"W": jnp.where(jnp.asarray(mask), p["W"], 0.0)}
    if system.params["W"].ndim == 3:
        weigh = lambda p: p | {"W": jnp.where(jnp.asarray(mask)[None], p["W"], 0.0)}
    cell = dataclasses.replace(system.f, kernel=lambda p: kernel(weigh(p)))
    return system._replace(f=cell)


def reached(order):
    """Whether a unit (row) is within order - 1 steps of another, by matrix powers."""
    direct = CONNECTIONS | np.eye(len(CONNECTIONS), dtype=bool)
    return np.linalg.matrix_power(direct.astype(int), order - 1) > 0


def masked(system, order):
    """G ← (J G + F) ∘ M on the dense n × P matrix, M by powers of the connections."""
    flat, unravel = jax.flatten_util.ravel_pytree(system.h0)
    units = len(CONNECTIONS)
    unit_of_state = np.tile(np.arange(units), flat.size // units)
    reach = np.linalg.matrix_power(
        (CONNECTIONS | np.eye(units, dtype=bool)) * 1, order - 1
    )
    axis = {"W": -2, "U": -2, "b": -1}

    def mask(name, p):
        if name == "C":  # of the readout: no influence
            return jnp.zeros((flat.size, *p.shape), bool)
        shape = [1] * p.ndim
        shape[axis[name]] = units
        owner = np.broadcast_to(np.arange(units).reshape(shape), p.shape)
        return jnp.asarray(reach[unit_of_state][:, owner])

    masks = {k: mask(k, p) for k, p in system.params.items()}
    step = lambda p, x, h: jax.flatten_util.ravel_pytree(system.f(p, x, unravel(h)))[0]

    def body(state, xy):
        h, g = state
        x, y = xy
        j, f = (
            jax.jacfwd(step, 2)(system.params, x, h),
            jax.jacrev(step)(system.params, x, h),
        )
        h = step(system.params, x, h)
        g = {k: jnp.where(masks[k], jnp.tensordot(j, g[k], 1) + f[k], 0.0) for k in g}
        loss = lambda p, h: system.loss(p, unravel(h), y)
        direct, delta = jax.grad(loss, (0, 1))(system.params, h)
        return (h, g), {k: direct[k] + jnp.tensordot(delta, g[k], 1) for k in g}

    zeros = {k: jnp.zeros((flat.size, *v.shape)) for k, v in system.params.items()}
    scan = jax.jit(lambda s: jax.lax.scan(body, s, (system.xs, system.ys))[1])
    return scan((flat, zeros))


def grads(system, order, connections=CONNECTIONS):
    est = online.snap(system.f, system.loss, order=order, connections=connections)
    return run(est, system)[1].grads


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("make", [vanilla, lstm])
def test_it_is_masked_rtrl(make, order):
    """The same gradients as the whole matrix with all other entries dropped."""
    system = sparse(make)
    chex.assert_trees_all_close(grads(system, order), masked(system, order), **TIGHT)


@pytest.mark.parametrize("make", [vanilla, lstm])
def test_order_one_is_snap1(make):
    """With any connections; here those of a sparse and of a dense system."""
    for system, connections in (
        (sparse(make), CONNECTIONS),
        (make(n=4, steps=8), None),
    ):
        _, out = run(online.snap1(system.f, system.loss), system)
        got = grads(system, 1, connections)
        chex.assert_trees_all_close(got, out.grads, **TIGHT)


@pytest.mark.parametrize("make", [vanilla, lstm])
def test_high_orders_are_exact(make):
    """The longest way has three steps: order 4 is BPTT, and order 3 is not yet."""
    system = sparse(make)
    exact = step_gradients(system)
    chex.assert_trees_all_close(grads(system, 4), exact, **TIGHT)
    chex.assert_trees_all_close(grads(system, 99), exact, **TIGHT)
    gap = [np.linalg.norm(grads(system, n)["U"] - exact["U"]) for n in (1, 2, 3)]
    assert gap[0] > gap[1] > gap[2] > 1e-6


def test_dense_connections_are_exact_from_order_two():
    """Every unit is one step from every other."""
    system = vanilla(n=3, steps=8)
    got = grads(system, 2, None)
    chex.assert_trees_all_close(got, step_gradients(system), **TIGHT)


def test_only_what_is_kept_is_carried():
    """Entries of (I + C)ⁿ⁻¹, counted by hand: 4; 4 + 4; 8 + 4; 12 + 1."""
    system = sparse(vanilla)
    for order, kept in ((1, 4), (2, 8), (3, 12), (4, 13)):
        est = online.snap(system.f, system.loss, order=order, connections=CONNECTIONS)
        carry = est.init(system.params, system.h0)
        assert carry.influence.shape == (1, kept, 1, 7)
        assert np.count_nonzero(reached(order)) == kept


def test_wrong_connections_are_named():
    """No bools, not square, of other units, a tracer; orders that are none."""
    cell, loss = vanilla().f, vanilla().loss
    make = lambda c, order=2: online.snap(cell, loss, order=order, connections=c)
    with pytest.raises(ValueError, match=r"of bools.*float64\[2, 2\].*weights != 0"):
        make(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"of bools.*bool\[2, 3\]"):
        make(np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"the 3 units.*got \[2, 2\]"):
        make(np.ones((2, 2), bool)).init(vanilla().params, vanilla().h0)
    with pytest.raises(ValueError, match="got a tracer"):
        jax.jit(lambda c: make(c).noise(jax.random.key(0), None))(np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="`order` must be"):
        make(None, 0)
