"""The one loop of everything that trains: blocks of steps, saved, resumed, shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.progress import progress

State = TypeVar("State")


def train(
    checkpoints: Checkpoints,
    name: str,
    state: State,
    block: Callable[[State, int], State],
    num_blocks: int,
    *,
    every: int = 1,
    label: str | None = None,
) -> State:
    """``state = block(state, i)`` for i = 0 … ``num_blocks`` - 1.

    Goes on from where an interrupted run stopped. A block may depend on its number and
    its state alone (keys are folded with the number), so that the result is the same,
    bit for bit. What is measured on the way belongs into the state.

    Args:
      checkpoints: those of the whole run.
      name: of this training within the run.
      state: the first state, a pytree of arrays; a saved one has the same shapes.
      block: some steps, compiled by the caller.
      num_blocks: how many.
      every: blocks between two saves; the last one is saved in any case.
      label: of the progress bar, if not ``name``.

    Raises:
      UsageError: if what was saved is damaged.
    """
    done, state = checkpoints.restore(name, state)
    for i in progress(range(done, num_blocks), num_blocks, label or name, done):
        state = block(state, i)
        if (i + 1) % every == 0 or i + 1 == num_blocks:
            checkpoints.save(name, i + 1, state)
    return state
