"""The contract of solvers and rules: how they are called, and what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax.numpy as jnp

from rbpjax._core import sharding
from rbpjax._core.low_rank import LowRank
from rbpjax._core.step import check_like
from rbpjax.types import ForwardSolver, PyTree, Solution, Status


def apply_solver(
    solver: ForwardSolver, step: Callable[[PyTree], PyTree], h0: PyTree
) -> Solution:
    """``solver(step, h0)``, checked to be a solution like the start.

    Its aux is None, or an estimate of (I - J)⁻¹ for the backward pass.
    """
    check_solver(solver)
    axes = sharding.coupling(step, h0)
    sharding.check_coupled(solver, axes, "forward=rbpjax.Hybrid()")
    with sharding.coupled(axes):
        solution = solver(step, h0)
    checked = check_solution(solution, h0, f"the forward solver {solver!r}")
    inverse = solution.aux if isinstance(solution.aux, LowRank) else None
    return checked._replace(aux=inverse)


def check_solver(solver: ForwardSolver) -> None:
    """Raises ValueError where a backward rule stands in a solver's place."""
    check_made(solver)
    if first_parameter(solver) == "vjp":
        raise ValueError(
            f"{solver!r} is a backward rule, called as rule(vjp, cotangent); a forward "
            "solver is called as solver(step, h0). A rule finds fixed points inside "
            f"Newton: Newton({solver!r})."
        )


def check_made(method: object) -> None:
    """Raises ValueError where a class stands in the place of its instance."""
    if isinstance(method, type):
        raise ValueError(
            f"{method.__name__} is a class; give an instance of it: "
            f"{method.__name__}()."
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
