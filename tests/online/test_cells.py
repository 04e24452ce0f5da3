"""Cells ready to use: each against its equations in NumPy, and under the estimators."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from rbpjax.online import cells
from tests.support.online import System, run, step_gradients

TIGHT = dict(rtol=1e-12, atol=1e-12)
UNITS, INPUTS = 3, 2
MAKERS = {
    "vanilla": cells.vanilla,
    "leaky": cells.leaky,
    "lif": partial(cells.lif, leak=0.2, adaptation=0.5, adaptation_leak=0.3),
    "gru": cells.gru,
    "lstm": cells.lstm,
    "lru": cells.lru,
}
every = pytest.mark.parametrize("name", MAKERS)
KERNEL = [
    pytest.param(name, marks=[pytest.mark.full] * (name == "lif"))
    for name in MAKERS
    if name != "lru"
]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def by_hand(name, p, x, h):
    """The equations of the docstrings, one product a gate."""
    gate = lambda j, s: p["W"][j] @ s + p["U"][j] @ x + p["b"][j]
    if name in ("vanilla", "leaky"):
        new = np.tanh(p["W"] @ h + p["U"] @ x + p["b"])
        return new if name == "vanilla" else 0.9 * h + 0.1 * new
    if name == "lif":
        drive = p["W"] @ h["spikes"] + p["U"] @ x + p["b"]
        v = 0.8 * h["voltage"] + drive - h["spikes"]
        a = 0.7 * h["adaptation"] + h["spikes"]
        z = 1.0 * (v > 1 + 0.5 * a)
        trace = 0.9 * h["trace"] + z
        return {"spikes": z, "trace": trace, "voltage": v, "adaptation": a}
    if name == "gru":
        reset, update = sigmoid(gate(0, h)), sigmoid(gate(1, h))
        new = np.tanh(reset * (p["W"][2] @ h) + p["U"][2] @ x + p["b"][2])
        return update * h + (1 - update) * new
    if name == "lstm":
        write, keep, show = (sigmoid(gate(j, h["h"])) for j in range(3))
        c = keep * h["c"] + write * np.tanh(gate(3, h["h"]))
        return {"c": c, "h": show * np.tanh(c)}
    factor = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["phase"]))
    return factor * h + np.exp(p["gamma"]) * ((p["B"][0] + 1j * p["B"][1]) @ x)


def state(h0, rng):
    """A state that is not at rest, like ``h0``."""
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape), s.real.dtype)
    full = lambda s: (
        jax.lax.complex(draw(s), draw(s)) if jnp.iscomplexobj(s) else draw(s)
    )
    return jax.tree.map(full, h0)


def system(name, steps=10, units=UNITS):
    """The cell inside a network: a readout beside it, biases that are not zero."""
    made = MAKERS[name](units, INPUTS, select=lambda p: p["cell"])
    rng = np.random.default_rng(0)
    noise = lambda p: p + 0.1 * rng.standard_normal(p.shape)
    params = {
        "cell": jax.tree.map(noise, made.init(jax.random.key(1))),
        "readout": jnp.asarray(rng.standard_normal((2, units))),
    }

    def loss(p, h, y):
        out = jax.tree.leaves(h)[-1]
        return jnp.sum((p["readout"] @ (out.real + jnp.sin(out.imag)) - y) ** 2)

    data = (jnp.asarray(rng.standard_normal((steps, 2))) for _ in range(2))
    return System(made.cell, loss, params, state(made.h0, rng), *data)


@every
def test_a_step_is_that_of_the_equations(name):
    """One step from a state that is not zero, the biases neither."""
    at = system(name)
    got = jax.jit(at.f)(at.params, at.xs[0], at.h0)
    numpy = jax.tree.map(np.asarray, (at.params["cell"], at.xs[0], at.h0))
    chex.assert_trees_all_close(got, by_hand(name, *numpy), **TIGHT)


@every
def test_rtrl_is_bptt(name):
    """The exact estimators agree: each loss's gradient through the history."""
    at = system(name)
    _, out = run(online.rtrl(at.f, at.loss), at)
    exact = step_gradients(at)
    chex.assert_trees_all_close(out.grads, exact, rtol=1e-10, atol=1e-10)
    if name == "lru":
        _, out = run(online.diagonal_rtrl(at.f, at.loss), at)
        chex.assert_trees_all_close(out.grads, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KERNEL)
