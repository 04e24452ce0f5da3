"""``python -m benchmarks rules``: the rules against other libraries at equal error.

For each problem and library the settings are tuned until the gradient meets a relative
error of 1e-3 and of 1e-5, against a reference in float64; then what was chosen takes
turns on the clock. Ratios are to the fastest method of any other library.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np

from benchmarks.comparison import costs as rules_costs
from benchmarks.comparison import report as rules_report
from benchmarks.comparison.peers import (
    DEFAULT,
    Method,
    Program,
    installed,
    methods,
    steps,
)
from benchmarks.comparison.problems import PROBLEMS, Problem, num_states, reference
from benchmarks.comparison.tune import HOPELESS, TARGETS, Sweep, sweep_all
from benchmarks.harness import (
    Checkpoint,
    environment,
    interleaved_times,
    progress,
    read_json,
    require,
    say,
    spread,
    write_json,
)

LIBRARIES = ("rbpjax", "jaxopt", "optimistix", "jax", "torchdeq")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Compare with jaxopt, optimistix, jax.lax, BPTT and torchdeq at equal error."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Names, or beginnings of names, such as rnn or hopfield."""
    libraries: tuple[str, ...] = LIBRARIES
    """Any of rbpjax, jaxopt, optimistix, jax, torchdeq; what is missing is skipped."""
    repetitions: int = 15
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
        names = self.resolve()
        available = []
        for library in self.libraries:
            why = installed(library)
            say(f"skipped: {why}") if why else available.append(library)
        asked = {"repetitions": self.repetitions, "libraries": available}
        checkpoint = Checkpoint("rules", asked, self.fresh)
        chosen = [m for m in methods() if m.library in available]
        problems = {}
        for name in names:
            make = lambda name=name: self.measure(name, chosen)
            problems[name] = _once(checkpoint, name, make)
            say(rules_report.line(problems[name]))
        costs = {}
        if self.costs:
            for name, part in rules_costs.PARTS.items():
                costs[name] = _once(checkpoint, name, lambda part=part: part(self))
        complete = names == list(PROBLEMS) and self.costs
        result = {
            "experiment": "rules",
            "command": "python -m benchmarks rules",
            "options": asked,
            "environment": _environment(available),
            "problems": problems,
            "costs": costs,
        }
        path = write_json("rules" if complete else "rules-custom", result)
        checkpoint.clear()
        say(f"Written: {path.name}")
        return rules_report.write(read_json(path.stem)) if complete else result

    def resolve(self) -> list[str]:
        """The names of the problems that are meant; UsageError if there are none."""
        require(self.repetitions >= 1, "repetitions must be 1 or more")
        require("rbpjax" in self.libraries, "libraries must include rbpjax")
        for library in self.libraries:
            require(
                library in LIBRARIES,
                f"unknown library {library!r}; choose from {', '.join(LIBRARIES)}",
            )
        for prefix in self.problems:
            require(
                any(name.startswith(prefix) for name in PROBLEMS),
                f"unknown problem {prefix!r}; choose from {', '.join(PROBLEMS)}",
            )
        exact = [p for p in self.problems if p in PROBLEMS]
        starts = tuple(p for p in self.problems if p not in PROBLEMS)
        return [n for n in PROBLEMS if n in exact or n.startswith(starts)]

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
        return entry

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


def _once(checkpoint: Checkpoint, name: str, make: Callable[[], Any]) -> Any:
    """What an interrupted run has left under ``name``, or made now and left."""
    path = checkpoint.folder / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    result = json.loads(json.dumps(make(), default=_plain))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    os.replace(partial, path)
    return result


def _plain(x: Any) -> Any:
    return np.asarray(x).tolist()


def _environment(libraries: list[str]) -> dict[str, Any]:
    where = environment()
    names = {"optimistix": ("optimistix", "lineax"), "torchdeq": ("torch", "torchdeq")}
    for library in libraries:
        for name in names.get(library, (library,)):
            try:
                where["packages"][name] = version(name)
            except PackageNotFoundError:
                continue
    return where
