"""Hyperparameter optimization: an optax update as the step function.

Parts, each with a result file of its own:

- ``cleaning`` and ``decay``: hyperparameters that move the fixed point of training
  (weights of examples; weight decay of layers) and a validation loss;
- ``quadratics``: hypergradients with a closed form, error against products;
- ``paper``: the set-up of Liao et al. 2018, section 5.3, step sizes and momenta through
  100 steps of training, which is no fixed point.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from benchmarks.harness import (
    Checkpoint,
    environment,
    read_json,
    require,
    say,
    table,
    write_json,
)
from benchmarks.hyperopt import cleaning, decay, paper, quadratics

PARTS = {
    "cleaning": cleaning,
    "decay": decay,
    "quadratics": quadratics,
    "paper": paper,
}


@dataclasses.dataclass(frozen=True)
class Hyperopt:
    """Hyperparameters by hypergradients: data cleaning, weight decay, step sizes."""

    parts: tuple[str, ...] = tuple(PARTS)
    """Any of cleaning, decay, quadratics, paper."""
    dataset: str = "digits"
    """digits (bundled with scikit-learn) or mnist (downloaded, or in RBPJAX_DATA)."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Seeds of splits, labels and weights."""
    steps: int | None = None
    """Outer steps of the trained parts; none: each part's own."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Runs the parts: a JSON and a figure for each."""
        self.check()
        standard = Hyperopt(self.parts, self.dataset, fresh=self.fresh) == self
        for part in self.parts:
            self.run_part(part, "" if standard else "-custom")

    def run_part(self, part: str, custom: str) -> None:
        """One part: measure, write, show."""
        room = PARTS[part]
        options: dict[str, Any] = {"seeds": self.seeds}
        dataset = f" --dataset {self.dataset}" if self.dataset == "mnist" else ""
        options |= {"dataset": self.dataset}
        options["steps"] = room.STEPS if self.steps is None else self.steps
        name = f"hyperopt-{part}{'-mnist' if dataset else ''}{custom}"
        checkpoint = Checkpoint(name, options, self.fresh)
        with jax.enable_x64(room.X64):
            content = {
                "experiment": f"hyperopt, {part}",
                "command": f"python -m benchmarks hyperopt --parts {part}{dataset}",
                "options": options,
                "environment": environment(),
                **room.measure(self.dataset, self.seeds, options["steps"], checkpoint),
            }
        path = write_json(name, content)
        checkpoint.clear()
        result = read_json(path.stem)
        say(f"\n{part}\n\n{table(room.rows(result))}\n")
        if hasattr(room, "differences"):
            say(room.differences(result))
        say(f"Written: {path.name}, {room.draw(result, path.stem).name}")

    def check(self) -> None:
        """Raises UsageError for options that make no sense."""
        require(
            bool(self.parts) and set(self.parts) <= set(PARTS),
            f"--parts: any of {', '.join(PARTS)}; got {list(self.parts)}",
        )
        require(
            self.dataset in ("digits", "mnist"),
            f"--dataset: digits or mnist; got {self.dataset!r}",
        )
        require(
            len(set(self.seeds)) == len(self.seeds) > 0 and min(self.seeds) >= 0,
            f"--seeds: different numbers of at least 0; got {list(self.seeds)}",
        )
        require(
            self.steps is None or self.steps >= 1,
            f"--steps: at least 1; got {self.steps}",
        )
