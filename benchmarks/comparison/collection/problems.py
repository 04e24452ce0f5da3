"""All problems of the collection, and which half of them may be tuned to."""

from __future__ import annotations

from functools import cache

import numpy as np

from benchmarks.comparison.collection import (
    decisions,
    differential,
    equations,
    networks,
    oddities,
    optimization,
)
from benchmarks.comparison.collection.problem import Problems

FILES = (networks, optimization, equations, differential, decisions, oddities)


@cache
def problems() -> Problems:
    """Name -> problem."""
    found: Problems = {}
    for file in FILES:
        found |= file.problems()
    return found


@cache
def tuned() -> frozenset[str]:
    """The half that constants of a solver may be chosen on; the others are held out."""
    names = sorted(problems())
    chosen = np.random.default_rng(119).permutation(len(names))[: len(names) // 2]
    return frozenset(names[i] for i in chosen)
