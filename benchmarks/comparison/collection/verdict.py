"""One problem by one solver, and the verdict on what it said.

*Solved*: said converged, and right by the judge (or, where there is no fixed point,
said anything else). *Silent*: said converged, and wrong. *Flagged*: not converged, by
the solver's own word. A gradient is silent if both solves said converged and it is
wrong.
"""

from __future__ import annotations

import math
import time
from functools import cache
from operator import itemgetter
from typing import Any

import jax

from benchmarks.comparison.collection.drawn import SIZES, draw, stacked
from benchmarks.comparison.collection.judge import Answer, Judge, cast
from benchmarks.comparison.collection.problems import problems
from benchmarks.comparison.collection.solvers import (
    OURS,
    SOLVERS,
    Found,
    program,
    told,
)
from benchmarks.harness.progress import progress, say

Entry = dict[str, Any]


@cache
def judge_of(name: str) -> Judge:
    """One for each problem: it compiles once for both precisions."""
    return Judge(problems()[name], "float64")


def solve_all(solver: str, precision: str, names: list[str]) -> dict[str, Any]:
    """Name -> what came of it; a line for each that is not solved."""
    found = {}
    for name in progress(names, len(names), f"{solver} {precision}"):
        found[name] = entry = solve_one(solver, precision, name)
        if entry["verdict"] != "solved" or entry.get("gradient") == "silent":
            say(f"  {solver} {precision} {name}: {describe(entry)}")
    return found


def solve_kind(
    solver: str, precision: str, kind: str, size: int, seed: int
) -> dict[str, Any]:
    """Name of a kind, size and number -> what came of it; a program for each size."""
    entries = {}
    for n in SIZES:
        problems = draw(kind, n, size, seed)
        given = [cast((p.params, p.inputs, p.h0), precision) for p in problems]
        with jax.enable_x64(precision == "float64"):
            run = jax.vmap(program(OURS[solver](), problems[0].f))
            found = jax.device_get(jax.jit(run)(*stacked(given)))
        judge = Judge(problems[0], precision)
        for i, data in enumerate(given):
            one = told(*jax.tree.map(itemgetter(i), found))
            entries[f"{kind} {n} {i}"] = entry = judged(judge.of(*data, precision), one)
            if "silent" in (entry["verdict"], entry["gradient"]):
                say(f"  {solver} {precision} {kind} {n} {i}: {describe(entry)}")
    return entries


def solve_one(solver: str, precision: str, name: str) -> Entry:
    """One problem by one solver, judged."""
    problem = problems()[name]
    arrays = cast((problem.params, problem.inputs, problem.h0), precision)
    start = time.process_time()
    with jax.enable_x64(precision == "float64"):
        try:
            found = SOLVERS[solver](problem, arrays)
        except Exception as error:  # a failure to run is a result too
            say(f"  {solver} {precision} {name}: {error}"[:300])
            found = Found(problem.h0, False, f"raised {type(error).__name__}", 0)
    seconds = time.process_time() - start
    judge = judge_of(name).of(*arrays, precision)
    return judged(judge, found) | {"cpu_s": seconds}


def judged(judge: Judge, found: Found) -> Entry:
    """The verdict on a value and its gradient."""
    problem = judge.problem
    answer = judge.answer(found.value) if problem.has_answer else None
    right = answer is not None and answer.error <= judge.allowed
    if found.converged:
        verdict = "solved" if right else "silent"
    else:
        verdict = "flagged" if problem.has_answer else "solved"
    entry: Entry = {
        "verdict": verdict,
        "status": found.status,
        "error": answer and answer.error,
        "right": right,
        "work": found.work,
    }
    if found.gradient is not None:
        entry |= _judged_gradient(judge, found, answer)
    return entry


def _judged_gradient(judge: Judge, found: Found, answer: Answer | None) -> Entry:
    """Right, silent (both solves said converged and it is wrong), or flagged.

    Undefined where I - J is singular at a fixed point that was found.
    """
    polished = answer is not None and answer.error < math.inf
    exact = answer.gradient if answer else None
    error = None if exact is None else judge.gradient_error(found.gradient, exact)
    right = error is not None and error <= judge.allowed
    verdict = "flagged"
    if found.converged and found.report:
        wrong = "undefined" if polished and exact is None else "silent"
        verdict = "right" if right else wrong
    return {
        "gradient": verdict,
        "gradient_error": error,
        # Converged, says the report of the adjoint; the forward solve says that not.
        "report_alone_wrong": found.report and not found.converged and not right,
    }


def describe(entry: Entry) -> str:
    """An entry in words."""
    text = f"{entry['verdict']} ({entry['status'] or 'converged'})"
    if entry["error"] is not None:
        text += f", error {entry['error']:.1e}"
    if entry.get("gradient"):
        text += f", gradient {entry['gradient']}"
    if entry.get("gradient_error") is not None:
        text += f" {entry['gradient_error']:.1e}"
    return f"{text}, work {entry['work']}"
