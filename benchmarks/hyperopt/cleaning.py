"""Data cleaning: a weight for every training example, half of the labels wrong.

The inner problem is multinomial logistic regression with a weight sigmoid(a) on the
loss of each example and a ridge: strongly convex, with one minimum, which gradient
descent with momentum is iterated to. The weights move that minimum, so that the
hypergradient at it is not zero, and the loss on a small set of images with the right
labels tells examples apart.
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

SIZES = {"digits": (1000, 400), "mnist": (2000, 1000)}  # training, validation
STEPS = 50  # of Adam, on the weights
RATE = 0.1
RIDGE = 1e-3
MOMENTUM = 0.9
TOL = 1e-8  # of the inner solve, and of the default rule
TITLE = "Data cleaning, a weight for every example, half of the labels wrong"
NOTE = (
    "Training to its fixed point, Adam on the weights. Residuals are the largest of "
    "the run; the cosine is that of the hypergradient with a dense solve, before "
    "and after (first seed)."
)
X64 = True
RULES = {
    "Adaptive": Adaptive(tol=TOL),
    "Neumann(50)": Neumann(steps=50),
    "one step, Neumann(0)": Neumann(steps=0),
}


class Cleaning(NamedTuple):
    """The data of one seed; a pytree of arrays."""

    x: jax.Array
    y: jax.Array  # half of them wrong
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    wrong: jax.Array
    rate: jax.Array


def make(dataset: str, seed: int) -> Cleaning:
    """Splits, wrong labels (uniform over the others) and the inner step size."""
    (x, y), validation, test = (
        (np.append(x, np.full((len(x), 1), 0.3, x.dtype), 1), y)  # a bias
        for x, y in images(dataset, seed, SIZES[dataset])
    )
    random = np.random.default_rng([seed, 1])
    wrong = random.permutation(len(x)) < len(x) // 2
    y = np.where(wrong, (y + random.integers(1, 10, len(x))) % 10, y)
    # Softmax's Hessian is at most 1/2, an example's weight at most 1. Heavy ball is
    # stable for this quadratic up to 2 (1 + momentum) = 3.8 of its inverse.
    bound = 0.5 * np.linalg.norm(x, 2) ** 2 / len(x) + RIDGE
    rate = np.asarray(2 / bound)
    given = Cleaning(x, y, validation, test, wrong, rate)
    real = lambda v: jnp.asarray(v, float if v.dtype.kind == "f" else None)
    return jax.tree.map(real, given)


def inner_loss(a: jax.Array, given: Cleaning, w: jax.Array) -> jax.Array:
    """Weighted cross-entropy with a ridge."""
    losses = cross_entropy(given.x @ w, given.y)
    return jnp.mean(jax.nn.sigmoid(a) * losses) + 0.5 * RIDGE * jnp.sum(w**2)


def solver(given: Cleaning, rule: rbpjax.BackwardRule) -> Callable:
    """Training to the fixed point, differentiable in the weights of the examples."""
    momentum = lambda a: optax.sgd(given.rate, MOMENTUM)
    f = rbpjax.optimizer_step(inner_loss, momentum)
    forward = FixedPointIteration(max_steps=5000, tol=TOL)
    return rbpjax.rbp_solve(f, forward=forward, backward=rule)


def outer(rule: rbpjax.BackwardRule) -> Callable:
    """The validation loss, with what else is measured at the solution."""

    def loss(a: jax.Array, given: Cleaning, h: Any, probe: Any = None) -> Any:
        solution = solver(given, rule)(a, given, h, probe=probe)
        w = solution.value[0]
        logits, labels = given.test[0] @ w, given.test[1]
        measures = {
            "test_loss": cross_entropy(logits, labels).mean(),
            "test_accuracy": accuracy(logits, labels),
            "auc": auc(a, given.wrong),
        }
        value = cross_entropy(given.validation[0] @ w, given.validation[1]).mean()
        return value, (solution, measures)

    return loss


def auc(score: jax.Array, wrong: jax.Array) -> jax.Array:
    """How often a right example has the larger score than a wrong one; ties half."""
    larger = score[:, None] > score[None]
    wins = larger + 0.5 * (score[:, None] == score[None])
    pairs = ~wrong[:, None] & wrong[None]
    return jnp.sum(wins * pairs) / jnp.sum(pairs)


def start(given: Cleaning) -> tuple[jax.Array, Any]:
    """Equal weights of 1/2, and an untrained classifier at rest."""
    w = jnp.zeros((given.x.shape[1], 10))
    return jnp.zeros(len(given.x)), (w, optax.sgd(given.rate, MOMENTUM).init(w))


def measure(
    dataset: str, seeds: tuple[int, ...], num_steps: int, checkpoints: Checkpoints
) -> dict[str, Any]:
    """All rules on all seeds."""
    problems = {seed: make(dataset, seed) for seed in seeds}
    first = problems[seeds[0]]
    descents = {rule: Descent(outer(RULES[rule]), optax.adam(RATE)) for rule in RULES}
    result: dict[str, Any] = {
        "sizes": [len(first.x), len(first.validation[1]), len(first.test[1])],
        "ridge": RIDGE,
        "references": references(problems),
        "rules": {},
    }
    at = start(first)[0], first, start(first)[1]
    gradients, ends = {}, {}
    for rule, descent in descents.items():
        histories, seconds, weights = [], [], []
        for seed, given in problems.items():
            a, history, spent = descent.run(
                f"{rule} {seed}", given, *start(given), num_steps, checkpoints
            )
            histories.append(history)
            seconds.append(spent)
            weights.append(np.asarray(jax.nn.sigmoid(a)))
        ends[rule] = jnp.log(weights[0] / (1 - weights[0]))
        gradients[rule] = jax.jit(descent.gradient).lower(*at).compile()
        result["rules"][rule] = {
            "history": collect(histories),
            "seconds": seconds,
            "temporary_bytes": temporary_bytes(gradients[rule]),
        }
        if rule == "Adaptive":
            bins = np.linspace(0, 1, 41)
            count = lambda keep, w=weights, bins=bins: sum(
                np.histogram(w_[np.asarray(p.wrong) == keep], bins)[0]
                for w_, p in zip(w, problems.values(), strict=True)
            )
            result["weights"] = {"right": count(False), "wrong": count(True)}
    calls = {rule: partial(gradient, *at) for rule, gradient in gradients.items()}
    for rule, times in interleaved_times(calls, 5).items():
        result["rules"][rule]["cold_seconds"] = spread(times)
    if dataset == "digits":  # 650 weights: a dense Hessian
        points = {"start": start(first)[0], "end": ends["Adaptive"]}
        exact = {point: dense(a, first) for point, a in points.items()}
        for rule in RULES:
            result["rules"][rule]["hypergradient"] = {
                point: check(gradients[rule](a, *at[1:])[1], exact[point])
                for point, a in points.items()
            }
    return result


def references(problems: dict[int, Cleaning]) -> dict[str, dict[str, list[float]]]:
    """What needs no cleaning: by seed, of classifiers trained on other examples."""

    @jax.jit
    def train(a: jax.Array, given: Cleaning) -> dict[str, jax.Array]:
        value, (_, measures) = outer(Neumann(steps=0))(a, given, start(given)[1])
        return {"outer_loss": value} | measures

    def of(change: Callable[[Cleaning], tuple[jax.Array, Cleaning]]) -> dict:
        rows = [train(*change(given)) for given in problems.values()]
        return {k: [float(r[k]) for r in rows] for k in rows[0] if k != "auc"}

    large = 20.0  # sigmoid: 1, and 0 to rounding
    only_right = lambda g: (jnp.where(g.wrong, -large, large), g)

    def only_validation(given: Cleaning) -> tuple[jax.Array, Cleaning]:
        x, y = given.validation
        wrong = jnp.zeros(len(y), bool)
        return jnp.full(len(y), large), given._replace(x=x, y=y, wrong=wrong)

    return {
        "all labels, equal weights": of(lambda g: (start(g)[0], g)),
        "the right labels alone": of(only_right),
        "the validation images alone": of(only_validation),
    }


def check(got: jax.Array, exact: np.ndarray) -> dict[str, float]:
    """A hypergradient against the exact one."""
    got, size = np.asarray(got), np.linalg.norm(exact)
    return {
        "error": float(np.linalg.norm(got - exact) / size),
        "cosine": float(got @ exact / size / np.linalg.norm(got)),
    }


def dense(a: jax.Array, given: Cleaning) -> np.ndarray:
    """-∂²loss/∂a∂w · H⁻¹ ∇validation, by dense solves at the minimum."""
    w = jax.jit(solver(given, Neumann(steps=0)))(a, given, start(given)[1]).value[0]
    loss = lambda a, w: inner_loss(a, given, w.reshape(-1, 10))

    x, y = given.validation
    validation = lambda w: cross_entropy(x @ w.reshape(-1, 10), y).mean()

    @jax.jit
    def hypergradient(w: jax.Array) -> jax.Array:
        def newton(_: Any, w: jax.Array) -> jax.Array:
            hessian = jax.hessian(loss, 1)(a, w)
            return w - jnp.linalg.solve(hessian, jax.grad(loss, 1)(a, w))

        w = jax.lax.fori_loop(0, 2, newton, w)
        hessian = jax.hessian(loss, 1)(a, w)
        u = jnp.linalg.solve(hessian, jax.grad(validation)(w))
        return -jax.grad(lambda a: jax.grad(loss, 1)(a, w) @ u)(a)

    return np.asarray(hypergradient(jnp.ravel(w)))


# --- what a person looks at ----------------------------------------------------------


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a reference and a rule, at the end; residuals are the largest of all."""
    made = []
    for name, r in result["references"].items():
        made.append(
            {
                "example weights by": name,
                "validation loss": mean_std(r["outer_loss"]),
                "test loss": mean_std(r["test_loss"]),
                "test accuracy": mean_std(r["test_accuracy"]),
            }
            | dict.fromkeys(
                ("AUC (least)", "forward residual", "adjoint residual", "cosine"), "–"
            )
            | {"outer step": "–", "memory": "–"}
        )
    for name, r in result["rules"].items():
        end = {k: np.array(v, float)[:, -1] for k, v in r["history"].items()}
        whole = {k: np.array(v, float).max() for k, v in r["history"].items()}
        cosine = r.get("hypergradient")
        made.append(
            {
                "example weights by": name,
                "validation loss": mean_std(end["outer_loss"]),
                "test loss": mean_std(end["test_loss"]),
                "test accuracy": mean_std(end["test_accuracy"]),
                "AUC (least)": f"{mean_std(end['auc'])} ({end['auc'].min():.3f})",
                "forward residual": f"{whole['forward_residual']:.1g}",
                "adjoint residual": f"{whole['adjoint_residual']:.1g}",
                "cosine": ", ".join(f"{c['cosine']:.4f}" for c in cosine.values())
                if cosine
                else "–",
                "outer step": f"{1e3 * np.median(r['seconds']):.0f} ms",
                "memory": f"{r['temporary_bytes'] / 1e6:.2f} MB",
            }
        )
    return made


