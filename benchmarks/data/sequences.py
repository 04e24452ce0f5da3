"""Sequences to learn: copying memory, the adding problem, digits pixel by pixel.

Copying memory: ten symbols of eight, a delay of blanks, a go signal, then the symbols
again; mean cross-entropy in nats over all steps. A network without memory reaches
10 ln 8 / (delay + 20). Adding: the sum of the two marked numbers of a sequence of
random ones; always answering 1 gives a mean squared error of 1/6. Digits: images
pixel by pixel, to be classified after the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data import images

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
        (x, y), (x_test, y_test) = images.mnist("train"), images.mnist("test")
    else:
        x, y = images.digits()
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
