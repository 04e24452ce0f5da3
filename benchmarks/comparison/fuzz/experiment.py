"""``python -m benchmarks fuzz``: 100,000 random problems against dense answers."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax
from benchmarks.comparison.fuzz.draws import Problem, Setting, draw_problems
from benchmarks.comparison.fuzz.draws import draw_setting as draw
from benchmarks.comparison.fuzz.maps import PRECISIONS
from benchmarks.comparison.fuzz.solving import can_verify, run
from benchmarks.comparison.fuzz.verdicts import COLUMNS, Outcome, dense, judge, summary
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, Natural, require
from benchmarks.harness.progress import say
from benchmarks.harness.results import code, plain, record, write_json
from benchmarks.harness.tables import table
from benchmarks.harness.training import train

QUICK = {"num": 320, "group": 40}


@dataclasses.dataclass(frozen=True)
class Fuzz:
    """Count gradients that are wrong although the report says converged."""

    name: ClassVar[str] = "fuzz"

    num: Count = 100_000
    """Number of problems; rounded up to whole groups."""
    seed: Natural = 0
    """Of the generator."""
    group: Count = 400
    """Problems that share a setting, and so a compilation."""
    threads: Count = 2
    """Groups that are at work at the same time."""
    quick: bool = False
    """A few hundred problems, to see that it works."""
    replay: str | None = None
    """GROUP:PROBLEM, as the result file names it: say all about this one and stop.

    With the same seed and size of groups as the run that found it."""
    fresh: bool = False
    """Forget what an interrupted run left."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/fuzz.json`` and prints its tables."""
        if self.quick:
            return dataclasses.replace(self, quick=False, **QUICK).run()
        if self.replay is not None:
            return self.show(self.replay)
        modes = ("default", "verified") if can_verify() else ("default",)
        groups = -(-self.num // self.group)
        names = ("num", "seed", "group", "threads")
        kept = {name: getattr(self, name) for name in names}
        # Verdicts of two versions of the library are not to be added up.
        sources = code(Path(rbpjax.__file__).parent)["sources"]
        checkpoints = Checkpoints("fuzz", kept | {"sources": sources}, self.fresh)
        blank = np.zeros((len(modes), groups, self.group))

        def block(found: Outcome, b: int) -> Outcome:
            first = b * self.threads
            numbers = range(first, min(first + self.threads, groups))
            with ThreadPoolExecutor(self.threads) as pool:
                new = list(pool.map(lambda i: self.look(i, modes), numbers))
            jax.clear_caches()  # no group's programs serve another one
            put = lambda kept, *mine: kept.at[:, first : first + len(mine)].set(
                jnp.stack(mine, 1)
            )
            return jax.tree.map(put, found, *new)

        with jax.enable_x64(True):
            start = Outcome(*(jnp.asarray(blank) for _ in Outcome._fields))
            blocks = -(-groups // self.threads)
            found = train(checkpoints, "outcomes", start, block, blocks, every=10)
        found = jax.tree.map(np.asarray, found)
        settings = [self.setting(i) for i in range(groups)]
        parts = {
            mode: summary(Outcome(*(v[m] for v in found)), settings)
            for m, mode in enumerate(modes)
        }
        other = [
            f"--{name} {value}"
            for name, value in kept.items()
            if value != getattr(Fuzz, name)
        ]
        result = record("fuzz", " ".join(["fuzz", *other]), kept, **parts)
        path = write_json("fuzz", result)
        for mode in modes:
            say(f"\n{mode} estimate\n\n{table(rows(parts[mode]))}")
        say(f"\nWritten: {path.name}")
        checkpoints.clear()
        return result

    def setting(self, number: int) -> Setting:
        """Of one group."""
        return draw(np.random.default_rng((self.seed, number)), number, self.seed)

    def problems(self, number: int) -> Problem:
        """Of one group."""
        random = np.random.default_rng((self.seed, number, 1))
        return draw_problems(random, self.setting(number), self.group)

    def look(self, number: int, modes: tuple[str, ...]) -> Outcome:
        """Draws a group, solves it in each mode, and judges: a row a mode."""
        # Of this thread, whatever its makers have set.
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            setting, problems = self.setting(number), self.problems(number)
            found = [run(setting, problems, verify=m == "verified") for m in modes]
            outcomes = [judge(setting, problems, one) for one in found]
        return jax.tree.map(lambda *rows: np.stack(rows), *outcomes)

    def show(self, which: str) -> dict[str, Any]:
        """One problem: what it is, what was found, and what is right."""
        parts = which.split(":")
        numbers = [int(part) for part in parts if part.isdecimal()]
        require(len(parts) == len(numbers) == 2, f"--replay: 3:17, say; got {which!r}")
        i, j = numbers
        require(j < self.group, f"--replay: groups have {self.group}; got {which!r}")
        with jax.enable_x64(True):
            setting, problems = self.setting(i), self.problems(i)
            found = run(setting, problems)
            right = dense(setting, problems, found)
            outcome = judge(setting, problems, found)
        one = lambda tree: jax.tree.map(lambda v: v[j], tree)
        case = {
            "setting": {k: str(v) for k, v in setting._asdict().items()},
            "accuracy": PRECISIONS[setting.precision].accuracy,
            "outcome": one(outcome)._asdict(),
            "problem": one(problems)._asdict(),
            "found": one(found)._asdict(),
            "right": one(right)._asdict(),
        }
        if can_verify():
            with jax.enable_x64(True):
                verified = judge(setting, problems, run(setting, problems, verify=True))
            case["outcome, verified"] = one(verified)._asdict()
        for head, content in case.items():
            say(f"{head}: {content}")
        return plain({"outcome": case["outcome"]})


def rows(part: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each kind, precision, solver and rule."""
    made = [("all", "", part["all"])]
    for axis in ("kind", "precision", "units", "forward", "backward", "Jacobian"):
        made += [(axis, name, counts) for name, counts in part[f"by {axis}"].items()]
    return [
        {"by": axis, "which": name}
        | {column: f"{n}" for column, n in zip(COLUMNS, counts, strict=True)}
        for axis, name, counts in made
    ]
