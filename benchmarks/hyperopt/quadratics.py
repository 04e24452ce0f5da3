"""Bilevel quadratics: hypergradients in closed form, error against products.

Inner: w* = argmin ½ wᵀ(A + diag d) w - bᵀw, trained by gradient descent, or with
momentum; outer: ½ ‖w* - t‖². With H = A + diag d and u = H⁻¹(w* - t), the hypergradient
of the decays d is -u ∘ w*. The rules get the exact fixed point: the error is that of
the adjoint alone.

For gradient descent J = I - αH is symmetric, and so the plain conjugate gradients of
``jax.scipy`` are a rule; with momentum J is not.
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
from benchmarks.comparison.products import Counter
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.progress import progress
from benchmarks.hyperopt.part import Part
from rbpjax import (
    CG,
    GMRES,
    RBP,
    Adaptive,
    Anderson,
    BiCGSTAB,
    CGNormal,
    FixedPointIteration,
    Neumann,
)

TITLE = "Closed form, products with J or Jᵀ to an adjoint residual of 1e-6"
NOTE = (
    "Bilevel quadratics with 100 weights, float64, the best step size and momentum "
    "for each condition number κ; ! did not converge, and said so. For gradient "
    "descent J is symmetric, and CG applies. In parentheses the largest error of the "
    "hypergradient; the tolerance of the two RBP rules is relative to ‖z‖, so that "
    "they end earlier."
)
X64 = True
STEPS = None  # nothing is trained
SIZE = 100
CONDITIONS = (10, 1000)
OPTIMIZERS = ("gradient descent", "momentum")
PRODUCTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TARGET = 1e-6  # adjoint residual of the table
TINY = 1e-15  # below what a rule can reach: it uses its budget
MOST = 50_000  # products to the target


# (budget of products, tolerance) -> rule; and its products per step; None: counted.
RULES: dict[str, tuple[Callable[[int, float], Any], int | None]] = {
    "RBP, uniform start": (
        lambda k, tol: RBP(
            FixedPointIteration(max_steps=k, tol=tol)
            if tol > TINY
            else FixedPointIteration(steps=k),
            seed=1234,
        ),
        1,
    ),
    "Neumann": (
        lambda k, tol: (
            Neumann(tol=tol, max_steps=k) if tol > TINY else Neumann(steps=k)
        ),
        1,
    ),
    "RBP(Anderson)": (lambda k, tol: RBP(Anderson(tol=tol, max_steps=k, memory=5)), 1),
    "CGNormal": (lambda k, tol: CGNormal(tol=tol, max_steps=k // 2), 2),
    "BiCGSTAB": (lambda k, tol: BiCGSTAB(tol=tol, max_steps=k // 2), 2),
    "GMRES(20)": (lambda k, tol: GMRES(tol=tol, max_steps=k), 1),
    "Adaptive": (lambda k, tol: Adaptive(tol=tol, max_steps=k), None),
    "CG, symmetric J": (lambda k, tol: CG(tol=tol, max_steps=k), 1),
}


class Quadratic(NamedTuple):
    """One problem, and the answer."""

    matrix: jax.Array  # A
    b: jax.Array
    target: jax.Array
    decay: jax.Array  # d
    rate: jax.Array
    momentum: jax.Array
    minimum: jax.Array
    exact: jax.Array  # the hypergradient


def draw_problem(condition: float, optimizer: str, seed: int) -> Quadratic:
    """H with eigenvalues from 1/κ to 1, evenly spaced in the logarithm.

    Step size and momentum are the best for those eigenvalues: ρ(J) = (κ - 1) / (κ + 1)
    for gradient descent, (√κ - 1) / (√κ + 1) with momentum.
    """
    random = np.random.default_rng([seed, condition])
    q = np.linalg.qr(random.normal(size=(SIZE, SIZE)))[0]
    spectrum = np.geomspace(1 / condition, 1, SIZE)
    hessian = (q * spectrum) @ q.T
    decay = spectrum[0] * random.uniform(0.1, 0.5, SIZE)
    b, target = random.normal(size=(2, SIZE))
    root = np.sqrt(spectrum[[0, -1]])
    if optimizer == "momentum":
        rate = (2 / root.sum()) ** 2
        momentum = ((root[1] - root[0]) / root.sum()) ** 2
    else:
        rate, momentum = 2 / (spectrum[0] + spectrum[-1]), 0.0
    w = np.linalg.solve(hessian, b)
    u = np.linalg.solve(hessian, w - target)
    fields = (hessian - np.diag(decay), b, target, decay, rate, momentum, w, -u * w)
    return jax.tree.map(jnp.asarray, Quadratic(*fields))


def inner_loss(decay: jax.Array, given: Quadratic, w: jax.Array) -> jax.Array:
    """½ wᵀ(A + diag d) w - bᵀw."""
    quadratic = 0.5 * w @ given.matrix @ w - given.b @ w
    return quadratic + 0.5 * jnp.sum(decay * w**2)


def trained(optimizer: str, given: Quadratic) -> tuple[Callable, Any, Any]:
    """The step, its fixed point, and the outer gradient there: ``(f, h*, g)``."""
    # optax has no trace in the state of plain gradient descent: J is then H's alone.
    momentum = given.momentum if optimizer == "momentum" else None
    make = lambda _: optax.sgd(given.rate, momentum)
    f = rbpjax.optimizer_step(inner_loss, make)
    h = (given.minimum, make(None).init(given.minimum))
    return f, h, jax.grad(lambda h: 0.5 * jnp.sum((h[0] - given.target) ** 2))(h)


def hypergradient(optimizer: str, rule: Any, given: Quadratic) -> dict:
    """Relative error of the hypergradient, steps, residual, and verdict."""
    f, h, g = trained(optimizer, given)
    (decay_bar, _), solution = rbpjax.rbp_vjp(
        f, given.decay, given, h, g, backward=rule
    )
    error = jnp.linalg.norm(decay_bar - given.exact) / jnp.linalg.norm(given.exact)
    return {
        "error": error,
        "products": solution.num_steps,
        "residual": solution.residual,
        "converged": solution.converged,
    }


def counted(optimizer: str, rule: Any, problems: list[Quadratic]) -> np.ndarray:
    """The products of each problem."""
    count, found = Counter(rule), []
    for given in problems:
        f, h, g = trained(optimizer, given)
        linear = jax.vjp(lambda h, f=f, p=given: f(p.decay, p, h), h)[1]
        found.append(count(linear, g)[0])
    return np.array(found)


def measure(
    dataset: str,
    seeds: tuple[int, ...],
    num_steps: int | None,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Every rule on every problem: error by budget, and products to a residual."""
    del dataset, num_steps, checkpoints  # two minutes, and nothing is trained
    cases = [(o, r) for o in OPTIMIZERS for r in RULES if _applies(o, r)]
    result: dict[str, Any] = {"size": SIZE, "target": TARGET}
    result["budgets"] = PRODUCTS  # of steps for the default rule, else of products
    result["cases"] = {f"{o}, κ = {c}": {} for o in OPTIMIZERS for c in CONDITIONS}
    for optimizer, name in progress(cases, len(cases), "quadratics"):
        drawn = [draw_problem(c, optimizer, s) for c in CONDITIONS for s in seeds]
        make = RULES[name][0]
        solve = partial(_solve, optimizer, name, drawn)
        by_budget = [solve(make(k, TINY)) for k in PRODUCTS]
        by_budget = {k: np.stack([b[k] for b in by_budget]) for k in by_budget[0]}
        target = solve(make(MOST, TARGET))
        for i, condition in enumerate(CONDITIONS):
            part = slice(i * len(seeds), (i + 1) * len(seeds))
            result["cases"][f"{optimizer}, κ = {condition}"][name] = {
                "error": by_budget["error"][:, part],
                "products": by_budget["products"][:, part],
                "to_target": {k: v[part] for k, v in target.items()},
            }
    return result


