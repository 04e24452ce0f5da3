"""Words that every room shares: the step function, results, and strategies.

Legend used in all docstrings:

* ``f(params, inputs, h) -> h``: the step function, pure, on any pytrees.
* ``h``: the state; ``h_star`` (h*): a fixed point h* = f(θ, x, h*).
* J = ∂f/∂h at h*; ``vjp(v)`` = Jᵀv, ``jvp(v)`` = Jv.
* ``g``: the cotangent ∂L/∂h*; ``z``: the adjoint, (I - Jᵀ) z = g.
* ρ(J): spectral radius, the largest modulus of J's eigenvalues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform

import jax

PyTree = Any
"""Any nest of tuples, lists, dicts, … with arrays as leaves."""

StepFn = Callable[[PyTree, PyTree, PyTree], PyTree]
"""``f(params, inputs, h) -> h``: a state like ``h`` in structure, shapes and dtypes."""

LinearMap = Callable[[PyTree], PyTree]
"""A linear map from states to states, such as v ↦ Jᵀv."""


class Solution(NamedTuple):
    """What a solver returns: the value, and how good it is.

    Attributes:
      value: the state; same pytree as the start. The only differentiable field.
      num_steps: number of steps taken, an int32 scalar.
      residual: relative residual of ``value``, a float scalar. For a fixed point
        ‖f(h) - h‖ / max(‖h‖, ‖f(h)‖); for an adjoint ‖g + Jᵀz - z‖ / ‖g‖.
      converged: whether the solver reached its tolerance, a bool scalar.
    """

    value: PyTree
    num_steps: jax.Array
    residual: jax.Array
    converged: jax.Array


class ForwardSolver(Protocol):
    """Finds h with h = step(h). Any callable with this signature is a solver."""

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree, /) -> Solution:
        """Returns the fixed point found from ``h0``."""
        ...


class BackwardRule(Protocol):
    """Solves (I - Jᵀ) z = g, given v ↦ Jᵀv and g. Any such callable is a rule.

    J itself, where a rule needs it, is ``jax.linear_transpose(vjp, cotangent)``. A rule
    that can be started from an earlier adjoint takes it as a third argument, which is
    given only where there is one.
    """

    def __call__(self, vjp: LinearMap, cotangent: PyTree, /) -> Solution:
        """Returns the adjoint z."""
        ...


T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def strategy(cls: type[T]) -> type[T]:
    """Makes ``cls`` a frozen dataclass and a static pytree.

    Instances compare and hash by value and print as they were written, so that they
    can be closed over, passed through ``jax.jit`` or used as keys; equal instances
    share one compilation. Their fields are Python numbers, never arrays: an array in
    a static field would get gradient zero without a word, so ``__post_init__``
    validates each field with the functions of this module.
    """
    return jax.tree_util.register_static(dataclasses.dataclass(frozen=True)(cls))


def check_count(owner: object, name: str, value: object, minimum: int) -> None:
    """Raises ValueError unless ``value`` is a Python int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"{type(owner).__name__}: `{name}` must be a Python int of at least "
            f"{minimum}; got {value!r}. Arrays and tracers cannot be static fields."
        )


def check_real(
    owner: object,
    name: str,
    value: object,
    minimum: float = 0.0,
    below: float = float("inf"),
) -> None:
    """Raises ValueError unless ``value`` is a Python number in [minimum, below)."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not minimum <= value < below
    ):
        raise ValueError(
            f"{type(owner).__name__}: `{name}` must be a Python number in "
            f"[{minimum}, {below}); got {value!r}. "
            "Arrays and tracers cannot be static fields."
        )
