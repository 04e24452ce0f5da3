"""What iterations share: the residual, when to look at it, the best state so far."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.step import check_like
from rbpjax.types import ForwardSolver, PyTree, Solution, Status

C = TypeVar("C")


def relative_change(new: PyTree, old: PyTree) -> jax.Array:
    """‖new - old‖ / max(‖new‖, ‖old‖), and zero where both vanish.

    Plain sums of squares where they can be represented, which is nearly always: one
    pass over the states. Where states are tiny or huge, they are scaled by a power of
    two first, without rounding. Under ``vmap`` both are computed.
    """
    difference, squares = _squares(1.0, new, old)
    # Squares that count must be normal numbers, and so must their products with ε².
    info = jnp.finfo(squares.dtype)
    low, high = float(info.tiny) / float(info.eps) ** 2, float(info.max) / 8
    huge = squares >= high
    # Powers that bring a sum below `low` near the largest number, and the largest
    # entry to where as many of them as one likes can be summed.
    up = 2.0 ** ((math.log2(high) - math.log2(low)) // 2)
    down = 2.0 ** (-5 * info.maxexp // 8)
    scale = jnp.where(huge, down, up).astype(squares.dtype)
    difference, squares = lax.cond(
        huge | (squares <= low),
        _squares,
        lambda *_: (difference, squares),
        scale,
        new,
        old,
    )
    return jnp.sqrt(difference / jnp.where(squares == 0, 1, squares))


def _squares(scale: jax.Array | float, new: PyTree, old: PyTree) -> tuple:
    """‖new - old‖² and max(‖new‖², ‖old‖²) of the scaled states."""
    change = tree.scale(scale, tree.sub(new, old))
    new, old = tree.scale(scale, new), tree.scale(scale, old)
    squares = jnp.maximum(tree.vdot(new, new), tree.vdot(old, old))
    return tree.vdot(change, change), squares


def repeat(update: Callable[[C], C], times: int | jax.Array, carry: C) -> C:
    """``update`` applied ``times`` times, without a loop for once or not at all."""
    if isinstance(times, int) and times <= 1:
        return update(carry) if times == 1 else carry
    zero = sharding.vary_like(jnp.int32(0), (times, carry))
    times = sharding.vary_like(jnp.int32(times), (times, carry))
    return lax.fori_loop(zero, times, lambda _, c: update(c), carry)


def next_look(
    every: int | None,
    k: jax.Array,
    since: int | jax.Array,
    residual: jax.Array,
    before: jax.Array,
    tol: float | jax.Array,
) -> int | jax.Array:
    """Number of steps, after ``k`` of them, to the next look at the residual.

    That is ``every``, or, if ``None``, three quarters of the way to the tolerance at
    the rate of the last ``since`` steps, in which the residual fell from ``before``:
    every step in a divergence and near the end, and never more than ``k``, so that a
    rate that misleads can at most double the steps.
    """
    if every is not None:
        return every
    fallen, to_fall = jnp.log(residual / before), jnp.log(tol / residual)
    ahead = 0.75 * to_fall / fallen * jnp.asarray(since).astype(residual.dtype)
    most = k.astype(residual.dtype)
    return jnp.where(ahead >= 1, jnp.minimum(ahead, most), 1).astype(k.dtype)


class Best(NamedTuple):
    """The state with the least residual of those looked at, and the last residual.

    Attributes:
      value: that state.
      num_steps: steps taken to reach it.
      residual: its residual; infinite before the first look.
      last: the residual looked at last.
    """

    value: PyTree
    num_steps: jax.Array
    residual: jax.Array
    last: jax.Array

    @classmethod
    def none(cls, h0: PyTree) -> Best:
        """Before the first look."""
        zero = sharding.vary_like(jnp.int32(0), h0)
        infinity = jnp.array(jnp.inf, tree.real_dtype(h0))
        infinity = sharding.vary_like(infinity, h0)
        return cls(h0, zero, infinity, infinity)

    def updated(self, h: PyTree, num_steps: jax.Array, residual: jax.Array) -> Best:
        """With the state ``h`` looked at too."""
        better = residual < self.residual  # False for NaN
        return Best(
            tree.where(better, h, self.value),
            jnp.where(better, num_steps, self.num_steps),
            jnp.where(better, residual, self.residual),
            residual,
        )

    def unfinished(self, k: jax.Array, tol: float, max_steps: int) -> jax.Array:
        """Whether to go on after ``k`` evaluations.

        The tolerance is not met, the budget not spent, and the last residual is not
        1/√ε times the best.
        """
        eps = float(jnp.finfo(self.residual.dtype).eps)
        sane = (self.last <= self.residual * eps**-0.5) | (k == 0)  # False for NaN
        return (self.residual > tol) & (k <= max_steps) & sane

    def solution(
        self, num_products: jax.Array, tol: float, exhausted: jax.Array | bool
    ) -> Solution:
        """The best state as what a solver returns."""
        status = status_of(self.residual, tol, exhausted)
        converged = status == Status.CONVERGED
        return Solution(
            self.value, self.num_steps, num_products, self.residual, status, converged
        )


def status_of(
    residual: jax.Array,
    tol: float | jax.Array,
    exhausted: jax.Array | bool,
    resolved: jax.Array | bool = True,
) -> jax.Array:
    """The ``Status`` of a value with that residual, as an int32 scalar.

    ``exhausted``: whether the budget is spent; ``resolved``: whether the residual means
    anything beside rounding.
    """
    pick = lambda condition, status, other: jnp.where(
        condition, jnp.int32(status), other
    )
    small = residual <= tol
    status = pick(exhausted, Status.OUT_OF_BUDGET, jnp.int32(Status.STAGNATED))
    status = pick(small, pick(resolved, Status.CONVERGED, Status.ROUNDING), status)
    return pick(jnp.isfinite(residual), status, Status.NOT_FINITE)


def apply_solver(
    solver: ForwardSolver, step: Callable[[PyTree], PyTree], h0: PyTree
) -> Solution:
    """``solver(step, h0)``, checked to be a solution like the start."""
    check_solver(solver)
    return check_solution(solver(step, h0), h0, f"the forward solver {solver!r}")


def check_solver(solver: ForwardSolver) -> None:
    """Raises ValueError where a backward rule stands in a solver's place."""
    if first_parameter(solver) == "vjp":
        raise ValueError(
            f"{solver!r} is a backward rule, called as rule(vjp, cotangent); a forward "
            "solver is called as solver(step, h0). A rule finds fixed points inside "
            f"Newton: Newton({solver!r})."
        )