def _solve(
    optimizer: str, name: str, problems: list[Quadratic], rule: Any
) -> dict[str, np.ndarray]:
    """A rule on all problems at once; products are counted one by one if need be."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    run = jax.jit(jax.vmap(lambda p: hypergradient(optimizer, rule, p)))
    found = jax.tree.map(np.asarray, run(stacked))
    cost = RULES[name][1]
    if cost is None:
        return found | {"products": counted(optimizer, rule, problems)}
    return found | {"products": cost * found["products"]}


def _applies(optimizer: str, rule: str) -> bool:
    return rule != "CG, symmetric J" or optimizer == "gradient descent"


# --- what a person looks at ----------------------------------------------------------


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a rule: products to the target and the hypergradient's error there."""
    made = []
    for name in RULES:
        row = {"rule": name}
        for case, entries in result["cases"].items():
            if name not in entries:
                row[case] = "–"
                continue
            end = entries[name]["to_target"]
            mark = "" if all(end["converged"]) else "!"
            error = np.max(np.array(end["error"], float))
            row[case] = f"{np.mean(end['products']):.0f}{mark} ({error:.0e})"
        made.append(row)
    return made


def draw(result: dict[str, Any], name: str) -> Any:
    """Error against products, a panel a case."""
    shape = {"nrows": len(OPTIMIZERS), "ncols": len(CONDITIONS)}
    fig, axes = figure(9, 6, **shape, sharex=True, sharey=True, squeeze=False)
    for ax, (case, entries) in zip(axes.flat, result["cases"].items(), strict=True):
        for rule, entry in entries.items():
            error = np.median(np.array(entry["error"], float), axis=1)
            products = np.median(entry["products"], axis=1)
            style = look(rule) | {"marker": "o"}
            shown = np.clip(error, 1e-16, 1e3)
            ax.loglog(products, shown, ms=2.5, lw=1.2, label=rule, **style)
        ax.set(title=case, ylim=(1e-15, 1e4))
    for ax in axes[-1]:
        ax.set_xlabel("products with J or Jᵀ")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error of the hypergradient")
    legend(fig, *axes.flat, ncols=4)
    seeds = len(result["options"]["seeds"])
    fig.suptitle(f"Quadratics, {result['size']} weights: median of {seeds} draws")
    return save_figure(fig, name)


PART = Part(TITLE, NOTE, X64, STEPS, measure, rows, draw)
