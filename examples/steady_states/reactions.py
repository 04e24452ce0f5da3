"""A receptor's cycle: steady states of reactions that conserve a total.

Free receptors X₀ bind a ligand, bound ones X₁ are taken in, and those inside X₂ come
back, by a machinery that saturates. Measured are amounts at rest, for several amounts
of ligand and of receptors. The fastest return is the unit of the rates: amounts at rest
do not know of time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax

NAMES = ("binding", "its saturation", "intake", "saturation of return")
NOMINAL = np.log([1.0, 0.5, 1.0, 0.5])
NOISE = 0.01  # of an amount, as a fraction of the total
SOLVER: dict[str, rbpjax.Newton | rbpjax.Direct] = {}  # the defaults


def step(logs: jax.Array, inputs: tuple[jax.Array, ...], h: jax.Array) -> jax.Array:
    """Halfway to where each amount is in balance with the others; the total is pinned.

    What is lost of an amount is proportional to it, so that all of them stay positive.
    """
    binding, bound, intake, inside = jnp.exp(logs)
    ligand, total = inputs
    lost = jnp.stack([binding * ligand / (bound + h[0]), intake, 1 / (inside + h[2])])
    gained = jnp.roll(lost * h, 1)
    h = (h + gained / lost) / 2
    return total * h / h.sum()  # else I - J is singular


def amounts(solve: rbpjax.Solve, logs: jax.Array, inputs: tuple) -> jax.Array:
    """Amounts at rest ``[experiment, species]``."""
    even = lambda total: jnp.full(3, total / 3)
    rest = lambda ligand, total: solve(logs, (ligand, total), even(total)).value
    return jax.vmap(rest)(*inputs)


def loss(solve: rbpjax.Solve, logs: jax.Array, data: tuple) -> jax.Array:
    """Mean squared deviation, in units of the noise."""
    inputs, seen = data
    off = (amounts(solve, logs, inputs) - seen) / inputs[1][:, None]
    return jnp.mean((off / NOISE) ** 2)


def weight(data: tuple) -> float:
    """Of the loss in minus the log-likelihood."""
    return data[1].size / 2


def measured(solve: rbpjax.Solve, logs: jax.Array, seed: int) -> tuple:
    """What an experiment with these rates would see."""
    dose, total = np.meshgrid(np.geomspace(0.25, 4, 8), [0.5, 1.0, 2.0])
    inputs = jnp.asarray(dose.ravel()), jnp.asarray(total.ravel())
    noise = NOISE * np.random.default_rng(seed).normal(size=(dose.size, 3))
    return inputs, amounts(solve, logs, inputs) + noise * total.reshape(-1, 1)


def picture(solve: rbpjax.Solve, logs: jax.Array, data: tuple) -> dict[str, jax.Array]:
    """Amounts against ligand where the total is one: seen and fitted."""
    (ligand, total), seen = data
    rows = total == 1
    fitted = amounts(solve, logs, (ligand, total))
    return {"at": ligand[rows], "seen": seen[rows], "fitted": fitted[rows]}
