"""Weight decay of layers, by hypergradients of the validation loss.

Inner: multinomial logistic regression on three layers side by side (pixels, 200 inputs
of pure noise, bias), each with a weight decay of its own, exp(log decay) ‖w‖² / 2, on
200 images. It is strongly convex, so that training has one fixed point and reaches it.
(Layers on top of each other have, with decay, minima that are nearly flat in many
directions, where training takes very long to come to rest.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rbpjax
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.measurement import interleaved_times, spread
from benchmarks.harness.tables import mean_std
from benchmarks.hyperopt.descent import (
    Descent,
    accuracy,
    collect,
    cross_entropy,
    images,
    paired,
    temporary_bytes,
)
from benchmarks.hyperopt.part import Part
from rbpjax import Adaptive, FixedPointIteration, Neumann

SIZES = (200, 400)  # training, validation
NOISE = 200  # inputs
STEPS = 40
RATE = 0.2
START = 1e-2  # of all decays
MOMENTUM = 0.9
TOL = 1e-8
TITLE = "A weight decay for each of three layers, of which one sees pure noise"
NOTE = "Residuals are the largest of the run."
X64 = True
GRID = np.geomspace(1e-4, 1e-1, 13)  # common decays, for comparison
RULES = {
    "Adaptive": Adaptive(tol=TOL),
    "Neumann(50)": Neumann(steps=50),
    "one step, Neumann(0)": Neumann(steps=0),
}
LAYERS = ("pixels", "noise", "bias")
Weights = dict[str, jax.Array]


class Decay(NamedTuple):
    """The data of one seed: inputs of each layer, and labels."""

    train: tuple[Weights, jax.Array]
    validation: tuple[Weights, jax.Array]
    test: tuple[Weights, jax.Array]
    curvature: jax.Array  # a bound for the loss without decay


def make(dataset: str, seed: int) -> Decay:
    """Splits, noise, and the curvature that the step size needs."""
    random = np.random.default_rng([seed, 2])

    def layers(x: np.ndarray) -> dict[str, np.ndarray]:
        noise = random.normal(size=(len(x), NOISE)) / NOISE**0.5
        return dict(zip(LAYERS, (x, noise, np.full((len(x), 1), 0.3)), strict=True))

    train, *rest = [(layers(x), y) for x, y in images(dataset, seed, SIZES)]
    inputs = np.concatenate(list(train[0].values()), 1)
    bound = 0.5 * np.linalg.norm(inputs, 2) ** 2 / len(inputs)
    real = lambda v: jnp.asarray(v, float if v.dtype.kind == "f" else None)
    return jax.tree.map(real, Decay(train, *rest, curvature=np.asarray(bound)))


def logits(inputs: Weights, w: Weights) -> jax.Array:
    """The sum of the layers."""
    return sum(inputs[k] @ w[k] for k in LAYERS)


def inner_loss(log_decay: Weights, given: Decay, w: Weights) -> jax.Array:
    """Cross-entropy and the decay of each layer."""
    x, y = given.train
    decay = sum(jnp.exp(log_decay[k]) * jnp.sum(w[k] ** 2) for k in LAYERS)
    return cross_entropy(logits(x, w), y).mean() + 0.5 * decay


def heavy_ball(given: Decay, log_decay: Weights) -> optax.GradientTransformation:
    """Stable (below 2 (1 + momentum) / curvature) whatever the decays become.

    That the step size depends on them changes no hypergradient: it does not move the
    fixed point.
    """
    decay = jnp.exp(jnp.stack(list(log_decay.values()))).max()
    return optax.sgd(2 / (given.curvature + decay), MOMENTUM)


def outer(rule: rbpjax.BackwardRule) -> Callable:
    """The validation loss, with what else is measured at the solution."""

    def loss(log_decay: Weights, given: Decay, h: Any, probe: Any = None) -> Any:
        f = rbpjax.optimizer_step(inner_loss, partial(heavy_ball, given))
        forward = FixedPointIteration(max_steps=20_000, tol=TOL)
        solve = rbpjax.rbp_solve(f, forward=forward, backward=rule)
        solution = solve(log_decay, given, h, probe=probe)
        of = lambda part: (logits(part[0], solution.value[0]), part[1])
        measures = {
            "test_loss": cross_entropy(*of(given.test)).mean(),
            "test_accuracy": accuracy(*of(given.test)),
        } | {f"log_decay_{k}": log_decay[k] for k in LAYERS}
        value = cross_entropy(*of(given.validation)).mean()
        return value, (solution, measures)

    return loss


def start(given: Decay, decay: float = START) -> tuple[Weights, Any]:
    """The same decay for all layers, and an untrained classifier at rest."""
    w = {k: jnp.zeros((x.shape[1], 10)) for k, x in given.train[0].items()}
    log_decay = {k: jnp.log(jnp.asarray(decay, float)) for k in LAYERS}
    return log_decay, (w, heavy_ball(given, log_decay).init(w))


def measure(
    dataset: str, seeds: tuple[int, ...], num_steps: int, checkpoints: Checkpoints
) -> dict[str, Any]:
    """All rules on all seeds, and the grid of common decays."""
    problems = {seed: make(dataset, seed) for seed in seeds}
    first = problems[seeds[0]]
    result: dict[str, Any] = {
        "sizes": [*SIZES, len(first.test[1])],
        "start": START,
        "grid": grid(problems),
        "rules": {},
    }
    calls = {}
    for rule in RULES:
        descent = Descent(outer(RULES[rule]), optax.adam(RATE))
        histories, seconds = [], []
        for seed, given in problems.items():
            _, history, spent = descent.run(
                f"{rule} {seed}", given, *start(given), num_steps, checkpoints
            )
            histories.append(history)
            seconds.append(spent)
        at = start(first)[0], first, start(first)[1]
        gradient = jax.jit(descent.gradient).lower(*at).compile()
        calls[rule] = partial(gradient, *at)
        result["rules"][rule] = {
            "history": collect(histories),
            "seconds": seconds,
            "temporary_bytes": temporary_bytes(gradient),
        }
    for rule, times in interleaved_times(calls, 5).items():
        result["rules"][rule]["cold_seconds"] = spread(times)
    return result


def grid(problems: dict[int, Decay]) -> dict[str, Any]:
    """One decay for all layers: losses ``[seed, decay]``."""

    @jax.jit
    def train(log_decay: Weights, given: Decay) -> dict[str, jax.Array]:
        value, (_, m) = outer(Neumann(steps=0))(log_decay, given, start(given)[1])
        return {"outer_loss": value} | {k: m[k] for k in ("test_loss", "test_accuracy")}

    runs = [[train(start(g, d)[0], g) for d in GRID] for g in problems.values()]
    names = runs[0][0]
    return {"decay": GRID} | {
        k: [[float(r[k]) for r in s] for s in runs] for k in names
    }


# --- what a person looks at ----------------------------------------------------------


def best_common(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """By seed, at the common decay with the least validation loss."""
    grid = {k: np.array(v, float) for k, v in result["grid"].items()}
    best = grid["outer_loss"].argmin(1)
    seeds = np.arange(len(best))
    names = ("outer_loss", "test_loss", "test_accuracy")
    return {k: grid[k][seeds, best] for k in names} | {"decay": grid["decay"][best]}


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Before, the best common decay, and a row a rule; residuals are the largest."""
    histories = {
        rule: {k: np.array(v, float) for k, v in r["history"].items()}
        for rule, r in result["rules"].items()
    }
    before = {k: v[:, 0] for k, v in next(iter(histories.values())).items()}
    cells = lambda name, m: {
        "decays by": name,
        "validation loss": mean_std(m["outer_loss"]),
        "test loss": mean_std(m["test_loss"]),
        "test accuracy": mean_std(m["test_accuracy"]),
    }
    rest = ("forward residual", "adjoint residual", "outer step", "memory")
    none = dict.fromkeys(rest, "–")
    made = [
        cells(f"start, all {result['start']:g}", before) | none,
        cells(f"best common of {len(result['grid']['decay'])}", best_common(result))
        | none,
    ]
    for rule, h in histories.items():
        r = result["rules"][rule]
        seen = (
            f"{h['forward_residual'].max():.1g}",
            f"{h['adjoint_residual'].max():.1g}",
            f"{1e3 * np.median(r['seconds']):.0f} ms",
            f"{r['temporary_bytes'] / 1e6:.2f} MB",
        )
        end = {k: v[:, -1] for k, v in h.items()}
        made.append(cells(rule, end) | dict(zip(rest, seen, strict=True)))
    return made


