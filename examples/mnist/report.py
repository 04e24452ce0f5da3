"""What a run has found, from its result file: a table and a figure."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json
from benchmarks.harness.tables import mean_std, table


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A line for each network."""
    made = []
    for kind, runs in result["networks"].items():
        spent = [run["history"]["core_seconds"][-1] / 60 for run in runs]
        row = {
            "network": kind,
            "test error, %": mean_std([run["test_error"] for run in runs], 2),
            "core-minutes": mean_std(spent, 2),
            "memory of a gradient, MB": f"{result['memory'][kind] / 1e6:.1f}",
        }
        made.append(row)
    return made


def show(name: str) -> dict[str, Any]:
    """The table of a result file on standard output; the file's content."""
    result = read_json(name)
    say(table(rows(result)))
    return result
