"""What a run has found, from its result file: a table and the figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json


def say_run(kind: str, seed: int, history: Any, found: Mapping[str, Any]) -> None:
    """A line for one network."""
    last = {n: f"{part['bits'][-1]:.4g}" for n, part in found.items()}
    spent = float(history["core_seconds"][-1])
    say(f"{kind}, seed {seed}: {spent:.0f} core-seconds, % of bits by length {last}")


def show(name: str) -> dict[str, Any]:
    """The table of a result file on standard output; the file's content."""
    return read_json(name)