@pytest.mark.parametrize("make", [online.snap1, online.rflo, online.kf_rtrl])
def test_estimators_of_kernels_take_them(name, make):
    """First step exact: nothing is truncated or random yet."""
    at = system(name, steps=3)
    _, out = run(make(at.f, at.loss), at)
    first = lambda tree: jax.tree.map(lambda g: g[0], tree)
    chex.assert_trees_all_close(first(out.grads), first(step_gradients(at)), **TIGHT)
    chex.assert_tree_all_finite(out.grads)


@every
def test_estimators_of_steps_take_them(name):
    """The same for uoro."""
    at = system(name, steps=3)
    _, out = run(online.uoro(at.f, at.loss), at)
    first = lambda tree: jax.tree.map(lambda g: g[0], tree)
    chex.assert_trees_all_close(first(out.grads), first(step_gradients(at)), **TIGHT)
    chex.assert_tree_all_finite(out.grads)


@every
def test_states_start_at_rest_and_weights_at_their_variance(name):
    """Zeros; variances 1 / n, 1 / k (within five deviations of their estimate)."""
    made = MAKERS[name](50, 40)
    params = made.init(jax.random.key(0))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(made.h0))
    wanted = {"W": 1 / 50, "U": 1 / 40, "B": 1 / 80}
    for key in wanted.keys() & params.keys():
        p = np.asarray(params[key])
        spread = 5 * (2 / p.size) ** 0.5
        assert abs(p.var() / wanted[key] - 1) < spread
    if "b" in params:
        bias = np.zeros(params["b"].shape)
        if name == "lstm":
            bias[1] = 1
        np.testing.assert_array_equal(params["b"], bias)


def test_the_units_of_lru_are_uniform_in_the_ring():
    """Moduli and phases within bounds, moduli² uniform; γ² = 1 - |λ|²."""
    made = cells.lru(4000, 1, r_min=0.6, r_max=0.9, max_phase=1.0)
    p = made.init(jax.random.key(0))
    modulus, phase = np.exp(-np.exp(p["nu"])), np.exp(p["phase"])
    assert 0.6 <= modulus.min() and modulus.max() <= 0.9
    assert 0 < phase.min() and phase.max() <= 1.0
    # The mean of a uniform variable of width w has the deviation w / √(12 N).
    width = 0.81 - 0.36
    assert abs(np.mean(modulus**2) - 0.585) < 5 * width / np.sqrt(12 * 4000)
    assert abs(np.mean(phase) - 0.5) < 5 / np.sqrt(12 * 4000)
    np.testing.assert_allclose(np.exp(2 * p["gamma"]), 1 - modulus**2, rtol=1e-10)


def test_a_modulus_of_zero_is_finite():
    """r_min = 0 in float32: no logarithm of zero, whatever is drawn."""
    with jax.enable_x64(False):
        p = cells.lru(100_000, 1).init(jax.random.key(0))
        chex.assert_tree_all_finite(p)


def test_wrong_options_are_named():
    """Sizes, leaks, thresholds, moduli."""
    with pytest.raises(ValueError, match="`units` must be"):
        cells.vanilla(0, 2)
    with pytest.raises(ValueError, match="`input_size` must be"):
        cells.lstm(2, 1.5)
    with pytest.raises(ValueError, match="`leak` must be"):
        cells.leaky(2, 2, leak=0.0)
    for name in ("trace_leak", "threshold", "adaptation", "dampening"):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            cells.lif(2, 2, **{name: -0.1})
    with pytest.raises(ValueError, match=r"0 <= r_min < r_max < 1.*0.9 and 0.5"):
        cells.lru(2, 2, r_min=0.9, r_max=0.5)
    with pytest.raises(ValueError, match="`max_phase` must be"):
        cells.lru(2, 2, max_phase=7.0)
