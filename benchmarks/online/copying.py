"""Copying over a long delay, online: linear recurrent units with exact influence.

Three symbols are shown, and asked for in order after a delay. The network reads one
step after another; the gradient of an episode is streamed, and eight episodes make an
update. All methods train the same network from the same start on the same episodes,
each with the best of three rates of the first seed, at each delay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.options import Count, OneOf, Seeds, Within
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import mean_std, table
from benchmarks.online import episodes
from benchmarks.online.episodes import Gradient, Lesson, Network, Portions, costs
from rbpjax import online

SYMBOLS, SHOWN = 8, 3
WINDOW = 20  # of TBPTT, whose states are then as large as the traces of one layer
EPISODES = 8  # to an update
POINT = 10  # updates to a point of the curve
PORTS = 16  # from the first layer to the second
RATES = (3e-3, 1e-2, 3e-2)
LENGTHS = (120, 1_020, 10_020)  # of the memory


WINDOWED = partial(online.bptt, truncation=WINDOW)


class Method(NamedTuple):
    """How to get the gradient of an episode, and of how many layers."""

    title: str
    how: Gradient
    layers: int = 1


METHODS = {
    "diagonal": Method("Diagonal RTRL", Gradient(online.diagonal_rtrl)),
    "diagonal2": Method("Diagonal RTRL, two layers", Gradient(online.diagonal_rtrl), 2),
    "uoro": Method("UORO", Gradient(online.uoro)),
    "tbptt": Method(f"TBPTT({WINDOW})", Gradient(WINDOWED, whole=True)),
    "bptt": Method("BPTT", Gradient(online.bptt, whole=True)),
}


@dataclasses.dataclass(frozen=True)
class OnlineCopying:
    """Copying over 100 to 1,000 steps, online: exact influence against UORO."""

    name: ClassVar[str] = "online-copying"

    delays: Annotated[tuple[int, ...], Within(SHOWN)] = (100, 1_000)
    """Steps from the first symbol to the question; multiples of 20."""
    methods: Annotated[tuple[str, ...], OneOf(METHODS)] = tuple(METHODS)
    """Any of diagonal, diagonal2, uoro, tbptt, bptt."""
    seeds: Seeds = (0, 1)
    """Seeds of weights, episodes and signs."""
    updates: Annotated[int, Within(POINT)] = 300
    """Updates of each run; rounded down to tens."""
    units: Count = 32
    """Units of a layer."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Trains all, measures memory and time: JSON, figure, table."""
        custom = "" if self == OnlineCopying(fresh=self.fresh) else "-custom"
        options = {
            "delays": tuple(-(-d // WINDOW) * WINDOW for d in self.delays),
            "methods": self.methods,
            "seeds": self.seeds,
            "updates": self.updates // POINT * POINT,
            "units": self.units,
        }
        checkpoints = Checkpoints("online-copying", options, self.fresh)
        found = {name: compare(name, options, checkpoints) for name in self.methods}
        steps = LENGTHS[1]
        of = lambda m: (m.how, network(m.layers, self.units, steps))
        programs = {name: of(METHODS[name]) for name in self.methods}
        for name, cost in costs(programs, LENGTHS, steps, SYMBOLS + 1).items():
            found[name] |= cost
        content = record(
            "copying, online", "online-copying", options, window=WINDOW, methods=found
        )
        path = write_json(f"online-copying{custom}", content)
        checkpoints.clear()
        say(show(read_json(path.stem)))
        say(f"written: {path.name}, {draw(read_json(path.stem), path.stem).name}")


# --- the task and the network ---------------------------------------------------------


def episode(key: jax.Array, delay: int) -> tuple[jax.Array, jax.Array]:
    """One-hot inputs and targets of an episode; a target of -1 asks for nothing."""
    symbols = jax.random.randint(key, (SHOWN,), 0, SYMBOLS)
    length = delay + WINDOW
    x = jnp.zeros((length, SYMBOLS + 1))
    x = x.at[:SHOWN, :SYMBOLS].set(jax.nn.one_hot(symbols, SYMBOLS))
    x = x.at[delay, SYMBOLS].set(1.0)  # the question
    y = jnp.full(length, -1).at[delay : delay + SHOWN].set(symbols)
    return x, y


def network(layers: int, units: int, delay: int) -> Network:
    """Linear recurrent units whose memories begin with about the delay.

    Between layers the real and imaginary parts go through a matrix and a tanh.
    """
    make = partial(
        online.cells.lru,
        units,
        r_min=1 - 1 / delay,
        r_max=1 - 0.1 / delay,
        max_phase=3.0,
    )
    parts = lambda h: jnp.concatenate([h.real, h.imag])
    low = make(SYMBOLS + 1, select=lambda p: p["low"])
    high = make(PORTS, select=lambda p: p["high"])
    between = lambda p, x, h: jnp.tanh(p["between"] @ parts(h))
    both = online.LayeredCell(cells=(low.cell, high.cell), between=(between,))

    def init(key: jax.Array) -> dict:
        keys = jax.random.split(key, 4)
        scaled = lambda key, *shape: jax.random.normal(key, shape) / (2 * units) ** 0.5
        params = {
            "low": low.init(keys[0]),
            "readout": scaled(keys[1], SYMBOLS, 2 * units),
            "offset": jnp.zeros(SYMBOLS),
        }
        if layers == 2:
            params["high"] = high.init(keys[2])
            params["between"] = 2**0.5 * scaled(keys[3], PORTS, 2 * units)
        return params

    def loss(params: dict, h: Any, y: jax.Array) -> jax.Array:
        top = h if layers == 1 else h[1]
        logits = params["readout"] @ parts(top) + params["offset"]
        bits = -jax.nn.log_softmax(logits)[jnp.maximum(y, 0)] / jnp.log(2.0)
        return jnp.where(y >= 0, bits, 0.0) / SHOWN

    if layers == 1:
        return Network(low.cell, loss, init, low.h0)
    return Network(both, loss, init, (low.h0, high.h0))


# --- learning -------------------------------------------------------------------------


# After the delay a phase counts that many times.
portions = lambda delay: Portions(EPISODES, POINT, slow=10 / delay)


@cache
def program(name: str, delay: int, units: int) -> tuple[Callable, Network]:
    """The compiled updates of a method, and its network."""
    method = METHODS[name]
    net = network(method.layers, units, delay)
    return episodes.program(method.how, net, portions(delay)), net


def learn(
    name: str,
    delay: int,
    rate: float,
    seed: int,
    options: dict[str, Any],
    checkpoints: Checkpoints,
) -> list[float | None]:
    """The curve of one run, bits a symbol; resumable."""
    draw = jax.jit(jax.vmap(jax.vmap(partial(episode, delay=delay))))
    return episodes.learn(
        f"{name}-{delay}-{rate:g}-{seed}",
        *program(name, delay, options["units"]),
        portions(delay),
        Lesson(draw, lambda _, losses: jnp.mean(losses)),
        rate,
        seed,
        options["updates"] // POINT,
        checkpoints,
    )


def end(curve: list[float | None]) -> float:
    """Bits a symbol over the last tenth; infinite if the run diverged."""
    last = curve[-max(1, len(curve) // 10) :]
    return float("inf") if None in last else float(np.mean(last))


def compare(
    name: str, options: dict[str, Any], checkpoints: Checkpoints
) -> dict[str, Any]:
    """The curves of one method at all delays, each at the best rate of its pilot."""
    run = partial(learn, name, options=options, checkpoints=checkpoints)
    first, *others = options["seeds"]
    found: dict[str, dict[str, Any]] = {}
    for delay in options["delays"]:
        pilots = {rate: run(delay, rate, first) for rate in RATES}
        ends = {rate: end(curve) for rate, curve in pilots.items()}
        rate = min(ends, key=ends.__getitem__)
        curves = [pilots[rate], *(run(delay, rate, seed) for seed in others)]
        finite = {f"{r:g}": b if np.isfinite(b) else None for r, b in ends.items()}
        found[str(delay)] = {"rate": rate, "pilot_bits": finite, "bits": curves}
        shown = np.round([end(curve) for curve in curves], 3)
        say(f"{METHODS[name].title:<25} {delay:>5}, rate {rate:g}, bits {shown}")
    return {"delays": found}


# --- table and figure -----------------------------------------------------------------


def show(result: dict[str, Any]) -> str:
    """The ends of all curves, memory and time."""
    rows = []
    for name, m in result["methods"].items():
        row = {"method": METHODS[name].title}
        for delay, at in m["delays"].items():
            ends = [end(curve) for curve in at["bits"]]
            known = np.all(np.isfinite(ends))
            row[f"rate, delay {delay}"] = f"{at['rate']:g}"
            row[f"bits, delay {delay}"] = mean_std(ends, 2) if known else "diverged"
        row["µs a step"] = f"{1e6 * m['seconds_a_step']['median']:.1f}"
        for length, size in m["bytes"].items():
            row[f"kB, T={length}"] = f"{size / 1e3:.0f}"
        rows.append(row)
    return table(rows)


def draw(result: dict[str, Any], name: str) -> Path:
    """Bits against updates for each delay, and memory against length."""
    delays = [str(d) for d in result["options"]["delays"]]
    fig, axes = figure(3 * len(delays) + 3, 3.6, ncols=len(delays) + 1)
    for method, m in result["methods"].items():
        title = METHODS[method].title
        for ax, delay in zip(axes, delays, strict=False):
            bits = np.array(m["delays"][delay]["bits"], float)  # None is NaN
            x = POINT * (np.arange(bits.shape[1]) + 0.5)
            # Broad, since another curve lies on it.
            below = {"lw": 4, "alpha": 0.4, "zorder": 1} if method == "bptt" else {}
            ax.plot(x, bits.mean(0), label=title, **look(title), **below)
            low, high = bits.min(0), bits.max(0)
            ax.fill_between(x, low, high, color=look(title)["color"], alpha=0.12)
        lengths = [int(length) for length in m["bytes"]]
        sizes = np.array(list(m["bytes"].values())) / 1e3
        marker = "x" if method == "uoro" else "o"
        axes[-1].loglog(lengths, sizes, marker=marker, ms=5, **look(title))
    for ax, delay in zip(axes, delays, strict=False):
        ax.axhline(np.log2(SYMBOLS), color="k", lw=0.8, ls=":", label="chance")
        ax.set(title=f"delay {int(delay):,}", xlabel="updates", ylim=(0, 3.2))
    axes[0].set_ylabel("bits a symbol")
    axes[-1].set(title="temporary memory", xlabel="length of an episode", ylabel="kB")
    legend(fig, axes[0], ncols=6)
    seeds, units = len(result["options"]["seeds"]), result["options"]["units"]
    fig.suptitle(
        f"Three of eight symbols, copied: linear recurrent units, {units} a layer, "
        f"mean and range of {seeds} seeds"
    )
    return save_figure(fig, name)
