"""Batches that are a function of their number: a training may go on from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np


def shuffled(
    arrays: tuple[np.ndarray, ...], size: int, *, seed: int
) -> Callable[[int], tuple[np.ndarray, ...]]:
    """``batch(k)``: ``size`` rows of each array, every row once in each epoch.

    What is left over at an epoch's end is left out.
    """
    count = len(arrays[0])
    per_epoch = count // size

    @lru_cache(2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def batch(k: int) -> tuple[np.ndarray, ...]:
        epoch, i = divmod(k, per_epoch)
        rows = order(epoch)[i * size : (i + 1) * size]
        return tuple(array[rows] for array in arrays)

    return batch
