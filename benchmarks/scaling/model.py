"""How long a step takes on many accelerators: four numbers of the machine, and counts.

A step takes as long as its products or its memory traffic, whichever is longer, and
then its collectives, none of which is hidden behind them:

    t = max(flops / F, memory / M) + Σ over collectives of latency and bytes.

A ring over N devices moves (N - 1) / N of the result of an all-gather through each
link, in N - 1 turns; an all-reduce is a reduce-scatter and an all-gather, twice that.
Latencies are those of a tree, log₂ N turns, which is what libraries take for small
messages. So it is a pessimist about overlap, and an optimist about congestion.

Counts are those of one device. They are taken from a program that was compiled for
N = 8 virtual devices, and carried over to another N: the products and the memory
traffic of the batch go with the rows of a device; weights are gathered, and gradients
summed, whole, whatever N is, so that bytes and numbers of collectives stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Machine(NamedTuple):
    """An accelerator and its links, as reached in practice, not as advertised.

    Attributes:
      flops: of matrix products, a second.
      memory: bytes a second between its memory and itself.
      link: bytes a second from one device to the next.
      latency: seconds that a message takes to begin.
    """

    flops: float
    memory: float
    link: float
    latency: float


TURNS = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1, "all-to-all": 1}


def computing(machine: Machine, counts: Mapping[str, Any], rows: float = 1) -> float:
    """Seconds of products or memory traffic, with ``rows`` times the rows."""
    return rows * max(
        counts["flops"] / machine.flops, counts["memory"] / machine.memory
    )


def talking(machine: Machine, counts: Mapping[str, Any], devices: int) -> float:
    """Seconds of collectives over so many devices."""
    if devices == 1:
        return 0.0
    total = 0.0
    for kind, found in counts["collectives"].items():
        turns = TURNS.get(kind, 1)
        share = (devices - 1) / devices * turns
        # The result of a reduce-scatter is a part of what goes around.
        whole = found["bytes"] * (devices if kind == "reduce-scatter" else 1)
        total += share * whole / machine.link
        total += found["count"] * turns * math.log2(devices) * machine.latency
    return total


def efficiency(
    machine: Machine, counts: Mapping[str, Any], counted: int, devices: int, weak: bool
) -> float:
    """Of ``devices``, beside one that computes alone.

    ``counts`` are those of one of ``counted`` devices. Weak: as many rows a device as
    there; strong: as many rows in all as one device had.
    """
    rows = 1.0 if weak else counted / devices
    alone = computing(machine, counts, 1.0 if weak else counted)
    together = computing(machine, counts, rows) + talking(machine, counts, devices)
    return alone / together / (1 if weak else devices)
