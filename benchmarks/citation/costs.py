"""Time and memory of one training step of a citation network, against its rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.citation.training import Task, Trainer
from benchmarks.harness.measurement import interleaved_times, spread

ROUNDS = (100, 300, 1000, 3000, 10000)
REPETITIONS = 7


def measure(options: Any, task: Task, methods: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step as configured, and compiled bytes against the rounds.

    Memory is what the compiler reserves, so that nothing has to run: BPTT over 10,000
    rounds would take gigabytes. An implicit gradient does not store its rounds; its
    budget is raised all the same, so that the figure shows it.
    """
    result: dict[str, Any] = {}
    calls = {}
    for name, make in methods.items():
        update, arguments = _update(task, make(options))
        compiled = update.lower(*arguments).compile()
        calls[name] = partial(compiled, *arguments)
        result[name] = {"temporary_bytes": {}}
        for rounds in ROUNDS:
            longer = dataclasses.replace(options, num_steps=rounds)
            update, arguments = _update(task, make(longer))
            analysis = update.lower(*arguments).compile().memory_analysis()
            size = int(analysis.temp_size_in_bytes)
            result[name]["temporary_bytes"][str(rounds)] = size
    for name, times in interleaved_times(calls, REPETITIONS).items():
        result[name]["step_seconds"] = spread(times)
    return result


def _update(task: Task, solve: Any) -> tuple[Any, tuple]:
    """A jitted training step and its arguments."""
    trainer = Trainer(task, solve)
    arguments = (trainer.init(0), jnp.asarray(task.graph.train), jax.random.key(0))
    return jax.jit(trainer.update), arguments


def rows(result: dict[str, Any], titles: Mapping[str, str]) -> list[dict[str, str]]:
    """The table of costs: a row a method."""
    ends = str(ROUNDS[0]), str(ROUNDS[-1])
    made = []
    for name, cost in result["costs"].items():
        seconds = cost["step_seconds"]
        low, middle, high = (1e3 * seconds[k] for k in ("q25", "median", "q75"))
        made.append(
            {"method": titles[name], "step": f"{middle:.1f} ms [{low:.1f}, {high:.1f}]"}
            | {
                f"memory, {int(n):,} rounds": f"{cost['temporary_bytes'][n] / 1e6:.1f}"
                " MB"
                for n in ends
            }
        )
    return made
