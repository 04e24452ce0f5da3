"""Derivatives of a fixed point as plain functions of it: reverse and forward mode."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from rbpjax._core.step import check_like, close, only_arrays
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.backward.rule import apply_rule
from rbpjax.types import BackwardRule, PyTree, Solution, StepFn


def rbp_vjp(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h_star: PyTree,
    cotangent: PyTree,
    *,
    backward: BackwardRule = Adaptive(),
    start: PyTree | None = None,
) -> tuple[tuple[PyTree, PyTree], Solution]:
    """The gradient of a fixed point, as a plain function of the fixed point.

    Solves (I - Jᵀ) z = g by ``backward`` and returns (∂f/∂θ)ᵀz and (∂f/∂x)ᵀz. Exact,
    truncated or unbiased as the rule is, provided that h_star is a fixed point.

    Cost: one linearization of f and one rule, one VJP more with a start. AD modes:
    those of the rule's loops.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree; integer leaves get float0 cotangents, as in ``jax.vjp``, and
        leaves that are no arrays None.
      inputs: pytree, likewise.
      h_star: the fixed point, a pytree of floating-point arrays.
      cotangent: g, a pytree like ``h_star``.
      backward: any ``BackwardRule``.
      start: an adjoint to start from, such as that of the last training step, a pytree
        like ``h_star``; see ``AdjointReport``.

    Returns:
      ``((params_bar, inputs_bar), solution)``, the latter with the adjoint z as value.

    Raises:
      ValueError: if f changes the state, ``cotangent`` or ``start`` is not like
        ``h_star``, or the rule takes no start.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import rbp_vjp
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> f = lambda a, x, h: a * h + x  # h* = x / (1 - a), ∂h*/∂x = 1 / (1 - a)
      >>> a, x = jnp.array([0.5]), jnp.array([1.0])
      >>> (_, x_bar), _ = rbp_vjp(f, a, x, jnp.array([2.0]), jnp.array([1.0]))
      >>> print(x_bar)
      [2.]

    References:
      Liao et al. 2018, equations 8 and 9.
    """
    step, args, h_star = close(f, params, inputs, h_star)
    check_like(cotangent, h_star, "`cotangent`", "`h_star`")
    cotangent = jax.tree.map(jnp.asarray, cotangent)
    if start is not None:
        check_like(start, h_star, "`start`", "`h_star`")
        start = jax.tree.map(jnp.asarray, start)
    _, vjp = jax.vjp(step, args, h_star)
    solution = apply_rule(backward, lambda v: vjp(v)[1], cotangent, start)
    _, params_bar, inputs_bar = vjp(solution.value)[0]
    return (params_bar, inputs_bar), solution


def rbp_jvp(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h_star: PyTree,
    tangents: tuple[PyTree, PyTree],
    *,
    backward: BackwardRule = Adaptive(),
) -> Solution:
    """The directional derivative of a fixed point: forward mode.

    Solves (I - J) ḣ = ∂f/∂θ θ̇ + ∂f/∂x ẋ by ``backward``, which is handed v ↦ Jv in the
    place of v ↦ Jᵀv. Under ``jax.vmap`` over tangents it is what ``jacfwd`` would do.

    Cost: one linearization of f, one evaluation of its tangent, one rule.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree of floating-point arrays; leaves that are no arrays are set aside.
      inputs: pytree, likewise.
      h_star: the fixed point.
      tangents: ``(params_dot, inputs_dot)``, pytrees like params and inputs, with
        anything or None in place of the leaves that are no arrays.
      backward: any ``BackwardRule``.

    Returns:
      ``Solution`` with ḣ as value, a pytree like ``h_star``.

    Raises:
      ValueError: if f changes the state.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import rbp_jvp
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> f = lambda a, x, h: a * h + x
      >>> a, x, h = jnp.array([0.5]), jnp.array([1.0]), jnp.array([2.0])
      >>> h_dot = rbp_jvp(f, a, x, h, (jnp.zeros(1), jnp.ones(1))).value
      >>> print(h_dot)
      [2.]

    References:
      Liao et al. 2018, equation 6.
    """
    step, args, h_star = close(f, params, inputs, h_star)
    consts, params, inputs = args
    drive = lambda p, x: step((consts, p, x), h_star)
    _, h_dot = jax.jvp(drive, (params, inputs), only_arrays(tuple(tangents)))
    _, jvp = jax.linearize(partial(step, args), h_star)
    return apply_rule(backward, jvp, h_dot)
