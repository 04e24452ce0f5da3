"""``python -m benchmarks collection``: classic fixed points with defaults only.

119 problems in two precisions. *Solved*: said converged, and right by the judge (or,
where there is no fixed point, said anything else). *Silent*: said converged, and wrong.
*Flagged*: not converged, by the solver's own word.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax

import rbpjax
from benchmarks.comparison.collection.drawn import KINDS, SIZES, draw, stacked
from benchmarks.comparison.collection.judge import ALLOWED, Judge, cast
from benchmarks.comparison.collection.problems import problems, tuned
from benchmarks.comparison.collection.solvers import (
    OURS,
    SOLVERS,
    Found,
    program,
    told,
)
from benchmarks.comparison.peers import installed
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, Natural, OneOf, require
from benchmarks.harness.progress import progress, say
from benchmarks.harness.results import code, record, write_json
from benchmarks.harness.tables import table

PRECISIONS = tuple(ALLOWED)
HALVES = ("tune", "report")


@dataclasses.dataclass(frozen=True)
class Collection:
    """Solve 119 classic fixed points with defaults only, and judge every answer."""

    name: ClassVar[str] = "collection"

    solver: Annotated[tuple[str, ...], OneOf(SOLVERS)] = tuple(SOLVERS)
    """This library's solvers, then its peers'; what is not installed is skipped."""
    problems: tuple[str, ...] = ("",)
    """Beginnings of names of problems."""
    precision: Annotated[tuple[str, ...], OneOf(PRECISIONS)] = PRECISIONS
    """float64, float32."""
    random: bool = False
    """Random problems in the place of the classic ones; this library's solvers only."""
    count: Count = 1000
    """How many random ones; rounded up to whole groups."""
    seed: Natural = 0
    """Of the random ones."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/collection.json``, or ``-random``, and prints its table."""
        return self.run_random() if self.random else self.run_classic()

    def run_random(self) -> dict[str, Any]:
        """The random problems, a group of a kind and size at a time."""
        solvers = [s for s in self.solver if s in OURS]
        require(bool(solvers), f"--solver: with --random any of {', '.join(OURS)}")
        size = -(-self.count // (len(KINDS) * len(SIZES)))
        kept = {"size": size, "seed": self.seed, "sources": _sources()}
        checkpoints = Checkpoints("collection-random", kept, self.fresh)
        entries: dict[str, Any] = {}
        for solver in solvers:
            entries[solver] = {}
            for precision in self.precision:
                found = {}
                for i, kind in enumerate(KINDS):
                    make = partial(solve_kind, solver, precision, kind, size, self.seed)
                    found |= checkpoints.once(f"{solver}-{precision}-{i}", make)
                entries[solver][precision] = found
                say(table(rows({solver: {precision: found}}, halves=False)))
        options = dataclasses.asdict(self) | {"solver": solvers}
        result = record(
            "collection",
            "collection --random",
            options,
            solvers={
                s: {p: summary_of_kinds(f) for p, f in e.items()}
                for s, e in entries.items()
            },
        )
        path = write_json("collection-random", result)
        say(f"\n{table(rows(entries, halves=False))}\nWritten: {path.name}")
        checkpoints.clear()
        return result

    def run_classic(self) -> dict[str, Any]:
        """The 119, a family at a time."""
        names = [n for n in problems() if n.startswith(self.problems)]
        require(bool(names), f"--problems: none begins with {list(self.problems)}")
        available = [s for s in self.solver if _available(s)]
        kept = {"names": names, "sources": _sources()}
        checkpoints = Checkpoints("collection", kept, self.fresh)
        entries: dict[str, Any] = {}
        for solver in available:
            entries[solver] = {}
            for precision in self.precision:
                found = {}
                for family in dict.fromkeys(problems()[n].family for n in names):
                    mine = [n for n in names if problems()[n].family == family]
                    make = partial(solve_all, solver, precision, mine)
                    found |= checkpoints.once(f"{solver}-{precision}-{family}", make)
                entries[solver][precision] = found
                say(table(rows({solver: {precision: found}})))
        whole = {
            "solver": tuple(available) == tuple(SOLVERS),
            "problems": len(names) == len(problems()),
            "precision": self.precision == PRECISIONS,
        }
        options = dataclasses.asdict(self) | {"solver": available}
        result = record(
            "collection",
            "collection",
            options,
            tune=sorted(tuned()),
            solvers={s: summary(s, e) for s, e in entries.items()},
        )
        name = "collection" if all(whole.values()) else "collection-custom"
        path = write_json(name, result)
        say(f"\n{table(rows(entries))}\nWritten: {path.name}")
        checkpoints.clear()
        return result


def _sources() -> list[str]:
    """What a result depends on: another version never resumes from it."""
    folders = Path(rbpjax.__file__).parent, Path(__file__).parent
    return [code(folder)["sources"] for folder in folders]


def _available(solver: str) -> bool:
    library = solver.split("-")[0]
    why = installed(library) if library in ("jaxopt", "optimistix") else None
    if why:
        say(f"skipped {solver}: {why}")
    return why is None


@cache
def judge_of(name: str, precision: str) -> Judge:
    return Judge(problems()[name], precision)


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
            entries[f"{kind} {n} {i}"] = entry = judged(judge.of(*data), one)
            if "silent" in (entry["verdict"], entry["gradient"]):
                say(f"  {solver} {precision} {kind} {n} {i}: {describe(entry)}")
    return entries


def describe(entry: dict[str, Any]) -> str:
    """An entry in words."""
    text = f"{entry['verdict']} ({entry['status'] or 'converged'})"
    if entry["error"] is not None:
        text += f", error {entry['error']:.1e}"
    if entry.get("gradient"):
        text += f", gradient {entry['gradient']}"
    if entry.get("gradient_error") is not None:
        text += f" {entry['gradient_error']:.1e}"
    return f"{text}, work {entry['work']}"


def solve_one(solver: str, precision: str, name: str) -> dict[str, Any]:
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
    return judged(judge_of(name, precision), found) | {"cpu_s": seconds}


def judged(judge: Judge, found: Found) -> dict[str, Any]:
    """The verdict on a value and its gradient."""
    problem = judge.problem
    answer = judge.answer(found.value) if problem.has_answer else None
    right = answer is not None and answer.error <= judge.allowed
    if found.converged:
        verdict = "solved" if right else "silent"
    else:
        verdict = "flagged" if problem.has_answer else "solved"
    entry: dict[str, Any] = {
        "verdict": verdict,
        "status": found.status,
        "error": answer and answer.error,
        "right": right,
        "work": found.work,
    }
    if found.gradient is not None:
        entry |= _judged_gradient(judge, found, answer and answer.gradient)
    return entry


def _judged_gradient(judge: Judge, found: Found, exact: Any) -> dict[str, Any]:
    """Right, silent (both solves said converged and it is wrong), or flagged."""
    error = None if exact is None else judge.gradient_error(found.gradient, exact)
    right = error is not None and error <= judge.allowed
    said = found.converged and found.report
    if said:
        verdict = "right" if right else "silent"
        if exact is None and judge.problem.has_answer:
            verdict = "undefined"  # I - J is singular at a fixed point that was found
    else:
        verdict = "flagged"
    alone = found.report and error is not None and not right
    return {
        "gradient": verdict,
        "gradient_error": error,
        "report_alone_wrong": alone and not found.converged,
    }


def counts(found: dict[str, Any]) -> dict[str, Any]:
    """How many problems ended how."""
    entries = list(found.values())
    solved = [e for e in entries if e["verdict"] == "solved"]
    flagged = Counter(e["status"] for e in entries if e["verdict"] == "flagged")
    with_gradient = [e for e in entries if "gradient" in e]
    return {
        "problems": len(entries),
        "solved": len(solved),
        "silent": sum(e["verdict"] == "silent" for e in entries),
        "flagged": dict(flagged),
        "flagged_though_right": sum(
            e["verdict"] == "flagged" and e["right"] for e in entries
        ),
        "work_on_solved": sum(e["work"] for e in solved),
        "gradients": dict(Counter(e["gradient"] for e in with_gradient)),
        "report_alone_wrong": sum(e["report_alone_wrong"] for e in with_gradient),
    }


def summary(solver: str, entries: dict[str, Any]) -> dict[str, Any]:
    """Counts by precision and half; one line a problem of the default."""
    kept: dict[str, Any] = {}
    for precision, found in entries.items():
        halves = {
            "tune": {n: e for n, e in found.items() if n in tuned()},
            "report": {n: e for n, e in found.items() if n not in tuned()},
        }
        kept[precision] = {
            "all": counts(found),
            **{half: counts(part) for half, part in halves.items()},
            "silent": [n for n, e in found.items() if e["verdict"] == "silent"],
            "silent_gradients": [
                n for n, e in found.items() if e.get("gradient") == "silent"
            ],
            "flagged": {
                n: e["status"] for n, e in found.items() if e["verdict"] == "flagged"
            },
        }
        if solver == "default":
            kept[precision]["problems"] = {n: describe(e) for n, e in found.items()}
    return kept


def summary_of_kinds(found: dict[str, Any]) -> dict[str, Any]:
    """Counts of all and by kind, and the names of what is silent."""
    return {
        "all": counts(found),
        "kinds": {
            kind: counts({n: e for n, e in found.items() if n.startswith(f"{kind} ")})
            for kind in KINDS
        },
        "silent": {
            n: describe(e)
            for n, e in found.items()
            if "silent" in (e["verdict"], e["gradient"])
        },
    }


def rows(entries: dict[str, Any], halves: bool = True) -> list[dict[str, str]]:
    """A row a solver and precision, the half that is held out in a column."""
    made = []
    for solver, by_precision in entries.items():
        for precision, found in by_precision.items():
            c = counts(found)
            half = counts({n: e for n, e in found.items() if n not in tuned()})
            gradients = c["gradients"]
            made.append(
                {
                    "solver": solver,
                    "precision": precision,
                    "solved": f"{c['solved']} of {c['problems']}",
                    **(
                        {"held out": f"{half['solved']} of {half['problems']}"}
                        if halves
                        else {}
                    ),
                    "silent": f"{c['silent']}",
                    "flagged": ", ".join(f"{n} {s}" for s, n in c["flagged"].items())
                    or "–",
                    "flagged, right": f"{c['flagged_though_right']}",
                    "evaluations + products": f"{c['work_on_solved']}",
                    "gradients right": f"{gradients.get('right', 0)}",
                    "gradients silent": f"{gradients.get('silent', 0)}",
                }
            )
    return made
