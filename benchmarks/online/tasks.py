"""The papers' tasks: formal languages, text, and influence balancing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data.fetch import fetch
from rbpjax import online


class Task(NamedTuple):
    """A stream of symbols 0 … vocabulary - 1, and its entropy rate if it is known."""

    stream: Callable[[int, int], np.ndarray]  # (seed, length) -> int32 symbols
    vocabulary: int
    entropy: float | None  # bits a character


def anbn(seed: int, length: int) -> np.ndarray:
    """Lines of k times a, then of k times b, k uniform in 1 … 32."""
    rng, lines, total = np.random.default_rng(seed), [], 0
    while total < length:
        k = int(rng.integers(1, 33))
        lines.append([0] * k + [2] + [1] * k + [2])
        total += 2 * k + 2
    return np.concatenate(lines)[:length].astype(np.int32)


def brackets(seed: int, length: int) -> np.ndarray:
    """[x]vwxyz[x] and a newline: a letter, five letters of noise, the letter again."""
    rng = np.random.default_rng(seed)
    count = -(-length // 12)
    letters, noise = rng.integers(0, 10, (count, 1)), rng.integers(0, 10, (count, 5))
    mark = lambda symbol: np.full((count, 1), symbol)
    group = [mark(10), letters, mark(11)]
    line = np.concatenate([*group, noise, *group, mark(12)], axis=1)
    return line.reshape(-1)[:length].astype(np.int32)


def text_task() -> Task:
    """WikiText-2's validation text, character by character, from its beginning."""
    path = fetch("wikitext2/wiki.valid.txt")
    raw = path.read_text(encoding="utf-8")
    characters, counts = np.unique(list(raw), return_counts=True)
    kept = characters[counts >= 100]  # all others become one symbol
    index = {c: i for i, c in enumerate(kept)}
    symbols = np.array([index.get(c, len(kept)) for c in raw], np.int32)

    def stream(seed: int, length: int) -> np.ndarray:
        del seed  # one text: seeds differ in the weights and the signs
        return symbols[:length]

    return Task(stream, len(kept) + 1, None)


def tasks() -> dict[str, Callable[[], Task]]:
    """The tasks by name; the text is read only when it is asked for."""
    return {
        "anbn": lambda: Task(anbn, 3, 5 / 35),
        "brackets": lambda: Task(brackets, 13, 6 * float(np.log2(10)) / 12),
        "text": text_task,
    }


def gru(units: int, vocabulary: int) -> tuple[online.PreactivationCell, Callable]:
    """A GRU with the reset after the product, on one-hot input, and its loss in bits.

    Gates: reset, update, the state's and the input's part of the candidate.
    """

    def kernel(params):
        gates, bias = params["gates"], params["bias"]
        state, symbol = params["state"], params["symbol"]
        zeros = jnp.zeros_like
        return jnp.concatenate(
            [
                gates,
                jnp.concatenate([state, zeros(symbol), zeros(bias)], 1)[None],
                jnp.concatenate([zeros(state), symbol, bias], 1)[None],
            ]
        )

    def features(x, h):
        return jnp.concatenate([h, jax.nn.one_hot(x, vocabulary), jnp.ones(1)])

    def activate(z, h):
        update = jax.nn.sigmoid(z[1])
        return update * h + (1 - update) * jnp.tanh(jax.nn.sigmoid(z[0]) * z[2] + z[3])

    def loss(params, h, y):
        logits = params["readout"] @ h + params["offset"]
        return -jax.nn.log_softmax(logits)[y] / jnp.log(2.0)

    cell = online.PreactivationCell(kernel=kernel, features=features, activate=activate)
    return cell, loss


def gru_params(key: jax.Array, units: int, vocabulary: int) -> dict[str, jax.Array]:
    """Uniform weights of variance 1 / units, zero biases."""
    keys = jax.random.split(key, 4)
    bound = (3 / units) ** 0.5
    draw = lambda key, *shape: jax.random.uniform(
        key, shape, minval=-bound, maxval=bound
    )
    gates = draw(keys[0], 2, units, units + vocabulary + 1)
    return {
        "gates": gates.at[..., -1].set(0.0),
        "state": draw(keys[1], units, units),
        "symbol": draw(keys[2], units, vocabulary),
        "bias": jnp.zeros((units, 1)),
        "readout": draw(keys[3], vocabulary, units),
        "offset": jnp.zeros(vocabulary),
    }


def rows(params: dict[str, jax.Array]) -> list[jax.Array]:
    """The parameters of ``gru`` by units, biases first, for the Kalman metric."""
    gates, units = params["gates"], params["state"].shape[0]
    gates = jnp.concatenate([gates[..., -1:], gates[..., :-1]], 2)
    return [
        gates.reshape(2 * units, -1),
        jnp.concatenate([params["bias"], params["state"], params["symbol"]], 1),
        jnp.concatenate([params["offset"][:, None], params["readout"]], 1),
    ]


def influence_balancing() -> tuple[Callable, Callable, jax.Array]:
    """``f, loss, h0``: ten units that help at once, thirteen that hurt later.

    h' = A h + θ s, A = ½ on the diagonal and above it, s = +1 ten times, then -1;
    loss ½ (h₁ - 1)². At rest ∂h₁/∂θ = 2 (10 - 13) = -6, so θ* = -1/6; but the positive
    influence arrives first.
    """
    signs = jnp.where(jnp.arange(23) < 10, 1.0, -1.0)

    def f(theta, x, h):
        del x
        return 0.5 * h + 0.5 * jnp.append(h[1:], 0.0).astype(h.dtype) + theta * signs

    def loss(theta, h, y):
        del theta, y
        return 0.5 * (h[0] - 1) ** 2

    return f, loss, jnp.ones(23)
