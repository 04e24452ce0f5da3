"""Means over samples, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rbpjax.types import PyTree, check_count


def mean_over_samples(
    estimate: Callable[[jax.Array], PyTree], num_samples: int, chunk: int | None
) -> PyTree:
    """The sum over chunks of ``estimate(indices)``, divided by ``num_samples``.

    Memory is that of one chunk, whatever the number of samples.
    """
    indices = jnp.arange(num_samples, dtype=jnp.uint32)
    if chunk is None or chunk == num_samples:
        sums = estimate(indices)
    else:
        rows = indices.reshape(-1, chunk)
        zeros = optax.tree.zeros_like(jax.eval_shape(estimate, rows[0]))
        add = lambda sums, row: (optax.tree.add(sums, estimate(row)), None)
        sums, _ = jax.lax.scan(add, zeros, rows)
    return jax.tree.map(lambda s: s / num_samples, sums)


def check_samples(owner: object, num_samples: Any, chunk: Any) -> None:
    """Raises ValueError unless the chunks divide the samples."""
    check_count(owner, "num_samples", num_samples, 1)
    if chunk is None:
        return
    check_count(owner, "chunk", chunk, 1)
    if num_samples % chunk:
        raise ValueError(
            f"{type(owner).__name__}: `chunk` = {chunk} must divide `num_samples` = "
            f"{num_samples}. Take a divisor, or None for all at once."
        )


def check_callable(owner: object, name: str, value: object, examples: str) -> None:
    """Raises ValueError unless ``value`` can be called."""
    if not callable(value):
        raise ValueError(
            f"{type(owner).__name__}: `{name}` must be a callable such as {examples}; "
            f"got {value!r}."
        )
