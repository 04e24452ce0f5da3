"""Digits pixel by pixel, online: what each estimator learns with each kind of unit.

A network reads an image one pixel after another and names the digit after the last
one. All methods train the same network from the same start on the same images, with as
many updates; each has the rate of the best test accuracy of a seed and a split that is
not reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import sequences
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.options import Count, Dataset, OneOf, Seeds, Within
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import table
from benchmarks.online import episodes
from benchmarks.online.episodes import Gradient, Lesson, Network, Portions, costs
from rbpjax import online

CLASSES = 10
EPISODES = 16  # to an update
POINT = 50  # updates to a point of the curve
PORTS = 16  # from the first layer to the second
LEAK = 0.1  # of the readout of spikes
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING = 100  # the seed, and the split, of the pilots
LENGTHS = (64, 784)  # of the memory: images of 8 × 8 and 28 × 28


class Kind(NamedTuple):
    """A kind of units."""

    title: str
    network: Callable[[int, int], Network]  # of the units and the length
    rates: tuple[float, ...]


class Method(NamedTuple):
    """How to get the gradient of an episode, and of which kinds of units."""

    title: str
    how: Gradient
    kinds: tuple[str, ...]


# --- networks -------------------------------------------------------------------------


def parts(h: jax.Array) -> jax.Array:
    """Real and imaginary parts of a complex state."""
    return jnp.concatenate([h.real, h.imag])


def seen(h: Any) -> jax.Array:
    """What the readout sees of leaky or of spiking units, of the size of one."""
    return LEAK * h["trace"] if isinstance(h, dict) else h


def reader(read: Callable[[Any], jax.Array], size: int) -> tuple[Callable, Callable]:
    """The loss in bits at the last step, and the readout's parameters.

    A target of -1 asks for nothing.
    """

    def loss(params: dict, h: Any, y: jax.Array) -> jax.Array:
        bits = -jax.nn.log_softmax(logits(params, read(h)))[jnp.maximum(y, 0)]
        return jnp.where(y >= 0, bits / jnp.log(2.0), 0.0)

    def init(key: jax.Array) -> dict:
        readout = jax.random.normal(key, (CLASSES, size)) / size**0.5
        return {"readout": readout, "offset": jnp.zeros(CLASSES)}

    return loss, init


def logits(params: dict, seen: jax.Array) -> jax.Array:
    """The readout, of what it sees."""
    return params["readout"] @ seen + params["offset"]


def recurrent(made: online.cells.ReadyCell, read: Callable, size: int) -> Network:
    """One layer of units and its readout."""
    loss, outside = reader(read, size)

    def init(key: jax.Array) -> dict:
        keys = jax.random.split(key)
        return {"cell": made.init(keys[0])} | outside(keys[1])

    return Network(made.cell, loss, init, made.h0)


def ring(units: int, inputs: int, length: int, where: str) -> online.cells.ReadyCell:
    """Linear recurrent units that remember from a tenth of an image to ten."""
    return online.cells.lru(
        units,
        inputs,
        r_min=1 - 10 / length,
        r_max=1 - 0.1 / length,
        max_phase=1.0,
        select=lambda p: p[where],
    )


def one_layer(units: int, length: int) -> Network:
    """Linear recurrent units."""
    return recurrent(ring(units, 1, length, "cell"), parts, 2 * units)


def two_layers(units: int, length: int) -> Network:
    """The same twice, with a matrix and a tanh between."""
    low, high = ring(units, 1, length, "low"), ring(units, PORTS, length, "high")
    loss, outside = reader(lambda h: parts(h[1]), 2 * units)
    between = lambda p, x, h: jnp.tanh(p["between"] @ parts(h))
    both = online.LayeredCell(cells=(low.cell, high.cell), between=(between,))

    def init(key: jax.Array) -> dict:
        keys = jax.random.split(key, 4)
        across = jax.random.normal(keys[2], (PORTS, 2 * units)) / units**0.5
        return {
            "low": low.init(keys[0]),
            "high": high.init(keys[1]),
            "between": across,
        } | outside(keys[3])

    return Network(both, loss, init, (low.h0, high.h0))


def leaky(units: int, length: int) -> Network:
    """Leaky units."""
    del length
    made = online.cells.leaky(units, 1, leak=0.2, select=lambda p: p["cell"])
    return recurrent(spread_out(made, 1.0), seen, units)


def spiking(units: int, length: int) -> Network:
    """Spiking units with adaptive thresholds and a leaky readout."""
    del length
    made = online.cells.lif(
        units,
        1,
        leak=0.3,
        adaptation=1.0,
        adaptation_leak=0.05,
        trace_leak=LEAK,
        select=lambda p: p["cell"],
    )
    return recurrent(spread_out(made, 2.0), seen, units)


def spread_out(made: online.cells.ReadyCell, gain: float) -> online.cells.ReadyCell:
    """With larger inputs and random biases: units that answer to different grays."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = made.init(key)
        biases = jax.random.uniform(
            jax.random.fold_in(key, 1), params["b"].shape, minval=-gain, maxval=gain
        )
        return params | {"U": gain * params["U"], "b": biases}

    return made._replace(init=init)


