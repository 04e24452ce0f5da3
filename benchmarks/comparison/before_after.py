"""``python -m benchmarks before-after``: two checkouts of this project compared.

The problems of ``rules``, as this checkout has them, and the methods of ``rbpjax`` at
the settings that ``results/rules.json`` has for an error of 1e-3. Each checkout has a
process of its own; the two take turns, in random order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from benchmarks.comparison.problems import PROBLEMS, resolve
from benchmarks.comparison.summary import rows as tuned
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.measurement import spread
from benchmarks.harness.options import UsageError, Within, require
from benchmarks.harness.progress import progress, say
from benchmarks.harness.results import code, read_json, record, write_json
from benchmarks.harness.tables import table

METHODS = tuple(
    f"rbpjax {name}"
    for name in (
        "Adaptive",  # the default
        "Neumann",
        "CGNormal",
        "BiCGSTAB",
        "GMRES",
        "RBP(Anderson)",
        "RBP(RRE)",
        "RRE + RBP(RRE)",
    )
)
TARGET = "0.001"
UNTUNED = (2e-4, 2e-4)  # where nothing was tuned: mostly an error of 1e-3
SIDES = ("before", "after")
PROJECT = Path(__file__).parent.parent.parent
# The library of one folder, and everything else from another.
BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); import rbpjax; "
    "sys.path[0] = sys.argv[2]; from {worker} import serve; serve()"
)
WORKER = "benchmarks.comparison.worker"


@dataclasses.dataclass(frozen=True)
class BeforeAfter:
    """Time our methods in this checkout against those in another one."""

    name: ClassVar[str] = "before-after"

    checkout: str
    """The other checkout: the folder that has rbpjax/ in it."""
    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Names from the benchmark ``rules``, or beginnings of names."""
    turns: Annotated[int, Within(15)] = 15
    """Turns of each method and checkout on the clock."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/before-after.json`` and prints its table."""
        other = checked_out(self.checkout)
        names = resolve(self.problems)
        codes = {"before": code(other / "rbpjax"), "after": code(PROJECT / "rbpjax")}
        options = {"problems": names, "turns": self.turns}
        kept = {"turns": self.turns, "sources": [c["sources"] for c in codes.values()]}
        checkpoints = Checkpoints("before-after", kept, self.fresh)
        settings = _settings()
        entries: list[dict[str, Any]] = []
        for name in names:
            make = partial(self.measure, name, other, settings.get(name, {}))
            found = checkpoints.once(name, make)
            say(table(rows(found)))
            entries += found
        result = record(
            "before-after", "before-after", options, code=codes, entries=entries
        )
        whole = names == list(PROBLEMS)
        path = write_json("before-after" if whole else "before-after-custom", result)
        checkpoints.clear()
        say(f"\n{overall(entries)}\nWritten: {path.name}")
        return result

    def measure(
        self, name: str, other: Path, settings: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """All methods on one problem."""
        with side_of(PROJECT, WORKER) as after, side_of(other, WORKER) as before:
            sides = {"before": before, "after": after}
            for side in sides.values():
                side("problem", name)
            prepared, chosen = {}, {}
            for method in METHODS:
                if name.startswith("family") and "+" in method:
                    continue  # it starts at its fixed point
                chosen[method] = settings.get(method, UNTUNED)
                each = {s: sides[s]("prepare", method, chosen[method]) for s in SIDES}
                if not any("refused" in found for found in each.values()):
                    prepared[method] = each
            times: dict[str, dict[str, list[float]]] = {
                m: {s: [] for s in SIDES} for m in prepared
            }
            random = np.random.default_rng(0)
            for _ in progress(range(self.turns), self.turns, name):
                for method in random.permutation(list(prepared)).tolist():
                    best = min(prepared[method][s]["seconds"] for s in SIDES)
                    repeats = min(max(math.ceil(1e-3 / best), 1), 20)
                    for s in random.permutation(SIDES).tolist():
                        found = sides[s]("time", method, repeats)
                        times[method][s].append(found["seconds"])
        return [
            {
                "problem": PROBLEMS[name][0],
                "method": method.removeprefix("rbpjax "),
                "setting": chosen[method],
                "ratio": spread(
                    (np.array(t["after"]) / np.array(t["before"])).tolist()
                ),
                "seconds": {s: spread(t[s]) for s in SIDES},
                "steps": {s: prepared[method][s]["steps"] for s in SIDES},
                "error": {s: prepared[method][s]["error"] for s in SIDES},
            }
            for method, t in times.items()
        ]


def checked_out(checkout: str) -> Path:
    """The folder that has the other library in it."""
    other = Path(checkout).expanduser().absolute()
    package = other / "rbpjax" / "__init__.py"
    require(package.is_file(), f"--checkout: no rbpjax/ in {other}")
    return other


@contextlib.contextmanager
def side_of(library: Path, worker: str) -> Iterator[Any]:
    """Asks a worker with the library of that folder; ``ask(action, *arguments)``.

    ``worker``: the module whose ``serve`` answers.
    """
    boot = BOOT.format(worker=worker)
    command = [sys.executable, "-P", "-c", boot, str(library), str(PROJECT)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(*message: Any) -> dict[str, Any]:
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise UsageError(
                f"the process with {library.name}/rbpjax died at {message[:2]}"
            ) from None

    try:
        loaded = Path(ask("library")["folder"])
        require(
            loaded == library / "rbpjax", f"{loaded} was loaded, not that of {library}"
        )
        yield ask
    finally:
        process.stdin.close()
        process.terminate()
        process.wait()
        process.stdout.close()


def _settings() -> dict[str, dict[str, tuple[float, float]]]:
    """By problem and method, what ``rules`` found for the target, if it has run."""
    try:
        problems = read_json("rules")["problems"]
    except UsageError:
        return {}
    return {
        name: {
            method: (row["forward"], row["backward"])
            for method, row in tuned(entry, TARGET).items()
        }
        for name, entry in problems.items()
    }


def rows(entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row a problem and method."""
    made = []
    for entry in entries:
        ratio = entry["ratio"]
        made.append(
            {
                "problem": entry["problem"],
                "method": entry["method"],
                "after ÷ before": f"{ratio['median']:.2f} "
                f"[{ratio['q25']:.2f}, {ratio['q75']:.2f}]",
            }
            | {
                f"steps {s}": "{forward} + {backward}".format(**entry["steps"][s])
                for s in SIDES
            }
        )
    return made


def overall(entries: list[dict[str, Any]]) -> str:
    """The geometric mean of the ratios, and those above 1.05."""
    ratios = [entry["ratio"]["median"] for entry in entries]
    slower = [
        f"{e['problem']}, {e['method']} ({e['ratio']['median']:.2f})"
        for e in entries
        if e["ratio"]["median"] > 1.05
    ]
    return (
        f"Geometric mean {np.exp(np.mean(np.log(ratios))):.3f}; slower by more than "
        f"5 %: {'; '.join(slower) or 'none'}."
    )
