"""Baselines: gradients with the history stored, in the signature of ``rbp_solve``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax._core.step import close
from rbpjax.fixed_point.forward.iteration import relative_change
from rbpjax.fixed_point.hoisting import hoist
from rbpjax.fixed_point.report import AdjointReport
from rbpjax.types import PyTree, Solution, StepFn


def bptt(
    f: StepFn, num_steps: int, *, remat: bool | int = False
) -> Callable[..., Solution]:
    """Back-propagation through time: the exact gradient of ``num_steps`` steps.

    ``solve(params, inputs, h0)`` applies f ``num_steps`` times from h0. Exact for the
    h it returns, converged or not; unlike ``rbp_solve`` the start h0 has a gradient.

    Cost of the gradient: one VJP of f a step. Memory: linear in ``num_steps`` (all
    intermediate values of f); with ``remat`` the states at the ends of segments and
    one segment's intermediate values, O(√num_steps), for one more evaluation of f a
    step. AD modes: all.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      num_steps: T, the number of applications of f.
      remat: ``True`` to checkpoint in segments of about √T steps, or the length of a
        segment.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution`` with the last state as
      value. A probe is accepted and its gradient is zero: no adjoint is solved.

    Raises:
      ValueError: if ``num_steps`` or ``remat`` is out of range, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> solve = bptt(lambda a, x, h: a * h + x, num_steps=50)
      >>> loss = lambda a: jnp.sum(solve(a, jnp.ones(1), jnp.zeros(1)).value)
      >>> jax.grad(loss)(jnp.array([0.5])).round(9).tolist()
      [4.0]

    References:
      Werbos, "Backpropagation through time: what it does and how to do it", 1990.
    """
    _check_steps("num_steps", num_steps, 1)
    if isinstance(remat, bool):
        segment = math.isqrt(num_steps - 1) + 1 if remat else 0
    else:
        _check_steps("remat", remat, 1, num_steps, "num_steps")
        segment = remat

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """The state after num_steps steps from h0."""
        step, args, h0 = close(f, params, inputs, h0)
        step, args = hoist(step, args, h0)
        if not segment:
            h = _run(step, args, h0, num_steps)
        else:
            full = jax.checkpoint(lambda args, h: _run(step, args, h, segment))
            segments = num_steps // segment
            h, _ = lax.scan(lambda h, _: (full(args, h), None), h0, length=segments)
            h = _run(step, args, h, num_steps % segment)
        return _unrolled(step, args, h, num_steps)

    return solve


def tbptt(f: StepFn, num_steps: int, truncation: int) -> Callable[..., Solution]:
    """Truncated back-propagation through time: the last ``truncation`` steps count.

    The value is that of ``bptt``. Truncated, hence biased: the gradient is that of the
    last ``truncation`` applications of f, from a state taken as constant. At a fixed
    point it equals ``Neumann(truncation - 1)``.

    Cost of the gradient: one VJP of f for each of the last ``truncation`` steps.
    Memory: linear in ``truncation``. AD modes: all.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      num_steps: T, the number of applications of f.
      truncation: how many of the last applications are differentiated, 1 to T.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution``, as that of ``bptt``. The
      gradient with respect to ``h0`` is zero if ``truncation < num_steps``.

    Raises:
      ValueError: if ``truncation`` is not in 1 … ``num_steps``, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> solve = tbptt(lambda a, x, h: a * h + x, num_steps=50, truncation=1)
      >>> loss = lambda a: jnp.sum(solve(a, jnp.ones(1), jnp.zeros(1)).value)
      >>> jax.grad(loss)(jnp.array([0.5])).round(9).tolist()  # h* alone, not h*/(1 - a)
      [2.0]

    References:
      Williams and Peng, "An efficient gradient-based algorithm for on-line training of
      recurrent network trajectories", 1990.
    """
    _check_steps("num_steps", num_steps, 1)
    _check_steps("truncation", truncation, 1, num_steps, "num_steps")

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """The state after num_steps steps from h0."""
        step, args, h = close(f, params, inputs, h0)
        step, args = hoist(step, args, h)
        if truncation < num_steps:
            # All that enters is constant: nothing of these steps is stored.
            fixed, start = lax.stop_gradient((args, h))
            h = _run(step, fixed, start, num_steps - truncation)
        h = _run(step, args, h, truncation)
        return _unrolled(step, args, h, num_steps)

    return solve


def _run(step: Callable, args: PyTree, h: PyTree, length: int) -> PyTree:
    """``length`` applications of the step."""
    return lax.scan(lambda h, _: (step(args, h), None), h, length=length)[0]


def _unrolled(step: Callable, args: PyTree, h: PyTree, num_steps: int) -> Solution:
    """The solution, with a residual that the compiler removes when nobody reads it."""
    fixed, value = lax.stop_gradient((args, h))
    residual = relative_change(partial(step, fixed)(value), value)
    converged = residual <= tree.default_tol(h)
    return Solution(h, jnp.int32(num_steps), residual, converged)


def _check_steps(
    name: str, value: object, low: int, high: int | None = None, high_name: str = ""
) -> None:
    """Raises ValueError unless ``value`` is an int in [low, high]."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or value < low or (high is not None and value > high):
        limit = f" and at most {high_name}={high}" if high is not None else ""
        raise ValueError(
            f"`{name}` must be a Python int of at least {low}{limit}; got {value!r}."
        )
