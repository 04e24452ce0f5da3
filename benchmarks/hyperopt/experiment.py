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
from typing import Annotated, Any, ClassVar

import jax

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, Dataset, OneOf, Seeds
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import table
from benchmarks.hyperopt import cleaning, decay, paper, quadratics

PARTS = {
    "cleaning": cleaning.PART,
    "decay": decay.PART,
    "quadratics": quadratics.PART,
    "paper": paper.PART,
}


@dataclasses.dataclass(frozen=True)
class Hyperopt:
    """Hyperparameters by hypergradients: data cleaning, weight decay, step sizes."""

    name: ClassVar[str] = "hyperopt"

    parts: Annotated[tuple[str, ...], OneOf(PARTS)] = tuple(PARTS)
    """Any of cleaning, decay, quadratics, paper."""
    dataset: Dataset = "digits"
    """digits (bundled with scikit-learn) or mnist (downloaded, or in RBPJAX_DATA)."""
    seeds: Seeds = tuple(range(10))
    """Seeds of splits, labels and weights."""
    steps: Count | None = None
    """Outer steps of the trained parts; none: each part's own."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Runs the parts: a JSON and a figure for each."""
        standard = Hyperopt(self.parts, self.dataset, fresh=self.fresh) == self
        for part in self.parts:
            self.run_part(part, "" if standard else "-custom")

    def run_part(self, part: str, custom: str) -> None:
        """One part: measure, write, show."""
        room = PARTS[part]
        options: dict[str, Any] = {"seeds": self.seeds}
        dataset = f" --dataset {self.dataset}" if self.dataset == "mnist" else ""
        options |= {"dataset": self.dataset}
        options["steps"] = room.steps if self.steps is None else self.steps
        name = f"hyperopt-{part}{'-mnist' if dataset else ''}{custom}"
        checkpoints = Checkpoints(name, options, self.fresh)
        with jax.enable_x64(room.x64):
            found = room.measure(
                self.dataset, self.seeds, options["steps"], checkpoints
            )
            command = f"hyperopt --parts {part}{dataset}"
            content = record(f"hyperopt, {part}", command, options, **found)
        path = write_json(name, content)
        checkpoints.clear()
        result = read_json(path.stem)
        say(f"\n{part}\n\n{table(room.rows(result))}\n")
        if room.differences is not None:
            say(room.differences(result))
        say(f"Written: {path.name}, {room.draw(result, path.stem).name}")
