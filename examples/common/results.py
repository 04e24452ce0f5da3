"""Result files of examples: beside those of the benchmarks, under the same heads."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness import manifest
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import table


class Report(Protocol):
    """The module of an example that reads its result file."""

    def rows(self, result: Mapping[str, Any], /) -> list[dict[str, str]]:
        """Of the table."""
        ...

    def draw(self, result: Mapping[str, Any], name: str, /) -> Path | None:
        """The file of the figure, if there is one."""
        ...


def show(report: Report, name: str) -> dict[str, Any]:
    """Table and figure of a result file; its content."""
    result = read_json(name)
    say(table(report.rows(result)))
    figure = report.draw(result, name)
    say(f"Written: {name}.json" + (f", {figure.name}" if figure else ""))
    return result


def kept(example: Any) -> dict[str, Any]:
    """The options that decide the result."""
    return {k: v for k, v in dataclasses.asdict(example).items() if k != "fresh"}


def opened(name: str, example: Any) -> Checkpoints:
    """What earlier runs have left of each network and seed, whichever they had."""
    apart = ("kinds", "seeds")
    options = {k: v for k, v in kept(example).items() if k not in apart}
    options["examples"] = manifest.sources(Path(__file__).parents[1])  # or start anew
    return Checkpoints(f"example-{name}", options, example.fresh)


def write(name: str, example: Any, **content: Any) -> Path:
    """Writes ``benchmarks/results/example-NAME.json``; the path.

    A run with options that are not the default writes ``example-NAME-custom.json``.
    """
    usual = kept(example) == kept(type(example)())
    found = record(f"example-{name}", name, kept(example), **content)
    given = [] if usual else sys.argv[1:]
    found["command"] = " ".join(["python -m", f"examples.{name}.train", *given])
    return write_json(f"example-{name}" + "-custom" * (not usual), found)
