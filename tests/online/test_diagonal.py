"""Diagonal RTRL against BPTT: exact for one layer, and what is lost between layers."""

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from tests.support.online import (
    enumerate_runs,
    linear_recurrent,
    mean,
    min_gru,
    run,
    step_gradients,
    total,
)

# Sums of some hundred terms of size 1, in another order.
TIGHT = dict(rtol=1e-10, atol=1e-10)
ONE_LAYER = [linear_recurrent, min_gru]


@pytest.mark.parametrize("make", ONE_LAYER)
def test_one_layer_is_exact_at_every_step(make):
    """Gradients of each step's loss are those through the unrolled history."""
    system = make(n=3, steps=60)
    _, out = run(online.diagonal_rtrl(system.f, system.loss), system)
    chex.assert_trees_all_close(out.grads, step_gradients(system), **TIGHT)


def test_the_sum_over_a_long_run_is_that_of_bptt():
    """A thousand steps of a complex recurrence, moduli up to 0.999."""
    system = linear_recurrent(n=4, steps=1000)
    slow = jnp.log(-jnp.log(jnp.array([0.3, 0.9, 0.99, 0.999])))
    system = system._replace(params=system.params | {"nu": slow})
    _, out = run(online.diagonal_rtrl(system.f, system.loss), system)
    est = online.bptt(system.f, system.loss)
    start = est.init(system.params, system.h0)
    step = jax.jit(lambda p: est.step(p, start, system.xs, system.ys, ())[1].grads)
    for got, want in zip(
        *map(jax.tree.leaves, (total(out.grads), step(system.params))), strict=True
    ):
        scale = np.max(np.abs(want))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("make", ONE_LAYER)
def test_the_trace_is_the_diagonal_of_the_influence(make):
    """∂h/∂own of RTRL: its blocks are the trace, and all else is zero."""
    system = make(n=3, steps=5)
    name = {linear_recurrent: "nu", min_gru: "peep"}[make]
    dense, _ = run(online.rtrl(system.f, system.loss), system)
    local, _ = run(online.diagonal_rtrl(system.f, system.loss), system)
    g = dense.influence[name][-1]  # [S n, n, ...]
    g = g.reshape(2, 3, *g.shape[1:])
    own = local.influence.own
    e = (own[name] if isinstance(own, dict) else own)[-1]
    for i in range(3):
        chex.assert_trees_all_close(g[:, i, i], e[:, i], **TIGHT)
        others = [j for j in range(3) if j != i]
        assert np.all(g[:, i, np.array(others)] == 0)


def test_a_step_that_is_not_holomorphic():
    """The state's modulus, and its conjugate, in real parts: exact."""
    system = linear_recurrent(n=2, steps=20)

    def activate(own, z, h):
        size = jnp.sqrt(1 + h.real**2 + h.imag**2)
        turn = jnp.exp(own["nu"]) / size
        re = turn * h.real + own["phase"] * h.imag + z[0]
        return jax.lax.complex(re, z[1] - 0.5 * h.imag * own["phase"])

    cell = dataclasses.replace(system.f, activate=activate)
    system = system._replace(f=cell)
    _, out = run(online.diagonal_rtrl(cell, system.loss), system)
    chex.assert_trees_all_close(out.grads, step_gradients(system), **TIGHT)


@pytest.mark.parametrize("make", [online.uoro, online.nobacktrack])
def test_random_estimators_take_complex_states(make):
    """Their mean over all signs, two for each complex number, is BPTT's gradient."""
    system = linear_recurrent(n=1, steps=4)
    _, out = enumerate_runs(make(system.f, system.loss), system)
    chex.assert_trees_all_close(mean(out.grads), step_gradients(system), **TIGHT)


def test_a_complex_run_can_be_differentiated():
    """Reverse mode agrees with differences, through traces and complex states."""
    system = linear_recurrent(n=2, steps=3)
    est = online.diagonal_rtrl(system.f, system.loss)
    whole = lambda p: jnp.sum(jnp.sin(run(est, system, params=p)[1].grads["nu"]))
    gradient = jax.grad(whole)(system.params)
    rng = np.random.default_rng(0)
    v = {k: rng.standard_normal(p.shape) for k, p in system.params.items()}
    moved = lambda by: whole({k: p + by * v[k] for k, p in system.params.items()})
    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert abs(difference) > 0.1
    slope = sum(np.vdot(gradient[k], v[k]) for k in v)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)


