"""Sequence tasks and the recurrent networks that learn them.

Copying memory: ten symbols of eight, a delay of blanks, a go signal, then the symbols
again; mean cross-entropy in nats over all steps. A network without memory reaches
10 ln 8 / (delay + 20). Adding: the sum of the two marked numbers of a sequence of
random ones; always answering 1 gives a mean squared error of 1/6. Digits: images
pixel by pixel, to be classified after the last one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import data
from benchmarks.harness import Checkpoint, progress
from rbpjax.unitary import (
    Activation,
    CellWeights,
    Inverse,
    UnitaryCell,
    identity,
    recomputed_scan,
)

SYMBOLS, COPIED = 8, 10


class Task(NamedTuple):
    """What is to be learned; a batch is (inputs [B, T, inputs], targets [B, …])."""

    inputs: int
    outputs: int
    every_step: bool  # whether outputs are read at each step or after the last
    batch: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    score: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    test: tuple[jax.Array, jax.Array]
    memoryless: float  # the loss of the best answer that ignores the inputs


def copying(delay: int, seed: int) -> Task:
    """Copying memory; accuracy is the fraction of right symbols."""

    def batch(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        symbols = jax.random.randint(key, (size, COPIED), 1, SYMBOLS + 1)
        blank = lambda n: jnp.zeros((size, n), int)
        go = jnp.full((size, 1), SYMBOLS + 1)
        tokens = jnp.concatenate([symbols, blank(delay - 1), go, blank(COPIED)], 1)
        # A blank is no input: the columns are the symbols and the go signal.
        inputs = jax.nn.one_hot(tokens - 1, SYMBOLS + 1)
        return inputs, jnp.concatenate([blank(delay + COPIED), symbols], 1)

    def score(logits: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        hits = jnp.argmax(logits[:, -COPIED:], -1) == y[:, -COPIED:]
        return loss, jnp.mean(hits)

    test = batch(jax.random.key(10_000 + seed), 64)
    memoryless = COPIED * math.log(SYMBOLS) / (delay + 2 * COPIED)
    return Task(SYMBOLS + 1, SYMBOLS + 1, True, batch, score, test, memoryless)


def adding(length: int, seed: int) -> Task:
    """Adding problem; accuracy is the fraction of sums within 0.04 of the truth."""

    def batch(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, 3)
        numbers = jax.random.uniform(keys[0], (size, length))
        half = length // 2
        first = jax.random.randint(keys[1], (size,), 0, half)
        second = jax.random.randint(keys[2], (size,), half, length)
        marks = jax.nn.one_hot(first, length) + jax.nn.one_hot(second, length)
        return jnp.stack([numbers, marks], -1), jnp.sum(numbers * marks, 1)

    def score(out: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        error = out[:, 0] - y
        return jnp.mean(error**2), jnp.mean(jnp.abs(error) < 0.04)

    test = batch(jax.random.key(10_000 + seed), 512)
    return Task(2, 1, False, batch, score, test, 1 / 6)


def digits(dataset: str, seed: int) -> Task:
    """Images pixel by pixel; the split is by seed for scikit-learn's digits."""
    if dataset == "mnist":
        (x, y), (x_test, y_test) = data.mnist("train"), data.mnist("test")
    else:
        x, y = data.digits()
        order = np.random.default_rng(seed).permutation(len(x))
        x, y = x[order], y[order]
        x, y, x_test, y_test = x[360:], y[360:], x[:360], y[:360]
    top = float(x.max())
    flat = lambda x: jnp.asarray(x.reshape(len(x), -1, 1) / top, jnp.float32)
    train, labels = flat(x), jnp.asarray(y, jnp.int32)

    def batch(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        rows = jax.random.randint(key, (size,), 0, len(train))
        return train[rows], labels[rows]

    def score(logits: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, jnp.mean(jnp.argmax(logits, -1) == y)

    test = (flat(x_test), jnp.asarray(y_test, jnp.int32))
    return Task(1, 10, False, batch, score, test, math.log(10))


# --- networks ------------------------------------------------------------------------


class Network(NamedTuple):
    """Weights, outputs of one sequence, and which weights make the orthogonal part."""

    init: Callable[[jax.Array], Any]
    run: Callable[[Any, jax.Array], jax.Array]
    slow: Callable[[Any], Any]  # a tree of True where the smaller step size applies


def unroll(task: Task, step: Callable, read: Callable, h0: Any, xs: jax.Array) -> Any:
    """Outputs at each step, or after the last, of a plain scan (history stored)."""

    def body(h: Any, x: jax.Array) -> tuple[Any, jax.Array | None]:
        h = step(x, h)
        return h, read(h) if task.every_step else None

    h, ys = jax.lax.scan(body, h0, xs)
    return ys if task.every_step else read(h)


def unitary(
    task: Task, size: int, activation: Activation, gain: float, scale: float
) -> Network:
    """The convolutional cell on a complex ring with kernels of full support.

    Inputs are scaled by ``gain`` and the read-out by 1/gain: the amplitude at which a
    saturating cell works. ``scale`` is the rms of the first rotation angles; 1.8 puts
    them all around the circle, as in expRNN's Henaff start. The linear cell is trained
    with its history recomputed.
    """
    cell = UnitaryCell((size,), activation=activation)

    def init(key: jax.Array) -> CellWeights:
        return cell.init(
            key, radius=size // 2, inputs=task.inputs, outputs=task.outputs, scale=scale
        )

    def run(weights: CellWeights, xs: jax.Array) -> jax.Array:
        params = cell.prepare(weights)
        read = lambda h: cell.readout(params, h / gain)
        if activation is not identity:
            step = lambda x, h: cell(params, gain * x, h)
            return unroll(task, step, read, cell.start(), xs)
        emit = (lambda _, x, h: read(h)) if task.every_step else None
        history = Inverse(cell.inverse, anchors=4)
        h, ys = recomputed_scan(
            cell, params, gain * xs, cell.start(), history=history, emit=emit
        )
        return ys if task.every_step else read(h)

    slow = lambda w: CellWeights(True, False, False, False)
    return Network(init, run, slow)


def exp_rnn(task: Task, size: int) -> Network:
    """Dense expRNN: the same exponential on a lattice of one site, and modReLU.

    After Lezcano-Casado and Martínez-Rubio 2019: kernel of 2 × 2 blocks with angles
    uniform in (-π, π), modReLU with a learned bias.
    """
    cell = UnitaryCell((1,), size, complex_valued=False, activation=identity)

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 3)
        weights = cell.init(keys[0], radius=0, inputs=task.inputs, outputs=task.outputs)
        angles = jax.random.uniform(keys[1], (size // 2,), float, -jnp.pi, jnp.pi)
        rows = jnp.arange(size // 2) * 2
        kernel = jnp.zeros((1, size, size)).at[0, rows, rows + 1].set(2 * angles)
        bias = jax.random.uniform(keys[2], (1, size), float, -0.01, 0.01)
        return {"cell": weights._replace(kernel=kernel), "bias": bias}

    def run(weights: dict[str, Any], xs: jax.Array) -> jax.Array:
        params = cell.prepare(weights["cell"])

        def step(x: jax.Array, h: jax.Array) -> jax.Array:
            z = cell(params, x, h)
            return jnp.sign(z) * jax.nn.relu(jnp.abs(z) + weights["bias"])

        return unroll(task, step, partial(cell.readout, params), cell.start(), xs)

    slow = lambda w: {"cell": CellWeights(True, False, False, False), "bias": False}
    return Network(init, run, slow)


def lstm(task: Task, size: int) -> Network:
    """An LSTM of flax with forget bias 1 and a linear read-out."""

    def make(key: jax.Array) -> tuple[nnx.LSTMCell, nnx.Linear]:
        rngs = nnx.Rngs(key)
        cell = nnx.LSTMCell(task.inputs, size, rngs=rngs)
        cell.hf.bias[...] = jnp.ones(size)
        return cell, nnx.Linear(size, task.outputs, rngs=rngs)

    graph, _, rest = nnx.split(make(jax.random.key(0)), nnx.Param, ...)
    init = lambda key: nnx.to_pure_dict(nnx.split(make(key), nnx.Param, ...)[1])

    def run(weights: Any, xs: jax.Array) -> jax.Array:
        cell, read = nnx.merge(graph, nnx.State(weights), rest)
        step = lambda x, h: cell(h, x)[0]
        h0 = (jnp.zeros(size), jnp.zeros(size))
        return unroll(task, step, lambda h: read(h[1]), h0, xs)

    return Network(init, run, lambda w: jax.tree.map(lambda _: False, w))


# --- training ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Training:
    """How one network is trained: Adam, two step sizes, cosine decay, clipping."""

    iterations: int
    batch: int
    rate: float
    slow_rate: float
    blocks: int = 20


def train(
    task: Task,
    network: Network,
    plan: Training,
    seed: int,
    name: str,
    checkpoint: Checkpoint,
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
    done, (carry, log) = checkpoint.restore(name, (carry, log))
    for row in progress(range(done + 1, rows), rows - 1, name, done):
        start = time.perf_counter()
        carry, losses = jax.block_until_ready(block(carry, (row - 1) * per_block))
        seconds = log["seconds"][row - 1] + time.perf_counter() - start
        value, accuracy = measure(carry[0])
        log = put(
            log,
            row,
            loss=value,
            accuracy=accuracy,
            train_loss=jnp.mean(losses),
            seconds=seconds,
        )
        checkpoint.save(name, row, (carry, log))
    return {"iterations": [i * per_block for i in range(rows)]} | {
        k: np.asarray(v) for k, v in log.items()
    }
