"""What warm starts save: each training step's adjoint starts from the last one's.

Training by Adam on one batch. At each step the same gradients are computed cold and
warm, at the same parameters, from the same forward start, which is the last solution
for all; they differ in the probe alone.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rbpjax
from benchmarks.comparison.problems import PROBLEMS, Problem, flat
from benchmarks.harness.measurement import spread
from benchmarks.harness.options import Count, OneOf, Within
from benchmarks.harness.progress import progress, say
from benchmarks.harness.results import record, write_json
from benchmarks.harness.tables import table

RULES = {"Adaptive": rbpjax.Adaptive(tol=1e-4), "Neumann(5)": rbpjax.Neumann(steps=5)}
EXACT = rbpjax.Adaptive(tol=3e-6)
FORWARD_TOL = 1e-6


@dataclasses.dataclass(frozen=True)
class Warm:
    """Start each adjoint from that of the last training step."""

    name: ClassVar[str] = "warm"

    problems: Annotated[tuple[str, ...], OneOf(PROBLEMS)] = (
        "rnn-0.9",
        "hopfield-0.86",
        "cora",
        "conv",
        "bilevel-10",
    )
    """Names from the benchmark ``rules``."""
    steps: Count = 30
    """Training steps; the first, where all start cold, is not counted."""
    rates: Annotated[tuple[float, ...], Within(0)] = (1e-5, 1e-4)
    """Learning rates of Adam: how far the parameters move in a step."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/warm.json`` and prints its table."""
        entries = [
            {"title": PROBLEMS[name][0], "rate": rate} | self.train(name, rate)
            for name in self.problems
            for rate in self.rates
        ]
        result = record("warm", "warm", dataclasses.asdict(self), entries=entries)
        whole = self == Warm()
        write_json("warm" if whole else "warm-custom", result)
        say(table(rows(result)))
        return result

    def train(self, name: str, rate: float) -> dict[str, Any]:
        """One training run, and what each rule did at each of its steps."""
        problem = PROBLEMS[name][1]()
        adam = optax.adam(rate)
        params, h = problem.params, problem.h0
        state = adam.init(params)
        exact = _gradient(problem, EXACT)
        gradients = {rule: _gradient(problem, made) for rule, made in RULES.items()}
        cold = rbpjax.AdjointReport.zeros()
        first = rbpjax.AdjointReport.zeros(adjoint=jnp.zeros_like(problem.h0))
        probes = {(rule, kind): cold for rule in RULES for kind in ("cold", "warm")}
        probes |= {(rule, "warm"): first for rule in RULES}
        seen: dict[tuple[str, str], list[dict[str, float]]] = {k: [] for k in probes}
        random = np.random.default_rng(0)
        for (rule, _), probe in probes.items():  # compiled before the clock starts
            jax.block_until_ready(gradients[rule](params, h, probe))
        for _ in progress(range(self.steps + 1), self.steps + 1, f"{name} {rate:g}"):
            want, _, settled = exact(params, h, cold)
            for i in random.permutation(len(probes)):
                key = list(probes)[i]
                call = partial(gradients[key[0]], params, h, probes[key])
                measured, report = _measured(call, flat(want))
                seen[key].append(measured)
                if key[1] == "warm":
                    probes[key] = report
            updates, state = adam.update(want, state)
            params, h = optax.apply_updates(params, updates), settled
        found = {rule: (seen[rule, "cold"], seen[rule, "warm"]) for rule in RULES}
        return {rule: _summary(*pair) for rule, pair in found.items()}


def _measured(call: Any, want: np.ndarray) -> tuple[dict[str, float], Any]:
    """One gradient on the clock, and its report."""
    start = time.perf_counter()
    got, report, _ = jax.block_until_ready(call())
    seconds = time.perf_counter() - start
    off = np.linalg.norm(flat(got) - want) / np.linalg.norm(want)
    return {
        "seconds": seconds,
        "steps": float(report.num_steps),
        "error": float(off),
        "converged": float(report.converged),
    }, report


def _gradient(problem: Problem, rule: rbpjax.BackwardRule) -> Any:
    """Jitted ``(params, h0, probe) -> gradient, report, solution``."""
    forward = rbpjax.FixedPointIteration(max_steps=problem.budget, tol=FORWARD_TOL)
    solve = rbpjax.rbp_solve(problem.f, forward=forward, backward=rule)

    def loss(params: Any, probe: Any, h0: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = solve(params, problem.inputs, h0, probe).value
        return problem.loss(h), h

    @jax.jit
    def gradient(params: Any, h0: jax.Array, probe: Any) -> tuple[Any, Any, jax.Array]:
        (got, report), h = jax.grad(loss, (0, 1), has_aux=True)(params, probe, h0)
        return got, report, h

    return gradient


def _summary(cold: list[dict], warm: list[dict]) -> dict[str, Any]:
    """Without the first step: counts, errors, and the ratio of times pair by pair."""
    kinds = {"cold": cold[1:], "warm": warm[1:]}
    column = lambda kind, name: np.array([run[name] for run in kinds[kind]])
    each = lambda name, pick: {kind: float(pick(column(kind, name))) for kind in kinds}
    ratio = column("warm", "seconds") / column("cold", "seconds")
    return {
        "steps": each("steps", np.mean),
        "error": each("error", np.max),
        "converged": each("converged", np.min),
        "time": spread(ratio.tolist()),
    }


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a problem and learning rate."""
    made = []
    for entry in result["entries"]:
        row = {"problem": entry["title"], "learning rate": f"{entry['rate']:g}"}
        adaptive, truncated = (entry[rule] for rule in RULES)
        pair = lambda found, shown: ", ".join(format(v, shown) for v in found.values())
        time_ = adaptive["time"]
        row["Adaptive: steps, cold and warm"] = pair(adaptive["steps"], ".1f")
        row["time, warm ÷ cold"] = (
            f"{time_['median']:.2f} [{time_['q25']:.2f}, {time_['q75']:.2f}]"
        )
        row["largest error"] = ", ".join(
            f"{adaptive['error'][kind]:.1g}{'' if converged == 1 else '!'}"
            for kind, converged in adaptive["converged"].items()
        )
        row["Neumann(5): largest error"] = pair(truncated["error"], ".1g")
        made.append(row)
    return made
