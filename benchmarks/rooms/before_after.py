"""``python -m benchmarks rooms-before-after``: two checkouts, the other regimes.

Streaming estimators, perturbation rules and unitary histories of this checkout against
those of another one, each in a process of its own; the two take turns, in random order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import numpy as np

from benchmarks.comparison.before_after import PROJECT, SIDES, checked_out, side_of
from benchmarks.harness.measurement import spread
from benchmarks.harness.options import OneOf, Within
from benchmarks.harness.progress import progress, say
from benchmarks.harness.results import code, record, write_json
from benchmarks.harness.tables import table
from benchmarks.rooms.jobs import JOBS

WORKER = "benchmarks.rooms.jobs"
REPEATS = 50
"""Calls in a turn, at most."""


@dataclasses.dataclass(frozen=True)
class RoomsBeforeAfter:
    """Time the other regimes in this checkout against those in another one."""

    name: ClassVar[str] = "rooms-before-after"

    checkout: str
    """The other checkout: the folder that has rbpjax/ in it."""
    jobs: Annotated[tuple[str, ...], OneOf(JOBS)] = tuple(JOBS)
    """What to time."""
    turns: Annotated[int, Within(15)] = 15
    """Turns of each job and checkout on the clock."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/rooms-before-after.json`` and prints its table."""
        other = checked_out(self.checkout)
        folders = {"before": other, "after": PROJECT}
        codes = {side: code(folder / "rbpjax") for side, folder in folders.items()}
        entries = []
        with side_of(PROJECT, WORKER) as after, side_of(other, WORKER) as before:
            sides = {"before": before, "after": after}
            for job in self.jobs:
                entries.append(self.measure(job, sides))
                say(table(rows(entries[-1:])))
        options = {"jobs": list(self.jobs), "turns": self.turns}
        command = "rooms-before-after"
        result = record(command, command, options, code=codes, entries=entries)
        whole = self.jobs == tuple(JOBS)
        path = write_json(command if whole else f"{command}-custom", result)
        say(f"\n{table(rows(entries))}\nWritten: {path.name}")
        return result

    def measure(self, job: str, sides: dict[str, Any]) -> dict[str, Any]:
        """One job on both sides."""
        memory = {s: sides[s]("prepare", job)["temporary_bytes"] for s in SIDES}
        once = min(sides[s]("time", 1)["seconds"] for s in SIDES for _ in range(3))
        repeats = min(max(math.ceil(0.05 / once), 1), REPEATS)
        times: dict[str, list[float]] = {s: [] for s in SIDES}
        random = np.random.default_rng(0)
        for _ in progress(range(self.turns), self.turns, job):
            for s in random.permutation(SIDES).tolist():
                times[s].append(sides[s]("time", repeats)["seconds"])
        ratio = np.array(times["after"]) / np.array(times["before"])
        return {
            "job": job,
            "ratio": spread(ratio.tolist()),
            "seconds": {s: spread(times[s]) for s in SIDES},
            "temporary_bytes": memory,
        }


def rows(entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row a job."""
    made = []
    for entry in entries:
        ratio, memory = entry["ratio"], entry["temporary_bytes"]
        made.append(
            {
                "job": entry["job"],
                "time, after ÷ before": f"{ratio['median']:.2f} "
                f"[{ratio['q25']:.2f}, {ratio['q75']:.2f}]",
                "temporary bytes, before": f"{memory['before']:,}",
                "after": f"{memory['after']:,}",
            }
        )
    return made
