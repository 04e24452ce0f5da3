"""``python -m benchmarks collection``: classic fixed points with defaults only.

119 problems in two precisions, each by this library's solvers and its peers', with the
gradient by the default rule; ``verdict.py`` says what counts as solved. Half of them
are for whoever tunes a solver, and half are held out; ``--random`` has others.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import rbpjax
from benchmarks.comparison.collection import judge, problem, solvers
from benchmarks.comparison.collection.drawn import KINDS, SIZES
from benchmarks.comparison.collection.judge import ALLOWED
from benchmarks.comparison.collection.problems import FILES, problems, tuned
from benchmarks.comparison.collection.solvers import OURS, SOLVERS
from benchmarks.comparison.collection.summary import rows, summary, summary_of_kinds
from benchmarks.comparison.collection.verdict import describe, solve_all, solve_kind
from benchmarks.comparison.peers import installed
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, Natural, OneOf, require
from benchmarks.harness.progress import say
from benchmarks.harness.results import code, read_json, record, write_json
from benchmarks.harness.tables import table

PRECISIONS = tuple(ALLOWED)


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
    keep_peers: bool = False
    """Rows of other libraries from the result file: they do not depend on this code."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/collection.json``, or ``-random``, and prints its table."""
        return self.run_random() if self.random else self.run_classic()

    def run_random(self) -> dict[str, Any]:
        """The random problems, a group of a kind and size at a time."""
        chosen = [s for s in self.solver if s in OURS]
        require(bool(chosen), f"--solver: with --random any of {', '.join(OURS)}")
        size = -(-self.count // (len(KINDS) * len(SIZES)))
        parts = {
            str(i): partial(solve_kind, kind=kind, size=size, seed=self.seed)
            for i, kind in enumerate(KINDS)
        }
        kept = {"size": size, "seed": self.seed}
        return self.measure("collection-random", chosen, parts, kept)

    def run_classic(self) -> dict[str, Any]:
        """The 119, a family at a time."""
        names = [n for n in problems() if n.startswith(self.problems)]
        require(bool(names), f"--problems: none begins with {list(self.problems)}")
        before = _rows_of_peers() if self.keep_peers else {}
        available = [s for s in self.solver if s not in before and _available(s)]
        parts = {}
        for family in dict.fromkeys(problems()[n].family for n in names):
            mine = [n for n in names if problems()[n].family == family]
            parts[family] = partial(solve_all, names=mine)
        needed = {"default", *(s for s in SOLVERS if s not in OURS)}
        whole = (
            set(available) | set(before) >= needed
            and len(names) == len(problems())
            and self.precision == PRECISIONS
        )
        name = "collection" if whole else "collection-custom"
        return self.measure(name, available, parts, {"names": names}, before)

    def measure(
        self,
        name: str,
        chosen: list[str],
        parts: dict[str, Callable],
        kept: dict[str, Any],
        before: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """All parts by all solvers; the result file, with rows of an earlier one."""
        kept = kept | {"sources": _sources()}
        checkpoints = Checkpoints("collection", kept, self.fresh)
        summaries: dict[str, Any] = {}
        for solver in chosen:
            summaries[solver] = {}
            for precision in self.precision:
                found: dict[str, Any] = {}
                for part, solve in parts.items():
                    make = partial(solve, solver, precision)
                    found |= checkpoints.once(f"{solver}-{precision}-{part}", make)
                made = summary_of_kinds(found) if self.random else summary(found)
                if solver == "default" and not self.random:
                    made["problems"] = {n: describe(e) for n, e in found.items()}
                summaries[solver][precision] = made
                say(table(rows({solver: {precision: made}})))
        options = dataclasses.asdict(self) | {"solver": chosen}
        command = "collection" + " --random" * self.random
        tune = [] if self.random else sorted(tuned())
        solved = summaries | (before or {})
        result = record(
            "collection",
            command,
            options,
            problems_sources=problems_sources(),
            tune=tune,
            peers=_versions(),
            solvers=solved,
        )
        path = write_json(name, result)
        say(f"\n{table(rows(solved))}\nWritten: {path.name}")
        checkpoints.clear()
        return result


def _rows_of_peers() -> dict[str, Any]:
    """What the result file has of other libraries, if it is of these very problems."""
    result = read_json("collection")
    same = result["problems_sources"] == problems_sources()
    require(same, "--keep-peers: the result file is of other problems; run all of it")
    return {s: e for s, e in result["solvers"].items() if s not in OURS}


def problems_sources() -> str:
    """A hash of all that rows of other libraries depend on."""
    digest = hashlib.sha256()
    for module in (*FILES, problem, judge, solvers):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> list[str]:
    """What a result depends on: another version never resumes from it."""
    folders = Path(rbpjax.__file__).parent, Path(__file__).parent
    return [code(folder)["sources"] for folder in folders]


def _versions() -> dict[str, str]:
    """Of the other libraries that are here."""
    here = {name.split("-")[0] for name in SOLVERS if name not in OURS}
    return {name: version(name) for name in sorted(here) if installed(name) is None}


def _available(solver: str) -> bool:
    library = solver.split("-")[0]
    why = None if solver in OURS else installed(library)
    if why:
        say(f"skipped {solver}: {why}")
    return why is None