KINDS = {
    "lru": Kind("linear recurrent units", one_layer, RATES[1:]),
    "lru2": Kind("two layers of them", two_layers, RATES[1:]),
    "leaky": Kind("leaky units", leaky, RATES[:3]),
    "lif": Kind("spiking units", spiking, RATES[:3]),
}


# --- methods --------------------------------------------------------------------------


def random_feedback(cell: Any, loss: Callable) -> online.Estimator:
    """RFLO or e-prop with the error sent back through fixed random weights."""

    def feedback(params: dict, h: Any, y: jax.Array) -> Any:
        read, vjp = jax.vjp(seen, h)
        weights = jax.random.normal(jax.random.key(0), (read.size, CLASSES))
        error = jax.nn.softmax(logits(params, read)) - jax.nn.one_hot(y, CLASSES)
        error = jnp.where(y >= 0, error, 0.0) / jnp.log(2.0)
        return vjp(weights @ error / read.size**0.5)[0]

    return online.rflo(cell, loss, feedback=feedback)


WINDOW = 8  # of TBPTT: a row of the small images
WINDOWED = partial(online.bptt, truncation=WINDOW)
LINEAR, LOCAL = ("lru", "lru2"), ("leaky", "lif")
METHODS = {
    "diagonal": Method("Diagonal RTRL", Gradient(online.diagonal_rtrl), LINEAR),
    "rflo": Method("RFLO, e-prop", Gradient(online.rflo), LOCAL),
    "random": Method("RFLO, e-prop, random feedback", Gradient(random_feedback), LOCAL),
    "snap1": Method("SnAp-1", Gradient(online.snap1), ("leaky",)),
    "uoro": Method("UORO", Gradient(online.uoro), (*LINEAR, "leaky")),
    "tbptt": Method(f"TBPTT({WINDOW})", Gradient(WINDOWED, whole=True), LINEAR + LOCAL),
    "bptt": Method("BPTT", Gradient(online.bptt, whole=True), LINEAR + LOCAL),
}


@dataclasses.dataclass(frozen=True)
class OnlineDigits:
    """Digits pixel by pixel, online: exact, noisy, local and truncated gradients."""

    name: ClassVar[str] = "online-digits"

    dataset: Dataset = "digits"
    """digits (bundled with scikit-learn, 64 steps) or mnist (784 steps)."""
    kinds: Annotated[tuple[str, ...], OneOf(KINDS)] = tuple(KINDS)
    """Any of lru, lru2, leaky, lif."""
    methods: Annotated[tuple[str, ...], OneOf(METHODS)] = tuple(METHODS)
    """Any of diagonal, rflo, random, snap1, uoro, tbptt, bptt."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the split, weights, images and signs."""
    updates: Annotated[int, Within(POINT)] = 700
    """Updates of each run; rounded down to fifties."""
    units: Count = 32
    """Units of a layer."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Trains all, measures memory and time: JSON, figure, table."""
        custom = "" if self == OnlineDigits(fresh=self.fresh) else "-custom"
        options = {
            "dataset": self.dataset,
            "kinds": self.kinds,
            "methods": self.methods,
            "seeds": self.seeds,
            "updates": self.updates // POINT * POINT,
            "units": self.units,
        }
        checkpoints = Checkpoints("online-digits", options, self.fresh)
        arms = list(pairs(self.kinds, self.methods))
        found = {kind: {} for kind, _ in arms}
        for kind, name in arms:
            found[kind][name] = compare(kind, name, options, checkpoints)
        network = lambda kind: KINDS[kind].network(self.units, LENGTHS[0])
        programs = {
            f"{kind}/{name}": (METHODS[name].how, network(kind)) for kind, name in arms
        }
        for label, cost in costs(programs, LENGTHS, LENGTHS[0], 1).items():
            kind, name = label.split("/")
            found[kind][name] |= cost
        content = record(
            "digits pixel by pixel, online",
            "online-digits",
            options,
            window=WINDOW,
            kinds=found,
        )
        path = write_json(f"online-digits{custom}", content)
        checkpoints.clear()
        say(show(read_json(path.stem)))
        say(f"written: {path.name}, {draw(read_json(path.stem), path.stem).name}")


