"""A method of ``rules``: how one library gets value and gradient at a setting."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.comparison.problems import Problem

MEMORY_LIMIT = 4 * 2**30  # bytes; a program that asks for more is not run


class Setting(NamedTuple):
    """Forward and backward tolerance, or forward and backward steps."""

    forward: float
    backward: float


class Refused(Exception):
    """A method that cannot do a problem, and why."""


class Program(NamedTuple):
    """One compiled value-and-gradient."""

    call: Callable[[], tuple[Any, Any]]
    compile_s: float | None
    bytes: int | None


class Method(NamedTuple):
    library: str
    name: str
    program: Callable[[Problem, Setting], Program]
    unrolled: bool = False
    """Whether its settings are numbers of steps."""
    forward: bool = True
    """Whether it is worth running where the problem starts at its fixed point."""


def compiled(make: Callable, problem: Problem, setting: Setting) -> Program:
    """The jitted gradient for params and inputs of the loss at ``make``'s state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jaxopt, that it is no longer maintained

        # The start is an argument, or the compiler would compute with it.
        def loss(params: Any, inputs: Any, h0: jax.Array) -> jax.Array:
            return problem.loss(make(problem._replace(h0=h0), setting)(params, inputs))

        args = (problem.params, problem.inputs, problem.h0)
        start = time.perf_counter()
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
        seconds = time.perf_counter() - start
    size = int(program.memory_analysis().temp_size_in_bytes)
    if size > MEMORY_LIMIT:
        raise Refused(f"asks for {size / 2**30:.1f} GiB")
    return Program(partial(program, *args), seconds, size)


def gradient(result: tuple[Any, Any]) -> list[np.ndarray]:
    """The leaves of the gradient in what a program returned."""
    return [np.asarray(u) for u in jax.tree.leaves(result[1])]
