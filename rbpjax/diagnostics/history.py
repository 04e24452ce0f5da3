"""Residuals against the budget: how both solves come to their ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rbpjax._core import tree
from rbpjax._core.convolution import channels_last
from rbpjax._core.step import check_like, close
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.backward.rule import apply_rule
from rbpjax.fixed_point.contract import apply_solver
from rbpjax.fixed_point.forward.hybrid import Hybrid
from rbpjax.types import BackwardRule, ForwardSolver, PyTree, Solution, StepFn


class History(NamedTuple):
    """What the two solves have after each budget; all fields have the shape [budgets].

    Attributes:
      budgets: steps that were allowed.
      forward_residual: relative residual of the best state by then.
      forward_products: evaluations of f and products with J that it took.
      backward_residual: ‖g + Jᵀz - z‖ / ‖g‖.
      backward_products: products with J or Jᵀ that it took.
    """

    budgets: jax.Array
    forward_residual: jax.Array
    forward_products: jax.Array
    backward_residual: jax.Array
    backward_products: jax.Array


def residual_history(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h0: PyTree,
    *,
    budgets: Sequence[int] | ArrayLike = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    forward: ForwardSolver = Hybrid(),
    backward: BackwardRule = Adaptive(),
    cotangent: PyTree | None = None,
) -> History:
    """The residuals of a forward and of a backward solve against their budgets.

    For a plot of how a solve converges, or of where it gets stuck. Each budget is a
    solve of its own, from the start, with ``max_steps`` (or ``steps``) of so many: what
    is shown is what a user with this budget gets, and no solver is changed by being
    watched. The backward solves are all at the state that ``forward`` finds with its
    own budget.

    Cost: the sum of all these solves, and one compilation of each. Memory: that of one
    solve. AD modes: not meant to be differentiated.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h0: the start.
      budgets: numbers of steps, positive integers, in any order.
      forward: a solver with ``max_steps`` or ``steps``.
      backward: a rule with ``max_steps`` or ``steps``, or ``RBP`` of such a solver.
      cotangent: g, a pytree like h0; ``None``: a random direction.

    Returns:
      A ``History``.

    Raises:
      ValueError: if a strategy has no budget, a budget is not positive, or f changes
        the state.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import FixedPointIteration, Neumann
      >>> from rbpjax.diagnostics import residual_history
      >>> history = residual_history(
      ...     lambda a, x, h: a * h + x, 0.5, 1.0, jnp.zeros(2), budgets=(1, 2, 3),
      ...     forward=FixedPointIteration(), backward=Neumann())
      >>> [round(r, 4) for r in history.backward_residual.tolist()]  # (1/2)ᵏ⁺¹
      [0.25, 0.125, 0.0625]

    References:
      ``residual_norms`` of scipy.sparse.linalg's callbacks are the like.
    """
    numbers = np.asarray(budgets)
    integers = numbers.ndim == 1 and numbers.size > 0 and numbers.dtype.kind in "iu"
    if not (integers and numbers.min() >= 1):
        raise ValueError(
            "residual_history: `budgets` must be positive integers, such as (1, 10, "
            f"100); got {budgets!r}."
        )
    for strategy, name in ((forward, "forward"), (backward, "backward")):
        _within(strategy, name, jnp.int32(1))
    step, args, h0 = close(f, params, inputs, h0)
    once = partial(step, args)
    ends = jnp.asarray(numbers, jnp.int32)

    def measured(solution: Solution) -> tuple[jax.Array, jax.Array]:
        return solution.residual, solution.num_products

    def search(end: jax.Array) -> tuple[jax.Array, jax.Array]:
        solver = _within(forward, "forward", end)
        return measured(apply_solver(solver, channels_last(once, h0), h0))

    h = apply_solver(forward, channels_last(once, h0), h0).value
    if cotangent is None:
        cotangent = tree.random_unit(jax.random.key(0), h)
    check_like(cotangent, h, "`cotangent`", "`h0`")
    vjp = jax.vjp(once, h)[1]

    def adjoint(end: jax.Array) -> tuple[jax.Array, jax.Array]:
        rule = _within(backward, "backward", end)
        return measured(apply_rule(rule, lambda v: vjp(v)[0], cotangent))

    return History(ends, *lax.map(search, ends), *lax.map(adjoint, ends))


def _within(strategy: Any, name: str, end: jax.Array) -> Any:
    """The strategy with that budget."""
    fields = {}
    if dataclasses.is_dataclass(strategy) and not isinstance(strategy, type):
        fields = {field.name: field for field in dataclasses.fields(strategy)}
    if getattr(strategy, "steps", None) is not None:
        return dataclasses.replace(strategy, steps=end)
    if "max_steps" in fields:
        return dataclasses.replace(strategy, max_steps=end)
    if "solver" in fields:
        inner = _within(strategy.solver, name, end)
        return dataclasses.replace(strategy, solver=inner)
    raise ValueError(
        f"residual_history: `{name}` must be a strategy with a budget of steps, such "
        f"as Neumann() or Hybrid(); got {strategy!r}."
    )
