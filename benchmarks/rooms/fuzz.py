"""Looks for what is wrong without a word in streaming, perturbation and unitary cells.

A *group* is a set-up, drawn with its shapes, dtypes, scales and the transformation that
it runs under, and compiled once; a *case* is one of its problems. Every case has an
oracle of another kind: unrolled autodiff in float64, the mean over all sign patterns, a
dense matrix, the same problem in other units. It is *silently wrong* if its error
exceeds a bound that is derived where the kind of case is written.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, Natural
from benchmarks.harness.progress import say
from benchmarks.harness.results import record, write_json
from benchmarks.harness.tables import table
from benchmarks.harness.training import train
from benchmarks.rooms import newer, others, paper_code, streaming

KINDS = {**streaming.KINDS, **others.KINDS, **paper_code.KINDS, **newer.KINDS}
ENUMERATED = 4  # kinds whose groups are smaller, as all signs are run


class Outcome(NamedTuple):
    """What came of each group; arrays, one entry a group.

    Attributes:
      cases: how many it had.
      silent: how many of them were wrong.
      worst: the largest error ÷ bound.
      place: which case that was.
      crashed: whether it raised.
    """

    cases: jax.Array
    silent: jax.Array
    worst: jax.Array
    place: jax.Array
    crashed: jax.Array


def run_group(seed: int, i: int, size: int) -> tuple[float, ...]:
    """The outcome of group ``i``; an exception on right use is one of them."""
    names = list(KINDS)
    kind = names[i % len(names)]
    try:
        with warnings.catch_warnings():
            # A donated buffer without a result of its shape: nothing is wrong with it.
            warnings.filterwarnings("ignore", "Some donated buffers")
            _, excess = KINDS[kind](np.random.default_rng((seed, i)), size)
    except Exception as error:
        say(f"group {i}, {kind}: {type(error).__name__}: {error}")
        return 0, 0, 0, 0, 1
    excess = np.where(np.isnan(excess), np.inf, excess)
    return len(excess), (excess > 1).sum(), excess.max(), excess.argmax(), 0


@dataclasses.dataclass(frozen=True)
class FuzzRooms:
    """Count what is wrong without a word in the rooms of online, perturb, unitary."""

    name: ClassVar[str] = "fuzz-rooms"

    cases: Count = 20_000
    """How many, at least; every kind has as many groups."""
    seed: Natural = 0
    """Of the generator."""
    group: Count = 200
    """Cases that share a set-up and a compilation; 100 where signs are enumerated."""
    fresh: bool = False
    """Forget what an interrupted run left."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/fuzz-rooms.json`` and prints a row a kind."""
        few = min(self.group, 100)
        a_round = self.group * (len(KINDS) - ENUMERATED) + ENUMERATED * few
        groups = len(KINDS) * -(-self.cases // a_round)
        options = dataclasses.asdict(self) | {"fresh": None}
        checkpoints = Checkpoints("fuzz-rooms", options, self.fresh)
        with jax.enable_x64(True):

            def look(found: Outcome, i: int) -> Outcome:
                new = run_group(self.seed, i, self.group)
                if i % 10 == 9:
                    jax.clear_caches()  # no group compiles what another has
                pairs = zip(found, new, strict=True)
                return Outcome(*(a.at[i].set(b) for a, b in pairs))

            start = Outcome(*5 * (jnp.zeros(groups),))
            found = train(checkpoints, "outcomes", start, look, groups, every=10)
        result = record(
            "fuzz-rooms",
            "fuzz-rooms",
            dataclasses.asdict(self),
            **summary(Outcome(*map(np.asarray, found))),
        )
        path = write_json("fuzz-rooms", result)
        say(table(rows(result)))
        say(f"\nWritten: {path.name}")
        checkpoints.clear()
        return result


def summary(found: Outcome) -> dict[str, Any]:
    """Counts, and the worst case, of each kind."""
    kinds = {}
    for k, name in enumerate(KINDS):
        mine = slice(k, None, len(KINDS))
        worst = int(np.argmax(found.worst[mine]))
        group = k + worst * len(KINDS)
        kinds[name] = {
            "groups": len(found.cases[mine]),
            "cases": int(found.cases[mine].sum()),
            "silently_wrong": int(found.silent[mine].sum()),
            "crashed_groups": int(found.crashed[mine].sum()),
            "worst": {
                "error ÷ bound": float(found.worst[group]),
                "group": group,
                "case": int(found.place[group]),
            },
        }
    total = lambda key: sum(kind[key] for kind in kinds.values())
    keys = ("cases", "silently_wrong", "crashed_groups")
    return {key: total(key) for key in keys} | {"kinds": kinds}


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a kind."""
    return [
        {
            "kind": name,
            "cases": f"{kind['cases']}",
            "silently wrong": f"{kind['silently_wrong']}",
            "crashed groups": f"{kind['crashed_groups']}",
            "worst error ÷ bound": f"{kind['worst']['error ÷ bound']:.2g}",
        }
        for name, kind in result["kinds"].items()
    ]
