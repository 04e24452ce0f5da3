"""Backpropagation through time over a sequence: the baselines that store history."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    check_state,
    floats,
    merge,
    no_noise,
)
from rbpjax.types import StepFn


def bptt(f: StepFn, loss: LossFn) -> Estimator:
    """Backpropagates through a whole sequence at once.

    One ``step`` consumes a sequence: ``x`` and ``y`` have a leading time axis. It
    returns the sum of the losses and its gradient, the state at the sequence's start
    taken as constant, and carries the state at its end.

    Exact for that sequence; fed with consecutive windows it is truncated BPTT, one
    update a window. Cost: one step and one VJP a time step; memory the states of the
    whole sequence, which grows with its length. Works under ``jit``, ``vmap``,
    ``scan`` and in all AD modes.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar``, at the state after each step.

    Returns:
      An ``Estimator`` over sequences, without influence or noise.

    Raises:
      ValueError: from ``step``, if ``f`` does not return its state's shapes and
        dtypes.

    Example:
      >>> f = lambda a, x, h: a * h + x
      >>> est = bptt(f, loss=lambda a, h, y: h)
      >>> carry = est.init(jnp.array(0.5), jnp.array(0.0))
      >>> carry, out = est.step(jnp.array(0.5), carry, jnp.ones(2), None, ())
      >>> float(out.loss), float(out.grads)  # 1 + (a + 1), and its derivative
      (2.5, 1.0)
    """

    def step(params, carry, x, y, noise):
        del noise
        x0 = jax.tree.map(lambda leaf: leaf[0], x)
        check_state(f, params, carry.h, x0)

        def total(p):
            theta = merge(p, params)

            def body(h, xy):
                h = f(theta, xy[0], h)
                return h, loss(theta, h, xy[1])

            h, losses = jax.lax.scan(body, carry.h, (x, y))
            return jnp.sum(losses), h

        grad = jax.value_and_grad(total, has_aux=True)
        (value, h), grads = grad(floats(params))
        return Carry(h, ()), OnlineOutput(value, grads)

    return Estimator(_init, no_noise, step)


def tbptt(f: StepFn, loss: LossFn, *, truncation: int) -> Estimator:
    """Backpropagates through consecutive windows of a sequence.

    Like ``bptt``, but the history is cut every ``truncation`` steps; the gradients of
    the windows, all at the same parameters, are summed. This is the window-summed
    variant: each loss of a window counts, and reaches back to the window's start.

    Truncated (biased): dependencies across a cut are lost, and the sign of the
    gradient may be wrong. Cost: one step and one VJP a time step; memory
    ``truncation`` states. Works under ``jit``, ``vmap``, ``scan``.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar``, at the state after each step.
      truncation: steps between cuts; divides the length of every sequence.

    Returns:
      An ``Estimator`` over sequences, without influence or noise.

    Raises:
      ValueError: ``truncation`` is no positive int, or does not divide the length of
        a sequence.

    Example:
      >>> f = lambda a, x, h: a * h + x
      >>> est = tbptt(f, loss=lambda a, h, y: h, truncation=1)
      >>> carry = est.init(jnp.array(0.5), jnp.array(0.0))
      >>> carry, out = est.step(jnp.array(0.5), carry, jnp.ones(3), None, ())
      >>> out.grads  # 0 + 1 + 1.5, each step blind to the one before
      Array(2.5, dtype=float64)
    """
    if isinstance(truncation, bool) or not isinstance(truncation, int):
        raise ValueError(f"`truncation` must be a Python int; got {truncation!r}.")
    if truncation < 1:
        raise ValueError(f"`truncation` must be at least 1; got {truncation}.")
    window = bptt(f, loss)

    def step(params, carry, x, y, noise):
        length = jax.tree.leaves((x, y))[0].shape[0]
        if length % truncation:
            raise ValueError(
                f"`truncation` = {truncation} must divide the length of the sequence, "
                f"{length}. Cut or pad the sequence."
            )
        xs, ys = jax.tree.map(
            lambda a: a.reshape(length // truncation, truncation, *a.shape[1:]), (x, y)
        )
        first = jax.tree.map(lambda a: a[0], (xs, ys))
        shapes = jax.eval_shape(window.step, params, carry, *first, noise)[1]

        def body(state, xy):
            carry, total = state
            carry, out = window.step(params, carry, xy[0], xy[1], noise)
            return (carry, optax.tree.add(total, out)), None

        (carry, out), _ = jax.lax.scan(
            body, (carry, optax.tree.zeros_like(shapes)), (xs, ys)
        )
        return carry, out

    return Estimator(_init, no_noise, step)


def _init(params, h0):
    del params
    return Carry(jax.tree.map(jnp.asarray, h0), ())
