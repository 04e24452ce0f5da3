"""When to replace an engine: a value function, estimated from choices (Rust 1987).

Each month a bus is kept, at a cost that grows with its mileage, or gets a new engine.
The owner looks ahead, with a discount of 0.9999 a month, and is moved by what we do not
see: the value of a mileage solves Bellman's equation, and choices are logistic in it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax

NAMES = ("new engine", "upkeep")
NOMINAL = np.log([8.0, 2.5])
DISCOUNT, STATES = 0.9999, 90
DRIVEN = (0.36, 0.62, 0.02)  # chance of 0, 1 or 2 steps of mileage in a month
BUSES, MONTHS = 1000, 120
SOLVER: dict[str, rbpjax.Newton | rbpjax.Direct] = {}  # the defaults


def chances() -> np.ndarray:
    """Of next month's mileage if the bus is kept, ``[now, then]``."""
    rows = sum(p * np.eye(STATES, k=k) for k, p in enumerate(DRIVEN))
    rows[:, -1] += 1 - rows.sum(1)
    return rows


def choices(logs: jax.Array, value: jax.Array) -> jax.Array:
    """Worth of keeping and of replacing, ``[mileage, 2]``."""
    engine, upkeep = jnp.exp(logs)
    later = DISCOUNT * jnp.asarray(chances()) @ value
    keep = later - upkeep * 0.001 * jnp.arange(STATES)
    return jnp.stack([keep, jnp.full(STATES, keep[0] - engine)], axis=1)


def step(logs: jax.Array, inputs: None, value: jax.Array) -> jax.Array:
    """Bellman's equation: the better choice, on average over what is not seen.

    Of the value less that of a new engine: choices know no more, and what all states
    share, ten thousand times a month's worth, is gone.
    """
    value = jax.nn.logsumexp(choices(logs, value), axis=1)
    return value - value[0]


def log_shares(solve: rbpjax.Solve, logs: jax.Array) -> jax.Array:
    """Logarithms of the chances of keeping and of replacing."""
    value = solve(logs, None, jnp.zeros(STATES)).value
    return jax.nn.log_softmax(choices(logs, value))


def loss(solve: rbpjax.Solve, logs: jax.Array, data: jax.Array) -> jax.Array:
    """Minus the mean log-likelihood of the choices, counted as ``[mileage, 2]``."""
    return -jnp.sum(data * log_shares(solve, logs)) / data.sum()


def weight(data: jax.Array) -> jax.Array:
    """Of the loss in minus the log-likelihood."""
    return data.sum()


def measured(solve: rbpjax.Solve, logs: jax.Array, seed: int) -> jax.Array:
    """How often buses of each mileage were kept and replaced."""
    rng, mileage = np.random.default_rng(seed), np.zeros(BUSES, int)
    replaced = np.asarray(jnp.exp(log_shares(solve, logs)))[:, 1]
    counts = np.zeros((STATES, 2))
    for _ in range(MONTHS):
        new = rng.uniform(size=BUSES) < replaced[mileage]
        np.add.at(counts, (mileage, new.astype(int)), 1)
        driven = rng.choice(len(DRIVEN), size=BUSES, p=DRIVEN)
        mileage = np.minimum(np.where(new, 0, mileage) + driven, STATES - 1)
    return jnp.asarray(counts)


def picture(
    solve: rbpjax.Solve, logs: jax.Array, data: jax.Array
) -> dict[str, jax.Array]:
    """Share of replaced engines against mileage: seen and fitted."""
    seen = (data[:, 1] / jnp.maximum(data.sum(1), 1))[:, None]
    fitted = jnp.exp(log_shares(solve, logs))[:, 1:]
    return {"at": jnp.arange(STATES), "seen": seen, "fitted": fitted}
