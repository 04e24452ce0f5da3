"""Recurrent systems for the tests: no symmetric map, readout and cell share params."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rbpjax import online


class System(NamedTuple):
    """A step, a loss and data; compared by identity, so that oracles are cached."""

    f: Callable
    loss: Callable
    params: dict
    h0: object
    xs: jax.Array
    ys: jax.Array

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def _normal(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape))


def _loss(params, h, y):
    out = jax.tree.leaves(h)[-1]
    error = params["C"] @ out - y
    # The second term couples the loss to the cell's own parameters, so that an
    # estimator that forgets the direct gradient fails.
    return jnp.sum(error**2) + 0.1 * jnp.sum(jnp.sin(params["W"])) * jnp.sum(out)


def _system(f, params, h0, steps, rng):
    xs, ys = _normal(rng, steps, 2), _normal(rng, steps, 2)
    return System(f, _loss, params, h0, xs, ys)


@cache
def vanilla(n=3, steps=12, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "W": _normal(rng, n, n, scale=1.2 / n**0.5),
        "U": _normal(rng, n, 2),
        "b": _normal(rng, n),
        "C": _normal(rng, 2, n),
    }
    cell = online.PreactivationCell(
        kernel=lambda p: jnp.concatenate([p["W"], p["U"], p["b"][:, None]], 1)[None],
        features=lambda x, h: jnp.concatenate([h, x, jnp.ones(1, h.dtype)]),
        activate=lambda z, h: jnp.tanh(z[0]),
    )
    return _system(cell, params, 0.3 * _normal(rng, n), steps, rng)


@cache
def leaky(n=3, steps=12, seed=1, recurrent=1.0):
    """Leaky units; ``recurrent`` scales their connections."""
    system = vanilla(n, steps, seed)
    cell = online.PreactivationCell(
        kernel=lambda p: jnp.concatenate(
            [recurrent * p["W"], p["U"], p["b"][:, None]], 1
        )[None],
        features=system.f.features,
        activate=lambda z, h: 0.7 * h + 0.3 * jnp.tanh(z[0]),
    )
    return system._replace(f=cell)


@cache
def spiking(n=3, steps=12, seed=1, recurrent=1.0, adaptation=0.0):
    """Integrate-and-fire units that spike; the loss sees traces and voltages."""
    system = vanilla(n, steps, seed)
    made = online.cells.lif(n, 2, leak=0.2, adaptation=adaptation)
    kernel = made.cell.kernel
    cell = dataclasses.replace(
        made.cell, kernel=lambda p: kernel(p | {"W": recurrent * p["W"]})
    )

    def loss(p, h, y):
        error = p["C"] @ h["trace"] - y
        return jnp.sum(error**2) + 0.1 * jnp.sum(jnp.sin(p["W"])) * h["voltage"][0]

    params = system.params | {"b": system.params["b"] + 0.5}  # some drive
    return system._replace(f=cell, loss=loss, params=params, h0=made.h0)


@cache
def lstm(n=2, steps=12, seed=2):
    rng = np.random.default_rng(seed)
    params = {
        "W": _normal(rng, 4, n, n),
        "U": _normal(rng, 4, n, 2),
        "b": _normal(rng, 4, n),
        "C": _normal(rng, 2, n),
    }

    def activate(z, h):
        write = jax.nn.sigmoid(z[0]) * jnp.tanh(z[1])
        c = jax.nn.sigmoid(z[2]) * h["c"] + write
        return {"c": c, "h": jax.nn.sigmoid(z[3]) * jnp.tanh(c)}

    cell = online.PreactivationCell(
        kernel=lambda p: jnp.concatenate([p["W"], p["U"], p["b"][:, :, None]], 2),
        features=lambda x, h: jnp.concatenate([h["h"], x, jnp.ones(1, x.dtype)]),
        activate=activate,
    )
    h0 = {"c": 0.3 * _normal(rng, n), "h": 0.3 * _normal(rng, n)}
    return _system(cell, params, h0, steps, rng)


@cache
def gru(n=3, steps=12, seed=3):
    """Reset before the product: one parameter reaches many units, no kernel form."""
    rng = np.random.default_rng(seed)
    params = {
        "W": _normal(rng, 3, n, n),
        "U": _normal(rng, 3, n, 2),
        "b": _normal(rng, 3, n),
        "C": _normal(rng, 2, n),
    }

    def f(p, x, h):
        drive = p["U"] @ x + p["b"]
        reset = jax.nn.sigmoid(p["W"][0] @ h + drive[0])
        update = jax.nn.sigmoid(p["W"][1] @ h + drive[1])
        new = jnp.tanh(p["W"][2] @ (reset * h) + drive[2])
        return update * h + (1 - update) * new

    return _system(f, params, 0.3 * _normal(rng, n), steps, rng)


@cache
def gru_after(n=2, steps=12, seed=4):
    """Reset after the product: four gates, two of them with empty blocks."""
    system = gru(n, steps, seed)

    def kernel(p):
        whole = jnp.concatenate([p["W"], p["U"], p["b"][:, :, None]], 2)
        inside = jnp.zeros_like(whole[2]).at[:, :n].set(p["W"][2])
        outside = whole[2].at[:, :n].set(0.0)
        return jnp.stack([whole[0], whole[1], inside, outside])

    def activate(z, h):
        new = jnp.tanh(jax.nn.sigmoid(z[0]) * z[2] + z[3])
        update = jax.nn.sigmoid(z[1])
        return update * h + (1 - update) * new

    cell = online.PreactivationCell(
        kernel=kernel,
        features=lambda x, h: jnp.concatenate([h, x, jnp.ones(1, h.dtype)]),
        activate=activate,
    )
    return system._replace(f=cell)


def unit_rows(params):
    """The parameters of these systems by units, gate after gate, biases first."""
    own = jnp.concatenate([params["b"][..., None], params["W"], params["U"]], -1)
    return [own.reshape(-1, own.shape[-1]), params["C"]]


def signs_like(est, system, *lead, seed=7):
    """Random signs for ``lead`` steps or runs, drawn without compiling anything."""
    carry = jax.eval_shape(est.init, system.params, system.h0)
    one = jax.eval_shape(est.noise, jax.random.key(0), carry)
    rng = np.random.default_rng(seed)
    draw = lambda s: rng.choice([-1.0, 1.0], (*lead, *s.shape)).astype(s.dtype)
    return jax.tree.map(draw, one)


def run(est, system, noise=None, params=None):
    """Carries (after each step) and outputs of a whole run at fixed parameters."""
    params = system.params if params is None else params
    if noise is None:
        noise = signs_like(est, system, len(system.xs))

    @jax.jit
    def whole(params, h0, *data):
        def body(carry, xyn):
            carry, out = est.step(params, carry, *xyn)
            return carry, (carry, out)

        return jax.lax.scan(body, est.init(params, h0), data)[1]

    return whole(params, system.h0, system.xs, system.ys, noise)


@cache
def exact_run(system):
    """``run`` of RTRL, whose carries hold the exact influence."""
    return run(online.rtrl(system.f, system.loss), system)


def enumerate_runs(est, system):
    """``run`` over all sign patterns; every leaf gets a leading pattern axis."""
    noise = signs_like(est, system)
    patterns = online.rank_one.all_signs(noise, len(system.xs))
    return jax.jit(jax.vmap(lambda signs: run(est, system, signs)))(patterns)


def sample(est, system, runs, seed):
    """Gradients of independent runs, and the noise that made them."""
    carry = est.init(system.params, system.h0)
    keys = jax.random.split(jax.random.key(seed), (runs, len(system.xs)))
    draw = jax.vmap(jax.vmap(est.noise, (0, None)), (0, None))
    noise = jax.jit(draw)(keys, carry)
    return jax.jit(jax.vmap(lambda n: run(est, system, n)[1].grads))(noise), noise


@cache
def step_gradients(system):
    """Gradient of each step's loss through the unrolled history: the oracle."""

    def losses(params):
        def body(h, xy):
            h = system.f(params, xy[0], h)
            return h, system.loss(params, h, xy[1])

        return jax.lax.scan(body, system.h0, (system.xs, system.ys))[1]

    return jax.jit(jax.jacrev(losses))(system.params)


