"""Influence balancing, and a million steps without a NaN."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.online.learning import finite
from benchmarks.online.tasks import influence_balancing
from rbpjax import online

TRUNCATIONS = (1, 10, 50, 60, 80, 100, 120, 200)
STEPS = 300_000
POINTS = 300  # points of a curve


def balance(seeds: tuple[int, ...]) -> dict[str, Any]:
    """θ over time by every method, from θ = ½; the optimum is -1/6."""
    methods: dict[str, Any] = {}
    for name, make, rate, runs in (
        ("RTRL", online.rtrl, 1e-4, (0,)),
        ("UORO", online.uoro, 1e-5, seeds),
        ("NoBackTrack", online.nobacktrack, 1e-5, seeds),
    ):
        curves = [streamed(make, rate, seed) for seed in runs]
        methods[name] = describe(curves, rate, STEPS // POINTS)
    for truncation in TRUNCATIONS:
        stride = max(1, STEPS // truncation // POINTS)
        curve = windowed(truncation, 1e-4, stride)
        described = describe([curve], 1e-4, stride * truncation)
        methods[f"TBPTT({truncation})"] = described
    return {
        "optimum": -1 / 6,
        "steps": STEPS,
        "methods": methods,
        "truncated_influence": truncated_influence(200).tolist(),
        "million_steps_finite": million_steps(),
    }


def describe(curves: list[np.ndarray], rate: float, stride: int) -> dict[str, Any]:
    """Curves for a result file; what left [-10, 10] counts as diverged."""
    clean = lambda x: finite(x) if np.abs(x) < 10 else None
    return {
        "rate": rate,
        "stride": stride,
        "theta": [[clean(x) for x in curve.tolist()] for curve in curves],
        "final": [clean(curve[-1]) for curve in curves],
    }


def streamed(make: Any, rate: float, seed: int) -> np.ndarray:
    """One update a step."""
    f, loss, h0 = influence_balancing()
    est = make(f, loss)

    def step(state, _):
        theta, carry, key = state
        key, signs = jax.random.split(key)
        noise = est.noise(signs, carry)
        carry, out = est.step(theta, carry, None, None, noise)
        return (theta - rate * out.grads, carry, key), None

    def block(state, _):
        state, _ = jax.lax.scan(step, state, length=STEPS // POINTS)
        return state, state[0]

    theta = jnp.array(0.5)
    start = theta, est.init(theta, h0), jax.random.key(seed)
    return np.asarray(
        jax.jit(lambda s: jax.lax.scan(block, s, length=POINTS)[1])(start)
    )


def windowed(truncation: int, rate: float, stride: int) -> np.ndarray:
    """One update a window, with the sum of its losses."""
    f, loss, h0 = influence_balancing()
    est = online.bptt(f, loss)
    ticks = jnp.zeros(truncation)  # no input; the axis says how long a window is

    def step(state, _):
        theta, carry = state
        carry, out = est.step(theta, carry, ticks, ticks, ())
        return (theta - rate * out.grads, carry), None

    def block(state, _):
        state, _ = jax.lax.scan(step, state, length=stride)
        return state, state[0]

    theta = jnp.array(0.5)
    count = STEPS // truncation // stride
    run = jax.jit(lambda s: jax.lax.scan(block, s, length=count)[1])
    return np.asarray(run((theta, est.init(theta, h0))))


def truncated_influence(steps: int) -> np.ndarray:
    """∂h₁/∂θ through the last t steps, t = 1 … ``steps``: RTRL from nothing."""
    f, loss, h0 = influence_balancing()
    est = online.rtrl(f, loss)

    def step(carry, _):
        carry, _ = est.step(jnp.array(0.5), carry, None, None, ())
        return carry, carry.influence[0]

    return np.asarray(jax.lax.scan(step, est.init(jnp.array(0.5), h0), length=steps)[1])


def million_steps(steps: int = 1_000_000) -> dict[str, bool]:
    """Whether influence and gradients stay finite in float32.

    A chaotic tanh network (16 units, gain 5, leading Lyapunov exponent 0.26 a step),
    with and without the influence bounded by ``renormalize``; and influence balancing
    at its optimum, where the loss and its gradient are zero.
    """
    units = 16
    cell = online.PreactivationCell(
        kernel=lambda w: w[None],
        features=lambda x, h: h,
        activate=lambda z, h: jnp.tanh(z[0]),
    )
    chaos = 5 * jax.random.normal(jax.random.key(1), (units, units)) / units**0.5
    square = lambda w, h, y: jnp.sum(h**2)
    f, loss, h0 = influence_balancing()
    rows = lambda f, loss: online.nobacktrack(f, loss, row_norms=cell.row_norms)
    result = {}
    for name, make in (
        ("uoro", online.uoro),
        ("nobacktrack", rows),
        ("kf_rtrl", online.kf_rtrl),
        ("snap1", online.snap1),
        ("rtrl", online.rtrl),
    ):
        est, start = make(cell, square), 0.1 * jnp.ones(units)
        bounded = online.combine.renormalize(est, 1e3)
        for title, one in (("", est), (", renormalized", bounded)):
            fine = stays_finite(one, chaos, start, steps)
            result[f"{name}, chaotic{title}"] = fine
    for name, make in (("uoro", online.uoro), ("rtrl", online.rtrl)):
        result[f"{name}, influence balancing"] = stays_finite(
            make(f, loss), jnp.array(-1 / 6), h0, steps
        )
    return result


def stays_finite(est: Any, params: Any, h0: jax.Array, steps: int) -> bool:
    """Whether all of the influence and the gradients is finite at every step."""

    def step(state, _):
        carry, key, fine = state
        key, signs = jax.random.split(key)
        noise = est.noise(signs, carry)
        carry, out = est.step(params, carry, None, None, noise)
        leaves = jax.tree.leaves((carry.influence, out.grads))
        fine &= jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]))
        return (carry, key, fine), None

    start = est.init(params, h0), jax.random.key(1), jnp.array(True)
    return bool(jax.jit(lambda s: jax.lax.scan(step, s, length=steps)[0][2])(start))
