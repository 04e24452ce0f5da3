"""States on the way to a fixed point, out of one iteration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from rbpjax._core import reuse, sharding
from rbpjax._core.step import ClosedStep, close
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.implicit import AsItIs
from rbpjax.fixed_point.report import AdjointReport
from rbpjax.fixed_point.solve import rbp_solve
from rbpjax.types import BackwardRule, PyTree, Solution, Solve, StepFn


def rbp_states(
    f: StepFn, at: ArrayLike | Sequence[int], *, backward: BackwardRule = Adaptive()
) -> Solve:
    """The states after given numbers of steps, each with the gradient of a fixed point.

    ``solve(params, inputs, h0)`` applies f as often as the last of ``at`` says, and
    returns the states on the way: for a loss on several of them, or for the accuracy
    against the number of steps, at the cost of one iteration and one compilation.

    The gradient of each state is that of a fixed point at this state (the same as of
    ``rbp_fixed_point`` there), by ``backward`` from its own cotangent. It is exact, or
    truncated, as the rule is, where the state is a fixed point, and an approximation
    before, which ``residual`` measures; the exact one of the path is that of ``bptt``.
    No history is stored. The gradient of h0 is zero.

    Cost: that many evaluations of f and one more a state, backward one run of the rule
    a state, all at once. Memory: the states asked for. AD modes: reverse, every order.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      at: numbers of steps, integers that increase, of shape [k]; they may be traced.
      backward: any ``BackwardRule``; ``Neumann(steps=0)`` is the one-step gradient.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution`` with states stacked along a
      new leading axis of k, and all other fields of shape [k]; a probe has that shape
      too, ``AdjointReport.zeros((k,))``.

    Raises:
      ValueError: if ``at`` is no row of increasing integers from 0 on, or f changes the
        state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import rbp_states
      >>> solve = rbp_states(lambda a, x, h: a * h + x, at=(1, 2, 50))
      >>> solve(0.5, 1.0, 0.0).value.round(3).tolist()
      [1.0, 1.5, 2.0]
      >>> weights = jnp.array([0.0, 0.1, 1.0])
      >>> loss = lambda a: jnp.sum(weights * solve(a, 1.0, 0.0).value)
      >>> round(float(jax.grad(loss)(0.5)), 3)  # (0.1 · 1.5 + 2) / (1 - a)
      4.3

    References:
      The corrections of Bai et al., "Deep Equilibrium Optical Flow Estimation", CVPR
      2022, https://arxiv.org/abs/2204.08442.
    """
    numbers = _numbers(at)
    solve_from = rbp_solve(f, forward=AsItIs(), backward=backward)

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """The states from h0 on."""
        ends = jnp.asarray(numbers, jnp.int32)
        step, args, h = close(f, params, inputs, h0)
        passed = reuse.run(_passed, (step,), *lax.stop_gradient((args, ends, h)))
        one = lambda h, probe: solve_from(params, inputs, h, probe)
        solution = jax.vmap(one, (0, None if probe is None else 0))(passed, probe)
        return solution._replace(num_steps=ends, num_products=ends + 1)

    return solve


def _passed(step: ClosedStep, args: PyTree, numbers: jax.Array, h: PyTree) -> PyTree:
    """The states after those numbers of steps, stacked."""

    def to_next(h: PyTree, times: jax.Array) -> tuple[PyTree, PyTree]:
        zero, times = sharding.vary_like((jnp.zeros_like(times), times), h)
        h = lax.fori_loop(zero, times, lambda _, h: partial(step, args)(h), h)
        return h, h

    return lax.scan(to_next, h, jnp.diff(numbers, prepend=0))[1]


def _numbers(at: ArrayLike | Sequence[int]) -> ArrayLike:
    """``at`` as an array; ValueError unless it is what is wanted, if that is known."""
    numbers = at if isinstance(at, jax.core.Tracer) else np.asarray(at)
    good = numbers.ndim == 1 and numbers.size > 0
    good = good and jnp.issubdtype(numbers.dtype, jnp.integer)
    if good and not isinstance(numbers, jax.core.Tracer):
        good = numbers[0] >= 0 and bool((np.diff(numbers) > 0).all())
    if not good:
        raise ValueError(
            "rbp_states: `at` must be increasing integers from 0 on, such as (8, 16, "
            f"32); got {at!r}."
        )
    return numbers