def first_parameter(function: Callable) -> str | None:
    """The name of the first parameter: by it solvers and rules are told apart."""
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except (TypeError, ValueError):  # built-in functions have no signature
        return None


def check_solution(solution: object, like: PyTree, source: str) -> Solution:
    """``solution`` with array fields, or ValueError if it is not one for ``like``.

    What a solver of a user's own left out is filled in: no steps, as many products as
    steps, an unknown residual (NaN), and a status or verdict from the other.
    """
    if not isinstance(solution, Solution):
        raise ValueError(
            f"{source} must return rbpjax.Solution(value=…, converged=…, …); got "
            f"{type(solution).__name__}."
        )
    value, steps, products, residual, status, converged, _ = solution
    check_like(value, like, f"the value returned by {source}", "the start")
    if status is None and converged is None:
        raise ValueError(
            f"{source} must say whether it converged: Solution(value=…, converged=…)."
        )
    if status is None:
        failed = jnp.int32(Status.OUT_OF_BUDGET)
        status = jnp.where(converged, jnp.int32(Status.CONVERGED), failed)
    if converged is None:
        converged = jnp.asarray(status) == Status.CONVERGED
    steps = 0 if steps is None else steps
    products = steps if products is None else products
    residual = jnp.array(jnp.nan) if residual is None else residual
    kinds = (jnp.int32, jnp.int32, None, jnp.int32, jnp.bool)
    fields = (steps, products, residual, status, converged)
    return Solution(value, *map(jnp.asarray, fields, kinds))
