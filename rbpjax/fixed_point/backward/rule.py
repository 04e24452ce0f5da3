"""What all rules share."""

from __future__ import annotations

import inspect

import jax.numpy as jnp

from rbpjax._core.step import check_like
from rbpjax.types import BackwardRule, LinearMap, PyTree, Solution


def apply_rule(
    rule: BackwardRule, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
) -> Solution:
    """``rule(vjp, cotangent)``, checked to be a solution like the cotangent."""
    if start is not None and not takes_start(rule):
        raise ValueError(
            f"the backward rule {rule!r} takes no start: to go on from an earlier "
            "adjoint, as of a probe, it must be callable as rule(vjp, cotangent, "
            "start). Add the argument, or give no adjoint to start from."
        )
    arguments = (vjp, cotangent) if start is None else (vjp, cotangent, start)
    solution = rule(*arguments)
    return check_solution(solution, cotangent, f"the backward rule {rule!r}")


def takes_start(rule: BackwardRule) -> bool:
    """Whether the rule can be called with a start as third argument."""
    try:
        inspect.signature(rule).bind(None, None, None)
    except TypeError:
        return False
    return True


def check_solution(solution: object, like: PyTree, source: str) -> Solution:
    """``solution`` with array fields, or ValueError if it is not one for ``like``."""
    if not isinstance(solution, Solution):
        raise ValueError(
            f"{source} must return rbpjax.Solution(value, num_steps, residual, "
            f"converged); got {type(solution).__name__}."
        )
    check_like(solution.value, like, f"the value returned by {source}", "the start")
    value, *diagnostics = solution
    return Solution(value, *map(jnp.asarray, diagnostics))