def differences(result: dict[str, Any]) -> str:
    """The other rules minus the default, paired over seeds."""
    ends = {
        rule: {k: np.array(v, float)[:, -1] for k, v in r["history"].items()}
        for rule, r in result["rules"].items()
    }
    base = ends.pop("Adaptive")
    names = {
        "outer_loss": "validation loss",
        "test_loss": "test loss",
        "test_accuracy": "test accuracy",
        "auc": "AUC",
    }
    lines = []
    for rule, end in ends.items():
        parts = []
        for key, name in names.items():
            mean, error = paired(end[key], base[key])
            parts.append(f"{name} {mean:+.2g} ± {error:.1g}")
        lines.append(f"{rule} minus Adaptive: {', '.join(parts)}")
    return "; ".join(lines) + " (mean paired difference ± standard error)."


def draw(result: dict[str, Any], name: str) -> Any:
    """Losses, AUC, and the final weights of right and wrong examples."""
    fig, axes = figure(10.5, 3.2, ncols=3)
    for rule, r in result["rules"].items():
        style = look(rule)
        color = style["color"]
        h = {k: np.array(v, float) for k, v in r["history"].items()}
        steps = np.arange(h["auc"].shape[1])
        axes[0].plot(steps, h["outer_loss"].mean(0), color=color, label=rule)
        axes[0].plot(steps, h["test_loss"].mean(0), color=color, ls=":")
        axes[1].plot(steps[1:], h["auc"].mean(0)[1:], color=color)
        low, high = h["auc"].min(0), h["auc"].max(0)
        axes[1].fill_between(steps[1:], low[1:], high[1:], color=color, alpha=0.1)
    axes[0].set(title="loss", xlabel="outer steps")
    axes[0].plot([], [], "k-", label="validation")
    axes[0].plot([], [], "k:", label="test")
    axes[1].set(title="AUC: weight against wrong label", xlabel="outer steps")
    edges = np.linspace(0, 1, len(result["weights"]["right"]) + 1)
    for label, counts in result["weights"].items():
        axes[2].stairs(counts, edges, fill=True, alpha=0.5, label=f"{label} label")
    axes[2].set(title="final weights by Adaptive", xlabel="weight", ylabel="examples")
    axes[2].set_yscale("log")
    legend(fig, *axes, ncols=7)
    seeds = len(next(iter(result["rules"].values()))["seconds"])
    fig.suptitle(f"Data cleaning, half of the labels wrong: {seeds} seeds")
    return save_figure(fig, name)


PART = Part(TITLE, NOTE, X64, STEPS, measure, rows, draw, differences)
