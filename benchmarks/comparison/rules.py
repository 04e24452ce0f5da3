"""``python -m benchmarks rules``: the rules against other libraries at equal error.

For each problem and library the settings are tuned until the gradient meets a relative
error of 1e-3 and of 1e-5, against a reference in float64; then what was chosen takes
turns on the clock. Ratios are to the fastest method of any other library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, ClassVar

import jax

from benchmarks.comparison import costs as rules_costs
from benchmarks.comparison import report as rules_report
from benchmarks.comparison.method import Method, Program
from benchmarks.comparison.peers import DEFAULT, installed, methods, steps
from benchmarks.comparison.problems import (
    PROBLEMS,
    Problem,
    num_states,
    reference,
    resolve,
)
from benchmarks.comparison.summary import COLUMNS, summarize
from benchmarks.comparison.tune import HOPELESS, TARGETS, Sweep, sweep_all
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.measurement import interleaved_times, spread
from benchmarks.harness.options import Count, OneOf, require
from benchmarks.harness.progress import progress, say
from benchmarks.harness.results import read_json, record, write_json

LIBRARIES = ("rbpjax", "jaxopt", "optimistix", "jax", "torchdeq")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Compare with jaxopt, optimistix, jax.lax, BPTT and torchdeq at equal error."""

    name: ClassVar[str] = "rules"

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Names, or beginnings of names, such as rnn or hopfield."""
    libraries: Annotated[tuple[str, ...], OneOf(LIBRARIES)] = LIBRARIES
    """Any of rbpjax, jaxopt, optimistix, jax, torchdeq; what is missing is skipped."""
    repetitions: Count = 15
    """Turns of each program on the clock."""
    costs: bool = True
    """Also measure TBPTT against Neumann, memory, overhead of the rules, imports."""
    report: bool = False
    """Only make the tables and figures anew from the result file."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/rules.json``, its figures and its tables."""
        if self.report:
            return rules_report.write(read_json("rules"))
        require("rbpjax" in self.libraries, "--libraries: rbpjax must be one of them")
        names = resolve(self.problems)
        available = []
        for library in self.libraries:
            why = installed(library)
            say(f"skipped: {why}") if why else available.append(library)
        asked = {"repetitions": self.repetitions, "libraries": available}
        checkpoints = Checkpoints("rules", asked, self.fresh)
        chosen = [m for m in methods() if m.library in available]
        problems = {}
        for name in names:
            make = partial(self.measure, name, chosen)
            problems[name] = checkpoints.once(name, make)
            say(rules_report.line(problems[name]))
        costs = {}
        if self.costs:
            for name, part in rules_costs.PARTS.items():
                make = partial(part, self.repetitions)
                costs[name] = checkpoints.once(name, make)
        complete = names == list(PROBLEMS) and self.costs
        result = record(
            "rules", "rules", asked, columns=COLUMNS, problems=problems, costs=costs
        )
        result["environment"]["packages"] |= _versions(available)
        path = write_json("rules" if complete else "rules-custom", result)
        checkpoints.clear()
        say(f"Written: {path.name}")
        return rules_report.write(read_json(path.stem)) if complete else result

    def measure(self, name: str, chosen: list[Method]) -> dict[str, Any]:
        """One problem: the sweep of every method, and the clock on what it chose."""
        title, make = PROBLEMS[name]
        problem = make()
        exact, rho = reference(problem)
        if problem.kind == "linear":  # which starts at its fixed point
            chosen = [m for m in chosen if not m.forward]
        watch = lambda items: progress(items, len(items), name)
        sweeps = sweep_all(chosen, problem, exact, watch)
        entry: dict[str, Any] = {
            "title": title,
            "states": num_states(problem),
            "rho": rho,
            "methods": {},
            "targets": {},
        }
        for method in chosen:
            sweep = sweeps[method.name]
            points = [s._asdict() | p for s, p in sweep.points.items()]
            compiles = [p["compile_s"] for p in points if p["compile_s"]]
            entry["methods"][method.name] = {
                "library": method.library,
                "failure": sweep.failure,
                "compile_s": spread(compiles) if compiles else None,
                "curve": points,
            }
        for target in TARGETS:
            entry["targets"][f"{target:g}"] = self.clock(problem, sweeps, target)
        return summarize(entry, fronts=problem.kind != "linear")

    def clock(
        self, problem: Problem, sweeps: dict[str, Sweep], target: float
    ) -> dict[str, Any]:
        """Interleaved times of all methods at the settings that meet the target."""
        found, calls = {}, {}
        settings = {name: s.chosen(target) for name, s in sweeps.items()}
        met = {name: s for name, s in settings.items() if s is not None}
        first = {name: sweeps[name].points[s] for name, s in met.items()}
        seconds = lambda name: first[name]["seconds"]
        best = min(map(seconds, first), default=math.inf)
        peers = [name for name in first if not name.startswith("rbpjax ")]
        rival = min(peers, key=seconds, default=None)  # on the clock in any case
        for name, setting in met.items():
            point = first[name]
            found[name] = setting._asdict() | {"error": point["error"]}
            if name in (rival, DEFAULT) or point["seconds"] <= HOPELESS * best:
                calls[name] = _repeated(sweeps[name].programs[setting], best)
            else:  # of no interest to a ratio: the time of its trial
                found[name]["seconds"] = spread([point["seconds"]])
        times = interleaved_times(
            {n: c for n, (c, _) in calls.items()}, self.repetitions
        )
        for name, seconds in times.items():
            found[name]["seconds"] = spread([s / calls[name][1] for s in seconds])
            found[name]["bytes"] = first[name]["bytes"]
        result: dict[str, Any] = {"methods": found, "turns": {}}
        median = lambda name: found[name]["seconds"]["median"]
        groups = {
            "default": [DEFAULT],
            "ours": [n for n in times if n.startswith("rbpjax ")],
            "peer": [n for n in times if not n.startswith("rbpjax ")],
        }
        for role, group in groups.items():
            name = min((n for n in group if n in times), key=median, default=None)
            if name is not None:
                turns = [s / calls[name][1] for s in times[name]]
                result["turns"][role] = {"method": name, "seconds": turns}
        for role in ("default", "ours"):
            name = result["turns"].get(role, {}).get("method")
            if name is not None:
                found[name]["steps"] = steps(name, problem, met[name])
        return result


def _repeated(program: Program, best: float) -> tuple[Callable[[], Any], int]:
    """The program as often as to last a millisecond or two, and how often that is."""
    times = min(max(math.ceil(1e-3 / best), 1), 20)

    def call() -> Any:
        for _ in range(times):
            result = jax.block_until_ready(program.call())
        return result

    return call, times


def _versions(libraries: list[str]) -> dict[str, str]:
    """Of the other libraries, where they are installed."""
    names = {"optimistix": ("optimistix", "lineax"), "torchdeq": ("torch", "torchdeq")}
    found = {}
    for name in (n for lib in libraries for n in names.get(lib, (lib,))):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
