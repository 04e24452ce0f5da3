"""Calibrates three models at rest to data, each by the gradient of its fixed point.

    python -m examples.steady_states.train [--tiny]

`reactions.py`: a reaction network that conserves a total, from steady states.
`kinetics.py`: a stiff system by implicit Euler, from its course.
`decisions.py`: the value function of a decision problem, from choices.

Each is a step function f(parameters, inputs, h), and a loss of its fixed point.
Parameters are logarithms, fitted by SciPy's L-BFGS in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

import rbpjax
from benchmarks.harness.measurement import temporary_bytes
from benchmarks.harness.options import OneOf, Seeds
from benchmarks.harness.progress import progress
from examples.common import results
from examples.common.command import main
from examples.steady_states import decisions, kinetics, reactions, report

MODELS = {"reactions": reactions, "kinetics": kinetics, "decisions": decisions}
# One step of f from the start is explicit Euler in `kinetics`.
UNROLLED = {"BPTT, 1000 steps": 1000, "BPTT, 20 steps": 20, "explicit, one step": 1}
METHODS = ("fixed point", "finite differences", *UNROLLED)


def solver(model: ModuleType, method: str) -> rbpjax.Solve:
    """How h is found, and differentiated."""
    if method in UNROLLED:
        return rbpjax.bptt(model.step, UNROLLED[method])
    return rbpjax.rbp_solve(model.step, **model.SOLVER)


@functools.cache
def compiled(name: str, method: str) -> tuple[Callable, Callable]:
    """The loss, and the loss with its gradient."""
    model = MODELS[name]
    loss = partial(model.loss, solver(model, method))
    return jax.jit(loss), jax.jit(jax.value_and_grad(loss))


def problem(name: str, seed: int) -> tuple[np.ndarray, Any]:
    """True parameters, up to twice the nominal ones or half of them, and data."""
    model, rng = MODELS[name], np.random.default_rng(seed)
    factors = rng.uniform(-np.log(2), np.log(2), len(model.NAMES))
    truth = model.NOMINAL + factors
    return truth, model.measured(solver(model, "fixed point"), jnp.asarray(truth), seed)


def fit(name: str, method: str, seed: int) -> dict[str, Any]:
    """The parameters of the smallest loss, from the nominal ones."""
    model = MODELS[name]
    truth, data = problem(name, seed)
    value, gradient = compiled(name, method)
    by_differences = method == "finite differences"
    if by_differences:
        function = lambda logs: float(value(logs, data))
    else:
        function = lambda logs: jax.tree.map(np.float64, gradient(logs, data))
    jax.block_until_ready(function(model.NOMINAL))  # compiles
    begin = time.process_time()
    start = jax.tree.leaves(function(model.NOMINAL))
    if not np.all(np.isfinite(np.hstack(start))):
        return {"truth": np.exp(truth), "found": None}
    options = {"jac": None if by_differences else True, "method": "L-BFGS-B"}
    with np.errstate(all="ignore"):  # unrolled solves may overflow on the way
        found = minimize(function, model.NOMINAL, **options)
    known = errors(name, found.x, data) if method == METHODS[0] else None
    return {
        "truth": np.exp(truth),
        "found": np.exp(found.x),
        "standard_errors": known,
        "loss": found.fun,
        "evaluations": found.nfev,
        "core_seconds": time.process_time() - begin,
        "memory": temporary_bytes(gradient, truth, data),
    }


def errors(name: str, logs: np.ndarray, data: Any) -> np.ndarray:
    """Standard errors of the logarithms: from second derivatives of the likelihood."""
    at = lambda logs: np.array(compiled(name, METHODS[0])[1](logs, data)[1])
    shifts = 1e-4 * np.eye(len(logs))
    hessian = [(at(logs + shift) - at(logs - shift)) / 2e-4 for shift in shifts]
    information = MODELS[name].weight(data) * np.array(hessian)
    return np.sqrt(np.diag(np.linalg.inv(information)))


def curve(name: str, found: dict[str, Any], seed: int) -> dict[str, Any]:
    """What was seen and what the fit says, for the figure."""
    solve = solver(MODELS[name], METHODS[0])
    logs = jnp.log(jnp.asarray(found["found"]))
    return MODELS[name].picture(solve, logs, problem(name, seed)[1])


@dataclasses.dataclass(frozen=True)
class SteadyStates:
    """Calibrate models at rest to data."""

    kinds: Annotated[tuple[str, ...], OneOf(MODELS)] = tuple(MODELS)
    """Which models."""
    methods: Annotated[tuple[str, ...], OneOf(METHODS)] = METHODS
    """How the gradient is found."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Of true parameters and noise."""
    tiny: bool = False
    """One seed, by the fixed point alone."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Fits every model by every method, for every seed: JSON, figure, table."""
        if self.tiny:
            less = {"methods": METHODS[:1], "seeds": (0,)}
            return dataclasses.replace(self, tiny=False, **less).run()
        checkpoints = results.opened("steady_states", self)
        fits: dict[str, Any] = {k: {m: [] for m in self.methods} for k in self.kinds}
        runs = list(itertools.product(self.kinds, self.methods, self.seeds))
        with jax.enable_x64(True):
            for kind, method, seed in progress(runs, len(runs), "fits"):
                made = partial(fit, kind, method, seed)
                name = f"{kind}-{method}-{seed}".replace(", ", "-").replace(" ", "-")
                fits[kind][method] += [checkpoints.once(name, made)]
            first = {kind: fits[kind][self.methods[0]][0] for kind in self.kinds}
            curves = {kind: curve(kind, first[kind], self.seeds[0]) for kind in first}
            path = results.write("steady_states", self, fits=fits, curves=curves)
        checkpoints.clear()
        return results.show(report, path.stem)


if __name__ == "__main__":
    sys.exit(main(SteadyStates))
