"""What the parts of ``hyperopt`` have in common: what they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Part(NamedTuple):
    """One part of the experiment.

    Attributes:
      title: of its table.
      note: what has to be known to read it.
      x64: whether it is measured in float64.
      steps: outer steps, unless the user says how many; None if nothing is trained.
      measure: ``(dataset, seeds, steps, checkpoints) -> content of the result file``.
      rows: a result as the rows of a table.
      draw: ``(result, name) -> path of the figure``.
      differences: what the other rules lose against the default, if that is asked.
    """

    title: str
    note: str
    x64: bool
    steps: int | None
    measure: Callable[..., dict[str, Any]]
    rows: Callable[[dict[str, Any]], list[dict[str, str]]]
    draw: Callable[[dict[str, Any], str], Any]
    differences: Callable[[dict[str, Any]], str] | None = None
