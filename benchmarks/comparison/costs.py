"""What ``rules`` measures of this library alone: truncation, memory, overhead."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import rbpjax
from benchmarks.comparison.peers import RULES
from benchmarks.comparison.problems import PROBLEMS, Problem, rnn
from benchmarks.comparison.products import count_products
from benchmarks.harness.measurement import interleaved_times, spread, temporary_bytes
from benchmarks.harness.progress import progress

TRUNCATIONS = (10, 50, 100)
LENGTHS = (50, 500, 5000)
UNSUITED = ("CG", "Direct")  # J is not symmetric, and of 32,768 numbers
STEPS = 101  # forward, where both sides take the same
LIMIT_TOL = 1e-4
COUNTED = ("Neumann", "Adaptive", "BiCGSTAB", "CG", "CGNormal")


def truncation(repetitions: int) -> dict[str, Any]:
    """Neumann(K) against TBPTT(K + 1), after the same forward pass: time and bytes."""
    problem, result = rnn(0.9), {}
    for k in TRUNCATIONS:
        solvers = {
            "tbptt": rbpjax.bptt(problem.f, STEPS, truncation=k + 1),
            "neumann": _neumann(problem, STEPS, k),
        }
        functions = {n: _gradient(problem, solve) for n, solve in solvers.items()}
        args = (problem.params, problem.inputs)
        calls = {n: partial(jax.jit(f), *args) for n, f in functions.items()}
        times = interleaved_times(calls, repetitions)
        ratio = np.array(times["neumann"]) / np.array(times["tbptt"])
        result[str(k)] = {
            "seconds": {n: spread(t) for n, t in times.items()},
            "bytes": {n: temporary_bytes(f, *args) for n, f in functions.items()},
            "ratio": spread(ratio.tolist()),
        }
    return result


def memory(_: int) -> dict[str, Any]:
    """Temporary bytes of the gradient against steps, 256 units, one example and 128."""
    return {str(batch): _memory(rnn(0.9, batch)) for batch in (1, 128)}


def _memory(problem: Problem) -> dict[str, dict[str, int]]:
    made = {
        "BPTT": lambda t: rbpjax.bptt(problem.f, t),
        "BPTT, remat": lambda t: rbpjax.bptt(problem.f, t, remat=True),
        "TBPTT, half": lambda t: rbpjax.bptt(problem.f, t, truncation=t // 2),
        "Neumann": lambda t: _neumann(problem, t, t),
        "Adaptive": lambda t: _solver(problem, t, rbpjax.Adaptive()),
    }
    args = (problem.params, problem.inputs)
    size = lambda solve: temporary_bytes(_gradient(problem, solve), *args)
    return {n: {str(t): size(make(t)) for t in LENGTHS} for n, make in made.items()}


def overhead(repetitions: int) -> dict[str, Any]:
    """Time of the backward solve ÷ (its products × one product in a bare loop)."""
    problem, result = rnn(0.9), {}
    args = (problem.params, problem.inputs)
    h = rbpjax.rbp_solve(problem.f)(*args, problem.h0).value
    g = jax.grad(problem.loss)(h)

    def products(solve: Any, w: Any, h: jax.Array, g: jax.Array) -> jax.Array:
        _, vjp = jax.vjp(lambda h: problem.f(w, problem.inputs, h), h)
        return solve(lambda v: vjp(v)[0], g)

    for name, make in RULES.items():
        if name in UNSUITED:
            continue
        rule = make(1e-6, problem.budget)
        count, _ = count_products(rule, partial(problem.f, *args), h, g)
        # A bare loop of as many products, each of the last one's result.
        bare = lambda vjp, g, n=count: lax.fori_loop(0, n, lambda _, v: vjp(v), g)
        solve = lambda vjp, g, rule=rule: rule(vjp, g).value
        calls = {
            n: partial(jax.jit(partial(products, s)), problem.params, h, g)
            for n, s in (("rule", solve), ("bare", bare))
        }
        times = interleaved_times(calls, repetitions)
        ratio = np.array(times["rule"]) / np.array(times["bare"])
        result[name] = {"products": count, "ratio": spread(ratio.tolist())}
    return result


def limit(_: int) -> dict[str, Any]:
    """Products with Jᵀ (or J) to a residual of 1e-4, and the fewest there can be.

    Whatever makes its iterate of products with Jᵀ alone has a residual p(Jᵀ)g with
    p(1) = 1, and GMRES without restart finds the least of these. (CG on the normal
    equations takes J too, and is not bound by it.) ``None``: not reached.
    """
    return {
        name: _products(PROBLEMS[name][1]())
        for name in progress(list(PROBLEMS), len(PROBLEMS), "limit")
    }


def _products(problem: Problem) -> dict[str, int | None]:
    args = (problem.params, problem.inputs)
    forward = rbpjax.FixedPointIteration(max_steps=problem.budget, tol=1e-6)
    h = rbpjax.rbp_solve(problem.f, forward=forward)(*args, problem.h0).value
    g, step = jax.grad(problem.loss)(h), partial(problem.f, *args)

    _, vjp = jax.vjp(step, h)

    def converged(rule: rbpjax.BackwardRule) -> tuple[bool, int]:
        solve = jax.jit(lambda vjp, g: rule(lambda v: vjp(v)[0], g))
        solution = solve(vjp, g)
        return bool(solution.converged), int(solution.num_steps)

    restart = min(h.size, 500 if h.size < 10_000 else 100)
    reached, fewest = converged(
        rbpjax.GMRES(tol=LIMIT_TOL, max_steps=restart, restart=restart)
    )
    result = {"fewest": fewest if reached else None}
    for name in COUNTED:
        rule = RULES[name](LIMIT_TOL, problem.budget)
        count = count_products(rule, step, h, g)[0] if converged(rule)[0] else None
        result[name] = count
    return result


def imports(repetitions: int) -> dict[str, Any]:
    """Seconds that ``import rbpjax`` takes above ``import jax``, in fresh processes."""

    def seconds(module: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    seconds("rbpjax")  # compiled files, and the disk's cache
    pairs = [(seconds("jax"), seconds("rbpjax")) for _ in range(repetitions)]
    jax_s, ours = np.array(pairs).T
    return {"jax": spread(jax_s), "above": spread(ours - jax_s)}


PARTS = {
    "truncation": truncation,
    "memory": memory,
    "overhead": overhead,
    "limit": limit,
    "imports": imports,
}


def _solver(problem: Problem, steps: int, rule: rbpjax.BackwardRule) -> Any:
    forward = rbpjax.FixedPointIteration(steps=steps)
    return rbpjax.rbp_solve(problem.f, forward=forward, backward=rule)


def _neumann(problem: Problem, steps: int, k: int) -> Any:
    return _solver(problem, steps, rbpjax.Neumann(steps=k))


def _gradient(problem: Problem, solve: Any) -> Any:
    loss = lambda p, x: problem.loss(solve(p, x, jnp.zeros_like(problem.h0)).value)
    return jax.value_and_grad(loss, (0, 1))
