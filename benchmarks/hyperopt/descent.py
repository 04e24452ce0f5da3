"""Adam on hyperparameters by hypergradients: what the trained parts share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rbpjax
from benchmarks.data.images import load
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.training import train

BLOCKS = 4  # checkpoints of one descent
MEASURES = (
    "outer_loss",
    "forward_steps",
    "forward_residual",
    "adjoint_steps",
    "adjoint_residual",
)

# (hyperparameters, data, start, probe) -> (outer loss, (solution, measures)).
OuterLoss = Callable[..., tuple[jax.Array, tuple[rbpjax.Solution, dict]]]


def images(
    dataset: str, seed: int, sizes: Sequence[int], unit: bool = True
) -> list[tuple[Any, Any]]:
    """Disjoint sets of images ``[n, pixels]`` and labels; what is left comes last.

    Pixels are centred, and scaled so that the mean of ‖x‖² is 1 (``unit``), or else
    black is 1. Of MNIST, the first 10,000 training images are used.
    """
    pixels, labels = (part[:10_000] for part in load(dataset))
    x = pixels.reshape(len(pixels), -1).astype(np.float32)
    x /= x.max()
    x -= x.mean(0)
    if unit:
        x /= np.sqrt((x**2).sum(1).mean())
    order = np.random.default_rng(seed).permutation(len(x))
    parts = np.split(order, np.cumsum(sizes))
    return [(x[part], labels[part].astype(np.int32)) for part in parts]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """One number an example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Fraction of right answers."""
    return jnp.mean(logits.argmax(-1) == labels)


class Descent:
    """Adam on the outer loss; compiled once for all seeds.

    Each solve starts from the last one's solution if ``warm``, else from the start.
    """

    def __init__(self, outer: OuterLoss, adam: optax.GradientTransformation, warm=True):
        """``outer`` hands its probe to the solve."""
        self.adam = adam
        self.gradient = rbpjax.value_and_grad_with_report(outer, has_aux=True)

        def update(i: jax.Array, carry: tuple, given: Any, start: Any) -> tuple:
            (params, moments, h), rows = carry
            (value, aux), grads, report = self.gradient(params, given, h)
            solution, measures = aux
            updates, moments = adam.update(grads, moments)
            row = measures | {
                "outer_loss": value,
                "forward_steps": solution.num_steps,
                "forward_residual": solution.residual,
                "adjoint_steps": report.num_steps,
                # Nothing is solved by BPTT, and the report has a cotangent of zero.
                "adjoint_residual": jnp.where(
                    report.cotangent_norm > 0, report.residual, jnp.nan
                ),
            }
            rows = {k: rows[k].at[i].set(row[k]) for k in rows}
            h = solution.value if warm else start
            return (optax.apply_updates(params, updates), moments, h), rows

        def block(begin: Any, end: Any, carry: tuple, given: Any, start: Any) -> tuple:
            step = lambda i, carry: update(i, carry, given, start)
            return jax.lax.fori_loop(begin, end, step, carry)

        self.block = jax.jit(block)

    def run(
        self,
        name: str,
        given: Any,
        params: Any,
        start: Any,
        num_steps: int,
        checkpoints: Checkpoints,
    ) -> tuple[Any, dict[str, np.ndarray], float]:
        """The last hyperparameters, a row a step (and the end's), seconds a step."""
        # Weak types would be strong after the first block, and compile another one.
        params = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)
        state = (params, self.adam.init(params), start)
        measures = jax.eval_shape(self.gradient, params, given, start)[0][1][1]
        rows = {k: jnp.zeros(num_steps + 1) for k in (*measures, *MEASURES)}
        data = (given, start)
        ends = np.unique(np.linspace(0, num_steps, BLOCKS + 1).astype(int))
        first = (state, rows)
        jax.block_until_ready(self.block(0, 0, first, *data))  # compiles

        def block(saved: tuple, i: int) -> tuple:
            carry, spent = saved
            clock = time.perf_counter()
            carry = self.block(int(ends[i]), int(ends[i + 1]), carry, *data)
            jax.block_until_ready(carry)
            return carry, spent + time.perf_counter() - clock

        blocks = len(ends) - 1
        carry, spent = train(checkpoints, name, (first, jnp.zeros(())), block, blocks)
        # One more for the measures at the end, not for its step.
        _, rows = self.block(num_steps, num_steps + 1, carry, *data)
        table = {k: np.asarray(r) for k, r in rows.items()}
        return carry[0][0], table, float(spent) / num_steps


def temporary_bytes(compiled: Any) -> int:
    """What a compiled function asks for, next to its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def collect(histories: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """``[seed, step]`` of each measure."""
    return {k: np.stack([h[k] for h in histories]) for k in histories[0]}


def paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences over seeds, and its standard error."""
    difference = np.subtract(values, baseline)
    error = difference.std(ddof=1) / len(difference) ** 0.5 if len(values) > 1 else 0.0
    return float(difference.mean()), float(error)
