"""Baselines: gradients with the history stored, in the signature of ``rbp_solve``."""

from __future__ import annotations

import math
from functools import partial

import jax
from jax import lax

from rbpjax._core import reuse, sharding, tree
from rbpjax._core.convolution import channels_last
from rbpjax._core.step import ClosedStep, close, select_state, with_aux
from rbpjax.fixed_point.iterate import judged
from rbpjax.fixed_point.report import AdjointReport
from rbpjax.types import PyTree, Solution, Solve, StepFn


def bptt(
    f: StepFn,
    num_steps: int,
    *,
    truncation: int | None = None,
    remat: bool | int = False,
    has_aux: bool = False,
) -> Solve:
    """Back-propagation through time: the gradient of ``num_steps`` steps, or the last.

    ``solve(params, inputs, h0)`` applies f ``num_steps`` times from h0. Exact for the
    h it returns, converged or not; unlike ``rbp_solve`` the start h0 has a gradient.

    With ``truncation`` it is truncated, hence biased: the gradient is that of the last
    ``truncation`` applications of f, from a state taken as constant (TBPTT). At a fixed
    point it equals ``Neumann(steps=truncation - 1)``.

    Cost of the gradient: one VJP of f for each step that is differentiated. Memory:
    linear in their number (all intermediate values of f); with ``remat`` the states at
    the ends of segments and one segment's intermediate values, O(√num_steps), for one
    more evaluation of f a step. AD modes: all. Convolutions are written in the order
    that XLA for CPU runs fast inside loops, in f and in its VJP; in forward mode
    (``jax.jvp``) they are not, and slow there.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      num_steps: T, the number of applications of f.
      truncation: how many of the last applications are differentiated, 1 to T; all of
        them if ``None``.
      remat: ``True`` to checkpoint in segments of about the root of as many steps, or
        the length of a segment.
      has_aux: whether f returns a pair ``(h, aux)``; ``Solution.aux`` is then that of
        one evaluation more, at the last state, as with ``rbp_solve``.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution`` with the last state as
      value. A probe is accepted and its gradient is zero: no adjoint is solved. The
      gradient of ``h0`` is zero if ``truncation < num_steps``.

    Raises:
      ValueError: if ``num_steps``, ``truncation`` or ``remat`` is out of range, or f
        changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import bptt
      >>> def grad(solve):
      ...     loss = lambda a: jnp.sum(solve(a, jnp.ones(1), jnp.zeros(1)).value)
      ...     return jax.grad(loss)(jnp.array([0.5])).round(4).tolist()
      >>> f = lambda a, x, h: a * h + x
      >>> grad(bptt(f, 50)), grad(bptt(f, 50, truncation=1))  # h*/(1 - a), h* alone
      ([4.0], [2.0])

    References:
      Werbos, "Backpropagation through time: what it does and how to do it", 1990.
      Williams and Peng, "An efficient gradient-based algorithm for on-line training of
      recurrent network trajectories", 1990 (truncation).
    """
    check_count("num_steps", num_steps, 1)
    if truncation is not None:
        check_count("truncation", truncation, 1, num_steps, "num_steps")
    length = num_steps if truncation is None else truncation
    if isinstance(remat, bool):
        segment = math.isqrt(length - 1) + 1 if remat else 0
    else:
        limit = "num_steps" if truncation is None else "truncation"
        check_count("remat", remat, 1, length, limit)
        segment = remat
    state_of = select_state(f) if has_aux else f

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """The state after num_steps steps from h0."""
        step, args, h = close(state_of, params, inputs, h0)
        counts = num_steps, length, segment
        solution = reuse.run(_applied, (step, *counts), args, h)
        return with_aux(f, params, inputs, solution) if has_aux else solution

    return solve


def _applied(
    step: ClosedStep,
    num_steps: int,
    length: int,
    segment: int,
    args: PyTree,
    h: PyTree,
) -> Solution:
    """``num_steps`` steps, the last ``length`` differentiated, in segments if any."""
    if length < num_steps:
        # All that enters is constant: nothing of these steps is stored.
        fixed, start = lax.stop_gradient((args, h))
        h = _run(step, fixed, start, num_steps - length)
    if segment:
        full = jax.checkpoint(lambda args, h: _run(step, args, h, segment))
        segments = length // segment
        h, _ = lax.scan(lambda h, _: (full(args, h), None), h, length=segments)
    h = _run(step, args, h, length % segment if segment else length)
    return unrolled(step, args, h, num_steps)


def _run(step: ClosedStep, args: PyTree, h: PyTree, length: int) -> PyTree:
    """``length`` applications of the step."""
    once = channels_last(partial(step, args), h, differentiated=True)
    return lax.scan(lambda h, _: (once(h), None), h, length=length)[0]


def unrolled(step: ClosedStep, args: PyTree, h: PyTree, num_steps: int) -> Solution:
    """The solution, with a residual that the compiler removes when nobody reads it."""
    fixed, value = lax.stop_gradient((args, h))
    tol = tree.default_tol(h)
    once = partial(step, fixed)
    with sharding.summed(once, value):
        found = judged(once, value, num_steps, tol)
    return found._replace(value=h)


def check_count(
    name: str, value: object, low: int, high: int | None = None, high_name: str = ""
) -> None:
    """Raises ValueError unless ``value`` is an int in [low, high]."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or value < low or (high is not None and value > high):
        limit = f" and at most {high_name}={high}" if high is not None else ""
        raise ValueError(
            f"`{name}` must be a Python int of at least {low}{limit}; got {value!r}."
        )