def pairs(
    kinds: tuple[str, ...], methods: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Kinds of units with the methods that suit them."""
    for kind in kinds:
        for name in methods:
            if kind in METHODS[name].kinds:
                yield kind, name


# --- learning -------------------------------------------------------------------------


portions = lambda length: Portions(EPISODES, POINT, 10 / length, together=EPISODES)


@cache
def program(kind: str, name: str, units: int, length: int) -> tuple[Callable, Network]:
    """The compiled updates of a method, and its network."""
    net = KINDS[kind].network(units, length)
    return episodes.program(METHODS[name].how, net, portions(length)), net


@cache
def accuracy(kind: str, units: int, length: int) -> Callable:
    """``accuracy(params, x, y)``, the share of images that are named rightly."""
    net = KINDS[kind].network(units, length)

    def right(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        last, _ = jax.lax.scan(lambda h, x: (net.cell(params, x, h), None), net.h0, x)
        # The answer is the target that would have cost the fewest bits.
        bits = jax.vmap(lambda y: net.loss(params, last, y))(jnp.arange(CLASSES))
        return jnp.argmin(bits) == y

    return jax.jit(lambda *args: jnp.mean(jax.vmap(right, (None, 0, 0))(*args)))


def learn(
    kind: str,
    name: str,
    rate: float,
    seed: int,
    options: dict[str, Any],
    checkpoints: Checkpoints,
) -> list[float | None]:
    """The test accuracy of one run after every fifty updates; resumable."""
    task = sequences.digits(options["dataset"], seed)
    length = task.test[0].shape[1]
    test = accuracy(kind, options["units"], length)

    def draw(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, y = task.batch(keys[0, 0], keys.size)
        asked = jnp.full((len(y), length), -1).at[:, -1].set(y)
        return x.reshape(*keys.shape, length, 1), asked.reshape(*keys.shape, length)

    def measure(params: dict, losses: jax.Array) -> jax.Array:
        finite = jnp.isfinite(losses[-1])  # else the run has diverged
        return jnp.where(finite, test(params, *task.test), jnp.nan)

    return episodes.learn(
        f"{kind}-{name}-{rate:g}-{seed}",
        *program(kind, name, options["units"], length),
        portions(length),
        Lesson(draw, measure),
        rate,
        seed,
        options["updates"] // POINT,
        checkpoints,
    )


def end(curve: list[float | None]) -> float:
    """Accuracy over the last tenth of the points; zero if the run diverged."""
    last = curve[-max(1, len(curve) // 10) :]
    return 0.0 if None in last else float(np.mean(last))


def compare(
    kind: str, name: str, options: dict[str, Any], checkpoints: Checkpoints
) -> dict[str, Any]:
    """The curves of one method, all seeds, at the best rate of the pilots."""
    run = partial(learn, kind, name, options=options, checkpoints=checkpoints)
    pilots = {rate: end(run(rate, TUNING)) for rate in KINDS[kind].rates}
    rate = max(pilots, key=pilots.__getitem__)
    curves = [run(rate, seed) for seed in options["seeds"]]
    shown = np.round([end(curve) for curve in curves], 3)
    title = f"{KINDS[kind].title}, {METHODS[name].title}"
    say(f"{title:<50} rate {rate:g}, accuracy {shown}")
    tried = {f"{rate:g}": found for rate, found in pilots.items()}
    return {"rate": rate, "pilot_accuracy": tried, "accuracy": curves}


# --- table and figure -----------------------------------------------------------------


def show(result: dict[str, Any]) -> str:
    """The ends of all curves, memory and time."""
    rows = []
    for kind, methods in result["kinds"].items():
        for name, m in methods.items():
            ends = [100 * end(curve) for curve in m["accuracy"]]
            row = {
                "units": KINDS[kind].title,
                "method": METHODS[name].title,
                "rate": f"{m['rate']:g}",
                "accuracy, %": percent(ends),
                "µs a step": f"{1e6 * m['seconds_a_step']['median']:.1f}",
            }
            for length, size in m["bytes"].items():
                row[f"kB, T={length}"] = f"{size / 1e3:.0f}"
            rows.append(row)
    return table(rows)


def percent(ends: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {np.std(ends, ddof=1):.1f}" if len(ends) > 1 else ""
    return f"{np.mean(ends):.1f}{spread}"


def draw(result: dict[str, Any], name: str) -> Path:
    """Accuracy against updates, a panel for each kind of units."""
    kinds = result["kinds"]
    fig, axes = figure(3 * len(kinds), 3.4, ncols=len(kinds), sharey=True)
    panels = dict(zip(kinds, np.atleast_1d(axes), strict=True))
    for kind, methods in kinds.items():
        for method, m in methods.items():
            title, ax = METHODS[method].title, panels[kind]
            found = 100 * np.array(m["accuracy"], float)  # None is NaN
            x = POINT * (np.arange(found.shape[1]) + 1)
            # Broad, since another curve lies on it.
            below = {"lw": 4, "alpha": 0.4, "zorder": 1} if method == "bptt" else {}
            ax.plot(x, found.mean(0), label=title, **look(title) | below)
            low, high = found.min(0), found.max(0)
            ax.fill_between(x, low, high, color=look(title)["color"], alpha=0.12)
        panels[kind].set(title=KINDS[kind].title, xlabel="updates", ylim=(0, 100))
    next(iter(panels.values())).set_ylabel("test accuracy, %")
    legend(fig, *panels.values(), ncols=4)
    seeds, units = len(result["options"]["seeds"]), result["options"]["units"]
    fig.suptitle(
        f"Digits pixel by pixel, {units} units a layer, mean and range of {seeds} seeds"
    )
    return save_figure(fig, name)
