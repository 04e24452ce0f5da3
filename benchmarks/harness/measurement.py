"""Time and memory of compiled functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def temporary_bytes(function: Callable, *args: Any) -> int:
    """Bytes of temporary memory that the compiled ``function`` asks for."""
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def interleaved_times(
    calls: Mapping[str, Callable[[], Any]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Wall-clock seconds of each call, taking turns so that noise hits all alike.

    In another order each time: what stands behind a call that leaves its threads
    spinning, or the caches full, would else always be the slower for it.
    """
    random = np.random.default_rng(0)
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name in random.permutation(list(calls)).tolist():
            start = clock()
            jax.block_until_ready(calls[name]())
            times[name].append(clock() - start)
    return times


def core_times(
    calls: Mapping[str, Callable[[], Any]], repetitions: int
) -> dict[str, list[float]]:
    """The same in seconds of all cores together, for a machine that is not idle."""
    return interleaved_times(calls, repetitions, time.process_time)


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}
