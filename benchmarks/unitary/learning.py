"""Training of one network on one task."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data.sequences import Task
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.training import train
from benchmarks.unitary.networks import Network


@dataclasses.dataclass(frozen=True)
class Training:
    """How one network is trained: Adam, two step sizes, cosine decay, clipping."""

    iterations: int
    batch: int
    rate: float
    slow_rate: float
    blocks: int = 20


def learn(
    task: Task,
    network: Network,
    plan: Training,
    seed: int,
    name: str,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Trains, evaluates on the test batch after each block, resumes bit for bit."""
    weights = jax.jit(network.init)(jax.random.key(seed))
    fade = lambda rate: optax.cosine_decay_schedule(rate, plan.iterations, alpha=0.05)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {
                False: optax.adam(fade(plan.rate)),
                True: optax.adam(fade(plan.slow_rate)),
            },
            network.slow(weights),
        ),
    )
    outputs = jax.vmap(network.run, (None, 0))

    def loss(weights: Any, x: jax.Array, y: jax.Array) -> Any:
        return task.score(outputs(weights, x), y)

    def update(carry: Any, i: jax.Array) -> Any:
        weights, state = carry
        key = jax.random.fold_in(jax.random.key(1000 + seed), i)
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(
            weights, *task.batch(key, plan.batch)
        )
        updates, state = optimizer.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    per_block = -(-plan.iterations // plan.blocks)
    block = jax.jit(
        lambda carry, first: jax.lax.scan(update, carry, first + jnp.arange(per_block))
    )
    # The test set in pieces of the training batch keeps the memory what it was.
    size = min(plan.batch, len(task.test[1]))
    pieces = len(task.test[1]) // size
    cut = lambda a: a[: pieces * size].reshape(pieces, size, *a.shape[1:])
    # The test set is an argument: as a constant XLA would try to fold it.
    scores = lambda test, w: jax.lax.map(lambda xy: loss(w, *xy), test)
    mean_scores = jax.jit(lambda *args: jax.tree.map(jnp.mean, scores(*args)))
    measure = partial(mean_scores, jax.tree.map(cut, task.test))

    rows = plan.blocks + 1
    log = {k: jnp.zeros(rows) for k in ("loss", "accuracy", "train_loss", "seconds")}
    put = lambda log, row, **new: {k: v.at[row].set(new[k]) for k, v in log.items()}
    value, accuracy = measure(weights)
    log = put(log, 0, loss=value, accuracy=accuracy, train_loss=value, seconds=0.0)
    carry = (weights, optimizer.init(weights))

    def advance(state: Any, i: int) -> Any:
        carry, log = state
        start = time.process_time()
        carry, losses = jax.block_until_ready(block(carry, i * per_block))
        seconds = log["seconds"][i] + time.process_time() - start
        value, accuracy = measure(carry[0])
        new = {"train_loss": jnp.mean(losses), "seconds": seconds}
        return carry, put(log, i + 1, loss=value, accuracy=accuracy, **new)

    _, log = train(checkpoints, name, (carry, log), advance, plan.blocks)
    return {"iterations": [i * per_block for i in range(rows)]} | {
        k: np.asarray(v) for k, v in log.items()
    }