# --- layers ---------------------------------------------------------------------------

OWNERS = {"low": 0, "mid": 1, "high": 2}


@cache
def layers():
    """Three layers: complex, real with two leaves, complex; skips and maps between."""
    low, mid, high = (
        linear_recurrent(n=3, seed=8),
        min_gru(n=2, seed=9),
        linear_recurrent(n=2, seed=10),
    )
    part = lambda cell, name: dataclasses.replace(
        cell,
        kernel=lambda p: cell.kernel(p[name]),
        own=lambda p: cell.own(p[name]),
    )
    rng = np.random.default_rng(11)
    between = {
        "first": jnp.asarray(rng.standard_normal((2, 6))),
        "second": jnp.asarray(rng.standard_normal((2, 2))),
    }

    def first(p, x, h):
        both = jnp.concatenate([h.real, h.imag])
        return jnp.tanh(p["between"]["first"] @ both) + 0.3 * x

    def second(p, x, h):
        return p["between"]["second"] @ jnp.sin(h["c"]) + 0.2 * x

    cell = online.LayeredCell(
        cells=(part(low.f, "low"), part(mid.f, "mid"), part(high.f, "high")),
        between=(first, second),
    )
    # The loss sees all layers, as one with skip connections to the readout does.
    loss = lambda p, h, y: (
        high.loss(p["high"], h[2], y)
        + 0.3 * jnp.sum(jnp.sin(h[0].imag))
        + jnp.sum(h[1]["c"] ** 2)
    )
    params = {"low": low.params, "mid": mid.params, "high": high.params}
    return low._replace(
        f=cell,
        loss=loss,
        params=params | {"between": between},
        h0=(low.h0, mid.h0, high.h0),
    )


@cache
def lost():
    """What the truncation leaves out, from dense Jacobians of the unrolled run.

    For a parameter of layer l: Σ over the other layers m of
    ∂loss_t/∂hₘ,ₜ₋₁ · dhₘ,ₜ₋₁/dθ.
    """
    system = layers()
    flat, unravel = jax.flatten_util.ravel_pytree(
        [(leaf.real, leaf.imag) for leaf in jax.tree.leaves(system.h0)]
    )
    structure = jax.tree.structure(system.h0)
    real = [not jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(system.h0)]

    def state(vector):
        pairs = zip(unravel(vector), real, strict=True)
        leaves = [p[0] if is_real else jax.lax.complex(*p) for p, is_real in pairs]
        return structure.unflatten(leaves)

    def vector(h):
        leaves = [(leaf.real, leaf.imag) for leaf in jax.tree.leaves(h)]
        return jax.flatten_util.ravel_pytree(leaves)[0]

    step = lambda p, x, v: vector(system.f(p, x, state(v)))
    loss = lambda p, x, y, v: system.loss(p, system.f(p, x, state(v)), y)
    layer_of = [6 * [0], 8 * [1], 4 * [2]]  # leaves: 3 complex, 2 + 2 real, 2 complex
    layer_of = np.concatenate(layer_of)

    def body(both, xy):
        v, g = both
        x, y = xy
        p = system.params
        slope = jax.grad(loss, 3)(p, x, y, v)
        missing = {}
        for name, grads in g.items():
            kept = layer_of == OWNERS.get(name, -1)
            read = partial(jnp.tensordot, jnp.where(kept, 0.0, slope), axes=1)
            missing[name] = jax.tree.map(read, grads)
        j = jax.jacfwd(step, 2)(p, x, v)
        f = jax.jacrev(step)(p, x, v)
        g = jax.tree.map(lambda a, b: jnp.tensordot(j, a, 1) + b, g, f)
        return (step(p, x, v), g), missing

    zeros = jax.tree.map(lambda a: jnp.zeros((flat.size, *a.shape)), system.params)
    start = flat, zeros
    return jax.jit(lambda: jax.lax.scan(body, start, (system.xs, system.ys))[1])()


