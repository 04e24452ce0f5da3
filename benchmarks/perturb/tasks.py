"""The tasks of the perturbation benchmark: fresh training data, disjoint test data.

Each is a regression at every step, mean squared error; the first input is 1 (a bias).

* forecast: the Mackey-Glass series 15 units ahead, from itself.
* recall: the same series 15 units ago, which is what the paper's public code asks for.
* copying: five symbols of eight, ten blanks, five marks at which to repeat them.
* weather: temperature 24 hours ahead, from nine hourly measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import weather as hours

LAG, WINDOW, DROPPED = 15, 60, 1500
SYMBOLS, COPIED, BLANKS = 8, 5, 10
HORIZON, HOURS = 24, 48
VALIDATION_SEED = 1000


class Task(NamedTuple):
    """Batches are (xs ``[T, examples, inputs]``, ys ``[T, examples, outputs]``)."""

    inputs: int
    outputs: int
    batch: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    test: tuple[jax.Array, jax.Array]  # of validation data for the validation seed
    score: Callable[[jax.Array, jax.Array], jax.Array]
    measure: str
    naive: dict[str, float]  # scores of answers that need no learning


@cache
def make(name: str, seed: int) -> Task:
    """The task with the data of a seed."""
    return {
        "forecast": lambda: mackey_glass(seed, ahead=True),
        "recall": lambda: mackey_glass(seed, ahead=False),
        "copying": lambda: copying(seed),
        "weather": lambda: weather(seed),
    }[name]()


def series(seed: int, count: int, length: int) -> np.ndarray:
    """Mackey-Glass series ``[count, length]``, one sample a unit of time.

    dx/dt = 0.2 x(t-17) / (1 + x(t-17)¹⁰) - 0.1 x, Euler with ten steps a unit, from a
    history of 1.2 ± 0.1; squashed by tanh(x - 1). The first units are dropped, 1,500 of
    them: by then chaos has parted the series (after the paper's code's hundred they are
    still much the same, so that a test series would be a training series).
    """
    rng = np.random.default_rng(seed)
    past = list(1.2 + 0.2 * (rng.random((170, count)) - 0.5))
    x, kept = np.full(count, 1.2), []
    for step in range(10 * (length + DROPPED)):
        old = past[step]
        x = x + 0.1 * (0.2 * old / (1 + old**10) - 0.1 * x)
        past.append(x)
        if step % 10 == 0 and step >= 10 * DROPPED:
            kept.append(x)
    return np.tanh(np.stack(kept, 1) - 1).astype(np.float32)


def mackey_glass(seed: int, ahead: bool) -> Task:
    """Windows of 16 training series; the test has 8 others, from other histories."""
    # The validation seed's test series are never another seed's: seeds differ.
    train, test = series(2 * seed, 16, 2000), series(2 * seed + 1, 8, 1000)
    mean, scale = train.mean(), train.std()
    train, test = (train - mean) / scale, (test - mean) / scale
    train_, test_ = jnp.asarray(train), jnp.asarray(test)

    def cut(source: jax.Array, row: jax.Array, start: jax.Array) -> tuple:
        # Past, window, future: what is due lies LAG before or after what is seen.
        piece = jax.lax.dynamic_slice(source[row], (start,), (WINDOW + LAG,))
        near, far = piece[:WINDOW], piece[LAG:]
        return (near, far) if ahead else (far, near)

    def gather(source: jax.Array, rows: jax.Array, starts: jax.Array) -> tuple:
        x, y = jax.vmap(lambda r, s: cut(source, r, s))(rows, starts)
        return with_bias(x.T[..., None]), y.T[..., None]

    def batch(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        rows, starts = jax.random.split(key)
        rows = jax.random.randint(rows, (size,), 0, 16)
        starts = jax.random.randint(starts, (size,), 0, 2000 - WINDOW - LAG)
        return gather(train_, rows, starts)

    rows, starts = np.divmod(np.arange(8 * 12), 12)
    xs, ys = gather(test_, jnp.asarray(rows), jnp.asarray(starts * WINDOW))
    naive = {"present value": float(nmse(xs[..., 1:], ys))}
    return Task(2, 1, batch, (xs, ys), nmse, "NMSE", naive)


def copying(seed: int) -> Task:
    """Fresh sequences; test and validation have those that training never draws."""
    outputs = SYMBOLS

    def build(symbols: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = len(symbols)
        token = lambda value, n: jnp.full((size, n), value)
        tokens = jnp.concatenate(
            [symbols, token(SYMBOLS, BLANKS), token(SYMBOLS + 1, COPIED)], axis=1
        )
        # A blank is no input.
        seen = jax.nn.one_hot(tokens, SYMBOLS + 2)[..., np.r_[:SYMBOLS, SYMBOLS + 1]]
        due = jax.nn.one_hot(symbols, outputs)
        quiet = jnp.zeros((size, COPIED + BLANKS, outputs))
        ys = jnp.concatenate([quiet, due], axis=1)
        return with_bias(seen.swapaxes(0, 1)), ys.swapaxes(0, 1)

    def draw(key: jax.Array, size: int, remainder: jax.Array) -> jax.Array:
        free = jax.random.randint(key, (size, COPIED - 1), 0, SYMBOLS)
        last = (remainder - free.sum(1)) % SYMBOLS
        return jnp.concatenate([free, last[:, None]], axis=1)

    def batch(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        key, other = jax.random.split(key)
        # The sum of the symbols leaves remainder 0 in the test, 1 in the validation.
        remainder = jax.random.randint(other, (size,), 2, SYMBOLS)
        return build(draw(key, size, remainder))

    remainder = jnp.full(256, int(seed == VALIDATION_SEED))
    test = build(draw(jax.random.key(77), 256, remainder))

    def score(out: jax.Array, ys: jax.Array) -> jax.Array:
        wrong = jnp.argmax(out[-COPIED:], -1) != jnp.argmax(ys[-COPIED:], -1)
        return jnp.mean(wrong.astype(jnp.float32))

    naive = {"chance": 1 - 1 / SYMBOLS}
    return Task(SYMBOLS + 2, outputs, batch, test, score, "wrong symbols", naive)


def weather(seed: int) -> Task:
    """Training hours come first, then 2,000 for validation, then 1,464 for tests."""
    values, names = hours.weather()
    kept = [i for i, name in enumerate(names) if "Celsius" not in name]
    target = [names[i] for i in kept].index("DryBulbFarenheit")
    values = values[:, kept]
    bounds = {"train": (0, 31_600), "validation": (31_600, 33_600)}
    bounds["test"] = (33_600, len(values))
    first, last = bounds["train"]
    mean, scale = values[first:last].mean(0), values[first:last].std(0)
    values = jnp.asarray((values - mean) / scale)

    def gather(starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        cut = lambda s, n: jax.lax.dynamic_slice(values, (s, 0), (n, len(kept)))
        xs = jax.vmap(lambda s: cut(s, HOURS))(starts).swapaxes(0, 1)
        ys = jax.vmap(lambda s: cut(s + HORIZON, HOURS))(starts).swapaxes(0, 1)
        return with_bias(xs), ys[..., target : target + 1]

    def batch(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        starts = jax.random.randint(key, (size,), first, last - HOURS - HORIZON)
        return gather(starts)

    low, high = bounds["validation" if seed == VALIDATION_SEED else "test"]
    xs, ys = gather(jnp.arange(low, high - HOURS - HORIZON, 12))
    naive = {"as it is now": float(nmse(xs[..., 1 + target : 2 + target], ys))}
    return Task(1 + len(kept), 1, batch, (xs, ys), nmse, "NMSE", naive)


def with_bias(xs: jax.Array) -> jax.Array:
    """The inputs with a 1 before them."""
    return jnp.concatenate([jnp.ones((*xs.shape[:-1], 1), xs.dtype), xs], -1)


def nmse(out: jax.Array, ys: jax.Array) -> jax.Array:
    """Mean squared error in units of the targets' variance; 1 is the mean's."""
    return jnp.mean((out - ys) ** 2) / jnp.var(ys)