def differences(result: dict[str, Any]) -> str:
    """Everything minus the default, paired over seeds."""
    ends = {
        rule: {k: np.array(v, float)[:, -1] for k, v in r["history"].items()}
        for rule, r in result["rules"].items()
    }
    base = ends.pop("Adaptive")
    lines = []
    for name, end in ({"best common decay": best_common(result)} | ends).items():
        parts = []
        for key in ("outer_loss", "test_loss", "test_accuracy"):
            mean, error = paired(end[key], base[key])
            title = key.replace("outer", "validation").replace("_", " ")
            parts.append(f"{title} {mean:+.2g} ± {error:.1g}")
        lines.append(f"{name} minus Adaptive: {', '.join(parts)}")
    return "; ".join(lines) + " (mean paired difference ± standard error)."


def draw(result: dict[str, Any], name: str) -> Any:
    """Losses by rule, and where the decays go."""
    fig, axes = figure(10.5, 3.2, ncols=3)
    # In the last panel the line tells the layer, the color the rule.
    marks = dict(zip(LAYERS, ("-", "--", ":"), strict=True))
    for i, (rule, r) in enumerate(result["rules"].items()):
        style = look(rule)
        h = {k: np.array(v, float) for k, v in r["history"].items()}
        steps = np.arange(h["outer_loss"].shape[1])
        for ax, key in zip(axes, ("outer_loss", "test_loss"), strict=False):
            ax.plot(steps, h[key].mean(0), label=rule, **style)
            low, high = h[key].min(0), h[key].max(0)
            ax.fill_between(steps, low, high, color=style["color"], alpha=0.1)
        for layer in LAYERS:
            decay = np.exp(h[f"log_decay_{layer}"].mean(0))
            axes[2].semilogy(steps, decay, marks[layer], color=style["color"])
            if i == 0:
                axes[2].plot([], [], marks[layer], color="k", label=layer)
    for ax, key in zip(axes, ("outer_loss", "test_loss"), strict=False):
        best = best_common(result)[key].mean()
        ax.axhline(best, color="k", lw=0.9, ls=":", label="best common decay")
        ax.set(title=key.replace("outer", "validation").replace("_", " "))
    legend(fig, *axes, ncols=7)
    axes[2].set(title="decay of each layer (geometric mean)")
    for ax in axes:
        ax.set_xlabel("outer steps")
    seeds = len(result["options"]["seeds"])
    fig.suptitle(f"A weight decay for each layer: mean and range over {seeds} seeds")
    return save_figure(fig, name)


PART = Part(TITLE, NOTE, X64, STEPS, measure, rows, draw, differences)
