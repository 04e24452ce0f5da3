"""Robertson's reactions by implicit Euler: stiff, with rates over nine decades.

    A → B (0.04),   2 B → B + C (3·10⁷),   B + C → A + C (10⁴)

Each step solves h = y + Δt F(h), and Δt grows to thousands: a step that the iteration
of its equation cannot take, and still less explicit Euler.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax

NAMES = ("A → B", "2 B → B + C", "B + C → A + C")
NOMINAL = np.log([0.04, 3e7, 1e4])
NOISE = 0.02  # of an amount, relative
TIMES = np.concatenate([[0.0], np.geomspace(1e-5, 1e5, 61)])
# Three unknowns: dense linear systems, forward and backward.
SOLVER = {
    "forward": rbpjax.Newton(rbpjax.Direct(), tol=1e-10),
    "backward": rbpjax.Direct(),
}

State = tuple[jax.Array, jax.Array, jax.Array]


def step(logs: jax.Array, inputs: tuple[State, jax.Array], h: State) -> State:
    """Euler: y + Δt F(h), a leaf for each amount: B is 10⁵ times smaller than A."""
    start, dt = inputs
    slow, fast, back = jnp.exp(logs)
    a, b, c = h
    there, pair, again = slow * a, fast * b * b, back * b * c
    rates = again - there, there - again - pair, pair
    return jax.tree.map(lambda y, rate: y + dt * rate, start, rates)


def course(solve: rbpjax.Solve, logs: jax.Array) -> jax.Array:
    """Amounts ``[time, species]``, of 1 A at the start."""

    def advance(y: State, dt: jax.Array) -> tuple[State, jax.Array]:
        y = solve(logs, (y, dt), y).value
        return y, jnp.stack(y)

    start = tuple(jnp.array([1.0, 0.0, 0.0]))
    return jax.lax.scan(advance, start, jnp.diff(jnp.asarray(TIMES)))[1]


def loss(solve: rbpjax.Solve, logs: jax.Array, data: jax.Array) -> jax.Array:
    """Mean squared relative deviation, in units of the noise."""
    return jnp.mean((course(solve, logs) / data - 1) ** 2) / NOISE**2


def weight(data: jax.Array) -> float:
    """Of the loss in minus the log-likelihood."""
    return data.size / 2


def measured(solve: rbpjax.Solve, logs: jax.Array, seed: int) -> jax.Array:
    """What an experiment with these rates would see."""
    exact = course(solve, logs)
    return exact * (1 + NOISE * np.random.default_rng(seed).normal(size=exact.shape))


def picture(
    solve: rbpjax.Solve, logs: jax.Array, data: jax.Array
) -> dict[str, np.ndarray | jax.Array]:
    """Amounts against time: seen and fitted."""
    return {"at": TIMES[1:], "seen": data, "fitted": course(solve, logs)}
