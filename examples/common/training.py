"""The training loop of the examples: a progress bar, checkpoints, and what to watch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.harness import training
from benchmarks.harness.checkpoints import Checkpoints

Metrics = Mapping[str, jax.Array]


def fit(
    checkpoints: Checkpoints,
    name: str,
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    step: Callable[..., Metrics],
    batch: Callable[[int], tuple[np.ndarray, ...]],
    *,
    seed: int,
    num_blocks: int,
    steps: int = 50,
    watch: Callable[[Any], Metrics] | None = None,
) -> dict[str, Any]:
    """Trains ``model`` in place; the same to the bit if it is killed and started again.

    Args:
      checkpoints: those of the whole program.
      name: of this training in it.
      model: an nnx module; its variables are saved.
      optimizer: of the model.
      step: one update, ``step(model, optimizer, key, *batch) -> metrics``, compiled
        here; it changes model and optimizer as nnx code does.
      batch: arrays of the numbered step.
      seed: of the keys that steps get.
      num_blocks: the training in blocks, with a checkpoint after each.
      steps: of a block.
      watch: what else to measure after each block, ``watch(model) -> metrics``.

    Returns:
      ``{"mean": …, "max": …, "watched": …, "core_seconds": …}``: of each metric its
      mean and largest value in each block, and processor time at the end of each block,
      compilation included and ``watch`` not.
    """
    graph, typed = nnx.split((model, optimizer))

    @jax.jit
    def update(variables: Any, key: jax.Array, *arrays: jax.Array) -> Any:
        both = nnx.merge(graph, _keys(variables, typed))
        metrics = step(*both, key, *arrays)
        return _numbers(nnx.state(both)), metrics

    @jax.jit
    def watched(variables: Any) -> Metrics:
        model, _ = nnx.merge(graph, _keys(variables, typed))
        return {} if watch is None else watch(model)

    key, first = jax.random.key(seed), _numbers(typed)
    blank = jnp.full(num_blocks, jnp.nan, jnp.float32)
    curves = lambda like: jax.tree.map(lambda _: blank, like)
    metrics = curves(jax.eval_shape(update, first, key, *batch(0))[1])
    history = {"mean": metrics, "max": metrics, "core_seconds": blank}
    history["watched"] = curves(jax.eval_shape(watched, first))

    def block(state: Any, i: int) -> Any:
        variables, history = state
        begin, rows = time.process_time(), []
        for k in range(i * steps, (i + 1) * steps):
            variables, row = update(variables, jax.random.fold_in(key, k), *batch(k))
            rows.append(row)
        rows = jax.device_get(rows)  # waits for all of them
        spent = time.process_time() - begin
        found = {
            "mean": jax.tree.map(lambda *x: np.mean(x), *rows),
            "max": jax.tree.map(lambda *x: np.max(x), *rows),
            "core_seconds": spent + (history["core_seconds"][i - 1] if i else 0),
            "watched": watched(variables),
        }
        return variables, jax.tree.map(lambda c, x: c.at[i].set(x), history, found)

    variables, history = training.train(
        checkpoints, name, (first, history), block, num_blocks
    )
    nnx.update((model, optimizer), _keys(variables, typed))
    return jax.device_get(history)


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _numbers(variables: Any) -> Any:
    """Keys of dropout as plain arrays, which orbax saves."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if _is_key(x) else x, variables
    )


def _keys(variables: Any, typed: Any) -> Any:
    """And back."""
    wrap = lambda x, t: jax.random.wrap_key_data(x) if _is_key(t) else x
    return jax.tree.map(wrap, variables, typed)
