"""Step sizes and momenta of every tensor, through 100 steps of training.

The set-up of Liao et al. 2018, section 5.3, in the configuration of the public code: a
tanh network with three layers of 50 units, weights and biases N(0, 1)·e⁻³, one step
size exp(a) and one momentum sigmoid(b) for each of its eight tensors,

    v ← βv - (1 - β)∇loss,    w ← w + αv,    (100 steps from the same start)

and Adam on a and b with the *training* loss at the end as outer loss.

This is no fixed point, and the implicit gradient of step size and momentum at one is
exactly zero. What RBP's rules give here is an estimate for an unfinished path, of which
only BPTT has the gradient; they are measured against it. Departure from the code, whose
batches differ from step to step: every step sees all training images, so that all
methods differentiate the same autonomous F.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

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
    temporary_bytes,
)
from benchmarks.hyperopt.part import Part
from rbpjax import RBP, CGNormal, FixedPointIteration, Neumann

TITLE = "The paper's set-up, step sizes and momenta through 100 steps (no fixed point)"
NOTE = (
    "An estimate for an unfinished path, whose gradient only BPTT has (at a fixed "
    "point these hypergradients are exactly zero); every step sees all training "
    "images, so that all methods differentiate one autonomous map. Residuals are "
    "medians at the end."
)
X64 = False
STEPS = 100  # of Adam
RATE = 0.05  # a tenth from the 50th step on
UNITS = (50, 50, 50)
SIZES = {"digits": (200,), "mnist": (9000,)}  # training images; the others are tested
NUM_STEPS = 100
TRUNCATION = 50

Layers = list[dict[str, jax.Array]]
Given = dict[str, Any]


def implicit(f: Callable, rule: rbpjax.BackwardRule) -> Callable:
    """RBP at the last state, as if it were a fixed point."""
    forward = FixedPointIteration(steps=NUM_STEPS)
    return rbpjax.rbp_solve(f, forward=forward, backward=rule)


METHODS: dict[str, Callable[[Callable], Callable]] = {
    "BPTT": lambda f: rbpjax.bptt(f, NUM_STEPS),
    "TBPTT": lambda f: rbpjax.bptt(f, NUM_STEPS, truncation=TRUNCATION),
    "RBP, uniform start": lambda f: implicit(
        f, RBP(FixedPointIteration(steps=TRUNCATION), seed=1234)
    ),
    "CG-RBP": lambda f: implicit(f, CGNormal(max_steps=TRUNCATION)),
    "Neumann-RBP": lambda f: implicit(f, Neumann(steps=TRUNCATION)),
}


def network(key: jax.Array, pixels: int) -> Layers:
    """Weights and biases N(0, 1)·e⁻³."""
    widths = (pixels, *UNITS, 10)
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        w, c = jax.random.split(jax.random.fold_in(key, i))
        draw = lambda k, *shape: jax.random.normal(k, shape) * np.exp(-3)
        layers.append({"weights": draw(w, a, b), "bias": draw(c, b)})
    return layers


def logits(layers: Layers, x: jax.Array) -> jax.Array:
    """The tanh network."""
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["weights"] + layer["bias"])
    return x @ layers[-1]["weights"] + layers[-1]["bias"]


def inner_loss(params: Any, given: Given, layers: Layers) -> jax.Array:
    """Mean cross-entropy on the training images."""
    x, y = given["train"]
    return cross_entropy(logits(layers, x), y).mean()


def momentum(params: dict[str, Layers]) -> optax.GradientTransformation:
    """A step size and a momentum for each tensor; the state is the velocity."""
    alpha = jax.tree.map(jnp.exp, params["step_size"])
    beta = jax.tree.map(jax.nn.sigmoid, params["momentum"])

    def update(grads: Layers, v: Layers, _: Any = None) -> tuple[Layers, Layers]:
        mix = lambda beta, v, g: beta * v - (1 - beta) * g
        v = jax.tree.map(mix, beta, v, grads)
        return jax.tree.map(jnp.multiply, alpha, v), v

    zeros = lambda layers: jax.tree.map(jnp.zeros_like, layers)
    return optax.GradientTransformation(zeros, update)


STEP = rbpjax.optimizer_step(inner_loss, momentum)


def outer(method: str) -> Callable:
    """The training loss at the end, with what else is measured there."""
    solve = METHODS[method](STEP)

    def loss(params: Any, given: Given, h: Any, probe: Any = None) -> Any:
        solution = solve(params, given, h, probe=probe)
        layers = solution.value[0]
        x, y = given["test"]
        measures = {"test_accuracy": accuracy(logits(layers, x), y)}
        return inner_loss(params, given, layers), (solution, measures)

    return loss


def make(dataset: str, seed: int) -> Given:
    """The images of one seed."""
    train, test = images(dataset, seed, SIZES[dataset], unit=False)
    return jax.tree.map(jnp.asarray, {"train": train, "test": test})


def start(given: Given, seed: int) -> tuple[dict[str, Layers], Any]:
    """Step sizes e⁻¹, momenta 1/2; the network at rest."""
    draw = jax.jit(partial(network, pixels=given["train"][0].shape[1]))
    layers = draw(jax.random.key(seed))
    constant = lambda c: jax.tree.map(lambda w: jnp.array(c, w.dtype), layers)
    params = {"step_size": constant(-1.0), "momentum": constant(0.0)}
    return params, (layers, momentum(params).init(layers))


def measure(
    dataset: str, seeds: tuple[int, ...], num_steps: int, checkpoints: Checkpoints
) -> dict[str, Any]:
    """All methods on all seeds."""
    problems = {seed: make(dataset, seed) for seed in seeds}
    given = problems[seeds[0]]
    adam = optax.adam(optax.piecewise_constant_schedule(RATE, {50: 0.1}))
    result: dict[str, Any] = {
        "sizes": [len(part[1]) for part in given.values()],
        "num_steps": NUM_STEPS,
        "truncation": TRUNCATION,
        "methods": {},
    }
    starts = {seed: start(problem, seed) for seed, problem in problems.items()}
    params, h = starts[seeds[0]]
    calls = {}
    estimates: dict[str, Callable] = {}
    for method in METHODS:  # BPTT is the first
        # Every meta-step trains from the start again.
        descent = Descent(outer(method), adam, warm=False)
        estimate = jax.jit(descent.gradient).lower(params, given, h).compile()
        estimates[method] = estimate
        histories, seconds, cosines = [], [], {"start": [], "end": []}
        for seed, problem in problems.items():
            first, h0 = starts[seed]
            last, history, spent = descent.run(
                f"{method} {seed}", problem, first, h0, num_steps, checkpoints
            )
            histories.append(history)
            seconds.append(spent)
            for point, at in (("start", first), ("end", last)):
                got, exact = (
                    estimates[m](at, problem, h0)[1] for m in (method, "BPTT")
                )
                cosines[point].append(cosine(got, exact))
        calls[method] = partial(estimate, params, given, h)
        result["methods"][method] = {
            **summarize(collect(histories)),
            "seconds": seconds,
            "cosine": cosines,
            "temporary_bytes": temporary_bytes(estimate),
        }
    for method, times in interleaved_times(calls, 10).items():
        result["methods"][method]["step_seconds"] = spread(times)
    return result


DRAWN = ("outer_loss", "forward_residual", "adjoint_residual")


def summarize(histories: dict[str, Any]) -> dict[str, Any]:
    """Measures ``[seed, step]`` as every seed's last, and median and range by step.

    Of what is finite; a step with nothing finite has NaN.
    """
    arrays = {k: np.array(v, float) for k, v in histories.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of all-NaN columns
        ranges = {
            key: {
                "median": np.nanmedian(arrays[key], 0),
                "least": np.nanmin(arrays[key], 0),
                "most": np.nanmax(arrays[key], 0),
            }
            for key in DRAWN
        }
    return {"end": {k: v[:, -1] for k, v in arrays.items()}, "history": ranges}


def cosine(a: Any, b: Any) -> float:
    """Of two pytrees of scalars."""
    a, b = (np.array(jax.tree.leaves(t), float) for t in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# --- what a person looks at ----------------------------------------------------------


def shown(values: Any, digits: int = 3) -> str:
    """Mean ± standard deviation of what is finite, and how much is not."""
    values = np.array(values, float)
    finite = values[np.isfinite(values)]
    lost = len(values) - len(finite)
    text = mean_std(finite, digits) if len(finite) else "–"
    return text + (f" ({lost} diverged)" if lost else "")


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a method; residuals are medians at the end."""
    made = []
    base = result["methods"]["BPTT"]["step_seconds"]["median"]
    for method, m in result["methods"].items():
        end = {k: np.array(v, float) for k, v in m["end"].items()}
        adjoint = np.median(end["adjoint_residual"])
        seconds = m["step_seconds"]["median"]
        made.append(
            {
                "method": method,
                "training loss": shown(end["outer_loss"]),
                "test accuracy": shown(end["test_accuracy"]),
                "cosine with BPTT, start": shown(m["cosine"]["start"]),
                "end": shown(m["cosine"]["end"]),
                "forward residual": f"{np.median(end['forward_residual']):.1g}",
                "adjoint residual": f"{adjoint:.1g}" if np.isfinite(adjoint) else "–",
                "meta-step": f"{1e3 * seconds:.0f} ms ({seconds / base:.2f}×)",
                "memory": f"{m['temporary_bytes'] / 1e6:.2f} MB",
            }
        )
    return made


def draw(result: dict[str, Any], name: str) -> Any:
    """Training loss and residuals against meta-steps."""
    panels = {
        "outer_loss": f"training loss after {result['num_steps']} steps",
        "forward_residual": "forward residual",
        "adjoint_residual": "adjoint residual",
    }
    fig, axes = figure(10.5, 3.2, ncols=3)
    for ax, (key, title) in zip(axes, panels.items(), strict=True):
        for method, m in result["methods"].items():
            values = {k: np.array(v, float) for k, v in m["history"][key].items()}
            if not np.isfinite(values["median"]).any():
                continue  # BPTT solves no adjoint
            style = look(method)
            ax.semilogy(values["median"], label=method, **style)
            steps = range(len(values["least"]))
            ax.fill_between(
                steps, values["least"], values["most"], color=style["color"], alpha=0.08
            )
        ax.set(title=title, xlabel="meta-steps")
    legend(fig, *axes)
    seeds = len(result["options"]["seeds"])
    fig.suptitle(
        f"Step sizes and momenta, {result['options']['dataset']}: median and range of "
        f"{seeds} seeds"
    )
    return save_figure(fig, name)


PART = Part(TITLE, NOTE, X64, STEPS, measure, rows, draw)