def test_layers_lose_the_paths_through_other_layers_and_nothing_else():
    """Gradient + what is lost, from dense Jacobians, is BPTT's for all parameters."""
    system = layers()
    _, out = run(online.diagonal_rtrl(system.f, system.loss), system)
    exact = step_gradients(system)
    both = jax.tree.map(jnp.add, out.grads, lost())
    for got, want in zip(*map(jax.tree.leaves, (both, exact)), strict=True):
        np.testing.assert_allclose(
            got, want, rtol=0, atol=1e-10 * np.max(np.abs(exact["low"]["B"]))
        )
    # The loss is that of something: below the top layer it is a good part of it.
    gap = np.linalg.norm(lost()["low"]["B"])
    assert gap > 0.05 * np.linalg.norm(exact["low"]["B"])
    assert np.linalg.norm(lost()["between"]["first"]) > 0.05 * gap


def test_the_top_layer_is_exact():
    """Nothing is lost of its parameters, nor of those that only the loss sees."""
    system = layers()
    _, out = run(online.diagonal_rtrl(system.f, system.loss), system)
    exact = step_gradients(system)
    chex.assert_trees_all_close(out.grads["high"], exact["high"], **TIGHT)


def test_a_layered_cell_of_one_is_its_cell():
    """The same gradients, the state in a tuple."""
    system = min_gru(n=3, steps=8)
    cell = online.LayeredCell(cells=(system.f,), between=())
    loss = lambda p, h, y: system.loss(p, h[0], y)
    one = system._replace(f=cell, loss=loss, h0=(system.h0,))
    _, out = run(online.diagonal_rtrl(cell, loss), one)
    _, plain = run(online.diagonal_rtrl(system.f, system.loss), system)
    chex.assert_trees_all_close(out, plain, rtol=1e-14)


def test_a_bad_unit_stays_by_itself():
    """A unit that is not finite spoils neither the traces nor the states of others."""
    system = min_gru(n=3, steps=4)
    h0 = {k: v.at[1].set(jnp.nan) for k, v in system.h0.items()}
    loss = lambda p, h, y: jnp.sum(h["c"][0] * y)
    est = online.diagonal_rtrl(system.f, loss)
    spoilt, _ = run(est, system._replace(loss=loss, h0=h0))
    clean, _ = run(est, system._replace(loss=loss))
    keep = np.array([0, 2])
    chex.assert_trees_all_equal(
        spoilt.influence.kernel[..., keep, :], clean.influence.kernel[..., keep, :]
    )
    assert np.isnan(spoilt.influence.kernel[..., 1, :]).any()


# --- refusals -------------------------------------------------------------------------


def test_other_cells_are_refused():
    """A cell whose units see each other has no diagonal influence."""
    with pytest.raises(ValueError, match=r"ElementwiseCell.*take rtrl, uoro"):
        online.diagonal_rtrl(lambda p, x, h: h, lambda p, h, y: 0.0)


def test_wrong_shapes_are_named():
    """A forgotten gate axis, numbers of no unit, a complex kernel."""
    cell = lambda **parts: online.ElementwiseCell(
        **{
            "kernel": lambda p: p[None],
            "features": lambda x: x,
            "activate": lambda own, z, h: z[0],
        }
        | parts
    )
    square, x, h = np.ones((2, 2)), np.ones(2), np.ones(2)
    with pytest.raises(ValueError, match=r"kernel\[None\]"):
        cell(kernel=lambda p: p)(square, x, h)
    with pytest.raises(ValueError, match=r"leading axes .*3.* of `own`"):
        cell(own=lambda p: np.ones(3))(square, x, h)
    with pytest.raises(ValueError, match=r"complex128.*as two gates"):
        cell(kernel=lambda p: 1j * p[None])(square, x, h)


def test_layers_are_counted():
    """One map less than layers, and a state for each of them."""
    cell = min_gru().f
    with pytest.raises(ValueError, match=r"one function less.*got 0 for 2"):
        online.LayeredCell(cells=(cell, cell), between=())
    with pytest.raises(ValueError, match="a tuple of ElementwiseCells"):
        online.LayeredCell(cells=(lambda p, x, h: h,), between=())
    system = min_gru()
    est = online.diagonal_rtrl(
        online.LayeredCell(cells=(cell,), between=()), system.loss
    )
    with pytest.raises(ValueError, match="`h0` must be a tuple of the states of 1"):
        est.init(system.params, system.h0)
