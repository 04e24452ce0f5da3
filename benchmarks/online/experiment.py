"""Streaming gradients: how good, how dear, and what they learn.

Parts, each with a result file of its own:

* quality: bias, spread and cosine of every estimator's gradient against RTRL's;
* cost: time and memory a step against units and sequence length;
* balance: influence balancing, where short truncations go the wrong way;
* anbn, brackets, text: bits a character, online, against truncated BPTT.

The signs, weights and streams are drawn from the seeds; all networks are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.measurement import interleaved_times, spread, temporary_bytes
from benchmarks.harness.options import OneOf, Seeds, Within
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import mean_std, table
from benchmarks.online.balance import balance
from benchmarks.online.figures import draw
from benchmarks.online.learning import CHUNK, METHODS, compare, make_learner
from benchmarks.online.quality import quality
from benchmarks.online.tasks import tasks
from rbpjax import online

PARTS = ("quality", "cost", "balance", "anbn", "brackets", "text")
# The methods of each task; what is left out is left out for its time a step.
LEARNERS = {
    "anbn": tuple(METHODS),
    "brackets": tuple(m for m in METHODS if m != "kalman"),
    "text": tuple(m for m in METHODS if m not in ("kalman", "uoro16", "kf_rtrl")),
}
UNITS = {"anbn": 32, "brackets": 32, "text": 64}
LENGTHS = {"anbn": 400_000, "brackets": 160_000, "text": 208_000}


@dataclasses.dataclass(frozen=True)
class Online:
    """Streaming gradients: quality, cost, and the papers' tasks."""

    name: ClassVar[str] = "online"

    parts: Annotated[tuple[str, ...], OneOf(PARTS)] = PARTS
    """Any of quality, cost, balance, anbn, brackets, text."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of weights, streams and signs."""
    length: Annotated[int, Within(4 * CHUNK)] | None = None
    """Characters to read in the learning parts; default by task."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Runs the parts: JSON for each, the figures of all, tables."""
        custom = "" if self == Online(parts=self.parts, fresh=self.fresh) else "-custom"
        for part in self.parts:
            options = {"seeds": self.seeds}
            if part in LEARNERS:
                length = self.length or LENGTHS[part]
                options |= {"length": length // CHUNK * CHUNK, "units": UNITS[part]}
            checkpoints = Checkpoints(f"online-{part}", options, self.fresh)
            say(f"{part}: {options}")
            found = measure(part, options, checkpoints)
            command = f"online --parts {part}"
            content = record(f"online, {part}", command, options, **found)
            path = write_json(f"online-{part}{custom}", content)
            checkpoints.clear()
            say(show(part, read_json(path.stem)))
            written = [path, *draw(part, path.stem)]
            say("written: " + ", ".join(p.name for p in written))


def measure(part: str, options: dict, checkpoints: Checkpoints) -> dict[str, Any]:
    """The numbers of one part."""
    if part == "quality":
        return quality(options["seeds"])
    if part == "cost":
        return cost()
    if part == "balance":
        return balance(options["seeds"])
    task = tasks()[part]()
    methods = compare(
        task,
        LEARNERS[part],
        options["units"],
        options["seeds"],
        options["length"],
        options["length"] // 5 // CHUNK * CHUNK,
        checkpoints,
    )
    return {
        "entropy": task.entropy,
        "vocabulary": task.vocabulary,
        "methods": methods,
    }


# --- cost ----------------------------------------------------------------------------

SIZES = (32, 64, 128, 256)
SEQUENCES = (100, 1_000, 10_000, 100_000)
LARGEST = {"rtrl": 64, "kf_rtrl": 128, "nobacktrack_rows": 128}
COSTED: dict[str, Callable] = {
    "uoro": online.uoro,
    "nobacktrack": METHODS["nobacktrack"].make,
    "nobacktrack_rows": online.nobacktrack,
    "kf_rtrl": online.kf_rtrl,
    "snap1": online.snap1,
    "rflo": online.rflo,
    "rtrl": online.rtrl,
    "bptt": online.bptt,
}


def layer(units: int, ports: int = 32) -> tuple[Any, Callable, dict[str, jax.Array]]:
    """A dense tanh layer with a linear readout and squared error."""
    cell = online.PreactivationCell(
        kernel=lambda p: p["W"][None],
        features=lambda x, h: jnp.concatenate([h, x, jnp.ones(1)]),
        activate=lambda z, h: jnp.tanh(z[0]),
    )
    loss = lambda p, h, y: jnp.sum((p["C"] @ h - y) ** 2)
    keys = jax.random.split(jax.random.key(0))
    size = units + ports + 1
    params = {
        "W": 0.9 * jax.random.normal(keys[0], (units, size)) / size**0.5,
        "C": jax.random.normal(keys[1], (ports, units)) / units**0.5,
    }
    return cell, loss, params


def sweep(make: Callable | None, units: int) -> tuple[Callable, Any]:
    """``f(xs, ys)``: the gradients of a sequence, summed; None is one step's own.

    The latter is the yardstick: one forward step of the cell plus the gradient of its
    loss in parameters and state.
    """
    cell, loss, params = layer(units)
    zeros = jax.tree.map(jnp.zeros_like, params)
    add = partial(jax.tree.map, jnp.add)
    if make is None:

        def one(state, xy):
            h, total = state
            own = lambda p, h: (loss(p, cell(p, xy[0], h), xy[1]), cell(p, xy[0], h))
            grads, h = jax.grad(own, argnums=(0, 1), has_aux=True)(params, h)
            return (h, add(total, grads[0])), jnp.sum(grads[1])

        start = (jnp.zeros(units), zeros)
        return lambda xs, ys: jax.lax.scan(one, start, (xs, ys)), params
    est = make(cell, loss)
    carry = est.init(params, jnp.zeros(units))
    if make is online.bptt:
        return lambda xs, ys: est.step(params, carry, xs, ys, ()), params

    def body(state, xy):
        carry, total, key = state
        key, signs = jax.random.split(key)
        carry, out = est.step(params, carry, *xy, est.noise(signs, carry))
        return (carry, add(total, out.grads), key), None

    start = (carry, zeros, jax.random.key(1))
    return lambda xs, ys: jax.lax.scan(body, start, (xs, ys))[0][:2], params


def cost(steps: int = 100) -> dict[str, Any]:
    """Time a step, temporary memory, and time a character of the learners."""
    everyone = {"one_step": None, **COSTED}
    at: dict[str, Any] = {name: {"seconds": {}, "bytes": {}} for name in everyone}
    for units in SIZES:
        data = jax.random.normal(jax.random.key(2), (2, steps, 32))
        calls = {
            name: partial(jax.jit(sweep(make, units)[0]), *data)
            for name, make in everyone.items()
            if units <= LARGEST.get(name, units)
        }
        for name, times in interleaved_times(calls, 15).items():
            at[name]["seconds"][str(units)] = spread([t / steps for t in times])
    for name, make in everyone.items():
        function = sweep(make, 64)[0]
        for length in SEQUENCES:
            shape = jax.ShapeDtypeStruct((length, 32), jnp.float32)
            at[name]["bytes"][str(length)] = temporary_bytes(function, shape, shape)
    one, uoro = (at[n]["seconds"]["256"]["median"] for n in ("one_step", "uoro"))
    return {
        "steps": steps,
        "methods": at,
        "uoro_over_one_step_256": uoro / one,
        "seconds_a_character": {part: pace(part) for part in LEARNERS},
    }


def pace(part: str) -> dict[str, float]:
    """Median seconds a character of each learner of a task."""
    task, calls = tasks()[part](), {}
    length = CHUNK * 2 // 5
    symbols = jnp.asarray(task.stream(0, length + 1))
    for name in LEARNERS[part]:
        learner = make_learner(METHODS[name], task, UNITS[part], 1e-3)
        state = learner.init(jax.random.key(0))
        calls[name] = partial(learner.chunk, state, symbols, jax.random.key(0))
    times = interleaved_times(calls, 3)
    return {name: spread(t)["median"] / length for name, t in times.items()}


# --- tables --------------------------------------------------------------------------


def show(part: str, result: dict[str, Any]) -> str:
    """A part's result as a Markdown table."""
    made = []
    if part == "quality":
        for name, at in result["methods"].items():
            row = {"method": METHODS[name].title}
            for stage, runs in at.items():
                for key in ("bias", "spread", "cosine_step", "cosine_sum"):
                    row[f"{key} ({stage})"] = mean_std([r[key] for r in runs], 2)
            made.append(row)
    elif part == "cost":
        for name, m in result["methods"].items():
            shown = {u: f"{1e6 * s['median']:.1f}" for u, s in m["seconds"].items()}
            row = {"method": name} | {
                f"µs, n={u}": shown.get(str(u), "–") for u in SIZES
            }
            row |= {f"kB, T={t}": f"{b / 1e3:.0f}" for t, b in m["bytes"].items()}
            made.append(row)
    elif part == "balance":
        for name, m in result["methods"].items():
            finals = ["diverged" if t is None else f"{t:.4f}" for t in m["final"]]
            made.append({"method": name, "θ at the end": ", ".join(finals)})
    else:
        for name, m in result["methods"].items():
            ends = [float("nan") if b is None else b for b in m["last_quarter"]]
            pilots = [b for b in m["pilot_bits"].values() if b is not None]
            row = {"method": METHODS[name].title, "rate": f"{m['rate']:g}"}
            row |= {"bits, pilot": f"{min(pilots):.4f}" if pilots else "diverged"}
            row |= {"bits, last quarter": mean_std(ends, 4) if ends else "–"}
            made.append(row)
    return table(made)
