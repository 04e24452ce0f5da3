"""Learning curves online: bits a character on the papers' tasks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.progress import say
from benchmarks.harness.training import train
from benchmarks.online.tasks import Task, gru, gru_params, rows
from rbpjax import online

CHUNK = 16_000  # characters of one compiled call; every window divides it
PILOT_ONLY = ("kalman",)  # O(n P) a character: too slow for the whole length
SAVE = 8  # calls between checkpoints
POINT = 2_000  # characters to a point of the curve
RATES = (3e-4, 1e-3, 3e-3)  # tried on the first seed, see ``choose_rate``


class Method(NamedTuple):
    """How to get gradients, and how many characters one update takes."""

    title: str
    make: Callable[[Any, Callable], online.Estimator]
    window: int = 1
    natural: bool = False  # gradients that are directions already: no Adam


METHODS = {
    "tbptt1": Method("TBPTT(1)", online.bptt, 1),
    "tbptt2": Method("TBPTT(2)", online.bptt, 2),
    "tbptt4": Method("TBPTT(4)", online.bptt, 4),
    "tbptt16": Method("TBPTT(16)", online.bptt, 16),
    "uoro": Method("UORO", online.uoro),
    "nobacktrack": Method(
        "NoBackTrack",
        lambda f, loss: online.nobacktrack(f, loss, row_norms=f.row_norms),
    ),
    "snap1": Method("SnAp-1", online.snap1),
    "rflo": Method("RFLO", online.rflo),
    "kf_rtrl": Method("KF-RTRL", online.kf_rtrl),
    "uoro16": Method(
        "UORO, 16 copies",
        lambda f, loss: online.combine.average(online.uoro(f, loss), 16),
    ),
    "kalman": Method(
        "Kalman NoBackTrack",
        lambda f, loss: online.kalman_nobacktrack(
            f, loss, decay=1e-3, rows=rows, damping=1e-3, own_rows=True
        ),
        natural=True,
    ),
}


class Learner(NamedTuple):
    """``init(key)`` and ``chunk(state, symbols, key) -> (state, bits)``, jitted."""

    init: Callable
    chunk: Callable


def make_learner(method: Method, task: Task, units: int, rate: float) -> Learner:
    """One network that reads a stream and learns at every window."""
    cell, loss = gru(units, task.vocabulary)
    est = method.make(cell, loss)
    # The schedule of the UORO authors' code, in characters.
    schedule = lambda t: rate / (1 + 0.03 * jnp.sqrt(t * method.window))
    optimizer = optax.adam(schedule)
    if method.natural:
        optimizer = optax.scale_by_learning_rate(schedule)

    def init(key):
        params = gru_params(key, units, task.vocabulary)
        carry = est.init(params, jnp.zeros(units))
        return params, optimizer.init(params), carry

    def body(state, inputs):
        params, opt_state, carry, key = state
        key, signs = jax.random.split(key)
        carry, out = est.step(params, carry, *inputs, est.noise(signs, carry))
        updates, opt_state = optimizer.update(out.grads, opt_state)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, carry, key), out.loss / method.window

    @jax.jit
    def chunk(state, symbols, key):
        x, y = symbols[:-1], symbols[1:]
        if method.make is online.bptt:
            x, y = (a.reshape(-1, method.window) for a in (x, y))
        state, bits = jax.lax.scan(body, (*state, key), (x, y))
        return state[:-1], bits.reshape(CHUNK // POINT, -1).mean(1)

    return Learner(init, chunk)


def learn(
    name: str,
    task: Task,
    units: int,
    rate: float,
    seed: int,
    length: int,
    checkpoints: Checkpoints,
) -> np.ndarray:
    """The curve of one run, bits a character in blocks of POINT; resumable."""
    method = METHODS[name]
    learner = make_learner(method, task, units, rate)
    chunks = length // CHUNK
    stream = task.stream(seed, chunks * CHUNK + 1)
    key = jax.random.key(seed)
    start = learner.init(key), jnp.full((chunks, CHUNK // POINT), jnp.nan)
    label = f"{name}-{rate:g}-{seed}-{length}"

    def block(saved: tuple, i: int) -> tuple:
        state, curve = saved
        symbols = jnp.asarray(stream[i * CHUNK : (i + 1) * CHUNK + 1])
        state, bits = learner.chunk(state, symbols, jax.random.fold_in(key, i))
        return state, curve.at[i].set(bits)

    _, curve = train(checkpoints, label, start, block, chunks, every=SAVE)
    return np.asarray(curve).reshape(-1)


def tail(curve: np.ndarray) -> float:
    """Bits a character over the last quarter; infinite if the run diverged."""
    last = float(np.mean(curve[-max(1, len(curve) // 4) :]))
    return last if np.isfinite(last) else float("inf")


def compare(
    task: Task,
    methods: tuple[str, ...],
    units: int,
    seeds: tuple[int, ...],
    length: int,
    pilot: int,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Curves of all methods and seeds, each method at the best rate of its pilot."""
    result = {}
    for name in methods:
        start = time.perf_counter()
        run = partial(learn, name, task, units, checkpoints=checkpoints)
        pilots = {r: tail(run(rate=r, seed=seeds[0], length=pilot)) for r in RATES}
        rate = min(pilots, key=pilots.__getitem__)
        chosen = () if name in PILOT_ONLY else seeds
        curves = [run(rate=rate, seed=seed, length=length) for seed in chosen]
        finals = [tail(c) for c in curves]
        say(
            f"{METHODS[name].title:<19} rate {rate:g}, last quarter "
            f"{np.round(finals, 4).tolist()} bits a character, "
            f"{time.perf_counter() - start:.0f} s"
        )
        result[name] = {
            "rate": rate,
            "pilot_bits": {f"{r:g}": finite(b) for r, b in pilots.items()},
            "bits": [[finite(b) for b in curve.tolist()] for curve in curves],
            "last_quarter": [finite(b) for b in finals],
        }
    return result


def finite(x: float) -> float | None:
    """None for what JSON has no number for: the run had diverged."""
    return float(x) if np.isfinite(x) else None