def mean(tree):
    """The mean along the leading axis."""
    return jax.tree.map(lambda x: np.mean(x, 0), tree)


def total(tree):
    """The sum along the leading axis."""
    return jax.tree.map(lambda x: np.sum(x, 0), tree)


def variance(tree):
    """Sum over all numbers of the variance along the leading axis."""
    return sum(np.sum(np.var(x, 0)) for x in jax.tree.leaves(tree))


@cache
def linear_recurrent(n=3, steps=12, seed=5):
    """A linear recurrent unit, complex, and a loss that sees its parameters."""
    rng = np.random.default_rng(seed)
    params = {
        "B": _normal(rng, 2, n, 2),
        "nu": _normal(rng, n) - 1.0,
        "phase": _normal(rng, n),
        "C": _normal(rng, 2, 2, n),
    }

    def activate(own, z, h):
        modulus = jnp.exp(-jnp.exp(own["nu"]))
        gain = jnp.sqrt(1 - modulus**2)
        turn = modulus * jnp.cos(own["phase"]), modulus * jnp.sin(own["phase"])
        return jax.lax.complex(*turn) * h + jax.lax.complex(gain * z[0], gain * z[1])

    cell = online.ElementwiseCell(
        kernel=lambda p: p["B"],
        own=lambda p: {k: p[k] for k in ("nu", "phase")},
        features=lambda x: x,
        activate=activate,
    )

    def loss(p, h, y):
        out = p["C"][0] @ h.real - p["C"][1] @ h.imag
        return jnp.sum((out - y) ** 2) + 0.1 * jnp.sum(p["nu"]) * jnp.sum(h.imag)

    h0 = jax.lax.complex(_normal(rng, n), _normal(rng, n))
    data = _normal(rng, steps, 2), _normal(rng, steps, 2)
    return System(cell, loss, params, h0, *data)


@cache
def min_gru(n=3, steps=12, seed=6):
    """A real element-wise cell whose gates see the units' own numbers, with two leaves.

    The second leaf remembers the first, so that a unit's Jacobian is no number.
    """
    rng = np.random.default_rng(seed)
    params = {
        "W": _normal(rng, 2, n, 2),
        "b": _normal(rng, 2, n),
        "peep": _normal(rng, n, 3),
        "C": _normal(rng, 2, n),
    }

    def activate(peep, z, h):
        gate = jax.nn.sigmoid(z[0] + peep[0] * h["c"])
        c = (1 - gate) * h["c"] + gate * jnp.tanh(z[1] + peep[1] * h["past"])
        return {"c": c, "past": jnp.sin(peep[2] * h["c"]) + 0.5 * h["past"]}

    cell = online.ElementwiseCell(
        kernel=lambda p: jnp.concatenate([p["W"], p["b"][..., None]], 2),
        own=lambda p: p["peep"],
        features=lambda x: jnp.concatenate([x, jnp.ones(1, x.dtype)]),
        activate=activate,
    )
    h0 = {"c": 0.3 * _normal(rng, n), "past": 0.3 * _normal(rng, n)}
    return _system(cell, params, h0, steps, rng)
