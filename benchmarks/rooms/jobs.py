"""One side of ``rooms-before-after``: jobs by the library that this process has loaded.

As ``comparison/worker.py``: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import rbpjax
from rbpjax import online, perturb
from rbpjax.unitary import UnitaryCell, activation, history, recomputed_scan

UNITS, STEPS, ROWS = 128, 64, 8
draw = jax.random.normal


def _recurrent() -> tuple[Any, ...]:
    """A tanh cell, its loss, parameters, state and data."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "W": draw(keys[0], (UNITS, UNITS)) / UNITS**0.5,
        "U": draw(keys[1], (UNITS, 10)) / 10**0.5,
        "C": draw(keys[2], (10, UNITS)) / UNITS**0.5,
    }
    cell = online.PreactivationCell(
        kernel=lambda p: jnp.concatenate([p["W"], p["U"]], 1)[None],
        features=lambda x, h: jnp.concatenate([h, x]),
        activate=lambda z, h: jnp.tanh(z[0]),
    )
    loss = lambda p, h, y: jnp.mean((p["C"] @ h - y) ** 2)
    data = draw(keys[3], (2, STEPS, 10))
    return cell, loss, params, jnp.zeros(UNITS), data[0], data[1]


def streaming(make: Callable) -> tuple[Callable, tuple]:
    """The gradient of a sequence, streamed."""
    cell, loss, params, h0, xs, ys = _recurrent()
    estimator = make(cell, loss)

    def run(key: jax.Array, params: Any, xs: jax.Array, ys: jax.Array) -> Any:
        def step(now: tuple, one: tuple) -> tuple:
            carry, total = now
            key, x, y = one
            noise = estimator.noise(key, carry)
            carry, out = estimator.step(params, carry, x, y, noise)
            return (carry, jax.tree.map(jnp.add, total, out.grads)), None

        start = estimator.init(params, h0), jax.tree.map(jnp.zeros_like, params)
        keys = jax.random.split(key, STEPS)
        return jax.lax.scan(step, start, (keys, xs, ys))[0][1]

    return run, (jax.random.key(1), params, xs, ys)


def perturbed(rule: Any) -> tuple[Callable, tuple]:
    """A gradient from perturbed passes."""
    keys = jax.random.split(jax.random.key(0), 4)
    cell = perturb.DenseCell()
    params = cell.init(keys[0], inputs=10, units=UNITS, outputs=10)
    data = draw(keys[1], (2, STEPS, ROWS, 10))
    h0 = 0.1 * draw(keys[2], (ROWS, UNITS))
    loss = lambda out, y: jnp.mean((out - y) ** 2, -1)
    run = perturb.recurrent_value_and_grad(cell, loss, rule)
    return run, (keys[3], params, data[0], h0, data[1])


def unitary(inverse: bool) -> tuple[Callable, tuple]:
    """The gradient through a long sequence of a unitary network."""
    cell = UnitaryCell(lattice=(256,), activation=activation.identity)
    weights = cell.init(jax.random.key(0), radius=2, inputs=2)
    xs = 0.1 * draw(jax.random.key(1), (1000, 2))
    kind = (
        history.Inverse(inverse=cell.inverse, anchors=8)
        if inverse
        else history.Replay(slots=8)
    )

    def loss(weights: Any, xs: jax.Array) -> jax.Array:
        params = cell.prepare(weights)
        h, _ = recomputed_scan(cell, params, xs, cell.start(), history=kind)
        return jnp.sum(h.real**2)

    return jax.grad(loss), (weights, xs)


JOBS: dict[str, Callable[[], tuple[Callable, tuple]]] = {
    name: partial(streaming, getattr(online, name))
    for name in ("rtrl", "uoro", "nobacktrack", "kf_rtrl", "snap1", "rflo")
} | {
    "node, causal": lambda: perturbed(perturb.NodePerturbation(num_samples=16)),
    "node, trace": lambda: perturbed(
        perturb.NodePerturbation(num_samples=16, credit=perturb.credit.Trace(decay=0.9))
    ),
    "activity": lambda: perturbed(perturb.ActivityPerturbation(num_samples=16)),
    "unitary, inverse": partial(unitary, True),
    "unitary, replay": partial(unitary, False),
}


def serve() -> None:
    """Answers until there is nothing more to read."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else writes between them
    say = lambda answer: print(json.dumps(answer), file=answers, flush=True)
    call: Callable = lambda: None
    for line in sys.stdin:
        action, *arguments = json.loads(line)
        if action == "library":
            say({"folder": str(Path(rbpjax.__file__).parent)})
        elif action == "prepare":
            run, values = JOBS[arguments[0]]()
            compiled = jax.jit(run).lower(*values).compile()
            call = partial(compiled, *values)
            jax.block_until_ready(call())
            memory = compiled.memory_analysis()
            say({"temporary_bytes": int(memory.temp_size_in_bytes)})
        else:
            (times,) = arguments
            start = time.perf_counter()
            for _ in range(times):
                jax.block_until_ready(call())
            say({"seconds": (time.perf_counter() - start) / times})
