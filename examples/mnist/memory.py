"""Temporary memory of a gradient: at equilibrium, explicit, and unrolled."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rbpjax
from benchmarks.harness.measurement import temporary_bytes

UNROLLED = (8, 16, 32)


def memory(
    make: Callable[[str], nnx.Module], images: np.ndarray, labels: np.ndarray
) -> dict[str, int]:
    """Bytes for a batch of 128 images, by what makes the state."""
    batch = jnp.asarray(images[:128]), jnp.asarray(labels[:128])

    def bytes_of(kind: str, num_steps: int = 0) -> int:
        graph, params = nnx.split(make(kind))

        def loss(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
            model = nnx.merge(graph, params)
            if num_steps:
                model.state = _Unrolled(model.state.cell, num_steps)
            scores, _ = model(images)
            terms = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
            return terms.mean()

        return temporary_bytes(jax.grad(loss), params, *batch)

    found = {kind: bytes_of(kind) for kind in ("equilibrium", "explicit")}
    return found | {f"unrolled {n}": bytes_of("equilibrium", n) for n in UNROLLED}


class _Unrolled(nnx.Module):
    """The state after some steps; its gradient keeps them all."""

    def __init__(self, cell: nnx.Module, num_steps: int):
        self.cell, self.num_steps = cell, num_steps

    def __call__(
        self, x: jax.Array, h: jax.Array, probe: None = None
    ) -> rbpjax.Solution:
        for _ in range(self.num_steps):  # a loop of the compiler's is slower on CPUs
            h = self.cell(x, h)
        return rbpjax.Solution(h)
